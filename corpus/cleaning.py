"""Cleaning of plain texts: line ends, Project Gutenberg's markup, hard-wrapped lines, broken encodings, and where a long text
may be cut. The licences: gutenberg.py.

Every function works on a chunk of a text at a time, at several hundred MB/s. Those that remove the markup of e-texts
(notes, illustrations, italics) are for texts whose `Layout` says `book`: elsewhere brackets and underscores may mean
something else.

    python -c "from corpus import cleaning; print(cleaning.find_layout(open('book.txt', 'rb').read()))"
    python prepare_data.py --input book.txt --no-unwrap --out data/book
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

TAB, NEWLINE, SPACE, QUOTE, APOSTROPHE, DASH, SMALL_A, SMALL_Z = b"\t\n \"'-az"
BOM = b"\xef\xbb\xbf"  # UTF-8's byte order mark
CHUNK_BYTES = 1 << 20  # bytes of one chunk of a long text, and what one process holds of it at a time
LONGEST_WORD = 24  # characters; longer words count as this long
LAYOUT_SAMPLE = 1 << 17  # bytes at the start of a text from which its layout is found

LINE_END = rb"\r{0,2}\n"
PARAGRAPH_END = re.compile(LINE_END + rb"[ \t]*" + LINE_END)
DOUBLE_PARAGRAPH_END = re.compile(
    LINE_END + rb"(?:[ \t]*" + LINE_END + rb"){2}"
)  # where each line is followed by a blank one
BLANK_AFTER_LINE = re.compile(rb"\n[ \t]*\n")
PAGE_BREAK = re.compile(rb"\x0c+(?=[a-z])")  # within a paragraph
LEADERS = (b".....", b". . . . .", b"\t", b"|")  # what lines of tables and contents hold, besides wide gaps
WORD_END = re.compile(rb"[\r\n ]")
SINGLE_WORD_END = re.compile(rb"[\r\n]| (?=[^ ])")  # not inside a double space
DOUBLE_SPACE = re.compile(rb"  (?=[A-Za-z0-9\"'(\x80-\xff-])(?<=[^ \t\r\n]  )")  # between words
COLUMN_GAP = re.compile(rb"   (?=[^ \t\r\n])(?<=[^ \t\r\n] {3})|    (?=[^ \t\r\n])(?<=[^ \t\r\n] {4})")
BODY = rb"(?:[^\[\]]++|\[[^\[\]]*+\])*+\]"  # up to the closing bracket, with one level of brackets inside
ILLUSTRATION = re.compile(rb"\[(?:Illustration|ILLUSTRATION)(?=[\]:.,;\s-])" + BODY)
BRACKET_NOTE = re.compile(
    rb"\[(?:(?:Transcriber|TRANSCRIBER)(?=['\xe2:sS\s])|(?:Transcription|TRANSCRIPTION)[sS]? (?:[Nn]ote|NOTE)|TN:)"
    + BODY
)
NOTE = re.compile(
    rb"^(?:[ \t]*[+*=-]{3,}[+*= -]*\n(?:[ \t]*\|?[ \t]*\n)?)?"  # the upper edge of a box
    rb"[ \t|*_=]*(?:Transcri(?:ber|ption)|TRANSCRI(?:BER|PTION))(?:'|\xe2\x80\x99)?[sS]?(?:'|\xe2\x80\x99)? (?:[Nn]ote|NOTE)[sS]?(?![a-zA-Z])[^\n]*",
    re.MULTILINE,
)
NOTE_END = re.compile(rb"\n[ \t]*[+*=-]{3,}[+*= -]*(?=\n|\Z)|\n[ \t]*\n[ \t]*(?=\n)")  # a box's lower edge; a wide gap
BLANKS = re.compile(rb"(?:[ \t]*\n)*")
LINE_REST = re.compile(rb"[ \t]*(?:\n|\Z)")
NOTE_LIMIT = 16384  # bytes at the end of a text in which a note continues to the end; also the longest note in brackets
NOTE_WINDOW = 32768  # bytes at either end of a text, or of a part of it, where a note without brackets may begin
NOTE_SEARCH = 4096  # bytes after a note's first line in which its end is looked for
CAPTION_LIMIT = 4096  # bytes of an illustration's caption
ITALICS = re.compile(r"_(?<!\w_)([^\s_][^_]{0,600}+)(?<!\s)_(?!\w)|_(?<!\w_)([^\s_])_(?!\w)")
LATER = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"  # UTF-8's second bytes read as Windows-1252
MOJIBAKE = re.compile(f"[Â-ô][{LATER}]")
LOST_QUOTE = re.compile(f"â€(?![{LATER}])")  # a closing quotation mark whose last byte was dropped


@dataclass(frozen=True)
class Layout:
    """How a text's lines are broken. width 0: not hard-wrapped, or not so that joining lines is safe."""

    width: int = 0
    """Characters that a full line holds."""
    blocks: bool = True
    """Blank lines separate the paragraphs; if false, only a short last line does."""
    book: bool = False
    """An e-text with Project Gutenberg's markup."""
    indent: int = 0
    """Spaces at the beginning of every line."""
    double: bool = False
    """A blank line follows every line."""
    gaps: bool = False
    """Two spaces stand between words here and there, and mean nothing: the text has no columns."""


def normalise_newlines(data: bytes) -> bytes:
    """CRLF, CR CR LF and lone CR as LF; form feeds as the end of a paragraph; no DOS end of file and no byte order mark."""
    if b"\r" in data:
        data = data.replace(b"\r\r\n", b"\n").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\x0c" in data:
        data = PAGE_BREAK.sub(b"", data).replace(b"\x0c", b"\n")
    if b"\x1a" in data:
        data = data.replace(b"\x1a", b"")
    return data.replace(BOM, b"") if b"\xef" in data else data  # one byte is found thrice as fast as three


def find_layout(sample: bytes) -> Layout:
    """The layout of a text, found from its first LAYOUT_SAMPLE bytes.

    In hard-wrapped prose most lines are full, and most lines inside a paragraph begin with a small letter. Verse, plays,
    lists and texts with one line a paragraph fail one of the two tests, and so do texts of fewer than 20 lines.
    """
    if sample.count(b"\n") + sample.count(b"\r") < 20:
        return Layout()
    sample = normalise_newlines(sample)
    sample = sample[: sample.rfind(b"\n")]
    found = _wrapping(sample)
    if not found.width and (indent := _common_indent(sample)):
        found = replace(_wrapping(_without_indent(sample, indent)), indent=indent)
    if not found.width and 2 * len(BLANK_AFTER_LINE.findall(sample)) > 0.8 * sample.count(b"\n"):
        found = replace(_wrapping(BLANK_AFTER_LINE.sub(b"\n", sample)), double=True)
    return found if found.width else Layout()


def _common_indent(sample: bytes) -> int:
    """The spaces with which nearly every line begins."""
    indents = sorted(len(line) - len(line.lstrip(b" ")) for line in sample.split(b"\n") if line.strip())
    return indents[len(indents) // 20] if indents else 0


def _without_indent(data: bytes, indent: int) -> bytes:
    return re.sub(rb"^ {1,%d}" % indent, b"", data, flags=re.MULTILINE)


def _wrapping(sample: bytes) -> Layout:
    data, starts, _, lengths = _lines(sample)
    filled = lengths[lengths > 0]
    inner = starts[1:][(lengths[:-1] > 0) & (lengths[1:] > 0)]
    if len(filled) < 20 or len(inner) < 10:
        return Layout()
    rank = int(0.98 * (len(filled) - 1))
    width = int(np.partition(filled, rank)[rank])
    full = np.mean(filled >= 0.75 * width)
    firsts = [data[at : at + 4].decode("utf-8", "ignore")[:1] for at in inner[:: 1 + len(inner) // 200].tolist()]
    small = np.mean([first.islower() for first in firsts])
    if not 40 <= width <= 120 or full < 0.5 or small < 0.5:
        return Layout()
    return Layout(width, blocks=bool((len(lengths) - len(filled)) > 0.05 * len(lengths)))


def unwrap(data: bytes, layout: Layout) -> tuple[bytes, int]:
    """Join the hard-wrapped lines of `data` (LF line ends) into paragraphs; also returns how many line breaks were removed.

    Where blank lines separate paragraphs, all lines of a paragraph are joined if three in four are long; short lines
    (verse, addresses, lists) and indented ones stay. Otherwise two lines are joined where the second one's first word would
    not have fit on the first. A line that ends in a dash or hyphen is joined without a space.
    """
    if not layout.width:
        return data, 0
    if layout.double:
        data = BLANK_AFTER_LINE.sub(b"\n", data)
    if layout.indent:
        data = _without_indent(data, layout.indent)
    data, starts, stops, lengths = _lines(data)
    buffer = np.frombuffer(data + b"\n\n\n", dtype=np.uint8).copy()
    first, last = buffer[starts[1:]], buffer[np.maximum(stops[:-1] - 1, 0)]
    may_join = (lengths[:-1] > 0) & (lengths[1:] > 0) & (first != SPACE) & (first != TAB)
    columns = _with_columns(data, buffer, starts)
    may_join[columns[columns < len(may_join)]] = False
    may_join[columns[columns > 0] - 1] = False
    if layout.blocks:
        block = np.cumsum(lengths == 0)[:-1]
        breaks = np.bincount(block, weights=may_join)
        long = np.bincount(block, weights=may_join & (lengths[:-1] >= 0.7 * layout.width))
        joined = may_join & (long >= 0.75 * breaks)[block]
    else:
        turn = ((last == QUOTE) | (last == APOSTROPHE)) & ((first == QUOTE) | (first == APOSTROPHE))
        small = (first >= SMALL_A) & (first <= SMALL_Z) & (lengths[:-1] >= 0.6 * layout.width)
        joined = may_join & small
        unsure = np.flatnonzero(may_join & ~small & ~turn & (lengths[:-1] + LONGEST_WORD >= layout.width))
        ahead = buffer[np.minimum(starts[1:][unsure, None] + np.arange(LONGEST_WORD + 1), len(buffer) - 1)]
        word = np.argmax((ahead == SPACE) | (ahead == NEWLINE), axis=1)
        joined[unsure] = lengths[unsure] + 1 + np.where(word, word, LONGEST_WORD) > layout.width
    at = stops[:-1][joined]
    buffer[at] = SPACE
    before, before2 = buffer[at - 1], buffer[np.maximum(at - 2, 0)]
    before3 = buffer[np.maximum(at - 3, 0)]
    dash_before = (before == DASH) & (before2 != SPACE) & ~((before2 == DASH) & (before3 == SPACE))
    dash_after = (buffer[at + 1] == DASH) & (buffer[at + 2] == DASH) & (buffer[at + 3] > DASH)
    text = buffer[: len(data)].tobytes()
    drop = [-1, *at[dash_before | dash_after].tolist(), len(text)]
    return b"".join([text[a + 1 : b] for a, b in pairwise(drop)]), len(at)


def _with_columns(data: bytes, buffer: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Numbers of the lines of tables and contents, int64: lines with columns, of which at least three follow each other."""
    gaps = np.flatnonzero((buffer[:-2] == SPACE) & (buffer[1:-1] == SPACE) & (buffer[2:] == SPACE))
    found = gaps.tolist()
    for mark in LEADERS:
        at = data.find(mark)
        while at >= 0:
            found.append(at)
            end = data.find(b"\n", at)
            at = data.find(mark, end) if end >= 0 else -1
    lines = np.unique(np.searchsorted(starts, found, side="right") - 1).astype(np.int64)
    middle = np.flatnonzero(lines[2:] - lines[:-2] == 2) + 1
    return lines[np.unique([middle - 1, middle, middle + 1])]


def has_gaps(sample: bytes) -> bool:
    """Whether a text that begins with `sample` has double spaces between words, at least ten for each gap as of columns."""
    found = len(DOUBLE_SPACE.findall(sample)) if b"  " in sample else 0
    return found > 0 and found >= 10 * len(COLUMN_GAP.findall(sample))


def close_gaps(data: bytes, layout: Layout) -> tuple[bytes, int]:
    """`data` with one space for two between words, as where a dash was lost or after "n't"; also returns how many."""
    return DOUBLE_SPACE.subn(b" ", data) if layout.gaps else (data, 0)


def strip_illustrations(data: bytes) -> tuple[bytes, int]:
    """`data` (LF line ends) without `[Illustration]` and `[Illustration: caption]`; also returns how many were removed."""
    if b"[" not in data or not (b"[Illustration" in data or b"[ILLUSTRATION" in data):
        return data, 0
    return _remove(data, ILLUSTRATION, CAPTION_LIMIT)


def strip_notes(data: bytes, last: bool = True) -> tuple[bytes, int]:
    """`data` (LF line ends) without the transcriber's notes; also returns how many were removed.

    last: the text ends with `data`. Removes `[Transcriber's note: …]` anywhere. A note without brackets begins with a line
    "Transcriber's Note" near either end of the text, and extends to the lower edge of its box, to two blank lines, or, near
    the end of the text, to the end. Where none of these is near, only the paragraph that the line begins is removed.
    """
    count = 0
    if b"[" in data and any(word in data for word in (b"[Transcri", b"[TRANSCRI", b"[TN:")):
        data, count = _remove(data, BRACKET_NOTE, NOTE_LIMIT)
    ends = (data[:NOTE_WINDOW], data[-NOTE_WINDOW:])
    if not any(word in end for end in ends for word in (b"ranscri", b"TRANSCRI")):
        return data, count
    at = 0
    while found := NOTE.search(data, at):
        start, stop = found.span()
        if last and start >= len(data) - NOTE_LIMIT and (start > len(data) // 2 or stop == len(data)):
            return data[:start].rstrip(), count + 1
        end = NOTE_END.search(data, stop, stop + NOTE_SEARCH) or PARAGRAPH_END.search(data, stop)
        stop = BLANKS.match(data, end.end() if end else len(data)).end()  # type: ignore[union-attr]
        data, at, count = data[:start] + data[stop:], start, count + 1
    return data, count


def strip_italics(text: str) -> tuple[str, int]:
    """`text` with `_these words_` as these words; also returns how many pairs of underscores were removed.

    Underscores inside a word, beside other underscores or before white space stay, and no pair spans a blank line.
    """
    count = 0

    def inner(found: re.Match[str]) -> str:
        nonlocal count
        words = found[1] or found[2]
        if "\n\n" in words:
            return found[0]
        count += 1
        return words

    return (ITALICS.sub(inner, text), count) if "_" in text else (text, 0)


def fix_mojibake(text: str) -> str:
    """`text` with UTF-8 that was read as Windows-1252 or Latin-1 (`â€œhiâ€`, `Ã©`) repaired by ftfy.

    Correct quotation marks, ligatures and accents stay as they are.
    """
    if text.isascii() or not (MOJIBAKE.search(text) or LOST_QUOTE.search(text)):
        return text
    import ftfy

    return ftfy.fix_encoding(LOST_QUOTE.sub("â€\x9d", text))


def cut_after(window: bytes, layout: Layout) -> int | None:
    """Safe split point in `window`: cleaning and tokenizing the chunks equals doing the whole text.

    GPT-2's pre-tokenizer always splits before white space; wrapped lines and markup require the end of a paragraph as
    well. None where `window` has no such place.
    """
    paragraphs = DOUBLE_PARAGRAPH_END if layout.double else PARAGRAPH_END
    words = SINGLE_WORD_END if layout.gaps else WORD_END
    for found in (paragraphs if layout.width or layout.book else words).finditer(window):
        before = window[max(0, found.start() - 4) : found.start()].decode("utf-8", "ignore")[-1:]
        if before and not before.isspace():
            return found.start()
    return None


def _remove(data: bytes, pattern: re.Pattern[bytes], limit: int) -> tuple[bytes, int]:
    """`data` without the matches of `pattern` of at most `limit` bytes; also returns how many were removed.

    With a match that fills whole lines, these lines go, and the blank lines after it if there are blank lines before it.
    """
    parts, at = [], 0
    for found in pattern.finditer(data):
        start, stop = found.span()
        if stop - start > limit:
            continue
        line = data.rfind(b"\n", 0, start) + 1
        if not data[line:start].strip() and (rest := LINE_REST.match(data, stop)):
            start, stop = line, rest.end()
            if not line or not data[data.rfind(b"\n", 0, line - 1) + 1 : line].strip():
                stop = BLANKS.match(data, stop).end()  # type: ignore[union-attr]
        elif data[start - 1 : start] in (b" ", b"\n", b"") and data[stop : stop + 1] == b" ":
            stop += 1
        parts.append(data[at:start])
        at = stop
    return (b"".join([*parts, data[at:]]), len(parts)) if parts else (data, 0)


def _lines(data: bytes) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    """(`data` without white space at line ends, start and stop of each line in bytes, length of each line in characters)."""
    buffer = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(buffer == NEWLINE)
    before = buffer[ends[1:] - 1] if len(ends) and not ends[0] else buffer[ends - 1]
    if ((before == SPACE) | (before == TAB)).any():
        *lines, end = data.split(b"\n")
        data = b"\n".join([*[line.rstrip(b" \t") for line in lines], end])
        return _lines(data)
    starts, stops = np.concatenate([[0], ends + 1]), np.concatenate([ends, [len(data)]])
    if data.isascii():
        return data, starts, stops, stops - starts
    inner = np.flatnonzero((buffer & 0xC0) == 0x80)  # bytes of a character beyond its first
    return data, starts, stops, stops - starts - (np.searchsorted(inner, stops) - np.searchsorted(inner, starts))
