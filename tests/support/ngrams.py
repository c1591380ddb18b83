"""Small texts of ids for the tests of counted n-grams."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset import TokenStream

VOCAB = 11


def stream_of(folder: Path, ids: list[int], shards: int = 1) -> TokenStream:
    """The ids as a split on the disk."""
    parts = np.array_split(np.array(ids, dtype=np.uint16), shards)
    files = [folder / f"train_{number:06d}.bin" for number in range(shards)]
    for file, part in zip(files, parts, strict=True):
        file.write_bytes(part.astype("<u2").tobytes())
    return TokenStream(files, [len(part) for part in parts], "uint16")


def some_ids(length: int = 600) -> list[int]:
    """Ids with frequent and rare n-grams; id 10 does not occur."""
    draw = np.random.default_rng(3)
    found = [int(one) for one in (draw.random(length) ** 3 * 10).astype(int)]
    return found[: length // 2] + [3, 1, 4] * 5 + found[length // 2 :] + found[: length // 3]
