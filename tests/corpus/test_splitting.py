"""splitting.py: what is held out is a share of the text, not of the documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corpus import encoding
from corpus.encoding import validation_split
from corpus.finder import Corpus
from storage.catalogue import Catalogue
from storage.shards import Manifest
from support.helpers import nonsense
from support.samples import run, tokens, told


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
