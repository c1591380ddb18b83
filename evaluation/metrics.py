"""The metrics of `evaluate.py`: sums over scored tokens, and what can be counted on generated texts.

python -c "from evaluation import metrics; print(metrics.distinct(['the cat and the hat'], 1))"
>>> tally = MetricSums(); tally.add(nats, confidence, top1, top5)
>>> tally.figures()["bits_per_byte"], tally.calibration()["error"]
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from sacrebleu import sentence_bleu
from sacrebleu.metrics import BLEU

from evaluation.yardstick import YardstickSums

BINS = 15  # of the reliability table, as in Guo et al. 2017
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass
class MetricSums:
    """Sums over the scored tokens of one or several texts."""

    documents: int = 0
    tokens: int = 0
    nats: float = 0.0
    bytes: int = 0
    """UTF-8 bytes of the scored tokens."""
    words: int = 0
    """Words of the text, cut at white space."""
    top1: int = 0
    """Tokens that were the model's most likely (top-1 hits)."""
    top5: int = 0
    """Tokens among its five most likely (top-5 hits)."""
    bins: np.ndarray = field(default_factory=lambda: np.zeros((BINS, 3)))
    """[BINS, 3] by the probability of the most likely token: tokens, sum of that probability, how often it was right."""
    yardstick: YardstickSums = field(default_factory=YardstickSums)
    """The same tokens scored by counting as well, if there are counts."""

    def add(self, nats: np.ndarray, confidence: np.ndarray, top1: np.ndarray, top5: np.ndarray) -> None:
        """Add scored tokens, each array [n]: the loss, the most likely token's probability, top-1 and top-5 hits."""
        self.tokens += len(nats)
        self.nats += math.fsum(nats.tolist())
        self.top1 += int(top1.sum())
        self.top5 += int(top5.sum())
        number = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        for column, weights in enumerate((None, confidence, top1.astype(np.float64))):
            self.bins[:, column] += np.bincount(number, weights, minlength=BINS)

    def __iadd__(self, other: MetricSums) -> MetricSums:
        for name in ("documents", "tokens", "nats", "bytes", "words", "top1", "top5"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bins = self.bins + other.bins
        self.yardstick += other.yardstick
        return self

    def figures(self) -> dict[str, Any]:
        """The metrics, by name.

        loss: nats a token; perplexity: its exponential. bits_per_byte: nats / (ln 2 · bytes). word_perplexity:
        exp(nats / words), the measure of PG-19 (Rae et al. 2020, "Compressive Transformers", section 4), which
        does not depend on the tokenizer.
        """
        count, words = max(self.tokens, 1), max(self.words, 1)
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "loss": self.nats / count,
            "perplexity": _exp(self.nats / count),
            "bits_per_byte": self.nats / (math.log(2) * max(self.bytes, 1)),
            "word_perplexity": _exp(self.nats / words),
            "top1": self.top1 / count,
            "top5": self.top5 / count,
        }

    def calibration(self) -> dict[str, Any]:
        """Expected calibration error (Guo et al. 2017) and its table, for the most likely token."""
        rows = []
        for number, (count, confidence, right) in enumerate(self.bins.tolist()):
            row: dict[str, Any] = {"from": number / BINS, "to": (number + 1) / BINS, "tokens": int(count)}
            row["confidence"], row["accuracy"] = (confidence / count, right / count) if count else (None, None)
            rows.append(row)
        gaps = np.abs(self.bins[:, 1] - self.bins[:, 2])
        return {"error": float(gaps.sum() / max(self.tokens, 1)), "bins": rows}


def _exp(value: float) -> float | None:
    """exp, or None where it overflows (JSON has no infinity)."""
    return math.exp(value) if value < 700 else None


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return WORD.findall(text.lower())


def ngrams(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[at : at + n]) for at in range(len(items) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams of words among all n-grams of the texts (Li et al. 2016, "distinct-n")."""
    found = list(chain.from_iterable(ngrams(words(text), n) for text in texts))
    return len(set(found)) / len(found) if found else 0.0


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams of words that occur in it before (Welleck et al. 2020, "seq-rep-n")."""
    found = ngrams(words(text), n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU of each text against all others, 0 to 100 (Zhu et al. 2018): higher is more alike. None below two texts."""
    if len(texts) < 2:
        return None
    scores = [sentence_bleu(text, [*texts[:at], *texts[at + 1 :]]).score for at, text in enumerate(texts)]
    return math.fsum(scores) / len(scores)


def bleu(written: Sequence[str], real: Sequence[str]) -> dict[str, Any] | None:
    """sacrebleu's BLEU, 0 to 100, of texts against the real ones, with its signature. None without texts."""
    if not written:
        return None
    metric = BLEU()
    score = metric.corpus_score(list(written), [list(real)])
    return {"score": score.score, "texts": len(written), "signature": str(metric.get_signature())}
