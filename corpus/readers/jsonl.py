"""JSON lines: each line is a row with its text in one field, and each row is a document."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from corpus import cleaning
from corpus.cleaning import BOM
from corpus.documents import (
    CONVERT_ROW,
    STYLE_FIELDS,
    UTF_16,
    ByteRange,
    DocumentError,
    Piece,
    ReadOptions,
    Unreadable,
    clean_document,
    null_row,
    skipped_row,
)


@dataclass(frozen=True)
class JsonlFile:
    """A `.jsonl` file, cut at line ends."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl",)
    kind: ClassVar[str] = "JSON lines"
    has_rows: ClassVar[bool] = True
    has_years: ClassVar[bool] = False

    name: str
    path: Path
    size: int
    blocks: tuple[tuple[int, int, int, int], ...]
    """Start, stop, first line (from 1) and rows of each block."""
    counts: dict[str, int] = field(default_factory=dict)
    split: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    sketches: tuple[bytes, ...] = ()

    @classmethod
    def inspect(cls, path: Path, name: str, options: ReadOptions, split: str) -> JsonlFile | str:
        """The rows in a file, which is read for its line ends only: a bad row is named when its text is read."""
        blocks, start, line = [], 0, 1
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                return Unreadable(f"{path}: {UTF_16}", "UTF-16")
            file.seek(0)
            while start < size:
                data = file.read(cleaning.CHUNK_BYTES)
                while data and not data.endswith(b"\n") and (more := file.readline()):
                    data += more
                blocks.append((start, start + len(data), line, sum(1 for row in data.split(b"\n") if row.strip())))
                start, line = start + len(data), line + data.count(b"\n")
        return cls(name, path, size, tuple(blocks), split=split)

    @property
    def documents(self) -> int:
        return sum(rows for *_, rows in self.blocks)

    def chunks(self, first: int) -> Iterator[JsonlChunk]:
        for start, stop, line, rows in self.blocks:
            if rows:
                yield JsonlChunk(first, self.path, start, stop, line, rows)
            first += rows

    def style_values(self, what: str) -> Iterator[Any]:
        """The first field of each row that holds `what`; None for a row without one."""
        names = STYLE_FIELDS.get(what, (what,))
        with self.path.open("rb") as lines:
            for line in lines:
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError:  # named, or left out, when the text is read
                        row = None
                    yield next((row[name] for name in names if name in row), None) if isinstance(row, dict) else None


@dataclass(frozen=True)
class JsonlChunk(ByteRange):
    """Whole lines of a `.jsonl` file; `first_line` (from 1) is the number of the first."""

    first_line: int
    documents: int

    def read(self, options: ReadOptions) -> Iterator[Piece]:
        lines = self.read_bytes().split(b"\n")
        document, offset = self.document, self.start
        for number, line in enumerate(lines, self.first_line):
            if line.strip():
                try:
                    text = _text_of(line, f"{self.path}:{number}", offset, options.field)
                    yield null_row(document) if text is None else clean_document(document, text, options)
                except DocumentError:
                    if not options.skip_bad:
                        raise
                    yield skipped_row(document)
                document += 1
            offset += len(line) + 1


def _text_of(line: bytes, place: str, offset: int, name: str) -> bytes | None:
    """The text of one row, as UTF-8; None where it is null. place and offset: where the line is, for messages."""
    try:
        row: Any = json.loads(line.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DocumentError(f"{place}: not UTF-8 at byte offset {offset + error.start}; {CONVERT_ROW}") from None
    except ValueError as error:
        raise DocumentError(
            f"{place}: not JSON ({error}); fix the row, or leave it out with --skip-bad-files"
        ) from None
    if isinstance(row, dict) and name in row and row[name] is None:
        return None
    if not isinstance(row, dict) or not isinstance(row.get(name), str):
        fields = f"it has {', '.join(row)}" if isinstance(row, dict) else "it is no object"
        raise DocumentError(
            f"{place}: no text in a field '{name}' ({fields}); fix the row, name another with --text-field, or use "
            f"--skip-bad-files"
        )
    text: str = row[name]
    return text.encode("utf-8", "replace")
