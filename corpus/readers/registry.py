"""The file formats that can be prepared: READERS, and what a reader has to offer.

A new format is a new file in this folder with a class like `TextFile`, or like `HtmlFile` where the text has to be
extracted from the whole file; and its class in READERS, the order of which is that of messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Protocol

from corpus.documents import ReadOptions, SourceFile
from corpus.readers.content import suffix_of
from corpus.readers.docx import DocxFile
from corpus.readers.epub import EpubFile
from corpus.readers.fb2 import Fb2File
from corpus.readers.html import HtmlFile
from corpus.readers.jsonl import JsonlFile
from corpus.readers.markdown import MarkdownFile
from corpus.readers.odt import OdtFile
from corpus.readers.parquet import ParquetFile
from corpus.readers.rtf import RtfFile
from corpus.readers.text import TextFile


class Reader(SourceFile, Protocol):
    """A class whose instances are the files of one format, as `inspect` makes them."""

    suffixes: ClassVar[tuple[str, ...]]
    """Endings of its files' names, in small letters."""
    has_years: ClassVar[bool]
    """`inspect` obeys `options.years`."""

    @classmethod
    def inspect(cls, path: Path, name: str, options: ReadOptions, split: str) -> SourceFile | str:
        """The documents in one file, none where it is empty; or, as text, why it cannot be read.

        split: `train` or `val` where the source defines the split. May raise OSError.
        """


READERS: tuple[type[Reader], ...] = (
    TextFile,
    JsonlFile,
    ParquetFile,
    HtmlFile,
    MarkdownFile,
    EpubFile,
    Fb2File,
    DocxFile,
    OdtFile,
    RtfFile,
)
SUFFIXES = tuple(suffix for reader in READERS for suffix in reader.suffixes)


def reader_of(path: Path) -> type[Reader]:
    """The reader for this file by its content; what no content tells apart (plain text, Markdown, rows) by its ending.

    Raises OSError.
    """
    suffix = suffix_of(path)
    return next((reader for reader in READERS if suffix in reader.suffixes), TextFile)
