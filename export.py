"""Export a model: a GGUF file for llama.cpp, a self-contained web page, a folder for transformers.

    python export.py --to gguf                                        # the model as for generate.py, as NAME.gguf here
    python export.py --model runs/sample/best --to html               # NAME.html: opens in any browser, needs no server
    python export.py --model runs/sample/best --to html --folder      # the folder sample-page, for a static host
    python export.py --model runs/sample/best --to hf --out models/mine

docs/sharing.md lists the programs that take them, and how exactly they write what generate.py writes.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from checkpoint import WEIGHTS, copy_model, find_model, load_model, model_title
from cli import parse_flags, run_main
from config import ConfigError, FrozenSettings, GenerationParams
from storage.atomic import read_json
from storage.gpt2_format import OURS, folder_defaults

Type = Literal["auto", "f16", "q8_0", "f32"]
FORMATS: dict[str, tuple[str, ...]] = {"gguf": ("f16", "q8_0", "f32"), "html": ("f16", "f32"), "hf": ("f16", "f32")}


class ExportArgs(FrozenSettings):
    """Write a model in a form that other programs run: hf (transformers), gguf (llama.cpp), html (a browser)."""

    model: Path | None = None
    """A model folder or a run's; default: as for generate.py. It stays as it is."""
    to: Literal["hf", "gguf", "html"] | None = None
    """The form to write."""
    out: Path | None = None
    """The file to write, for hf and --folder the folder; default: NAME.gguf, NAME.html or NAME-page in this folder."""
    type: Type = "auto"
    """Format of the numbers: f16, q8_0 (gguf only) or f32; auto: f16, for html f32 unless f16 holds the weights exactly,
    with --folder as they are."""
    folder: bool = False
    """For html: a folder with index.html and the model's own model.safetensors, for a static host."""


def target(args: ExportArgs, folder: Path) -> Path:
    """The file or folder to write. Raises ConfigError that lists every error in the flags."""
    wrong = []
    if args.to is None:
        wrong.append("--to is missing: gguf (llama.cpp), html (a page for any browser) or hf (transformers)")
    elif args.type not in ("auto", *FORMATS[args.to]):
        wrong.append(f"--type {args.type} is not for --to {args.to}: take one of {', '.join(FORMATS[args.to])}")
    if args.folder and args.to != "html":
        wrong.append("--folder is for --to html: leave it out, or write a page")
    if args.to == "hf" and args.out is None:
        wrong.append("--out is missing: name the folder to write, like --out models/mine")
    if args.to == "hf" and args.out is not None and args.out.resolve() == folder.resolve():
        wrong.append(f"--out {args.out} is the model itself: name another folder")
    if wrong:
        raise ConfigError(wrong)
    return args.out or Path(model_title(folder) + ("-page" if args.folder else f".{args.to}"))


def licence_of(folder: Path) -> str:
    """The licence that the folder's card names in its head, or an empty text."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    head = card.split("\n---", 1)[0] if card.startswith("---\n") else ""
    found = re.search(r"^license: *(\S.*?) *$", head, re.M)
    return found[1] if found else ""


def about(folder: Path) -> dict[str, Any]:
    """What is known of a model: its card's facts, its name, its licence and its default sampling settings."""
    card = (read_json(folder / "config.json").get(OURS) or {}).get("card") or {}
    return {
        "name": model_title(folder),
        "licence": licence_of(folder),
        "generation": GenerationParams(**folder_defaults(folder)),
        "card": card,
    }


def to_hf(folder: Path, out: Path, dtype: Type) -> None:
    copy_model(folder, out, "float32" if dtype == "f32" else "float16")


def to_gguf(folder: Path, out: Path, dtype: Type) -> None:
    from storage.gguf import write_gguf

    model, tokenizer = load_model(folder)
    facts = about(folder)
    description = str(facts.pop("card").get("description") or "")
    write_gguf(out, model, tokenizer, description=description, dtype="f16" if dtype == "auto" else dtype, **facts)


def to_html(folder: Path, out: Path, dtype: Type) -> None:
    from storage.web_page import write_page

    assert dtype != "q8_0"  # refused by `target`
    model, tokenizer = load_model(folder)
    write_page(out, model, tokenizer, dtype=dtype, **about(folder))


def to_html_folder(folder: Path, out: Path, dtype: Type) -> None:
    from storage.web_page import write_page_folder

    facts = about(folder)
    with tempfile.TemporaryDirectory() as place:
        if dtype != "auto" or not (folder / WEIGHTS).is_file():  # or in several pieces
            copy_model(folder, Path(place) / "copy", "float16" if dtype == "f16" else "float32")
            folder = Path(place) / "copy"
        model, tokenizer = load_model(folder)
        write_page_folder(out, folder / WEIGHTS, model, tokenizer, **facts)


WRITERS: dict[str, Callable[[Path, Path, Type], None]] = {"hf": to_hf, "gguf": to_gguf, "html": to_html}


def as_bytes(folder: Path, to: str) -> bytes:
    """The file that `--to gguf` or `--to html` writes, for the app to hand out."""
    with tempfile.TemporaryDirectory() as place:
        WRITERS[to](folder, Path(place) / "made", "auto")
        return (Path(place) / "made").read_bytes()


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 when something failed, 2 for bad flags."""

    def body() -> int:
        args = parse_flags(ExportArgs, argv, examples=__doc__)
        if args.to is None:
            target(args, Path())
        folder = find_model(args.model)
        out = target(args, folder)
        (to_html_folder if args.folder else WRITERS[str(args.to)])(folder, out, args.type)
        size = sum(path.stat().st_size for path in (out.iterdir() if out.is_dir() else [out]))
        print(f"{out}: {size / 1e6:.1f} MB, of {folder}", file=sys.stderr)
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
