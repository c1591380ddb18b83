"""A Lambda runtime that can stream: asks the Runtime API for events and answers them, function URLs part by part.

Lambda's own client for Python (awslambdaric) sends an answer only when it is whole. The protocol:
https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html and, for streamed answers,
https://docs.aws.amazon.com/lambda/latest/dg/runtimes-custom.html#runtimes-custom-response-streaming.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

API = "/2018-06-01/runtime"
HEAD_END = bytes(8)  # separates a streamed answer's status and headers from its body

Event = dict[str, Any]


@dataclass
class Context:
    """What a handler is told besides the event."""

    aws_request_id: str
    deadline_ms: int
    invoked_function_arn: str = ""

    def get_remaining_time_in_millis(self) -> int:
        return max(0, self.deadline_ms - round(time.time() * 1000))


class Answer:
    """The answer to one event, sent in chunks; `start` sends its status and headers."""

    def __init__(self, line: http.client.HTTPConnection, request_id: str):
        self.line, self.path = line, f"{API}/invocation/{request_id}/response"
        self.started = False

    def start(self, status: int, headers: dict[str, str]) -> Callable[[bytes], None]:
        self.line.putrequest("POST", self.path)
        self.line.putheader("Content-Type", "application/vnd.awslambda.http-integration-response")
        self.line.putheader("Lambda-Runtime-Function-Response-Mode", "streaming")
        self.line.putheader("Transfer-Encoding", "chunked")
        self.line.endheaders()
        self.started = True
        self.send(json.dumps({"statusCode": status, "headers": headers}).encode() + HEAD_END)
        return self.send

    def send(self, part: bytes) -> None:
        if part:
            self.line.send(b"%x\r\n%s\r\n" % (len(part), part))

    def end(self) -> None:
        self.line.send(b"0\r\n\r\n")
        self.line.getresponse().read()


def serve(
    handle: Callable[[Event, Any], Any],
    respond: Callable[[Event, Any, Callable[[int, dict[str, str]], Callable[[bytes], None]]], None],
    prepare: Callable[[], Any],
) -> None:
    """Answer events until the environment ends: those of a function URL by `respond`, all others by `handle`.

    `prepare` is called before the first event; what it raises ends the environment as a failed start.
    """
    place = os.environ["AWS_LAMBDA_RUNTIME_API"]
    try:
        prepare()
    except Exception as error:
        _tell(place, f"{API}/init/error", error)
        raise
    line = http.client.HTTPConnection(place)
    while True:
        line.request("GET", f"{API}/invocation/next")
        found = line.getresponse()
        event = json.loads(found.read())
        context = Context(
            found.headers["Lambda-Runtime-Aws-Request-Id"],
            int(found.headers.get("Lambda-Runtime-Deadline-Ms", "0")),
            found.headers.get("Lambda-Runtime-Invoked-Function-Arn", ""),
        )
        answer = Answer(http.client.HTTPConnection(place), context.aws_request_id)
        try:
            if "http" in event.get("requestContext", {}):
                respond(event, context, answer.start)
                answer.end()
            else:
                body = json.dumps(handle(event, context)).encode()
                line.request("POST", answer.path, body, {"Content-Type": "application/json"})
                line.getresponse().read()
        except Exception as error:
            print(json.dumps({"event": "runtime", "error": type(error).__name__}), flush=True)
            if not answer.started:
                _tell(place, f"{API}/invocation/{context.aws_request_id}/error", error)
        finally:
            with contextlib.suppress(OSError):
                answer.line.close()


def _tell(place: str, path: str, error: Exception) -> None:
    """Report an error by its class alone: its message may quote the request."""
    body = json.dumps({"errorMessage": "see the function's log", "errorType": type(error).__name__})
    line = http.client.HTTPConnection(place)
    line.request("POST", path, body, {"Lambda-Runtime-Function-Error-Type": f"Runtime.{type(error).__name__}"})
    line.getresponse().read()
    line.close()
