"""HTML and XHTML pages: one document a file, the text as a browser shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from corpus.readers.book import Book, BookFile
from corpus.readers.markup import decode_markup, markup_text, parse_markup, tag_of

AUTHOR_NAMES = ("author", "dc.creator", "dcterms.creator")  # names of `<meta>` that hold the author


class HtmlFile(BookFile):
    suffixes: ClassVar[tuple[str, ...]] = (".html", ".htm", ".xhtml")
    kind: ClassVar[str] = "an HTML page"

    @classmethod
    def extract(cls, path: Path) -> Book:
        root = parse_markup(decode_markup(path.read_bytes()))
        return Book(markup_text(root), _author(root))


def _author(root: Any) -> str:
    for element in root.iter("*"):
        if tag_of(element) == "meta" and (element.get("name") or "").lower() in AUTHOR_NAMES:
            return (element.get("content") or "").strip()
    return ""
