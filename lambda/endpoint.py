"""The SageMaker endpoint's answer to one request, as messages of the WebSocket protocol.

>>> for message in messages(settings, {"prompt": "It was"}, "trace", reader): ...
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from botocore.exceptions import ClientError
from limits import InvalidRequest, Message
from wire import POST_CHARACTERS, RelaySettings, runtime

REMEMBER_S = 600.0  # how long to remember that an endpoint cannot stream


def lines(parts: Iterable[bytes]) -> Iterator[Message]:
    """JSON objects, one a line, from byte chunks split anywhere; an unfinished last line raises ValueError."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            if line.strip():
                yield json.loads(line)
    if rest.strip():
        yield json.loads(rest)


def _streamed(settings: RelaySettings, body: bytes, reader: Any) -> Iterator[Message]:
    answer = runtime().invoke_endpoint_with_response_stream(
        EndpointName=settings.endpoint, ContentType="application/json", Accept="application/jsonlines", Body=body
    )
    reader.body = answer["Body"]
    yield from lines(event["PayloadPart"]["Bytes"] for event in reader.body if "PayloadPart" in event)


def _buffered(settings: RelaySettings, body: bytes) -> Iterator[Message]:
    """The messages made from a complete response, for endpoints that cannot stream (serverless ones)."""
    yield {"type": "started"}
    answer = runtime().invoke_endpoint(
        EndpointName=settings.endpoint, ContentType="application/json", Accept="application/json", Body=body
    )
    whole = json.loads(answer["Body"].read())
    if "error" in whole:
        yield {"type": "error", "error": whole["error"]}
        return
    samples = whole.get("samples") or [whole]
    for index, sample in enumerate(samples):
        text = sample if isinstance(sample, str) else sample.get("text") or sample.get("generated_text") or ""
        for start in range(0, len(text), POST_CHARACTERS):
            yield {"type": "token", "index": index, "text": text[start : start + POST_CHARACTERS]}
    kept = {key: whole[key] for key in ("finish_reason", "usage", "seed") if key in whole}
    yield {"type": "complete", **kept, "streamed": False}


_cannot_stream: dict[str, float] = {}


def _refuses_streaming(error: Exception) -> bool:
    """Whether the service says that this endpoint cannot stream; other validation errors are no reason not to try again."""
    said = getattr(error, "response", {}).get("Error", {})
    refused = said.get("Code") in ("ValidationError", "ValidationException")
    return refused and "stream" in said.get("Message", "").lower()


def messages(settings: RelaySettings, request: Message, trace: str, reader: Any) -> Iterator[Message]:
    """The endpoint's response to `request`, as messages of the WebSocket protocol.

    In mode `auto`, an endpoint that does not support the streaming call gets a buffered request instead, and for the
    next ten minutes only buffered requests.
    """

    def body(stream: bool) -> bytes:
        return json.dumps({**request, "stream": stream, "request_id": trace}).encode()

    whole = time.monotonic() - _cannot_stream.get(settings.endpoint, -math.inf) < REMEMBER_S
    if settings.mode == "stream" or (settings.mode == "auto" and not whole):
        try:
            yield from _streamed(settings, body(True), reader)
            return
        except ClientError as error:
            if settings.mode != "auto" or not _refuses_streaming(error) or reader.body is not None:
                raise
            _cannot_stream[settings.endpoint] = time.monotonic()
    yield from _buffered(settings, body(False))


_descriptions: dict[str, tuple[float, Message | None]] = {}


def description(settings: RelaySettings) -> Message | None:
    """What the container says of its model and settings, asked every ten minutes at most; None if it does not say.

    A container that does not know the question refuses it, or writes one token.
    """
    known = _descriptions.get(settings.endpoint)
    if known is not None and time.monotonic() - known[0] < REMEMBER_S:
        return known[1]
    body = json.dumps({"action": "settings", "prompt": "", "max_tokens": 1}).encode()
    try:
        answer = runtime().invoke_endpoint(
            EndpointName=settings.endpoint, ContentType="application/json", Accept="application/json", Body=body
        )
        said = json.loads(answer["Body"].read())
    except ClientError as error:
        if error.response.get("OriginalStatusCode") != 400:
            raise
        said = {}
    own = said if isinstance(said.get("model"), str) and isinstance(said.get("settings"), dict) else None
    _descriptions[settings.endpoint] = (time.monotonic(), own)
    return own


def explain(error: BaseException) -> Message:
    """The error sent to the client after an endpoint failure; the container's own error where it gave one."""
    response = getattr(error, "response", None) or {}
    code = response.get("Error", {}).get("Code", "")
    if code == "ModelError":
        try:
            inner = json.loads(response.get("OriginalMessage") or "")["error"]
            return {key: inner.get(key) for key in ("message", "type", "param", "code")}
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
    busy = code in ("ThrottlingException", "ServiceUnavailable", "ModelNotReadyException") or (
        code == "ModelError" and response.get("OriginalStatusCode") in (429, 503)
    )
    if busy:
        return InvalidRequest(
            "the model is busy or starting: try again", code="unavailable", type="unavailable_error"
        ).error
    if isinstance(error, ValueError) or type(error).__name__ in ("ProtocolError", "IncompleteRead"):
        return InvalidRequest("the endpoint's answer broke off", code="stream_truncated", type="server_error").error
    if "Timeout" in type(error).__name__:
        return InvalidRequest("the endpoint went silent", code="stalled", type="server_error").error
    return InvalidRequest("the endpoint failed", code="endpoint_failed", type="server_error").error
