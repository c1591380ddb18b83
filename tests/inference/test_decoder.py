"""Continuous batching: a sequence is the same in any company, and its events, limits and failures are its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from config import GenerationParams
from inference import compiled, decoder, quantize
from inference.compiled import CompiledStep
from inference.decoder import BatchDecoder, Event, Sequence
from model import GPT
from support.tiny_models import random_model, shape, tiny_tokenizer
from tokenizer import char_tokenizer


class Asked:
    """What is asked of the decoder in these tests: a prompt, settings, a seed, a sample's index."""

    def __init__(self, prompt: str, index: int = 0, seed: int = 3, **values: Any):
        self.prompt, self.index, self.seed = prompt, index, seed
        self.params = GenerationParams(**{"max_tokens": 30, "temperature": 1.2, **values})


RAGGED = [
    Asked("It was the best of times"),
    Asked("It was the best of times", index=1),
    Asked("I", max_tokens=70),
    Asked("it was the worst of", repetition_penalty=1.0, top_k=0, keep=4, max_tokens=90),
    Asked("It was the best of times", seed=4, max_tokens=3),
    Asked("“Pip’s” £5 café. It was the", temperature=0.0),
    Asked("times, it was", stop=("e",), top_p=0.5),
    Asked("I", max_tokens=70, index=2),
    Asked("of", max_tokens=1),
    Asked("best", min_p=0.1, max_tokens=50),
    Asked("times", penalty_last_n=4, frequency_penalty=0.7, repetition_penalty=1.6, max_tokens=50),
    Asked("times", logit_bias={5: 3.0, 9: -100}, max_tokens=50),
    Asked("times", frequency_penalty=0.7, max_tokens=50),
    Asked("times", presence_penalty=1.5, temperature=0.0, max_tokens=50),
    Asked(
        "It was the best of times, it was",
        dry_multiplier=2.0,
        dry_allowed_length=1,
        repetition_penalty=1.0,
        max_tokens=70,
    ),
    Asked("times", xtc_probability=0.5, xtc_threshold=0.05, max_tokens=50),
    Asked("times", top_n_sigma=1.5, top_k=0, temperature=2.0, max_tokens=50),
    Asked("times", typical_p=0.5, top_k=0, max_tokens=50),
    Asked("times", logit_bias={14: 6.0, 221: 6.0}, finish_sentence=40, max_tokens=9),
]


def write(model: GPT, asked: list[Asked], slots: int, every: int = 1) -> list[tuple[str, list[int]]]:
    """(text, ids) of each; one more joins after `every` steps where a slot is free."""
    tokenizer, context = tiny_tokenizer(), model.config.block_size
    batch = BatchDecoder(model, slots)
    texts = [
        Sequence(tokenizer, tokenizer.encode(one.prompt), one.params, seed=one.seed, index=one.index, context=context)
        for one in asked
    ]
    found: dict[Sequence, str] = dict.fromkeys(texts, "")
    waiting, steps = list(texts), 0
    while waiting or batch.sequences:
        if waiting and batch.free_slots and steps % every == 0:
            batch.add(waiting.pop(0))
        for text, event in batch.step():
            assert event.kind != "error", event.message
            found[text] += event.text
        steps += 1
    assert sorted(batch.free_slots) == list(range(slots))
    return [(found[text], text.output_ids) for text in texts]


@pytest.fixture(
    params=["plain", "without kernels", "float32", "float16", "int8", "bfloat16", "two threads", "chunks by torch"]
)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> GPT:
    """The same small model, prepared in each of the ways."""
    made = random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64, n_layer=2), seed=2)
    if request.param == "without kernels":
        monkeypatch.setattr(compiled, "load_kernels", lambda: None)
    elif request.param == "two threads":
        monkeypatch.setattr(compiled, "MIN_THREADED", 0)
        monkeypatch.setattr(compiled, "THREADS", 2)
    elif request.param == "chunks by torch":
        monkeypatch.setattr(compiled, "LONGEST", 4)
        monkeypatch.setattr(compiled, "native_bf16", lambda device: True)
        monkeypatch.setattr(compiled, "MIN_THREADED", 0)
        quantize.prepare(made, "float16")
    elif request.param != "plain":
        assert quantize.prepare(made, request.param) == (request.param, "")
    return made


def test_a_sequence_is_the_same_in_any_batch(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of all lengths that join and leave, contexts that shift, chunks and shared prompts: as if alone, bit for bit."""
    monkeypatch.setattr(decoder, "CHUNK", 8)
    alone = [write(model, [one], slots=1)[0] for one in RAGGED]
    assert len({tuple(ids) for _, ids in alone}) == len(RAGGED)
    for slots, every in ((10, 1), (3, 1), (5, 4), (16, 2)):
        assert write(model, RAGGED, slots, every) == alone
    backwards = write(model, RAGGED[::-1], 7, 3)
    assert backwards[::-1] == alone


def test_logits_do_not_depend_on_the_batch(model: GPT) -> None:
    """Stronger than equal texts: the very bits of the logits, alone and as any row of each count."""
    batch = BatchDecoder(model, 16)
    batch.free_slots = []
    ids = [3 + slot for slot in range(16)]
    states = [decoder.SequenceState([], 1.0, ids[: slot + 1], slot) for slot in range(16)]
    for state in states:
        batch._prefill([state])

    def step(slots: list[int]) -> list[np.ndarray]:
        for slot in slots:
            states[slot].pending = [ids[slot]]
        for first in range(0, len(slots), batch.row_counts[-1]):
            batch._decode([states[slot] for slot in slots[first : first + batch.row_counts[-1]]])
        for slot in slots:
            batch.cache.length[slot] -= 1
        return [states[slot].logits.copy() for slot in slots]

    alone = [step([slot])[0] for slot in range(16)]
    for size in range(1, 17):
        for first in (0, 16 - size):
            slots = list(range(first, first + size))
            for order in (slots, slots[::-1]):
                for slot, logits in zip(order, step(order), strict=True):
                    assert np.array_equal(logits, alone[slot])


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
def test_a_text_past_the_context_is_that_of_whole_windows(keep: int) -> None:
    """block_size - 1, block_size, + 1 and 3 x: the cache gives what whole windows give."""
    model = random_model(shape(tiny_tokenizer(), block_size=16, n_embd=32), seed=5)
    tokenizer, context = tiny_tokenizer(), 16
    prompt = tokenizer.encode("It was the")[:6]
    expected = greedy(model, prompt, 3 * context, keep)
    assert len(expected) == 3 * context
    for total in (context - 1, context, context + 1, 3 * context):
        batch = BatchDecoder(model, 1)
        wanted = GenerationParams(max_tokens=total - len(prompt), temperature=0, repetition_penalty=1, keep=keep)
        text = Sequence(tokenizer, prompt, wanted, seed=0, index=0, context=context)
        batch.add(text)
        while batch.sequences:
            batch.step()
        written = expected[: total - len(prompt)]
        if tokenizer.eot in written:
            written = written[: written.index(tokenizer.eot)]
        assert text.output_ids == written


def test_end_of_text_ends_only_its_own_row() -> None:
    model = random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64), seed=2)
    tokenizer = tiny_tokenizer()
    wanted = GenerationParams(max_tokens=200, temperature=2.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    batch = BatchDecoder(model, 8)
    texts = [Sequence(tokenizer, [5, 6], wanted, seed=1, index=index, context=48) for index in range(8)]
    for text in texts:
        batch.add(text)
    done: dict[int, Event] = {}
    pieces = [""] * 8
    while batch.sequences:
        for text, event in batch.step():
            pieces[text.index] += event.text
            if event.kind == "done":
                done[text.index] = event
    reasons = {event.finish_reason for event in done.values()}
    assert reasons == {"stop", "length"}
    for text in texts:
        assert tokenizer.eot not in text.output_ids and "endoftext" not in pieces[text.index]
        assert pieces[text.index] == tokenizer.decode(text.output_ids)
        assert (len(text.output_ids) == 200) == (done[text.index].finish_reason == "length")
        assert done[text.index].usage == {
            "prompt_tokens": 2,
            "completion_tokens": len(text.output_ids),
            "total_tokens": 2 + len(text.output_ids),
        }


def test_padding_ids_are_never_drawn() -> None:
    """Rows that pad the vocabulary have no probability, whatever the settings, with any weights."""
    model = random_model(shape(tiny_tokenizer(), padding=40, block_size=32), seed=9)
    tokenizer = tiny_tokenizer()
    wanted = GenerationParams(max_tokens=300, temperature=2.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    for dtype in ("plain", "float16", "int8"):
        if dtype != "plain":
            model = random_model(shape(tiny_tokenizer(), padding=40, block_size=32), seed=9)
            quantize.prepare(model, dtype)
        batch = BatchDecoder(model, 4)
        texts = [Sequence(tokenizer, [1], wanted, seed=2, index=index, context=32) for index in range(4)]
        for text in texts:
            batch.add(text)
        while batch.sequences:
            batch.step()
        ids = [id for text in texts for id in text.output_ids]
        assert len(ids) > 300 and max(ids) < tokenizer.vocab_size


def test_a_failure_ends_only_its_own_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure in a batch each row is tried alone: the others lose nothing."""
    model = random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64), seed=2)
    asked = [Asked("It was", index=index, max_tokens=12) for index in range(4)]
    expected = write(model, asked, 4)
    tokenizer = tiny_tokenizer()
    batch = BatchDecoder(model, 4)
    texts = [
        Sequence(tokenizer, tokenizer.encode(one.prompt), one.params, seed=one.seed, index=one.index, context=48)
        for one in asked
    ]
    for text in texts:
        batch.add(text)
    step, failing = CompiledStep.__call__, texts[2]

    def broken(self: Any, cache: Any, ids: list[int], slots: list[int], last: int | None = None) -> Any:
        if failing.slot in slots and len(failing.output_ids) == 5 and failing in batch.sequences:
            raise RuntimeError("out of memory")
        return step(self, cache, ids, slots, last)

    monkeypatch.setattr(CompiledStep, "__call__", broken)
    found, errors = dict.fromkeys(texts, ""), []
    while batch.sequences:
        for text, event in batch.step():
            found[text] += event.text
            if event.kind == "error":
                errors.append((text, event.message))
    assert errors == [(failing, "out of memory")]
    for text, (whole, ids) in zip(texts, expected, strict=True):
        if text is not failing:
            assert (found[text], text.output_ids) == (whole, ids)
    assert sorted(batch.free_slots) == [0, 1, 2, 3]


@pytest.mark.parametrize("kernels", [True, False])
def test_a_prompt_is_prefilled_once(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of one prompt share its prefill, and so does a later sequence that begins alike."""
    if not kernels:
        monkeypatch.setattr(compiled, "load_kernels", lambda: None)
    monkeypatch.setattr(decoder, "CHUNK", 4)
    model = random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64), seed=2)
    read: list[int] = []
    tokenizer = tiny_tokenizer()
    prompt = [id % 256 for id in range(1, 15)]
    wanted = GenerationParams(max_tokens=5)
    batch = BatchDecoder(model, 4)
    read_chunk = batch._read
    monkeypatch.setattr(batch, "_read", lambda ids, slot: (read.extend(ids), read_chunk(ids, slot))[1])

    def run(ids: list[int], count: int) -> None:
        for index in range(count):
            batch.add(Sequence(tokenizer, ids, wanted, seed=1, index=index, context=48))
        while batch.sequences:
            batch.step()

    run(prompt, 4)
    assert read == prompt
    run(prompt, 1)
    assert read == prompt
    written = Sequence(tokenizer, prompt, wanted, seed=1, index=0, context=48)
    batch.add(written)
    while batch.sequences:
        batch.step()
    assert read == prompt and len(written.output_ids) == 5
    read.clear()
    run([*prompt[:9], 99, 98, 97], 1)
    assert read == ([99, 98, 97] if kernels else [prompt[8], 99, 98, 97])  # or two whole chunks of four
    read.clear()
    run([*written.ids[:-1], 96, 95], 1)  # goes on where a text ended, but for its last token, which was never read
    assert read == ([96, 95] if kernels else [*written.ids[12:-1], 96, 95])


def test_a_long_prompt_delays_the_others_by_one_chunk_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "CHUNK", 4)
    model = random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64), seed=2)
    tokenizer = tiny_tokenizer()
    batch = BatchDecoder(model, 2)
    quick = Sequence(tokenizer, [1, 2], GenerationParams(max_tokens=40, top_k=1), seed=1, index=0, context=48)
    batch.add(quick)
    batch.step()
    slow = Sequence(tokenizer, list(range(1, 21)), GenerationParams(max_tokens=5), seed=1, index=0, context=48)
    batch.add(slow)
    for step in range(1, 6):
        before = len(quick.output_ids)
        batch.step()
        assert len(quick.output_ids) == before + 1
        assert bool(slow.output_ids) == (step == 5)


def written(text: str, **values: Any) -> str:
    """What a sequence shows whose model finds `text` likeliest, a character a token, and then only the letter x."""
    tokenizer = char_tokenizer([text + "x"], 1)
    params = GenerationParams(**{"temperature": 0.0, "repetition_penalty": 1.0, **values})
    sequence = Sequence(tokenizer, tokenizer.encode("x"), params, seed=0, index=0, context=1000)
    shown = ""
    for id in tokenizer.encode(text + "x" * 500):
        for event in sequence.sample_next(np.eye(tokenizer.vocab_size, dtype=np.float32)[id]):
            shown += event.text
        if sequence.finish_reason:
            assert sequence.finish_reason == "length" and sequence.usage()["completion_tokens"] == len(shown)
            return shown
    raise AssertionError("the text does not end")


@pytest.mark.parametrize(
    ("text", "tokens", "wanted"),
    [
        ("He came. She went. They", 3, "He came."),
        ("He came. She went. They", 8, "He came."),  # as long as its sentence
        ("He came. She went. They", 9, "He came. "),  # what ends it has been written
        ("He came. She went. They", 10, "He came. She went."),
        ("“Go!” she said. “No.” Then", 4, "“Go!”"),
        ("“Go. Go (at once!)” she said", 6, "“Go. Go (at once!)”"),
        ("So Mr. Pip and Mrs. J. Joe slept… Then", 2, "So Mr. Pip and Mrs. J. Joe slept…"),
        ("At 3.5 p.m. they", 3, "At 3.5 p.m."),
        ("No, said I. Then", 3, "No, said I."),
        ("Done.\n\nCHAPTER II", 2, "Done."),
    ],
)
def test_a_text_ends_with_its_sentence(text: str, tokens: int, wanted: str) -> None:
    assert written(text, max_tokens=tokens, finish_sentence=60) == wanted
    assert written(text, max_tokens=tokens, finish_sentence=0) == text[:tokens]


def test_a_sentence_without_an_end_takes_a_bounded_number_of_tokens() -> None:
    assert written("and so", max_tokens=4, finish_sentence=9) == "and soxxxxxxx"
    assert written("and so.", max_tokens=4, finish_sentence=3) == "and so."
