"""Plain text: one document a file, cut into chunks without changing a token."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

from corpus import cleaning, gutenberg
from corpus.cleaning import BOM, LAYOUT_SAMPLE, Layout, cut_after, normalise_newlines
from corpus.documents import (
    CONVERT,
    UTF_16,
    ByteRange,
    DocumentError,
    Piece,
    ReadOptions,
    Unreadable,
    clean_part,
    layout_of,
    licence_counts,
)
from corpus.duplicates import LARGEST, sketch
from storage.catalogue import HEAD, author_of

OTHER_FORMATS = {  # how files that are not plain text begin
    b"%PDF": "a PDF: save its text as .txt",
    codecs.BOM_UTF16_LE: UTF_16,
    codecs.BOM_UTF16_BE: UTF_16,
}


class Text(NamedTuple):
    """A text without licence, and where it may be cut."""

    cuts: tuple[int, ...]
    """Byte offsets: the start, where it may be cut, the end."""
    layout: Layout


@dataclass(frozen=True)
class TextFile:
    """A plain text without its byte order mark and licence; or several, where Project Gutenberg's books follow each other."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt",)
    kind: ClassVar[str] = "plain text"
    has_rows: ClassVar[bool] = False
    has_years: ClassVar[bool] = False

    name: str
    path: Path
    texts: tuple[Text, ...]
    counts: dict[str, int]
    split: str = ""
    sketches: tuple[bytes, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def inspect(cls, path: Path, name: str, options: ReadOptions, split: str) -> TextFile | str:
        """The text in a file, which is read through once."""
        with path.open("rb") as file:
            head = file.read(len(BOM) + 8)
            for beginning, what in OTHER_FORMATS.items():
                if head.startswith(beginning):
                    return Unreadable(f"{path}: this is {what}", "PDF" if what.startswith("a PDF") else "UTF-16")
            seen = _read_through(file)
            if seen.problem:
                return Unreadable(f"{path}: {seen.problem}", seen.kind)
            start = len(BOM) if head.startswith(BOM) else 0
            if seen.blank or seen.size == start:
                return cls(name, path, (), {}, split=split)
            counts: dict[str, int] = {"byte_order_marks": 1} if start else {}
            books = [gutenberg.Span(0, seen.size)]
            if options.strip_licence and seen.marks:
                books = gutenberg.spans_of(seen.marks, lambda begin, stop: _part(file, begin, stop), seen.size)
                counts |= licence_counts(books, seen.size)
                if gutenberg.undone(seen.size, books):
                    counts["licences_kept"] = 1
            texts, sketches = [], []
            for begin, stop in books:
                begin = max(begin, start)
                sample = _part(file, begin, min(stop, begin + LAYOUT_SAMPLE))
                layout = layout_of(sample, options, "licence_documents" in counts)
                if layout.width:
                    counts["unwrapped_documents"] = counts.get("unwrapped_documents", 0) + 1
                texts.append(Text(_cuts(file, begin, stop, layout), layout))
                sketches.append(sketch(_part(file, begin, min(stop, begin + LARGEST))))
            return cls(name, path, tuple(texts), counts, split, tuple(sketches))

    @property
    def documents(self) -> int:
        return len(self.texts)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where the texts begin, may be cut and end."""
        return tuple(cut for text in self.texts for cut in text.cuts)

    @property
    def size(self) -> int:
        return sum(text.cuts[-1] - text.cuts[0] for text in self.texts)

    def beginning(self, most: float) -> TextFile:
        """Of each of its texts as many chunks as `most` bytes hold, one at least: with the tokens that they have in the whole."""
        texts = tuple(
            text._replace(
                cuts=tuple(cut for number, cut in enumerate(text.cuts) if number < 2 or cut - text.cuts[0] <= most)
            )
            for text in self.texts
        )
        return replace(self, texts=texts)

    def chunks(self, first: int) -> Iterator[TextChunk]:
        for document, (cuts, layout) in enumerate(self.texts, first):
            for start, stop in pairwise(cuts):
                yield TextChunk(document, self.path, start, stop, layout, stop == cuts[-1])

    def style_values(self, what: str) -> list[str] | None:
        """The author by an `Author:` line or the file's name, the decade by a year in its name."""
        if what == "author":
            heads: list[str] = []
            with self.path.open("rb") as file:
                for text in self.texts:  # each with its header, which comes before it
                    head = _part(file, max(0, text.cuts[0] - HEAD) if heads else 0, text.cuts[0] + HEAD)
                    heads.append(
                        head[-2 * HEAD :].decode("utf-8", "ignore") if heads else head[:HEAD].decode("utf-8", "ignore")
                    )
            return [author_of(self.name, head) for head in heads]
        if what == "decade":
            return [Path(self.name).stem] * self.documents
        return None


@dataclass(frozen=True)
class TextChunk(ByteRange):
    """A part of a text file."""

    layout: Layout
    last: bool
    documents: int = 1

    def read(self, options: ReadOptions) -> Iterator[Piece]:
        data = normalise_newlines(self.read_bytes())
        try:
            text, size, counts = clean_part(data, self.layout, options, self.last)
        except UnicodeDecodeError:
            raise DocumentError(f"{self.path} changed while it was read: run the same command again") from None
        yield Piece(self.document, text, size, self.last, counts)


class Seen(NamedTuple):
    """What one reading of a file tells."""

    size: int
    blank: bool
    """It holds white space only."""
    problem: str = ""
    """Why it is no text that can be read."""
    kind: str = ""
    """What such a file is called."""
    marks: tuple[int, ...] = ()
    """Where it may hold Project Gutenberg's marks."""


def _read_through(file: BinaryIO) -> Seen:
    size, blank = file.seek(0, 2), True
    decoder = codecs.getincrementaldecoder("utf-8")()
    marks: list[int] = []
    last = b""
    file.seek(0)
    for offset in range(0, size, cleaning.CHUNK_BYTES):
        data = file.read(cleaning.CHUNK_BYTES)
        if (zero := data.find(b"\0")) >= 0:
            problem = f"a binary file (zero byte at byte offset {offset + zero}): only plain text can be read"
            return Seen(size, blank, problem, "binary")
        pending = len(decoder.getstate()[0])
        try:
            if pending or not data.isascii():
                decoder.decode(data, offset + len(data) == size)
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 at byte offset {offset - pending + error.start}; {CONVERT}"
            return Seen(size, blank, problem, "not UTF-8")
        marks += gutenberg.candidates(last + data, offset - len(last))
        last = data[-gutenberg.OVERLAP :]
        blank = blank and data.isspace()
    return Seen(size, blank, marks=tuple(marks))


def _part(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def _cuts(file: BinaryIO, start: int, stop: int, layout: Layout) -> tuple[int, ...]:
    """Offsets about CHUNK_BYTES apart where the text may be cut without changing a token."""
    cuts, window = [start], 1 << 16
    while cuts[-1] + cleaning.CHUNK_BYTES < stop:
        at = cuts[-1] + cleaning.CHUNK_BYTES
        found = None
        while found is None and at < stop:
            file.seek(at)
            found = cut_after(file.read(min(window, stop - at)), layout)
            at += window if found is None else found
        if found is None or at >= stop:
            break
        cuts.append(at)
    return (*cuts, stop)
