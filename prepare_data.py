"""Texts -> token shards: files, folders, a hub's data set or a preset's texts become data/NAME/, which train.py reads.

    python prepare_data.py --input novels/ more.txt --out data/novels --index
    python prepare_data.py --preset victorian --years 1837-1901     # PG-19 from the Hugging Face hub
    cat story.txt | python prepare_data.py --input - --tokenizer char --out data/story

The folder holds `train_000000.bin` …, `val_000000.bin` … (little-endian uint16, or uint32 beyond 65,536 ids), the
tokenizer and `manifest.json`. It appears atomically; an interrupted preparation continues where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cli import flag_value, parse_flags, run_main
from config import ROOT, ConfigError, load_config
from corpus import sources
from corpus.out_folder import PREPARED_FILES
from corpus.preparation import PrepareFlags, default_out, join_parts, prepare


def read_flags(given: Sequence[str]) -> PrepareFlags:
    """The flags over the defaults of the preset and of the source that they name. Raises ConfigError."""
    preset, hub = flag_value(given, "preset"), flag_value(given, "hub")
    defaults = load_config(preset).data.model_dump() if preset else {}
    if named := hub or flag_value(given, "source"):
        defaults |= sources.defaults(named) | {"source": named}
    if size := flag_value(given, "vocab-size"):
        refuse_another_vocabulary(given, size)
        defaults["tokenizer"] = "bpe"
    flags = parse_flags(PrepareFlags, given, defaults=defaults, description=__doc__)
    if hub and flags.source != hub:
        raise ConfigError([f"--hub {hub} and --source {flags.source}: give one of them"])
    if flags.join and not flags.out:
        raise ConfigError(["--join needs --out FOLDER"])
    return flags


def refuse_another_vocabulary(given: Sequence[str], size: str) -> None:
    """Raise ConfigError where the flags ask for a new vocabulary of `size` ids and for one that exists."""
    kind, folder = flag_value(given, "tokenizer"), flag_value(given, "tokenizer-from")
    if folder or kind not in (None, "bpe"):
        other = f"--tokenizer-from {folder}" if folder else f"--tokenizer {kind}"
        raise ConfigError([f"--vocab-size {size} asks for a new vocabulary, but {other} has its own: give one of them"])


def out_folder(flags: PrepareFlags) -> Path:
    """--out, otherwise data/ and the name of the preset or of the first input."""
    if flags.out:
        return flags.out
    if flags.preset:
        return default_out(flags.preset)
    first = "stdin" if flags.input[:1] == ("-",) else Path((flags.input or (flags.source,))[0]).stem
    return ROOT / "data" / (first or "mine")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; see the module's first lines. Returns the exit code."""

    def body() -> int:
        flags = read_flags(sys.argv[1:] if argv is None else argv)
        out = out_folder(flags)
        if flags.join:
            join_parts(flags.join, out)
        else:
            prepare(flags, out)
        if flags.index:
            from evaluation.originality import build_index

            build_index(out)
        if flags.s3_output:
            from storage.s3 import upload_folder

            upload_folder(out, flags.s3_output, keep=lambda name: PREPARED_FILES.fullmatch(name) is not None)
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
