"""Encoding with a table of words gives the tokenizer's own ids, on its first text and on later ones."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.word_table import LONGEST, SLOTS, WordTable, word_starts
from tokenizer import BytePairTokenizer, gpt2_tokenizer, train_bpe

WORDS = "the The can I straightforward straightforwardly é naïve ÿ ß × ÷ ª µ ² ½ ł ' '' 's 't 'd 'm 'll 've 're 'S 'l 'v ’ ’s “ ” — … ‘ ‐"
SIGNS = "0 1853 ٣ Ⅷ . , -- !? _ * & £ ¡ 日本語 ไทย слово 🙂 𝒜 \ufeff \ufffd e\u0301 \xad \0 \x1c \x1f \x7f"
BLANKS = ["  ", " " * 20, "\n\n", "\r\n", *" \n\t\x0b\x0c\x85\xa0\u2009\u2028\u202f\u3000"]
PARTS = (*WORDS.split(" "), *SIGNS.split(" "), *BLANKS, "a" * 20)


@pytest.fixture(scope="module")
def tokenizers() -> list[BytePairTokenizer]:
    gpt2 = gpt2_tokenizer()
    small = train_bpe(
        ["the cat can't sit; they'll naïvely say “no” — the end.\n\nThe 12\xa0\n\ncats… \u2009 \n" * 20], 400
    )
    assert isinstance(gpt2, BytePairTokenizer) and isinstance(small, BytePairTokenizer)
    wide = BytePairTokenizer(small.vocab, small.merges, small.eot, {"<|far|>": 70_000})  # ids of 32 bits
    return [gpt2, small, wide]


@pytest.fixture(scope="module")
def tables(tokenizers: list[BytePairTokenizer]) -> list[WordTable]:
    return [WordTable(tokenizer) for tokenizer in tokenizers]


def check(tokenizers: list[BytePairTokenizer], tables: list[WordTable], text: str) -> None:
    for tokenizer, table in zip(tokenizers, tables, strict=True):
        for _ in range(2):  # the second time the words are in the table
            found = table.encode(text)
            assert found.dtype == tokenizer.dtype
            assert found.tolist() == tokenizer.encode(text), repr(text)


def test_every_pair_of_parts(tokenizers: list[BytePairTokenizer], tables: list[WordTable]) -> None:
    for one, two in itertools.product(PARTS, repeat=2):
        check(tokenizers[:2], tables[:2], f"{one}{two}")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=30))
def test_random_parts(tokenizers: list[BytePairTokenizer], tables: list[WordTable], parts: list[str]) -> None:
    check(tokenizers, tables, "".join(parts))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text(tokenizers: list[BytePairTokenizer], tables: list[WordTable], text: str) -> None:
    check(tokenizers, tables, text)


def test_half_a_surrogate_pair(tokenizers: list[BytePairTokenizer], tables: list[WordTable]) -> None:
    check(tokenizers, tables, "one \ud800 two \U0001f642")


def test_a_table_that_is_full(tokenizers: list[BytePairTokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.word_table.SLOTS", 256)
    monkeypatch.setattr("corpus.word_table.REMEMBERED", 50)
    draw = random.Random(5)
    table = WordTable(tokenizers[0])
    for _ in range(4):
        words = ["".join(draw.choices("abcdefgh", k=draw.randrange(1, 2 * LONGEST))) for _ in range(300)]
        check(tokenizers[:1], [table], " ".join(words))
    assert len(table._rows) == 256 < SLOTS and (table._rows[:, 3] > 0).all()


def test_where_words_begin() -> None:
    text = "Don't  say “no”, he'll\n\n go"
    starts = word_starts(np.frombuffer(text.encode(), dtype=np.uint8)).tolist()
    words = [text.encode()[begin:end].decode() for begin, end in itertools.pairwise([*starts, len(text.encode())])]
    assert words == ["Don", "'t", " ", " say", " “", "no", "”,", " he", "'ll", "\n\n", " go"]
