"""From the engine's events to what goes over the wire: protocol messages, replies, and OpenAI's completions.

>>> run = Run(engine.submit("The fog", params), params, request_id="a1")
>>> async for message in messages(run): ...        # WebSocket, server-sent events, JSON lines: the same objects
>>> reply = generate_reply(await collect(run), "model")
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError

if TYPE_CHECKING:
    from config import GenerationParams
    from inference.engine import Event, GenerationRequest

LOG = logging.getLogger("api")
PING_S = 15.0  # a comment keeps proxies from closing a silent event stream


@dataclass(eq=False)
class Run:
    """One prompt being written: the engine's job, what has come of it, and how to end it.

    `close()` must be called when nobody wants the text any more; `on_end` then hears of it once.
    """

    job: GenerationRequest
    params: GenerationParams
    request_id: str
    on_first: Callable[[float], None] = lambda seconds: None
    on_end: Callable[[Run], None] = lambda run: None
    begun: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    tokens: int = 0
    interrupted: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        n = self.params.n
        self.pieces: list[list[str]] = [[] for _ in range(n)]
        self.counts = [0] * n
        self.reasons: list[str | None] = [None] * n
        self.records: list[list[Event]] = [[] for _ in range(n)]

    async def events(self) -> AsyncGenerator[Event]:
        """The job's events, noted on the way; ApiError when the engine fails or the server stops."""
        async for event in self.job:
            if event.kind == "token":
                if self.first_s is None:
                    self.first_s = time.monotonic() - self.begun
                    self.on_first(self.first_s)
                if event.token_id is not None:
                    self.tokens += 1
                    self.counts[event.index] += 1
                    self.records[event.index].append(event)
            elif event.kind == "done":
                if self.interrupted and event.finish_reason == "cancelled":
                    break
                self.reasons[event.index] = event.finish_reason
            elif event.kind == "error":
                LOG.error("engine", extra={"fields": {"request_id": self.request_id, "message": event.message}})
                raise ApiError(500, "the text could not be written", code="engine_failed", kind="server_error")
            if event.text:
                self.pieces[event.index].append(event.text)
            yield event
        if self.interrupted and None in self.reasons:
            raise shutting_down()

    def text(self, index: int) -> str:
        return "".join(self.pieces[index])

    def usage(self) -> dict[str, int]:
        return usage(self.job.prompt_tokens, self.tokens)

    def interrupt(self) -> None:
        """The server stops: whoever reads this run is told so."""
        self.interrupted = True
        self.job.cancel()

    def close(self) -> None:
        """Free the engine's slots; harmless when the text is complete."""
        if not self.ended:
            self.ended = True
            self.job.cancel()
            self.on_end(self)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", kind="unavailable_error", retry_after=5)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def collect(run: Run) -> Run:
    """The run, completed."""
    async with aclosing(run.events()) as events:
        async for _ in events:
            pass
    return run


def error_message(error: ApiError, request_id: str | None) -> dict[str, Any]:
    return {"type": "error", "request_id": request_id, **error.body()}


def unexpected(where: str, request_id: str | None) -> ApiError:
    """Log the exception being handled; the client learns only that there was one."""
    LOG.exception(where, extra={"fields": {"request_id": request_id}})
    return ApiError(500, "the server failed; the log says more", code="internal_error", kind="server_error")


async def messages(run: Run, flush_s: float = 0.0) -> AsyncGenerator[dict[str, Any]]:
    """`started`, then `token` after `token`, then `complete` or `error`: the protocol of every streaming surface.

    A message holds one token, or with `flush_s` what a sample wrote in that many seconds (the first goes at once).
    """
    yield {
        "type": "started",
        "request_id": run.request_id,
        "n": run.params.n,
        "seed": run.job.seed,
        "prompt_tokens": run.job.prompt_tokens,
        "truncated": run.job.truncated,
    }
    seq = 0
    try:
        async with aclosing(pieces(run, flush_s)) as written:
            async for index, text in written:
                yield {"type": "token", "request_id": run.request_id, "seq": seq, "index": index, "text": text}
                seq += 1
    except ApiError as error:
        yield error_message(error, run.request_id)
        return
    except Exception:
        yield error_message(unexpected("stream", run.request_id), run.request_id)
        return
    yield {
        "type": "complete",
        "request_id": run.request_id,
        "finish_reason": run.reasons[0],
        "usage": run.usage(),
        "streamed": True,
        "seed": run.job.seed,
        "samples": [
            {"index": index, "finish_reason": reason, "tokens": run.counts[index]}
            for index, reason in enumerate(run.reasons)
        ],
    }


async def pieces(run: Run, flush_s: float) -> AsyncGenerator[tuple[int, str]]:
    """(sample, text) as it is written; with `flush_s`, each sample's text gathered for that many seconds."""
    async with aclosing(run.events()) as events:
        if not flush_s:
            async for event in events:
                if event.text:
                    yield event.index, event.text
            return
        held: dict[int, list[str]] = {}
        due = 0.0
        upcoming: asyncio.Future[Event] | None = None
        try:
            while True:
                upcoming = upcoming or asyncio.ensure_future(anext(events))
                wait = max(0.0, due - time.monotonic()) if held else None
                await asyncio.wait({upcoming}, timeout=wait)
                ended = False
                if upcoming.done():
                    try:
                        event = upcoming.result()
                        if event.text:
                            held.setdefault(event.index, []).append(event.text)
                    except StopAsyncIteration:
                        ended = True
                    upcoming = None
                if held and (ended or time.monotonic() >= due):
                    for index, texts in sorted(held.items()):
                        yield index, "".join(texts)
                    held.clear()
                    due = time.monotonic() + flush_s
                if ended:
                    return
        finally:
            if upcoming is not None:
                upcoming.cancel()
                with suppress(asyncio.CancelledError, StopAsyncIteration, ApiError):
                    await upcoming


def generate_reply(run: Run, model: str) -> dict[str, Any]:
    """The JSON of `/generate` for a completed run."""
    return {
        "generated_text": run.text(0),
        "finish_reason": run.reasons[0],
        "usage": run.usage(),
        "seed": run.job.seed,
        "samples": [
            {"index": index, "text": run.text(index), "finish_reason": reason, "tokens": run.counts[index]}
            for index, reason in enumerate(run.reasons)
        ],
        "request_id": run.request_id,
        "model": model,
        "truncated": run.job.truncated,
    }


LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


def dumps(value: Any) -> bytes:
    """JSON on one line, also for readers that end lines at Unicode's separators (Python's splitlines does)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (text if text.isascii() else text.translate(LINE_ENDS)).encode()


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def json_line(value: Any) -> bytes:
    return dumps(value) + b"\n"


async def encoded(values: AsyncGenerator[dict[str, Any]], form: Callable[[Any], bytes]) -> AsyncGenerator[bytes]:
    """Each value as bytes."""
    async with aclosing(values) as items:
        async for item in items:
            yield form(item)


async def gone(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """A body sent piece by piece, which ends its runs as soon as the client hangs up or stops reading.

    Server-sent events get a comment whenever nothing was sent for `PING_S`. A client that leaves its stream unread for
    `stall_s` loses it: the response is not completed, so that the cut can be seen.
    """

    def __init__(self, chunks: AsyncGenerator[bytes], runs: Sequence[Run], media_type: str, stall_s: float):
        self.chunks, self.runs, self.stall_s = chunks, runs, stall_s
        self.status_code, self.media_type, self.background = 200, media_type, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.create_task(self._pump(send)), asyncio.create_task(gone(receive))]
        if self.media_type == "text/event-stream":
            tasks.append(asyncio.create_task(self._ping(send)))
        try:
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        except TimeoutError:
            LOG.info("stalled", extra={"fields": {"request_id": self.runs[0].request_id}})
        finally:
            for run in self.runs:
                run.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                await self._send(send, chunk, True)
        await self._send(send, b"", False)

    async def _send(self, send: Send, chunk: bytes, more: bool) -> None:
        async with asyncio.timeout(self.stall_s):
            await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self.sent_at = time.monotonic()

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_S)
            if self.sent_at and time.monotonic() - self.sent_at >= PING_S:
                await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})


@dataclass
class Completion:
    """One `/v1/completions` request: its runs (one a prompt) and how its answer is shaped."""

    id: str
    model: str
    runs: list[Run]
    logprobs: int | None
    echoes: list[Echo]
    decode: Callable[[Iterable[int]], str]
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> dict[str, int]:
        return usage(sum(run.job.prompt_tokens for run in self.runs), sum(run.tokens for run in self.runs))

    def frame(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def reply(self) -> dict[str, Any]:
        """The whole answer, once all runs are complete."""
        choices: list[dict[str, Any]] = []
        for run, echo in zip(self.runs, self.echoes, strict=True):
            for sample in range(run.params.n):
                logprobs = None
                if self.logprobs is not None:
                    logprobs = echo.joined(self.token_logprobs(run.records[sample], len(echo.text)))
                text = echo.text + run.text(sample)
                choices.append(choice(len(choices), text, openai_reason(run.reasons[sample]), logprobs))
        return self.frame(choices, usage=self.usage())

    def token_logprobs(self, events: Sequence[Event], offset: int) -> dict[str, list[Any]]:
        """OpenAI's logprobs object for tokens written from `offset` characters on."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for event in events:
            assert event.token_id is not None
            text = self.decode([event.token_id])
            top = {text: event.logprob, **{word: value for _, word, value in event.top}} if self.logprobs else None
            for key, value in zip(found, (text, event.logprob, top, offset), strict=True):
                found[key].append(value)
            offset += len(event.text)
        return found

    async def chunks(self, include_usage: bool) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, ending with `[DONE]`; an error object where it fails midway."""
        extra: dict[str, Any] = {"usage": None} if include_usage else {}
        try:
            first = 0
            offsets: dict[int, int] = {}
            for run, echo in zip(self.runs, self.echoes, strict=True):
                for index in range(first, first + run.params.n):
                    offsets[index] = len(echo.text)
                    if echo.text:
                        logprobs = None if self.logprobs is None else echo.joined(self.token_logprobs([], 0))
                        yield sse(self.frame([choice(index, echo.text, None, logprobs)], **extra))
                first += run.params.n
            async with aclosing(merged(self.runs)) as events:
                async for index, event in events:
                    logprobs = None
                    if event.kind == "token" and event.token_id is not None and self.logprobs is not None:
                        logprobs = self.token_logprobs([event], offsets[index])
                    if event.text or logprobs:
                        offsets[index] += len(event.text)
                        yield sse(self.frame([choice(index, event.text, None, logprobs)], **extra))
                    if event.kind == "done":
                        yield sse(self.frame([choice(index, "", openai_reason(event.finish_reason), None)], **extra))
            if include_usage:
                yield sse(self.frame([], usage=self.usage()))
        except ApiError as error:
            yield sse(error.body())
        except Exception:
            yield sse(unexpected("stream", self.id).body())
        yield b"data: [DONE]\n\n"


@dataclass
class Echo:
    """What an answer begins with: nothing, or the prompt and its tokens' log-probabilities."""

    text: str = ""
    logprobs: dict[str, list[Any]] | None = None

    def joined(self, written: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The prompt's log-probabilities followed by those of what was written."""
        if self.logprobs is None:
            return written
        return {key: values + written[key] for key, values in self.logprobs.items()}


def choice(index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def openai_reason(reason: str | None) -> str:
    """OpenAI knows two ways for a text to end."""
    return "stop" if reason == "stop" else "length"


async def merged(runs: Sequence[Run]) -> AsyncGenerator[tuple[int, Event]]:
    """(choice, event) of all runs as they come; choices are numbered prompt by prompt."""
    arrived: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue(maxsize=64)

    async def pump(first: int, run: Run) -> None:
        try:
            async with aclosing(run.events()) as events:
                async for event in events:
                    await arrived.put((first + event.index, event))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    tasks = []
    first = 0
    for run in runs:
        tasks.append(asyncio.create_task(pump(first, run)))
        first += run.params.n
    try:
        left = len(tasks)
        while left:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
