"""Many requests, one model: a thread that writes the samples of all requests together, one token of each at a time.

    >>> engine = Engine.load("runs/sample/best", slots=16)
    >>> request = engine.submit("The fog lay upon the river", GenerationParams(n=2, seed=7), deadline_s=60)
    >>> for event in request: print(event.index, event.text)     # or: async for event in request
    >>> engine.score("It was a dark night.")                     # how likely each token was
    >>> engine.close()

`submit` turns a prompt into ids, checks it against the limits and puts a `GenerationRequest` into the queue; it runs in the
caller's thread, as all work does that is not the model's. The engine's thread repeats one round (`Engine._round`):

1. requests that are cancelled, too late or unread for too long end (`_enforce_limits`);
2. waiting samples take free slots of the `BatchDecoder` as `Sequence`s (`_admit`);
3. one chunk of a text to be scored is read (`_score_next_chunk`);
4. one step of the decoder, whose events go to the requests they belong to (`_deliver`).

Requests join and leave between steps, and a text is the same as if written alone: see `inference/decoder.py`. A slow reader
pauses only its own sequences.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from checkpoint import load_model
from config import GenerationParams
from devices import pick_device, release_memory
from inference.decoder import BatchDecoder, Event, Result, Sequence
from inference.quantize import prepare
from inference.scoring import TokenScore, score_in_chunks
from inference.writing import encode_prompt, prompt_window
from model import GPT
from sampling import random_seed
from tokenizer import StyleError, Tokenizer

__all__ = ["Engine", "EngineError", "Event", "GenerationRequest", "QueueFull", "Result", "TokenScore"]

RATE_S = 5.0  # seconds over which tokens a second are counted


class EngineError(RuntimeError):
    """The engine could not do what was requested."""


class QueueFull(EngineError):
    """Too many requests wait already; another try makes sense after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class GenerationRequest:
    """A request in the engine: an iterator over its events, for one reader, in a thread or in an asyncio loop.

    The events of each sample are `started`, `token`s, and `done`; an `error` ends the whole request. Leaving the iteration
    early does not end the work, `cancel()` or the end of a `with` block does.
    """

    def __init__(
        self,
        wake_engine: Callable[[], None],
        ids: list[int],
        params: GenerationParams,
        *,
        id: str,
        seed: int,
        truncated: bool,
        deadline_s: float | None,
        logprobs: int | None,
        post_sampling: bool,
        slots_per_sample: int,
    ):
        """wake_engine: called when the engine must look at this request. slots_per_sample: one for each style of a blend."""
        self.slots_per_sample = slots_per_sample
        self.id, self.seed, self.truncated, self.prompt_tokens = id, seed, truncated, len(ids)
        self.ids, self.params, self.logprobs, self.post_sampling = ids, params, logprobs, post_sampling
        self.submitted = time.monotonic()
        self.expires = None if deadline_s is None else self.submitted + deadline_s
        self.samples_started = self.samples_ended = 0
        self.unread_since: float | None = None  # since when the reader has left event_buffer events unread
        self.cancelled = False
        self._wake_engine = wake_engine
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._waiter: asyncio.Future[None] | None = None  # the asyncio reader that waits for an event
        self._next_seq = 0
        self._complete = False

    @property
    def done(self) -> bool:
        """Whether the engine has finished with it; events may still be unread."""
        return self._complete

    @property
    def unread(self) -> int:
        """Events that wait for the reader."""
        return len(self._events)

    def cancel(self) -> None:
        """Stop writing; every sample that is not complete ends with `cancelled`."""
        self.cancelled = True
        self._wake_engine()

    def put(self, events: list[Event], complete: bool = False) -> None:
        """Hand events to the reader; called by the engine's thread. complete: no more will come."""
        wake_readers([(self, self.append(events, complete))])

    def append(self, events: list[Event], complete: bool = False) -> asyncio.Future[None] | None:
        """`put`, except that an asyncio reader is not woken but returned, for `wake_readers`."""
        with self._changed:
            if self._complete:
                return None
            for event in events:
                event.seq = self._next_seq
                self._next_seq += 1
                self._events.append(event)
            self._complete = complete
            self._changed.notify_all()
            waiter, self._waiter = self._waiter, None
        return waiter

    def _next_event(self) -> Event:
        event = self._events.popleft()
        if self.unread_since is not None:
            self._wake_engine()
        return event

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._complete)
            if not self._events:
                raise StopIteration
            return self._next_event()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while True:
            with self._changed:
                if self._events:
                    return self._next_event()
                if self._complete:
                    raise StopAsyncIteration
                waiter = self._waiter = asyncio.get_running_loop().create_future()
            await waiter

    def __enter__(self) -> GenerationRequest:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def result(self) -> list[Result]:
        """Wait for all samples. Raises EngineError if the request failed."""
        results = [
            Result("", "cancelled", 0, [], self.seed, self.prompt_tokens, self.truncated) for _ in range(self.params.n)
        ]
        for event in self:
            if event.kind == "error":
                raise EngineError(event.message or "generation failed")
            results[event.index].add(event)
        return results


def wake_readers(waiting: list[tuple[GenerationRequest, asyncio.Future[None] | None]]) -> None:
    """Wake asyncio readers, all of one event loop by one call: each call writes to a pipe."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[GenerationRequest, asyncio.Future[None]]]] = {}
    for request, waiter in waiting:
        if waiter is not None:
            loops.setdefault(waiter.get_loop(), []).append((request, waiter))
    for loop, readers in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, [waiter for _, waiter in readers])
        except RuntimeError:  # the event loop is closed: nobody reads any more
            for request, _ in readers:
                request.cancelled = True


def _resolve(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


class Engine:
    """One model and the thread that writes with it."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        slots: int = 16,
        queue_size: int = 64,
        max_tokens_limit: int = 4096,
        prompt_limit_tokens: int = 100_000,
        event_buffer: int = 1024,
        stall_s: float = 60.0,
    ):
        """slots: sequences written side by side. queue_size: requests that may wait for one. event_buffer: events that a
        reader may leave unread before its sequences pause; after `stall_s` seconds of that they are cancelled.
        """
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.slots, self.queue_size, self.event_buffer, self.stall_s = slots, queue_size, event_buffer, stall_s
        self.max_tokens_limit, self.prompt_limit_tokens = max_tokens_limit, prompt_limit_tokens
        self.dtype, self.remark = str(model.wte.weight.dtype).removeprefix("torch."), ""
        # Changed by the engine's thread alone:
        self._decoder = BatchDecoder(model, slots)
        release_memory()  # of the weights as they were in the file
        self._request_of: dict[Sequence, GenerationRequest] = {}
        self._mean_request_s = 1.0  # running mean of a request's time
        # Shared with the callers' threads, guarded by _changed:
        self._requests: list[GenerationRequest] = []  # not complete, oldest first
        self._scorings: deque[tuple[Future[list[TokenScore]], Iterator[list[TokenScore] | None]]] = deque()
        self._changed = threading.Condition()
        self._woken = False  # whether something happened since the last round began
        self._close_at: float | None = None  # when what still runs will be cancelled; None while open
        self._counts = {"rejected": 0, "finished": 0, "cancelled": 0, "failed": 0, "tokens": 0}
        self._recent_tokens: deque[tuple[float, int]] = deque()  # (moment, tokens) of each step
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, folder: Path | str, *, device: str = "auto", dtype: str = "auto", **options: Any) -> Engine:
        """An engine for a model folder. dtype: auto, float32, bfloat16, float16 or int8, see `quantize.prepare`.

        options: further arguments of `Engine`; the name is by default the run's or the folder's.
        """
        model, tokenizer = load_model(folder, device=pick_device(device))
        used, remark = prepare(model, dtype)
        parts = Path(folder).absolute().parts
        options.setdefault("name", parts[-2] if parts[-1] in ("best", "last") else parts[-1])
        engine = cls(model, tokenizer, **options)
        engine.dtype, engine.remark = used, remark
        return engine

    @property
    def styles(self) -> list[str]:
        """Names of the styles that the model can write in."""
        return list(self.tokenizer.styles)

    @property
    def context(self) -> int:
        """Tokens the model sees at once."""
        return self.model.config.block_size

    def submit(
        self,
        prompt: str | list[int],
        params: GenerationParams,
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
        logprobs: int | None = None,
        post_sampling: bool = False,
    ) -> GenerationRequest:
        """Queue a request. Raises ValueError for invalid input, QueueFull, or EngineError after `close`.

        deadline_s: seconds after which its samples end with `deadline`. logprobs: alternatives reported with each token.
        post_sampling: their probabilities are those that the filters leave.
        """
        if params.max_tokens > self.max_tokens_limit:
            raise ValueError(f"max_tokens {params.max_tokens} exceeds the limit of {self.max_tokens_limit}: lower it")
        ids = encode_prompt(self.tokenizer, prompt, params.style)
        slots_per_sample = max(1, len(self.tokenizer.blend(params.style)))
        if slots_per_sample > self.slots:
            raise StyleError(
                f"style {params.style!r} takes {slots_per_sample} slots a text and there are {self.slots}: blend fewer"
            )
        if len(ids) > self.prompt_limit_tokens:
            raise ValueError(f"prompt: {len(ids)} tokens exceed the limit of {self.prompt_limit_tokens}: shorten it")
        if logprobs is not None and not 0 <= logprobs <= self.tokenizer.vocab_size:
            raise ValueError(f"logprobs {logprobs}: must be 0 to {self.tokenizer.vocab_size}")
        ids, truncated = prompt_window(ids, self.context, params)
        request = GenerationRequest(
            self._wake,
            ids,
            params,
            id=request_id or uuid.uuid4().hex,
            seed=random_seed() if params.seed is None else params.seed,
            truncated=truncated,
            deadline_s=deadline_s,
            logprobs=logprobs,
            post_sampling=post_sampling,
            slots_per_sample=slots_per_sample,
        )
        with self._changed:
            if self._close_at is not None:
                raise EngineError("the engine is closed")
            waiting = self._waiting()
            if waiting >= self.queue_size + len(self._decoder.free_slots):
                self._counts["rejected"] += 1
                raise QueueFull(waiting, min(60.0, max(1.0, self._mean_request_s * (waiting + 1) / self.slots)))
            self._requests.append(request)
            self._wake()
        return request

    def score(self, text: str | list[int], top: int = 5) -> list[TokenScore]:
        """How likely the model finds each token of a text, with the `top` most likely in its place; see `scoring`.

        Raises ValueError for a text that is too long or not in the vocabulary, EngineError after `close`.
        """
        ids = encode_prompt(self.tokenizer, text) if len(text) else []
        if len(ids) > self.prompt_limit_tokens:
            raise ValueError(f"text: {len(ids)} tokens exceed the limit of {self.prompt_limit_tokens}: shorten it")
        if not ids:
            return []
        future: Future[list[TokenScore]] = Future()
        with self._changed:
            if self._close_at is not None:
                raise EngineError("the engine is closed")
            self._scorings.append((future, score_in_chunks(self.model, self.tokenizer, ids, max(0, top))))
            self._wake()
        return future.result()

    def stats(self) -> dict[str, Any]:
        """Current load and running totals: samples running and paused, requests waiting, tokens and ended requests."""
        now = time.monotonic()
        with self._changed:
            sequences = list(self._decoder.sequences)
            recent = sum(count for moment, count in self._recent_tokens if now - moment < RATE_S)
            return {
                "running": len(sequences),
                "paused": sum(sequence.paused for sequence in sequences),
                "waiting": self._waiting(),
                "slots": self.slots,
                "scoring": len(self._scorings),
                **self._counts,
                "tokens_per_s": recent / RATE_S,
            }

    def close(self, timeout: float | None = None, finish: bool = True) -> None:
        """Accept nothing more; complete what was accepted, or cancel it (also after `timeout` seconds)."""
        with self._changed:
            now = time.monotonic()
            self._close_at = now if not finish else float("inf") if timeout is None else now + timeout
            self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(None if timeout is None else timeout + 5.0)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(finish=False)

    def _waiting(self) -> int:
        """Number of requests of which no sample has a slot yet."""
        return sum(not request.samples_started for request in self._requests)

    def _wake(self) -> None:
        """Let the engine's thread look at its requests, now or in its next round."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        """The thread: rounds while there is work, sleep while there is none."""
        while True:
            try:
                if not self._round():
                    return
            except Exception as error:  # outside any one sequence: those failures are caught by BatchDecoder.step
                self._recover(error)

    def _round(self) -> bool:
        """One round of the four stages named at the top; False when closed and nothing is left to do."""
        if self._end_what_is_due() and not self._scorings:
            return False
        self._admit()
        if self._scorings:
            self._score_next_chunk()
        if any(not sequence.paused for sequence in self._decoder.sequences):
            self._deliver(self._decoder.step())
        elif not self._scorings:
            with self._changed:
                if not self._woken:
                    self._changed.wait(self._sleep_s())
        return True

    def _end_what_is_due(self) -> bool:
        """Stage 1; True when closed and no request is left. In a function of its own, as a round may sleep for long, and
        its variables would keep requests that have ended.
        """
        now = time.monotonic()
        with self._changed:
            self._woken = False
            requests, close_at = list(self._requests), self._close_at
        for request in requests:
            self._enforce_limits(request, now, closing=close_at is not None and now >= close_at)
        return close_at is not None and not requests

    def _sleep_s(self) -> float | None:
        """Seconds to the next timeout; None if there is none."""
        due = [request.expires for request in self._requests if request.expires is not None]
        due += [r.unread_since + self.stall_s for r in self._requests if r.unread_since is not None]
        if self._close_at is not None:
            due.append(self._close_at)
        return max(0.0, min(due) - time.monotonic()) + 0.001 if due and min(due) < float("inf") else None

    def _enforce_limits(self, request: GenerationRequest, now: float, closing: bool) -> None:
        """End a request that is cancelled, too late or unread for too long; pause one that is not being read."""
        full = request.unread >= self.event_buffer
        request.unread_since = (request.unread_since or now) if full else None
        for sequence in self._sequences_of(request):
            sequence.paused = full
        unread_too_long = request.unread_since is not None and now - request.unread_since >= self.stall_s
        if request.expires is not None and now >= request.expires:
            self._stop(request, "deadline")
        elif request.cancelled or closing or unread_too_long:
            self._stop(request, "cancelled")

    def _sequences_of(self, request: GenerationRequest) -> list[Sequence]:
        return [sequence for sequence, owner in self._request_of.items() if owner is request]

    def _stop(self, request: GenerationRequest, reason: str) -> None:
        """End every open sample of a request, those without a slot too."""
        events = []
        for sequence in self._sequences_of(request):
            events.append(sequence.finish(reason))
            self._decoder.remove(sequence)
            del self._request_of[sequence]
        for index in range(request.samples_started, request.params.n):
            usage = {
                "prompt_tokens": request.prompt_tokens,
                "completion_tokens": 0,
                "total_tokens": request.prompt_tokens,
            }
            events.append(Event(index, "done", finish_reason=reason, usage=usage))
        self._finish(request, events, "cancelled")

    def _finish(self, request: GenerationRequest, events: list[Event], outcome: str) -> None:
        """Hand over a request's last events and forget it. outcome: the count that it adds to."""
        with self._changed:
            self._requests.remove(request)
            self._counts[outcome] += 1
        self._mean_request_s += 0.1 * (time.monotonic() - request.submitted - self._mean_request_s)
        request.put(events, complete=True)

    def _admit(self) -> None:
        """Give free slots to waiting samples: of the request with the fewest running, among those of the oldest."""
        while self._decoder.free_slots:
            unstarted = [request for request in self._requests if request.samples_started < request.params.n]
            if not unstarted:
                return
            request = min(unstarted, key=lambda request: request.samples_started - request.samples_ended)
            if len(self._decoder.free_slots) < request.slots_per_sample:  # a blend of styles is not overtaken
                return
            sequence = Sequence(
                self.tokenizer,
                request.ids,
                request.params,
                seed=request.seed,
                index=request.samples_started,
                context=self.context,
                logprobs=request.logprobs,
                post_sampling=request.post_sampling,
            )
            request.samples_started += 1
            self._request_of[sequence] = request
            self._decoder.add(sequence)

    def _deliver(self, step_events: list[tuple[Sequence, Event]]) -> None:
        """Hand each request its events of a step; requests that are complete or have failed are forgotten."""
        by_request: dict[GenerationRequest, list[Event]] = {}
        tokens = 0
        for sequence, event in step_events:
            request = self._request_of.get(sequence)
            if request is None:  # another sample's failure has ended the request
                continue
            by_request.setdefault(request, []).append(event)
            tokens += event.token_id is not None
            if event.kind == "error":
                self._fail(request, by_request.pop(request))
            elif event.kind == "done":
                request.samples_ended += 1
                del self._request_of[sequence]
        now = time.monotonic()
        with self._changed:
            self._counts["tokens"] += tokens
            self._recent_tokens.append((now, tokens))
            while now - self._recent_tokens[0][0] >= RATE_S:
                self._recent_tokens.popleft()
        waiting = []
        for request, events in by_request.items():
            if request.samples_ended == request.params.n:
                self._finish(request, events, "finished")
            else:
                waiting.append((request, request.append(events)))
        wake_readers(waiting)

    def _fail(self, request: GenerationRequest, events: list[Event]) -> None:
        """End a request whose last event is an error: its other samples stop."""
        for sequence in self._sequences_of(request):
            if sequence in self._decoder.sequences:
                self._decoder.remove(sequence)
            del self._request_of[sequence]
        self._finish(request, events, "failed")

    def _recover(self, error: Exception) -> None:
        """After an engine-wide failure: fail all requests, reset the cache."""
        message = f"the engine failed: {str(error) or type(error).__name__}"
        with self._changed:
            requests, self._requests = self._requests, []
            scorings, self._scorings = list(self._scorings), deque()
            self._counts["failed"] += len(requests)
        self._request_of = {}
        for future, _ in scorings:
            future.set_exception(EngineError(message))
        for request in requests:
            request.put([Event(0, "error", message=message)], complete=True)
        self._decoder = BatchDecoder(self.model, self.slots)

    def _score_next_chunk(self) -> None:
        """One chunk of the oldest text to be scored."""
        future, chunks = self._scorings[0]
        try:
            if self._close_at is not None and time.monotonic() >= self._close_at:
                raise EngineError("the engine is closed")
            scores = next(chunks)
        except Exception as error:
            self._scorings.popleft()
            future.set_exception(error)
            return
        if scores is not None:
            self._scorings.popleft()
            future.set_result(scores)
