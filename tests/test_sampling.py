"""Sampling against transformers, stop strings, seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import sampling
from config import GenerationParams
from sampling import LogitsError, StopStringMatcher, TokenHistory, candidates, filter_logits, sample, sample_seed

OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
MIXED = [
    {},
    {"temperature": 0.7, "top_k": 0},
    {"top_k": 3, "top_p": 0.5},
    {"top_k": 0, "top_p": 0.3, "min_p": 0.05},
    {"top_k": 100, "top_p": 1.0, "min_p": 0.2},
    {"top_k": 7, "repetition_penalty": 0.6},
    {"temperature": 2.0, "top_k": 0, "top_p": 0.99, "repetition_penalty": 3.0},
    {"temperature": 0.1, "top_k": 1},
]


def params(**values: Any) -> GenerationParams:
    return GenerationParams(**{**OPEN, **values})


def theirs(logits: torch.Tensor, wanted: GenerationParams, seen: torch.Tensor) -> torch.Tensor:
    """The same settings through transformers' own processors."""
    from transformers.generation import logits_process as hf

    chain: list[Any] = [
        hf.RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty),
        hf.TemperatureLogitsWarper(wanted.temperature),
    ]
    if wanted.top_k:
        chain.append(hf.TopKLogitsWarper(wanted.top_k))
    if wanted.top_p < 1:
        chain.append(hf.TopPLogitsWarper(wanted.top_p))
    if wanted.min_p:
        chain.append(hf.MinPLogitsWarper(wanted.min_p))
    scores = logits[None]
    for processor in chain:
        scores = processor(seen[None], scores)
    return scores[0]


@pytest.mark.parametrize("values", MIXED, ids=str)
@pytest.mark.parametrize("size", [65, 3000])
@pytest.mark.parametrize("ties", [False, True])
def test_the_distribution_is_that_of_transformers(values: dict[str, Any], size: int, ties: bool) -> None:
    wanted = GenerationParams(**values)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(size, generator=generator) * 3
        logits = logits.round() if ties else logits
        seen = torch.randint(size, (20,), generator=generator).unique()
        expected, found = theirs(logits, wanted, seen), filter_logits(logits, wanted, TokenHistory(seen.tolist()))
        if not ties:
            assert torch.equal(found, expected)
        assert torch.equal(found.sort().values, expected.sort().values)
        least = expected[expected > -float("inf")].min()  # which of equal logits top-p drops, torch.sort leaves open
        assert torch.equal(found.masked_fill(found <= least, 0), expected.masked_fill(expected <= least, 0))


def test_temperature_0_is_greedy_and_open_filters_change_nothing() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    best = int(logits.argmax())
    for wanted in (params(temperature=0), params(temperature=1e-9), params(top_k=1), params(temperature=2.0, top_k=1)):
        assert {sample(logits, wanted, generator) for _ in range(5)} == {best}
    assert torch.equal(filter_logits(logits, params()), logits)
    small = logits[:50]
    assert torch.equal(filter_logits(small, params(top_k=50)), small)
    assert torch.equal(filter_logits(small, params(top_k=100)), small)
    assert float(logits[best]) == float(logits.max())  # the caller's logits are left alone
    before = logits.clone()
    sample(logits, params(repetition_penalty=5.0), generator, TokenHistory([best]))
    assert torch.equal(logits, before)


def test_a_greedy_text_minds_the_penalty() -> None:
    logits = torch.tensor([2.0, 1.9, 0.0])
    assert sample(logits, params(temperature=0), torch.Generator()) == 0
    assert sample(logits, params(temperature=0, repetition_penalty=1.5), torch.Generator(), TokenHistory([0])) == 1


@pytest.mark.parametrize("values", [*MIXED, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_named(values: dict[str, Any], fault: float) -> None:
    logits = torch.randn(300)
    logits[17] = fault
    with pytest.raises(LogitsError, match="damaged"):
        sample(logits, GenerationParams(**values), torch.Generator())
    with pytest.raises(LogitsError):
        sample(torch.full((300,), float("-inf")), GenerationParams(**values), torch.Generator())


@pytest.mark.parametrize("values", [{}, {"top_k": 4}, {"top_p": 0.8}])
def test_draws_follow_the_distribution(values: dict[str, Any]) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 1.5])
    wanted = params(**values)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.bincount(torch.tensor([sample(logits, wanted, generator) for _ in range(4000)]), minlength=6) / 4000
    assert torch.allclose(drawn, filter_logits(logits, wanted).softmax(-1), atol=0.03)


@pytest.mark.parametrize("size", [50_257, 8 * 64 * 4, 8 * 64 * 4 + 63, 8 * 64 * 4 - 1, 100])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_are_found_among_the_largest_blocks(size: int, ties: bool) -> None:
    for seed in range(10):
        logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
        logits = logits.round() if ties else logits
        if seed == 0:
            logits[-5:] = 100.0 + torch.arange(5)  # in the rest that is no whole block
        if seed == 1:
            logits[64:72] = 50.0 + torch.arange(8)  # all in one block
        values, ids = map(torch.from_numpy, sampling.top_k(logits.numpy(), 8))
        assert torch.equal(values, logits.topk(8).values)
        assert torch.equal(logits[ids], values) and len(ids.unique()) == 8


def test_candidates_with_top_k_are_few() -> None:
    values, ids = candidates(torch.randn(5000), params(top_k=30, top_p=0.9))
    assert len(values) == len(ids) <= 30


def test_likelihoods_are_of_the_unfiltered_distribution() -> None:
    logits = torch.randn(100)
    logp = logits.log_softmax(-1)
    value, top = sampling.likelihoods(logits, 42, 3)
    assert value == pytest.approx(float(logp[42]), abs=1e-5)
    assert [id for id, _ in top] == logp.topk(3).indices.tolist()
    assert [other for _, other in top] == pytest.approx(logp.topk(3).values.tolist(), abs=1e-5)
    assert sampling.likelihoods(logits, 42, 0)[1] == []


def test_samples_have_seeds_that_share_nothing() -> None:
    seeds = {sample_seed(seed, index) for seed in range(100) for index in range(100)}
    assert len(seeds) == 10_000 and all(0 <= seed < 2**64 for seed in seeds)
    assert sample_seed(7, 0) == 7191089600892374487  # fixed for ever: published seeds must give their texts again


def cut(text: str, stops: Sequence[str]) -> str:
    """What a stopper must let through: the text before the stop string that is complete first (then the longest)."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return text


@pytest.mark.parametrize("seed", range(200))
def test_stop_strings_never_leak(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("aab") for _ in range(30))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(2, 6))) for _ in range(rng.randint(1, 3))]
    stopper, shown, at, stopped = StopStringMatcher(stops), "", 0, False
    while at < len(text) and not stopped:
        size = rng.randint(1, 4)
        piece, stopped = stopper.feed(text[at : at + size])
        shown, at = shown + piece, at + size
        assert cut(text, stops).startswith(shown)
    if not stopped:
        shown += stopper.rest()
    assert shown == cut(text, stops)


def test_a_stop_string_that_overlaps_its_own_beginning() -> None:
    stopper = StopStringMatcher(["aab"])
    assert [stopper.feed(letter) for letter in "aaab"] == [("", False), ("", False), ("a", False), ("", True)]


def test_earlier_names_answer_with_the_name_here() -> None:
    for name, here in (("top_p", "keep_top_p"), ("repetition_penalty", "penalise_repetition")):
        with pytest.raises(ImportError, match=f"from sampling import {here}`"):
            exec(f"from sampling import {name}")
        exec(f"from sampling import {here}")
    import sampling

    assert not hasattr(sampling, "no_such_name")
