"""A model beside mere counting: its loss, that of an n-gram model of the same training text, and that of both together.

>>> sums = YardstickSums(); sums.add(model_probabilities, counted_probabilities)
>>> yardstick_line(sums.figures(size=1000))
'counting alone: 1.72; this model: 1.64; together: 1.55 bits a byte (counting's share 20%)'
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHARES = np.linspace(0.0, 1.0, 41)  # of counting in the mixtures that are tried: from the model alone to counting alone
Counted = Callable[[np.ndarray], np.ndarray]
"""Ids [..., L] -> the counted probability of each but the first after those before it, [..., L - 1]."""


@dataclass
class YardstickSums:
    """Sums over scored tokens of the loss of each mixture in SHARES."""

    tokens: int = 0
    nats: np.ndarray = field(default_factory=lambda: np.zeros(len(SHARES)))

    def add(self, model: np.ndarray, counted: np.ndarray) -> None:
        """Add tokens, of which the model and counting have given the probabilities `model` and `counted`, each [n]."""
        mixed = model[:, None] + SHARES * (counted - model)[:, None]  # [n, shares]
        self.tokens += len(model)
        self.nats -= np.log(np.maximum(mixed, 1e-300)).sum(axis=0)

    def __iadd__(self, other: YardstickSums) -> YardstickSums:
        self.tokens += other.tokens
        self.nats = self.nats + other.nats
        return self

    def figures(self, size: float) -> dict[str, float]:
        """Bits per byte of the three, and counting's share in the best mixture; size: UTF-8 bytes of the tokens.

        The share is chosen on the same tokens. It is one number, so it flatters the mixture by next to nothing.
        """
        best = int(self.nats.argmin())
        bits = self.nats / (math.log(2) * max(size, 1e-9))
        return {
            "counted": float(bits[-1]),
            "model": float(bits[0]),
            "together": float(bits[best]),
            "share": float(SHARES[best]),
        }


def yardstick_line(figures: dict[str, Any]) -> str:
    """The three figures as a sentence."""
    return (
        f"counting alone: {figures['counted']:.3f}; this model: {figures['model']:.3f}; together: {figures['together']:.3f} "
        f"bits a byte (counting's share {figures['share']:.0%})"
    )
