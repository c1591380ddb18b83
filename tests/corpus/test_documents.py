"""documents.py: which files are found, what is read from them, and what is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from config import ConfigError
from corpus import cleaning, encoding
from corpus.documents import ReadOptions
from corpus.finder import find, inspect
from corpus.readers.registry import SUFFIXES
from storage.shards import Manifest
from support.samples import NEW_FOOTER, NEW_HEADER, make_texts, paragraphs, run, tokens, told, wrapped
from tokenizer import END_OF_TEXT


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return make_texts(tmp_path / "texts")


def test_jsonl_and_parquet_rows_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [f"Row {n}: “{p}”\nSecond line\r\nthird" for n, p in enumerate(paragraphs(50))]
    rows[7], rows[9] = "", f"has {END_OF_TEXT} inside"
    lines = [json.dumps({"id": n, "text": row}, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(lines[:20]) + "\n\n" + "\r\n".join(lines[20:]), encoding="utf-8", newline=""
    )
    table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.large_string()), "n": list(range(50))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=8)
    monkeypatch.setattr(cleaning, "CHUNK_BYTES", 500)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 900)
    clean = [row.replace("\r\n", "\n") for row in rows if row]
    for suffix in ("jsonl", "parquet"):
        out = tmp_path / suffix
        assert (
            run(
                "--input",
                tmp_path / f"a.{suffix}",
                "--tokenizer",
                "char",
                "--val-fraction",
                0.2,
                "--workers",
                2,
                "--out",
                out,
            )
            == 0
        )
        train, val = told(out, "train"), told(out, "val")
        assert sorted(train + val) == sorted(clean)
        assert train == [row for row in clean if row in train]
        assert len(val) == 10
        manifest = Manifest.load(out)
        assert (manifest.source.documents, manifest.cleaning) == (50, {"empty_documents": 1})


def test_rows_are_unwrapped_and_stripped_too(tmp_path: Path) -> None:
    made = paragraphs(60)
    book = NEW_HEADER + wrapped(made, "\n\n").rstrip() + NEW_FOOTER
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in (book, "Other. " * 9)), encoding="utf-8"
    )
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "book.txt").write_text(book, encoding="utf-8")
    (tmp_path / "t" / "other.txt").write_text("Other. " * 9, encoding="utf-8")
    for source in ("a.jsonl", "t"):
        out = tmp_path / f"out-{source}"
        run("--input", tmp_path / source, "--tokenizer", "char", "--out", out)
        assert "\n\n".join(made) in told(out, "train") + told(out, "val")
        cleaning = Manifest.load(out).cleaning
        assert (cleaning["licence_documents"], cleaning["unwrapped_documents"]) == (1, 1)
        assert cleaning["licence_bytes"] > len(NEW_HEADER) + len(NEW_FOOTER) - 8
        assert cleaning["joined_lines"] == wrapped(made, "\n\n").count("\n") - 2 * len(made) + 1


def test_marks_and_windows_line_ends_go(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne\r\ntwo\r\n\r\nthree and four")
    run("--input", tmp_path / "a.txt", "--tokenizer", "char", "--out", tmp_path / "out")
    assert told(tmp_path / "out", "train") + told(tmp_path / "out", "val") == ["One\ntwo\n\nthree and f", "our"]
    assert Manifest.load(tmp_path / "out").cleaning == {"byte_order_marks": 1}


def test_files_are_found_once_sorted_and_by_kind(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (texts / "notes.py").write_text("not looked for", encoding="utf-8")
    (texts / ".hidden.txt").write_text("not looked for", encoding="utf-8")
    names = [name for _, name in find([str(texts)])]
    assert names == sorted(names) and len(names) == 12 and "more/s01.txt" in names
    assert len(find([str(texts), str(texts / "s00.txt"), str(texts / "*.txt")])) == 12
    assert [name for _, name in find([str(texts / "**" / "s0[13].txt")])] == ["s01.txt", "s03.txt"]
    assert [name for _, name in find([str(texts / "notes.py")])] == ["notes.py"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError) as caught:
        find([str(texts / "*.xyz"), str(tmp_path / "none")])
    assert "no file matches" in caught.value.faults[0] and "no .txt, .jsonl, .parquet" in caught.value.faults[1]
    assert all(suffix in caught.value.faults[1] for suffix in SUFFIXES)


BAD = {
    "latin.txt": (b"Caf" + b"\xe9 au lait", r"latin\.txt: not UTF-8 at byte offset 3; convert it .*iconv"),
    "late.txt": (b"x" * 3000 + "é".encode() * 500 + b"\xc3", r"late\.txt: not UTF-8 at byte offset 4000"),
    "far.txt": (b"y" * 2047 + "é".encode() + b"\x80z", r"far\.txt: not UTF-8 at byte offset 2049"),
    "zero.txt": (b"some text\0more", r"zero\.txt: a binary file \(zero byte at byte offset 9\)"),
    "wide.txt": ("wide".encode("utf-16"), r"wide\.txt: this is UTF-16"),
    "book.txt": (b"%PDF-1.4 text", r"book\.txt: this is a PDF"),
    "table.parquet": (b"no table at all", r"table\.parquet: not a parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named_before_any_work(
    name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cleaning, "CHUNK_BYTES", 1024)
    content, message = BAD[name]
    run("--input", texts, "--tokenizer", "char", "--out", tmp_path / "good")
    (texts / name).write_bytes(content)
    (texts / "second.txt").write_bytes(b"\xff\xff")
    out = tmp_path / "out"
    given = ("--input", texts, texts / name, texts / "second.txt", "--tokenizer", "char", "--out", out)
    assert run(*given) == 1
    error = capsys.readouterr().err
    assert "2 of 14 files cannot be read" in error and "second.txt: not UTF-8 at byte offset 0" in error
    assert "--skip-bad-files" in error
    assert re.search(message, error)
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "good"}
    assert run(*given, "--skip-bad-files") == 0
    assert Manifest.load(out).cleaning["skipped_files"] == 2
    assert run("--input", texts, "--tokenizer", "char", "--out", out) == 0  # a folder is read without them
    error = capsys.readouterr().err
    assert re.search(message, error) and "12 of 14 files read; 2 skipped: " in error
    assert (tokens(out, "train") == tokens(tmp_path / "good", "train")).all()
    assert Manifest.load(out).cleaning["skipped_files"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"title": "no text"}', r"rows\.jsonl:3: no text in a field 'text' \(it has title\)"),
        (b'{"text": 7}', r"rows\.jsonl:3: no text"),
        (b'{"text": "cut', r"rows\.jsonl:3: not JSON"),
        (b'{"text": "\xe9"}', r"rows\.jsonl:3: not UTF-8 at byte offset 66"),
        (b"[1]", r"rows\.jsonl:3: no text .*no object"),
    ],
)
def test_bad_rows_are_named(line: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = b'{"text": "one two three"}\n'
    (tmp_path / "rows.jsonl").write_bytes(good + b"\n" + line + b"\n" + good * 4)
    offset = len(good) + 1 + 10
    out = tmp_path / "out"
    assert run("--input", tmp_path / "rows.jsonl", "--tokenizer", "char", "--out", out) == 1
    assert re.search(message.replace("66", str(offset)), capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}
    assert run("--input", tmp_path / "rows.jsonl", "--tokenizer", "char", "--skip-bad-files", "--out", out) == 0
    assert Manifest.load(out).cleaning == {"skipped_rows": 1}
    assert len(told(out, "train") + told(out, "val")) == 5


def test_a_table_without_text_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for column, expected in (
        ("words", "no field 'text' (it has words)"),
        ("text", "field 'text' holds int64, not text"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({column: [1, 2]}), tmp_path / "a.parquet")
        assert expected in inspect(tmp_path / "a.parquet", "a", ReadOptions())


NULLS = ["One row of text.", None, "", "Another row.", None, "A third one."]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "binary", "jsonl", "json"])
def test_null_texts_are_left_out_and_counted(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in NULLS), encoding="utf-8")
    elif kind == "json":
        (tmp_path / "a.json").write_text(json.dumps([{"text": row} for row in NULLS]), encoding="utf-8")
    else:
        types = {"dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
        column = pyarrow.array([None if row is None else row.encode() for row in NULLS] if kind == "binary" else NULLS, types.get(kind) or getattr(pyarrow, kind)())  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    out = tmp_path / "out"
    assert run("--input", tmp_path / "a*", "--tokenizer", "char", "--val-fraction", 0.3, "--out", out) == 0
    assert sorted(told(out, "train") + told(out, "val")) == sorted(filter(None, NULLS))
    assert Manifest.load(out).cleaning == {"null_rows": 2, "empty_documents": 1}
    assert "null rows 2" in capsys.readouterr().err


def test_rows_in_utf_16_have_the_right_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "one"}'.encode("utf-16"))
    assert "UTF-16: convert it with `iconv -f UTF-16" in str(inspect(tmp_path / "a.jsonl", "a.jsonl", ReadOptions()))


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    import os

    folder = os.fsencode(tmp_path) + b"/B\xfccher"
    os.mkdir(folder)
    for name in (b"caf\xe9.txt", b"plain.txt"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(b"Some text of " + name.split(b".")[0][:3])
    out = tmp_path / "out"
    assert run("--input", os.fsdecode(folder), "--tokenizer", "char", "--val-fraction", 0.5, "--out", out) == 0
    assert sorted(told(out, "train") + told(out, "val")) == ["Some text of caf", "Some text of pla"]
    assert Manifest.load(out).source.name == "B\ufffdcher"
    assert '"caf\ufffd.txt"' in (out / "documents.json").read_text(encoding="utf-8")


def test_an_input_given_twice_is_both(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"The text of {name}.", encoding="utf-8")
    out = tmp_path / "out"
    a, b, c = (tmp_path / f"{name}.txt" for name in "abc")
    assert run("--input", a, b, "--tokenizer", "char", f"--input={c}", "--out", out) == 0
    assert sorted(told(out, "train") + told(out, "val")) == [f"The text of {name}." for name in "abc"]


def test_a_damaged_archive_that_was_named_stops_everything_unless_told_to_leave_it_out(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK\x03\x04 and no more")
    given = ("--input", texts, broken, "--tokenizer", "char", "--out", tmp_path / "out")
    assert run(*given) == 1
    assert "broken.zip: a damaged or incomplete archive" in (error := capsys.readouterr().err)
    assert "or leave it out with --skip-bad-files" in error
    assert run(*given, "--skip-bad-files") == 0
    assert "1 skipped: broken.zip (damaged)" in capsys.readouterr().err
