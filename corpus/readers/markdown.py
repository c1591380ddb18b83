"""Markdown (`.md`), by markdown-it: one document a file, its text without the marks of emphasis, headings and links.

The marks of lists are text and stay, as do line breaks that the author asked for; other line breaks are joined.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from corpus.documents import CONVERT, DocumentError
from corpus.readers.book import Book, BookFile
from corpus.readers.markup import markup_text, parse_markup, take_notes

FRONT = re.compile(r"---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
FIELD = re.compile(r"^(title|author|lang|language|date|year):[ \t]*[\"']?(.*?)[\"']?[ \t]*$", re.MULTILINE | re.IGNORECASE)  # fmt: skip


class MarkdownFile(BookFile):
    suffixes: ClassVar[tuple[str, ...]] = (".md", ".markdown")
    kind: ClassVar[str] = "a Markdown text"

    @classmethod
    def extract(cls, path: Path) -> Book:
        try:
            text = path.read_bytes().decode("utf-8-sig").replace("\r\r\n", "\n").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise DocumentError(f"not UTF-8 at byte offset {error.start}; {CONVERT}", "not UTF-8") from None
        fields = {}
        if front := FRONT.match(text):
            fields = {name.lower(): value for name, value in FIELD.findall(front[1])}
            text = text[front.end() :]
        root = parse_markup(_parser().render(text))
        notes = take_notes(root)
        return Book(
            markup_text(root),
            fields.get("author", ""),
            fields.get("year", fields.get("date", "")),
            fields.get("title", ""),
            fields.get("language", fields.get("lang", "")),
            tuple(notes),
        )


@lru_cache(maxsize=1)
def _parser() -> Any:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.footnote import footnote_plugin

    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"]).use(footnote_plugin)
    parser.core.ruler.push("list_marks", _keep_list_marks)
    parser.add_render_rule("footnote_block_open", lambda *_: '<section class="footnotes">')
    parser.add_render_rule("footnote_block_close", lambda *_: "</section>")
    parser.add_render_rule("footnote_open", lambda *_: '<aside role="doc-footnote">')
    parser.add_render_rule("footnote_close", lambda *_: "</aside>")
    parser.add_render_rule("footnote_anchor", lambda *_: "")
    parser.add_render_rule("footnote_ref", lambda *_: "")
    return parser


def _keep_list_marks(state: Any) -> None:
    """Write the mark of each list item (`-`, `2.`) into the text that follows it."""
    from markdown_it.token import Token

    mark = ""
    for token in state.tokens:
        if token.type == "list_item_open":
            mark = f"{token.info}{token.markup} "
        elif token.type == "inline" and mark:
            token.children.insert(0, Token("text", "", 0, content=mark))
            mark = ""
