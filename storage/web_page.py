"""A model as one self-contained web page that runs offline: no server, no network, no account.

    >>> write_page("mine.html", model, tokenizer, name="mine", generation=GenerationParams(), card={}, licence="mit")

The page is put together from web/offline/: page.html, style.css, engine.js (vocabulary, forward pass, sampling) and
page.js (the user interface). Weights and vocabulary lie in it as base64, one block a tensor. Its Content-Security-Policy
lets in its own two scripts and style sheet, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from config import GenerationParams
from storage.atomic import CheckpointError, atomic_file
from storage.gguf import gguf_tensors, packed
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from model import GPT

PARTS = Path(__file__).parents[1] / "web" / "offline"
MOST = 60_000_000  # parameters; above this a browser generates slower than one reads
SETTINGS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
Dtype = Literal["auto", "f16", "f32"]


def write_page(
    path: Path | str,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    name: str,
    generation: GenerationParams,
    card: Mapping[str, Any],
    licence: str = "",
    dtype: Dtype = "auto",
) -> None:
    """Write the page atomically, replacing an older one of that name.

    card: facts of which `description`, `data`, `limits` and `val_loss` are shown. dtype auto: f16 where it holds every
    weight exactly, else f32. Raises CheckpointError for a model too large for a browser, OSError for the disk.
    """
    count = model.num_parameters()
    if count > MOST:
        raise CheckpointError(
            f"--to html: {count / 1e6:.0f} million parameters are too many for a browser (at most {MOST // 1_000_000} "
            "million): take --to gguf, which llama.cpp, KoboldCpp and LM Studio run"
        )
    if dtype == "auto":
        dtype = "f16" if _fits_float16(model) else "f32"
    facts = {
        "name": name,
        "licence": licence,
        "parameters": count,
        "card": {key: card[key] for key in ("description", "data", "limits", "val_loss") if card.get(key)},
        "settings": {key: getattr(generation, key) for key in SETTINGS},
        "shape": {key: getattr(model.config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "tokens")},
        "vocabulary": {
            "kind": tokenizer.kind,
            "eot": tokenizer.eot,
            "start": tokenizer.start,
            "styles": tokenizer.styles,
            "controls": sorted(tokenizer.controls.values()),
        },
    }
    blocks = [("vocabulary", _vocabulary(tokenizer))]
    tensors: list[dict[str, Any]] = []
    for label, values in gguf_tensors(model):
        numbers, form = packed(label, values, dtype)
        blocks.append((f"tensor-{len(tensors)}", numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()))
        tensors.append({"name": label, "shape": list(values.shape), "type": form.name.lower()})
    with atomic_file(path) as draft, open(draft, "w", encoding="utf-8", newline="\n") as file:
        head, tail = _frame(name).split("<!--blocks-->")
        file.write(head)
        file.write(_block("model", "application/json", _script_safe({**facts, "tensors": tensors})))
        for label, content in blocks:
            file.write(_block(label, "text/plain", base64.b64encode(content).decode("ascii")))
        file.write(tail)


def _fits_float16(model: GPT) -> bool:
    """Whether float16 holds every number of the matrices exactly."""
    with np.errstate(over="ignore"):
        return all(
            np.array_equal(values.astype(np.float16).astype(np.float32), values)
            for label, values in gguf_tensors(model)
            if values.ndim > 1 and not label.startswith("position_embd")
        )


def _vocabulary(tokenizer: Tokenizer) -> bytes:
    """The length of each id's bytes as uint16, then all the bytes."""
    pieces = [tokenizer.piece(number) for number in range(tokenizer.vocab_size)]
    if max(map(len, pieces)) > 65535:
        raise CheckpointError("the vocabulary has an id of more than 65,535 bytes: a page cannot hold it")
    return np.array([len(piece) for piece in pieces], dtype="<u2").tobytes() + b"".join(pieces)


def _script_safe(content: Any) -> str:
    """JSON in which nothing can end or open an HTML element."""
    text = json.dumps(content, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _block(label: str, kind: str, content: str) -> str:
    return f'<script type="{kind}" id="{label}">{content}</script>\n'


def _frame(name: str) -> str:
    """The page without its data: scripts and style in place, each allowed by its sha256."""
    style, engine, page = ((PARTS / part).read_text(encoding="utf-8") for part in ("style.css", "engine.js", "page.js"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, engine, page)]
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; "
        f"script-src 'sha256-{hashes[1]}' 'sha256-{hashes[2]}' 'wasm-unsafe-eval'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    frame = (PARTS / "page.html").read_text(encoding="utf-8")
    filled = {
        "<!--policy-->": f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        "<!--title-->": f"<title>{html.escape(name)}</title>",
        "<!--style-->": f"<style>{style}</style>",
        "<!--engine-->": f"<script>{engine}</script>",
        "<!--page-->": f"<script>{page}</script>",
    }
    for mark, content in filled.items():
        before, after = frame.split(mark)
        frame = before + content + after
    return frame
