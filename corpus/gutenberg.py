"""The books in a file of Project Gutenberg's, without headers, licences and credits, whatever the year they were made in.

    >>> spans(b"*** START OF THE PROJECT GUTENBERG EBOOK X ***\\n\\nOnce.\\n\\n*** END OF THE PROJECT GUTENBERG EBOOK X ***")
    [Span(start=48, stop=53)]

A file may hold several books one after the other. It is searched for lines that may be marks (`candidates`, at some GB/s),
and the marks found there are put in order (`spans_of`), so that a file of any size is read through once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

BEFORE, AFTER = 1024, 8192  # bytes around a candidate that are looked at
WORDS = (b"utenberg", b"UTENBERG", b"SMALL PRINT")  # one of these is in every mark
OVERLAP = 16  # bytes that two windows searched for them have to share
HEADER_LIMIT = 8192  # bytes that lie at most between two marks of one header
LONGEST_HEADER = 24_000  # bytes of a header with small print
LICENCE_LIMIT = 65536  # bytes that a licence has at most
LEAST_TEXT = 256  # bytes before a header that are a text and no part of it
LEFTOVER, LARGE = 0.01, 40_000  # a cut that leaves less than this share of a file of more bytes is undone

EBOOK = rb"(?:of Australia |Australia |Canada |\(?TM\)? )?E-?(?:BOOK|TEXT)"
START = re.compile(
    rb"[ \t>]*\*{2,3} ?START OF (?:THE |THIS )?(?:COPYRIGHTED )?PROJECT GUTENBERG " + EBOOK
    + rb"(?:.{0,400}?\*\*\*)?[^\r\n]*", re.DOTALL | re.IGNORECASE
)  # fmt: skip
END = re.compile(
    rb"[ \t>]*\*{2,3} ?END (?:OF )?(?:THE |THIS )?(?:COPYRIGHTED )?PROJECT GUTENBERG " + EBOOK
    + rb"(?:.{0,400}?\*\*\*)?[^\r\n]*|[ \t]*This site is full of FREE ebooks[^\r\n]*", re.DOTALL | re.IGNORECASE
)  # fmt: skip
PROJECT = rb"(?:the |this |le |la |les |de |des |du |d'|del |della |ce |cet |dieses |diese |van |het |do |da |den )*(?:Proje[ck]t[oe]?|Projet|Progetto|Proyecto)[ -]Gutenberg"
SOFT_END = re.compile(
    rb"[ \t*\[]*(?:End of |Ende |Fin |Fine |Einde |Fim )" + PROJECT + rb"(?:'s|\xe2\x80\x99s| of| E|-E|etext| Etext|,|s\b|\b)[^\r\n]*",
    re.IGNORECASE,
)  # fmt: skip
SMALL_BEGIN = re.compile(rb"[ \t]*\*{3} ?START ?\*{0,2} *THE SMALL PRINT", re.IGNORECASE)
SMALL_END = re.compile(rb"[ \t]*\*END ?\*? *THE SMALL PRINT[^\r\n]*", re.IGNORECASE)
HEAD = re.compile(
    rb"(?:\xef\xbb\xbf)?[ \t*]*(?:This is )?(?:The )?Project Gutenberg(?:'s|\xe2\x80\x99s)? (?:" + EBOOK + rb"|[^\r\n]{1,100}, by )",
    re.IGNORECASE,
)  # fmt: skip
ABROAD = re.compile(rb"[ \t*]*A Project Gutenberg (?:of )?(?:Australia|Canada) E-?book[^\r\n]*", re.IGNORECASE)
ABROAD_END = re.compile(rb"gutenberg\.(?:net\.au|ca)\b", re.IGNORECASE)
FIELDS = re.compile(rb"(?:(?<![^\r\n])[A-Z][A-Za-z ]{2,20}: [^\r\n]*[\r\n]+)*\Z")  # `Title: …`, as a header begins
RULE = re.compile(rb"\s*[-=_*]{8,}[ \t]*(?=[\r\n])")
CANADIAN_END = re.compile(rb"[\r\n]\s*\[(?:The )?End of [^\[\]]{3,300}\]\s*\Z", re.IGNORECASE)
LICENCE = re.compile(
    rb"small print!|start: full license|full (?:project gutenberg )?license|gutenberg(?:-tm|\xe2\x84\xa2)?(?: e-?text| ebook)? licen[cs]e|updated editions will replace"
    rb"|this file should be named|literary archive foundation|gutenberg-tm|gutenberg\xe2\x84\xa2|information about project gutenberg",
    re.IGNORECASE,
)  # fmt: skip
CREDIT = re.compile(
    rb"\s*(?:\[?(?:HTML |Text |e-?)?(?:(?:e-?text|e-?book|file|version) )?(?:Produced|Prepared|Transcribed|Scanned|Digiti[sz]ed|Proofread) (?:and \w+ )?(?:by|from)\b"
    rb"|This (?:Project Gutenberg )?(?:e-?text|e-?book|file) was (?:first )?(?:produced|prepared|transcribed|scanned|typed|created)"
    rb"|Credits?:)", re.IGNORECASE
)  # fmt: skip
BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))[ \t]*(?:\r\n|\n|\r(?!\n))")


class Mark(NamedTuple):
    """A line that begins or ends a book, a licence or a header."""

    kind: str
    """`start`, `end`, `soft end` (in words, which prose may use as well), `small begin`, `small end`, `head`, `abroad`."""
    start: int
    stop: int
    after: bytes
    """What follows it, up to AFTER bytes."""
    alone: bool
    """A blank line, or the beginning of the file, precedes it."""


class Span(NamedTuple):
    """Bytes start..stop of a file: a book without its licence."""

    start: int
    stop: int


def candidates(window: bytes, offset: int = 0) -> list[int]:
    """Where marks may be in a part of a file that begins at `offset`; parts have to share OVERLAP bytes."""
    found = []
    for word in WORDS:
        at = window.find(word)
        while at >= 0:
            found.append(offset + at)
            at = window.find(word, at + 1)
    return found


def spans(data: bytes) -> list[Span]:
    """The books in a text, without headers and licences, those without text left out."""
    found = candidates(data)
    return spans_of(found, lambda start, stop: data[start:stop], len(data)) if found else [Span(0, len(data))]


def spans_of(found: Iterable[int], read: Callable[[int, int], bytes], size: int) -> list[Span]:
    """As `spans`, of a file of `size` bytes with these candidates; `read(start, stop)` gives its bytes."""
    marks = _marks(sorted(set(found)), read, size)
    if not marks:
        return [Span(0, size)]
    texts = [_trimmed(read, *span) for span in _between(marks, size) if span[0] < span[1]]
    books = [text for text in texts if text.start < text.stop]
    if size > LARGE and sum(stop - start for start, stop in books) < LEFTOVER * size:
        return [Span(0, size)]
    return books


def undone(size: int, books: list[Span]) -> bool:
    """Whether a file of `size` bytes that has marks was left whole because cutting would have left nearly nothing."""
    return size > LARGE and books == [Span(0, size)]


def _marks(found: list[int], read: Callable[[int, int], bytes], size: int) -> list[Mark]:
    marks: list[Mark] = []
    for at in found:
        if marks and at < marks[-1].stop:
            continue
        first = max(0, at - BEFORE)
        window = read(first, min(size, at + AFTER))
        start = max(window.rfind(b"\n", 0, at - first), window.rfind(b"\r", 0, at - first)) + 1
        # a mark may have begun on the line before: `*** START OF THE PROJECT GUTENBERG` is never so broken
        for kind, pattern in PATTERNS:
            if (start or not first) and (match := pattern.match(window, start)):
                stop = match.end()
                if kind == "abroad":
                    start, stop = FIELDS.search(window, 0, start).start(), _abroad_end(window, stop)  # type: ignore[union-attr]
                before = window[:start].rstrip(b" \t")
                alone = before.endswith((b"\n\n", b"\n\r\n", b"\r\r")) or not window[:start].strip(
                    b"\xef\xbb\xbf \t\r\n"
                )
                if not marks or first + start >= marks[-1].stop:
                    marks.append(Mark(kind, first + start, first + stop, window[stop:], alone))
                break
    return marks


PATTERNS = (
    ("start", START),
    ("end", END),
    ("soft end", SOFT_END),
    ("small begin", SMALL_BEGIN),
    ("small end", SMALL_END),
    ("abroad", ABROAD),
    ("head", HEAD),
)


def _abroad_end(window: bytes, at: int) -> int:
    """Where the header of the Australian and Canadian projects ends: after the paragraph with their address, and a rule."""
    for found in ABROAD_END.finditer(window, at, at + HEADER_LIMIT // 2):
        if found.start() - at > 600:
            break
        blank = BLANK_LINE.search(window, found.end())
        at = blank.start() if blank else len(window)
    rule = RULE.match(window, at)
    return rule.end() if rule else at


def _between(marks: list[Mark], size: int) -> list[tuple[int, int, bool]]:
    """(start, stop, whether a header precedes it) of the texts between the marks."""
    kept: list[tuple[int, int, bool]] = []
    begin: int | None = 0  # of the text that is open; None after an end
    headed = False
    ended: Mark | None = None
    for number, mark in enumerate(marks):
        following = marks[number + 1 :]
        if mark.kind in ("start", "abroad", "small end"):
            if mark.kind == "small end" and _is_last(mark, following, size):
                continue  # small print at the end, whose beginning closed the text
            if begin is not None:
                kept += _before_header(marks[:number], begin, headed, mark)
            begin, headed, ended = mark.stop, True, None
        elif mark.kind == "end":
            stop = _first_of_endings(marks[: number + 1])
            if begin is not None:
                kept.append((begin, stop, headed))
            elif ended and stop > ended.stop and not LICENCE.search(ended.after[: stop - ended.stop]):
                kept.append((ended.stop, stop, True))  # another volume
            begin, ended = None, mark
        elif begin is not None and _closes(mark, following, size):
            heads = [head.start for head in marks[:number] if head.kind == "head" and 0 <= mark.start - head.stop < 400]
            kept.append((begin, min([mark.start, *heads]) if mark.kind == "small begin" else mark.start, headed))
            begin, ended = None, mark
    if begin is not None:
        kept.append((begin, size, headed))
    elif ended and size - ended.stop > LICENCE_LIMIT and not LICENCE.search(ended.after):
        kept.append((ended.stop, size, True))
    return kept


def _before_header(earlier: list[Mark], begin: int, headed: bool, mark: Mark) -> list[tuple[int, int, bool]]:
    """The open text before a mark that begins a book: up to the head of this one's header, if there is any text."""
    nearest = max(begin, mark.start - LONGEST_HEADER)
    heads = [head.start for head in earlier if head.kind == "head" and head.start >= nearest and head.alone]
    if heads:
        enough = heads[0] - begin >= (1 if headed else LEAST_TEXT)
        return [(begin, heads[0], headed)] if enough else []
    limit = HEADER_LIMIT if headed else LICENCE_LIMIT
    return [(begin, mark.start, headed)] if mark.start - begin > limit else []


def _closes(mark: Mark, following: list[Mark], size: int) -> bool:
    """Whether a mark that is not certain ends the text: prose may talk about Project Gutenberg."""
    if mark.kind == "small begin":
        end = next((number for number, other in enumerate(following) if other.kind == "small end"), None)
        return end is None or _is_last(following[end], following[end + 1 :], size)
    if mark.kind != "soft end" or not mark.alone:
        return False
    blank = BLANK_LINE.search(mark.after)
    rest = mark.after[blank.end() if blank else len(mark.after) :]
    if not rest.strip():
        return mark.stop + len(mark.after) >= size
    after = following[0] if following else None
    if after and after.start - mark.stop < len(mark.after):
        between = mark.after[: after.start - mark.stop]
        if not between[blank.start() if blank else 0 :].strip():
            return after.kind in ("end", "head", "start", "small begin", "abroad")
    paragraph = BLANK_LINE.split(rest.lstrip(), maxsplit=1)[0]
    return LICENCE.search(paragraph) is not None


def _is_last(mark: Mark, following: list[Mark], size: int) -> bool:
    """Whether no text follows the end of small print."""
    if following and following[0].start - mark.stop <= len(mark.after):
        return following[0].kind in ("head", "abroad") and not mark.after[: following[0].start - mark.stop].strip()
    return mark.stop + len(mark.after) >= size and not mark.after.strip()


def _first_of_endings(marks: list[Mark]) -> int:
    """Where the text ends: at the first of the ends that follow each other with nothing between them."""
    at = len(marks) - 1
    while at and marks[at - 1].kind == "soft end" and marks[at - 1].alone:
        before = marks[at - 1]
        between = before.after[: marks[at].start - before.stop]
        blank = BLANK_LINE.search(between)
        if len(between) < marks[at].start - before.stop or between[blank.end() if blank else len(between) :].strip():
            break
        at -= 1
    return marks[at].start


def _trimmed(read: Callable[[int, int], bytes], start: int, stop: int, headed: bool) -> Span:
    """A text without credits, where a header precedes it, and without white space around it."""
    head = read(start, min(stop, start + AFTER))
    at = len(head) - len(head.lstrip())
    while headed and CREDIT.match(head, at):
        blank = BLANK_LINE.search(head, at)
        at = blank.end() if blank else len(head)
        at += len(head[at:]) - len(head[at:].lstrip())
    tail = read(max(start + at, stop - AFTER), stop)
    if headed and (found := CANADIAN_END.search(tail)):
        tail = tail[: found.start()] + b" " * (len(tail) - found.start())
    return Span(start + at, stop - (len(tail) - len(tail.rstrip())) if tail.strip() else start + at)
