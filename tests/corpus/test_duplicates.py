"""duplicates.py: the same book under several names is found, other books are not, and no book is on both sides of the split."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from corpus.duplicates import near_duplicates, sketch, sketches
from corpus.encoding import validation_split
from corpus.finder import Corpus
from storage.catalogue import Catalogue
from support import shelf
from support.samples import NEW_FOOTER, NEW_HEADER, run, wrapped


def novel(seed: int, words: int = 9000) -> list[str]:
    """Paragraphs of made-up words, many of them shared by all novels."""
    draw = random.Random(seed)
    stock = ["".join(random.Random(n).choices("abcdefghijklmnoprstuvw", k=3 + n % 7)) for n in range(4000)]
    made = draw.choices(stock, k=words)
    return [" ".join(made[at : at + 60]).capitalize() + "." for at in range(0, words, 60)]


def edited(made: list[str], share: float) -> list[str]:
    draw = random.Random(5)
    return [text[::-1] if draw.random() < share else text for text in made]


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        ("\n\n".join(novel(1)), True),
        (wrapped(novel(1), "\n\n", 65), True),
        ("\n\n".join(novel(1)).upper(), True),
        ("A new preface.\n\n" + "\n\n".join(edited(novel(1), 0.1)), True),
        ("\n\n".join(novel(1)[:120]), True),
        ("\n\n".join(edited(novel(1), 0.8)), False),
        ("\n\n".join(novel(2)), False),
        ("\n\n".join(novel(2) + novel(1)[:30]), False),
        ("short", False),
    ],
    ids=["same", "wrapped", "capitals", "edited", "most of it", "another text", "another", "with a quotation", "short"],
)
def test_what_is_nearly_the_same(other: str, alike: bool) -> None:
    texts = ["\n\n".join(novel(7)), "\n\n".join(novel(1)), other]
    assert near_duplicates([sketch(text.encode()) for text in texts]) == ([[1, 2]] if alike else [])


def test_a_book_under_several_names_is_named_and_on_one_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        made = novel(number, 3000)
        (texts / f"{number}.txt").write_text("\n\n".join(made), encoding="utf-8")
        if number < 6:
            (texts / f"copy{number}.txt").write_text(NEW_HEADER + wrapped(made, "\n\n") + NEW_FOOTER, encoding="utf-8")
            body = "".join(f"<p>{text}</p>" for text in made)
            (texts / f"book{number}.epub").write_bytes(shelf.epub({"c1": body}))
    out = tmp_path / "out"
    assert run("--input", texts, "--tokenizer", "char", "--val-fraction", 0.3, "--out", out) == 0
    shown = capsys.readouterr().err
    sides = Catalogue.load(out)
    assert sides is not None and sides.validating.sum() >= 5
    of = dict(zip((name for name, _ in sides.files), sides.validating.tolist(), strict=True))
    for number in range(6):
        assert (
            f"nearly the same text, kept on one side of the split: {number}.txt, book{number}.epub, copy{number}.txt"
            in shown
        )
        assert of[f"{number}.txt"] == of[f"copy{number}.txt"] == of[f"book{number}.epub"]
    assert shown.count("nearly the same") == 6


def test_the_split_parts_no_group_and_is_never_empty() -> None:
    class File:
        name, documents, split = "x", 20, ""

        def chunks(self, first: int) -> tuple[()]:
            return ()

    corpus = Corpus("x", [File()])  # type: ignore[list-item]
    for size in (1, 2, 7, 19):
        group = list(range(0, size))
        chosen = validation_split(corpus, 0.1, None, [group])
        assert 0 < chosen.sum() < 20 and len(np.unique(chosen[group])) == 1
    assert (
        0 < validation_split(corpus, 0.1, None, [list(range(20))]).sum() < 20
    )  # all are one book: parted all the same


def rows_of(folder: Path, texts: list[str], kind: str) -> Path:
    """A file of this kind with a row a text."""
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=5)
    elif kind == "json":
        path.write_text(json.dumps(texts), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json"])
@pytest.mark.parametrize("words", [240, 3000])
def test_rows_that_are_nearly_the_same_are_on_one_side(
    kind: str, words: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corpus.encoding.BATCH_BYTES", 1 << 14)
    made = [novel(number, words) for number in range(12)]
    texts = ["\n\n".join(paragraphs) for paragraphs in made]
    texts += [wrapped(paragraphs, "\n\n", 65) + "\n\nTHE END" for paragraphs in made[:6]]
    texts += ["short", "short", ""]
    rows_of(tmp_path, texts, kind)
    (tmp_path / "book.txt").write_text("\n\n".join(made[11]), encoding="utf-8")
    flags = ("--tokenizer", "char", "--val-fraction", 0.3, "--workers", 2)
    assert run("--input", tmp_path, *flags, "--out", tmp_path / "out") == 0
    shown, name = capsys.readouterr().err, f"rows.{kind}"
    sides = Catalogue.load(tmp_path / "out")
    assert sides is not None and sides.files == [("book.txt", 1), (name, len(texts))]
    validating = sides.validating.tolist()
    assert 3 <= sum(validating) <= 12
    groups = [[number, number + 12] for number in range(6)]
    assert all(validating[1 + one] == validating[1 + two] for one, two in groups)
    assert validating[0] == validating[1 + 11]
    for one, two in groups:
        assert (
            f"nearly the same text, kept on one side of the split: {name}, row {one + 1}, {name}, row {two + 1}\n"
            in shown
        )
    assert f"book.txt, {name}, row 12\n" in shown and shown.count("nearly the same") == 7


def test_copies_of_one_text_are_one_group_however_many_they_are() -> None:
    texts = [("\n\n".join(novel(number % 3))).encode() for number in range(300)]
    assert near_duplicates(sketches(texts)) == [list(range(first, 300, 3)) for first in range(3)]


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5])
def test_a_text_among_others_has_the_sketch_it_has_alone(cut: int) -> None:
    texts = [("x" * cut + "\n\n".join(novel(number, 400))).encode() for number in range(5)]
    texts[2:2] = [b"", b"short", b"  "]
    assert sketches(texts) == [sketch(text) for text in texts]
    assert [len(found) // 4 for found in sketches(texts, 20)] == [20, 20, 0, 0, 0, 20, 20, 20]
    assert sketches([b"", b"short"]) == [b"", b""] and sketches([]) == []


def test_rows_of_one_pattern_are_split_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = "\n\n".join(novel(1, 600))
    others = [f"number {number}" for number in range(4)]
    rows_of(tmp_path, [f"{pattern}\n\nNumber {number}." for number in range(56)] + others, "jsonl")
    assert run("--input", tmp_path, "--tokenizer", "char", "--out", tmp_path / "out") == 0
    assert "too many to be kept on one side of the split: rows.jsonl, row 1, " in capsys.readouterr().err
    sides = Catalogue.load(tmp_path / "out")
    assert sides is not None and sides.validating.sum() == 6


@pytest.mark.parametrize(("name", "most"), [("MOST_ROWS", 19), ("MOST_BYTES", 1000)])
def test_rows_that_are_too_many_are_not_compared_which_is_said(
    name: str, most: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"corpus.splitting.{name}", most)
    monkeypatch.setattr("corpus.splitting.row_sketches", None)
    rows_of(tmp_path, ["\n\n".join(novel(number % 10, 400)) for number in range(20)], "jsonl")
    assert run("--input", tmp_path, "--tokenizer", "char", "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().err
    assert "20 rows, 0 MB: too many to look for rows that are nearly the same" in shown


def test_rows_whose_source_tells_the_splits_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.splitting.row_sketches", None)
    for part in ("train", "validation"):
        texts = ["\n\n".join(novel(number, 400)) for number in range(4)]
        rows_of(tmp_path, texts, "parquet").rename(tmp_path / f"{part}-00000-of-00001.parquet")
    assert run("--input", tmp_path, "--tokenizer", "char", "--out", tmp_path / "out") == 0
