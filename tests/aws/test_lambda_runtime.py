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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import websockets
from aws_fakes import FakeContainer, ask, hear, text, words
from local_stack import Stack

from support.helpers import ROOT

if importlib.util.find_spec("awslambdaric") is None:
    pytest.skip("needs awslambdaric: pip install -r requirements-aws.txt", allow_module_level=True)


class Environment:
    """One Lambda environment: the Runtime API on a socket, and `awslambdaric` asking it for events."""

    def __init__(self, handler: str):
        self.events: queue.Queue[tuple[str, dict[str, Any], float]] = queue.Queue()
        self.answers: dict[str, queue.Queue[Any]] = {}
        self.handler = handler
        self.process: subprocess.Popen[bytes] | None = None
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

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                *_, request, kind = self.path.split("/")
                answer = json.loads(body or b"null")
                outer.answers.get(request, queue.Queue()).put(answer if kind == "response" else RuntimeError(answer))
                self.send_response(202)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __call__(self, event: dict[str, Any], context: Any) -> Any:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "awslambdaric", self.handler],
                cwd=ROOT / "lambda",
                env={
                    **os.environ,
                    "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{self.server.server_port}",
                    "LAMBDA_TASK_ROOT": str(ROOT / "lambda"),
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                stdout=subprocess.DEVNULL,
            )
        request = str(uuid.uuid4())
        self.answers[request] = queue.Queue()
        self.events.put((request, event, context.get_remaining_time_in_millis() / 1000))
        answer = self.answers[request].get(timeout=30)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.server.shutdown()
        self.server.server_close()


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
