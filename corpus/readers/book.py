"""What the readers of e-book and word processor formats share: one document a file, its text extracted from the whole file.

Such a reader only defines how to extract the text; see `HtmlFile`. The text is extracted twice, once to check the file before
any work and once by the worker that encodes it, so that no more than one book is in memory at a time.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from corpus.documents import DocumentError, Piece, ReadOptions, Unreadable, clean_document
from corpus.duplicates import sketch
from storage.catalogue import author_of

YEAR = re.compile(r"(?<!\d)\d{4}(?!\d)")


class Book(NamedTuple):
    """The text of a file, and the metadata in the file itself."""

    text: str
    author: str = ""
    year: str = ""
    """Any text with a year of four digits."""
    title: str = ""
    language: str = ""
    notes: tuple[str, ...] = ()
    """Footnotes and endnotes, where the format tells them from the text."""

    def whole(self, options: ReadOptions) -> str:
        """The text with its notes at the end, or without them."""
        return "\n\n".join(filter(None, [self.text, *self.notes])) if options.footnotes else self.text

    def facts(self) -> dict[str, str]:
        """What the file tells about itself, for the catalogue."""
        year = YEAR.search(self.year)
        told = {"author": self.author, "title": self.title, "language": self.language, "year": year[0] if year else ""}
        return {name: " ".join(value.split()) for name, value in told.items() if value.strip()}


@dataclass(frozen=True)
class BookFile(ABC):
    """A file that is one document."""

    suffixes: ClassVar[tuple[str, ...]]
    kind: ClassVar[str]
    has_rows: ClassVar[bool] = False
    has_years: ClassVar[bool] = False

    name: str
    path: Path
    size: int
    """UTF-8 bytes of the extracted text."""
    documents: int
    facts: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    split: str = ""
    sketches: tuple[bytes, ...] = ()

    @classmethod
    @abstractmethod
    def extract(cls, path: Path) -> Book:
        """The text of a file: paragraphs separated by blank lines.

        Raises DocumentError with cause and remedy, OSError.
        """

    @classmethod
    def inspect(cls, path: Path, name: str, options: ReadOptions, split: str) -> Self | str:
        try:
            book = cls.extract(path)
        except DocumentError as error:
            return Unreadable(f"{path}: {error}", error.kind)
        text = book.whole(options)
        data = text.encode("utf-8", "replace")
        return cls(name, path, len(data), int(bool(text.strip())), book.facts(), split=split, sketches=(sketch(data),))

    def chunks(self, first: int) -> Iterator[BookChunk]:
        yield BookChunk(type(self), first, self.path, self.size)

    def style_values(self, what: str) -> list[str] | None:
        """The author and the year that the file itself names, else those in its name."""
        if what == "author":
            return [self.facts.get("author") or author_of(self.name)] * self.documents
        if what == "decade":
            return [self.facts.get("year") or Path(self.name).stem] * self.documents
        return None


@dataclass(frozen=True)
class BookChunk:
    """A whole book."""

    reader: type[BookFile]
    document: int
    path: Path
    size: int
    documents: int = 1

    def read(self, options: ReadOptions) -> Iterator[Piece]:
        try:
            text = self.reader.extract(self.path).whole(options)
        except DocumentError as error:
            raise DocumentError(f"{self.path}: {error}") from None
        yield clean_document(self.document, text.encode("utf-8", "replace"), options)
