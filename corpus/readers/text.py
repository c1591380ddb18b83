"""Plain text: one document a file, cut into chunks without changing a token."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, ClassVar

from corpus import cleaning
from corpus.cleaning import BOM, LAYOUT_SAMPLE, LICENCE_WINDOW, Layout, cut_after, licence_bounds, normalise_newlines
from corpus.documents import CONVERT, ByteRange, DocumentError, Piece, ReadOptions, clean_part, layout_of
from storage.catalogue import HEAD, author_of

OTHER_FORMATS = {  # how files that are not plain text begin
    b"%PDF": "a PDF: save its text as .txt",
    b"PK\x03\x04": "a zip archive (also EPUB and Word files): unpack it or save its text as .txt",
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"\xff\xfe": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"PAR1": "a parquet file: give it the ending .parquet",
}


@dataclass(frozen=True)
class TextFile:
    """A plain text without its byte order mark and licence, and where it may be cut."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt",)
    kind: ClassVar[str] = "plain text"
    has_rows: ClassVar[bool] = False
    has_years: ClassVar[bool] = False

    name: str
    path: Path
    cuts: tuple[int, ...]
    """Byte offsets: the start, where it may be cut, the end."""
    layout: Layout
    counts: dict[str, int]
    documents: int = 1
    split: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def inspect(cls, path: Path, name: str, options: ReadOptions, split: str) -> TextFile | str:
        """The text in a file, which is read through once."""
        with path.open("rb") as file:
            head = file.read(LICENCE_WINDOW)
            for beginning, what in OTHER_FORMATS.items():
                if head.startswith(beginning):
                    return f"{path}: this is {what}"
            size, blank, problem = _check_encoding(file)
            if problem:
                return f"{path}: {problem}"
            start = len(BOM) if head.startswith(BOM) else 0
            if blank or size == start:
                return cls(name, path, (0,), Layout(), {}, documents=0, split=split)
            counts: dict[str, int] = {"byte_order_marks": 1} if start else {}
            stop = size
            if options.strip_licence:
                file.seek(max(0, size - LICENCE_WINDOW))
                begin, stop = licence_bounds(head, file.read(), size)
                if (begin, stop) != (0, size):
                    counts |= {"licence_documents": 1, "licence_bytes": size - (stop - begin)}
                    start = max(start, begin)
                if start >= stop:
                    return cls(name, path, (0,), Layout(), counts, documents=0)
            file.seek(start)
            sample = file.read(min(LAYOUT_SAMPLE, stop - start))
            layout = layout_of(sample, options, "licence_documents" in counts)
            counts |= {"unwrapped_documents": 1} if layout.width else {}
            return cls(name, path, _cuts(file, start, stop, layout), layout, counts, split=split)

    @property
    def size(self) -> int:
        return self.cuts[-1] - self.cuts[0]

    def chunks(self, first: int) -> Iterator[TextChunk]:
        for start, stop in pairwise(self.cuts):
            yield TextChunk(first, self.path, start, stop, self.layout, stop == self.cuts[-1])

    def style_values(self, what: str) -> list[str] | None:
        """The author by an `Author:` line or the file's name, the decade by a year in its name."""
        if what == "author":
            with self.path.open("rb") as file:
                head = file.read(HEAD).decode("utf-8", "ignore")
            return [author_of(self.name, head)] * self.documents
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


def _check_encoding(file: BinaryIO) -> tuple[int, bool, str]:
    """(size in bytes, whether the file holds white space only, what is wrong with it or "")."""
    size, blank = file.seek(0, 2), True
    decoder = codecs.getincrementaldecoder("utf-8")()
    file.seek(0)
    for offset in range(0, size, cleaning.CHUNK_BYTES):
        data = file.read(cleaning.CHUNK_BYTES)
        if (zero := data.find(b"\0")) >= 0:
            return size, blank, f"a binary file (zero byte at byte offset {offset + zero}): only plain text can be read"
        pending = len(decoder.getstate()[0])
        try:
            if pending or not data.isascii():
                decoder.decode(data, offset + len(data) == size)
        except UnicodeDecodeError as error:
            return size, blank, f"not UTF-8 at byte offset {offset - pending + error.start}; {CONVERT}"
        blank = blank and data.isspace()
    return size, blank, ""


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
