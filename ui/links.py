"""Permalinks: everything that is needed to write a passage again, as the value of `?write=`.

>>> unpacked(packed(desk))["prompt"]
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from config import GenerationParams
from ui.desk import Desk

MOST = 2_000_000  # bytes a link may unfold to


def packed(desk: Desk) -> str:
    """The newest passage as the value of `?write=`: all that is needed to write the same text again."""
    take = desk.story.passage
    if take is None:
        return ""
    recipe = {"prompt": desk.story.base, "params": take.params, "model": take.model}
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(recipe).encode(), 9)).decode().rstrip("=")


def unpacked(value: str) -> dict[str, Any]:
    """What `packed` packed. Raises ValueError for anything else."""
    try:
        raw = zlib.decompressobj().decompress(base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)), MOST)
        recipe = json.loads(raw)
        params = dict(recipe["params"])
        index = int(params.pop("index", 0))
        return {
            "prompt": str(recipe["prompt"]),
            "model": str(recipe["model"]),
            "params": GenerationParams.model_validate(params),
            "index": index,
        }
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"this link cannot be read ({type(error).__name__})") from None
