"""Many writers, one model: requests join and leave between steps, and none changes another's text.

    >>> engine = Engine.load("runs/sample/best")
    >>> job = engine.submit("The old house", GenerationParams(max_tokens=50, seed=7))
    >>> for event in job:                       # or: async for event in job
    ...     print(event.text, end="")

One thread owns the model. It takes waiting requests into free slots, lets every running text grow by a token, and hands
the pieces to readers that may be slow, gone, or in an event loop of their own.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from config import GenerationParams
from generate import Piece, Result, Row, Writer, encode_prompt, fresh_seed, prompt_window

if TYPE_CHECKING:
    from model import GPT
    from tokenizer import Tokenizer

STALL_S = 60.0  # a reader that takes nothing for this long is given up
SPEED_S = 5.0  # tokens/s is the mean over so many seconds


class EngineError(RuntimeError):
    """The engine cannot take or finish a request; the message says why."""


class QueueFull(EngineError):
    """No place in the queue; try again after `retry_after` seconds."""

    def __init__(self, retry_after: float):
        super().__init__(f"the queue is full: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass
class Event:
    """One thing that happened to sample `index` of a job. `seq` counts a job's events from 0."""

    index: int
    kind: Literal["started", "token", "done", "error"]
    text: str = ""
    token_id: int | None = None
    logprob: float | None = None
    top: list[tuple[int, str, float]] = field(default_factory=list)
    finish_reason: str | None = None
    message: str | None = None
    seq: int = 0
    usage: dict[str, int] | None = None


@dataclass
class TokenScore:
    """A token of a text: its probability given what stands before it (natural log), its rank, what was likelier."""

    id: int
    text: str
    start: int
    logprob: float | None
    rank: int | None
    top: list[tuple[int, str, float]]


class Job:
    """A request on its way: iterate over its events in one thread or event loop; `cancel` from any."""

    def __init__(
        self, engine: Engine, ids: list[int], truncated: bool, params: GenerationParams, request_id: str, **more: Any
    ):
        self.engine, self.ids, self.params, self.id = engine, ids, params, request_id
        self.seed = params.seed if params.seed is not None else fresh_seed()
        self.prompt_tokens, self.truncated = len(ids), truncated
        self.logprobs: int | None = more["logprobs"]
        self.deadline: float | None = more["deadline"]
        self.rows: list[Row] = []
        self.left = set(range(params.n))  # samples that are not done
        self.cancelled = threading.Event()
        self.done = False
        self.results = [Result("", "cancelled", 0, self.seed, len(ids), truncated) for _ in range(params.n)]
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._loop: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._count = 0
        self.read_at = time.monotonic()

    def cancel(self) -> None:
        """End the job within two tokens; what was written stays."""
        self.cancelled.set()
        self.engine.wake()

    @property
    def paused(self) -> bool:
        """Whether its reader is so far behind that the text waits."""
        return len(self._events) >= self.engine.event_buffer

    def put(self, event: Event) -> None:
        """Hand an event to the reader (called on the model's thread)."""
        event.seq, self._count = self._count, self._count + 1
        if event.kind in ("token", "done"):
            result = self.results[event.index]
            result.text += event.text
            result.tokens += event.token_id is not None
            result.finish_reason = event.finish_reason or result.finish_reason
        if event.kind in ("done", "error"):
            self.left.discard(event.index)
        with self._changed:
            self._events.append(event)
            self.done = not self.left
            self._changed.notify_all()
            if self._loop:
                loop, flag = self._loop
                try:
                    loop.call_soon_threadsafe(flag.set)
                except RuntimeError:  # the reader's loop is closed
                    self.cancelled.set()

    def _take(self) -> Event:
        self.read_at = time.monotonic()
        was = self.paused
        event = self._events.popleft()
        if was and not self.paused:
            self.engine.wake()
        return event

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                while not self._events:
                    if self.done:
                        return
                    self._changed.wait()
                event = self._take()
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        flag = asyncio.Event()
        with self._changed:
            self._loop = (asyncio.get_running_loop(), flag)
        while True:
            with self._changed:
                event = self._take() if self._events else None
                over = event is None and self.done
                if event is None:
                    flag.clear()
            if event is not None:
                yield event
            elif over:
                return
            else:
                await flag.wait()

    def result(self) -> list[Result]:
        """Wait for the end; the finished samples. Raises EngineError if the model failed."""
        for event in self:
            if event.kind == "error":
                raise EngineError(event.message or "the model failed")
        return self.results


class Engine:
    """One model, one thread, `slots` texts at a time, `queue_size` requests waiting."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        slots: int = 16,
        queue_size: int = 64,
        max_tokens_limit: int = 4096,
        event_buffer: int = 1024,
        stall_s: float = STALL_S,
    ):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.slots, self.queue_size, self.max_tokens_limit = slots, queue_size, max_tokens_limit
        self.event_buffer, self.stall_s = event_buffer, stall_s
        self.context: int = model.config.block_size
        self.writer = Writer(model, tokenizer, slots)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self.rejected = self.finished = self.tokens = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._lock = threading.Condition()
        self._closing = self._cut = False
        self._poked = False
        self.thread = threading.Thread(target=self._work, name=f"engine-{name}", daemon=True)
        self.thread.start()

    @classmethod
    def load(
        cls, folder: Path | str, *, device: str = "auto", dtype: str = "auto", name: str = "", **limits: Any
    ) -> Engine:
        """An engine on a model folder, in the number format that this machine multiplies fastest."""
        from quantize import load_for_writing

        model, tokenizer, _ = load_for_writing(folder, device=device, dtype=dtype)
        path = Path(folder)
        return cls(
            model, tokenizer, name=name or (path.parent.name if path.name in ("best", "last") else path.name), **limits
        )

    def submit(
        self,
        prompt: str | Sequence[int],
        params: GenerationParams,
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
        logprobs: int | None = None,
        echo: bool = False,
    ) -> Job:
        """Queue a request. Raises QueueFull; ValueError for a prompt or settings the model cannot serve."""
        if params.n > self.slots:
            raise ValueError(f"n {params.n} is more than the {self.slots} texts written at once: ask for fewer")
        if params.max_tokens > self.max_tokens_limit:
            raise ValueError(
                f"max_tokens {params.max_tokens} is above the limit of {self.max_tokens_limit}: ask for fewer"
            )
        whole = encode_prompt(self.tokenizer, prompt)
        size = self.tokenizer.vocab_size
        bad = next((token for token in whole if not 0 <= token < size), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is not in 0..{size - 1}")
        ids, truncated = prompt_window(whole, self.context, params)
        end = None if deadline_s is None else time.monotonic() + deadline_s
        job = Job(self, ids, truncated, params, request_id or uuid.uuid4().hex, logprobs=logprobs, deadline=end)
        with self._lock:
            if self._closing:
                raise EngineError("the engine is closing: try again later")
            if len(self.waiting) >= self.queue_size:
                self.rejected += 1
                raise QueueFull(self._retry_after())
            self.waiting.append(job)
            self._poked = True
            self._lock.notify_all()
        return job

    def _retry_after(self) -> float:
        speed = self._speed() or 50.0
        ahead = sum(job.params.max_tokens * job.params.n for job in [*self.running, *self.waiting])
        return min(60.0, max(1.0, ahead / speed / max(1, self.slots)))

    def score(self, text: str, top: int = 5) -> list[TokenScore]:
        """Each token's probability, rank and `top` alternatives; runs between the steps of what is being written."""
        future: Future[list[TokenScore]] = Future()
        with self._lock:
            if self._closing:
                raise EngineError("the engine is closing: try again later")
            self.tasks.put((future, lambda: score(self.model, self.tokenizer, text, top)))
            self._poked = True
            self._lock.notify_all()
        return future.result()

    def stats(self) -> dict[str, Any]:
        """Counters, and what is going on now."""
        return {
            "running": sum(len(job.left) for job in self.running),
            "waiting": len(self.waiting),
            "rejected": self.rejected,
            "finished": self.finished,
            "tokens": self.tokens,
            "tokens_per_s": self._speed(),
            "slots": self.slots,
            "free_slots": len(self.writer.free),
        }

    def _speed(self) -> float:
        now = time.monotonic()
        recent = [(when, count) for when, count in list(self._recent) if now - when < SPEED_S]
        return sum(count for _, count in recent) / SPEED_S if recent else 0.0

    def wake(self) -> None:
        """Let the model's thread look again at what there is to do."""
        with self._lock:
            self._poked = True
            self._lock.notify_all()

    def close(self, timeout: float = 30.0, *, finish: bool = True) -> None:
        """Take no more requests; let running ones finish (or end them now), for at most `timeout` seconds."""
        with self._lock:
            self._closing, self._cut, self._poked = True, self._cut or not finish, True
            self._lock.notify_all()
        self.thread.join(timeout)
        if self.thread.is_alive():
            self._cut = True
            self.wake()
            self.thread.join(5.0)

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._poked and not any(not job.paused for job in self.running):
                    self._lock.wait(timeout=1.0 if self.running else None)
                    if self.running:
                        break
                self._poked = False
                over = self._closing and (self._cut or not (self.waiting or self.running)) and self.tasks.empty()
            if over:
                return self._end_all("cancelled")
            self._run_tasks()
            self._drop()
            self._admit()
            self._step()

    def _run_tasks(self) -> None:
        while not self.tasks.empty():
            future, task = self.tasks.get()
            try:
                future.set_result(task())
            except Exception as error:
                future.set_exception(error)

    def _drop(self) -> None:
        """End what was cancelled, is too late, or has a reader that stopped reading."""
        now = time.monotonic()
        for job in [*self.running, *self.waiting]:
            stalled = job.paused and now - job.read_at > self.stall_s
            if job.cancelled.is_set() or stalled:
                self._end(job, "cancelled")
            elif job.deadline is not None and now > job.deadline:
                self._end(job, "deadline")

    def _admit(self) -> None:
        while True:
            with self._lock:
                if not self.waiting or self.waiting[0].params.n > len(self.writer.free):
                    return
                job = self.waiting.popleft()
                self.running.append(job)
            try:
                job.rows = self.writer.begin(job.ids, job.params, job.seed, range(job.params.n), job.logprobs)
            except Exception as error:
                self._fail(job, error)

    def _step(self) -> None:
        jobs = [job for job in self.running if job.rows and not job.paused]
        rows = [row for job in jobs for row in job.rows]
        if not rows:
            return
        owner = {id(row): job for job in jobs for row in job.rows}
        try:
            pieces = self.writer.step(rows)
        except Exception as error:
            for job in jobs:
                self._fail(job, error)
            return
        count = sum(piece.token_id is not None for _, piece in pieces)
        self.tokens += count
        self._recent.append((time.monotonic(), count))
        while self._recent and time.monotonic() - self._recent[0][0] > SPEED_S:
            self._recent.popleft()
        for row, piece in pieces:
            self._hand_on(owner[id(row)], piece)
        for job in jobs:
            job.rows = [row for row in job.rows if not row.finished]
            if job.done:
                self._forget(job)
                self.finished += 1

    def _hand_on(self, job: Job, piece: Piece) -> None:
        if piece.finish_reason is None:
            job.put(Event(piece.index, "token", piece.text, piece.token_id, piece.logprob, piece.top))
            return
        if piece.message:
            job.put(Event(piece.index, "error", piece.text, message=piece.message))
            return
        job.put(Event(piece.index, "done", piece.text, finish_reason=piece.finish_reason, usage=self._usage(job)))

    @staticmethod
    def _usage(job: Job) -> dict[str, int]:
        written = sum(result.tokens for result in job.results)
        return {
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": job.prompt_tokens + written,
        }

    def _forget(self, job: Job) -> None:
        for row in job.rows:
            if row.slot >= 0:
                self.writer.end(row)
        job.rows = []
        with self._lock:
            if job in self.running:
                self.running.remove(job)
            if job in self.waiting:
                self.waiting.remove(job)

    def _end(self, job: Job, reason: str) -> None:
        self._forget(job)
        for index in sorted(job.left):
            job.put(Event(index, "done", finish_reason=reason, usage=self._usage(job)))
        self.finished += 1

    def _fail(self, job: Job, error: Exception) -> None:
        self._forget(job)
        for index in sorted(job.left):
            job.put(Event(index, "error", message=str(error) or type(error).__name__))

    def _end_all(self, reason: str) -> None:
        for job in [*self.running, *self.waiting]:
            self._end(job, reason)
        while not self.tasks.empty():
            self.tasks.get()[0].set_exception(EngineError("the engine was closed"))


def score(model: GPT, tokenizer: Tokenizer, text: str, top: int) -> list[TokenScore]:
    """Scores of a text's tokens. Longer texts than the context are read in windows that overlap by half."""
    import torch

    ids, block, pieces = tokenizer.encode(text), model.config.block_size, tokenizer.stream()
    if not ids:
        return []
    whole = [tokenizer.start, *ids] if tokenizer.eot is not None else ids
    lead = len(whole) - len(ids)
    found: list[TokenScore] = []
    start = 0
    with torch.inference_mode():
        lines: dict[int, Any] = {}
        first = 0
        while True:
            part = whole[first : first + block]
            logits = model(torch.tensor([part], device=model.wte.weight.device))[0].float().cpu().log_softmax(-1)
            for offset in range(len(part)):
                if first + offset not in lines:
                    lines[first + offset] = logits[offset]
            if first + block >= len(whole):
                break
            first += max(1, block // 2)
    for number, token in enumerate(ids):
        piece = pieces.feed(token)
        line = lines.get(number + lead - 1)
        if line is None:
            found.append(TokenScore(token, piece, start, None, None, []))
        else:
            best = line.topk(min(top, len(line))) if top else None
            likely = (
                []
                if best is None
                else [
                    (int(i), tokenizer.decode([int(i)]), float(v))
                    for v, i in zip(best.values, best.indices, strict=True)
                ]
            )
            value = line[token]
            found.append(TokenScore(token, piece, start, float(value), int((line > value).sum()) + 1, likely))
        start += len(piece)
    rest = pieces.flush()
    if rest:
        found[-1].text += rest
    return found
