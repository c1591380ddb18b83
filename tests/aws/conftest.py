"""What the tests of the AWS side share: paths for imports, and a local stack over a fake container."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "lambda", Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

MISSING = [name for name in ("boto3", "httpx", "websockets", "uvicorn") if importlib.util.find_spec(name) is None]
if MISSING:
    raise pytest.UsageError(f"tests/aws needs {', '.join(MISSING)}: pip install -r requirements-aws.txt")

from aws_fakes import FakeContainer, wait_for
from deploy_relay import limits_json
from local_aws import Faults
from local_stack import Stack

os.environ["LIMITS_JSON"] = limits_json()  # for tests that call limits.py directly


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[FakeContainer, Stack]]:
    with FakeContainer() as container, Stack(container.url, environment={"STOP_POLL_MS": "50"}) as stack:
        yield container, stack


@pytest.fixture
def container(served: tuple[FakeContainer, Stack]) -> FakeContainer:
    fake = served[0]
    wait_for(lambda: fake.running == 0)
    fake.fault, fake.pace = "", 0.01
    fake.requests.clear()
    return fake


@pytest.fixture
def stack(served: tuple[FakeContainer, Stack]) -> Iterator[Stack]:
    shared = served[1]
    for name, value in vars(Faults()).items():
        setattr(shared.faults, name, value)
    shared.functions.results.clear()
    yield shared
    wait_for(lambda: not shared.gateway.open and not shared.functions.running)
