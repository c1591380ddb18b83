"""Permalinks: prompt, settings and seed of a passage, encoded as the value of `?write=`.

>>> decode_link(encode_link(opened))["prompt"]
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from config import GenerationParams
from ui.open_story import OpenStory

MAX_BYTES = 2_000_000  # that a link may decompress to


def encode_link(opened: OpenStory) -> str:
    """The value of `?write=` that generates the newest passage again; empty where there is none."""
    version = opened.story.passage
    if version is None:
        return ""
    recipe = {"prompt": opened.story.base, "params": version.params, "model": version.model}
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(recipe).encode(), 9)).decode().rstrip("=")


def decode_link(value: str) -> dict[str, Any]:
    """What `encode_link` encoded. Raises ValueError for anything else."""
    try:
        raw = zlib.decompressobj().decompress(base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)), MAX_BYTES)
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
