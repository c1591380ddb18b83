"""Counted n-grams: the smoothed distribution against a slow textbook one, and counting in parts."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from config import ConfigError
from support.ngrams import VOCAB, some_ids, stream_of
from training.ngram import NgramModel, id_bits, parts_of, raw_counts


class Textbook:
    """Interpolated modified Kneser-Ney as Chen & Goodman 1999 define it, in exact fractions and with loops."""

    def __init__(self, ids: list[int], order: int):
        grams = [tuple(ids[at : at + order]) for at in range(len(ids) - order + 1)]
        self.counts = {order: Counter(grams)}
        for n in range(order - 1, 0, -1):
            self.counts[n] = Counter(gram[1:] for gram in self.counts[n + 1])
        self.order = order
        self.off = {n: self.discounts(counts) for n, counts in self.counts.items()}

    @staticmethod
    def discounts(counts: Counter[tuple[int, ...]]) -> list[Fraction]:
        n = [sum(1 for value in counts.values() if value == k) for k in range(5)]
        rough = [Fraction(0), Fraction(1, 2), Fraction(1), Fraction(3, 2)]
        if not all(n[1:]):
            return rough
        y = Fraction(n[1], n[1] + 2 * n[2])
        found = [Fraction(0), *(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))]
        return found if all(0 <= one <= k for k, one in enumerate(found)) else rough

    def probability(self, word: int, context: tuple[int, ...]) -> Fraction:
        n = len(context) + 1
        after = {gram: c for gram, c in self.counts[n].items() if gram[:-1] == context}
        below = self.probability(word, context[1:]) if context else Fraction(1, VOCAB)
        total = sum(after.values())
        if not total:
            return below
        off = self.off[n]
        count = after.get((*context, word), 0)
        weight = sum(off[min(c, 3)] for c in after.values()) / total
        return (count - off[min(count, 3)]) / total + weight * below


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("length", [7, 60, 600])
def test_counted_probabilities_are_those_of_the_textbook(order: int, length: int, tmp_path: Path) -> None:
    ids = some_ids(length)
    model, book = NgramModel.counted(stream_of(tmp_path, ids), VOCAB, order), Textbook(ids, order)
    assert length != 600 or book.off[order] != [0, Fraction(1, 2), 1, Fraction(3, 2)]  # estimated, not the fallback
    text = [3, 1, 4, 10, 0, 0, 1, 2, 3, 1, 9, 7, 4, 0]
    found = model.probabilities(np.array(text))
    for at in range(1, len(text)):
        context = tuple(text[max(0, at - order + 1) : at])
        expected = [float(book.probability(word, context)) for word in range(VOCAB)]
        assert found[at - 1] == pytest.approx(expected[text[at]], abs=1e-12)
        assert model.distribution(np.array(text[:at])) == pytest.approx(np.array(expected), abs=1e-12)
        assert sum(expected) == pytest.approx(1.0, abs=1e-12)


def test_a_lower_order_has_counts_of_its_own(tmp_path: Path) -> None:
    """The bigrams of a 3-gram model count ids before them; those of `lower` occurrences, but for the text's first."""
    ids = some_ids()
    lower = NgramModel.counted(stream_of(tmp_path, ids), VOCAB, 3).lower(2)
    direct = NgramModel.counted(stream_of(tmp_path, ids[1:]), VOCAB, 2)
    for id_ in range(VOCAB):
        assert lower.distribution(np.array([id_])) == pytest.approx(direct.distribution(np.array([id_])), abs=1e-12)


@pytest.mark.parametrize("part", [7, 50, 1000])
def test_counting_in_parts_counts_the_same(part: int, tmp_path: Path) -> None:
    stream = stream_of(tmp_path, some_ids(), shards=4)
    keys, counts = raw_counts(stream, VOCAB, 3)
    again = raw_counts(stream, VOCAB, 3, part=part)
    assert np.array_equal(keys, again[0]) and np.array_equal(counts, again[1])
    assert counts.sum() == len(stream) - 2


def test_of_a_long_text_an_evenly_spread_part_is_counted() -> None:
    ranges = list(parts_of(1000, 3, part=10, most=50))
    assert ranges == [(0, 12), (200, 212), (400, 412), (600, 612), (800, 812)]
    assert list(parts_of(25, 3, part=10, most=50)) == [(0, 12), (10, 22), (20, 25)]


def test_n_grams_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"5-grams of 8,192 ids.*at most 4-grams"):
        raw_counts(stream_of(tmp_path, some_ids()), 8192, 5)
    assert [id_bits(vocab) for vocab in (2, 256, 257, 8192)] == [1, 8, 9, 13]


def test_a_text_shorter_than_an_n_gram_leaves_the_lower_orders(tmp_path: Path) -> None:
    model = NgramModel.counted(stream_of(tmp_path, [4, 2]), VOCAB, 3)
    assert model.distribution(np.array([4, 2])) == pytest.approx(np.full(VOCAB, 1 / VOCAB))
    assert model.probabilities(np.array([4, 2, 5])) == pytest.approx([1 / VOCAB] * 2)
