"""The folder that a preparation writes: a draft beside it, which replaces it when it is complete.

>>> with draft_folder(out) as draft:
...     write(draft)
...     replace_out(draft, out)
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from config import ConfigError
from storage.atomic import exclusive_lock
from storage.shards import SPLITS, Manifest
from tokenizer import load_tokenizer

PREPARED_FILES = re.compile(
    r"(train|val)_\d{6}\.bin|manifest\.json|tokenizer\.json|tokenizer_config\.json|documents\.json|originality|state\.json(\.tmp)?"
)


def old_folder(out: Path) -> Path:
    """Temporary path of the old folder during the swap."""
    return out.with_name(f".{out.name}.old")


def restore_old(out: Path) -> None:
    """Put the old folder back where a crash left `out` neither old nor new."""
    if old_folder(out).exists() and not out.exists():
        old_folder(out).rename(out)


def refuse_foreign(out: Path) -> None:
    """Refuse to replace what this program did not write."""
    if out.exists() and not out.is_dir():
        raise ConfigError([f"--out {out} is a file: give a folder"])
    foreign = (
        [path.name for path in out.iterdir() if not PREPARED_FILES.fullmatch(path.name) and path.name[0] != "."]
        if out.exists()
        else []
    )
    if foreign:
        raise ConfigError(
            [f"--out {out} holds {foreign[0]}, which is no prepared data: give another --out, or move it away"]
        )


def up_to_date(out: Path, identity: str) -> Manifest | None:
    """The manifest in `out`, if it was made from the same texts with the same settings and its shards are there."""
    try:
        manifest = Manifest.load(out)
        width = np.dtype(manifest.dtype).itemsize
        for name in SPLITS:
            for shard in getattr(manifest.splits, name).shards:
                if (out / shard.file).stat().st_size != shard.tokens * width:
                    return None
        load_tokenizer(out)
    except (ValueError, OSError):
        return None
    return manifest if manifest.source.identity == identity else None


@contextlib.contextmanager
def draft_folder(out: Path) -> Iterator[Path]:
    """The folder beside `out` to write into, locked against a second preparation.

    A ValueError (unfit texts or settings) removes it; whatever else ends the block leaves it for the next preparation.
    """
    draft = out.with_name(f".{out.name}.part")
    refusal = f"--out {out}: another prepare_data.py is writing it: wait for it, or give another --out"
    with exclusive_lock(out.with_name(f".{out.name}.lock"), refusal):
        draft.mkdir(exist_ok=True)
        try:
            yield draft
        except ValueError:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def replace_out(draft: Path, out: Path) -> None:
    """Put `draft` in the place of `out`. After a crash in between the next preparation finds `out` in `old_folder`."""
    old = old_folder(out)
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    try:
        draft.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    if old.exists():
        shutil.rmtree(old)
