"""The model inside Lambda: the relay's protocol with this process's own engine behind it, and no endpoint.

`writer.worker` is the asynchronous worker that `relay.router` starts, as `relay.worker` is for an endpoint. `respond` answers
a function URL with server-sent events. `python writer.py` is the image's runtime, which serves both kinds of event
(lambda/Dockerfile); `python -m awslambdaric writer.worker` runs the first kind alone.

    POST /generate {"prompt": "It was"}     text/event-stream: started, token, token, …, complete or error
    POST /stop     {"request_id": "…"}      ends that text
    GET  /settings                          the model, and the JSON schema of each sampling setting

Each with `Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import gc
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import relay  # noqa: E402
from limits import InvalidRequest, Message, described, identity, parse  # noqa: E402
from wire import Access, ConnectionClosed, RelaySettings, RequestTable, TokenTable  # noqa: E402

if TYPE_CHECKING:
    from server.service import Service

SLOTS = 16  # samples written at once at most
STATUS = {
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "too_many_requests": 429,
    "allowance_exceeded": 429,
    "unavailable": 503,
}
Start = Callable[[int, dict[str, str]], Callable[[bytes], None]]
"""Sends a response's status and headers; returns what sends each part of its body."""


@functools.cache
def service() -> Service:
    """The engine over the model that the image carries, loaded once in an environment."""
    from inference.engine import Engine
    from server.service import Service
    from server.settings import read_settings
    from storage.gpt2_format import folder_defaults

    folder = Path(os.environ.get("MODEL_FOLDER", "/opt/model"))
    slots = min(SLOTS, RelaySettings.read().max_samples)  # Lambda gives an environment one request at a time
    settings = read_settings(model=folder, slots=slots, max_tokens=100_000, max_n=128, deadline_s=900.0)
    engine = Engine.load(folder, device=settings.device, dtype=settings.dtype, slots=slots, max_tokens_limit=100_000)
    made = Service(settings, engine)
    made.folder, made.defaults = folder, folder_defaults(folder)
    return made


def description(settings: RelaySettings) -> Message:
    """What the model and its settings are."""
    from server.description import described as own

    return own(service())


def start() -> None:
    """Load the model while the environment is being made.

    Nothing of it is garbage: looking for some would take a tenth of the time, and again in the first texts.
    """
    gc.disable()
    try:
        service()
        gc.freeze()
    finally:
        gc.enable()


def messages(settings: RelaySettings, request: Message, trace: str, reader: relay.Reader) -> Iterator[Message]:
    """The engine's text for `request`, as messages of the WebSocket protocol."""
    loop = asyncio.new_event_loop()
    written = _written(request, trace, reader)
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(written))
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(written.aclose())
        loop.close()


async def _written(request: Message, trace: str, reader: relay.Reader) -> Any:
    from config import GenerationParams
    from server.errors import ApiError
    from server.streaming import error_message, messages

    given = {name: value for name, value in request.items() if name != "prompt" and value is not None}
    try:
        params = GenerationParams(**{**service().defaults, **given})
        generation = await service().start(request["prompt"], params, request_id=trace)
    except ApiError as error:
        yield error_message(error, trace)
        return
    reader.cancel = generation.job.cancel
    try:
        async with aclosing(messages(generation)) as heard:  # left open, it would outlive its event loop
            async for message in heard:
                yield message
    finally:
        generation.close()


def worker(event: Message, context: Any) -> Message:
    """Handle one generation, described by the router's `event`."""
    if event.get("action") == "settings":
        return relay.describe(event, description)
    return relay.work(event, context, messages)


class EventStream:
    """A connection that is an HTTP response: its messages are server-sent events."""

    def __init__(self, connection_id: str, send: Callable[[bytes], None]):
        self.id, self.endpoint, self.send = connection_id, "", send

    def post(self, message: Message) -> None:
        """Send one message; raises ConnectionClosed when the response can no longer be sent."""
        try:
            # in ASCII: some readers of lines also end them at Unicode's separators
            self.send(b"data: " + json.dumps(message, separators=(",", ":")).encode() + b"\n\n")
        except OSError:
            raise ConnectionClosed from None


def respond(event: Message, context: Any, start: Start) -> None:
    """Answer one request of the function URL (payload format 2.0).

    A page of another origin is answered only if ALLOWED_ORIGINS names it.
    """
    headers = {name.lower(): value for name, value in (event.get("headers") or {}).items()}
    shared = cross_origin(headers.get("origin"))
    try:
        _respond(event, context, start, headers, shared)
    except InvalidRequest as refused:
        relay.log("refused", code=refused.error["code"], param=refused.error["param"])
        _json(start, STATUS.get(str(refused.error["code"]), 400), {"error": refused.error}, shared)


def _json(start: Start, status: int, body: Message, headers: dict[str, str]) -> None:
    start(status, {"Content-Type": "application/json", **headers})(json.dumps(body).encode())


def cross_origin(origin: str | None) -> dict[str, str]:
    """The headers that let a page of this origin read the answer; none unless ALLOWED_ORIGINS names it."""
    if not origin or not os.environ.get("ALLOWED_ORIGINS") or not relay.origin_allowed(origin):
        return {}
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Headers": "authorization, content-type",
        "Access-Control-Allow-Methods": "GET, POST",
        "Vary": "Origin",
    }


def _respond(event: Message, context: Any, start: Start, headers: dict[str, str], shared: dict[str, str]) -> None:
    http = event["requestContext"]["http"]
    settings, asked = RelaySettings.read(), (http["method"], f"/{http['path'].strip('/')}")
    if http["method"] == "OPTIONS":
        start(204, shared)(b"")
        return
    token = relay.bearer(headers)
    access = TokenTable(settings).find(token) if token else None
    if access is None:
        raise InvalidRequest("send `Authorization: Bearer` with a token that has not expired", code="unauthorized")
    if not relay.origin_allowed(headers.get("origin")):
        raise InvalidRequest("pages of this origin are not admitted", code="forbidden")
    if asked == ("GET", "/settings"):
        _json(start, 200, described(description(settings), settings.max_tokens, settings.max_samples), shared)
        return
    if asked not in (("POST", "/generate"), ("POST", "/stop")):
        raise InvalidRequest("there is POST /generate, POST /stop and GET /settings", code="not_found")
    message = parse(body_of(event))
    requests = RequestTable(settings, f"http {access.id}")
    if asked[1] == "/stop":
        if not requests.request_stop(identity(message)):
            raise InvalidRequest("no such request of this token", param="request_id", code="not_found")
        _json(start, 200, {"stopping": True}, shared)
        return
    _generate(message, requests, access, context, start, shared)


def body_of(event: Message) -> str:
    """A request's body as text; InvalidRequest for what is not UTF-8."""
    body = event.get("body") or ""
    if event.get("isBase64Encoded"):
        try:
            return base64.b64decode(body).decode()
        except ValueError:
            raise InvalidRequest("the body is not text in UTF-8", code="bad_json") from None
    return str(body)


def _generate(
    message: Message, requests: RequestTable, access: Access, context: Any, start: Start, shared: dict[str, str]
) -> None:
    message.setdefault("request_id", uuid.uuid4().hex)
    job = relay.admitted(message, requests, access)
    try:
        sent = start(200, {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **shared})
        stream = EventStream(requests.connection_id, sent)
        with suppress(ConnectionClosed):
            stream.post({"type": "queued", "request_id": job["request_id"]})
        relay.work({"connection_id": stream.id, **job}, context, messages, stream)
    finally:
        if requests.end(job["request_id"]):  # nothing was written
            relay.settle(requests.settings, job, 0)


if __name__ != "__main__" and "AWS_LAMBDA_RUNTIME_API" in os.environ:
    start()

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(print(__doc__))
    import runtime_loop

    runtime_loop.serve(worker, respond, start)
