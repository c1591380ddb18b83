"""HTML and XHTML as trees, and the text in them as a browser shows it.

    >>> markup_text(parse_markup("<p>It is <b>a</b> truth<br>universally acknowledged.</p><p>However</p>"))
    'It is a truth\\nuniversally acknowledged.\\n\\nHowever'

Blocks and line breaks follow the rules for `innerText` in the HTML standard, with a blank line around more kinds of blocks:
https://html.spec.whatwg.org/multipage/dom.html#rendered-text-collection-steps
"""

from __future__ import annotations

import codecs
import re
from functools import lru_cache
from html import escape
from html.entities import html5
from typing import Any

from corpus.documents import DocumentError

WITHOUT_TEXT = frozenset(  # elements whose content is no text of the document
    [
        "head",
        "script",
        "style",
        "template",
        "noscript",
        "title",
        "svg",
        "math",
        "iframe",
        "object",
        "audio",
        "video",
        "canvas",
        "map",
        "button",
        "select",
        "textarea",
        "rt",
        "rp",
        "rtc",
        "del",
        "s",
        "strike",
    ]
)
PARAGRAPHS = frozenset(  # a blank line before and after
    [
        "p",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "blockquote",
        "ul",
        "ol",
        "dl",
        "table",
        "pre",
        "hr",
        "figure",
        "section",
        "article",
        "header",
        "footer",
        "aside",
        "main",
        "hgroup",
        "center",
        "fieldset",
        "form",
    ]
)
LINES = frozenset(
    ["div", "li", "dt", "dd", "tr", "caption", "figcaption", "address", "summary", "details", "nav", "body", "html"]
)
INVISIBLE = re.compile(r"(?:^|;)\s*display\s*:\s*none", re.IGNORECASE)  # readers show such notes all the same
LEFT_OUT = frozenset(["pagebreak", "doc-pagebreak", "noteref", "doc-noteref", "doc-backlink", "toc", "doc-toc"])
LEFT_OUT_CLASSES = frozenset(  # page numbers, and the header and licence of Project Gutenberg's pages
    ["pagenum", "pageno", "page-number", "pagebreak", "x-ebookmaker-pageno", "pg-boilerplate", "fnanchor", "noteref"]
)
NOTES = frozenset(["footnote", "endnote", "rearnote", "note", "doc-footnote", "doc-endnote"])  # by epub:type or role
NOTE_CLASSES = frozenset(["footnote", "endnote"])
NOTE_ID = re.compile(r"(foot|end)note-\d+")  # as mammoth names them
DROP_CAPITAL = re.compile(r"drop-?_?cap|lettrine|dropped", re.IGNORECASE)  # in classes
WORDS_OF_ONE_LETTER = "AIO"
NOTE_MARK = re.compile(r"[\[(](?:\d{1,4}|[a-zA-Z]|[*†‡§¶]{1,3})[\])]")  # `[1]`, as the text of a link
ENTITY = re.compile(r"""<!ENTITY\s+([\w.-]+)\s+(?:"([^"%]{0,200})"|'([^'%]{0,200})')\s*>""")
DOCTYPE = re.compile(r"<!DOCTYPE[^>\[]*(?:\[[^\]]*\]\s*)?>", re.IGNORECASE)
BACK_ARROWS = {"↑", "↩", "↩︎", "↵", "^"}
QUOTES = "\"'“”‘’„‚«»‹›—"  # what opens spoken words in books
SCENE_BREAK = "* * *"
CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
CHARSET = re.compile(
    rb"""<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)|<meta[^>]*?charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE
)
NAMED_CHARACTER = re.compile(r"&(?!(?:amp|lt|gt|quot|apos);)(\w+);")
HEAD_BYTES = 4096  # in which an encoding may be declared


def decode_markup(data: bytes) -> str:
    """Text of an HTML or XML file by its byte order mark, else by the encoding it declares, else UTF-8, else Windows-1252.

    Raises DocumentError where the text is not in the encoding declared.
    """
    for mark, name in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if data.startswith(mark):
            return _decode(data, name).removeprefix("\ufeff")
    if found := CHARSET.search(data[:HEAD_BYTES]):
        name = (found[1] or found[2]).decode("ascii")
        # HTML has Windows-1252 where a page declares Latin-1
        return _decode(
            data, "cp1252" if name.lower() in ("iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii") else name
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _decode(data, "cp1252")


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except LookupError:
        raise DocumentError(
            f"it declares the unknown encoding {encoding}: save it as UTF-8", "unknown encoding"
        ) from None
    except UnicodeError:
        if encoding == "cp1252":  # five bytes mean nothing there
            return data.decode("latin-1")
        raise DocumentError(
            f"it is not the {encoding} that it declares: save it as UTF-8, or correct the declaration",
            f"not {encoding}",
        ) from None


def parse_markup(text: str) -> Any:
    """The root element of an HTML or XHTML page, however broken: libxml2's HTML parser knows all named characters and `<title/>`."""
    from lxml import etree

    text = _without_doctype(text)
    if "<![CDATA[" in text:  # XHTML's way to write text, which HTML takes for a comment
        text = CDATA.sub(lambda section: escape(section[1]), text)
    root = etree.fromstring(text.encode() or b" ", etree.HTMLParser(encoding="utf-8", huge_tree=True))
    return etree.Element("html") if root is None else root


def parse_xml(data: bytes) -> Any:
    """The root element of an XML file, its named characters (`&nbsp;`) kept although no DTD is read. Raises DocumentError."""
    from lxml import etree

    text = _without_doctype(decode_markup(data))
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    text = NAMED_CHARACTER.sub(lambda found: html5.get(f"{found[1]};", found[0]), text)
    parser = etree.XMLParser(recover=True, resolve_entities=False, no_network=True, huge_tree=True)
    root = etree.fromstring(text.encode() or b" ", parser)
    if root is None:
        raise DocumentError("no XML in it: copy or download it again")
    return root


def _without_doctype(text: str) -> str:
    """`text` without its DOCTYPE; the characters that this names itself are put where they are used."""
    found = DOCTYPE.search(text[:HEAD_BYTES])
    if not found:
        return text
    own = {name: double or single for name, double, single in ENTITY.findall(found[0])}
    text = text[: found.start()] + text[found.end() :]
    return re.sub(r"&([\w.-]+);", lambda name: own.get(name[1], name[0]), text) if own else text


def take_notes(root: Any) -> list[str]:
    """The text of each footnote and endnote in `root`, which are removed from it."""
    found = [element for element in root.iter("*") if _is_note(element)]
    notes = [markup_text(element) for element in found if not any(_is_note(other) for other in element.iterancestors())]
    for element in found:
        if (parent := element.getparent()) is not None:
            _remove(parent, element)
    return [note for note in notes if note]


def _remove(parent: Any, element: Any) -> None:
    """Remove an element but not the text after it."""
    before = element.getprevious()
    if before is not None:
        before.tail = (before.tail or "") + (element.tail or "")
    else:
        parent.text = (parent.text or "") + (element.tail or "")
    element.tail = None
    parent.remove(element)


def markup_text(root: Any, keep_spaces: bool = False) -> str:
    """The text in `root` (an lxml element): paragraphs separated by a blank line; lines (`<br>`, verse, list items) by a newline.

    Left out are scripts, deleted text, ruby annotations, page numbers, marks of notes, soft hyphens and pictures. `<hr>`
    becomes `* * *`, a picture of a letter (a drop capital) the letter, `<q>` quotation marks; a table has a line a row with tabs between its cells.
    keep_spaces: as in `<pre>`, runs of spaces, tabs and newlines are kept.
    """
    from lxml import etree

    writer = _TextWriter()
    pre = int(keep_spaces)  # open elements in which white space is kept
    walk = etree.iterwalk(root, events=("start", "end", "comment", "pi"))
    for event, element in walk:
        name = tag_of(element)
        if event == "start":
            writer.newlines(_newlines_around(element, name))
            if name in WITHOUT_TEXT or _is_left_out(element, name):
                walk.skip_subtree()
                continue
            if _is_drop_capital(element):
                writer.capital = (element.text or element[0].text).strip()
                writer.newlines(2 * (name in PARAGRAPHS | LINES))
                writer.write(writer.capital)
                walk.skip_subtree()
                continue
            pre += name == "pre"
            if name == "br":
                writer.line_break()
            elif name == "hr":
                writer.write(SCENE_BREAK)
            elif name in ("img", "q"):
                writer.write(_drop_capital(element) if name == "img" else _quotation_marks(element)[0])
            elif name == "tr":
                writer.write_lines(_row_text(element, keep_spaces))
                walk.skip_subtree()
                continue
            writer.write_lines(element.text or "") if pre else writer.write(element.text or "")
        else:
            writer.write(_quotation_marks(element)[1] if name == "q" else "")
            writer.newlines(_newlines_around(element, name))
            pre -= name == "pre"
            if element is not root:
                writer.write_lines(element.tail or "") if pre else writer.write(element.tail or "")
    return writer.text()


class _TextWriter:
    """Collects text with HTML's rules for white space: runs are one space, none at the ends of lines."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.breaks = 0  # newlines before the next text
        self.space = False  # a space before the next text, if it is on the same line
        self.capital = ""  # the drop capital that was just written

    def newlines(self, count: int) -> None:
        """At least `count` newlines before the next text."""
        self.breaks = max(self.breaks, count)
        self.space = self.space and not count

    def line_break(self) -> None:
        self.breaks += 1
        self.space = False

    def write(self, text: str) -> None:
        """Text in which white space only separates words."""
        words = _single_spaces(text)
        if core := words.strip(" "):
            self._append(" " + core if self.space or words[0] == " " else core)
            self.space = words[-1] == " "
        else:
            self.space = self.space or bool(words)

    def write_lines(self, text: str) -> None:
        """Text whose spaces and newlines are kept."""
        for number, line in enumerate(text.split("\n")):
            if number:
                self.line_break()
            if line:
                self._append(line, kept=True)

    def _append(self, text: str, kept: bool = False) -> None:
        first = text.lstrip(" ")[:1]
        if self.capital and first != self.capital:
            # a letter of another block or before a space belongs to the next word, unless it is a word itself
            if (
                first.isalpha()
                and (self.breaks or first.islower())
                and (self.breaks or self.capital not in WORDS_OF_ONE_LETTER or not text.startswith(" "))
            ):
                text, self.breaks = text.lstrip(" "), 0
            self.capital = ""
        if self.breaks or not self.parts:
            text = text if kept else text.lstrip(" ")
            self.parts.append("\n" * self.breaks if self.parts else "")
        self.parts.append(text)
        self.breaks, self.space = 0, False

    def text(self) -> str:
        """All of it, without soft hyphens and white space at the ends of lines; at most two empty lines follow each other."""
        text = "".join(self.parts).replace("\xad", "")
        text = "\n".join([line.rstrip(" \t\xa0") for line in text.split("\n")])
        while "\n" * 4 in text:
            text = text.replace("\n" * 4, "\n" * 3)
        return text.strip("\n")


def _single_spaces(text: str) -> str:
    """`text` with each run of HTML's white space as one space; without a regular expression, which takes ten times as long."""
    for char in "\t\r\n\f":
        text = text.replace(char, " ")
    while "  " in text:
        text = text.replace("  ", " ")
    return text


def tag_of(element: Any) -> str:
    """The tag in small letters; empty for comments and the like."""
    tag = element.tag
    return _small_name(tag) if isinstance(tag, str) else ""


@lru_cache(maxsize=1 << 12)
def _small_name(tag: str) -> str:
    return tag.rpartition("}")[2].rpartition(":")[2].lower()


def roles(element: Any) -> set[str]:
    """The words of `epub:type` and `role`."""
    return {word for name in ("epub:type", "role") for word in (element.get(name) or "").split()}


def _newlines_around(element: Any, name: str) -> int:
    if name in PARAGRAPHS:
        return 2
    if name not in LINES:
        return 0
    # a div around other blocks is a section or a stanza; one with text alone is a line
    blocks = name == "div" and any(tag_of(child) in PARAGRAPHS | LINES for child in element)
    return 2 if blocks else 1


def classes(element: Any) -> set[str]:
    return set((element.get("class") or "").lower().split())


def _is_left_out(element: Any, name: str) -> bool:
    if element.keys():
        if LEFT_OUT & roles(element) or LEFT_OUT_CLASSES & classes(element):
            return True
        if (element.get("hidden") is not None or INVISIBLE.search(element.get("style") or "")) and not _is_note(
            element
        ):
            return True
    return _is_note_mark(element, name)


def _is_note(element: Any) -> bool:
    if not element.keys():
        return False
    if NOTES & roles(element) or NOTE_CLASSES & classes(element):
        return tag_of(element) not in ("a", "sup", "span")
    return tag_of(element) == "li" and NOTE_ID.fullmatch(element.get("id") or "") is not None


def _is_drop_capital(element: Any) -> bool:
    """A letter alone in an element of such a class."""
    if not DROP_CAPITAL.search(element.get("class") or "") or len(element) > 1:
        return False
    inner = element if not len(element) else element[0]
    if len(inner) or (len(element) and ((element.text or "").strip() or (inner.tail or "").strip())):
        return False
    letter = (inner.text or "").strip()
    return len(letter) == 1 and letter.isalpha()


def _is_note_mark(element: Any, name: str) -> bool:
    """`<sup><a href="#note">1</a></sup>`, which refers to a note, or `<a href="#mark">↑</a>`, which leads back from it."""
    if name == "a" and "#" in (element.get("href") or ""):
        text = "".join(element.itertext()).strip()
        if text in BACK_ARROWS or NOTE_MARK.fullmatch(text):
            return True
        return len(element) == 1 and tag_of(element[0]) == "sup" and not (element.text or "").strip() and len(text) < 6
    if name != "sup" or len(element) != 1 or tag_of(element[0]) != "a":
        return False
    return "#" in (element[0].get("href") or "") and not (element.text or "").strip()


def _drop_capital(image: Any) -> str:
    letter = (image.get("alt") or "").strip()
    return letter if len(letter) == 1 and letter.isalpha() else ""


def _quotation_marks(quotation: Any) -> tuple[str, str]:
    """The marks that a browser draws around `<q>`, within each other in turn; none where the text brings its own."""
    if "".join(quotation.itertext()).lstrip()[:1] in tuple(QUOTES):
        return "", ""
    outer = sum(tag_of(element) == "q" for element in quotation.iterancestors())
    return ("‘", "’") if outer % 2 else ("“", "”")


def _row_text(row: Any, keep_spaces: bool) -> str:
    """A table's row: its cells with tabs between them, or as paragraphs where one has several lines."""
    cells = [markup_text(cell, keep_spaces) for cell in row if tag_of(cell) in ("td", "th")]
    if any("\n" in cell for cell in cells):
        return "\n\n".join(cell for cell in cells if cell)
    return "\t".join(cells).rstrip("\t")
