"""Streaming: the protocol's messages, their framing as server-sent events or JSON lines, and the streamed response.

>>> async for message in messages(generation): ...     # the same on WebSocket, server-sent events and JSON lines
>>> StreamResponse(framed(messages(generation), sse), [generation], SSE_TYPE, stall_s=30)
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from server.disconnect import cancelled_on_disconnect, wait_for_disconnect
from server.errors import ApiError, unexpected
from server.generation import Generation, finish_all
from server.logs import LOG

if TYPE_CHECKING:
    from inference.engine import Event

SSE_TYPE = "text/event-stream"
LINES_TYPE = "application/jsonlines"
PING_S = 15.0  # a comment keeps proxies from closing a silent event stream
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


def json_bytes(value: Any) -> bytes:
    """JSON on one line, also for readers that end lines at Unicode's separators (Python's splitlines does)."""
    text = ENCODER.encode(value)
    return (text if text.isascii() else text.translate(LINE_ENDS)).encode()


def sse(value: Any) -> bytes:
    """One server-sent event whose data is `value` as JSON."""
    return b"data: " + json_bytes(value) + b"\n\n"


def json_line(value: Any) -> bytes:
    """One line of JSON."""
    return json_bytes(value) + b"\n"


async def framed(values: AsyncGenerator[dict[str, Any]], frame: Callable[[Any], bytes]) -> AsyncGenerator[bytes]:
    """Each value as the bytes that `frame` (`sse` or `json_line`) makes of it."""
    async with aclosing(values) as items:
        async for item in items:
            yield frame(item)


async def messages(generation: Generation, flush_s: float = 0.0, before: str = "") -> AsyncGenerator[dict[str, Any]]:
    """`started`, then `token` after `token`, then `complete` or `error`: the protocol of every streaming surface.

    A message holds one token, or with `flush_s` what a sample wrote in that many seconds (the first goes at once).
    before: what each text begins with, in a message of its own: the prompt or nothing.
    """
    yield {
        "type": "started",
        "request_id": generation.request_id,
        "n": generation.params.n,
        "seed": generation.job.seed,
        "prompt_tokens": generation.job.prompt_tokens,
        "truncated": generation.job.truncated,
    }
    seq = 0
    for index in range(generation.params.n if before else 0):
        yield {"type": "token", "request_id": generation.request_id, "seq": seq, "index": index, "text": before}
        seq += 1
    try:
        async with aclosing(text_pieces(generation, flush_s)) as pieces:
            async for index, text in pieces:
                yield {"type": "token", "request_id": generation.request_id, "seq": seq, "index": index, "text": text}
                seq += 1
    except ApiError as error:
        yield error_message(error, generation.request_id)
        return
    except Exception:
        yield error_message(unexpected("stream", generation.request_id), generation.request_id)
        return
    yield {
        "type": "complete",
        "request_id": generation.request_id,
        "finish_reason": generation.reasons[0],
        "usage": generation.usage(),
        "streamed": True,
        "seed": generation.job.seed,
        "samples": [
            {"index": index, "finish_reason": reason, "tokens": generation.counts[index]}
            for index, reason in enumerate(generation.reasons)
        ],
    }


def error_message(error: ApiError, request_id: str | None) -> dict[str, Any]:
    """The protocol's `error` message."""
    return {"type": "error", "request_id": request_id, **error.body()}


async def text_pieces(generation: Generation, flush_s: float) -> AsyncGenerator[tuple[int, str]]:
    """(sample, text) as it is written; with `flush_s`, each sample's text coalesced for that many seconds."""
    async with aclosing(generation.events()) as events:
        if flush_s:
            async with aclosing(coalesced_tokens(events, flush_s)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        async for event in events:
            if event.text:
                yield event.index, event.text


async def coalesced_tokens(events: AsyncGenerator[Event], flush_s: float) -> AsyncGenerator[tuple[int, str]]:
    """(sample, text) at most once in `flush_s` seconds for each sample; the first piece goes at once."""
    buffered: dict[int, list[str]] = {}
    due = 0.0
    upcoming: asyncio.Future[Event] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(anext(events))
            wait = max(0.0, due - time.monotonic()) if buffered else None
            await asyncio.wait({upcoming}, timeout=wait)
            ended = False
            if upcoming.done():
                try:
                    event = upcoming.result()
                    if event.text:
                        buffered.setdefault(event.index, []).append(event.text)
                except StopAsyncIteration:
                    ended = True
                upcoming = None
            if buffered and (ended or time.monotonic() >= due):
                for index, texts in sorted(buffered.items()):
                    yield index, "".join(texts)
                buffered.clear()
                due = time.monotonic() + flush_s
            if ended:
                return
    finally:
        if upcoming is not None:
            upcoming.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, ApiError):
                await upcoming


async def event_frames(
    generation: Generation, frames: Callable[[Event], Iterable[bytes]], error_frame: Callable[[ApiError], bytes]
) -> AsyncGenerator[bytes]:
    """The `frames` of each event of a generation; ends with an `error_frame` where it fails midway."""
    try:
        async with aclosing(generation.events()) as events:
            async for event in events:
                for frame in frames(event):
                    yield frame
    except ApiError as error:
        yield error_frame(error)
    except Exception:
        yield error_frame(unexpected("stream", generation.request_id))


async def whole_answer(request: Request, generations: Sequence[Generation], answer: Callable[[], Any]) -> Response:
    """`answer()` as JSON, once all generations are complete; they end as soon as the client hangs up."""
    try:
        await cancelled_on_disconnect(request, finish_all(generations))
        return JSONResponse(answer())
    finally:
        for generation in generations:
            generation.close()


class StreamResponse(Response):
    """A body sent piece by piece, which ends its generations as soon as the client hangs up or stops reading.

    Server-sent events get a comment whenever nothing was sent for `PING_S`. A client that leaves its stream unread for
    `stall_s` loses it: the response is not completed, so that the cut can be seen.
    """

    def __init__(
        self, chunks: AsyncGenerator[bytes], generations: Sequence[Generation], media_type: str, stall_s: float
    ):
        self.chunks, self.generations, self.stall_s = chunks, generations, stall_s
        self.status_code, self.media_type, self.background = 200, media_type, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.sent_at = 0.0
        self.sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = (self._send_all(send), wait_for_disconnect(receive), self._until_stalled())
        tasks = [asyncio.create_task(one) for one in work]
        if self.media_type == SSE_TYPE:
            tasks.append(asyncio.create_task(self._ping(send)))
        try:
            await asyncio.wait(tasks[:3], return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
            elif tasks[2].done():
                LOG.info("stalled", extra={"fields": {"request_id": self.generations[0].request_id}})
        finally:
            for generation in self.generations:
                generation.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                await self._send(send, chunk, True)
        await self._send(send, b"", False)

    async def _send(self, send: Send, chunk: bytes, more: bool) -> None:
        self.sending_since = time.monotonic()
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self.sent_at, self.sending_since = time.monotonic(), None

    async def _until_stalled(self) -> None:
        """Returns when one piece has waited `stall_s` for its client: cheaper than a timeout around each piece."""
        while True:
            since = self.sending_since
            await asyncio.sleep(self.stall_s if since is None else since + self.stall_s - time.monotonic())
            if since is not None and since == self.sending_since:
                return

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_S)
            if self.sent_at and time.monotonic() - self.sent_at >= PING_S:
                await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
