"""The compiled first filters: the same candidates as the filters in NumPy, to the bit, and the logits as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from config import GenerationParams
from inference import compiled
from inference.candidates import largest
from sampling import LogitsError, TokenHistory, candidates, sample

compiled.load_kernels()


@pytest.mark.parametrize("kind", ["plain", "ties", "never drawn", "zeros", "equal"])
@pytest.mark.parametrize("size", [60, 64, 1000])
def test_the_same_candidates_as_the_filters_leave(size: int, kind: str) -> None:
    generator = np.random.default_rng(size)
    decided: list[bool] = []

    def noted(*given: Any) -> bool:
        decided.append(bool(largest(*given)))
        return decided[-1]

    for trial in range(60):
        logits = (generator.standard_normal(size) * 3).astype(np.float32)
        if kind == "ties":
            logits = np.round(logits, trial % 3).astype(np.float32)
        elif kind == "never drawn":
            logits[generator.integers(0, size, size // 2)] = -np.inf
        elif kind == "zeros":
            logits = np.where(logits < 0, logits, np.float32(-0.0 if trial % 2 else 0.0))
            logits[::7] = 0.0
        elif kind == "equal":
            logits[:] = 1.5
        ids = generator.integers(0, size, 30).tolist()
        k, penalty = int(generator.integers(1, 58)), (1.0, 1.2, 0.7)[trial % 3]
        params = GenerationParams(
            top_k=k, repetition_penalty=penalty, penalty_last_n=trial % 4 * 5, temperature=0.7 + trial % 2, top_p=1.0
        )
        before = logits.copy()
        found = candidates(torch.from_numpy(logits), params, TokenHistory(ids, 5, largest=noted))
        assert logits.tobytes() == before.tobytes()
        expected = candidates(torch.from_numpy(logits), params, TokenHistory(ids, 5))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert len(decided) == 60 and (kind != "plain" or all(decided))


def test_the_same_tokens_are_drawn() -> None:
    logits = np.random.default_rng(1).standard_normal(5000).astype(np.float32) * 2
    for params in (
        GenerationParams(),
        GenerationParams(top_k=5, min_p=0.1, xtc_probability=0.5),
        GenerationParams(top_k=0),
    ):
        drawn = []
        for function in (largest, None):
            generator = torch.Generator().manual_seed(3)
            history = TokenHistory(list(range(40)), 40, largest=function)
            drawn.append([sample(logits, params, generator, history) for _ in range(200)])
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 70, 99])
def test_damaged_logits_are_refused(value: float, at: int) -> None:
    logits = np.arange(100, dtype=np.float32)
    logits[at] = value
    with pytest.raises(LogitsError, match="damaged"):
        sample(logits, GenerationParams(top_k=3), torch.Generator(), TokenHistory([1], 1, largest=largest))
