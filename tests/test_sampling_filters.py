"""Each sampling filter against a plain reference, written from its definition, on random logits."""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cli import parse_flags
from config import SETTINGS, GenerationParams, build, to_toml
from sampling import FILTERS, TokenHistory, breaker_ids, candidates, filter_logits, sample
from tokenizer import char_tokenizer, train_bpe

OFF = {name: setting.off for name, setting in SETTINGS.items() if setting.off is not None}
Table = dict[int, float]  # logit of each id that may be drawn


def random_logits(seed: int, size: int = 60, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def ours(logits: torch.Tensor, history: TokenHistory | None = None, seed: int = 0, **values: Any) -> Table:
    """What is left of `logits` with all other filters off."""
    wanted = GenerationParams(**OFF | values)
    left, ids = candidates(logits, wanted, history or TokenHistory([]), torch.Generator().manual_seed(seed))
    return dict(zip(ids.tolist(), left.tolist(), strict=True))


def probabilities(logits: torch.Tensor) -> list[float]:
    powers = [math.exp(value) for value in logits.tolist()]
    return [power / sum(powers) for power in powers]


def same(found: Table, expected: Table) -> bool:
    return found.keys() == expected.keys() and all(
        math.isclose(found[id], expected[id], rel_tol=1e-5, abs_tol=1e-5) for id in found
    )


def check_kept(reference: Callable[[torch.Tensor], set[int]], **values: Any) -> None:
    """A filter that cuts off: the ids left are the reference's, with their own logits."""
    for seed in range(20):
        for logits in (random_logits(seed), random_logits(seed, 7, 1.0), random_logits(seed, 1)):
            kept = reference(logits)
            assert kept and same(ours(logits, **values), {id: float(logits[id]) for id in kept}), (seed, values)


def test_every_filter_is_named_by_a_setting_with_a_value_that_switches_it_off() -> None:
    assert all(SETTINGS[name].off is not None for name, _ in FILTERS)
    logits = random_logits(1)
    history = TokenHistory([3, 4, 5, 3, 4, 5, 3], 2)
    assert torch.equal(filter_logits(logits, GenerationParams(**OFF), history), logits)


@pytest.mark.parametrize("mass", [1e-6, 0.2, 0.9, 0.999])
def test_typical_p(mass: float) -> None:
    def reference(logits: torch.Tensor) -> set[int]:
        probs = probabilities(logits)
        entropy = -sum(prob * math.log(prob) for prob in probs)
        nearest = sorted(range(len(probs)), key=lambda id: abs(-math.log(probs[id]) - entropy))
        kept: set[int] = set()
        for id in nearest:
            if sum(probs[id] for id in kept) >= mass:
                break
            kept.add(id)
        return kept

    check_kept(reference, typical_p=mass)


@pytest.mark.parametrize("ties", [False, True])
def test_typical_p_is_that_of_transformers(ties: bool) -> None:
    from transformers.generation.logits_process import TypicalLogitsWarper

    for seed in range(20):
        logits = random_logits(seed, 3000)
        logits = logits.round() if ties else logits
        logits[7] = -math.inf  # never drawn
        for mass in (0.1, 0.5, 0.95):
            wanted = GenerationParams(**OFF | {"typical_p": mass})
            assert torch.equal(filter_logits(logits, wanted), TypicalLogitsWarper(mass)(None, logits[None])[0])


@pytest.mark.parametrize("n", [1e-6, 0.5, 1.0, 3.0])
def test_top_n_sigma(n: float) -> None:
    def reference(logits: torch.Tensor) -> set[int]:
        values = logits.tolist()
        mean = sum(values) / len(values)
        sigma = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        return {id for id, value in enumerate(values) if value >= max(values) - n * sigma}

    check_kept(reference, top_n_sigma=n)


def test_top_n_sigma_looks_at_all_logits_that_can_be_drawn_before_temperature_and_top_k() -> None:
    logits = random_logits(3, 500)
    kept = set(ours(logits, top_n_sigma=1.0))
    assert set(ours(logits, top_n_sigma=1.0, temperature=2.0)) == kept
    assert set(ours(logits, top_n_sigma=1.0, top_k=5)) == set(logits.topk(5).indices.tolist()) & kept
    banned = torch.cat((logits, torch.full((50,), -math.inf)))
    assert set(ours(banned, top_n_sigma=1.0)) == kept


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.5])
def test_xtc_excludes_the_top_choices_but_the_least_likely(threshold: float) -> None:
    def reference(logits: torch.Tensor) -> set[int]:
        probs = probabilities(logits)
        top = sorted((id for id in range(len(probs)) if probs[id] >= threshold), key=lambda id: probs[id])
        return set(range(len(probs))) - set(top[1:])

    check_kept(reference, xtc_probability=1.0, xtc_threshold=threshold)


def test_xtc_acts_as_often_as_its_probability_says() -> None:
    logits = torch.tensor([2.0, 1.9, 0.0])
    acted = [set(ours(logits, seed=seed, xtc_probability=0.3)) == {1, 2} for seed in range(1000)]
    assert 0.25 < sum(acted) / 1000 < 0.35
    wanted = GenerationParams(**OFF | {"xtc_probability": 1.0})
    assert torch.equal(filter_logits(logits, wanted), logits)  # without a generator


def test_xtc_draws_a_number_only_when_it_is_on() -> None:
    logits = random_logits(1)

    def drawn(**values: Any) -> int:
        """How many numbers a sample takes from its generator."""
        generator, numbers = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        sample(logits, GenerationParams(**OFF | values), generator)
        for count in range(5):
            if torch.equal(generator.get_state(), numbers.get_state()):
                return count
            torch.rand((), generator=numbers, dtype=torch.float64)
        raise AssertionError("more than four")

    assert (drawn(), drawn(xtc_probability=0.5), drawn(temperature=0.0, xtc_probability=0.5)) == (1, 2, 0)


def dry_reference(
    logits: torch.Tensor, text: list[int], breakers: set[int], m: float, base: float, allowed: int
) -> Table:
    """Each earlier place is compared with the end of the text, id by id."""
    lengths: dict[int, int] = {}
    for follower in range(1, len(text)):
        length = 0
        while length < follower and text[follower - 1 - length] == text[-1 - length]:
            if text[-1 - length] in breakers:
                break
            length += 1
        if text[follower] not in breakers:
            lengths[text[follower]] = max(length, lengths.get(text[follower], 0))
    table = dict(enumerate(logits.tolist()))
    for id, length in lengths.items():
        if length >= allowed:
            table[id] -= m * base ** (length - allowed)
    return table


@pytest.mark.parametrize(("m", "base", "allowed"), [(0.8, 1.75, 2), (0.5, 1.0, 1), (2.0, 4.0, 3), (1.0, 1.1, 9)])
def test_dry(m: float, base: float, allowed: int) -> None:
    tokenizer = char_tokenizer("abcdefgh:\n", 1)
    breakers = set(tokenizer.encode(":\n"))
    for seed in range(60):
        rng = random.Random(seed)
        text = rng.choices(tokenizer.encode("abc" if seed % 2 else "abcdefgh:\n"), k=rng.choice((0, 1, 2, 30, 80)))
        logits = random_logits(seed, tokenizer.vocab_size)
        for stops, wanted in ((breakers, (":", "\n")), (set[int](), ())):
            values = dict(dry_multiplier=m, dry_base=base, dry_allowed_length=allowed, dry_sequence_breakers=wanted)
            found = ours(logits, TokenHistory(text, 0, tokenizer), **values)
            assert same(found, dry_reference(logits, text, stops, m, base, allowed)), (seed, text)


def test_drys_penalty_is_bounded_on_a_text_that_is_one_long_repetition() -> None:
    logits = random_logits(1)
    found = ours(logits, TokenHistory([5] * 5000), dry_multiplier=1.0)
    assert found[5] == pytest.approx(float(logits[5]) - 1e6) and found[6] == float(logits[6])


def test_drys_breakers_are_the_ids_that_hold_them() -> None:
    tokenizer = train_bpe(["one: two.\nthree: four.\n"] * 30, 280)
    ids = breaker_ids(tokenizer, ("e", ":"))
    spelled = {id for id in range(tokenizer.vocab_size) if any(mark in tokenizer.piece(id) for mark in (b"e", b":"))}
    assert set(ids.tolist()) == spelled and len(spelled) > 2
    assert breaker_ids(tokenizer, ("zq",)).tolist() == tokenizer.encode("zq")[-1:]
    assert not len(breaker_ids(char_tokenizer("abc", 1), ("ß",)))


@pytest.mark.parametrize("penalty", [-2.0, 0.5, 2.0])
def test_presence_penalty_is_of_written_ids(penalty: float) -> None:
    logits = random_logits(1)
    text = [1, 2, 3, 3, 4, 4, 4]
    expected = dict(enumerate(logits.tolist()))
    for id in (3, 4):
        expected[id] -= penalty
    assert same(ours(logits, TokenHistory(text, 3), presence_penalty=penalty), expected)
    assert same(ours(logits, TokenHistory(text, 7), presence_penalty=penalty), dict(enumerate(logits.tolist())))


@pytest.mark.parametrize("penalty", [-2.0, 0.5, 2.0])
def test_frequency_penalty_counts_written_ids(penalty: float) -> None:
    logits = random_logits(1)
    text = [1, 2, 3, 3, 4, 4, 4]
    expected = dict(enumerate(logits.tolist()))
    for id in text[3:]:
        expected[id] -= penalty
    assert same(ours(logits, TokenHistory(text, 3), frequency_penalty=penalty), expected)
    both = {id: value - 0.25 * (id in text[3:]) for id, value in expected.items()}
    assert same(ours(logits, TokenHistory(text, 3), frequency_penalty=penalty, presence_penalty=0.25), both)


def test_logit_bias() -> None:
    logits = random_logits(1)
    expected = dict(enumerate(logits.tolist()))
    expected[0] -= 100
    expected[59] += 2.5
    assert same(ours(logits, logit_bias={0: -100, 59: 2.5, 60: 50, 10**8: 1}), expected)
    for id in (7, 8):
        assert set(ours(logits, logit_bias={id: 100}, temperature=0.0)) == {id}
    banned = logits.index_fill(0, torch.tensor([4]), -math.inf)  # a control id stays out, whatever the bias
    assert set(ours(banned, logit_bias={4: 100}, temperature=0.0)) == {
        int(logits.index_fill(0, torch.tensor([4]), -99).argmax())
    }


def test_logit_bias_comes_from_json_toml_and_flags() -> None:
    wanted = GenerationParams(logit_bias={50: -100.0, 7: 2.0})
    assert GenerationParams.model_validate_json(wanted.model_dump_json()) == wanted
    assert (
        build(GenerationParams, tomllib.loads(to_toml({"g": wanted.model_dump(include={"logit_bias"})}))["g"]) == wanted
    )
    assert parse_flags(GenerationParams, ["--logit-bias", "50", "-100", "7", "2"]) == wanted
    for wrong in (
        {-1: 1.0},
        {5: 101.0},
        {5: -100.5},
        {"x": 1.0},
        {5: math.nan},
        dict.fromkeys(range(1025), 1.0),
        [[5, 1]],
    ):
        with pytest.raises(ValidationError):
            GenerationParams(logit_bias=wrong)


@pytest.mark.parametrize("last", [1, 3, 6, 8, 100])
@pytest.mark.parametrize(
    "penalty",
    [{"repetition_penalty": 1.5}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}, {"dry_multiplier": 1.0}],
    ids=str,
)
def test_penalties_look_at_the_window_alone(penalty: dict[str, float], last: int) -> None:
    """As with a text that is no longer than the window."""
    text, prompt = [1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 1, 2], 5
    cut = max(0, len(text) - last)
    logits = random_logits(1)
    found = ours(logits, TokenHistory(text, prompt), penalty_last_n=last, **penalty)
    assert found == ours(logits, TokenHistory(text[cut:], max(0, prompt - cut)), **penalty)
    whole = ours(logits, TokenHistory(text, prompt), **penalty)
    assert found == whole if last == 100 else last > 3 or found != whole
