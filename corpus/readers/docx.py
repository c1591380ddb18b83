"""Word documents (`.docx`), by mammoth: one document a file, with its tables, text boxes and notes, the notes at the end.

Of tracked changes the insertions are kept and the deletions left out. Comments, headers and footers are no part of the text.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any, ClassVar

from corpus.documents import DocumentError
from corpus.readers.book import Book, BookFile
from corpus.readers.markup import markup_text, parse_markup, take_notes
from corpus.readers.package import parse_part, read_parts, text_of

OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # how encrypted documents begin, and those of Word before 2007
WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
CORE = "docProps/core.xml"  # the document's metadata
BREAKS = "br[type='page'] => br\nbr[type='column'] => br"  # mammoth drops these breaks of a line by default
PASSED_OVER = ("fldSimple", "dir", "bdo")  # elements that mammoth ignores with the text in them: fields, directions
SAVE_AGAIN = "open it in a word processor and save it as .docx"


class DocxFile(BookFile):
    suffixes: ClassVar[tuple[str, ...]] = (".docx",)
    kind: ClassVar[str] = "a Word document"

    @classmethod
    def extract(cls, path: Path) -> Book:
        import mammoth

        parts = _text_parts(path.read_bytes())
        try:
            html = mammoth.convert_to_html(
                _package(parts),
                style_map=BREAKS,
                convert_image=mammoth.images.img_element(lambda image: {}),
                ignore_empty_paragraphs=False,
            ).value
        except (
            Exception
        ) as error:  # whatever a damaged document makes of the library, the file is named and the others read
            raise DocumentError(
                f"not {cls.kind} that can be read ({type(error).__name__}: {error}): {SAVE_AGAIN}"
            ) from None
        root = parse_markup(_mark_scene_breaks(html))
        notes = take_notes(root)
        core = parse_part(parts, CORE) if CORE in parts else parse_markup("")
        return Book(
            markup_text(root, keep_spaces=True),
            text_of(core, "creator"),
            text_of(core, "created"),
            text_of(core, "title"),
            text_of(core, "language"),
            tuple(notes),
        )


def _text_parts(data: bytes) -> dict[str, bytes]:
    """The XML parts of a document by name. Raises DocumentError where `data` is no whole Word document."""
    if data.startswith(OLE):
        if "EncryptedPackage".encode("utf-16-le") in data:
            raise DocumentError(
                "this Word document is encrypted: open it with its password and save it without one", "encrypted"
            )
        raise DocumentError(f"a document of Word before 2007 (.doc): {SAVE_AGAIN}", "Word before 2007")
    if not data.startswith(b"PK"):
        raise DocumentError(f"not a Word document: {SAVE_AGAIN}, or as .txt")
    parts = read_parts(data, "a Word document", lambda name: name.endswith((".xml", ".rels")))
    if not any(name.startswith("word/") for name in parts):
        raise DocumentError(f"a zip archive, but not a Word document (it holds no word/document.xml): {SAVE_AGAIN}")
    return parts


def _package(parts: dict[str, bytes]) -> io.BytesIO:
    """A document of `parts` for mammoth, with the elements that it ignores replaced: `cr`, `ruby` by its base text, others by
    what they hold; and without hidden text."""
    from lxml import etree

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as package:
        for name, data in parts.items():
            if name.startswith("word/") and any(
                f":{tag}".encode() in data for tag in ("cr", "ruby", "vanish", *PASSED_OVER)
            ):
                root = etree.fromstring(data, etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=True))
                for mark in list(root.iterfind(f".//{WORD}r/{WORD}rPr/{WORD}vanish")):
                    if mark.get(f"{WORD}val") not in ("0", "false", "off"):
                        _replace(mark.getparent().getparent(), [])
                for element in root.iter(f"{WORD}cr"):
                    element.tag = f"{WORD}br"
                for element in list(root.iter(f"{WORD}ruby")):
                    _replace(element, [run for base in element.iterfind(f"{WORD}rubyBase") for run in base])
                for element in list(root.iter(*(WORD + tag for tag in PASSED_OVER))):
                    _replace(element, list(element))
                data = etree.tostring(root)
            package.writestr(name, data)
    return file


def _replace(element: Any, others: list[Any]) -> None:
    """Put `others` into the place of `element`."""
    parent = element.getparent()
    place = parent.index(element)
    parent[place : place + 1] = others


def _mark_scene_breaks(html: str) -> str:
    """An empty paragraph as a further blank line, unless so many are empty that they only separate the paragraphs."""
    if 4 * html.count("<p></p>") < html.count("<p>"):
        return html.replace("<p></p>", "<br>")
    return html
