"""The engine: texts as if written alone under load, cancellation, slow readers, limits, failures, scores, closing."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from config import GenerationParams
from inference import decoder
from inference.engine import Engine, EngineError, Event, GenerationRequest, QueueFull
from inference.writing import generate
from model import GPT
from support.tiny_models import random_model, save, shape, tiny_tokenizer
from tokenizer import char_tokenizer

LONG = GenerationParams(max_tokens=4000, temperature=1.0)


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64), seed=2)


@pytest.fixture(scope="module")
def endless() -> tuple[GPT, Any]:
    """A model whose tokenizer has no end of text, so that only limits end its texts."""
    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyz .\n", 1)
    return random_model(shape(tokenizer, block_size=32, n_embd=32, vocab_used=tokenizer.vocab_size), seed=3), tokenizer


@pytest.fixture
def engine(model: GPT) -> Iterator[Engine]:
    with Engine(model, tiny_tokenizer(), slots=4) as engine:
        yield engine


@pytest.fixture
def small_engine(endless: tuple[GPT, Any]) -> Iterator[Engine]:
    with Engine(*endless, slots=2, queue_size=3, event_buffer=20) as engine:
        yield engine


def until(true: Callable[[], Any], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(true())


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    return stats["running"] == stats["waiting"] == 0 and sorted(engine._decoder.free_slots) == list(range(engine.slots))


def mixed_requests(count: int) -> list[tuple[str, GenerationParams]]:
    rng = random.Random(5)
    prompts = ["It was", "I", "", "the worst of times, it was the best of times " * 4, "“Pip’s” £5"]
    return [
        (
            rng.choice(prompts),
            GenerationParams(
                max_tokens=rng.choice([1, 5, 20, 70]),
                temperature=rng.choice([0.0, 0.8, 1.5]),
                top_k=rng.choice([0, 5, 50]),
                n=rng.choice([1, 1, 2, 7]),
                seed=rng.randrange(1000),
                keep=rng.choice([0, 5]),
                stop=rng.choice([(), ("e",)]),
            ),
        )
        for _ in range(count)
    ]


def test_texts_under_load_are_those_written_alone(model: GPT) -> None:
    asked = mixed_requests(24)
    alone = [generate(model, tiny_tokenizer(), prompt, params) for prompt, params in asked]
    for slots in (1, 5, 16):
        with Engine(model, tiny_tokenizer(), slots=slots) as engine:
            requests = []
            for prompt, params in asked:
                requests.append(engine.submit(prompt, params))
                time.sleep(0.002)
            engine.submit("x", LONG).cancel()
            assert [request.result() for request in requests] == alone
            assert until(lambda: idle(engine))
            assert engine.stats()["tokens"] >= sum(result.tokens for results in alone for result in results)


def test_events_are_in_order_and_complete(engine: Engine) -> None:
    request = engine.submit("It was", GenerationParams(max_tokens=30, n=6, seed=1), request_id="r1", logprobs=2)
    events = list(request)
    assert request.id == "r1" and request.seed == 1 and request.done and not request.truncated
    assert [event.seq for event in events] == list(range(len(events)))
    for index in range(6):
        kinds = [event.kind for event in events if event.index == index]
        assert kinds[0] == "started" and kinds[-1] == "done" and set(kinds[1:-1]) <= {"token"}
        assert kinds.count("done") == 1
    for event in events:
        if event.kind == "token":
            assert event.logprob is not None and len(event.top) == 2
        if event.kind == "done":
            assert event.usage is not None and event.usage["total_tokens"] == sum(list(event.usage.values())[:2])
    assert list(request) == []


def test_a_new_seed_is_reported(engine: Engine) -> None:
    request = engine.submit("It", GenerationParams(max_tokens=9))
    assert request.result() == engine.submit("It", GenerationParams(max_tokens=9, seed=request.seed)).result()


def test_reading_in_an_event_loop(engine: Engine, model: GPT) -> None:
    asked = mixed_requests(8)

    async def read(prompt: str, params: GenerationParams) -> list[str]:
        texts = [""] * params.n
        async for event in engine.submit(prompt, params):
            texts[event.index] += event.text
        return texts

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*(read(*one) for one in asked))

    found = asyncio.run(all_of_them())
    expected = [[result.text for result in generate(model, tiny_tokenizer(), *one)] for one in asked]
    assert found == expected


def test_a_reader_whose_event_loop_has_ended_is_dropped(small_engine: Engine) -> None:
    async def glance() -> GenerationRequest:
        request = small_engine.submit("a", LONG)
        await anext(request)
        task = asyncio.ensure_future(anext(request))
        await asyncio.sleep(0)
        task.cancel()
        return request

    request = asyncio.run(glance())
    small_engine.event_buffer = 10**9
    request._waiter = asyncio.new_event_loop().create_future()
    request._waiter.get_loop().close()
    small_engine._wake()
    assert until(lambda: request.done) and until(lambda: idle(small_engine))


def test_cancelling_frees_the_slots_within_two_tokens(endless: tuple[GPT, Any]) -> None:
    with Engine(*endless, slots=2, event_buffer=10**6) as engine:
        request = engine.submit("a", LONG.model_copy(update={"n": 5}))
        seen = 0
        for event in request:
            if event.kind == "token":
                seen += 1
            if seen == 10:
                break
        steps = engine.stats()["tokens"]
        request.cancel()
        assert until(lambda: request.done) and until(lambda: idle(engine))
        rest = list(request)
        assert {event.index for event in rest if event.finish_reason == "cancelled"} == set(range(5))
        unread = sum(event.kind == "token" for event in rest)
        assert engine.stats()["tokens"] - steps <= 2 * 2 + unread
        assert engine.stats()["cancelled"] == 1


def test_cancellation_is_prompt(endless: tuple[GPT, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in steps of the model, not in time: after `cancel` returns, at most two more."""
    engine = Engine(*endless, slots=1)
    steps: list[bool] = []
    cancelled = threading.Event()
    step = engine._decoder.step

    def counted() -> Any:
        steps.append(cancelled.is_set())
        return step()

    monkeypatch.setattr(engine._decoder, "step", counted)
    with engine, engine.submit("a", LONG) as request:
        for _, _ in zip(range(8), request, strict=False):
            pass
        request.cancel()
        cancelled.set()
        assert until(lambda: request.done)
        assert sum(steps) <= 2


def test_leaving_a_with_block_cancels(small_engine: Engine) -> None:
    with small_engine.submit("a", LONG) as request:
        next(request)
    assert until(lambda: request.done) and until(lambda: idle(small_engine))


def test_a_reader_that_does_not_read_pauses_only_itself(small_engine: Engine) -> None:
    stuck = small_engine.submit("a", LONG.model_copy(update={"seed": 3, "max_tokens": 300}))
    assert until(lambda: small_engine.stats()["paused"] == 1)
    held = stuck.unread
    assert 20 <= held <= 22
    quick = small_engine.submit("b", LONG.model_copy(update={"max_tokens": 200}))
    assert quick.result()[0].tokens == 200
    assert stuck.unread == held and not stuck.done
    assert stuck.result()[0].tokens == 300  # reads on: nothing is lost
    assert until(lambda: idle(small_engine))


def test_a_reader_that_never_reads_is_cancelled(endless: tuple[GPT, Any]) -> None:
    with Engine(*endless, slots=1, event_buffer=5, stall_s=0.2) as engine:
        stuck = engine.submit("a", LONG)
        waiting = engine.submit("b", GenerationParams(max_tokens=3))
        assert waiting.result()[0].tokens == 3
        assert stuck.result()[0].finish_reason == "cancelled"


def test_a_deadline_ends_running_and_waiting_texts(small_engine: Engine) -> None:
    small_engine.event_buffer = 10**9
    begun = time.monotonic()
    requests = [
        small_engine.submit("a", LONG.model_copy(update={"max_tokens": 4096}), deadline_s=0.4) for _ in range(3)
    ]
    reasons = [result.finish_reason for request in requests for result in request.result()]
    assert reasons == ["deadline"] * 3 and time.monotonic() - begun >= 0.4
    stuck = small_engine.submit("a", LONG, deadline_s=0.3)
    small_engine.event_buffer = 5
    assert until(lambda: small_engine.stats()["paused"] == 1 or stuck.done)
    assert until(lambda: stuck.done)
    assert stuck.result()[0].finish_reason == "deadline"


def test_a_full_queue_refuses_with_a_time_to_wait(small_engine: Engine) -> None:
    requests = [small_engine.submit("a", LONG) for _ in range(2)]
    assert until(lambda: small_engine.stats()["running"] == 2)
    requests += [small_engine.submit("a", LONG) for _ in range(3)]
    with pytest.raises(QueueFull) as refused:
        small_engine.submit("a", LONG)
    assert 1 <= refused.value.retry_after <= 60 and isinstance(refused.value, EngineError)
    assert small_engine.stats()["rejected"] == 1 and small_engine.stats()["waiting"] == 3
    for request in requests:
        request.cancel()
    assert until(lambda: idle(small_engine))
    assert len(small_engine.submit("a", GenerationParams(max_tokens=3)).result()) == 1


def test_no_queue_still_fills_the_slots(endless: tuple[GPT, Any]) -> None:
    with Engine(*endless, slots=2, queue_size=0) as engine:
        requests = [engine.submit("a", LONG) for _ in range(2)]
        assert until(lambda: engine.stats()["running"] == 2)
        with pytest.raises(QueueFull):
            engine.submit("a", LONG)
        for request in requests:
            request.cancel()


def test_a_large_request_does_not_starve_a_small_one(endless: tuple[GPT, Any]) -> None:
    with Engine(*endless, slots=2, event_buffer=10**9) as engine:
        large = engine.submit("a", GenerationParams(max_tokens=60, n=64, temperature=1.0))
        small = engine.submit("b", GenerationParams(max_tokens=5, temperature=1.0))
        assert small.result()[0].tokens == 5
        assert large.samples_ended < 32
        assert len({result.text for result in large.result()}) > 60


def test_impossible_requests_are_refused_at_once(engine: Engine) -> None:
    tokenizer = tiny_tokenizer()
    for prompt, params, more in (
        ("a", GenerationParams(max_tokens=4097), {}),
        ([tokenizer.vocab_size], GenerationParams(), {}),
        ([-1], GenerationParams(), {}),
        ([1] * 100_001, GenerationParams(), {}),
        ("a", GenerationParams(), {"logprobs": -1}),
    ):
        with pytest.raises(ValueError):
            engine.submit(prompt, params, **more)  # type: ignore[arg-type]
    assert engine.stats()["waiting"] == engine.stats()["running"] == 0
    letters = char_tokenizer("abc", 1)
    with (
        Engine(random_model(shape(letters, vocab_used=3)), letters) as small,
        pytest.raises(ValueError, match="alphabet"),
    ):
        small.submit("xyz", GenerationParams())


def test_a_prompt_beyond_the_context_is_cut(engine: Engine, model: GPT) -> None:
    request = engine.submit("It was the best of times, " * 20, GenerationParams(max_tokens=60, seed=4))
    assert request.truncated and request.prompt_tokens == 36
    assert request.result() == generate(
        model, tiny_tokenizer(), "It was the best of times, " * 20, GenerationParams(max_tokens=60, seed=4)
    )


def test_no_tokens_asked_gives_an_empty_text(engine: Engine) -> None:
    (result,) = engine.submit("It", GenerationParams(max_tokens=0)).result()
    assert (result.text, result.finish_reason) == ("", "length")


def test_a_failure_ends_only_its_own_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.submit("It was", GenerationParams(max_tokens=60, seed=1)).result()
    sample_next = decoder.Sequence.sample_next

    def broken(sequence: decoder.Sequence, logits: torch.Tensor) -> list[Event]:
        if sequence.params.seed == 666 and sequence.index == 1 and len(sequence.output_ids) == 4:
            raise RuntimeError("out of memory")
        return sample_next(sequence, logits)

    monkeypatch.setattr(decoder.Sequence, "sample_next", broken)
    good = engine.submit("It was", GenerationParams(max_tokens=60, seed=1))
    bad = engine.submit("It was", GenerationParams(max_tokens=60, seed=666, n=3))
    assert good.result() == expected
    events = list(bad)
    assert events[-1].kind == "error" and events[-1].message == "out of memory" and events[-1].index == 1
    assert bad.done and until(lambda: idle(engine)) and engine.stats()["failed"] == 1
    with pytest.raises(EngineError, match="out of memory"):
        engine.submit("It was", GenerationParams(max_tokens=60, seed=666, n=3)).result()
    assert engine.submit("It was", GenerationParams(max_tokens=60, seed=1)).result() == expected


def test_a_failure_of_the_engine_itself_is_reported_and_survived(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.submit("It was", GenerationParams(max_tokens=9, seed=1)).result()

    def broken() -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(engine._decoder, "step", broken)
    requests = [engine.submit("It was", GenerationParams(max_tokens=9, seed=1)) for _ in range(3)]
    messages = []
    for request in requests:
        try:
            assert request.result() == expected
        except EngineError as error:
            messages.append(str(error))
    assert messages and all("the device is lost" in message for message in messages)
    assert engine.submit("It was", GenerationParams(max_tokens=9, seed=1)).result() == expected
    assert until(lambda: idle(engine))


def test_scores_are_the_model_s_own(engine: Engine, model: GPT) -> None:
    tokenizer = tiny_tokenizer()
    text = "It was “the” best, café"
    ids = tokenizer.encode(text)
    running = engine.submit("It", GenerationParams(max_tokens=200, seed=2))
    scores = engine.score(text, top=4)
    with torch.inference_mode():
        logp = model(torch.tensor([ids]))[0].log_softmax(-1)
    assert [score.id for score in scores] == ids and "".join(score.text for score in scores) == text
    assert scores[0].logprob is None and scores[0].rank is None and scores[0].top == []
    for at in range(1, len(ids)):
        score, row = scores[at], logp[at - 1]
        assert score.logprob == pytest.approx(float(row[ids[at]]), abs=1e-4)
        assert score.rank == int((row > row[ids[at]]).sum()) + 1
        assert [other for other, _, _ in score.top] == row.topk(4).indices.tolist()
        assert [value for _, _, value in score.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert text[score.start : score.start + len(score.text)] == score.text
    assert engine.score("") == [] and engine.score(ids, 0)[3].top == []
    assert running.result() == generate(model, tokenizer, "It", GenerationParams(max_tokens=200, seed=2))


def test_scores_beyond_the_context(engine: Engine, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first window as one pass, every later token with at least half the context before it."""
    monkeypatch.setattr("inference.scoring.CHUNK", 7)
    ids = [(5 * at) % 250 for at in range(150)]
    scores = engine.score(ids)
    context = model.config.block_size
    with torch.inference_mode():
        first = model(torch.tensor([ids[:context]]))[0].log_softmax(-1)
    for at in range(1, context + 1):
        assert scores[at].logprob == pytest.approx(float(first[at - 1, ids[at]]), abs=1e-4)
    with torch.inference_mode():
        start = context - context // 2
        second = model(torch.tensor([ids[start : start + context]]))[0].log_softmax(-1)
    for at in range(context + 1, start + context + 1):
        assert scores[at].logprob == pytest.approx(float(second[at - 1 - start, ids[at]]), abs=1e-4)
    assert len(scores) == 150 and all(score.logprob is not None for score in scores[1:])


def test_a_score_that_fails_is_the_caller_s_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="not among"):
        engine.score([10**6])

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.model, "prefill", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.score("It was")
    monkeypatch.undo()
    assert len(engine.score("It was")) == len(tiny_tokenizer().encode("It was"))


def test_closing_lets_texts_finish(model: GPT) -> None:
    engine = Engine(model, tiny_tokenizer(), slots=2)
    requests = [engine.submit("It was", GenerationParams(max_tokens=30, seed=1)) for _ in range(5)]
    engine.close()
    assert not engine._thread.is_alive()
    expected = generate(model, tiny_tokenizer(), "It was", GenerationParams(max_tokens=30, seed=1))
    assert [request.result() for request in requests] == [expected] * 5
    for late in (lambda: engine.submit("a", LONG), lambda: engine.score("It")):
        with pytest.raises(EngineError, match="closed"):
            late()
    engine.close()


@pytest.mark.parametrize(("timeout", "finish"), [(5.0, False), (0.3, True), (None, False)])
def test_closing_ends_what_runs_too_long(endless: tuple[GPT, Any], timeout: float | None, finish: bool) -> None:
    engine = Engine(*endless, slots=2, event_buffer=10)
    requests = [engine.submit("a", LONG) for _ in range(4)]
    next(requests[0])
    engine.close(timeout, finish=finish)
    assert not engine._thread.is_alive()
    assert {result.finish_reason for request in requests for result in request.result()} == {"cancelled"}


def test_loading_a_folder(model: GPT, tmp_path: Path) -> None:
    folder = save(tmp_path / "story" / "best", model, tiny_tokenizer())
    with Engine.load(folder, device="cpu", dtype="float32", slots=3) as engine:
        assert (engine.name, engine.dtype, engine.slots, engine.context) == ("story", "float32", 3, 48)
        text = engine.submit("It was", GenerationParams(max_tokens=30, seed=1)).result()[0].text
    with Engine.load(folder, dtype="int8", name="mine") as engine:
        assert engine.name == "mine" and (engine.dtype == "int8" or "int8 is not available" in engine.remark)
    from inference.quantize import load_for_writing

    prepared, tokenizer, _ = load_for_writing(folder, device="cpu", dtype="float32")
    assert generate(prepared, tokenizer, "It was", GenerationParams(max_tokens=30, seed=1))[0].text == text


def test_many_readers_some_stuck_some_gone(endless: tuple[GPT, Any]) -> None:
    """100 streams, of which 20 stop reading and 30 vanish: every other is completed, and nothing is left behind."""
    params = GenerationParams(max_tokens=40, temperature=1.0, seed=9)

    async def read(number: int, request: GenerationRequest) -> str:
        text = ""
        async for event in request:
            text += event.text
            if number < 50 and event.kind == "token":
                if number >= 20:
                    request.cancel()
                break
        return text

    async def read_all(requests: list[GenerationRequest]) -> list[str]:
        readers = (read(number, request) for number, request in enumerate(requests))
        return await asyncio.wait_for(asyncio.gather(*readers), 120)

    def crowd(engine: Engine) -> list[weakref.ref[GenerationRequest]]:
        requests = [engine.submit("a", params) for _ in range(100)]
        assert set(asyncio.run(read_all(requests))[50:]) == {expected.text}
        return [weakref.ref(request) for request in requests]

    with Engine(*endless, slots=8, queue_size=200, event_buffer=16, stall_s=0.5) as engine:
        (expected,) = engine.submit("a", params).result()
        gone = crowd(engine)
        assert until(lambda: idle(engine))
        assert engine._requests == [] and engine._request_of == {}
        assert until(lambda: not gc.collect() and not [request for request in gone if request() is not None])
