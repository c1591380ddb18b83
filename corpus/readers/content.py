"""What a file is, by how it begins, whatever its name says."""

from __future__ import annotations

import mimetypes
import re
from pathlib import Path

from corpus.readers.package import part_names

HEAD_BYTES = 4096
BEGINNINGS = {  # how files begin -> the ending of their format
    b"{\\rtf": ".rtf",
    b"PAR1": ".parquet",
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\0": ".xz",
}
ARCHIVES = (".zip", ".tar", ".gz", ".bz2", ".xz")
ARCHIVE_ENDINGS = (*ARCHIVES, ".tgz", ".tbz2", ".txz")
OBJECT = ".json object"  # a file that is one object and no list of rows
LISTS = (".json", ".jsonl", ".ndjson")
OFFICE = {"xl/": "spreadsheet", "ppt/": "slides"}
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # how encrypted documents begin, and those of Word before 2007
OTHER_KINDS = {  # endings of what is no text, or none that is read -> what it is called
    ".pdf": "PDF",
    ".doc": "Word before 2007",
    ".mobi": "Kindle book",
    ".azw": "Kindle book",
    ".azw3": "Kindle book",
    ".kfx": "Kindle book",
    ".lit": "Microsoft Reader book",
    ".djvu": "scanned pages",
    ".7z": "7-Zip archive",
    ".rar": "RAR archive",
    ".xlsx": "spreadsheet",
    ".pptx": "slides",
}
ABOUT = re.compile(
    r"(?:readme|licen[cs]e|copying|changelog|contributing)(?:\.(?:md|markdown|html?|rtf))?", re.IGNORECASE
)
MARKUP = re.compile(rb"<(?:!doctype\s+html|html|head|body|title|meta|p|div|h[1-6]|center|pre|br)\b", re.IGNORECASE)


def suffix_of(path: Path) -> str:
    """The ending that files of this format have: by the content where it tells, otherwise that of the name.

    Raises OSError.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    named = path.suffix.lower()
    for beginning, suffix in BEGINNINGS.items():
        if head.startswith(beginning):
            return suffix
    if head.startswith(b"PK\x03\x04"):
        return _zip_suffix(path, named)
    if head[257:262] == b"ustar":
        return ".tar"
    if head.startswith(OLE) and named in ("", ".docx"):
        return ".docx"
    return _text_suffix(head, named)


def _zip_suffix(path: Path, named: str) -> str:
    """The format of an archive by what it holds; by its name where it is damaged."""
    names = part_names(path)
    if not names:
        return named if named in (".epub", ".docx", ".odt") else ".zip"
    if "META-INF/container.xml" in names or any(name.endswith(".opf") for name in names):
        return ".epub"
    if any(name.startswith("word/") for name in names):
        return ".docx"
    if "content.xml" in names and "META-INF/manifest.xml" in names:
        return ".odt"
    # a name that promises a book keeps its reader, which says what is missing
    return named if named in (".epub", ".docx", ".odt", *OTHER_KINDS) else ".zip"


def _text_suffix(head: bytes, named: str) -> str:
    begins = head.removeprefix(b"\xef\xbb\xbf")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        begins = head.decode("utf-16", "ignore").encode()
    begins = begins.lstrip()
    if begins.startswith(b"<"):
        if b"<FictionBook" in begins:
            return ".fb2"
        if (named != ".fb2" and MARKUP.match(begins)) or (
            begins.startswith((b"<?xml", b"<!")) and re.search(rb"<html\b", begins, re.IGNORECASE)
        ):
            return ".html"
    if named in LISTS:
        lines = [line.lstrip() for line in begins.split(b"\n") if line.strip()]
        rows = named != ".json" or (len(lines) > 1 and all(line.startswith(b"{") for line in lines[:2]))
        return ".json" if begins.startswith(b"[") else ".jsonl" if rows else OBJECT
    if named in (".html", ".htm", ".xhtml") and b"\0" not in head and not re.search(rb"<[a-zA-Z!/?]|&\w+;", head):
        return ".txt"
    return named


def kind_of(path: Path) -> str:
    """What a file is called that is not read, in a word or two."""
    named = path.suffix.lower()
    if named == ".json":
        return "no list of rows"
    if named in OTHER_KINDS:
        return OTHER_KINDS[named]
    guessed = (mimetypes.guess_type(path.name)[0] or "").split("/")[0]
    names = {"image": "picture", "audio": "sound", "video": "film", "font": "font"}
    return names.get(guessed, f"{named} file" if named else "no text")


def is_text(path: Path) -> bool:
    """Whether a file begins as plain text does. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    try:
        head[: -3 if len(head) == HEAD_BYTES else None].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4
    return b"\0" not in head and not head.startswith(b"%PDF")
