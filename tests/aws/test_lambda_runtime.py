"""The handlers under Lambda's own Python runtime client, one process each, behind the local gateway."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import websockets
from aws_fakes import FakeContainer, RuntimeApi, ask, hear, text, words
from local_stack import Stack

from support.helpers import ROOT

if importlib.util.find_spec("awslambdaric") is None:
    pytest.skip("needs awslambdaric: pip install -r requirements-aws.txt", allow_module_level=True)


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
