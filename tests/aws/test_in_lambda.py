"""The model inside Lambda: the same protocol as over an endpoint, plain HTTP with server-sent events, and its runtime."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from aws_fakes import RuntimeApi, ask, generate, hear, talk, text, wait_for
from local_stack import Stack

from config import GenerationParams
from inference.engine import Engine
from support.helpers import ROOT
from support.tiny_models import random_model, save, shape, tiny_tokenizer

ENDLESS = {"logit_bias": {str(tiny_tokenizer().eot): -100}, "finish_sentence": 0}  # texts that only their length ends


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "tiny", random_model(shape(tiny_tokenizer())), tiny_tokenizer())


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[Stack]:
    variables = {"VLG_DTYPE": "float32", "STOP_POLL_MS": "50", "MAX_TOKENS": "100000"}
    with Stack("", in_lambda=model, environment=variables) as stack:
        yield stack


@pytest.fixture
def stack(shared: Stack) -> Iterator[Stack]:
    shared.functions.results.clear()
    yield shared
    wait_for(lambda: not shared.gateway.open and not shared.functions.running)
    shared.tables["requests"].items.clear()


def written(model: Path, prompt: str, **settings: Any) -> list[str]:
    """The engine's own texts."""
    with Engine.load(model, device="cpu", dtype="float32") as engine:
        return [result.text for result in engine.submit(prompt, GenerationParams(**settings)).result()]


def test_the_worker_writes_what_the_engine_writes(stack: Stack, model: Path) -> None:
    messages = generate(stack, max_tokens=40, seed=7, n=2, **ENDLESS)
    assert [m["type"] for m in messages[:3]] == ["queued", "started", "token"] and messages[-1]["type"] == "complete"
    assert [text(messages, 0), text(messages, 1)] == written(model, "It was", max_tokens=40, seed=7, n=2, **ENDLESS)
    assert messages[-1]["usage"]["completion_tokens"] == 80 and messages[-1]["streamed"] is True
    assert {m["request_id"] for m in messages} == {"r"}


def test_a_text_that_is_stopped_leaves_nothing_to_its_event_loop(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    async def conversation(socket: Any) -> list[dict[str, Any]]:
        await ask(socket, "s", max_tokens=90_000, **ENDLESS)
        while json.loads(await socket.recv())["type"] != "token":
            pass
        await socket.send('{"action": "stop", "request_id": "s"}')
        return await hear(socket, "s")

    assert talk(stack, conversation)[-1]["finish_reason"] == "cancelled"
    wait_for(lambda: not stack.functions.running)
    gc.collect()
    assert not [record.message for record in caplog.records if record.name == "asyncio"]


def test_stop_limits_and_errors_are_those_of_the_endpoints_worker(stack: Stack) -> None:
    async def conversation(socket: Any) -> list[dict[str, Any]]:
        await ask(socket, "long", max_tokens=50_000, **ENDLESS)
        while json.loads(await socket.recv())["type"] != "token":
            pass
        await socket.send('{"action": "stop", "request_id": "long"}')
        return await hear(socket, "long", 30)

    assert talk(stack, conversation)[-1]["finish_reason"] == "cancelled"
    assert generate(stack, style="nobody")[-1]["error"]["code"] == "unknown_style"
    assert generate(stack, temperature=9)[-1]["error"]["param"] == "temperature"


def test_the_functions_timeout_is_met_with_a_completion(model: Path) -> None:
    with Stack("", in_lambda=model, timeouts={"worker": 4.5}) as stack:
        messages = generate(stack, max_tokens=90_000, **ENDLESS)
    assert messages[-1]["finish_reason"] == "deadline" and len(messages) > 3


def test_fifty_connections_of_which_ten_vanish_and_ten_stop(stack: Stack, model: Path) -> None:
    expected = [written(model, "It was", max_tokens=60, seed=number, **ENDLESS)[0] for number in range(3)]

    async def one(number: int) -> list[dict[str, Any]]:
        async with websockets.connect(stack.url, open_timeout=30) as socket:
            kind = ("vanish", "stop", "stay", "stay", "stay")[number % 5]
            await ask(socket, "r", seed=number % 3, max_tokens=60 if kind == "stay" else 5000, **ENDLESS)
            if kind == "stay":
                return await hear(socket, "r", 60)
            heard: list[dict[str, Any]] = []
            while sum(message["type"] == "token" for message in heard) < 3:
                heard.append(json.loads(await socket.recv()))
            if kind == "stop":
                await socket.send('{"action": "stop", "request_id": "r"}')
                return heard + await hear(socket, "r", 60)
            return heard

    async def everyone() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*(one(number) for number in range(50)))

    for number, messages in enumerate(asyncio.run(everyone())):
        if number % 5 == 1:
            assert messages[-1]["finish_reason"] == "cancelled"
        elif number % 5 > 1:
            assert messages[-1]["finish_reason"] == "length" and text(messages) == expected[number % 3]
    wait_for(lambda: not stack.functions.running and not stack.gateway.open, 30)
    wait_for(lambda: all("ended" in item for item in stack.tables["requests"].items.values()))
    assert len(stack.tables["requests"].items) == 50 and stack.functions.busy["worker"] == 0
    engine = sys.modules["writer"].service().engine
    wait_for(lambda: engine.stats()["running"] + engine.stats()["waiting"] == 0)


def post(stack: Stack, path: str, body: Any, token: str | None = "local", **more: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(stack.function_url + path, content=content, headers={**headers, **more}, timeout=30)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]


def test_plain_http_streams_the_same_text(stack: Stack, model: Path) -> None:
    body = {"prompt": "It was", "max_tokens": 30, "seed": 3, "request_id": "h", **ENDLESS}
    times, messages = [], []
    with httpx.stream("POST", f"{stack.function_url}/generate", json={**body, "max_tokens": 400}, headers={"Authorization": "Bearer local"}, timeout=60) as answer:  # fmt: skip
        for line in answer.iter_lines():
            if line:
                messages.append(json.loads(line.removeprefix("data: ")))
                times.append(time.monotonic())
    assert [m["type"] for m in messages[:3]] == ["queued", "started", "token"]
    first = next(at for at, message in zip(times, messages, strict=True) if message["type"] == "token")
    assert messages[-1]["type"] == "complete" and first < times[-1], "tokens come before the end"
    whole = events(post(stack, "//generate", {**body, "request_id": "h2"}))  # the URL's output ends in a slash
    assert text(whole) == written(model, "It was", max_tokens=30, seed=3, **ENDLESS)[0]
    told = httpx.get(f"{stack.function_url}/settings", headers={"Authorization": "Bearer local"}).json()
    assert told["model"].startswith("tiny") and told["settings"]["temperature"]["default"] == 1.3


def test_plain_http_is_stopped_by_a_second_request(stack: Stack) -> None:
    heard: list[dict[str, Any]] = []
    body = {"prompt": "It was", "max_tokens": 90_000, "request_id": "s", **ENDLESS}
    thread = threading.Thread(target=lambda: heard.extend(events(post(stack, "/generate", body))))
    thread.start()
    wait_for(lambda: stack.functions.running)
    wait_for(lambda: post(stack, "/stop", {"request_id": "s"}).json() == {"stopping": True})  # once it is known
    thread.join(30)
    assert heard[-1]["finish_reason"] == "cancelled"
    assert post(stack, "/stop", {"request_id": "never"}).status_code == 404
    assert post(stack, "/generate", body).json()["error"]["code"] == "duplicate_request"


SECRET = "xylophone"


@pytest.mark.parametrize(
    ("body", "token", "status", "code"),
    [
        ({"prompt": SECRET}, None, 401, "unauthorized"),
        ({"prompt": SECRET}, "wrong", 401, "unauthorized"),
        ({"prompt": SECRET}, "expired", 401, "unauthorized"),
        (f'{{"prompt": "{SECRET}"'.encode(), "local", 400, "bad_json"),
        (f"\xff\x00{SECRET}".encode("latin-1"), "local", 400, "bad_json"),
        ({"prompt": SECRET * 4000}, "local", 400, "prompt_too_long"),
        ({"prompt": SECRET, "temperature": 9}, "local", 400, "invalid_value"),
        ({"prompt": SECRET, "max_tokens": 60}, "poor", 429, "allowance_exceeded"),
    ],
)
def test_each_bad_request_is_a_clear_error_and_only_its_kind_is_logged(
    stack: Stack, body: Any, token: str | None, status: int, code: str, capfd: Any
) -> None:
    stack.admit("expired", "eve", expires=int(time.time()) - 1)
    stack.admit("poor", "eve", daily=50)
    answer = post(stack, "/generate", body, token)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    printed = "".join(capfd.readouterr())
    assert code in printed and SECRET not in printed and "xpired" not in printed.replace("not expired", "")


def test_what_is_not_there_and_what_is_too_large(stack: Stack) -> None:
    assert post(stack, "/sing", {}).status_code == 404
    assert httpx.get(f"{stack.function_url}/generate", headers={"Authorization": "Bearer local"}).status_code == 404
    assert post(stack, "/generate", b"x" * (6 * 1024 * 1024 + 1)).status_code == 413  # Lambda's own limit


def test_pages_of_other_origins_are_kept_out_unless_named(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    page = {"Origin": "https://example.org"}
    closed = post(stack, "/generate", {"prompt": "It", "max_tokens": 1}, **page)
    assert not [name for name in closed.headers if name.startswith("access-control")]
    monkeypatch.setenv("ALLOWED_ORIGINS", "https://example.org")
    asked = httpx.options(f"{stack.function_url}/generate", headers=page)
    assert asked.status_code == 204 and "authorization" in asked.headers["access-control-allow-headers"]
    opened = post(stack, "/generate", {"prompt": "It", "max_tokens": 1}, **page)
    assert opened.headers["access-control-allow-origin"] == "https://example.org"
    other = post(stack, "/generate", {"prompt": "It"}, Origin="https://elsewhere.org")
    assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


def test_all_workers_busy_is_429_over_plain_http(model: Path) -> None:
    with Stack("", in_lambda=model, workers=1, environment={"STOP_POLL_MS": "50"}) as stack:
        body = {"prompt": "It was", "max_tokens": 90_000, "request_id": "s", **ENDLESS}
        thread = threading.Thread(target=lambda: post(stack, "/generate", body))
        thread.start()
        wait_for(lambda: stack.functions.running)
        assert post(stack, "/generate", {"prompt": "It"}).status_code == 429
        wait_for(lambda: stack.tables["requests"].items)
        (key,) = stack.tables["requests"].items
        stack.tables["requests"].items[key]["halted"] = {"N": "1"}
        thread.join(30)


def environment(api: RuntimeApi, stack: Stack, *words: str) -> subprocess.Popen[bytes]:
    """A Lambda environment of the image: its process, with the Runtime API that Lambda gives it."""
    variables = {**os.environ, "AWS_LAMBDA_RUNTIME_API": api.place, "LAMBDA_TASK_ROOT": str(ROOT / "lambda")}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **stack.environment}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT / "lambda", env=variables, stdout=subprocess.DEVNULL)


def test_the_images_runtime_streams_and_posts(stack: Stack, model: Path) -> None:
    """The Runtime API as documented: https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html."""
    api = RuntimeApi()
    process = environment(api, stack, "writer.py")
    try:
        body = json.dumps({"prompt": "It was", "max_tokens": 20, "seed": 5, **ENDLESS})
        http = {"method": "POST", "path": "/generate"}
        event = {"requestContext": {"http": http}, "headers": {"authorization": "Bearer local"}, "body": body}
        answer = api.ask(event, 200)
        assert answer.headers["Lambda-Runtime-Function-Response-Mode"] == "streaming"
        assert answer.headers["Content-Type"] == "application/vnd.awslambda.http-integration-response"
        head, _, sent = answer.body.partition(bytes(8))
        assert json.loads(head)["statusCode"] == 200 and len(answer.chunks) >= 20
        messages = [json.loads(part.removeprefix(b"data: ")) for part in sent.split(b"\n\n") if part]
        assert text(messages) == written(model, "It was", max_tokens=20, seed=5, **ENDLESS)[0]
        broken = api.ask({"requestContext": {"http": {}}}, 30)
        assert broken.kind == "error" and b"KeyError" in broken.body
        denied = api.ask({"requestContext": {"http": http}, "headers": {}, "body": body}, 30)
        assert json.loads(denied.body.partition(bytes(8))[0])["statusCode"] == 401
        assert process.poll() is None, "the environment serves on"
    finally:
        process.kill()
        process.wait()
        api.close()


def test_nothing_is_collected_while_the_model_loads(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, collecting = sys.modules["writer"], []
    monkeypatch.setattr(writer, "service", lambda: collecting.append(gc.isenabled()))
    before = gc.get_freeze_count()
    try:
        writer.start()
        assert collecting == [False] and gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
    monkeypatch.setattr(writer, "service", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.start()
    assert gc.isenabled()


def test_the_worker_runs_under_awslambdaric(stack: Stack, model: Path) -> None:
    pytest.importorskip("awslambdaric", reason="needs awslambdaric: pip install -r requirements-aws.txt")
    api = RuntimeApi()
    process = environment(api, stack, "-m", "awslambdaric", "writer.worker")

    async def conversation(socket: Any) -> list[dict[str, Any]]:
        await socket.send('{"action": "ping"}')
        await socket.recv()
        (line,) = stack.gateway.open.values()
        requests = stack.tables["requests"].items
        requests[(line.id, "r")] = {"connection_id": {"S": line.id}, "request_id": {"S": "r"}}
        job = {"connection_id": line.id, "management": f"{stack.aws_url}/prod", "request_id": "r"}
        job["request"] = {"prompt": "It was", "max_tokens": 20, "seed": 5}
        answer = await asyncio.to_thread(api.ask, job, 60)
        assert json.loads(answer.body)["outcome"] == "complete"
        return await hear(socket, "r", 30)

    try:
        unknown = {"connection_id": "a" * 15 + "=", "management": f"{stack.aws_url}/prod", "request_id": "never"}
        assert json.loads(api.ask({**unknown, "request": {"prompt": ""}}, 200).body)["outcome"] == "duplicate"
        assert text(talk(stack, conversation)) == written(model, "It was", max_tokens=20, seed=5)[0]
    finally:
        process.kill()
        process.wait()
        api.close()


def test_no_reader_of_lines_cuts_an_event() -> None:
    """Python's splitlines, as some clients use it, also ends a line at U+0085, U+2028 and U+2029."""
    from writer import EventStream

    sent: list[bytes] = []
    EventStream("c", sent.append).post({"type": "token", "text": "é\x85\u2028\u2029\n"})
    first, *others = sent[0].decode().splitlines()
    assert json.loads(first.removeprefix("data: "))["text"] == "é\x85\u2028\u2029\n" and others == [""]
