"""OpenDocument texts (`.odt`): one document a file, with tables and text boxes; notes at the end; comments, deletions and the
generated table of contents left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from corpus.documents import DocumentError
from corpus.readers.book import Book, BookFile
from corpus.readers.markup import markup_text, tag_of
from corpus.readers.package import attribute, find_all, parse_part, read_parts, text_of

SPACE = re.compile(r"[ \t\r\n]+")
AS_HTML = {"p": "p", "h": "h1", "list": "ul", "list-item": "li", "table": "table", "table-row": "tr", "table-cell": "td", "line-break": "br", "soft-page-break": "wbr", "text-box": "section"}  # fmt: skip
LEFT_OUT = frozenset(
    ["tracked-changes", "annotation", "annotation-end", "table-of-content", "note-citation", "ruby-text", "forms"]
)
WITH_TEXT = frozenset(["p", "h", "span", "a", "ruby-base", "meta", "meta-field", "bookmark-ref", "reference-ref"])


class OdtFile(BookFile):
    suffixes: ClassVar[tuple[str, ...]] = (".odt",)
    kind: ClassVar[str] = "an OpenDocument text"

    @classmethod
    def extract(cls, path: Path) -> Book:
        data = path.read_bytes()
        if not data.startswith(b"PK"):
            raise DocumentError(f"not {cls.kind}: open it in a word processor and save it as .odt")
        parts = read_parts(data, cls.kind, lambda name: name.endswith(".xml"))
        if "META-INF/manifest.xml" in parts and find_all(parse_part(parts, "META-INF/manifest.xml"), "encryption-data"):
            raise DocumentError(
                "this document is encrypted: open it with its password and save it without one", "encrypted"
            )
        bodies = find_all(parse_part(parts, "content.xml"), "text")
        if not bodies:
            raise DocumentError(f"not {cls.kind}: it holds no text")
        notes: list[str] = []
        text = markup_text(_as_html(bodies[0], notes), keep_spaces=True)
        meta = parse_part(parts, "meta.xml") if "meta.xml" in parts else bodies[0].makeelement("none")
        return Book(
            text,
            text_of(meta, "initial-creator", "creator"),
            text_of(meta, "creation-date", "date"),
            text_of(meta, "title"),
            text_of(meta, "language"),
            tuple(filter(None, notes)),
        )


def _as_html(source: Any, notes: list[str]) -> Any:
    """A tree of HTML's elements that keeps its spaces; the notes in it are appended to `notes`."""
    name = tag_of(source)
    made = source.makeelement(AS_HTML.get(name, "span") if source.tag != "office:text" else "body")
    last: Any = None

    def write(text: str) -> None:
        if last is None:
            made.text = (made.text or "") + text
        else:
            last.tail = (last.tail or "") + text

    has_text = name in WITH_TEXT
    write(SPACE.sub(" ", source.text or "") if has_text else "")
    for child in source:
        inner = tag_of(child)
        if inner == "s":
            write(" " * int(attribute(child, "c") or 1))
        elif inner == "tab":
            write("\t")
        elif inner == "note":
            body = next(iter(find_all(child, "note-body")), None)
            if body is not None:
                notes.append(markup_text(_as_html(body, notes), keep_spaces=True))
        elif inner and inner not in LEFT_OUT:
            last = _as_html(child, notes)
            made.append(last)
        write(SPACE.sub(" ", child.tail or "") if has_text else "")
    return made
