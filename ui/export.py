"""Stories as files: text, Markdown, JSON, CSV and EPUB.

>>> export([("A fog", "The fog rolled in.")], "txt")
b'The fog rolled in.\\n'
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
import uuid
from collections.abc import Sequence

from ui.history import title_of

Text = tuple[str, str]  # title, body
FORMATS = {
    "txt": ("plain text", "text/plain"),
    "md": ("Markdown", "text/markdown"),
    "json": ("JSON", "application/json"),
    "csv": ("CSV", "text/csv"),
    "epub": ("EPUB", "application/epub+zip"),
}
MARKDOWN = re.compile(r"(^[ \t]*\d*)([-+=.)])|([\\`*_\[\]<>#$|~&])", re.MULTILINE)
INDENT = re.compile(r"^[ \t]+(?=\S)", re.MULTILINE)
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def export(stories: Sequence[Text], suffix: str) -> bytes:
    """The stories as one file of the kind `suffix` (a key of FORMATS)."""
    writers = {"txt": _txt, "md": _md, "json": _json, "csv": _csv, "epub": _epub}
    return writers[suffix](stories)


def _txt(stories: Sequence[Text]) -> bytes:
    if len(stories) == 1:
        return (stories[0][1] + "\n").encode("utf-8", "replace")
    parts = [f"{title_of(title, body)}\n\n{body}\n" for title, body in stories]
    return "\n\n\n".join(parts).encode("utf-8", "replace")


def _md(stories: Sequence[Text]) -> bytes:
    parts = []
    for title, body in stories:
        lines = _literal(body).split("\n")
        broken = [
            f"{line}  " if line.strip() and follower.strip() else line
            for line, follower in zip(lines, [*lines[1:], ""], strict=True)
        ]
        parts.append(f"# {_literal(title_of(title, body))}\n\n" + "\n".join(broken) + "\n")
    return "\n".join(parts).encode("utf-8", "replace")


def _literal(text: str) -> str:
    """Text that Markdown shows as it is, indentation too."""
    return INDENT.sub(lambda found: "&nbsp;" * len(found[0].expandtabs(4)), MARKDOWN.sub(r"\1\\\2\3", text))


def _json(stories: Sequence[Text]) -> bytes:
    rows = [{"title": title_of(title, body), "text": body} for title, body in stories]
    return json.dumps(rows, indent=2).encode()


def _csv(stories: Sequence[Text]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["title", "words", "text"])
    for title, body in stories:
        writer.writerow([_cell(title_of(title, body)), len(body.split()), _cell(body)])
    return file.getvalue().encode("utf-8-sig", "replace")


def _cell(text: str) -> str:
    """A text that a spreadsheet must not take for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _epub(stories: Sequence[Text]) -> bytes:
    from ebooklib import epub

    book = epub.EpubBook()
    book.set_identifier(uuid.uuid4().urn)
    book.set_title(title_of(*stories[0]) if len(stories) == 1 else "Stories")
    book.set_language("en")
    book.add_author("Victorian Literature Generator")
    style = epub.EpubItem(
        uid="style",
        file_name="style.css",
        media_type="text/css",
        content=b"body { font-family: serif; line-height: 1.5; } p { white-space: pre-wrap; margin: 0 0 0.8em; }",
    )
    book.add_item(style)
    chapters = []
    for number, (title, body) in enumerate(stories, 1):
        heading = CONTROLS.sub("", title_of(title, body))
        paragraphs = [part for part in re.split(r"\n\s*\n", CONTROLS.sub("", body)) if part.strip()]
        inside = "".join(f"<p>{html.escape(part.strip(chr(10)))}</p>" for part in paragraphs) or "<p>&#160;</p>"
        chapter = epub.EpubHtml(title=heading, file_name=f"story_{number}.xhtml", lang="en")
        chapter.content = f"<h1>{html.escape(heading)}</h1>{inside}"
        chapter.add_item(style)
        book.add_item(chapter)
        chapters.append(chapter)
    book.toc = chapters
    book.add_item(epub.EpubNcx())
    book.add_item(epub.EpubNav())
    book.spine = ["nav", *chapters]
    target = io.BytesIO()
    epub.write_epub(target, book)
    return target.getvalue()
