"""Parquet: each row of the table is a document, its text in one column.

This process reads the table, a few rows at a time, and the workers clean the rows. Pages are unpacked one at a time; only
where a row group has a dictionary page, this must be unpacked whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from corpus import cleaning
from corpus.documents import (
    CONVERT_ROW,
    STYLE_FIELDS,
    TEXT_FIELD,
    YEAR_FIELD,
    DocumentError,
    Piece,
    ReadOptions,
    Unreadable,
    clean_document,
    null_row,
    skipped_row,
)

ROW_BYTES = 1 << 18  # bytes of rows that a worker cleans together


@dataclass(frozen=True)
class ParquetFile:
    """A `.parquet` file and which of its rows are documents."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    kind: ClassVar[str] = "a parquet file"
    has_rows: ClassVar[bool] = True
    has_years: ClassVar[bool] = True

    name: str
    path: Path
    size: int
    """Bytes of the text column, uncompressed."""
    rows: int
    column: str = TEXT_FIELD
    keep: np.ndarray | None = None
    """Which rows are documents, bool [rows]; None: all."""
    counts: dict[str, int] = field(default_factory=dict)
    split: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    sketches: tuple[bytes, ...] = ()

    @classmethod
    def inspect(cls, path: Path, name: str, options: ReadOptions, split: str) -> ParquetFile | str:
        """The rows of a table, by its schema and, with `options.years`, its column of years."""
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                fields, facts = table.schema_arrow, table.metadata
                has = f"(it has {', '.join(fields.names)})"
                if options.field not in fields.names:
                    return f"{path}: no field '{options.field}' {has}: name one with --text-field"
                kind = fields.field(options.field).type
                if not _holds_text(kind):
                    return f"{path}: field '{options.field}' holds {kind}, not text"
                keep = None
                if options.years:
                    if YEAR_FIELD not in fields.names:
                        return f"{path}: --years needs a field '{YEAR_FIELD}' {has}"
                    years = table.read(columns=[YEAR_FIELD]).column(0).cast(pyarrow.int64()).fill_null(-1).to_numpy()
                    keep = (years >= options.years[0]) & (years <= options.years[1])
        except pyarrow.ArrowInvalid as error:
            return Unreadable(f"{path}: not {cls.kind} ({str(error).splitlines()[0]})", "damaged")
        size = 0
        for group in map(facts.row_group, range(facts.num_row_groups)):
            columns = map(group.column, range(group.num_columns))
            size += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == options.field)
        left_out = {} if keep is None or keep.all() else {"documents_of_other_years": int((~keep).sum())}
        return cls(name, path, size, facts.num_rows, options.field, keep, left_out, split)

    @property
    def documents(self) -> int:
        return self.rows if self.keep is None else int(self.keep.sum())

    def chunks(self, first: int) -> Iterator[ParquetChunk]:
        import pyarrow
        import pyarrow.parquet

        pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # arrow's own keeps what it frees, more with every batch
        rows: list[tuple[int, bytes | None]] = []
        number = size = 0
        with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20) as table:
            step = max(1, min(1024, cleaning.CHUNK_BYTES * self.rows // max(self.size, 1)))
            for batch in table.iter_batches(batch_size=step, columns=[self.column], use_threads=False):
                for data in _as_bytes(batch.column(0)):
                    if self.keep is None or self.keep[number]:
                        rows.append((number, data.as_py()))
                        size += len(rows[-1][1] or b"")
                    number += 1
                    if size >= ROW_BYTES:
                        yield ParquetChunk(first, self.path, tuple(rows))
                        first, rows, size = first + len(rows), [], 0
        if rows:
            yield ParquetChunk(first, self.path, tuple(rows))

    def style_values(self, what: str) -> list[Any]:
        """The column that holds `what`. Raises DocumentError where there is none."""
        import pyarrow.parquet

        fields = STYLE_FIELDS.get(what, (what,))
        with pyarrow.parquet.ParquetFile(self.path) as table:
            names = table.schema_arrow.names
            found = next((name for name in fields if name in names), None)
            if found is None:
                raise DocumentError(f"{self.path} has no field {' or '.join(fields)} (it has {', '.join(names)})")
            values: list[Any] = table.read(columns=[found]).column(0).to_pylist()
        return values if self.keep is None else [values[at] for at in np.flatnonzero(self.keep)]


def _holds_text(kind: Any) -> bool:
    """Whether a column of this type holds texts, also as categories."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(types, f"is_{name}")(kind) for name in tests)


def _as_bytes(column: Any) -> Any:
    """A column of texts as one of bytes."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string_view(column.type):
        column = column.cast(pyarrow.string())
    return column.cast(pyarrow.large_binary())


@dataclass(frozen=True)
class ParquetChunk:
    """Rows of a table in memory, each with its number in the table."""

    document: int
    path: Path
    rows: tuple[tuple[int, bytes | None], ...]
    """None: null."""

    @property
    def documents(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        return sum(len(data or b"") for _, data in self.rows)

    def read(self, options: ReadOptions) -> Iterator[Piece]:
        for document, (number, data) in enumerate(self.rows, self.document):
            try:
                yield null_row(document) if data is None else clean_document(document, data, options)
            except UnicodeDecodeError as error:
                if not options.skip_bad:
                    raise DocumentError(
                        f"{self.path}, row {number}: not UTF-8 at byte {error.start} of this row; {CONVERT_ROW}"
                    ) from None
                yield skipped_row(document)
