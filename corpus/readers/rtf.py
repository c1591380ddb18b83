"""Rich Text (`.rtf`), by striprtf: one document a file, with tables; footnotes at the end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from corpus.documents import DocumentError
from corpus.readers.book import Book, BookFile

GROUP = re.compile(r"\{\\(?:\*\\)?(footnote|annotation|deleted|header[lrf]?|footer[lrf]?|xe|v)(?![a-z])")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
PARAGRAPH = re.compile(r"\\(?:par|sect|page)(?![a-z]) ?")
ROW_END = re.compile(r"\\row(?![a-z])(?![\s}{]*(?:\\pard(?![a-z]))?[\s{]*\\trowd) ?")  # the last row of a table
CELL = re.compile(r"\\(?:nest)?cell(?![a-z]) ?")
MAC = re.compile(r"^\{\\rtf1?\\mac(?![a-z])")
INFO = r"\{{\\{}(?![a-z]) ?((?:[^{{}}\\]|\\[^{{}}])*)\}}"


class RtfFile(BookFile):
    suffixes: ClassVar[tuple[str, ...]] = (".rtf",)
    kind: ClassVar[str] = "a Rich Text file"

    @classmethod
    def extract(cls, path: Path) -> Book:
        source = path.read_bytes().decode("latin-1").lstrip()
        if not source.startswith("{\\rtf"):
            raise DocumentError("not a Rich Text file: give it the ending of its real format (.txt for plain text)")
        notes: list[str] = []
        parts: list[str] = []
        at = 0
        for name, start, stop in _groups(source):
            if start < at:
                continue
            parts.append(source[at:start])
            if name == "footnote":
                notes.append(_plain(source, source[start + 1 : stop - 1].partition("footnote")[2]))
            at = stop
        text = _plain(source, "".join([*parts, source[at:]]))
        info = {name: _plain(source, found[1]) for name in ("title", "author") if (found := re.search(INFO.format(name), source))}  # fmt: skip
        year = re.search(r"\\creatim\\yr(\d{4})", source)
        return Book(
            text, info.get("author", ""), year[1] if year else "", info.get("title", ""), "", tuple(filter(None, notes))
        )


def _plain(source: str, text: str) -> str:
    """The plain text of a part of a file: paragraphs separated by blank lines, cells by tabs, no mark at their end."""
    from striprtf.striprtf import rtf_to_text

    text = ROW_END.sub(r"\\row\\par ", CELL.sub(r"\\tab ", PARAGRAPH.sub(r"\\par\\par ", text)))
    head = source[: source.find("{", 1)] if source.find("{", 1) > 0 else source[:40]
    text = text if text.startswith("{\\rtf") else head + " " + text + "}"
    plain = rtf_to_text(text, encoding="mac_roman" if MAC.match(source) else "cp1252", errors="replace")
    plain = plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # it leaves pairs of surrogates apart
    plain = re.sub(r"[ \t]+$", "", plain.replace("\xad", "").replace("\x0b", "\n"), flags=re.MULTILINE)
    return re.sub(r"\n{4,}", "\n\n\n", plain).strip("\n").removeprefix(" ")


def _groups(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, start and stop of each group that is no part of the text's flow."""
    for found in GROUP.finditer(source):
        depth, stop = 0, len(source)
        for brace in BRACES.finditer(source, found.start()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                stop = brace.end()
                break
        yield found[1], found.start(), stop
