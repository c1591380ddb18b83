#!/usr/bin/env bash
# Expected: ParquetFile.iter_batches(batch_size=N) gives N rows a batch, fewer only "if there aren't enough rows in the file", so that a batch shorter than N
# is the last.
# Seen with pyarrow 26.0.1: true of text and numbers, across row groups. One dictionary (categorical) column among those read, as pandas writes for authors or
# genres, shortens batches at row groups in the middle of the file too. A loop that counts batches, or stops at a short one, loses rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 2>/dev/null
"$folder/venv/bin/python" - "$folder/books.parquet" <<'PY'
import sys

import pyarrow
from pyarrow import parquet

rows = 30
table = pyarrow.table(
    {
        "text": [f"book {i}" for i in range(rows)],
        "year": list(range(rows)),
        "author": pyarrow.array(["Eliot", "Gaskell", "Trollope"] * (rows // 3)).dictionary_encode(),
    }
)
parquet.write_table(table, sys.argv[1], row_group_size=7)
print(f"pyarrow {pyarrow.__version__}: {rows} rows in groups of 7, batch_size=10")
found = {}
for columns in (["text", "year"], ["text", "year", "author"]):
    batches = parquet.ParquetFile(sys.argv[1]).iter_batches(batch_size=10, columns=columns)
    found[len(columns)] = [batch.num_rows for batch in batches]
    print(f"{', '.join(columns)}: {found[len(columns)]}")
    assert sum(found[len(columns)]) == rows
assert found[2] == [10, 10, 10], "plain columns give other batches now"
assert min(found[3][:-1]) < 10, "a dictionary column gives whole batches now"
PY
