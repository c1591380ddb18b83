"""The same book under several names: near-duplicates by the shingles that two texts share.

    >>> near_duplicates([sketch(text) for text in texts])          # [[0, 3], …]: numbers of texts that are nearly the same

A shingle is the run of letters behind an anchor, which is four letters whose hash is small: wherever a text is moved, wrapped or cut,
its anchors stay. Of a text the SIZE smallest hashes are kept, by which the share of common shingles is estimated (Broder 1997).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

SIZE = 128
FEWEST = 12  # shingles of a text that can be compared
SHINGLE = 32  # letters
LIKE = 0.5  # share of common shingles from which two texts are one book
LARGEST = 1 << 19  # bytes of a text that are looked at
COMMON = 50  # texts that share a shingle which then tells nothing
LETTERS = bytes(
    byte + 32 if 65 <= byte <= 90 else byte if 97 <= byte <= 122 or byte >= 128 else 32 for byte in range(256)
)


def sketch(data: bytes) -> bytes:
    """The SIZE smallest hashes (uint32) of a text's shingles; empty where it is too short to be compared."""
    letters = data[:LARGEST].translate(LETTERS)
    codes = np.frombuffer(letters, dtype=np.uint8)
    if len(codes) < 8 * SHINGLE:
        return b""
    words = codes[:-3].astype(np.uint32)
    inner = codes[:-3] != 32
    for shift in (1, 2, 3):
        part = codes[shift : len(codes) - 3 + shift]
        words = words << np.uint32(8) | part
        inner &= part != 32
    anchors = np.flatnonzero(inner & ((words * np.uint32(2654435761)) >> np.uint32(24) == 0))
    hashes = {zlib.crc32(b"".join(letters[at : at + 2 * SHINGLE].split())[:SHINGLE]) for at in anchors.tolist()}
    if len(hashes) < FEWEST:
        return b""
    return np.sort(np.fromiter(hashes, dtype=np.uint32))[:SIZE].tobytes()


def near_duplicates(sketches: Sequence[bytes]) -> list[list[int]]:
    """Groups of at least two texts that are nearly the same, by their sketches; texts with an empty one are in none."""
    arrays = [np.frombuffer(found, dtype=np.uint32) for found in sketches]
    holders: dict[int, list[int]] = {}
    for number, array in enumerate(arrays):
        for value in array.tolist():
            holders.setdefault(value, []).append(number)
    shared: Counter[tuple[int, int]] = Counter()
    for numbers in holders.values():
        if 1 < len(numbers) <= COMMON:
            shared.update((one, two) for at, one in enumerate(numbers) for two in numbers[at + 1 :])
    group = list(range(len(sketches)))
    for (one, two), count in shared.items():
        if count >= FEWEST // 2 and group[one] != group[two] and _likeness(arrays[one], arrays[two]) >= LIKE:
            old, new = group[two], group[one]
            group = [new if number == old else number for number in group]
    members: dict[int, list[int]] = {}
    for number, root in enumerate(group):
        members.setdefault(root, []).append(number)
    return [found for found in members.values() if len(found) > 1]


def _likeness(one: np.ndarray, two: np.ndarray) -> float:
    """The share of common shingles, estimated from the smallest hashes of both together."""
    both = np.union1d(one, two)[: min(len(one), len(two), SIZE)]
    return float((np.isin(both, one) & np.isin(both, two)).mean())
