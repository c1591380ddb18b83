"""FictionBook (`.fb2`): one document a book, its title page, bodies and poems; the notes at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from corpus.documents import DocumentError
from corpus.readers.book import Book, BookFile
from corpus.readers.markup import markup_text, parse_xml, tag_of
from corpus.readers.package import attribute, find_all, text_of

AS_HTML = {  # FictionBook's elements as those of HTML; the others (p, table, tr, sup, …) are the same or inline
    "section": "section",
    "title": "header",
    "subtitle": "h2",
    "epigraph": "blockquote",
    "annotation": "blockquote",
    "cite": "blockquote",
    "poem": "section",
    "stanza": "section",
    "v": "div",
    "text-author": "p",
    "empty-line": "br",
    "image": "img",
    "date": "p",
    "strikethrough": "del",
}
NOTE_BODIES = ("notes", "comments", "footnotes")


class Fb2File(BookFile):
    suffixes: ClassVar[tuple[str, ...]] = (".fb2",)
    kind: ClassVar[str] = "a FictionBook"

    @classmethod
    def extract(cls, path: Path) -> Book:
        data = path.read_bytes()
        root = parse_xml(data if b"<" in data else b"<none/>")
        bodies = find_all(root, "body")
        if tag_of(root) != "fictionbook" or not bodies:
            raise DocumentError("not a FictionBook that can be read: copy or download it again")
        notes: list[str] = []
        texts: list[str] = []
        for body in bodies:
            is_notes = attribute(body, "name").lower() in NOTE_BODIES
            sections = [element for element in body if tag_of(element) == "section"] if is_notes else [body]
            for section in sections:
                _as_html(section)
                (notes if is_notes else texts).append(markup_text(section))
        info = next(iter(find_all(root, "title-info")), root)
        author = next(iter(find_all(info, "author")), None)
        names = [] if author is None else [text_of(author, name) for name in ("first-name", "middle-name", "last-name")]
        name = " ".join(filter(None, names)) or ("" if author is None else text_of(author, "nickname"))
        return Book(
            "\n\n".join(filter(None, texts)),
            name,
            text_of(info, "date") or next((attribute(date, "value") for date in find_all(info, "date")), ""),
            text_of(info, "book-title"),
            text_of(info, "lang"),
            tuple(filter(None, notes)),
        )


def _as_html(root: Any) -> None:
    """Rename the elements of a body. Marks of notes go; a note's own number, which is its title, goes as well."""
    for element in list(root.iter("*")):
        name = tag_of(element)
        if name == "a" and attribute(element, "type") == "note":
            element.set("role", "doc-noteref")
        if name == "title" and (element.getparent() is root and tag_of(root) == "section") and _is_number(element):
            element.tag = "head"
        else:
            element.tag = AS_HTML.get(name, name)


def _is_number(title: Any) -> bool:
    return "".join(title.itertext()).strip().strip("[]().*").isdigit()
