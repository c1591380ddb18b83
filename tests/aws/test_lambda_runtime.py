"""The handlers under Lambda's own Python runtime client, one process each, behind the local gateway."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import websockets
from aws_fakes import FakeContainer, ask, hear, text, words
from local_stack import Stack

from support.helpers import ROOT

if importlib.util.find_spec("awslambdaric") is None:
    pytest.skip("needs awslambdaric: pip install -r requirements-aws.txt", allow_module_level=True)


@dataclass
class Answer:
    """What an environment posted for an event: kind is `response` or `error`."""

    kind: str
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)


class RuntimeApi:
    """Lambda's Runtime API on a socket (https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html)."""

    def __init__(self) -> None:
        self.events: queue.Queue[tuple[str, dict[str, Any], float]] = queue.Queue()
        self.answers: dict[str, queue.Queue[Answer]] = {}
        outer = self

        class Api(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                request, event, timeout = outer.events.get()
                data = json.dumps(event).encode()
                self.send_response(200)
                self.send_header("Lambda-Runtime-Aws-Request-Id", request)
                self.send_header("Lambda-Runtime-Deadline-Ms", str(round((time.time() + timeout) * 1000)))
                self.send_header("Lambda-Runtime-Invoked-Function-Arn", "arn:aws:lambda:eu-west-1:0:function:f")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def chunks(self) -> Iterator[bytes]:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    return
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            def do_POST(self) -> None:
                *_, request, kind = self.path.split("/")
                answer = Answer(kind, dict(self.headers), list(self.chunks()))
                outer.answers.setdefault(request, queue.Queue()).put(answer)
                self.send_response(202)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
        self.server.daemon_threads = True
        self.place = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ask(self, event: dict[str, Any], seconds: float = 30) -> Answer:
        """An event for the environment, and its answer."""
        request = str(uuid.uuid4())
        self.answers[request] = queue.Queue()
        self.events.put((request, event, seconds))
        return self.answers[request].get(timeout=seconds)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Environment:
    """One Lambda environment: the Runtime API, and `awslambdaric` asking it for events."""

    def __init__(self, handler: str):
        self.handler, self.api = handler, RuntimeApi()
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, event: dict[str, Any], context: Any) -> Any:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "awslambdaric", self.handler],
                cwd=ROOT / "lambda",
                env={
                    **os.environ,
                    "AWS_LAMBDA_RUNTIME_API": self.api.place,
                    "LAMBDA_TASK_ROOT": str(ROOT / "lambda"),
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                stdout=subprocess.DEVNULL,
            )
        answer = self.api.ask(event, max(30.0, context.get_remaining_time_in_millis() / 1000))
        if answer.kind != "response":
            raise RuntimeError(answer.body.decode())
        return json.loads(answer.body or b"null")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.api.close()


@pytest.fixture
def environments() -> Iterator[dict[str, Environment]]:
    made = {name: Environment(f"relay.{name}") for name in ("authorizer", "router", "worker")}
    yield made
    for environment in made.values():
        environment.close()


def test_handlers_run_under_awslambdaric(environments: dict[str, Environment]) -> None:
    async def conversation(url: str) -> list[dict[str, Any]]:
        async with websockets.connect(url, open_timeout=30) as socket:
            await ask(socket, "r", max_tokens=12, prompt="Under the lamp")
            return await hear(socket, "r", 30)

    with FakeContainer() as container, Stack(container.url, handlers=dict(environments)) as stack:
        messages = asyncio.run(conversation(stack.url))
        for environment in environments.values():
            assert environment.process is not None and environment.process.poll() is None
    assert text(messages) == "".join(words("Under the lamp", 12))
    assert messages[-1]["type"] == "complete"
