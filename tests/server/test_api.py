"""Texts over REST, server-sent events, JSON lines and WebSocket: alike everywhere, and ended when nobody reads."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from starlette.testclient import TestClient

import api
from config import FINISH_SENTENCE, GenerationParams
from inference.engine import Engine
from inference.quantize import load_for_writing
from inference.writing import generate
from model import GPT
from sampling import sentence_end
from server import schemas
from server.client_bodies import CompletionBody, KoboldBody, LlamaBody
from server.service import Service
from storage.gpt2_format import folder_defaults
from support.api_support import (
    PARAMS,
    PROMPT,
    TEXT,
    check_protocol,
    events,
    settings,
    socket_messages,
    texts,
    until,
)
from support.tiny_models import save
from tokenizer import Tokenizer


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


def test_a_batch_gives_each_prompt_the_text_it_has_alone(client: TestClient) -> None:
    prompts = [PROMPT, "", "“the lamps”"]
    reply = client.post("/generate/batch", json={"prompts": prompts, **PARAMS}).json()
    alone = [client.post("/generate", json={"prompt": prompt, **PARAMS}).json() for prompt in prompts]
    assert [r["generated_text"] for r in reply["results"]] == [r["generated_text"] for r in alone]
    assert reply["usage"]["completion_tokens"] == sum(r["usage"]["completion_tokens"] for r in alone)


@pytest.mark.parametrize("path", ["/generate", "/invocations"])
def test_streams_consist_of_the_protocols_messages(client: TestClient, path: str) -> None:
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


def test_json_lines_escape_unicode_line_separators() -> None:
    from server.streaming import json_line

    line = json_line({"text": "a\x85b\u2028c\u2029d\ne“"})
    assert line.decode().splitlines() == [line.decode()[:-1]]
    assert json.loads(line)["text"] == "a\x85b\u2028c\u2029d\ne“"


def surfaces(client: TestClient, **more: Any) -> dict[str, str]:
    """The same request's text, on each surface of a server."""
    wanted = PARAMS | more
    body = {"prompt": PROMPT, **wanted}
    found = {
        "rest": client.post("/generate", json=body).json()["generated_text"],
        "events": texts(events(client.post("/generate", json={**body, "stream": True})))[0],
        "invocations": client.post("/invocations", json=body).json()["generated_text"],
        "batch": client.post("/generate/batch", json={"prompts": ["x", PROMPT], **wanted}).json()["results"][1][
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


FILTERED: dict[str, Any] = {
    "typical_p": 0.9,
    "top_n_sigma": 3.0,
    "xtc_probability": 0.5,
    "dry_multiplier": 0.8,
    "presence_penalty": 0.4,
    "penalty_last_n": 9,
    "logit_bias": {"5": 2.0},
    "frequency_penalty": 0.2,
    "dry_sequence_breakers": ["\n"],
}


def test_one_seed_one_text_with_every_filter(client: TestClient, model: GPT, tokenizer: Tokenizer) -> None:
    terminal = generate(model, tokenizer, PROMPT, GenerationParams(**PARAMS | FILTERED))[0].text
    found = surfaces(client, **FILTERED)
    assert len(terminal) > 10 and found == dict.fromkeys(found, terminal)
    assert terminal != generate(model, tokenizer, PROMPT, GenerationParams(**PARAMS))[0].text


def test_the_prompt_comes_with_the_text_on_request(client: TestClient) -> None:
    plain = surfaces(client)["rest"]
    body = {"prompt": PROMPT, "n": 2, "return_full_text": True, **PARAMS}
    whole = client.post("/generate", json=body).json()
    assert whole["generated_text"] == whole["samples"][0]["text"] == PROMPT + plain
    assert whole["samples"][1]["text"].startswith(PROMPT) and whole["samples"][0]["tokens"] == PARAMS["max_tokens"]
    assert client.post("/invocations", json=body).json()["generated_text"] == PROMPT + plain
    lines = client.post("/invocations", json={**body, "stream": True}).text.splitlines()
    assert texts([json.loads(line) for line in lines])[0] == PROMPT + plain
    asked = {"prompts": ["x", PROMPT], "return_full_text": True, **PARAMS}
    results = client.post("/generate/batch", json=asked).json()["results"]
    assert results[1]["generated_text"] == PROMPT + plain and results[0]["generated_text"].startswith("x")
    with client.websocket_connect("/ws") as socket:
        found = socket_messages(socket, body)
    check_protocol(found, 2)
    assert texts(found)[0] == PROMPT + plain


def test_a_sentence_is_finished_alike_on_every_surface(client: TestClient, model: GPT, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(mark)[0] for mark in (".", " ")]
    asked: dict[str, Any] = {"max_tokens": 6, "finish_sentence": 60, "logit_bias": {str(id): 5.0 for id in ids}}
    terminal = generate(model, tokenizer, PROMPT, GenerationParams(**PARAMS | asked))[0]
    assert 6 <= terminal.tokens < 66 and sentence_end(terminal.text) == len(terminal.text.rstrip()) > 0
    found = surfaces(client, **asked)
    assert found == dict.fromkeys(found, terminal.text)
    shorter = generate(model, tokenizer, PROMPT, GenerationParams(**PARAMS | asked | {"finish_sentence": 0}))[0]
    assert shorter.tokens == 6 and terminal.text.startswith(shorter.text)


def test_sentences_are_finished_where_people_write_and_not_for_clients_that_count_tokens(tmp_path: Path) -> None:
    usual = folder_defaults(tmp_path)
    made = [
        schemas.GenerateBody(prompt="x").params(settings(), usual),
        schemas.BatchBody(prompts=["x"]).params(settings(), usual),
        CompletionBody(prompt="x").params(settings()),
        KoboldBody(prompt="x").params(settings(), usual),
        LlamaBody(prompt="x").params(settings(), usual),
        schemas.GenerateBody(prompt="x", finish_sentence=0).params(settings(), usual),
        KoboldBody(prompt="x", finish_sentence=7).params(settings(), usual),
    ]
    assert [params.finish_sentence for params in made] == [FINISH_SENTENCE, FINISH_SENTENCE, 0, 0, 0, 0, 7]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_one_seed_one_text_with_float16_and_int8_weights(
    model: GPT, tokenizer: Tokenizer, tmp_path: Path, dtype: str
) -> None:
    save(tmp_path / "model", model, tokenizer)
    narrow, _, remark = load_for_writing(tmp_path / "model", dtype=dtype)
    if remark:
        pytest.skip(remark)
    terminal = generate(narrow, tokenizer, PROMPT, GenerationParams(**PARAMS))[0].text
    with (
        Engine(narrow, tokenizer, name="narrow", slots=4, queue_size=32) as engine,
        TestClient(api.create_app(settings(), engine)) as client,
    ):
        crowd = [engine.submit(TEXT[: 5 + 3 * number], GenerationParams(max_tokens=200)) for number in range(3)]
        found = surfaces(client)
        for job in crowd:
            job.cancel()
    assert len(terminal) > 10 and found == dict.fromkeys(found, terminal)


def test_one_seed_one_text_on_every_surface(client: TestClient, live: str, model: GPT, tokenizer: Tokenizer) -> None:
    terminal = generate(model, tokenizer, PROMPT, GenerationParams(**PARAMS))[0].text
    assert len(terminal) > 10
    alone = surfaces(client)
    assert alone == dict.fromkeys(alone, terminal)
    stop = threading.Event()

    def load(number: int) -> None:
        with httpx.Client(base_url=live) as other:
            while not stop.is_set():
                other.post("/generate", json={"prompt": TEXT[: 5 + 3 * number], "max_tokens": 9 + number, "n": 2})

    threads = [threading.Thread(target=load, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        found = surfaces(client)
        assert found == dict.fromkeys(found, terminal)
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
    with TestClient(api.create_app(settings(flush_ms=500), engine)) as gathering:
        gathered = events(gathering.post("/generate", json={**body, "stream": True}))
    check_protocol(gathered, 2)
    assert texts(gathered, 2) == texts(singles, 2)
    assert len(gathered) < len(singles) / 3
    assert len(gathered[1]["text"]) < 20  # the first token does not wait for the others


def test_text_held_back_for_a_stop_string_is_sent_at_the_end(client: TestClient, engine: Engine) -> None:
    body = {"prompt": PROMPT, **PARAMS}
    whole = client.post("/generate", json=body).json()["generated_text"]
    body |= {"stop": [whole[-4:] + "#"], "repetition_penalty": 1.2}
    with TestClient(api.create_app(settings(flush_ms=20), engine)) as gathering:
        for surface in (client, gathering):
            assert texts(events(surface.post("/generate", json={**body, "stream": True})))[0] == whole
        chunks = events(gathering.post("/v1/completions", json={**body, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    assert client.post("/generate", json=body).json()["generated_text"] == whole


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
        ("/v1/completions", {"prompt": "x", "best_of": 17}, "best_of"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias"),
        ("/v1/completions", {"prompt": "x", "presence_penalty": 2.1}, "presence_penalty"),
        ("/v1/completions", {"prompt": "x", "frequency_penalty": -2.5}, "frequency_penalty"),
        ("/v1/completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
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


def test_a_deadline_ends_the_text(engine: Engine) -> None:
    with TestClient(api.create_app(settings(deadline_s=1), engine)) as client:
        reply = client.post("/generate", json={"prompt": PROMPT, "max_tokens": 4000, "n": 4}).json()
        assert reply["finish_reason"] == "deadline" and 0 < reply["usage"]["completion_tokens"] < 16_000
        chunk = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4000, "n": 4}).json()
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
def test_a_client_that_disconnects_stops_its_generation(
    live: str, engine: Engine, path: str, body: dict[str, Any]
) -> None:
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
    assert len(operations) == 33 and not any("422" in operation["responses"] for operation in operations)
    assert document["security"] and not client.app.state.service.origins.origins  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_client_that_stops_reading_loses_its_stream(engine: Engine, kind: str) -> None:
    app = api.create_app(settings(stall_s=0.3), engine)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 4000, "stream": True, "action": "generate"}).encode()
    if kind == "http":
        body = body.replace(b', "action": "generate"', b"")
    scope = {
        "type": kind, "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/generate" if kind == "http" else "/ws", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("t", 1), "server": ("t", 80), "state": {},
        "subprotocols": [],
    }  # fmt: skip
    arriving: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
    if kind == "websocket":
        arriving = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": body.decode()}]
    sent: list[Any] = []

    async def receive() -> Any:
        if not arriving:
            await asyncio.Event().wait()
        return arriving.pop(0)

    async def send(message: Any) -> None:
        if len(sent) > 5:
            await asyncio.Event().wait()  # the socket's buffer is full
        sent.append(message)

    async def serve() -> None:
        await asyncio.wait_for(app(scope, receive, send), 20)
        assert not app.state.service.generations

    asyncio.run(serve())
    assert not any(message.get("more_body") is False for message in sent), "a cut stream must not look complete"
    assert until(lambda: engine.stats()["running"] == 0)


def test_a_failing_text_fails_its_batch_with_its_own_error(client: TestClient, engine: Engine) -> None:
    service: Service = client.app.state.service  # type: ignore[attr-defined]

    def interrupt() -> None:
        assert until(lambda: len(service.generations) == 2)
        next(iter(service.generations)).interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    answer = client.post("/generate/batch", json={"prompts": ["a", "b"], "max_tokens": 4000})
    thread.join()
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
    assert until(lambda: engine.stats()["running"] == 0)
