"""HTML and XHTML pages: one document a file, the text as a browser shows it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from corpus.readers.book import Book, BookFile
from corpus.readers.markup import decode_markup, markup_text, parse_markup, take_notes
from corpus.readers.package import text_of

AUTHOR_NAMES = ("author", "dc.creator", "dcterms.creator")  # names of `<meta>` that hold the author
DATE_NAMES = ("dc.date", "dcterms.created", "dcterms.date", "date")


class HtmlFile(BookFile):
    suffixes: ClassVar[tuple[str, ...]] = (".html", ".htm", ".xhtml")
    kind: ClassVar[str] = "an HTML page"

    @classmethod
    def extract(cls, path: Path) -> Book:
        root = parse_markup(decode_markup(path.read_bytes()))
        named = {
            (element.get("name") or element.get("property") or "").lower(): (element.get("content") or "").strip()
            for element in root.iter("meta")
        }
        notes = take_notes(root)
        language = root.get("lang") or root.get("xml:lang") or named.get("dc.language", "")
        year = next((named[name] for name in DATE_NAMES if named.get(name)), "")
        author = next((named[name] for name in AUTHOR_NAMES if named.get(name)), "")
        return Book(markup_text(root), author, year, text_of(root, "title"), language, tuple(notes))
