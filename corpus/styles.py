"""Which style each document has, so that a control id before it can say so (CTRL: Keskar et al. 2019).

    python prepare_data.py --input novels/ --control author --out data/novels
    python prepare_data.py --input stories.jsonl --control genre          # a field of the rows
    python prepare_data.py --input books/ --control genres.csv            # lines NAME,STYLE; NAME may hold * and ?

`author`, `folder` and `decade` are told by names and, where there are, by fields of the rows; any other word is a field. A
file maps names of documents to styles: CSV lines `NAME,STYLE`, or TOML, `NAME = "style"` or `style = ["NAME", ...]`.
"""

from __future__ import annotations

import csv
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from config import ConfigError, style_name
from corpus.documents import YEAR, Corpus, File, LinesFile, TableFile
from storage.catalogue import HEAD, author_of

FIELDS = {"author": ("author", "authors"), "decade": (YEAR, "year", "date")}  # where rows may tell it
KINDS = ("author", "folder", "decade")
MAPS = (".csv", ".toml")
IN_NAME = re.compile(r"(?<!\d)(1[0-9]{3}|20[0-9]{2})(?!\d)")
HEADS = ("style", "genre", "author", "label")  # second word of a CSV's first line that is only a heading


@dataclass(frozen=True)
class Control:
    """What tells a document's style: a word, or with `map` (pattern, style) pairs, of which the first that fits counts."""

    word: str
    map: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, word: str) -> Control:
        """What `--control` says. Raises ConfigError for a file that cannot be used."""
        if not word.lower().endswith(MAPS):
            return cls(word)
        try:
            text = Path(word).expanduser().read_text(encoding="utf-8-sig")
            pairs = list(_toml(text) if word.lower().endswith(".toml") else _csv(text))
        except (OSError, ValueError, csv.Error) as error:
            raise ConfigError([f"--control {word}: {getattr(error, 'strerror', None) or error}"]) from None
        if not pairs:
            raise ConfigError([f"--control {word}: no line of the form NAME,STYLE: write one for each document"])
        return cls(word, tuple(pairs))

    def mapped(self, name: str) -> str:
        """The style of a document's name: its path, file name, or that without ending."""
        path = Path(name)
        forms = (name, path.name, path.stem)
        return next((style for pattern, style in self.map if any(fnmatchcase(form, pattern) for form in forms)), "")


def _csv(text: str) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(csv.reader(text.splitlines())):
        if not any(row) or (number == 0 and len(row) > 1 and row[1].strip().lower() in HEADS):
            continue
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise ValueError(f"line {number + 1} is not NAME,STYLE: {','.join(row)[:60]}")
        yield row[0].strip(), row[1].strip()


def _toml(text: str) -> Iterator[tuple[str, str]]:
    for key, value in tomllib.loads(text).items():
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            yield from ((item, key) for item in value)
        else:
            raise ValueError(f'{key}: write NAME = "style" or style = ["NAME", ...]')


def styles_in(file: File, control: Control) -> list[str]:
    """The style of each document in a file, empty where nothing tells it. Raises ConfigError. Runs in a worker."""
    path = Path(getattr(file, "path", file.name))
    if control.map:
        return [style_name(control.mapped(file.name))] * file.documents
    if control.word == "folder":
        return [style_name(Path(file.name).parent.name or path.absolute().parent.name)] * file.documents
    fields = FIELDS.get(control.word, (control.word,))
    if isinstance(file, TableFile):
        values: Iterable[Any] = _column(file, fields, control)
    elif isinstance(file, LinesFile):
        values = _rows(path, fields)
    elif control.word in KINDS:
        with path.open("rb") as opened:
            head = opened.read(HEAD).decode("utf-8", "ignore")
        year = IN_NAME.search(Path(file.name).stem)
        told = author_of(file.name, head) if control.word == "author" else year[1] if year else ""
        values = [told] * file.documents
    else:
        raise ConfigError(
            [
                f"--control {control.word}: {path} is plain text without fields: give author, folder, decade, or a "
                f".csv or .toml file that names each document's style"
            ]
        )
    return [_value(value, control.word) for value in values]


def _value(value: Any, word: str) -> str:
    if word != "decade":
        return style_name(
            ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
        )
    year = IN_NAME.search(str(value))
    return f"{year[1][:3]}0s" if year else ""


def _column(file: TableFile, fields: Sequence[str], control: Control) -> list[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        found = next((name for name in fields if name in names), None)
        if found is None:
            raise ConfigError(
                [
                    f"--control {control.word}: {file.path} has no field {' or '.join(fields)} (it has {', '.join(names)}): "
                    f"name one of them, or give folder or a .csv file"
                ]
            )
        values: list[Any] = table.read(columns=[found]).column(0).to_pylist()
    return values if file.keep is None else [values[at] for at in np.flatnonzero(file.keep)]


def _rows(path: Path, fields: Sequence[str]) -> Iterator[Any]:
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:  # told of, or left out, when the text is read
                    row = None
                yield next((row[name] for name in fields if name in row), None) if isinstance(row, dict) else None


def largest(names: Sequence[str], corpus: Corpus, counted: np.ndarray, known: Sequence[str], room: int) -> list[str]:
    """The styles that get an id, largest first by their bytes: of all found in `counted` documents, `room` beside those `known`.

    counted: bool [documents], those that train.
    """
    sizes: dict[str, float] = {}
    at = 0
    for file in corpus.files:
        for name in names[at : at + file.documents]:
            if name and counted[at]:
                sizes[name] = sizes.get(name, 0.0) + file.size / file.documents
            at += 1
    new = [name for name in sizes if name not in known]
    return sorted(new, key=lambda name: (-sizes[name], name))[:room]


def describe(names: Sequence[str], styles: Sequence[str]) -> str:
    """One line: how many documents each style has, and how many have none."""
    counts = {style: 0 for style in styles}
    others = 0
    for name in names:
        if name in counts:
            counts[name] += 1
        else:
            others += 1
    told = ", ".join(f"{style} {count:,}" for style, count in counts.items() if count)
    return f"documents by style: {told}{f'; without one {others:,}' if others else ''}"
