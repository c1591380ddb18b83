"""splitting.py: what is held out is a share of the text, not of the documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corpus import encoding, preparation
from corpus.encoding import validation_split
from corpus.finder import Corpus
from storage.catalogue import Catalogue
from storage.shards import Manifest
from support.helpers import nonsense
from support.samples import paragraphs, run, tokens, told, wrapped


def prepared(tmp_path: Path, sizes: list[int], *flags: str) -> tuple[list[str], list[str], float]:
    """Training and validation documents, and the share of the bytes that validate."""
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    for number, size in enumerate(sizes):
        (texts / f"Author{number}_Title_1850.txt").write_text(nonsense(size, seed=number), encoding="utf-8")
    assert run("--input", texts, "--tokenizer", "bpe", "--vocab-size", "400", *flags, "--out", out) == 0
    splits = Manifest.load(out).splits
    train, val = told(out, "train"), told(out, "val")
    assert (splits.train.documents, splits.val.documents) == (len(train), len(val))
    catalogue = Catalogue.load(out)
    assert catalogue and (catalogue.count("train"), catalogue.count("val")) == (len(train), len(val))
    return train, val, splits.val.bytes / (splits.train.bytes + splits.val.bytes)


@pytest.mark.parametrize("chunk", [1 << 20, 4096])
@pytest.mark.parametrize("sizes", [[300_000, 60_000], [60_000, 300_000], [50_000] * 5, [900, 90_000, 80_000]], ids=str)
def test_of_a_few_books_the_end_of_the_largest_is_held_out(
    sizes: list[int], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("corpus.cleaning.CHUNK_BYTES", chunk)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 4 * chunk)
    train, val, share = prepared(tmp_path, sizes)
    assert 0.08 < share < 0.12 and len(val) == 1 and len(train) == len(sizes)
    largest = sizes.index(max(sizes))
    assert train[largest] + val[0] == nonsense(sizes[largest], seed=largest)
    assert f"of Author{largest}_Title_1850.txt" in capsys.readouterr().err
    catalogue = Catalogue.load(tmp_path / "out")
    assert catalogue and catalogue.name("val", 0) == f"Author{largest}_Title_1850.txt"


def test_of_unequal_books_at_most_the_share_is_held_out(tmp_path: Path) -> None:
    train, val, share = prepared(tmp_path, [200_000] + [6_000 + 500 * number for number in range(19)])
    assert 0.04 < share <= 0.105 and len(train) + len(val) == 20
    assert all(text in {nonsense(6_000 + 500 * n, seed=n + 1) for n in range(19)} for text in val)


def test_short_texts_are_not_all_that_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class File:
        name, documents, split = "x", 20, ""

    for first in range(20):  # wherever the four novels are among sixteen short texts
        sizes = np.full(20, 1000.0)
        sizes[(first + 5 * np.arange(4)) % 20] = 500_000.0
        monkeypatch.setattr(Corpus, "sizes", lambda corpus, sizes=sizes: sizes)
        assert not validation_split(Corpus("x", [File()]), 0.1).any()  # type: ignore[list-item]


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25])
def test_wherever_the_largest_book_is(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class File:
        name, documents, split = "x", 40, ""

    for largest in range(40):
        sizes = np.full(40, 10_000.0)
        sizes[largest] = 400_000.0
        monkeypatch.setattr(Corpus, "sizes", lambda corpus, sizes=sizes: sizes)
        chosen = validation_split(Corpus("x", [File()]), fraction)  # type: ignore[list-item]
        held = sizes[chosen].sum() / sizes.sum()
        assert 0.02 < held <= max(1.05 * fraction, 0.1) and not chosen[largest]


def test_both_parts_of_a_split_book_begin_with_its_style(tmp_path: Path) -> None:
    prepared(tmp_path, [90_000, 40_000], "--control", "author")
    styles = Manifest.load(tmp_path / "out").tokenizer.styles
    assert tokens(tmp_path / "out", "val")[0] == tokens(tmp_path / "out", "train")[0] == styles["author0"]


def test_parts_of_a_book_that_is_split_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(nonsense(60_000, seed=number), encoding="utf-8")
    assert run("--input", tmp_path, "--tokenizer", "gpt2", "--part", "1/2", "--out", tmp_path / "out") == 2
    assert "split by position" in capsys.readouterr().err


@pytest.mark.parametrize("most", [5_000, 30_000, 59_000])
def test_the_beginning_of_one_huge_text_has_the_tokens_of_the_whole(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrapped prose with accents, italics and a licence, cut where a paragraph ends."""
    monkeypatch.setattr("corpus.cleaning.CHUNK_BYTES", 4096)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 8192)
    text = wrapped(paragraphs(300, seed=3, extra=("_naïve_", "“café”", "——", "don't")), "\n\n")
    assert len(text.encode()) > 60_000
    book = tmp_path / "book.txt"
    book.write_text(
        f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n{text}\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\n"
    )
    arguments = ("--input", book, "--tokenizer", "gpt2", "--val-fraction", "0.1", "--out")
    assert run(*arguments, tmp_path / "whole") == 0 and "more than the" not in capsys.readouterr().err
    assert run(*arguments, tmp_path / "part", "--max-bytes", most) == 0
    assert "of the longest the beginning is read" in capsys.readouterr().err
    whole, part = tokens(tmp_path / "whole", "train"), tokens(tmp_path / "part", "train")
    assert 800 < len(part) < len(whole) and (part[:-2] == whole[: len(part) - 2]).all()  # which may end within a word
    whole_text, part_text = ("".join(told(out, "train") + told(out, "val")) for out in (tmp_path / "whole", tmp_path / "part"))  # fmt: skip
    assert whole_text.startswith(part_text)
    splits = Manifest.load(tmp_path / "part").splits
    assert max(1, most - 8192) < splits.train.bytes + splits.val.bytes <= max(most, 2 * 4096 + 1000)


def test_of_unequal_texts_the_longest_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("corpus.cleaning.CHUNK_BYTES", 4096)
    train, val, _ = prepared(tmp_path, [9_000, 200_000, 8_000, 100_000], "--max-bytes", "77000")
    assert "of the longest the beginning is read" in capsys.readouterr().err
    assert len(train) + len(val) == 5  # the end of one is held out
    by_length = sorted(len(text) for text in train)
    assert by_length[:2] == [8_000, 9_000] and 20_000 < by_length[2] and by_length[3] <= 30_000
    assert sum(map(len, train + val)) <= 77_000


def test_of_many_texts_every_so_many_th_is_read_and_enough_is_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val, _ = prepared(tmp_path, [9_000] * 12, "--max-bytes", "40000")
    assert "one document in 3 is read" in capsys.readouterr().err
    assert sorted(train + val) == sorted(nonsense(9_000, seed=number) for number in (0, 1, 4, 7))  # by their names
    arguments = ("--input", tmp_path / "texts", "--tokenizer", "bpe", "--vocab-size", "400", "--out", tmp_path / "out")
    for most, kept in ((40_000, True), (200_000, False), (300_000, True), (0, True), (40_000, True)):
        assert run(*arguments, "--max-bytes", most) == 0  # all of the texts are more than was asked for
        assert ("already prepared" in capsys.readouterr().err) == kept


def test_a_vocabulary_is_learned_from_what_is_read_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(100))
    monkeypatch.setattr(preparation.time, "monotonic", lambda: next(now))
    assert list(preparation._in_time(["one", "two", "three"], 0.0)) == ["one", "two", "three"]
    assert not capsys.readouterr().err
    assert list(preparation._in_time(iter(["one", "two", "three"]), 1.5)) == ["one", "two"]
    assert "its time is over" in capsys.readouterr().err


def test_a_short_time_takes_text_for_a_vocabulary_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Plan:
        def training_texts(self, most: float) -> list[str]:
            asked.append(most)
            return ["so much depends upon a red wheel barrow "]

    class Saved:
        def save(self, folder: Path) -> None: ...

    monkeypatch.setattr(preparation, "train_bpe", lambda texts, size: [*texts] and Saved())
    for seconds in (0.0, 10.0, 1e6):
        preparation.learn_vocabulary(Plan(), 300, Path(), seconds)
    assert asked == [preparation.VOCABULARY_BYTES, 10 * preparation.SLOWEST, preparation.VOCABULARY_BYTES]
