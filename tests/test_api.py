"""The server's contracts: REST, events, JSON lines, WebSocket, OpenAI's client, keys, limits, health, metrics, settings."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
import uvicorn
import websockets.sync.client as websockets
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import api
from api_models import Settings, read_settings
from api_service import Service
from config import ConfigError, GenerationParams, ModelConfig
from engine import Engine
from model import GPT
from tokenizer import Tokenizer, train_bpe

TEXT = "The fog lay upon the river, and “the lamps” of the quay burned low; £5 was paid for the café’s piano.\n"
PARAMS: dict[str, Any] = {"max_tokens": 24, "temperature": 1.1, "top_k": 40, "top_p": 0.9, "seed": 7}
PROMPT = "The fog lay"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = train_bpe([TEXT * 20], 300)
    tokenizer.eot = None  # no text ends before its time
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(1)
    size = tokenizer.vocab_size
    return GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=size, vocab_used=size)).eval()


@pytest.fixture(scope="module")
def engine(model: GPT, tokenizer: Tokenizer) -> Iterator[Engine]:
    engine = Engine(model, tokenizer, name="tiny", slots=8, queue_size=32)
    yield engine
    engine.close(5)


def settings(**given: Any) -> Settings:
    return read_settings(**given)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(api.create_app(settings(), engine)) as client:
        yield client


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The app behind a real socket; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=3))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def live(engine: Engine) -> Iterator[str]:
    with running(api.create_app(settings(), engine)) as address:
        yield address


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of each server-sent event."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in answer.text.split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block[6:]) for block in blocks if block != "data: [DONE]"]


def texts(messages: list[dict[str, Any]], n: int = 1) -> list[str]:
    return ["".join(m["text"] for m in messages if m["type"] == "token" and m["index"] == i) for i in range(n)]


def check_protocol(messages: list[dict[str, Any]], n: int, request_id: str | None = None) -> None:
    """Every stream: started, tokens numbered without a gap, one closing message."""
    kinds = [message["type"] for message in messages]
    assert kinds[0] == "started" and kinds[-1] == "complete" and set(kinds[1:-1]) <= {"token"}
    assert [m["seq"] for m in messages[1:-1]] == list(range(len(messages) - 2))
    assert {m["index"] for m in messages[1:-1]} <= set(range(n))
    assert len({m["request_id"] for m in messages}) == 1
    if request_id:
        assert messages[0]["request_id"] == request_id
    last = messages[-1]
    assert last["streamed"] is True and len(last["samples"]) == n
    assert last["usage"]["completion_tokens"] == sum(sample["tokens"] for sample in last["samples"])


def socket_messages(socket: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    socket.send_json({"action": "generate", **request})
    found = [socket.receive_json()]
    while found[-1]["type"] not in ("complete", "error"):
        found.append(socket.receive_json())
    return found


def test_generate_answers_with_text_usage_and_seed(client: TestClient, tokenizer: Tokenizer) -> None:
    reply = client.post("/generate", json={"prompt": PROMPT, "n": 2, "request_id": "mine", **PARAMS}).json()
    assert reply["generated_text"] == reply["samples"][0]["text"] != reply["samples"][1]["text"]
    assert reply["request_id"] == "mine" and reply["seed"] == 7 and reply["model"] == "tiny"
    assert reply["finish_reason"] == "length" and reply["truncated"] is False
    usage = reply["usage"]
    assert usage["prompt_tokens"] == len(tokenizer.encode(PROMPT))
    assert usage["completion_tokens"] == sum(sample["tokens"] for sample in reply["samples"]) == 48
    assert usage["total_tokens"] == usage["prompt_tokens"] + 48
    assert client.post("/generate", json={"prompt": PROMPT, "n": 2, **PARAMS}).json()["samples"] == reply["samples"]


def test_a_seed_of_the_servers_own_survives_json(client: TestClient) -> None:
    first = client.post("/generate", json={"prompt": PROMPT, "max_tokens": 12}).json()
    assert first["seed"] < 2**53
    second = client.post("/generate", json={"prompt": PROMPT, "max_tokens": 12, "seed": first["seed"]}).json()
    assert second["generated_text"] == first["generated_text"]
    assert client.post("/generate", json={"prompt": PROMPT, "max_tokens": 12}).json()["seed"] != first["seed"]


def test_max_length_is_another_name_for_max_tokens(client: TestClient) -> None:
    tokens = lambda **body: client.post("/generate", json={"prompt": "a", **body}).json()["usage"]["completion_tokens"]  # noqa: E731
    assert tokens(max_length=3) == 3
    assert tokens(max_length=3, max_tokens=5) == 5
    assert tokens(max_length=0) == 0


def test_a_batch_is_its_prompts_one_by_one(client: TestClient) -> None:
    prompts = [PROMPT, "", "“the lamps”"]
    reply = client.post("/generate/batch", json={"prompts": prompts, **PARAMS}).json()
    alone = [client.post("/generate", json={"prompt": prompt, **PARAMS}).json() for prompt in prompts]
    assert [r["generated_text"] for r in reply["results"]] == [r["generated_text"] for r in alone]
    assert reply["usage"]["completion_tokens"] == sum(r["usage"]["completion_tokens"] for r in alone)


@pytest.mark.parametrize("path", ["/generate", "/invocations"])
def test_streams_hold_the_protocols_messages(client: TestClient, path: str) -> None:
    body = {"prompt": PROMPT, "n": 2, "request_id": "s-1", **PARAMS}
    answer = client.post(path, json={**body, "stream": True})
    if path == "/generate":
        messages = events(answer)
    else:
        assert answer.headers["content-type"] == "application/jsonlines" and answer.text.endswith("\n")
        messages = [json.loads(line) for line in answer.text.splitlines()]
    check_protocol(messages, 2, "s-1")
    whole = client.post(path, json=body).json()
    assert texts(messages, 2) == [sample["text"] for sample in whole["samples"]]
    assert messages[-1]["usage"] == whole["usage"]
    assert answer.headers["x-accel-buffering"] == "no" and "no-cache" in answer.headers["cache-control"]


def test_a_line_ends_only_where_it_should() -> None:
    from api_stream import json_line

    line = json_line({"text": "a\x85b\u2028c\u2029d\ne“"})
    assert line.decode().splitlines() == [line.decode()[:-1]]
    assert json.loads(line)["text"] == "a\x85b\u2028c\u2029d\ne“"


def test_one_seed_one_text_on_every_surface(client: TestClient, live: str, model: GPT, tokenizer: Tokenizer) -> None:
    from generate import generate

    terminal = generate(model, tokenizer, PROMPT, GenerationParams(**PARAMS))[0].text
    assert len(terminal) > 10

    def surfaces() -> dict[str, str]:
        body = {"prompt": PROMPT, **PARAMS}
        found = {
            "rest": client.post("/generate", json=body).json()["generated_text"],
            "events": texts(events(client.post("/generate", json={**body, "stream": True})))[0],
            "invocations": client.post("/invocations", json=body).json()["generated_text"],
            "batch": client.post("/generate/batch", json={"prompts": ["x", PROMPT], **PARAMS}).json()["results"][1][
                "generated_text"
            ],
        }
        lines = client.post("/invocations", json={**body, "stream": True}).text.splitlines()
        found["lines"] = texts([json.loads(line) for line in lines])[0]
        plain = {"repetition_penalty": 1.2, "min_p": 0.0}  # /v1 has OpenAI's defaults
        found["v1"] = client.post("/v1/completions", json={**body, **plain}).json()["choices"][0]["text"]
        chunks = events(client.post("/v1/completions", json={**body, **plain, "stream": True}))
        found["v1 stream"] = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        with client.websocket_connect("/ws") as socket:
            found["socket"] = texts(socket_messages(socket, body))[0]
        return found

    assert surfaces() == dict.fromkeys(surfaces(), terminal)
    stop = threading.Event()

    def load(number: int) -> None:
        with httpx.Client(base_url=live) as other:
            while not stop.is_set():
                other.post("/generate", json={"prompt": TEXT[: 5 + 3 * number], "max_tokens": 9 + number, "n": 2})

    threads = [threading.Thread(target=load, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert surfaces() == dict.fromkeys(surfaces(), terminal)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_socket_generate_stop_and_faults(client: TestClient) -> None:
    with client.websocket_connect("/ws") as socket:
        check_protocol(socket_messages(socket, {"prompt": PROMPT, "request_id": "a", "n": 2, **PARAMS}), 2, "a")
        assert socket_messages(socket, {"prompt": PROMPT})[0]["request_id"]  # made up where none is given
        socket.send_json({"action": "ping"})
        assert socket.receive_json() == {"type": "pong"}
        for message, code, param in (
            ("[[[", "bad_json", None),
            ("[]", "bad_json", None),
            ("[" * 100_000, "bad_json", None),
            ('{"action": "fly"}', "unknown_action", "action"),
            ('{"action": "stop", "request_id": "none"}', "unknown_request", "request_id"),
            ('{"action": "stop", "request_id": ["a"]}', "unknown_request", "request_id"),
            ('{"action": "generate", "request_id": "b"}', "missing", "prompt"),
            ('{"action": "generate", "prompt": "x", "temperature": NaN}', "finite_number", "temperature"),
            ('{"action": "generate", "prompt": "\\ud800"}', "value_error", "prompt"),
            ('{"action": "generate", "prompt": "x", "wings": 2}', "extra_forbidden", "wings"),
            ('{"action": "generate", "prompt": "x", "n": 17}', "limit_exceeded", "n"),
        ):
            socket.send_text(message)
            answer = socket.receive_json()
            assert answer["type"] == "error" and answer["error"]["code"] == code, message
            assert answer["error"]["param"] == param
        socket.send_bytes(json.dumps({"action": "ping"}).encode())
        assert socket.receive_json() == {"type": "pong"}

        socket.send_json({"action": "generate", "prompt": PROMPT, "request_id": "long", "max_tokens": 4000})
        assert socket.receive_json()["type"] == "started"
        socket.send_json({"action": "generate", "prompt": PROMPT, "request_id": "long"})
        socket.send_json({"action": "stop", "request_id": "long"})
        rest = [socket.receive_json()]
        while rest[-1]["type"] != "complete":
            rest.append(socket.receive_json())
        assert rest[-1]["finish_reason"] == "cancelled" and rest[-1]["usage"]["completion_tokens"] < 4000
        assert [m["error"]["code"] for m in rest if m["type"] == "error"] == ["duplicate_request"]


def test_a_socket_runs_several_texts_up_to_its_limit(engine: Engine) -> None:
    with (
        TestClient(api.create_app(settings(ws_requests=2), engine)) as client,
        client.websocket_connect("/ws") as socket,
    ):
        for name in ("a", "b", "c"):
            socket.send_json({"action": "generate", "prompt": "x", "request_id": name, "max_tokens": 300})
        seen: dict[str, list[dict[str, Any]]] = {"a": [], "b": [], "c": []}
        while not all(found and found[-1]["type"] in ("complete", "error") for found in seen.values()):
            message = socket.receive_json()
            seen[message["request_id"]].append(message)
        check_protocol(seen["a"], 1)
        check_protocol(seen["b"], 1)
        assert [m["error"]["code"] for m in seen["c"]] == ["too_many_requests"]


def test_gathered_messages_hold_the_same_text(client: TestClient, engine: Engine) -> None:
    body = {"prompt": PROMPT, "n": 2, **PARAMS, "max_tokens": 200}
    singles = events(client.post("/generate", json={**body, "stream": True}))
    with TestClient(api.create_app(settings(flush_ms=50), engine)) as gathering:
        gathered = events(gathering.post("/generate", json={**body, "stream": True}))
    check_protocol(gathered, 2)
    assert texts(gathered, 2) == texts(singles, 2)
    assert len(gathered) < len(singles) / 3
    assert len(gathered[1]["text"]) < 20  # the first token does not wait for the others


def test_faults_name_the_field_and_share_one_envelope(client: TestClient) -> None:
    for path, body, param in (
        ("/generate", {"prompt": "x", "temperature": -1}, "temperature"),
        ("/generate", {"prompt": "x", "top_p": 0}, "top_p"),
        ("/generate", {"prompt": "x", "top_k": True}, "top_k"),
        ("/generate", {"prompt": "x", "max_tokens": "3"}, "max_tokens"),
        ("/generate", {"prompt": "x", "max_tokens": 4097}, "max_tokens"),
        ("/generate", {"prompt": "x", "stop": [""]}, "stop"),
        ("/generate", {"prompt": "x", "seed": 2**63}, "seed"),
        ("/generate", {"prompt": ["x"]}, "prompt"),
        ("/generate", {"prompt": "x" * 100_001}, "prompt"),
        ("/generate", {"prompt": "x", "prompts": []}, "prompts"),
        ("/generate/batch", {"prompts": []}, "prompts"),
        ("/generate/batch", {"prompts": ["x"] * 33}, "prompts"),
        ("/invocations", {"stream": True}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [300]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": [["x"]]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"5": 1.0}}, "logit_bias"),
        ("/v1/completions", {"prompt": "x", "frequency_penalty": 0.5}, "frequency_penalty"),
        ("/v1/completions", {"prompt": "x", "logprobs": 6}, "logprobs"),
        ("/v1/score", {"text": ""}, "text"),
    ):
        answer = client.post(path, json=body)
        error = answer.json()["error"]
        assert answer.status_code == 400, (path, body, answer.text[:200])
        assert set(error) == {"message", "type", "param", "code"} and error["param"] == param, (path, error)
        assert error["type"] == "invalid_request_error" and param in error["message"]
    for answer, status, code in (
        (client.get("/nowhere"), 404, "not_found"),
        (client.get("/generate"), 405, "method_not_allowed"),
        (client.post("/v1/chat/completions", json={}), 404, "not_supported"),
        (client.post("/generate", content=b"{", headers={"Content-Type": "application/json"}), 400, "bad_json"),
        (client.post("/generate", content=b"{}", headers={"Content-Type": "text/plain"}), 400, "bad_json"),
        (client.post("/generate", content=b"x" * 1_100_000), 413, "too_large"),
        (client.post("/generate", content=iter([b"x" * 600_000] * 2)), 413, "too_large"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_stop_strings_and_end_of_text_are_not_in_the_text(client: TestClient) -> None:
    whole = client.post("/generate", json={"prompt": PROMPT, **PARAMS}).json()["generated_text"]
    stop = whole[8:11]
    for given in (stop, ["never there", stop]):
        cut = client.post("/generate", json={"prompt": PROMPT, **PARAMS, "stop": given}).json()
        assert cut["generated_text"] == whole[: whole.index(stop)] and cut["finish_reason"] == "stop"


def test_score_gives_each_tokens_probability(client: TestClient, model: GPT, tokenizer: Tokenizer) -> None:
    reply = client.post("/v1/score", json={"text": PROMPT, "top": 3}).json()
    ids = tokenizer.encode(PROMPT)
    logp = model(torch.tensor([ids]))[0].log_softmax(-1).detach()
    assert [token["id"] for token in reply["tokens"]] == ids
    assert "".join(token["text"] for token in reply["tokens"]) == PROMPT
    assert reply["tokens"][0]["logprob"] is None and reply["tokens"][0]["rank"] is None
    for at, token in enumerate(reply["tokens"][1:], 1):
        expected = float(logp[at - 1, ids[at]])
        assert token["logprob"] == pytest.approx(expected, abs=1e-4)
        assert token["probability"] == pytest.approx(float(torch.tensor(expected).exp()), rel=1e-3)
        assert token["rank"] == 1 + int((logp[at - 1] > logp[at - 1, ids[at]]).sum())
        assert PROMPT[token["start"] :].startswith(token["text"])
        assert len(token["top"]) == 3 and token["top"][0]["probability"] >= token["top"][2]["probability"]
    assert reply["logprob"] == pytest.approx(sum(token["logprob"] or 0 for token in reply["tokens"]))


def openai_client(address: str, **given: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", **{"max_retries": 0, "timeout": 30, **given})


def test_openai_client_completes(live: str, tokenizer: Tokenizer) -> None:
    with openai_client(live) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=3)
        assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
        assert whole.choices[0].finish_reason == "length" and whole.choices[0].text
        assert whole.usage is not None and whole.usage.completion_tokens == 12
        again = client.completions.create(
            model="tiny", prompt=tokenizer.encode(PROMPT), max_tokens=12, seed=3, extra_body={"top_k": -1, "min_p": 0}
        )
        assert again.choices[0].text == whole.choices[0].text
        many = client.completions.create(model="tiny", prompt=[PROMPT, "a"], n=2, max_tokens=5, seed=3)
        assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
        assert client.completions.create(model="tiny", prompt="a", seed=1).usage.completion_tokens == 16  # type: ignore[union-attr]
        stopped = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, seed=3, stop=whole.choices[0].text[2:4]
        )
        assert stopped.choices[0].finish_reason == "stop"
        assert whole.choices[0].text.startswith(stopped.choices[0].text)


def test_openai_client_streams(live: str) -> None:
    with openai_client(live) as client:
        asked: dict[str, Any] = {"model": "tiny", "prompt": [PROMPT, "a"], "n": 2, "max_tokens": 9, "seed": 3}
        whole = client.completions.create(**asked)
        pieces = ["", "", "", ""]
        reasons: dict[int, str | None] = {}
        usage = None
        for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                pieces[choice.index] += choice.text
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
        assert pieces == [choice.text for choice in whole.choices]
        assert reasons == dict.fromkeys(range(4), "length")
        assert usage is not None and usage == whole.usage


def test_openai_client_logprobs_and_echo(live: str, model: GPT, tokenizer: Tokenizer) -> None:
    with openai_client(live) as client:
        done = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=6, logprobs=2, echo=True, temperature=0
        )
        choice = done.choices[0]
        found = choice.logprobs
        assert choice.text.startswith(PROMPT) and found is not None
        prompt = tokenizer.encode(PROMPT)
        assert len(found.tokens or []) == len(prompt) + 6
        assert found.token_logprobs is not None and found.token_logprobs[0] is None
        logp = model(torch.tensor([prompt]))[0].log_softmax(-1).detach()
        for at in range(1, len(prompt)):
            assert found.token_logprobs[at] == pytest.approx(float(logp[at - 1, prompt[at]]), abs=1e-4)
        assert found.token_logprobs[len(prompt)] == pytest.approx(float(logp[-1].max()), abs=1e-4)
        assert found.top_logprobs is not None and len(found.top_logprobs[-1]) in (2, 3)
        assert found.text_offset is not None and found.text_offset == sorted(found.text_offset)
        assert found.text_offset[len(prompt)] == len(PROMPT)
        scored = client.completions.create(model="tiny", prompt=prompt, max_tokens=0, logprobs=1, echo=True)
        assert scored.choices[0].text == PROMPT and len(scored.choices[0].logprobs.tokens or []) == len(prompt)  # type: ignore[union-attr]
        streamed = list(
            client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=6, logprobs=2, echo=True, temperature=0, stream=True
            )
        )
        assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
        parts = [chunk.choices[0].logprobs.tokens or [] for chunk in streamed if chunk.choices[0].logprobs]
        assert [token for part in parts for token in part] == found.tokens


def test_openai_client_errors(live: str, engine: Engine) -> None:
    with openai_client(live) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="tiny", prompt="x", temperature=3)
        assert bad.value.param == "temperature" and bad.value.code == "less_than_equal" and bad.value.request_id
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve("gpt-9")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-9", prompt="x")
        with pytest.raises(openai.NotFoundError, match="use /v1/completions"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
    with (
        running(api.create_app(settings(api_keys="good"), engine)) as address,
        openai_client(address) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_openai_client_hears_of_a_failure_midway(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    app = api.create_app(settings(), engine)
    with running(app) as address, openai_client(address) as client:
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4000, stream=True)
        next(iter(stream))
        for run in list(app.state.service.runs):
            run.interrupt()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert until(lambda: engine.stats()["running"] == 0)


def test_a_full_queue_is_429_with_retry_after(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, name="tiny", slots=1, queue_size=1)
    with running(api.create_app(settings(), engine)) as address, httpx.Client(base_url=address) as client:
        long = {"action": "generate", "prompt": PROMPT, "max_tokens": 4000}
        with websockets.connect(f"{address.replace('http', 'ws')}/ws", close_timeout=0.2) as socket:
            for _ in range(2):
                socket.send(json.dumps(long))
            assert until(lambda: engine.stats()["running"] + engine.stats()["waiting"] == 2)
            answer = client.post("/generate", json={"prompt": "x"})
            assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
            with openai_client(address) as other, pytest.raises(openai.RateLimitError):
                other.completions.create(model="tiny", prompt="x")
            refused = client.post("/generate/batch", json={"prompts": ["x", "y"]})
            assert refused.status_code == 429
            assert int(re.search(r"vlg_rejected_total (\d+)", client.get("/metrics").text)[1]) >= 3  # type: ignore[index]
        assert until(lambda: engine.stats()["running"] + engine.stats()["waiting"] == 0)
        assert client.post("/generate", json={"prompt": "x", "max_tokens": 3}).status_code == 200
    engine.close(5)


def test_a_deadline_ends_the_text(engine: Engine) -> None:
    with TestClient(api.create_app(settings(deadline_s=0.3), engine)) as client:
        reply = client.post("/generate", json={"prompt": PROMPT, "max_tokens": 4000}).json()
        assert reply["finish_reason"] == "deadline" and 0 < reply["usage"]["completion_tokens"] < 4000
        chunk = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4000}).json()
        assert chunk["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"stream": True}),
        ("/generate", {}),
        ("/invocations", {"stream": True}),
        ("/v1/completions", {"stream": True, "n": 2}),
        ("/generate/batch", {}),
    ],
)
def test_a_vanished_client_stops_the_work(live: str, engine: Engine, path: str, body: dict[str, Any]) -> None:
    import socket

    host, port = live.removeprefix("http://").split(":")
    given = {"max_tokens": 4000, "temperature": 1.0, **body}
    given |= {"prompts": ["a", "b"]} if path.endswith("batch") else {"prompt": "a"}
    content = json.dumps(given).encode()
    before = engine.stats()["tokens"]
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        raw.sendall(head.encode() + content)
        assert until(lambda: engine.stats()["running"] > 0)
    assert until(lambda: engine.stats()["running"] + engine.stats()["waiting"] == 0)
    assert engine.stats()["tokens"] - before < 3900


def test_health_tells_loading_from_ready_from_failed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = threading.Event()

    def load(folder: Path, **options: Any) -> Engine:
        assert gate.wait(20) and options["slots"] == 3 and folder == tmp_path / "story"
        return engine

    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.setattr(Engine, "close", lambda *_, **__: None)
    monkeypatch.setattr("checkpoint.find_model", lambda path: path)
    with TestClient(api.create_app(settings(model=tmp_path / "story", slots=3))) as client:
        assert client.get("/livez").status_code == 200
        for path in ("/health", "/readyz", "/ping", "/v1/models"):
            answer = client.get(path)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
        answer = client.post("/generate", json={"prompt": "x"})
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert "vlg_ready 0.0" in client.get("/metrics").text
        gate.set()
        assert until(lambda: client.get("/health").status_code == 200)
        found = client.get("/health").json()
        assert found["status"] == "ok" and found["context"] == 64 and found["device"] == "cpu"
        assert client.get("/ping").status_code == client.get("/readyz").status_code == 200
        client.app.state.service.draining = True  # type: ignore[attr-defined]
        assert client.get("/health").json()["error"]["code"] == "shutting_down"
        assert client.get("/livez").status_code == 200

    def broken(folder: Path, **options: Any) -> Engine:
        raise OSError("model.safetensors: no such file")

    monkeypatch.setattr(Engine, "load", broken)
    with TestClient(api.create_app(settings(model=tmp_path))) as client:
        assert until(lambda: client.get("/health").json()["error"]["code"] == "load_failed")
        assert "model.safetensors" in client.get("/health").json()["error"]["message"]


def test_keys_open_the_server_and_nothing_else_does(engine: Engine) -> None:
    with TestClient(api.create_app(settings(api_keys="first-key, second-key"), engine)) as client:
        for path in ("/health", "/livez", "/readyz", "/ping", "/", "/docs", "/openapi.json", "/client.js"):
            assert client.get(path).status_code == 200, path
        body = {"prompt": "x", "max_tokens": 1}
        for headers in (
            {},
            {"Authorization": "Bearer "},
            {"Authorization": "Bearer first"},
            {"Authorization": "Basic first-key"},
            {"Authorization": "Bearer first-key, second-key"},
            {"X-API-Key": "x"},
            {"Authorization": "Bearer ké".encode("latin-1")},
        ):
            answer = client.post("/generate", json=body, headers=headers)  # type: ignore[arg-type]
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics").status_code == client.get("/v1/models").status_code == 401
        for headers in ({"Authorization": "Bearer second-key"}, {"X-API-Key": "first-key"}):
            assert client.post("/generate", json=body, headers=headers).status_code == 200
        assert client.post("/generate?token=first-key", json=body).status_code == 401
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws"):
            pass
        with client.websocket_connect("/ws?token=first-key") as socket:
            assert socket_messages(socket, body)[-1]["type"] == "complete"
        with client.websocket_connect("/ws", headers={"Authorization": "Bearer second-key"}) as socket:
            assert socket_messages(socket, body)[-1]["type"] == "complete"


def test_origins_are_closed_unless_listed(engine: Engine, client: TestClient) -> None:
    for origin in ("https://elsewhere.example", "null", "http://testserver.example", "testserver"):
        if origin != "testserver":
            with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws", headers={"Origin": origin}):
                pass
        assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": origin}).headers
    with client.websocket_connect("/ws", headers={"Origin": "http://testserver"}) as socket:
        socket.send_json({"action": "ping"})
        assert socket.receive_json() == {"type": "pong"}
    app = api.create_app(settings(origins="https://pages.example, null", api_keys="k"), engine)
    with TestClient(app) as other:
        for origin in ("https://pages.example", "null"):
            with other.websocket_connect("/ws?token=k", headers={"Origin": origin}):
                pass
            answer = other.post("/generate", json={"prompt": "x"}, headers={"Origin": origin})
            assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == origin
        flight = other.options(
            "/generate",
            headers={
                "Origin": "https://pages.example",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            },
        )
        assert flight.status_code == 200 and "authorization" in flight.headers["access-control-allow-headers"].lower()
        assert other.get("/health", headers={"Origin": "https://no.example"}).headers.get(
            "access-control-allow-origin"
        ) not in ("*", "https://no.example")


def test_request_ids_metrics_and_logs_without_prompts(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    secret = "zanzibar moonlight"
    with caplog.at_level(logging.DEBUG, logger="api"):
        logging.getLogger("api").propagate = True
        answer = client.post(
            "/generate", json={"prompt": secret, "max_tokens": 4}, headers={"X-Request-ID": "trace-17"}
        )
        client.post("/generate", json={"prompt": secret, "temperature": secret})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "trace-17"
    assert client.get("/livez", headers={"X-Request-ID": "a b\x00"}).headers["x-request-id"] != "a b\x00"
    rows = [record.fields for record in caplog.records if record.getMessage() == "request"]  # type: ignore[attr-defined]
    assert [(row["status"], row["route"]) for row in rows] == [(200, "/generate"), (400, "/generate")]
    assert rows[0]["request_id"] == "trace-17" and rows[0]["ms"] > 0
    assert secret not in caplog.text + str(rows)
    metrics = client.get("/metrics").text
    for name in (
        'vlg_requests_total{method="POST",route="/generate",status="200"}',
        'vlg_request_seconds_count{route="/generate"}',
        "vlg_first_token_seconds_count",
        "vlg_text_tokens_per_second_count",
        "vlg_running",
        "vlg_waiting",
        "vlg_rejected_total",
        "vlg_tokens_total",
        "vlg_tokens_per_s",
    ):
        assert name in metrics, name
    assert float(re.search(r"^vlg_tokens_total (\S+)", metrics, re.M)[1]) > 4  # type: ignore[index]


def test_log_lines_are_json_and_hide_keys() -> None:
    from api_service import HideQuery, JsonLog

    record = logging.LogRecord("api", logging.INFO, "", 0, "request", (), None)
    record.fields = {"status": 200}
    assert json.loads(JsonLog().format(record))["status"] == 200
    line = logging.LogRecord("uvicorn.error", logging.INFO, "", 0, '%s - "WebSocket %s"', ("a:1", "/ws?token=k"), None)
    assert HideQuery().filter(line) and line.getMessage() == 'a:1 - "WebSocket /ws"'


def test_the_openapi_document_states_this_servers_limits(engine: Engine) -> None:
    app = api.create_app(settings(max_tokens=50, max_n=3, max_prompts=4, max_prompt_chars=900, api_keys="k"), engine)
    with TestClient(app) as client:
        document = client.get("/openapi.json").json()
        assert client.get("/docs").status_code == client.get("/redoc").status_code == 200
        assert (
            client.post("/generate", json={"prompt": "x", "max_tokens": 51}, headers={"X-API-Key": "k"}).status_code
            == 400
        )
    body = document["components"]["schemas"]["GenerateBody"]["properties"]
    assert body["max_tokens"]["maximum"] == 50 and body["n"]["maximum"] == 3 and body["prompt"]["maxLength"] == 900
    assert document["components"]["schemas"]["BatchBody"]["properties"]["prompts"]["maxItems"] == 4
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) == 12 and not any("422" in operation["responses"] for operation in operations)
    assert document["security"] and not client.app.user_middleware[0].kwargs.get("allow_origins")  # type: ignore[attr-defined]


def test_schemathesis_finds_nothing(engine: Engine) -> None:
    import hypothesis
    import schemathesis
    from hypothesis import HealthCheck

    limits = settings(max_tokens=8, max_n=2, max_prompts=3, max_prompt_chars=200, stall_s=5)
    app = api.create_app(limits, engine)
    with TestClient(app):
        document = schemathesis.openapi.from_asgi("/openapi.json", app)
        operations = [result.ok() for result in document.get_all_operations()]
        modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        for operation, mode in itertools.product(operations, modes):
            if mode == schemathesis.GenerationMode.NEGATIVE and operation.method.upper() == "GET":
                continue  # nothing in it could be wrong

            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            @hypothesis.settings(
                max_examples=12,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            def check(case: Any) -> None:
                case.call_and_validate()

            check()
    assert len(operations) == 12


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("PORT", "9001"), ("API_KEYS", "a,b"), ("ORIGINS", ""), ("FLUSH_MS", "40"), ("MODEL", "")):
        monkeypatch.setenv(f"VLG_{name}", value)
    found = api.environment_settings()
    assert (found.port, found.flush_ms, found.origins, found.model) == (9001, 40.0, (), None)
    assert [key.get_secret_value() for key in found.api_keys] == ["a", "b"] and "'a'" not in repr(found)
    monkeypatch.setenv("VLG_PORT", "many")
    with pytest.raises(ConfigError, match="VLG_PORT"):
        api.environment_settings()
    monkeypatch.delenv("VLG_PORT")
    assert settings().host == "127.0.0.1" and settings().port == 8000
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    monkeypatch.setattr(api, "SAGEMAKER_MODEL", tmp_path)
    found = api.environment_settings(serve=True)
    assert (found.host, found.port, found.model) == ("0.0.0.0", 8080, tmp_path / "best")
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "8111")
    assert api.environment_settings().port == 8111
    monkeypatch.setenv("VLG_HOST", "127.0.0.2")
    assert api.environment_settings().host == "127.0.0.2"


def test_main_reports_bad_flags_and_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import socket

    assert api.main(["--port", "70000"]) == 2 and "port" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert api.main(["--port", str(taken.getsockname()[1]), "--model", str(tmp_path)]) == 1
        assert "choose another --port" in capsys.readouterr().err
    with pytest.raises(SystemExit) as helped:
        api.main(["--help"])
    assert helped.value.code == 0 and "--deadline-s" in capsys.readouterr().out


def test_the_page_is_served_under_a_strict_policy(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy
    for name in re.findall(r'(?:src|href)="([\w.]+)"', page.text):
        assert client.get(f"/{name}").status_code == 200
    script = client.get("/client.js").text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script)
    fields = set(re.findall(r'^  \["(\w+)", ', script, re.M)) | {"seed", "stop"}
    assert fields == set(GenerationParams.model_fields)
    assert client.get("/../api.py").status_code == 404


def test_a_text_ends_with_an_error_when_the_server_stops(engine: Engine) -> None:
    app = api.create_app(settings(grace_s=0.2), engine)
    service: Service = app.state.service
    done = []

    async def stop() -> None:
        await service.drain(lambda: done.append(True))

    with (
        running(app) as address,
        websockets.connect(f"{address.replace('http', 'ws')}/ws", close_timeout=0.2) as socket,
    ):
        socket.send(json.dumps({"action": "generate", "prompt": PROMPT, "max_tokens": 4000}))
        assert json.loads(socket.recv(5))["type"] == "started"
        service.draining = True
        threading.Thread(target=lambda: asyncio.run(stop())).start()
        last: dict[str, Any] = {}
        while last.get("type") not in ("complete", "error"):
            last = json.loads(socket.recv(10))
        assert last["error"]["code"] == "shutting_down"
        assert until(lambda: bool(done))
        socket.send(json.dumps({"action": "generate", "prompt": PROMPT}))
        assert json.loads(socket.recv(5))["error"]["code"] == "shutting_down"
    assert until(lambda: engine.stats()["running"] == 0)
