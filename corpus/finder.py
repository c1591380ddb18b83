"""Which files there are, checked before any work, and the documents in them, numbered in one order.

A text or a book is one document; each row of a `.jsonl` or `.parquet` file, by its field `text`, is one. `readers/` holds
one file a format.

    python -c "from corpus import finder; print([name for path, name in finder.find(['data/sample'])])"
    python prepare_data.py --input novels/ 'more/*.txt' stories.jsonl --out data/mine
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import ConfigError
from corpus.documents import YEAR_FIELD, Chunk, ReadOptions, SourceFile
from corpus.readers.registry import READERS, SUFFIXES, reader_of


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

    def keys(self) -> np.ndarray:
        """A pseudo-random number for each document, from its file's name and its row there, uint64 [documents]."""
        keys = []
        for file in self.files:
            base = int.from_bytes(hashlib.blake2b(file.name.encode(), digest_size=8).digest(), "little")
            keys.append(_mix(np.arange(file.documents, dtype=np.uint64) + np.uint64(base)))
        return np.concatenate(keys)


def find(inputs: Iterable[str]) -> list[tuple[Path, str]]:
    """Each file of `inputs` (files, folders, globs) once, with the name it is known by: its path inside the folder given.

    Folders are searched through, hidden ones left out, and sorted. Raises ConfigError with every input that holds nothing.
    """
    found: dict[Path, tuple[Path, str]] = {}
    errors = []
    for item in inputs:
        path = Path(item).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            errors.append(f"--input {item}: no such file or folder, and no file matches it")
        files = [pair for match in matches for pair in (_inside(match) if match.is_dir() else [(match, match.name)])]
        if matches and not files:
            errors.append(f"--input {item}: no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file in this folder")
        for file, name in files:
            found.setdefault(file.resolve(), (file, name))
    if errors:
        raise ConfigError(errors)
    return list(found.values())


def inspect(path: Path, name: str, options: ReadOptions, split: str = "") -> SourceFile | str:
    """The documents in one file, none where it is empty; or, as text, why it cannot be read.

    split: `train` or `val` where the source defines it.
    """
    reader = reader_of(path)
    if options.years and not reader.has_years:
        suffixes = ", ".join(suffix for other in READERS if other.has_years for suffix in other.suffixes)
        return f"{path}: --years needs a field '{YEAR_FIELD}', which only {suffixes} files are searched for"
    try:
        return reader.inspect(path, name, options, split)
    except OSError as error:
        return f"{path}: {error.strerror or error}"


def _inside(folder: Path) -> list[tuple[Path, str]]:
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    return [
        (path, name)
        for name, path in sorted(names.items())
        if path.is_file() and not any(part.startswith(".") for part in name.split("/"))
    ]


def _mix(numbers: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014) of each uint64."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
