"""Counted n-grams of the training text, smoothed by interpolated modified Kneser-Ney (Chen & Goodman 1999).

>>> model = NgramModel.counted(data.train, vocab=8192, order=3)    # one or two seconds for 60 MB of text
>>> nats = -np.log(model.probabilities(ids))                       # of each id after those before it

An n-gram of ids is packed into one integer, so counting is sorting. The text is read some million tokens at a time, and of a
text longer than MOST_TOKENS an evenly spread part is counted: memory has a bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from config import ConfigError
from dataset import TokenStream

ORDER = 3
PART_TOKENS = 1 << 22  # tokens counted at once
MOST_TOKENS = 1 << 25  # tokens counted in all
FALLBACK = (0.5, 1.0, 1.5)  # discounts where a text is too small to estimate them


def id_bits(vocab: int) -> int:
    """Bits that one id takes in a packed n-gram."""
    return max(1, (vocab - 1).bit_length())


def tallied(keys: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sorted `keys` without repetitions, and how often each occurs (or the sum of its `counts`)."""
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.zeros(0, np.int64)
    if counts is None:
        return keys[first], np.diff(first, append=len(keys))
    return keys[first], np.add.reduceat(counts, first) if len(keys) else counts


def packed(ids: np.ndarray, order: int, bits: int) -> np.ndarray:
    """Every n-gram in `ids` [..., L] as one integer, the newest id in its lowest bits; int64 [..., L - order + 1]."""
    ids = ids.astype(np.int64)
    count = max(0, ids.shape[-1] - order + 1)
    keys = np.zeros((*ids.shape[:-1], count), dtype=np.int64)
    for at in range(order):
        keys = (keys << bits) | ids[..., at : at + count]
    return keys


def parts_of(tokens: int, order: int, part: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the ranges that are counted: all of the text, or evenly spread ones of `most` tokens in all.

    A range reaches order - 1 tokens into the next, so that no n-gram between them is missed.
    """
    number = -(-tokens // part)
    kept = number if tokens <= most else max(1, most // part)
    for at in range(kept):
        start = at * number // kept * part
        yield start, min(tokens, start + part + order - 1)


def raw_counts(
    stream: TokenStream, vocab: int, order: int, part: int = PART_TOKENS, most: int = MOST_TOKENS
) -> tuple[np.ndarray, np.ndarray]:
    """(packed n-grams, ascending; how often each occurs) of the text, both int64.

    Raises ConfigError for an order that does not fit into 63 bits.
    """
    bits = id_bits(vocab)
    if bits * order > 63:
        raise ConfigError([f"{order}-grams of {vocab:,} ids do not fit into 63 bits: count at most {63 // bits}-grams"])
    done: list[tuple[np.ndarray, np.ndarray]] = []
    for start, stop in parts_of(len(stream), order, part, most):
        keys = packed(stream.read(start, stop), order, bits)
        keys.sort()
        done.append(tallied(keys))
        # Tables of like size are merged, as in a merge sort: each n-gram is copied only log(parts) times.
        while len(done) > 1 and len(done[-2][0]) < 2 * len(done[-1][0]):
            done.append(merged(done.pop(), done.pop()))
    while len(done) > 1:
        done.append(merged(done.pop(), done.pop()))
    return done[0] if done else (np.zeros(0, np.int64), np.zeros(0, np.int64))


def merged(*tables: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One table of counts from several."""
    keys, counts = (np.concatenate(columns) for columns in zip(*tables, strict=True))
    order = np.argsort(keys, kind="stable")  # merges sorted runs in linear time
    return tallied(keys[order], counts[order])


def discounts(counts: np.ndarray) -> np.ndarray:
    """[4]: what modified Kneser-Ney takes off a count of 0, 1, 2, and 3 or more."""
    n = [int((counts == value).sum()) for value in range(5)]
    found = list(FALLBACK)
    if all(n[1:]):
        y = n[1] / (n[1] + 2 * n[2])
        estimated = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        if all(0 <= value <= k for k, value in enumerate(estimated, 1)):
            found = estimated
    return np.array([0.0, *found])


@dataclass(frozen=True)
class Level:
    """The n-grams of one order, grouped by context (the ids before the last); K contexts, n entries."""

    keys: np.ndarray
    """Packed n-grams in ascending order, int64 [n]."""
    counts: np.ndarray
    """Of each n-gram: how often it occurs or, below the highest order, after how many ids; int64 [n]."""
    contexts: np.ndarray
    """Packed contexts in ascending order, int64 [K]."""
    starts: np.ndarray
    """First entry of each context, and the end of the last; int64 [K + 1]."""
    totals: np.ndarray
    """Sum of the counts of each context, int64 [K]."""
    held_back: np.ndarray
    """Sum of the discounts of each context, float64 [K]; divided by the total it is the weight of the order below."""
    discounts: np.ndarray
    """What is taken off a count of 0, 1, 2, and 3 or more; float64 [4]."""

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray, bits: int) -> Level:
        """The level of sorted, packed n-grams and their counts."""
        off = discounts(counts)
        contexts, lengths = tallied(keys >> bits)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        totals, held_back = counts, off[np.minimum(counts, 3)]
        if len(keys):
            totals, held_back = np.add.reduceat(totals, starts[:-1]), np.add.reduceat(held_back, starts[:-1])
        return cls(keys, counts, contexts, starts, totals, held_back, off)

    def find(self, table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place in the sorted `table` or 0, whether it is there) of each of `wanted`."""
        if not len(table):
            return np.zeros(wanted.shape, np.int64), np.zeros(wanted.shape, bool)
        place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
        there = table[place] == wanted
        return np.where(there, place, 0), there


@dataclass(frozen=True)
class NgramModel:
    """A distribution over the next id for every context of up to order - 1 ids. `levels[n - 2]` holds the n-grams."""

    vocab: int
    order: int
    unigram: np.ndarray
    """Probability of each id without context, float64 [vocab]; all above 0."""
    levels: tuple[Level, ...]

    @property
    def bits(self) -> int:
        """Bits of an id in a packed n-gram."""
        return id_bits(self.vocab)

    @classmethod
    def counted(cls, stream: TokenStream, vocab: int, order: int = ORDER) -> NgramModel:
        """The model of a text's ids, all below `vocab`."""
        return cls.of_counts(*raw_counts(stream, vocab, order), vocab, order)

    @classmethod
    def of_counts(cls, keys: np.ndarray, counts: np.ndarray, vocab: int, order: int) -> NgramModel:
        """The model of packed n-grams of `order`, ascending, and how often each occurs."""
        bits, levels = id_bits(vocab), []
        for n in range(order, 1, -1):
            levels.append(Level.of(keys, counts, bits))
            # Below the highest order an n-gram counts once for each different id before it.
            shorter = keys & ((1 << bits * (n - 1)) - 1)
            shorter.sort()
            keys, counts = tallied(shorter)
        tally = np.zeros(vocab, dtype=np.int64)
        tally[keys] = counts
        off = discounts(counts)[np.minimum(tally, 3)]
        # The lowest order is interpolated with the uniform distribution: no id is impossible.
        total = max(1, int(tally.sum()))
        unigram = (tally - off) / total + (off.sum() / total if len(keys) else 1.0) / vocab
        return cls(vocab, order, unigram, tuple(reversed(levels)))

    def lower(self, order: int) -> NgramModel:
        """The model of a lower order from the same text, with the counts of its own n-grams at the top."""
        top = self.levels[-1]
        short = top.keys & ((1 << self.bits * order) - 1)
        place = np.argsort(short, kind="stable")
        return self.of_counts(*tallied(short[place], top.counts[place]), self.vocab, order)

    def probabilities(self, ids: np.ndarray, start: int = 1) -> np.ndarray:
        """Probability of each of ids[..., start:] after the ids before it in its row, float64."""
        ids = ids.astype(np.int64)
        found: np.ndarray = self.unigram[ids[..., start:]]
        for n, level in enumerate(self.levels, 2):
            if not len(level.keys):
                break
            first = max(start, n - 1)  # before it, there is no context of n - 1 ids
            keys = packed(ids[..., first - n + 1 :], n, self.bits)
            context, known = level.find(level.contexts, keys >> self.bits)
            entry, seen = level.find(level.keys, keys)
            counts = np.where(seen, level.counts[entry], 0)
            kept = counts - level.discounts[np.minimum(counts, 3)]
            below = found[..., first - start :]
            here = (kept + level.held_back[context] * below) / level.totals[context]
            found[..., first - start :] = np.where(known, here, below)
        return found

    def distribution(self, context: np.ndarray) -> np.ndarray:
        """Probabilities of all ids after `context`, of which the last order - 1 ids count; float64 [vocab]."""
        context = np.asarray(context, dtype=np.int64)[-(self.order - 1) :]
        found = self.unigram.copy()
        for n, level in enumerate(self.levels, 2):
            if len(context) < n - 1:
                break
            place, known = level.find(level.contexts, packed(context[-(n - 1) :], n - 1, self.bits))
            if not known[0]:
                break
            at = int(place[0])
            entries = slice(int(level.starts[at]), int(level.starts[at + 1]))
            counts = level.counts[entries]
            found *= level.held_back[at]
            found[level.keys[entries] & ((1 << self.bits) - 1)] += counts - level.discounts[np.minimum(counts, 3)]
            found /= level.totals[at]
        return found
