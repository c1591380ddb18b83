"""Which files there are, checked before any work, and the documents in them, numbered in one order.

A text or a book is one document; each row of a `.jsonl` or `.parquet` file, by its field `text`, is one. `readers/` holds
one file a format.

    python -c "from corpus import finder; print([name for path, name in finder.find(['data/sample'])])"
    python prepare_data.py --input novels/ 'more/*.txt' stories.jsonl --out data/mine
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import ConfigError
from corpus.documents import YEAR_FIELD, Chunk, DocumentError, ReadOptions, SourceFile
from corpus.readers import archive
from corpus.readers.content import ABOUT, ARCHIVES, OBJECT, is_text, kind_of, suffix_of
from corpus.readers.registry import READERS, SUFFIXES, reader_of

SHOWN = 20  # files that a message names
HIDDEN = "hidden"  # these are counted but not named
OWN = re.compile(r"\..*\.(?:lock|part|old|stdin|unpacked)")  # what a preparation writes beside its folder


@dataclass(frozen=True)
class Corpus:
    """All documents of one preparation, numbered in order."""

    name: str
    files: Sequence[SourceFile]

    @property
    def documents(self) -> int:
        return sum(file.documents for file in self.files)

    @property
    def size(self) -> int:
        """Approximate bytes, for progress."""
        return sum(file.size for file in self.files)

    def chunks(self) -> Iterator[Chunk]:
        first = 0
        for file in self.files:
            yield from file.chunks(first)
            first += file.documents

    def splits(self, *names: str) -> np.ndarray:
        """Which documents are in files that the source itself puts into one of these splits, bool [documents]."""
        found = [np.full(file.documents, file.split in names) for file in self.files]
        return np.concatenate(found)

    def sizes(self) -> np.ndarray:
        """Approximate bytes of each document, float64 [documents]; of rows that are read together, their mean."""
        sizes = np.zeros(self.documents)
        for chunk in self.chunks():
            sizes[chunk.document : chunk.document + chunk.documents] += chunk.size / max(1, chunk.documents)
        return sizes

    def keys(self) -> np.ndarray:
        """A pseudo-random number for each document, from its file's name and its row there, uint64 [documents]."""
        keys = []
        for file in self.files:
            base = int.from_bytes(hashlib.blake2b(file.name.encode(), digest_size=8).digest(), "little")
            keys.append(_mix(np.arange(file.documents, dtype=np.uint64) + np.uint64(base)))
        return np.concatenate(keys)


class Found(NamedTuple):
    """The files of some inputs."""

    files: list[tuple[Path, str]]
    """Each file with the name it is known by: its path inside the folder given."""
    skipped: list[tuple[str, str]]
    """Names of the files that are not read, each with the kind of file it is."""


def find(inputs: Iterable[str]) -> list[tuple[Path, str]]:
    """The files of `inputs` as `search` finds them, archives as they are."""
    return search(inputs).files


def search(inputs: Iterable[str], unpack_into: Path | None = None, skip_bad: bool = False) -> Found:
    """Each file of `inputs` (files, folders, globs) once. Archives and lists of rows are unpacked into `unpack_into`.

    Folders are searched through, and sorted; hidden files, and those that are no texts, are skipped there. Raises
    ConfigError with every input that holds nothing, DocumentError for a file given by name (unless `skip_bad`), or the only one,
    if that cannot be unpacked.
    """
    found: dict[Path, tuple[Path, str]] = {}
    skipped: list[tuple[str, str]] = []
    named: set[Path] = set()  # files that are not skipped
    errors = []
    for item in inputs:
        path = Path(item).expanduser()
        if not skip_bad:
            named.add(path)
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            errors.append(f"--input {item}: no such file or folder, and no file matches it")
        files = [
            pair for match in matches for pair in (_inside(match, skipped) if match.is_dir() else [(match, match.name)])
        ]
        chosen = [pair for pair in files if pair[0] in matches or _is_chosen(*pair, skipped)]
        if matches and not chosen:
            errors.append(f"--input {item}: no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file in this folder")
        for file, name in chosen:
            found.setdefault(file.resolve(), (file, name))
    if errors:
        raise ConfigError(errors)
    pairs = list(found.values())
    return Found(_unpacked(pairs, named, unpack_into, skipped) if unpack_into else pairs, skipped)


def _unpacked(
    files: list[tuple[Path, str]], named: Collection[Path], folder: Path, skipped: list[tuple[str, str]]
) -> list[tuple[Path, str]]:
    """`files` with the members of archives in their place; those `named` by the user are not skipped."""
    result: list[tuple[Path, str]] = []
    for path, name in files:
        try:
            if not archive.is_packed(path):
                result.append((path, name))
                continue
        except OSError:  # named when it is inspected
            result.append((path, name))
            continue
        try:
            members = list(archive.unpack(path, name, folder))
        except DocumentError as error:
            if len(files) == 1 or not error.kind:
                raise
            if path in named:
                raise DocumentError(f"{error}, or leave it out with --skip-bad-files", error.kind) from None
            print(error, file=sys.stderr)
            skipped.append((name, error.kind))
            continue
        result += [(member.path, member.name) for member in members if _is_chosen(*member, skipped)]
    return result


def _is_chosen(path: Path, name: str, skipped: list[tuple[str, str]]) -> bool:
    """Whether a file in a folder is read; one that is not is added to `skipped`."""
    try:
        suffix = suffix_of(path)
    except OSError:  # named when it is inspected
        return path.suffix.lower() in SUFFIXES
    if any(part.startswith(".") for part in name.split("/")):
        why = HIDDEN
    elif ABOUT.fullmatch(path.name):
        why = "about the folder"
    elif suffix in SUFFIXES or suffix in ARCHIVES or archive.is_packed(path) or (not path.suffix and is_text(path)):
        return True
    else:
        why = kind_of(path)
    skipped.append((name, why))
    return False


def skipped_line(read: int, skipped: Sequence[tuple[str, str]]) -> str:
    """`13 of 15 files read; 2 skipped: cover.jpg (picture), drm.epub (encrypted)`."""
    named = [f"{name} ({why})" for name, why in skipped if why != HIDDEN]
    shown = named[:SHOWN] + ([f"{len(skipped) - len(named)} hidden"] if len(named) < len(skipped) else [])
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return f"{read} of {read + len(skipped)} files read; {len(skipped)} skipped: {', '.join(shown)}{more}"


def inspect(path: Path, name: str, options: ReadOptions, split: str = "") -> SourceFile | str:
    """The documents in one file, none where it is empty; or, as text, why it cannot be read.

    split: `train` or `val` where the source defines it.
    """
    try:
        if suffix_of(path) == OBJECT:
            return f"{path}: one JSON object, not a list of rows: write the rows as a list, or one a line (.jsonl)"
        reader = reader_of(path)
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    if options.years and not reader.has_years:
        suffixes = ", ".join(suffix for other in READERS if other.has_years for suffix in other.suffixes)
        return f"{path}: --years needs a field '{YEAR_FIELD}', which only {suffixes} files are searched for"
    try:
        return reader.inspect(path, name, options, split)
    except OSError as error:
        return f"{path}: {error.strerror or error}"


def _inside(folder: Path, skipped: list[tuple[str, str]]) -> list[tuple[Path, str]]:
    """The files in a folder and the folders in it, sorted by name; folders of prepared data are added to `skipped`."""
    files: dict[str, Path] = {}
    for where, folders, names in os.walk(folder):
        inside = Path(where).relative_to(folder)
        if {"manifest.json", "documents.json"} <= set(names):
            skipped.append((inside.as_posix(), "prepared data"))
            folders.clear()
            continue
        for name in [name for name in folders if name.startswith(".")]:
            folders.remove(name)
            skipped += [] if OWN.fullmatch(name) else [((inside / name).as_posix(), HIDDEN)]
        names = [name for name in names if not OWN.fullmatch(name)]
        files |= {(inside / name).as_posix(): Path(where, name) for name in names if Path(where, name).is_file()}
    return [(path, readable(name)) for name, path in sorted(files.items())]


def readable(name: str) -> str:
    """A file's name as text; bytes that are not UTF-8 become question marks in a box."""
    return os.fsencode(name).decode("utf-8", "replace")


def _mix(numbers: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014) of each uint64."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
