"""The texts that a model is evaluated on: the validation split of prepared data, or files.

>>> for text in HeldOutTexts("validation split of data/novels", lambda: prepared_texts(Path("data/novels"))): text.name
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from config import style_name
from dataset import TokenData
from storage.catalogue import Catalogue, author_of
from tokenizer import load_tokenizer


@dataclass(frozen=True)
class HeldOutText:
    """A held-out text."""

    name: str
    author: str
    text: str
    style: str = ""
    """What prepare_data.py --control has marked it with."""


@dataclass(frozen=True)
class HeldOutTexts:
    """The held-out texts of a report, read again by each iteration: they need not fit into memory."""

    name: str
    read: Callable[[], Iterator[HeldOutText]]

    def __iter__(self) -> Iterator[HeldOutText]:
        return self.read()


def prepared_texts(folder: Path) -> Iterator[HeldOutText]:
    """The validation documents of prepared data, one at a time.

    Where no name tells the author, as of rows, it is the style, if the styles are authors.
    """
    data, tokenizer = TokenData.open(folder), load_tokenizer(folder)
    stream = data.val
    told = data.manifest.source.settings.get("control", {}).get("word") == "author"
    begins = [0]
    for first in range(0, len(stream), 1 << 20):
        part = stream.read(first, min(first + (1 << 20), len(stream)))
        if tokenizer.eot is not None:
            begins += (np.flatnonzero(part == tokenizer.eot) + first + 1).tolist()
    if begins[-1] < len(stream):
        begins.append(len(stream))
    style_of_id = {number: style for style, number in tokenizer.styles.items()}
    catalogue = Catalogue.load(folder)
    named = catalogue is not None and catalogue.count("val") == len(begins) - 1
    for number, (start, stop) in enumerate(pairwise(begins)):
        ids = stream.read(start, stop).tolist()
        text = tokenizer.decode(ids)
        name = catalogue.name("val", number) if catalogue is not None and named else f"document {number + 1}"
        author = catalogue.author(name, text) if catalogue is not None else author_of(name, text)
        style = style_of_id.get(ids[0], "")
        yield HeldOutText(name, author or (style if told else ""), text, style)


def file_texts(documents: Iterable[tuple[str, str, str]]) -> Iterator[HeldOutText]:
    """Texts from (name, author, text) of documents in files; an author's style is the one that bears his name."""
    for name, author, text in documents:
        yield HeldOutText(name, author, text, style_name(author))
