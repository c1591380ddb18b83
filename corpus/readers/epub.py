"""EPUB 2 and 3: one document a book, the text of its chapters in reading order (the package's spine).

The library for EPUB files among the requirements raises KeyError without `META-INF/container.xml` and fails on a missing
table of contents, which no reader needs, so the package is read here.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from corpus.documents import DocumentError
from corpus.readers.book import Book, BookFile
from corpus.readers.markup import decode_markup, markup_text, parse_markup, roles, tag_of, take_notes
from corpus.readers.package import attribute, find_all, parse_part, part_names, read_parts, resolve

CONTAINER, ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
OBFUSCATION = (
    "http://www.idpf.org/2008/embedding",
    "http://ns.adobe.com/pdf/enc#RC",
)  # of fonts, which is no encryption
NOT_TEXT = re.compile(
    r"\.(?:jpe?g|png|gif|svg|webp|bmp|tiff?|ttf|otf|woff2?|css|js|mp[34]|m4[av]|ogg|ncx|smil|pls|pdf)$", re.IGNORECASE
)
NAVIGATION = frozenset(["toc", "landmarks", "page-list", "loi", "lot"])
NOTES = frozenset(["footnotes", "endnotes", "rearnotes"])


class Item(NamedTuple):
    """A part of the book, as the manifest lists it."""

    name: str
    media_type: str
    properties: str


class EpubFile(BookFile):
    suffixes: ClassVar[tuple[str, ...]] = (".epub",)
    kind: ClassVar[str] = "an EPUB book"

    @classmethod
    def extract(cls, path: Path) -> Book:
        data = path.read_bytes()
        if not data.startswith(b"PK"):
            raise DocumentError("not an EPUB book: give it the ending of its real format")
        names = part_names(io.BytesIO(data))
        parts = read_parts(data, cls.kind, lambda name: not NOT_TEXT.search(name))
        package_name = _package_name(parts)
        package = parse_part(parts, package_name)
        items = {
            attribute(item, "id"): Item(
                resolve(package_name, attribute(item, "href")),
                attribute(item, "media-type").lower(),
                attribute(item, "properties"),
            )
            for item in find_all(package, "item")
        }
        spine, aside = _reading_order(package, package_name, items)
        _refuse_encrypted(parts, [item.name for item in [*spine, *aside]])
        texts: list[str] = []
        notes: list[str] = []
        for item in spine:
            root = _parse(parts, names, item)
            if "nav" in item.properties.split() or root is None or _is_navigation(root):
                continue
            notes += take_notes(root)
            texts.append(markup_text(root))
        for item in aside:  # read by a link only: what is not part of the reading order, except for the notes
            if (root := _parse(parts, names, item)) is not None:
                notes += take_notes(root) or ([markup_text(root)] if _holds_notes(root) else [])
        return _book(package, "\n\n".join(filter(None, texts)), tuple(notes))


def _package_name(parts: dict[str, bytes]) -> str:
    if CONTAINER in parts:
        for file in find_all(parse_part(parts, CONTAINER), "rootfile"):
            if (name := resolve("", attribute(file, "full-path"))) in parts:
                return name
    found = sorted(name for name in parts if name.lower().endswith(".opf"))
    if not found:
        raise DocumentError("an EPUB book without its package document (.opf): copy or download it again")
    return found[0]


def _reading_order(package: Any, base: str, items: dict[str, Item]) -> tuple[list[Item], list[Item]]:
    """The items to be read in order, and those outside the reading order. Raises DocumentError where one is not listed."""
    spine: list[Item] = []
    aside: list[Item] = []
    contents = {
        resolve(base, attribute(entry, "href"))
        for entry in find_all(package, "reference")
        if attribute(entry, "type").lower() == "toc"
    }
    for entry in find_all(package, "itemref"):
        item = items.get(attribute(entry, "idref"))
        if item is None:
            raise DocumentError(f"its reading order names {attribute(entry, 'idref')!r}, which it does not list")
        if NOT_TEXT.search(item.name) or item.name in contents:
            continue
        (aside if attribute(entry, "linear").lower() == "no" else spine).append(item)
    if not spine:  # without a spine, what is text, as it is listed
        spine = [item for item in items.values() if "html" in item.media_type and item.name not in contents]
    return list(dict.fromkeys(spine)), aside


def _refuse_encrypted(parts: dict[str, bytes], texts: list[str]) -> None:
    """Raise DocumentError where text is encrypted; fonts may be obfuscated."""
    if ENCRYPTION not in parts:
        return
    for entry in find_all(parse_part(parts, ENCRYPTION), "encrypteddata"):
        methods = [attribute(method, "Algorithm") for method in find_all(entry, "encryptionmethod")]
        targets = [resolve("", attribute(target, "URI")) for target in find_all(entry, "cipherreference")]
        if any(target in texts for target in targets) and not all(method in OBFUSCATION for method in methods):
            raise DocumentError(
                "this EPUB book is encrypted (DRM), and only the shop's own programs can read it", "encrypted"
            )


def _parse(parts: dict[str, bytes], names: list[str], item: Item) -> Any:
    """The tree of an item; None where it is no text. Raises DocumentError where it is missing."""
    if item.name not in parts:
        match = [name for name in names if name.lower() == item.name.lower() and name in parts]
        if not match:
            raise DocumentError(f"its reading order names {item.name}, which it lacks: copy or download it again")
        item = item._replace(name=match[0])
    return parse_markup(decode_markup(parts[item.name]))


def _is_navigation(root: Any) -> bool:
    """A page that is nothing but navigation."""
    body = next((element for element in root.iter("*") if tag_of(element) == "body"), root)
    return any(NAVIGATION & roles(element) and tag_of(element) in ("body", "nav") for element in [body, *body])


def _holds_notes(root: Any) -> bool:
    return any(NOTES & roles(element) for element in root.iter("*"))


def _book(package: Any, text: str, notes: tuple[str, ...]) -> Book:
    """The text with the metadata of the package."""
    roles_of = {
        attribute(meta, "refines").lstrip("#"): (meta.text or "").strip()
        for meta in find_all(package, "meta")
        if attribute(meta, "property") == "role"
    }
    creators = find_all(package, "creator")
    authors = [c for c in creators if (attribute(c, "role") or roles_of.get(attribute(c, "id"), "aut")) == "aut"]
    dates = [date for date in find_all(package, "date") if attribute(date, "event") != "modification"]
    dates.sort(key=lambda date: "original" not in attribute(date, "event"))

    def first(elements: list[Any]) -> str:
        return next((found for element in elements if (found := " ".join("".join(element.itertext()).split()))), "")

    return Book(
        text, first(authors or creators), first(dates), first(find_all(package, "title")), first(find_all(package, "language")), notes
    )  # fmt: skip
