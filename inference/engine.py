"""Many requests, one model: a thread that writes all texts together, one token of each at a time.

    >>> engine = Engine.load("runs/sample/best", slots=16)
    >>> job = engine.submit("The fog lay upon the river", GenerationParams(n=2, seed=7), deadline_s=60)
    >>> for event in job: print(event.index, event.text)         # or: async for event in job
    >>> engine.score("It was a dark night.")                     # how likely each token was
    >>> engine.close()

Requests join and leave between steps; a text is the same as alone (see `sampling.py`). Whoever reads slowly pauses only
their own texts. Everything but the model's own work happens in the callers' threads.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import GenerationParams
from inference.decoder import CHUNK, Event, Result, Text, Writer
from inference.writing import encode_prompt, prompt_window
from model import GPT
from sampling import fresh_seed
from tokenizer import StyleError, Tokenizer

__all__ = ["Engine", "EngineError", "Event", "Job", "QueueFull", "Result", "TokenScore"]

RATE_S = 5.0  # seconds over which tokens a second are counted


class EngineError(RuntimeError):
    """The engine could not do what was asked."""


class QueueFull(EngineError):
    """Too many requests wait already; another try makes sense after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class TokenScore:
    """One token of a text under the model: its log-probability (None for the first), its rank from 1, the likeliest."""

    id: int
    text: str
    start: int  # character of the text at which it begins
    logprob: float | None
    rank: int | None
    top: list[tuple[int, str, float]]


class Job:
    """A request: an iterator over its events, for one reader, in a thread or in an asyncio loop.

    The events of each sample are `started`, `token`s, and `done`; an `error` ends the whole job. Leaving the iteration
    early does not end the work, `cancel()` or the end of a `with` block does.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        ids: list[int],
        params: GenerationParams,
        *,
        id: str,
        seed: int,
        truncated: bool,
        deadline_s: float | None,
        logprobs: int | None,
        width: int,
    ):
        """width: slots that a sample takes, one for each style of a blend."""
        self.width = width
        self.id, self.seed, self.truncated, self.prompt_tokens = id, seed, truncated, len(ids)
        self.ids, self.params, self.logprobs = ids, params, logprobs
        self.submitted = time.monotonic()
        self.expires = None if deadline_s is None else self.submitted + deadline_s
        self.started = self.ended = 0  # samples
        self.stalled: float | None = None  # since when nobody has read
        self.cancelled = False
        self._wake = wake
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._waiter: asyncio.Future[None] | None = None
        self._seq = 0
        self._over = False

    @property
    def done(self) -> bool:
        """Whether the engine has finished with it; events may still be unread."""
        return self._over

    @property
    def unread(self) -> int:
        """Events that wait for the reader."""
        return len(self._events)

    def cancel(self) -> None:
        """Stop writing; every sample that is not complete ends with `cancelled`."""
        self.cancelled = True
        self._wake()

    def put(self, events: Sequence[Event], over: bool = False) -> None:
        """Hand events to the reader (the engine's side)."""
        with self._changed:
            if self._over:
                return
            for event in events:
                event.seq = self._seq
                self._seq += 1
                self._events.append(event)
            self._over = over
            self._changed.notify_all()
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            try:
                waiter.get_loop().call_soon_threadsafe(_resolve, waiter)
            except RuntimeError:  # the reader's loop is gone, and the reader with it
                self.cancelled = True

    def _taken(self) -> Event:
        event = self._events.popleft()
        if self.stalled is not None:
            self._wake()
        return event

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._over)
            if not self._events:
                raise StopIteration
            return self._taken()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while True:
            with self._changed:
                if self._events:
                    return self._taken()
                if self._over:
                    raise StopAsyncIteration
                waiter = self._waiter = asyncio.get_running_loop().create_future()
            await waiter

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def result(self) -> list[Result]:
        """Wait for all samples. EngineError if the job failed."""
        results = [
            Result("", "cancelled", 0, [], self.seed, self.prompt_tokens, self.truncated) for _ in range(self.params.n)
        ]
        for event in self:
            if event.kind == "error":
                raise EngineError(event.message or "the text could not be written")
            results[event.index].add(event)
        return results


def _resolve(waiter: asyncio.Future[None]) -> None:
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
        """slots: texts written side by side. queue_size: requests that may wait for one. event_buffer: events a reader
        may leave unread before its texts pause; after `stall_s` seconds of that they are cancelled.
        """
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.slots, self.queue_size, self.event_buffer, self.stall_s = slots, queue_size, event_buffer, stall_s
        self.max_tokens_limit, self.prompt_limit_tokens = max_tokens_limit, prompt_limit_tokens
        self.dtype, self.remark = str(model.wte.weight.dtype).removeprefix("torch."), ""
        self._writer = Writer(model, slots)
        self._owner: dict[Text, Job] = {}
        self._jobs: list[Job] = []  # not ended, oldest first
        self._scores: deque[tuple[Future[list[TokenScore]], Iterator[list[TokenScore] | None]]] = deque()
        self._changed = threading.Condition()
        self._news = False
        self._closing: float | None = None  # when what still runs will be cancelled
        self._counts = {"rejected": 0, "finished": 0, "cancelled": 0, "failed": 0, "tokens": 0}
        self._rate: deque[tuple[float, int]] = deque()
        self._job_s = 1.0  # running mean of a request's time
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, folder: Path | str, *, device: str = "auto", dtype: str = "auto", **settings: Any) -> Engine:
        """An engine for a model folder. dtype: auto, float32, bfloat16, float16 or int8, see `quantize.prepare`."""
        from checkpoint import load_model
        from devices import pick_device
        from inference.quantize import prepare

        model, tokenizer = load_model(folder, device=pick_device(device))
        used, remark = prepare(model, dtype)
        parts = Path(folder).absolute().parts
        settings.setdefault("name", parts[-2] if parts[-1] in ("best", "last") else parts[-1])
        engine = cls(model, tokenizer, **settings)
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
        prompt: str | Sequence[int],
        params: GenerationParams,
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
        logprobs: int | None = None,
    ) -> Job:
        """Queue a request. Raises ValueError for what can never be written, QueueFull, or EngineError after `close`.

        deadline_s: seconds after which its samples end with `deadline`. logprobs: so many alternatives a token.
        """
        if params.max_tokens > self.max_tokens_limit:
            raise ValueError(f"max_tokens {params.max_tokens} exceeds the limit of {self.max_tokens_limit}: lower it")
        ids = encode_prompt(self.tokenizer, prompt, params.style)
        width = max(1, len(self.tokenizer.blend(params.style)))
        if width > self.slots:
            raise StyleError(
                f"style {params.style!r} takes {width} slots a text and there are {self.slots}: blend fewer"
            )
        if len(ids) > self.prompt_limit_tokens:
            raise ValueError(f"prompt: {len(ids)} tokens exceed the limit of {self.prompt_limit_tokens}: shorten it")
        if logprobs is not None and not 0 <= logprobs <= self.tokenizer.vocab_size:
            raise ValueError(f"logprobs {logprobs}: must be 0 to {self.tokenizer.vocab_size}")
        ids, truncated = prompt_window(ids, self.context, params)
        seed = fresh_seed() if params.seed is None else params.seed
        job = Job(
            self._wake,
            ids,
            params,
            id=request_id or uuid.uuid4().hex,
            seed=seed,
            truncated=truncated,
            deadline_s=deadline_s,
            logprobs=logprobs,
            width=width,
        )
        with self._changed:
            if self._closing is not None:
                raise EngineError("the engine is closed")
            waiting = self._waiting()
            if waiting >= self.queue_size + len(self._writer.free):
                self._counts["rejected"] += 1
                raise QueueFull(waiting, min(60.0, max(1.0, self._job_s * (waiting + 1) / self.slots)))
            self._jobs.append(job)
            self._news = True
            self._changed.notify_all()
        return job

    def score(self, text: str | Sequence[int], top: int = 5) -> list[TokenScore]:
        """How likely the model finds each token of a text, with the `top` likeliest in its place.

        Read in chunks between the steps of what is being written. Beyond the context a token is scored from at least
        the half context before it. Raises ValueError for a text that is too long or not in the vocabulary.
        """
        ids = encode_prompt(self.tokenizer, text) if len(text) else []
        if len(ids) > self.prompt_limit_tokens:
            raise ValueError(f"text: {len(ids)} tokens exceed the limit of {self.prompt_limit_tokens}: shorten it")
        if not ids:
            return []
        future: Future[list[TokenScore]] = Future()
        with self._changed:
            if self._closing is not None:
                raise EngineError("the engine is closed")
            self._scores.append((future, self._scored(ids, max(0, top))))
            self._news = True
            self._changed.notify_all()
        return future.result()

    def stats(self) -> dict[str, Any]:
        """What it is doing and has done: texts running and paused, requests waiting, and totals."""
        now = time.monotonic()
        with self._changed:
            texts = list(self._writer.texts)
            recent = sum(count for moment, count in self._rate if now - moment < RATE_S)
            return {
                "running": len(texts),
                "paused": sum(text.paused for text in texts),
                "waiting": self._waiting(),
                "slots": self.slots,
                "scoring": len(self._scores),
                **self._counts,
                "tokens_per_s": recent / RATE_S,
            }

    def close(self, timeout: float | None = None, finish: bool = True) -> None:
        """Take nothing more; let what was accepted be completed, or cancel it (also after `timeout` seconds)."""
        with self._changed:
            now = time.monotonic()
            self._closing = now if not finish else float("inf") if timeout is None else now + timeout
            self._news = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(None if timeout is None else timeout + 5.0)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(finish=False)

    def _waiting(self) -> int:
        """Requests of which nothing has begun."""
        return sum(not job.started for job in self._jobs)

    def _wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def _run(self) -> None:
        """The thread: turns while there is work, sleep while there is none."""
        while True:
            try:
                if not self._turn():
                    return
            except Exception as error:  # not a text's own failure, which Writer.step catches
                self._start_over(error)

    def _turn(self) -> bool:
        """One round of joining, leaving, scoring and writing; False when closed and nothing is left."""
        now = time.monotonic()
        with self._changed:
            self._news = False
            jobs, closing = list(self._jobs), self._closing
        if closing is not None and not jobs and not self._scores:
            return False
        for job in jobs:
            self._look_after(job, now, closing is not None and now >= closing)
        self._admit()
        if self._scores:
            self._score_on()
        if any(not text.paused for text in self._writer.texts):
            self._deliver(self._writer.step())
        elif not self._scores:
            with self._changed:
                if not self._news:
                    self._changed.wait(self._next_alarm())
        return True

    def _next_alarm(self) -> float | None:
        """Seconds until something must be looked after although nobody calls; None: never."""
        alarms = [job.expires for job in self._jobs if job.expires is not None]
        alarms += [job.stalled + self.stall_s for job in self._jobs if job.stalled is not None]
        if self._closing is not None:
            alarms.append(self._closing)
        return max(0.0, min(alarms) - time.monotonic()) + 0.001 if alarms and min(alarms) < float("inf") else None

    def _look_after(self, job: Job, now: float, shut: bool) -> None:
        """End a job that is cancelled, too late or unread for too long; pause one that is not being read."""
        full = job.unread >= self.event_buffer
        job.stalled = (job.stalled or now) if full else None
        for text, owner in self._owner.items():
            if owner is job:
                text.paused = full
        if job.expires is not None and now >= job.expires:
            self._end(job, "deadline")
        elif job.cancelled or shut or (job.stalled is not None and now - job.stalled >= self.stall_s):
            self._end(job, "cancelled")

    def _end(self, job: Job, reason: str) -> None:
        """Close every open sample of a job."""
        events = []
        for text in [text for text, owner in self._owner.items() if owner is job]:
            events.append(text.finish(reason))
            self._writer.remove(text)
            del self._owner[text]
        for index in range(job.started, job.params.n):
            usage = {"prompt_tokens": job.prompt_tokens, "completion_tokens": 0, "total_tokens": job.prompt_tokens}
            events.append(Event(index, "done", finish_reason=reason, usage=usage))
        self._leave(job, events, "cancelled")

    def _leave(self, job: Job, events: list[Event], kind: str) -> None:
        """A job's last events; it is forgotten."""
        with self._changed:
            self._jobs.remove(job)
            self._counts[kind] += 1
        self._job_s += 0.1 * (time.monotonic() - job.submitted - self._job_s)
        job.put(events, over=True)

    def _admit(self) -> None:
        """Give free slots to samples that wait: of the request with the fewest running, then of the oldest."""
        while self._writer.free:
            open_jobs = [job for job in self._jobs if job.started < job.params.n]
            if not open_jobs:
                return
            job = min(open_jobs, key=lambda job: job.started - job.ended)
            if len(self._writer.free) < job.width:  # nobody overtakes a blend of styles
                return
            text = Text(
                self.tokenizer,
                job.ids,
                job.params,
                seed=job.seed,
                index=job.started,
                context=self.context,
                logprobs=job.logprobs,
            )
            job.started += 1
            self._owner[text] = job
            self._writer.add(text)

    def _deliver(self, found: list[tuple[Text, Event]]) -> None:
        """Each job's events of a step; jobs that are complete or have failed leave."""
        by_job: dict[Job, list[Event]] = {}
        tokens = 0
        for text, event in found:
            job = self._owner.get(text)
            if job is None:  # a sibling's failure has ended the job
                continue
            by_job.setdefault(job, []).append(event)
            tokens += event.token_id is not None
            if event.kind == "error":
                self._fail(job, by_job.pop(job))
            elif event.kind == "done":
                job.ended += 1
                del self._owner[text]
        now = time.monotonic()
        with self._changed:
            self._counts["tokens"] += tokens
            self._rate.append((now, tokens))
            while now - self._rate[0][0] >= RATE_S:
                self._rate.popleft()
        for job, events in by_job.items():
            if job.ended == job.params.n:
                self._leave(job, events, "finished")
            else:
                job.put(events)

    def _fail(self, job: Job, events: list[Event]) -> None:
        """A job whose last event is an error: its other samples stop."""
        for text in [text for text, owner in self._owner.items() if owner is job]:
            if text in self._writer.texts:
                self._writer.remove(text)
            del self._owner[text]
        self._leave(job, events, "failed")

    def _start_over(self, error: Exception) -> None:
        """Something broke outside any one text: everyone is told, and the engine goes on with an empty cache."""
        message = f"the engine failed: {str(error) or type(error).__name__}"
        with self._changed:
            jobs, self._jobs = self._jobs, []
            scores, self._scores = list(self._scores), deque()
            self._counts["failed"] += len(jobs)
        self._owner = {}
        for future, _ in scores:
            future.set_exception(EngineError(message))
        for job in jobs:
            job.put([Event(0, "error", message=message)], over=True)
        self._writer = Writer(self.model, self.slots)

    def _score_on(self) -> None:
        """One chunk of the oldest text to be scored."""
        future, steps = self._scores[0]
        try:
            if self._closing is not None and time.monotonic() >= self._closing:
                raise EngineError("the engine is closed")
            scores = next(steps)
        except Exception as error:
            self._scores.popleft()
            future.set_exception(error)
            return
        if scores is not None:
            self._scores.popleft()
            future.set_result(scores)

    def _scored(self, ids: list[int], top: int) -> Iterator[list[TokenScore] | None]:
        """None after each chunk, the scores after the last."""
        cache = self.model.new_cache(1)
        found: list[tuple[float | None, int | None, list[tuple[int, str, float]]]] = [(None, None, [])]
        at = 0
        while at < len(ids) - 1:
            if cache.length[0] == self.context:
                cache.reset(0)
                for start in range(at - self.context // 2, at, CHUNK):
                    self.model.prefill(ids[start : min(start + CHUNK, at)], cache, 0)
                    yield None
            stop = min(at + CHUNK, at + self.context - cache.length[0], len(ids) - 1)
            logits = self.model.prefill(ids[at:stop], cache, 0, every=True)
            found += self._judged(logits.cpu(), ids[at + 1 : stop + 1], top)
            at = stop
            yield None
        yield self._placed(ids, found)

    @torch.inference_mode()
    def _judged(
        self, logits: Tensor, ids: list[int], top: int
    ) -> list[tuple[float, int, list[tuple[int, str, float]]]]:
        """(log-probability, rank, likeliest) of each of `ids` under its row of logits [T, N]."""
        logp = logits.log_softmax(-1)
        own = logp.gather(1, torch.tensor(ids)[:, None])  # [T, 1]
        ranks = (logp > own).sum(1) + 1
        values, others = logp.topk(min(top, logp.size(1)))
        return [
            (value, rank, [(id, self.tokenizer.decode([id]), other) for id, other in zip(row, likely, strict=True)])
            for value, rank, row, likely in zip(
                own[:, 0].tolist(), ranks.tolist(), others.tolist(), values.tolist(), strict=True
            )
        ]

    def _placed(
        self, ids: list[int], found: Sequence[tuple[float | None, int | None, list[tuple[int, str, float]]]]
    ) -> list[TokenScore]:
        """Scores with the characters that each token completes."""
        stream = self.tokenizer.stream()
        scores, start = [], 0
        for number, (id, (logprob, rank, top)) in enumerate(zip(ids, found, strict=True)):
            text = stream.feed(id) + (stream.flush() if number == len(ids) - 1 else "")
            scores.append(TokenScore(id, text, start, logprob, rank, top))
            start += len(text)
        return scores
