"""What a document is, how its text is cleaned, and what a reader of a file format hands to the worker processes.

A reader (`corpus/readers/`) turns one file into a `SourceFile`, which knows how many documents it holds. A `SourceFile`
gives `Chunk`s, which are sent to the workers, and a `Chunk` gives `Piece`s of clean text:

    SourceFile.chunks(first) -> Chunk.read(options) -> Piece(document, text, …)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from corpus import gutenberg
from corpus.cleaning import (
    BOM,
    LAYOUT_SAMPLE,
    Layout,
    close_gaps,
    find_layout,
    fix_mojibake,
    has_gaps,
    normalise_newlines,
    strip_illustrations,
    strip_italics,
    strip_notes,
    unwrap,
)

TEXT_FIELD = "text"  # the field of rows that holds their text
YEAR_FIELD = "publication_date"  # the field that --years looks at
STYLE_FIELDS = {"author": ("author", "authors"), "decade": (YEAR_FIELD, "year", "date")}  # where rows may hold a style
CONVERT = "convert it to UTF-8 (`iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW`)"
CONVERT_ROW = f"{CONVERT}, or leave it out with --skip-bad-files"
UTF_16 = "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8 FILE > NEW`"


class DocumentError(ValueError):
    """A text that cannot be read; the message names the file, the place and the fix.

    kind: what such a file is called where a folder is read without it; empty where it is worth stopping for.
    """

    def __init__(self, message: str, kind: str = "damaged"):
        super().__init__(message)
        self.kind = kind


class Unreadable(str):
    """Why a file cannot be read that is `kind` (encrypted, damaged): a folder is read without it."""

    kind: str

    def __new__(cls, why: str, kind: str) -> Unreadable:
        made = super().__new__(cls, why)
        made.kind = kind
        return made

    def __reduce__(self) -> tuple[type[Unreadable], tuple[str, str]]:
        return Unreadable, (str(self), self.kind)


@dataclass(frozen=True)
class ReadOptions:
    """How texts are read, and which cleaning steps are on. Those from `strip_notes` to `strip_italics` clean books only."""

    unwrap: bool = True
    strip_licence: bool = True
    strip_notes: bool = True
    strip_illustrations: bool = True
    strip_italics: bool = True
    fix_mojibake: bool = False
    footnotes: bool = True
    """Footnotes and endnotes are kept, at the end of the text; of formats that tell them from it."""
    books: bool = False
    """All texts are books. If false, only texts with Project Gutenberg's licence or hard-wrapped lines count as books."""
    skip_bad: bool = False
    field: str = TEXT_FIELD
    """The field of rows that holds their text."""
    years: tuple[int, int] | None = None
    """Only rows whose YEAR_FIELD is within these two years, both included."""


class Piece(NamedTuple):
    """Clean text of one document, or of a part of it."""

    document: int
    text: str
    bytes: int
    """UTF-8 bytes of `text`."""
    last: bool
    """The document ends here."""
    counts: dict[str, int]
    """What cleaning did, for the manifest."""


class Chunk(Protocol):
    """What one worker reads at a time; it has to pickle. Chunks come in the order of the documents."""

    @property
    def document(self) -> int:
        """Number of its first document."""

    @property
    def documents(self) -> int:
        """Documents it holds, or 1 for a part of one."""

    @property
    def size(self) -> int:
        """Approximate bytes."""

    @property
    def path(self) -> Path:
        """Its file, for messages."""

    def read(self, options: ReadOptions) -> Iterator[Piece]:
        """Its pieces in order. Raises DocumentError."""


@dataclass(frozen=True)
class ByteRange:
    """Bytes start..stop of a file, for the chunks that are read in place; `document` is the number of the first one."""

    document: int
    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read_bytes(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class SourceFile(Protocol):
    """One file whose documents are counted before they are read."""

    kind: ClassVar[str]
    """What such a file is called in messages."""
    has_rows: ClassVar[bool]
    """A file holds many documents, which messages call rows."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> int: ...
    @property
    def documents(self) -> int: ...
    @property
    def counts(self) -> dict[str, int]:
        """What cleaning already did, for the manifest."""

    @property
    def facts(self) -> dict[str, str]:
        """What the file tells about its only document: `author`, `title`, `language`, `year`."""

    @property
    def sketches(self) -> Sequence[bytes]:
        """`duplicates.sketch` of each document; none of rows, which are compared when the split is made."""

    @property
    def split(self) -> str:
        """`train` or `val` where the source itself defines the split, otherwise empty."""

    def chunks(self, first: int) -> Iterator[Chunk]:
        """Its chunks in order; `first` is the number of its first document."""

    def style_values(self, what: str) -> Iterable[Any] | None:
        """Each document's own `author`, `decade` (any text with a year) or field `what`; None where the format
        has no such field.

        Raises DocumentError where this file alone lacks the field.
        """


def clean_document(document: int, data: bytes, options: ReadOptions) -> Piece:
    """The clean text of a whole document. Raises UnicodeDecodeError."""
    counts: dict[str, int] = {}
    data = normalise_newlines(data.removeprefix(BOM))
    if options.strip_licence:
        found = gutenberg.spans(data)
        counts = licence_counts(found, len(data))
        data = b"\n\n\n".join(data[start:stop] for start, stop in found)
    if not data or data.isspace():
        return Piece(document, "", 0, True, counts | {"empty_documents": 1})
    layout = layout_of(data[:LAYOUT_SAMPLE], options, "licence_documents" in counts)
    counts |= {"unwrapped_documents": 1} if layout.width else {}
    text, size, steps = clean_part(data, layout, options, True)
    return Piece(document, text, size, True, counts | steps)


def licence_counts(books: Sequence[gutenberg.Span], size: int) -> dict[str, int]:
    """What the manifest counts of a file of `size` bytes in which these books were found."""
    if books == [gutenberg.Span(0, size)]:
        return {}
    kept = sum(stop - start for start, stop in books)
    several = {"books_in_shared_files": len(books)} if len(books) > 1 else {}
    return {"licence_documents": max(1, len(books)), "licence_bytes": size - kept} | several


def skipped_row(document: int) -> Piece:
    """In place of a row that cannot be read, where --skip-bad-files leaves it out."""
    return Piece(document, "", 0, True, {"skipped_rows": 1})


def null_row(document: int) -> Piece:
    """In place of a row whose text is null: it has none, and is left out and counted."""
    return Piece(document, "", 0, True, {"null_rows": 1})


def layout_of(sample: bytes, options: ReadOptions, licence: bool) -> Layout:
    """The layout of a text that begins with `sample`. licence: it carried Project Gutenberg's."""
    found = find_layout(sample)
    book = options.books or licence or found.width > 0
    return replace(
        found, width=found.width if options.unwrap else 0, book=book, gaps=options.unwrap and has_gaps(sample)
    )


def clean_part(data: bytes, layout: Layout, options: ReadOptions, last: bool) -> tuple[str, int, dict[str, int]]:
    """The clean text of a document or of a part of it (LF line ends), its UTF-8 bytes, and what each step did.

    last: the document ends with it. Raises UnicodeDecodeError.
    """
    counts: dict[str, int] = {}
    if layout.book and options.strip_notes:
        data, counts["transcriber_notes"] = strip_notes(data, last)
    if layout.book and options.strip_illustrations:
        data, counts["illustrations"] = strip_illustrations(data)
    data, counts["joined_lines"] = unwrap(data, layout)
    data, counts["closed_gaps"] = close_gaps(data, layout)
    text, size = data.decode("utf-8"), len(data)
    if layout.book and options.strip_italics:
        text, counts["italics"] = strip_italics(text)
        size -= 2 * counts["italics"]
    if options.fix_mojibake and (fixed := fix_mojibake(text)) is not text:
        counts["mojibake_documents"] = int(fixed != text)
        text, size = fixed, len(fixed.encode())
    return text, size, {name: count for name, count in counts.items() if count}
