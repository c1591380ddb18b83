"""The relay's handlers, unmodified, behind the local gateway: real sockets, real boto3, a container with faults."""

from __future__ import annotations

import ast
import asyncio
import json
import sys
import threading
import time
from typing import Any

import pytest
import websockets
from aws_fakes import FakeContainer, ask, generate, hear, talk, text, wait_for, words
from deploy_relay import FILES
from local_stack import Quotas, Stack, load_handlers
from pydantic import ValidationError
from websockets.exceptions import InvalidStatus

from config import GenerationParams
from support.helpers import ROOT


def outcomes(stack: Stack) -> list[Any]:
    return [result for name, result in stack.functions.results if name == "worker"]


def test_tokens_come_one_by_one_before_the_end(stack: Stack, container: FakeContainer) -> None:
    container.pace = 0.03

    async def conversation(socket: Any) -> tuple[int, list[dict[str, Any]]]:
        container.produced = 0
        await ask(socket, "one", max_tokens=20)
        first: list[dict[str, Any]] = []
        while sum(message["type"] == "token" for message in first) < 2:
            first.append(json.loads(await socket.recv()))
        produced = container.produced
        return produced, first + await hear(socket, "one")

    produced, messages = talk(stack, conversation)
    assert produced < 20
    assert [m["type"] for m in messages] == ["queued", "started", *["token"] * 20, "complete"]
    assert {m["request_id"] for m in messages} == {"one"}
    assert [m["seq"] for m in messages if m["type"] == "token"] == list(range(20))
    assert [m["text"] for m in messages if m["type"] == "token"] == words("It was", 20)
    assert messages[-1]["finish_reason"] == "length" and messages[-1]["streamed"] is True
    assert messages[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 20, "total_tokens": 22}


def test_parameters_reach_the_container(stack: Stack, container: FakeContainer) -> None:
    generate(stack, max_length=4, temperature=0.5, seed=11, stop="END", n=2)
    request = container.requests[0]
    assert request.pop("request_id") != "r"
    assert request == {
        "prompt": "It was", "max_tokens": 4, "temperature": 0.5, "seed": 11, "stop": ["END"], "n": 2, "stream": True,
    }  # fmt: skip


def test_samples_of_one_prompt_are_told_apart(stack: Stack, container: FakeContainer) -> None:
    messages = generate(stack, n=3, max_tokens=5)
    for index in range(3):
        assert text(messages, index) == "".join(words("It was", 5, index))


def test_lines_cut_anywhere_are_put_together(stack: Stack, container: FakeContainer) -> None:
    container.fault = "odd_cuts"
    assert text(generate(stack, max_tokens=8)) == "".join(words("It was", 8))


def test_flush_gathers_tokens(stack: Stack, container: FakeContainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUSH_MS", "5000")
    messages = generate(stack, max_tokens=12, n=2)
    tokens = [m for m in messages if m["type"] == "token"]
    assert [m["seq"] for m in tokens] == list(range(len(tokens))) == [0, 1, 2]
    assert tokens[0]["text"] == words("It was", 1)[0]
    assert {m.get("count") for m in tokens[1:]} == {11, 12}
    for index in range(2):
        assert text(messages, index) == "".join(words("It was", 12, index))


def test_stop_ends_the_text_and_the_work(stack: Stack, container: FakeContainer) -> None:
    container.pace = 0.02

    async def conversation(socket: Any) -> list[dict[str, Any]]:
        await ask(socket, "long", max_tokens=2000)
        heard = [json.loads(await socket.recv()) for _ in range(3)]
        await socket.send(json.dumps({"action": "stop", "request_id": "long"}))
        return heard + await hear(socket, "long")

    messages = talk(stack, conversation)
    assert messages[-1]["type"] == "complete" and messages[-1]["finish_reason"] == "cancelled"
    usage = messages[-1]["usage"]
    assert usage["completion_tokens"] == messages[-2]["seq"] + 1 and usage["prompt_tokens"] == 2
    wait_for(lambda: container.running == 0)


def test_two_generations_on_one_connection(stack: Stack, container: FakeContainer) -> None:
    async def conversation(socket: Any) -> list[dict[str, Any]]:
        await ask(socket, "a", max_tokens=10)
        await ask(socket, "b", prompt="The fog", max_tokens=10)
        heard: list[dict[str, Any]] = []
        while sum(m["type"] == "complete" for m in heard) < 2:
            heard.append(json.loads(await socket.recv()))
        return heard

    heard = talk(stack, conversation)
    assert text([m for m in heard if m["request_id"] == "a"]) == "".join(words("It was", 10))
    assert text([m for m in heard if m["request_id"] == "b"]) == "".join(words("The fog", 10))


def refused(url: str, **more: Any) -> int:
    async def run() -> int:
        try:
            async with websockets.connect(url, **more):
                return 101
        except InvalidStatus as error:
            return error.response.status_code

    return asyncio.run(run())


def test_only_a_known_token_opens_the_gateway(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = stack.url.partition("?")[0]
    assert refused(bare) == 403
    assert refused(f"{bare}?token=wrong") == 403
    assert refused(f"{bare}?token=") == 403
    assert refused(stack.url.replace("/prod", "/other")) == 403
    assert refused(stack.url) == 101
    assert refused(bare, additional_headers={"Authorization": "Bearer local"}) == 101
    monkeypatch.setenv("ALLOWED_ORIGINS", "https://example.org")
    assert refused(stack.url, origin="https://elsewhere.org") == 403
    assert refused(stack.url, origin="https://example.org") == 101
    assert refused(stack.url) == 101
    monkeypatch.delenv("ALLOWED_ORIGINS")
    stack.admit("guest", "guest", expires=int(time.time()) + 60)
    assert refused(f"{bare}?token=guest") == 101
    stack.admit("guest", "guest", expires=int(time.time()) - 1)
    assert refused(f"{bare}?token=guest") == 403
    stack.tables["tokens"].items.clear()
    assert refused(stack.url) == 403
    assert refused(bare + "?token=") == 403
    stack.admit("local", "local")


@pytest.mark.parametrize(
    ("sent", "code", "param"),
    [
        ("not json", "bad_json", None),
        ("[1]", "bad_json", None),
        ('{"action": "generate", "prompt": "It", "temperature": NaN}', "bad_json", None),
        ('{"action": "sing", "request_id": "q"}', "unknown_action", "action"),
        ('{"action": "$connect"}', "unknown_action", "action"),
        ('{"action": "generate", "request_id": "q"}', "invalid_value", "prompt"),
        ('{"action": "generate", "request_id": "", "prompt": "It"}', "invalid_value", "request_id"),
        ('{"action": "generate", "request_id": "q", "prompt": "\\ud800"}', "invalid_value", "prompt"),
        ('{"action": "generate", "request_id": "q", "prompt": "It", "temperature": 3}', "invalid_value", "temperature"),
        ('{"action": "generate", "request_id": "q", "prompt": "It", "top_k": true}', "invalid_value", "top_k"),
        ('{"action": "generate", "request_id": "q", "prompt": "It", "top_k": 2.0}', "invalid_value", "top_k"),
        ('{"action": "generate", "request_id": "q", "prompt": "It", "top_p": 0}', "invalid_value", "top_p"),
        ('{"action": "generate", "request_id": "q", "prompt": "It", "keep": 1e999}', "invalid_value", "keep"),
        ('{"action": "generate", "request_id": "q", "prompt": "It", "stop": [""]}', "invalid_value", "stop"),
        ('{"action": "generate", "request_id": "q", "prompt": "It", "beams": 2}', "invalid_value", "beams"),
        ('{"action": "generate", "request_id": "q", "prompt": "It", "max_tokens": 200000}', "invalid_value", "max_tokens"),
        ('{"action": "stop", "request_id": "never"}', "unknown_request", "request_id"),
        ('{"action": "generate", "request_id": "q", "prompt": "%s"}' % ("long " * 5000), "prompt_too_long", "prompt"),
    ],
)  # fmt: skip
def test_bad_messages_are_explained(
    stack: Stack, container: FakeContainer, sent: str, code: str, param: str | None
) -> None:
    async def conversation(socket: Any) -> dict[str, Any]:
        await socket.send(sent)
        return json.loads(await socket.recv())

    answer = talk(stack, conversation)
    assert answer["type"] == "error"
    assert (answer["error"]["code"], answer["error"]["param"]) == (code, param)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert not container.requests


def test_ping_and_a_refusal_leave_the_connection_usable(stack: Stack, container: FakeContainer) -> None:
    async def conversation(socket: Any) -> list[Any]:
        await socket.send('{"action": "ping"}')
        pong = json.loads(await socket.recv())
        await socket.send("{}")
        error = json.loads(await socket.recv())
        await ask(socket, "r", max_tokens=2)
        return [pong, error, *await hear(socket, "r")]

    pong, error, *rest = talk(stack, conversation)
    assert pong["type"] == "pong" and error["type"] == "error" and rest[-1]["type"] == "complete"


def test_a_binary_frame_is_refused_and_only_its_kind_is_logged(stack: Stack, capfd: pytest.CaptureFixture[str]) -> None:
    """API Gateway hands a binary frame on in Base64, by $default."""

    async def conversation(socket: Any) -> dict[str, Any]:
        await socket.send(b"\x00\xffxylophone")
        return json.loads(await socket.recv())

    assert talk(stack, conversation)["error"]["code"] == "bad_json"
    printed = "".join(capfd.readouterr())
    assert "bad_json" in printed and "xylophone" not in printed and "eHlsb3Bob25l" not in printed


def test_an_empty_prompt_and_a_missing_id_are_allowed(stack: Stack, container: FakeContainer) -> None:
    async def conversation(socket: Any) -> list[dict[str, Any]]:
        await socket.send('{"action": "generate", "prompt": "", "max_tokens": 2}')
        queued = json.loads(await socket.recv())
        return [queued, *await hear(socket, queued["request_id"])]

    messages = talk(stack, conversation)
    assert messages[0]["type"] == "queued" and len(messages[0]["request_id"]) == 32
    assert messages[-1]["type"] == "complete"


def test_this_gateways_own_limits(stack: Stack, container: FakeContainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_TOKENS", "5")
    monkeypatch.setenv("MAX_SAMPLES", "2")
    assert generate(stack, "a", max_tokens=6)[-1]["error"]["code"] == "limit_exceeded"
    assert generate(stack, "b", n=3)[-1]["error"]["param"] == "n"
    assert generate(stack, "c")[-1]["usage"]["completion_tokens"] == 5


def test_a_request_id_serves_once(stack: Stack, container: FakeContainer) -> None:
    async def conversation(socket: Any) -> list[dict[str, Any]]:
        await ask(socket, "same", max_tokens=2)
        await hear(socket, "same")
        await ask(socket, "same", max_tokens=2)
        return await hear(socket, "same")

    assert talk(stack, conversation)[-1]["error"]["code"] == "duplicate_request"
    assert len(container.requests) == 1


def test_generations_on_one_connection_are_counted(
    stack: Stack, container: FakeContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_ACTIVE", "2")

    async def conversation(socket: Any) -> list[dict[str, Any]]:
        for name in ("a", "b"):
            await ask(socket, name, max_tokens=2000)
            while json.loads(await socket.recv())["request_id"] != name:
                pass
        await ask(socket, "c")
        return await hear(socket, "c")

    assert talk(stack, conversation)[-1]["error"]["code"] == "too_many_requests"


@pytest.mark.parametrize("bare", [False, True])
def test_work_stops_when_the_client_is_gone(stack: Stack, container: FakeContainer, bare: bool) -> None:
    container.pace = 0.05
    stack.faults.bare_gone = bare

    async def conversation(socket: Any) -> int:
        container.produced = 0
        await ask(socket, "r", max_tokens=500)
        while json.loads(await socket.recv())["type"] != "token":
            pass
        await socket.close()
        return container.produced

    left_at = talk(stack, conversation)
    wait_for(lambda: container.running == 0)
    assert container.produced <= left_at + 2
    wait_for(lambda: outcomes(stack))
    assert outcomes(stack)[0]["outcome"] in ("gone", "cancelled")


@pytest.mark.parametrize(
    ("fault", "code", "tokens"),
    [
        ("error_before", "bad", 0),
        ("crash", "endpoint_failed", 0),
        ("busy", "unavailable", 0),
        ("error_amid", "internal", 3),
        ("abort", "endpoint_failed", 3),
        ("ended", "stream_truncated", 3),
        ("unterminated", "stream_truncated", 3),
    ],
)
def test_container_faults_are_told(stack: Stack, container: FakeContainer, fault: str, code: str, tokens: int) -> None:
    container.fault = fault
    messages = generate(stack, max_tokens=9)
    assert messages[-1]["type"] == "error" and messages[-1]["error"]["code"] == code
    assert text(messages) == "".join(words("It was", tokens))
    assert len(container.requests) == 1
    container.fault = ""
    assert generate(stack, "again", max_tokens=2)[-1]["type"] == "complete"


@pytest.mark.parametrize(
    ("fault", "code"), [("corrupt_part", "endpoint_failed"), ("truncate_after", "stream_truncated")]
)
def test_damaged_streams_are_told(stack: Stack, container: FakeContainer, fault: str, code: str) -> None:
    setattr(stack.faults, fault, 3)
    messages = generate(stack, max_tokens=9)
    assert messages[-1]["type"] == "error" and messages[-1]["error"]["code"] == code
    assert text(messages) == "".join(words("It was", 2))
    assert len(container.requests) == 1


def test_a_silent_endpoint_is_given_up(stack: Stack, container: FakeContainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILENCE_S", "0.3")
    container.fault = "stall"
    messages = generate(stack, max_tokens=9)
    assert messages[-1]["error"]["code"] == "stalled" and text(messages) == "".join(words("It was", 3))
    wait_for(lambda: container.running == 0)


def test_stop_reaches_a_silent_endpoint(stack: Stack, container: FakeContainer) -> None:
    container.fault = "stall"

    async def conversation(socket: Any) -> list[dict[str, Any]]:
        await ask(socket, "r")
        while json.loads(await socket.recv()).get("seq") != 2:
            pass
        await socket.send('{"action": "stop", "request_id": "r"}')
        return await hear(socket, "r")

    assert talk(stack, conversation)[-1]["finish_reason"] == "cancelled"
    wait_for(lambda: container.running == 0)


def test_a_client_that_leaves_a_silent_endpoint_ends_it(stack: Stack, container: FakeContainer) -> None:
    container.fault = "stall"

    async def conversation(socket: Any) -> None:
        await ask(socket, "r")
        while json.loads(await socket.recv()).get("seq") != 2:
            pass

    talk(stack, conversation)
    wait_for(lambda: container.running == 0)


def test_throttled_posts_are_repeated_in_order(stack: Stack, container: FakeContainer) -> None:
    stack.faults.throttle_posts = 3
    messages = generate(stack, max_tokens=9)
    assert [m["text"] for m in messages if m["type"] == "token"] == words("It was", 9)
    assert messages[-1]["type"] == "complete"


def test_an_event_delivered_twice_generates_once(stack: Stack, container: FakeContainer) -> None:
    stack.faults.duplicate_events = True
    messages = generate(stack, max_tokens=9)
    wait_for(lambda: len(outcomes(stack)) == 2)
    assert [m["type"] for m in messages] == ["queued", "started", *["token"] * 9, "complete"]
    assert len(container.requests) == 1
    assert sorted(result["outcome"] for result in outcomes(stack)) == ["complete", "duplicate"]


def test_a_full_worker_is_told_and_frees_the_place(stack: Stack, container: FakeContainer) -> None:
    stack.faults.refuse_events = 2

    async def conversation(socket: Any) -> list[dict[str, Any]]:
        await ask(socket, "r", max_tokens=2)
        first = await hear(socket, "r")
        await ask(socket, "r2", max_tokens=2)
        return first + await hear(socket, "r2")

    messages = talk(stack, conversation)
    assert [m["type"] for m in messages[:2]] == ["queued", "error"]
    assert messages[1]["error"]["code"] == "unavailable" and messages[-1]["type"] == "complete"


def test_a_text_that_finds_no_worker_waits_and_is_told(container: FakeContainer) -> None:
    """Invoke answers 202 though all reserved workers are busy; Lambda queues the event and sends it to the destination when
    it has grown too old (https://docs.aws.amazon.com/lambda/latest/dg/invocation-async-error-handling.html)."""
    container.pace = 0.05

    async def conversation(socket: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        await ask(socket, "long", max_tokens=2000)
        while json.loads(await socket.recv())["type"] != "token":
            pass
        await ask(socket, "second", max_tokens=2)
        second = await hear(socket, "second")
        stack.functions.event_age_s = 20.0
        await ask(socket, "third", max_tokens=2)  # the second one's place is free again
        await socket.send('{"action": "stop", "request_id": "long"}')
        return second, await hear(socket, "third")

    with Stack(container.url, workers=1, environment={"STOP_POLL_MS": "50", "MAX_ACTIVE": "2"}) as stack:
        stack.functions.event_age_s = 0.5
        second, third = talk(stack, conversation)
    assert [m["type"] for m in second] == ["queued", "error"]
    assert second[1]["error"]["code"] == "unavailable" and "all writers are busy" in second[1]["error"]["message"]
    assert [m["type"] for m in third] == ["queued", "started", "token", "token", "complete"]


def test_a_worker_that_dies_is_told(container: FakeContainer) -> None:
    """A handler that raises, or an environment that is killed, ends in the destination as well: RetriesExhausted."""
    relay = load_handlers()

    def dies(event: dict[str, Any], context: Any) -> Any:
        raise MemoryError

    handlers = {"authorizer": relay.authorizer, "router": relay.router, "worker": dies}
    with Stack(container.url, handlers=handlers) as stack:
        messages = generate(stack)
        items = list(stack.tables["requests"].items.values())
    assert messages[-1]["error"]["code"] == "endpoint_failed" and all("ended" in item for item in items)


def test_an_allowance_for_a_day_is_kept(container: FakeContainer) -> None:
    plain = {"finish_sentence": 0}
    with Stack(container.url) as stack:
        stack.admit("local", "local", daily=50)
        asked = {"max_tokens": 30, "finish_sentence": 30}  # all that may be written is reserved
        assert generate(stack, "0", **asked)[-1]["error"]["code"] == "allowance_exceeded"
        assert generate(stack, "a", max_tokens=30, **plain)[-1]["type"] == "complete"
        refused = generate(stack, "b", max_tokens=30, **plain)[-1]["error"]
        assert refused["code"] == "allowance_exceeded" and "today's 50" in refused["message"]
        assert generate(stack, "c", max_tokens=20, **plain)[-1]["type"] == "complete"
        container.fault = "error_amid"
        stack.admit("local", "local", daily=100)
        assert generate(stack, "d", max_tokens=50, **plain)[-1]["type"] == "error"
        container.fault = ""
        wait_for(lambda: not stack.functions.running)
        assert generate(stack, "e", max_tokens=47, **plain)[-1]["type"] == "complete", (
            "what was not written was given back"
        )
        assert generate(stack, "f", max_tokens=1, **plain)[-1]["type"] == "error"


def test_a_token_that_expires_on_an_open_connection(container: FakeContainer) -> None:
    """What has begun is written to its end, and nothing new is begun."""
    container.pace = 0.05

    async def conversation(socket: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        await ask(socket, "long", max_tokens=60)
        while json.loads(await socket.recv())["type"] != "token":
            pass
        await asyncio.sleep(max(0.0, until - time.time()))
        await ask(socket, "late")
        late = await hear(socket, "late")
        return late, await hear(socket, "long")

    with Stack(container.url) as stack:
        until = int(time.time()) + 3
        stack.admit("local", "local", expires=until)
        late, long = talk(stack, conversation)
        assert refused(stack.url) == 403
    assert [m["type"] for m in late] == ["error"] and late[0]["error"]["code"] == "unauthorized"
    assert "expired" in late[0]["error"]["message"] and long[-1]["type"] == "complete"


def test_fifty_clients_at_once(stack: Stack, container: FakeContainer) -> None:
    async def one(number: int) -> list[dict[str, Any]]:
        async with websockets.connect(stack.url) as socket:
            await ask(socket, "r", prompt=f"Client {number}", max_tokens=10)
            return await hear(socket, "r", 60)

    async def everyone() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*(one(number) for number in range(50)))

    for number, messages in enumerate(asyncio.run(everyone())):
        assert messages[-1]["type"] == "complete"
        assert [m["seq"] for m in messages if m["type"] == "token"] == list(range(10))
        assert text(messages) == "".join(words(f"Client {number}", 10))


def test_a_serverless_endpoint_answers_whole(container: FakeContainer) -> None:
    with Stack(container.url, serverless=True) as stack:
        generate(stack, max_tokens=1)
        container.requests.clear()
        messages = generate(stack, max_tokens=6, n=2)
    assert [m["type"] for m in messages] == ["queued", "started", "token", "token", "complete"]
    assert [text(messages, index) for index in range(2)] == ["".join(words("It was", 6, index)) for index in range(2)]
    assert messages[-1]["streamed"] is False and messages[-1]["usage"]["completion_tokens"] == 12
    assert [request["stream"] for request in container.requests] == [False]


def test_an_endpoint_that_was_missing_once_streams_afterwards(container: FakeContainer) -> None:
    """InvokeEndpoint answers ValidationError also for an endpoint that is not there yet, or a body that is too long
    (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpoint.html, Errors)."""
    with Stack(container.url) as stack:
        stack.endpoint.name = "not-made-yet"
        assert generate(stack, "a", max_tokens=2)[-1]["error"]["code"] == "endpoint_failed"
        stack.endpoint.name = "victorian"
        assert generate(stack, "b", max_tokens=2)[-1]["streamed"] is True


def test_a_long_whole_answer_fits_its_frames(
    stack: Stack, container: FakeContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDPOINT_MODE", "buffered")
    container.pace = 0
    messages = generate(stack, max_tokens=6000)
    assert text(messages) == "".join(words("It was", 6000))
    assert max(len(json.dumps(m, ensure_ascii=False).encode()) for m in messages) < 32 * 1024
    assert sum(m["type"] == "token" for m in messages) > 3


def test_the_functions_timeout_is_met_with_a_completion(container: FakeContainer) -> None:
    with Stack(container.url, timeouts={"worker": 6.0}) as stack:
        messages = generate(stack, max_tokens=5000)
    assert messages[-1]["finish_reason"] == "deadline" and len(messages) > 2
    wait_for(lambda: container.running == 0)


def test_a_container_that_restarts(served: Any) -> None:
    with FakeContainer() as first:
        with Stack(first.url) as stack:
            assert generate(stack, "a", max_tokens=2)[-1]["type"] == "complete"
            first._server.should_exit = True
            first._thread.join(5)
            assert generate(stack, "b", max_tokens=2)[-1]["error"]["type"] == "server_error"
            with FakeContainer() as second:
                stack.endpoint.container, stack.endpoint.lines = second.url, None
                assert generate(stack, "c", max_tokens=2)[-1]["type"] == "complete"


def test_the_gateways_clocks(container: FakeContainer) -> None:
    relay = load_handlers()
    given_up = threading.Event()

    def slow(event: dict[str, Any], context: Any) -> Any:
        if event["requestContext"]["routeKey"] == "ping":
            given_up.wait(30)
        return relay.router(event, context)

    handlers = {"authorizer": relay.authorizer, "router": slow, "worker": relay.worker}
    quotas = Quotas(idle=4, rate=0.001, burst=3)

    async def conversation(socket: Any) -> list[Any]:
        quotas.integration = 0.3  # not before: on a busy machine the authorizer takes longer than that
        await socket.send('{"action": "ping"}')
        late = json.loads(await socket.recv())
        quotas.integration = 29.0
        given_up.set()
        await socket.recv()
        await socket.send("{}")
        await socket.recv()
        await socket.send("{}")
        throttled = json.loads(await socket.recv())
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await socket.recv()
        return [late, throttled, closed.value.rcvd.code]

    with Stack(container.url, handlers=handlers, quotas=quotas) as stack:
        late, throttled, code = talk(stack, conversation)
    assert late["message"] == "Endpoint request timed out" and "connectionId" in late
    assert throttled["message"] == "Too Many Requests" and code == 1001


@pytest.mark.parametrize("size", [32 * 1024 + 1, 140 * 1024])
def test_oversized_frames_close_the_connection(stack: Stack, size: int) -> None:
    async def conversation(socket: Any) -> int:
        await socket.send("x" * size)
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await socket.recv()
        return closed.value.rcvd.code

    assert talk(stack, conversation) == 1009


def test_connections_interface_answers_like_the_gateway(stack: Stack) -> None:
    import boto3
    from botocore.exceptions import ClientError

    api = boto3.client("apigatewaymanagementapi", endpoint_url=f"{stack.aws_url}/prod")

    async def conversation(socket: Any) -> int:
        await socket.send('{"action": "ping"}')
        await socket.recv()
        line = next(iter(stack.gateway.open.values()))

        def use() -> None:
            assert api.get_connection(ConnectionId=line.id)["Identity"]["SourceIp"] == "127.0.0.1"
            with pytest.raises(api.exceptions.PayloadTooLargeException):
                api.post_to_connection(ConnectionId=line.id, Data=b"x" * 140_000)
            for wrong in ("nonsense", "a" * 16):
                with pytest.raises(ClientError) as bad:
                    api.post_to_connection(ConnectionId=wrong, Data=b"x")
                assert bad.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
            with pytest.raises(api.exceptions.GoneException):
                api.post_to_connection(ConnectionId="a" * 15 + "=", Data=b"x")
            api.delete_connection(ConnectionId=line.id)

        await asyncio.to_thread(use)
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await socket.recv()
        return closed.value.rcvd.code

    wait_for(lambda: not stack.gateway.open)
    assert talk(stack, conversation) == 1000


def test_prompts_and_texts_stay_out_of_the_logs(
    stack: Stack, container: FakeContainer, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "xylophone"
    generate(stack, "a", prompt=secret, max_tokens=3)
    generate(stack, "b", prompt=secret, temperature=9)
    container.fault = "abort"
    generate(stack, "c", prompt=secret, max_tokens=9)
    wait_for(lambda: len(outcomes(stack)) == 2)
    printed = "".join(capfd.readouterr())
    assert secret not in printed
    lines = [json.loads(line) for line in printed.splitlines() if '"_aws"' in line]
    assert [line["outcome"] for line in lines] == ["complete", "failed"]
    for line in lines:
        metrics = line["_aws"]["CloudWatchMetrics"][0]
        assert all(isinstance(line[metric["Name"]], int) for metric in metrics["Metrics"])
        assert all(name in line for name in metrics["Dimensions"][0])


NUMBERS = [-101, -3, -1, -0.5, 0, 0.005, 0.01, 0.5, 1, 1.0, 2, 2.1, 16, 100, 101, 1e5, 100_001, 2**63 - 1, 2**63]
OTHERS = [None, True, "", "x", "x" * 1001, ["x"], ["x"] * 17, [""], [3], {}, {"5": 1}, {"5": 101}, {"x": 1}, [None]]


@pytest.mark.parametrize("name", GenerationParams.model_fields)
def test_limits_are_those_of_the_api(name: str) -> None:
    """Each value is admitted or refused as the API's body does it."""
    from limits import InvalidRequest, settings, validate

    from server.schemas import GenerateBody

    assert set(settings()) == set(GenerationParams.model_fields)
    for value in [*NUMBERS, *OTHERS]:
        if isinstance(value, float) and value.is_integer() and settings()[name].get("type") != "number":
            continue  # 1.0 where an integer belongs is refused by the gateway alone
        try:
            GenerateBody.model_validate({"prompt": "It", name: value})
            good = True
        except ValidationError:
            good = False
        try:
            validate({"prompt": "It", name: value}, 10**9, 10**9, 24_000)
            admitted = True
        except InvalidRequest as refused:
            admitted = False
            assert refused.error["param"] == name
        assert admitted == good, (name, value)


async def settings_of(socket: Any) -> Any:
    await socket.send('{"action": "settings"}')
    return json.loads(await socket.recv())


def test_the_settings_are_described_by_the_container_and_asked_for_once(container: FakeContainer) -> None:
    own = {"temperature": {"default": 0.8}, "max_tokens": {"default": 9, "maximum": 500}, "n": {"maximum": 2}}
    own["style"] = {"default": "", "examples": [f"author-{number:0100}" for number in range(2000)]}
    with FakeContainer() as fake, Stack(fake.url, environment={"MAX_TOKENS": "1000"}) as stack:
        fake.described = {"model": "ours (9 steps)", "context": 64, "settings": {**own, "unknown-here": {}}}
        fake.fault = "busy"
        answer = talk(stack, settings_of)
        assert answer["model"] is None and answer["settings"].keys() == GenerationParams.model_fields.keys()
        fake.fault = ""
        answer, again = talk(stack, settings_of), talk(stack, settings_of)
        assert fake.asked == 2 and again == answer and not fake.requests
    found = answer["settings"]
    assert (answer["type"], answer["model"], answer["context"]) == ("settings", "ours (9 steps)", 64)
    assert found.keys() == own.keys() and found["temperature"] == {**schema_of("temperature"), "default": 0.8}
    assert (found["max_tokens"]["maximum"], found["n"]["maximum"], found["n"]["default"]) == (500, 2, 1)
    assert found["max_tokens"]["default"] == 200, "which the gateway adds where a request leaves it open"
    assert len(json.dumps(answer)) < 128 * 1024


def schema_of(name: str) -> Any:
    from limits import settings

    return settings()[name]


def test_a_container_that_does_not_describe_itself_leaves_the_model_unnamed(
    stack: Stack, container: FakeContainer
) -> None:
    answer = talk(stack, settings_of)
    assert answer["model"] is None and answer["settings"].keys() == GenerationParams.model_fields.keys()
    asked = container.asked
    assert talk(stack, settings_of) == answer and container.asked == asked, "it is not asked at every connection"


def test_settings_that_find_no_worker_are_told_without_the_model(container: FakeContainer) -> None:
    relay = load_handlers()

    def broken(event: dict[str, Any], context: Any) -> Any:
        raise RuntimeError("the worker died")

    handlers = {"authorizer": relay.authorizer, "router": relay.router, "worker": broken}
    with Stack(container.url, handlers=handlers) as stack:
        answer = talk(stack, settings_of)
    assert answer["type"] == "settings" and answer["model"] is None


def test_settings_are_refused_once_the_token_has_expired(stack: Stack) -> None:
    stack.admit("short", "visitor", expires=int(time.time()) + 2)

    async def conversation() -> Any:
        async with websockets.connect(stack.url.replace("=local", "=short")) as socket:
            await asyncio.sleep(2.1)
            return await settings_of(socket)

    assert asyncio.run(conversation())["error"]["code"] == "unauthorized"


def test_a_gateways_own_maxima_are_described() -> None:
    from limits import described, settings

    found = described(None, 50, 2)["settings"]
    assert (found["max_tokens"]["maximum"], found["max_tokens"]["default"], found["n"]["maximum"]) == (50, 50, 2)
    assert settings()["max_tokens"]["maximum"] == 100_000


def test_a_style_goes_through_the_gateway_to_the_model() -> None:
    from limits import InvalidRequest, validate

    checked = validate({"prompt": "It", "style": "ash:0.7,birch:0.3"}, 1000, 4, 24_000)
    assert checked["style"] == "ash:0.7,birch:0.3"
    for wrong in (3, None, "x" * 201, "a\nb", ["ash"]):
        with pytest.raises(InvalidRequest, match="style must be a string of at most 200") as refused:
            validate({"prompt": "It", "style": wrong}, 1000, 4, 24_000)
        assert refused.value.error["param"] == "style"


def test_the_package_needs_only_what_the_runtime_has() -> None:
    allowed = set(sys.stdlib_module_names) | {"boto3", "botocore", "limits", "wire", "endpoint"}
    for name in FILES:
        for node in ast.walk(ast.parse((ROOT / "lambda" / name).read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert module and module.split(".")[0] in allowed, (name, module)
    tops = [node for node in ast.parse((ROOT / "lambda" / "wire.py").read_text()).body if isinstance(node, ast.Import)]
    assert "boto3" in {alias.name for node in tops for alias in node.names}, "loaded in the first request otherwise"


def test_the_ledgers_calls_are_dynamodbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls against moto, which parses the expressions and refuses reserved words."""
    moto = pytest.importorskip("moto", reason="needs moto: pip install -r requirements-aws.txt")
    import boto3

    names = {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x"}
    for name, value in {f"AWS_{name}": value for name, value in names.items()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TABLE_NAME", "ledger")
    monkeypatch.setenv("TOKENS_TABLE", "tokens")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_DYNAMODB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    with moto.mock_aws():
        keys = [("connection_id", "HASH"), ("request_id", "RANGE")]
        boto3.client("dynamodb").create_table(
            TableName="ledger",
            KeySchema=[{"AttributeName": name, "KeyType": kind} for name, kind in keys],
            AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name, _ in keys],
            BillingMode="PAY_PER_REQUEST",
        )
        load_handlers()
        import wire

        requests = wire.RequestTable(wire.RelaySettings.read(), "c=")
        assert not requests.start("r") and not requests.request_stop("r")
        assert requests.register("r") and not requests.register("r")
        assert requests.active() == ["r"]
        assert requests.start("r") and not requests.start("r")
        assert not requests.stop_requested("r") and requests.request_stop("r") and requests.stop_requested("r")
        assert requests.end("r") and not requests.end("r")
        assert requests.active() == [] and not requests.stop_requested("other")
        for number in range(4):  # a page of a query ends after 1 MB, before any filter
            old = {"connection_id": {"S": "c="}, "request_id": {"S": f"a{number}"}, "pad": {"S": "x" * 380_000}}
            boto3.client("dynamodb").put_item(TableName="ledger", Item=old)
        assert requests.register("z") and requests.active() == ["z"]
        boto3.client("dynamodb").create_table(
            TableName="tokens",
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
        tokens = wire.TokenTable(wire.RelaySettings.read())
        access = wire.Access("h", "alice", 100)
        day = tokens.spend(access, 60)
        assert day and tokens.spend(access, 41) is None and tokens.spend(access, 101) is None
        tokens.give_back("h", day, 20)
        assert tokens.spend(access, 60) == day and tokens.spend(access, 1) is None
        assert tokens.spend(wire.Access("other", "bob"), 10**6) == "" and tokens.find("unknown") is None
