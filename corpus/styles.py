"""Which style each document has. A control id before the document marks it (CTRL: Keskar et al. 2019).

    python prepare_data.py --input novels/ --control author --out data/novels
    python prepare_data.py --input stories.jsonl --control genre          # a field of the rows
    python prepare_data.py --input books/ --control genres.csv            # lines NAME,STYLE; NAME may hold * and ?

`author`, `folder` and `decade` are read from file names and, for rows, from their fields; any other word names a field. A
file maps names of documents to styles: CSV lines `NAME,STYLE`, or TOML, `NAME = "style"` or `style = ["NAME", ...]`.
"""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from config import ConfigError, style_name
from corpus.documents import DocumentError, SourceFile
from corpus.finder import Corpus

MAP_SUFFIXES = (".csv", ".toml")
YEAR = re.compile(r"(?<!\d)(1[0-9]{3}|20[0-9]{2})(?!\d)")
CSV_HEADINGS = ("style", "genre", "author", "label")  # second word of a CSV's first line that is only a heading


@dataclass(frozen=True)
class StyleSource:
    """Where styles come from: `author`, `folder`, `decade` or a field, or (pattern, style) pairs, the first match of which counts."""

    word: str
    map: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, word: str) -> StyleSource:
        """The value of `--control`, with the pairs of the file if it names one. Raises ConfigError for an unusable file."""
        if not word.lower().endswith(MAP_SUFFIXES):
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
        """The style that the pairs give to a document, by its path, its file name, or its file name without ending; or empty."""
        path = Path(name)
        forms = (name, path.name, path.stem)
        return next((style for pattern, style in self.map if any(fnmatchcase(form, pattern) for form in forms)), "")


def _csv(text: str) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(csv.reader(text.splitlines())):
        if not any(row) or (number == 0 and len(row) > 1 and row[1].strip().lower() in CSV_HEADINGS):
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


def document_styles(file: SourceFile, control: StyleSource) -> list[str]:
    """The style of each document in a file, empty where unknown. Raises ConfigError. Runs in a worker."""
    if control.map:
        return [style_name(control.mapped(file.name))] * file.documents
    if control.word == "folder":
        return [style_name(Path(file.name).parent.name or file.path.absolute().parent.name)] * file.documents
    try:
        values = file.style_values(control.word)
    except DocumentError as error:
        raise ConfigError(
            [f"--control {control.word}: {error}: name one of them, or give folder or a .csv file"]
        ) from None
    if values is None:
        raise ConfigError(
            [
                f"--control {control.word}: {file.path} is {file.kind} without fields: give author, folder, "
                f"decade, or a .csv or .toml file that names each document's style"
            ]
        )
    return [_style_of(value, control.word) for value in values]


def as_text(value: Any) -> str:
    """The value of a field as text: a list joined by commas, empty for None."""
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _style_of(value: Any, word: str) -> str:
    if word != "decade":
        return style_name(as_text(value))
    year = YEAR.search(str(value))
    return f"{year[1][:3]}0s" if year else ""


def largest_styles(
    names: Sequence[str], corpus: Corpus, counted: np.ndarray, known: Sequence[str], room: int
) -> list[str]:
    """The at most `room` new styles that get an id, those with the most bytes first, besides the `known` ones.

    names: the style of each document. counted: which documents count (those that train), bool [documents].
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


def style_counts(names: Sequence[str], styles: Sequence[str]) -> str:
    """One line: how many documents each style has, and how many have none."""
    counts = {style: 0 for style in styles}
    others = 0
    for name in names:
        if name in counts:
            counts[name] += 1
        else:
            others += 1
    listed = ", ".join(f"{style} {count:,}" for style, count in counts.items() if count)
    return f"documents by style: {listed}{f'; without one {others:,}' if others else ''}"
