"""A model as a web page that writes by itself: no server, no account, and no network but for its own file.

    >>> write_page("mine.html", model, tokenizer, name="mine", generation=GenerationParams(), card={}, licence="mit")
    >>> write_page_folder("mine", "runs/sample/best/model.safetensors", model, tokenizer, name="mine", ...)

The page is put together from web/offline/: page.html, style.css, sampling.js (chance, filters, stop strings), engine.js
(vocabulary, forward pass) and page.js (the user interface). One file holds the weights as base64, one block a tensor; a
folder has `model.safetensors` as it is, beside an `index.html` that reads it, for a static host. The page's
Content-Security-Policy lets in its own scripts and style sheet, by their hashes, in a folder also that one file of
its own host, and nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from config import SETTINGS, GenerationParams
from storage.atomic import CheckpointError, atomic_file, atomic_folder
from storage.gguf import gguf_name, gguf_tensors, packed
from storage.gpt2_format import CONV1D, clean_name
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from model import GPT

PARTS = Path(__file__).parents[1] / "web" / "offline"
SCRIPTS = ("sampling.js", "engine.js", "page.js")
INDEX, WEIGHTS = "index.html", "model.safetensors"
MOST = 60_000_000  # parameters; above this a browser generates slower than one reads
LONGEST = 5000  # tokens that the page writes at a time
APART = ("max_tokens", "temperature", "style", "seed")  # have places of their own in page.html
WITHOUT = ("n",)  # the page writes one text at a time
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
    """Write the one-file page atomically, replacing an older one of that name.

    card: facts of which `description`, `data`, `limits` and `val_loss` are shown. dtype auto: f16 where it holds every
    weight exactly, else f32. Raises CheckpointError for a model too large for a browser, OSError for the disk.
    """
    facts = _facts(model, tokenizer, name, generation, card, licence)
    if dtype == "auto":
        dtype = "f16" if _fits_float16(model) else "f32"
    blocks = [("vocabulary", _vocabulary(tokenizer))]
    tensors: list[dict[str, Any]] = []
    for label, values in gguf_tensors(model):
        numbers, form = packed(label, values, dtype)
        blocks.append((f"tensor-{len(tensors)}", numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()))
        tensors.append({"name": label, "shape": list(values.shape), "type": form.name.lower()})
    with atomic_file(path) as draft:
        _write_html(draft, {**facts, "tensors": tensors}, blocks)


def write_page_folder(
    folder: Path | str,
    weights: Path | str,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    name: str,
    generation: GenerationParams,
    card: Mapping[str, Any],
    licence: str = "",
) -> None:
    """Write a folder of `index.html` and a copy of the safetensors file `weights` atomically, replacing an older one.

    model: as loaded from that file. Raises CheckpointError for a model too large for a browser, a file whose numbers
    the page cannot read, or where `folder` holds something else; OSError for the disk.
    """
    facts = _facts(model, tokenizer, name, generation, card, licence)
    facts |= {"file": _identity(Path(weights)), "tensors": list(_places(Path(weights), model))}
    with atomic_folder(folder, kind="an exported page", replaces=is_page_folder) as draft:
        shutil.copyfile(weights, draft / WEIGHTS)
        _write_html(draft / INDEX, facts, [("vocabulary", _vocabulary(tokenizer))])


def is_page_folder(place: Path) -> bool:
    """Whether a folder holds what `write_page_folder` writes and nothing else."""
    return place.is_dir() and {path.name for path in place.iterdir()} == {INDEX, WEIGHTS}


def _facts(
    model: GPT, tokenizer: Tokenizer, name: str, generation: GenerationParams, card: Mapping[str, Any], licence: str
) -> dict[str, Any]:
    """What the page knows of the model besides its tensors."""
    count = model.num_parameters()
    if count > MOST:
        raise CheckpointError(
            f"--to html: {count / 1e6:.0f} million parameters are too many for a browser (at most {MOST // 1_000_000} "
            "million): take --to gguf, which llama.cpp, KoboldCpp and LM Studio run"
        )
    settings = generation.model_dump(mode="json", exclude={"seed", *WITHOUT})
    settings["max_tokens"] = min(max(generation.max_tokens, 1), LONGEST)
    return {
        "name": name,
        "licence": licence,
        "parameters": count,
        "card": {key: card[key] for key in ("description", "data", "limits", "val_loss") if card.get(key)},
        "settings": settings,
        "controls": controls(),
        "shape": {key: getattr(model.config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "tokens")},
        "vocabulary": {
            "kind": tokenizer.kind,
            "eot": tokenizer.eot,
            "start": tokenizer.start,
            "styles": tokenizer.styles,
            "controls": sorted(tokenizer.controls.values()),
        },
    }


def controls() -> list[dict[str, Any]]:
    """The fields behind the page's "More", one for each sampling setting but APART and WITHOUT, in their order.

    kind: number, phrases or bias; minimum and maximum are allowed values, above and below are not.
    """
    found = []
    for name, field in GenerationParams.model_json_schema()["properties"].items():
        if name in (*APART, *WITHOUT):
            continue
        control = {
            "name": name,
            "label": SETTINGS[name].label,
            "help": field["description"],
            "rare": SETTINGS[name].rare,
        }
        if "anyOf" in field:
            control |= {"kind": "phrases", "maximum": max(form.get("maxItems", 0) for form in field["anyOf"])}
        elif field["type"] == "object":
            control |= {"kind": "bias", "maximum": field["maxProperties"]}
        else:
            above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
            control |= {"kind": "number", "whole": field["type"] == "integer", "minimum": field.get("minimum", above)}
            control |= {"maximum": field.get("maximum", 1_000_000 if below is None else below)}
            control |= {key: value for key, value in (("above", above), ("below", below)) if value is not None}
        found.append(control)
    return found


def _identity(weights: Path) -> dict[str, Any]:
    """The file that the page may read: its name, its size and the checksum that browsers compare."""
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return {
        "name": WEIGHTS,
        "bytes": weights.stat().st_size,
        "integrity": f"sha256-{base64.b64encode(digest).decode('ascii')}",
    }


def _places(weights: Path, model: GPT) -> Iterator[dict[str, Any]]:
    """Each tensor's name, shape as nn.Linear has it, type, first byte in the safetensors file, and whether it lies turned."""
    with open(weights, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    held = {}
    for name, entry in header.items():
        with contextlib.suppress(KeyError, ValueError):  # metadata, and the causal masks of old files
            held[gguf_name(clean_name(name).removeprefix("transformer."))] = name, entry
    for label, values in gguf_tensors(model):
        if label not in held:
            raise CheckpointError(f"{weights} has no {label}: take --type f32, which writes the file anew")
        name, entry = held[label]
        if entry["dtype"] not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"{weights} holds {entry['dtype']} numbers: take --type f32 or f16, which write it anew"
            )
        place = {"name": label, "shape": list(values.shape), "type": entry["dtype"].lower()}
        yield {**place, "at": 8 + length + entry["data_offsets"][0], "turn": name.endswith(CONV1D)}


def _write_html(path: Path, facts: Mapping[str, Any], blocks: list[tuple[str, bytes]]) -> None:
    """The page with its data; `blocks` go in as base64."""
    head, tail = _frame(facts["name"], "file" in facts).split("<!--blocks-->")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(head)
        file.write(_block("model", "application/json", _script_safe(facts)))
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


def _frame(name: str, fetches: bool) -> str:
    """The page without its data: scripts and style in place, each allowed by its sha256. fetches: a file of its host."""
    style, *scripts = ((PARTS / part).read_text(encoding="utf-8") for part in ("style.css", *SCRIPTS))
    hashed = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
        for text in (style, *scripts)
    ]
    own = "connect-src 'self'; " if fetches else ""
    policy = (
        f"default-src 'none'; style-src {hashed[0]}; script-src {' '.join(hashed[1:])} 'wasm-unsafe-eval'; "
        f"img-src data:; {own}base-uri 'none'; form-action 'none'"
    )
    frame = (PARTS / "page.html").read_text(encoding="utf-8")
    filled = {
        "<!--policy-->": f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        "<!--title-->": f"<title>{html.escape(name)}</title>",
        "<!--style-->": f"<style>{style}</style>",
        "<!--scripts-->": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    for mark, content in filled.items():
        before, after = frame.split(mark)
        frame = before + content + after
    return frame
