"""Where texts come from: files found, checked before any work, and cut into tasks that worker processes read.

A `.txt` file is one document; each row of a `.jsonl` or `.parquet` file, by its field `text`, is one.

    python -c "from corpus import documents; print([name for path, name in documents.find(['data/sample'])])"
    python prepare_data.py --input novels/ 'more/*.txt' stories.jsonl --out data/mine

Other sources give a `Corpus` too: anything with `name`, `size`, `documents`, `split` and `tasks(first)` can stand in its
list of files (see `TableFile`), and each task only has to pickle and to `read` its pieces.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from config import ConfigError
from corpus.cleaning import (
    LAYOUT_SAMPLE,
    LICENCE_WINDOW,
    MARK,
    Layout,
    cut_after,
    find_layout,
    fix_mojibake,
    licence_bounds,
    normalise_newlines,
    strip_illustrations,
    strip_italics,
    strip_notes,
    unwrap,
)

SUFFIXES = (".txt", ".jsonl", ".parquet")
FIELD = "text"
PIECE = 1 << 20  # bytes of one task; also what one process holds of a long text at a time
ROWS = 1 << 18  # bytes of a table's rows that a worker takes together
YEAR = "publication_date"  # the field that --years looks at
KINDS = {  # how files of other kinds begin
    b"%PDF": "a PDF: save its text as .txt",
    b"PK\x03\x04": "a zip archive (also EPUB and Word files): unpack it or save its text as .txt",
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"\xff\xfe": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"PAR1": "a parquet file: give it the ending .parquet",
}


class DocumentError(ValueError):
    """A text that cannot be read; the message names the file, the place and the remedy."""


@dataclass(frozen=True)
class Options:
    """How texts are read, and which steps of cleaning are on. Those from `strip_notes` to `strip_italics` work on books only."""

    unwrap: bool = True
    strip_licence: bool = True
    strip_notes: bool = True
    strip_illustrations: bool = True
    strip_italics: bool = True
    fix_mojibake: bool = False
    books: bool = False
    """All are e-texts of books. Otherwise only those that carry Project Gutenberg's licence or are hard-wrapped."""
    skip_bad: bool = False
    field: str = FIELD
    """Where rows have their text."""
    years: tuple[int, int] | None = None
    """Only rows whose YEAR lies there, both ends included."""


class Piece(NamedTuple):
    """Clean text of one document, or of a part of it."""

    document: int
    text: str
    bytes: int
    """UTF-8 bytes of `text`."""
    last: bool
    """The document ends here."""
    counts: dict[str, int]
    """What cleaning did, for the manifest."""


class Task(Protocol):
    """What a worker takes at a time; tasks come in the order of the documents."""

    @property
    def document(self) -> int:
        """Number of its first document."""

    @property
    def documents(self) -> int:
        """Documents it holds, or 1 for a part of one."""

    @property
    def size(self) -> int:
        """Bytes, about."""

    @property
    def place(self) -> str:
        """Where it comes from, for messages."""

    def read(self, options: Options) -> Iterator[Piece]:
        """Its pieces in order. Raises DocumentError."""


class File(Protocol):
    """One source of documents, whose number is known before they are read."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def documents(self) -> int: ...
    @property
    def counts(self) -> dict[str, int]:
        """What cleaning already did, for the manifest."""

    @property
    def split(self) -> str:
        """`train` or `val` where the source itself says so, else empty."""

    def tasks(self, first: int) -> Iterator[Task]:
        """Its tasks in order; `first` is the number of its first document."""


@dataclass(frozen=True)
class TextPart:
    """Bytes start..stop of a text file."""

    document: int
    path: Path
    start: int
    stop: int
    layout: Layout
    last: bool
    documents: int = 1

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def place(self) -> str:
        return str(self.path)

    def read(self, options: Options) -> Iterator[Piece]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = normalise_newlines(file.read(self.size))
        try:
            text, size, counts = tidy(data, self.layout, options, self.last)
        except UnicodeDecodeError:
            raise DocumentError(f"{self.path} changed while it was read: run the same command again") from None
        yield Piece(self.document, text, size, self.last, counts)


@dataclass(frozen=True)
class TextFile:
    """A plain text without its mark and licence, and where it may be cut."""

    name: str
    path: Path
    cuts: tuple[int, ...]
    """Begin, places between, end."""
    layout: Layout
    counts: dict[str, int]
    documents: int = 1
    split: str = ""

    @property
    def size(self) -> int:
        return self.cuts[-1] - self.cuts[0]

    def tasks(self, first: int) -> Iterator[Task]:
        for start, stop in pairwise(self.cuts):
            yield TextPart(first, self.path, start, stop, self.layout, stop == self.cuts[-1])


@dataclass(frozen=True)
class Rows:
    """Rows of a table in memory, each a document, with their numbers there."""

    document: int
    path: Path
    rows: tuple[tuple[int, bytes], ...]

    @property
    def documents(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        return sum(len(data) for _, data in self.rows)

    @property
    def place(self) -> str:
        return str(self.path)

    def read(self, options: Options) -> Iterator[Piece]:
        for document, (number, data) in enumerate(self.rows, self.document):
            try:
                yield clean(document, data, options)
            except UnicodeDecodeError as error:
                if not options.skip_bad:
                    raise DocumentError(
                        f"{self.path}, row {number}: not UTF-8 at byte {error.start} of this row; {REMEDY}"
                    ) from None
                yield Piece(document, "", 0, True, {"skipped_rows": 1})


@dataclass(frozen=True)
class LinesPart:
    """Bytes start..stop of a `.jsonl` file: whole lines, `first_line` (from 1) being the first."""

    document: int
    path: Path
    start: int
    stop: int
    first_line: int
    documents: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def place(self) -> str:
        return str(self.path)

    def read(self, options: Options) -> Iterator[Piece]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            lines = file.read(self.size).split(b"\n")
        document, at = self.document, self.start
        for number, line in enumerate(lines, self.first_line):
            if line.strip():
                try:
                    yield clean(document, _field(line, f"{self.path}:{number}", at, options.field), options)
                except DocumentError:
                    if not options.skip_bad:
                        raise
                    yield Piece(document, "", 0, True, {"skipped_rows": 1})
                document += 1
            at += len(line) + 1


@dataclass(frozen=True)
class LinesFile:
    """A `.jsonl` file, cut at line ends."""

    name: str
    path: Path
    size: int
    blocks: tuple[tuple[int, int, int, int], ...]
    """Start, stop, first line (from 1) and rows of each block."""
    counts: dict[str, int] = field(default_factory=dict)
    split: str = ""

    @property
    def documents(self) -> int:
        return sum(rows for *_, rows in self.blocks)

    def tasks(self, first: int) -> Iterator[Task]:
        for start, stop, line, rows in self.blocks:
            if rows:
                yield LinesPart(first, self.path, start, stop, line, rows)
            first += rows


@dataclass(frozen=True)
class TableFile:
    """A `.parquet` file, read by this process a few rows at a time and cleaned by the workers.

    Pages are unpacked one at a time. Only where a row group has a dictionary page, this must be unpacked whole.
    """

    name: str
    path: Path
    size: int
    rows: int
    column: str = FIELD
    keep: np.ndarray | None = None
    """bool [rows]: which are documents; none: all."""
    counts: dict[str, int] = field(default_factory=dict)
    split: str = ""

    @property
    def documents(self) -> int:
        return self.rows if self.keep is None else int(self.keep.sum())

    def tasks(self, first: int) -> Iterator[Task]:
        import pyarrow
        import pyarrow.parquet

        pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # arrow's own keeps what it frees, more with every batch
        held: list[tuple[int, bytes]] = []
        number = size = 0
        with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20) as table:
            step = max(1, min(1024, PIECE * self.rows // max(self.size, 1)))
            for batch in table.iter_batches(batch_size=step, columns=[self.column], use_threads=False):
                for data in batch.column(0).cast(pyarrow.large_binary()):
                    if self.keep is None or self.keep[number]:
                        held.append((number, data.as_py() or b""))
                        size += len(held[-1][1])
                    number += 1
                    if size >= ROWS:
                        yield Rows(first, self.path, tuple(held))
                        first, held, size = first + len(held), [], 0
        if held:
            yield Rows(first, self.path, tuple(held))


@dataclass(frozen=True)
class Corpus:
    """All documents of one preparation, numbered in order."""

    name: str
    files: Sequence[File]

    @property
    def documents(self) -> int:
        return sum(file.documents for file in self.files)

    @property
    def size(self) -> int:
        """Bytes, about; for progress."""
        return sum(file.size for file in self.files)

    def tasks(self) -> Iterator[Task]:
        first = 0
        for file in self.files:
            yield from file.tasks(first)
            first += file.documents

    def keys(self) -> np.ndarray:
        """A pseudo-random uint64 for each document, from its file's name and its row there."""
        keys = []
        for file in self.files:
            base = int.from_bytes(hashlib.blake2b(file.name.encode(), digest_size=8).digest(), "little")
            keys.append(_mix(np.arange(file.documents, dtype=np.uint64) + np.uint64(base)))
        return np.concatenate(keys)


REMEDY = "convert it to UTF-8 (`iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW`), or leave it out with --skip-bad-files"


def find(inputs: Iterable[str]) -> list[tuple[Path, str]]:
    """Each file of `inputs` (files, folders, globs) once, with the name it is known by: its path inside the folder given.

    Folders are searched through, hidden ones left out, and sorted. Raises ConfigError with every input that holds nothing.
    """
    found: dict[Path, tuple[Path, str]] = {}
    faults = []
    for item in inputs:
        path = Path(item).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            faults.append(f"--input {item}: no such file or folder, and no file matches it")
        files = [pair for match in matches for pair in (_inside(match) if match.is_dir() else [(match, match.name)])]
        if matches and not files:
            faults.append(f"--input {item}: no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file in this folder")
        for file, name in files:
            found.setdefault(file.resolve(), (file, name))
    if faults:
        raise ConfigError(faults)
    return list(found.values())


def inspect(path: Path, name: str, options: Options, split: str = "") -> File | str:
    """The documents in one file, none where it is empty; or, as text, why it cannot be read.

    Reads a text through once, and a `.jsonl` for its line ends. split: `train` or `val` where the source says so.
    """
    try:
        if path.suffix.lower() == ".parquet":
            return _inspect_table(path, name, options, split)
        if options.years:
            return f"{path}: --years needs a field '{YEAR}', which only .parquet files are searched for"
        with path.open("rb") as file:
            return (
                _inspect_lines(file, path, name, split)
                if path.suffix.lower() == ".jsonl"
                else _inspect_text(file, path, name, options, split)
            )
    except OSError as error:
        return f"{path}: {error.strerror or error}"


def clean(document: int, data: bytes, options: Options) -> Piece:
    """A whole document's clean text. Raises UnicodeDecodeError."""
    counts: dict[str, int] = {}
    data = normalise_newlines(data.removeprefix(MARK))
    if options.strip_licence:
        start, stop = licence_bounds(data[:LICENCE_WINDOW], data[-LICENCE_WINDOW:], len(data))
        if (start, stop) != (0, len(data)):
            counts |= {"licence_documents": 1, "licence_bytes": len(data) - (stop - start)}
            data = data[start:stop]
    if not data or data.isspace():
        return Piece(document, "", 0, True, counts | {"empty_documents": 1})
    layout = judge(data[:LAYOUT_SAMPLE], options, bool(counts))
    counts |= {"unwrapped_documents": 1} if layout.width else {}
    text, size, steps = tidy(data, layout, options, True)
    return Piece(document, text, size, True, counts | steps)


def judge(sample: bytes, options: Options, licence: bool) -> Layout:
    """The layout of a text that begins with `sample`. licence: it carried Project Gutenberg's."""
    found = find_layout(sample)
    width = found.width if options.unwrap else 0
    return Layout(width, found.blocks, options.books or licence or found.width > 0)


def tidy(data: bytes, layout: Layout, options: Options, last: bool) -> tuple[str, int, dict[str, int]]:
    """The clean text of a document or of a part of it (LF line ends), its UTF-8 bytes, and what each step did.

    last: the document ends with it. Raises UnicodeDecodeError.
    """
    counts: dict[str, int] = {}
    if layout.book and options.strip_notes:
        data, counts["transcriber_notes"] = strip_notes(data, last)
    if layout.book and options.strip_illustrations:
        data, counts["illustrations"] = strip_illustrations(data)
    data, counts["joined_lines"] = unwrap(data, layout)
    text, size = data.decode("utf-8"), len(data)
    if layout.book and options.strip_italics:
        text, counts["italics"] = strip_italics(text)
        size -= 2 * counts["italics"]
    if options.fix_mojibake and (fixed := fix_mojibake(text)) is not text:
        counts["mojibake_documents"] = int(fixed != text)
        text, size = fixed, len(fixed.encode())
    return text, size, {name: count for name, count in counts.items() if count}


def _inside(folder: Path) -> list[tuple[Path, str]]:
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    return [
        (path, name)
        for name, path in sorted(names.items())
        if path.is_file() and not any(part.startswith(".") for part in name.split("/"))
    ]


def _inspect_text(file: BinaryIO, path: Path, name: str, options: Options, split: str) -> TextFile | str:
    head = file.read(LICENCE_WINDOW)
    for beginning, what in KINDS.items():
        if head.startswith(beginning):
            return f"{path}: this is {what}"
    size, solid = file.seek(0, 2), False
    decoder = codecs.getincrementaldecoder("utf-8")()
    file.seek(0)
    for offset in range(0, size, PIECE):
        data = file.read(PIECE)
        if (zero := data.find(b"\0")) >= 0:
            return f"{path}: a binary file (zero byte at byte offset {offset + zero}): only plain text can be read"
        pending = len(decoder.getstate()[0])
        try:
            if pending or not data.isascii():
                decoder.decode(data, offset + len(data) == size)
        except UnicodeDecodeError as error:
            return f"{path}: not UTF-8 at byte offset {offset - pending + error.start}; {REMEDY}"
        solid = solid or not data.isspace()
    start = len(MARK) if head.startswith(MARK) else 0
    if not solid or size == start:
        return TextFile(name, path, (0,), Layout(), {}, documents=0, split=split)
    counts: dict[str, int] = {"byte_order_marks": 1} if start else {}
    stop = size
    if options.strip_licence:
        file.seek(max(0, size - LICENCE_WINDOW))
        begin, stop = licence_bounds(head, file.read(), size)
        if (begin, stop) != (0, size):
            counts |= {"licence_documents": 1, "licence_bytes": size - (stop - begin)}
            start = max(start, begin)
        if start >= stop:
            return TextFile(name, path, (0,), Layout(), counts, documents=0)
    file.seek(start)
    layout = judge(file.read(min(LAYOUT_SAMPLE, stop - start)), options, "licence_documents" in counts)
    counts |= {"unwrapped_documents": 1} if layout.width else {}
    return TextFile(name, path, _cuts(file, start, stop, layout), layout, counts, split=split)


def _cuts(file: BinaryIO, start: int, stop: int, layout: Layout) -> tuple[int, ...]:
    """Places about PIECE apart where the text may be cut without changing a token."""
    cuts, window = [start], 1 << 16
    while cuts[-1] + PIECE < stop:
        at = cuts[-1] + PIECE
        found = None
        while found is None and at < stop:
            file.seek(at)
            found = cut_after(file.read(min(window, stop - at)), layout)
            at += window if found is None else found
        if found is None or at >= stop:
            break
        cuts.append(at)
    return (*cuts, stop)


def _inspect_lines(file: BinaryIO, path: Path, name: str, split: str) -> LinesFile:
    size = file.seek(0, 2)
    file.seek(0)
    blocks, start, line = [], 0, 1
    while start < size:
        data = file.read(PIECE)
        while data and not data.endswith(b"\n") and (more := file.readline()):
            data += more
        blocks.append((start, start + len(data), line, sum(1 for row in data.split(b"\n") if row.strip())))
        start, line = start + len(data), line + data.count(b"\n")
    return LinesFile(name, path, size, tuple(blocks), split=split)


def _inspect_table(path: Path, name: str, options: Options, split: str) -> TableFile | str:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            fields, facts = table.schema_arrow, table.metadata
            if options.field not in fields.names:
                return (
                    f"{path}: no field '{options.field}' (it has {', '.join(fields.names)}): name one with --text-field"
                )
            kind = fields.field(options.field).type
            if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
                return f"{path}: field '{options.field}' holds {kind}, not text"
            keep = None
            if options.years:
                if YEAR not in fields.names:
                    return f"{path}: --years needs a field '{YEAR}' (it has {', '.join(fields.names)})"
                dates = table.read(columns=[YEAR]).column(0).cast(pyarrow.int64()).fill_null(-1).to_numpy()
                keep = (dates >= options.years[0]) & (dates <= options.years[1])
    except pyarrow.ArrowInvalid as error:
        return f"{path}: not a parquet file ({str(error).splitlines()[0]})"
    size = 0
    for group in map(facts.row_group, range(facts.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        size += sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == options.field)
    left_out = {} if keep is None or keep.all() else {"documents_of_other_years": int((~keep).sum())}
    return TableFile(name, path, size, facts.num_rows, options.field, keep, left_out, split)


def _field(line: bytes, place: str, offset: int, name: str) -> bytes:
    """The text of one JSON row, as UTF-8."""
    try:
        row: Any = json.loads(line.removeprefix(MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DocumentError(f"{place}: not UTF-8 at byte offset {offset + error.start}; {REMEDY}") from None
    except ValueError as error:
        raise DocumentError(
            f"{place}: not JSON ({error}); mend the row, or leave it out with --skip-bad-files"
        ) from None
    if not isinstance(row, dict) or not isinstance(row.get(name), str):
        fields = f"it has {', '.join(row)}" if isinstance(row, dict) else "it is no object"
        raise DocumentError(
            f"{place}: no text in a field '{name}' ({fields}); mend the row, name another with --text-field, or use "
            f"--skip-bad-files"
        )
    text: str = row[name]
    return text.encode("utf-8", "replace")


def _mix(numbers: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014) of each uint64."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
