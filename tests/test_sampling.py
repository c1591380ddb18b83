"""Sampling against transformers, stop strings, seeds, and the one decode core: a text is the same in any company."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import sampling
from config import GenerationParams
from inference import decoder, quantize
from inference.decoder import Event, Text, Writer
from model import GPT
from sampling import History, LogitsError, Stopper, candidates, filter_logits, sample, seed_of
from support.tiny_models import random_model, shape, tiny_tokenizer

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
        expected, found = theirs(logits, wanted, seen), filter_logits(logits, wanted, History(seen.tolist()))
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
    sample(logits, params(repetition_penalty=5.0), generator, History([best]))
    assert torch.equal(logits, before)


def test_a_greedy_text_minds_the_penalty() -> None:
    logits = torch.tensor([2.0, 1.9, 0.0])
    assert sample(logits, params(temperature=0), torch.Generator()) == 0
    assert sample(logits, params(temperature=0, repetition_penalty=1.5), torch.Generator(), History([0])) == 1


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
    seeds = {seed_of(seed, index) for seed in range(100) for index in range(100)}
    assert len(seeds) == 10_000 and all(0 <= seed < 2**64 for seed in seeds)
    assert seed_of(7, 0) == 7191089600892374487  # fixed for ever: published seeds must give their texts again


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
    stopper, shown, at, stopped = Stopper(stops), "", 0, False
    while at < len(text) and not stopped:
        size = rng.randint(1, 4)
        piece, stopped = stopper.feed(text[at : at + size])
        shown, at = shown + piece, at + size
        assert cut(text, stops).startswith(shown)
    if not stopped:
        shown += stopper.rest()
    assert shown == cut(text, stops)


def test_a_stop_string_that_overlaps_its_own_beginning() -> None:
    stopper = Stopper(["aab"])
    assert [stopper.feed(letter) for letter in "aaab"] == [("", False), ("", False), ("a", False), ("", True)]


class One:
    """What is asked of the decode core in these tests: a prompt, settings, a seed, a sample's index."""

    def __init__(self, prompt: str, index: int = 0, seed: int = 3, **values: Any):
        self.prompt, self.index, self.seed = prompt, index, seed
        self.params = GenerationParams(**{"max_tokens": 30, "temperature": 1.2, **values})


RAGGED = [
    One("It was the best of times"),
    One("It was the best of times", index=1),
    One("I", max_tokens=70),
    One("it was the worst of", repetition_penalty=1.0, top_k=0, keep=4, max_tokens=90),
    One("It was the best of times", seed=4, max_tokens=3),
    One("“Pip’s” £5 café. It was the", temperature=0.0),
    One("times, it was", stop=("e",), top_p=0.5),
    One("I", max_tokens=70, index=2),
    One("of", max_tokens=1),
    One("best", min_p=0.1, max_tokens=50),
    One("times", penalty_last_n=4, frequency_penalty=0.7, repetition_penalty=1.6, max_tokens=50),
    One("times", logit_bias={5: 3.0, 9: -100}, max_tokens=50),
    One("times", frequency_penalty=0.7, max_tokens=50),
    One("times", presence_penalty=1.5, temperature=0.0, max_tokens=50),
    One(
        "It was the best of times, it was",
        dry_multiplier=2.0,
        dry_allowed_length=1,
        repetition_penalty=1.0,
        max_tokens=70,
    ),
    One("times", xtc_probability=0.5, xtc_threshold=0.05, max_tokens=50),
    One("times", top_n_sigma=1.5, top_k=0, temperature=2.0, max_tokens=50),
    One("times", typical_p=0.5, top_k=0, max_tokens=50),
]


def write(model: GPT, asked: Sequence[One], slots: int, every: int = 1) -> list[tuple[str, list[int]]]:
    """(text, ids) of each; one more joins after `every` steps where a slot is free."""
    tokenizer, context = tiny_tokenizer(), model.config.block_size
    writer = Writer(model, slots)
    texts = [
        Text(tokenizer, tokenizer.encode(one.prompt), one.params, seed=one.seed, index=one.index, context=context)
        for one in asked
    ]
    found: dict[Text, str] = dict.fromkeys(texts, "")
    waiting, steps = list(texts), 0
    while waiting or writer.texts:
        if waiting and writer.free and steps % every == 0:
            writer.add(waiting.pop(0))
        for text, event in writer.step():
            assert event.kind != "error", event.message
            found[text] += event.text
        steps += 1
    assert sorted(writer.free) == list(range(slots))
    return [(found[text], text.written) for text in texts]


@pytest.fixture(params=["plain", "packed", "float16", "int8", "weight-only int8", "bfloat16"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> GPT:
    """The same small model, prepared in each of the ways."""
    monkeypatch.setattr(quantize, "WORTH_PACKING", 0)
    made = random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64, n_layer=2), seed=2)
    if request.param == "weight-only int8":
        quantize._replace(made, quantize.WeightOnlyInt8)
    elif request.param != "plain":
        used, _ = quantize.prepare(made, "float32" if request.param == "packed" else request.param)
        if request.param in ("float16", "int8") and used != request.param:
            pytest.skip(f"no {request.param} kernels on this machine")
    return made


def test_a_text_is_the_same_in_any_company(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged prompts that join and leave, windows that roll, chunks and shared prompts: each as if alone, bit for bit."""
    monkeypatch.setattr(decoder, "CHUNK", 8)
    alone = [write(model, [one], slots=1)[0] for one in RAGGED]
    assert len({tuple(ids) for _, ids in alone}) == len(RAGGED)
    for slots, every in ((10, 1), (3, 1), (5, 4), (16, 2)):
        assert write(model, RAGGED, slots, every) == alone
    backwards = write(model, RAGGED[::-1], 7, 3)
    assert backwards[::-1] == alone


def test_logits_do_not_depend_on_the_batch(model: GPT) -> None:
    """Stronger than equal texts: the very bits of the logits, alone and as any row of each count."""
    counts = quantize.row_counts(model)
    cache = model.new_cache(16)
    ids = [3 + slot for slot in range(16)]
    for slot in range(16):
        model.prefill(ids[: slot + 1], cache, slot)

    def step(slots: list[int]) -> torch.Tensor:
        rows = next(count for count in counts if count >= len(slots))
        logits = model.decode([ids[slot] for slot in slots], cache, slots, rows)
        for slot in slots:
            cache.length[slot] -= 1
        return logits

    alone = [step([slot])[0] for slot in range(16)]
    for size in range(1, min(16, counts[-1]) + 1):
        for first in (0, 16 - size):
            slots = list(range(first, first + size))
            for batch in (slots, slots[::-1]):
                for slot, logits in zip(batch, step(batch), strict=True):
                    assert torch.equal(logits, alone[slot])


def greedy(model: GPT, ids: list[int], tokens: int, keep: int, allowed: float = 1e-3) -> list[int]:
    """Reference: the whole window through the plain forward pass for each token; stops where two logits nearly tie."""
    context, window, found = model.config.block_size, list(ids), list(ids)
    for _ in range(tokens):
        with torch.no_grad():
            top = model(torch.tensor([window]))[0, -1].topk(2)
        if float(top.values[0] - top.values[1]) < allowed:
            break
        found.append(int(top.indices[0]))
        if len(window) == context:
            size = context * 3 // 4
            window = found[:keep] + found[keep - size :]
        else:
            window.append(found[-1])
    return found[len(ids) :]


@pytest.mark.parametrize("keep", [0, 5])
def test_a_story_goes_on_past_the_context(keep: int) -> None:
    """block_size - 1, block_size, + 1 and 3 x: what the cache writes is what whole windows would have written."""
    model = random_model(shape(tiny_tokenizer(), block_size=16, n_embd=32), seed=5)
    tokenizer, context = tiny_tokenizer(), 16
    prompt = tokenizer.encode("It was the")[:6]
    expected = greedy(model, prompt, 3 * context, keep)
    assert len(expected) == 3 * context
    for total in (context - 1, context, context + 1, 3 * context):
        writer = Writer(model, 1)
        wanted = GenerationParams(max_tokens=total - len(prompt), temperature=0, repetition_penalty=1, keep=keep)
        text = Text(tokenizer, prompt, wanted, seed=0, index=0, context=context)
        writer.add(text)
        while writer.texts:
            writer.step()
        written = expected[: total - len(prompt)]
        if tokenizer.eot in written:
            written = written[: written.index(tokenizer.eot)]
        assert text.written == written


def test_end_of_text_stops_only_its_own_row() -> None:
    model = random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64), seed=2)
    tokenizer = tiny_tokenizer()
    wanted = GenerationParams(max_tokens=200, temperature=2.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    writer = Writer(model, 8)
    texts = [Text(tokenizer, [5, 6], wanted, seed=1, index=index, context=48) for index in range(8)]
    for text in texts:
        writer.add(text)
    done: dict[int, Event] = {}
    pieces = [""] * 8
    while writer.texts:
        for text, event in writer.step():
            pieces[text.index] += event.text
            if event.kind == "done":
                done[text.index] = event
    reasons = {event.finish_reason for event in done.values()}
    assert reasons == {"stop", "length"}
    for text in texts:
        assert tokenizer.eot not in text.written and "endoftext" not in pieces[text.index]
        assert pieces[text.index] == tokenizer.decode(text.written)
        assert (len(text.written) == 200) == (done[text.index].finish_reason == "length")
        assert done[text.index].usage == {
            "prompt_tokens": 2,
            "completion_tokens": len(text.written),
            "total_tokens": 2 + len(text.written),
        }


def test_only_real_ids_are_ever_drawn() -> None:
    """Rows that pad the vocabulary have no probability, whatever the settings, with any weights."""
    model = random_model(shape(tiny_tokenizer(), padding=40, block_size=32), seed=9)
    tokenizer = tiny_tokenizer()
    wanted = GenerationParams(max_tokens=300, temperature=2.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    for dtype in ("plain", "float32", "int8"):
        if dtype != "plain":
            model = random_model(shape(tiny_tokenizer(), padding=40, block_size=32), seed=9)
            quantize.prepare(model, dtype)
        writer = Writer(model, 4)
        texts = [Text(tokenizer, [1], wanted, seed=2, index=index, context=32) for index in range(4)]
        for text in texts:
            writer.add(text)
        while writer.texts:
            writer.step()
        ids = [id for text in texts for id in text.written]
        assert len(ids) > 300 and max(ids) < tokenizer.vocab_size


def test_a_failing_text_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in a shared step is looked for text by text; the others lose nothing."""
    model = random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64), seed=2)
    asked = [One("It was", index=index, max_tokens=12) for index in range(4)]
    expected = write(model, asked, 4)
    tokenizer = tiny_tokenizer()
    writer = Writer(model, 4)
    texts = [
        Text(tokenizer, tokenizer.encode(one.prompt), one.params, seed=one.seed, index=one.index, context=48)
        for one in asked
    ]
    for text in texts:
        writer.add(text)
    decode, guilty = model.decode, texts[2]

    def broken(ids: list[int], cache: Any, slots: list[int], rows: int = 0) -> torch.Tensor:
        if guilty.slot in slots and len(guilty.written) == 5 and guilty in writer.texts:
            raise RuntimeError("out of memory")
        return decode(ids, cache, slots, rows)

    monkeypatch.setattr(model, "decode", broken)
    found, errors = dict.fromkeys(texts, ""), []
    while writer.texts:
        for text, event in writer.step():
            found[text] += event.text
            if event.kind == "error":
                errors.append((text, event.message))
    assert errors == [(guilty, "out of memory")]
    for text, (whole, ids) in zip(texts, expected, strict=True):
        if text is not guilty:
            assert (found[text], text.written) == (whole, ids)
    assert sorted(writer.free) == [0, 1, 2, 3]


def test_a_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of one prompt share its reading, and so does a later text that begins with the same chunks."""
    monkeypatch.setattr(decoder, "CHUNK", 4)
    model = random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64), seed=2)
    read: list[int] = []
    prefill = model.prefill
    monkeypatch.setattr(model, "prefill", lambda ids, *rest, **more: (read.extend(ids), prefill(ids, *rest, **more))[1])
    tokenizer = tiny_tokenizer()
    prompt = [id % 256 for id in range(1, 15)]
    wanted = GenerationParams(max_tokens=5)
    writer = Writer(model, 4)

    def run(ids: list[int], count: int) -> None:
        for index in range(count):
            writer.add(Text(tokenizer, ids, wanted, seed=1, index=index, context=48))
        while writer.texts:
            writer.step()

    run(prompt, 4)
    assert read == prompt
    run(prompt, 1)
    assert read == prompt
    read.clear()
    run([*prompt[:9], 99, 98, 97], 1)
    assert read == [prompt[8], 99, 98, 97]  # two whole chunks of four were known


def test_a_long_prompt_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "CHUNK", 4)
    model = random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64), seed=2)
    tokenizer = tiny_tokenizer()
    writer = Writer(model, 2)
    quick = Text(tokenizer, [1, 2], GenerationParams(max_tokens=40, top_k=1), seed=1, index=0, context=48)
    writer.add(quick)
    writer.step()
    slow = Text(tokenizer, list(range(1, 21)), GenerationParams(max_tokens=5), seed=1, index=0, context=48)
    writer.add(slow)
    for step in range(1, 6):
        before = len(quick.written)
        writer.step()
        assert len(quick.written) == before + 1
        assert bool(slow.written) == (step == 5)
