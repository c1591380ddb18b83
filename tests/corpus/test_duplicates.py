"""duplicates.py: the same book under several names is found, other books are not, and no book is on both sides of the split."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from corpus.duplicates import near_duplicates, sketch
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
