"""Health, model lifecycle, keys, origins, logs, metrics, settings, limits and graceful shutdown."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import websockets.sync.client as websockets
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import api
from config import FINISH_SENTENCE, SETTINGS, ConfigError, GenerationParams
from inference.engine import Engine
from model import GPT
from server.service import Service
from server.shutdown import drain
from support.api_support import (
    PROMPT,
    openai_client,
    running,
    settings,
    socket_messages,
    until,
)
from tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """What a test does to the loggers is undone."""
    found = [logging.getLogger(name) for name in ("api", "uvicorn.error")]
    kept = [(log.handlers, log.propagate, log.level) for log in found]
    yield
    for log, (handlers, propagate, level) in zip(found, kept, strict=True):
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def test_health_distinguishes_loading_ready_and_failed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = threading.Event()

    def load(folder: Path, **options: Any) -> Engine:
        assert gate.wait(20) and options["slots"] == 3 and folder == tmp_path / "story"
        return engine

    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.setattr(Engine, "close", lambda *_, **__: None)
    monkeypatch.setattr("checkpoint.find_model", lambda path, root: path)
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

    monkeypatch.setitem(sys.modules, "inference.engine", None)  # it cannot even be imported
    with TestClient(api.create_app(settings(model=tmp_path))) as client:
        assert until(lambda: client.get("/health").json()["error"]["code"] == "load_failed")


def test_fields_left_out_take_the_model_folders_recommended_values(
    model: GPT, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without settings the server writes what the terminal writes without settings; OpenAI's defaults stay OpenAI's."""
    import generate
    from checkpoint import save_model
    from inference import writing

    recommended = GenerationParams(max_tokens=9, temperature=0.4, top_k=7, top_p=0.9, repetition_penalty=1.0)
    save_model(tmp_path / "m", model, tokenizer, card={}, generation=recommended)
    assert generate.main(["--model", str(tmp_path / "m"), "--prompt", PROMPT, "--seed", "5", "--no-echo"]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    with TestClient(api.create_app(settings(model=tmp_path / "m"))) as client:
        assert until(lambda: client.get("/health").status_code == 200, 120)
        body = {"prompt": PROMPT, "seed": 5}
        assert client.post("/generate", json=body).json()["generated_text"] == text
        batch = client.post("/generate/batch", json={"prompts": [PROMPT], "seed": 5}).json()
        assert batch["results"][0]["generated_text"] == text
        with client.websocket_connect("/ws") as socket:
            found = socket_messages(socket, body)
        assert "".join(message["text"] for message in found if message["type"] == "token") == text
        own = {**body, "max_tokens": 9, "temperature": 2.0}
        expected = recommended.model_copy(update={"temperature": 2.0, "seed": 5, "finish_sentence": FINISH_SENTENCE})
        (result,) = writing.generate(model, tokenizer, PROMPT, expected)
        assert client.post("/generate", json=own).json()["generated_text"] == result.text != text
        assert (
            client.post("/generate", json={**body, "max_length": 4, "finish_sentence": 0}).json()["usage"][
                "completion_tokens"
            ]
            == 4
        )
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 16
        documented = client.get("/openapi.json").json()["components"]["schemas"]["GenerateBody"]["properties"]
        assert documented["temperature"]["default"] == 0.4 and documented["max_tokens"]["default"] == 9
        told = client.get("/settings").json()
        assert told["model"].startswith("m") and told["context"] == client.get("/health").json()["context"]
        usual = {name: documented[name].get("default") for name in GenerationParams.model_fields}
        assert {name: schema["default"] for name, schema in told["settings"].items()} == usual
        assert client.post("/invocations", json={"action": "settings", "prompt": ""}).json() == told
        with client.websocket_connect("/ws") as socket:
            socket.send_json({"action": "settings"})
            assert socket.receive_json() == {"type": "settings", **told}
    with TestClient(api.create_app(settings(model=tmp_path / "m", max_tokens=3))) as client:
        assert until(lambda: client.get("/health").status_code == 200, 120)
        assert client.post("/generate", json=body).json()["usage"]["completion_tokens"] == 3
        length = client.get("/settings").json()["settings"]["max_tokens"]
        assert length["default"] == length["maximum"] == 3


def test_only_a_valid_key_opens_the_server(engine: Engine) -> None:
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


LISTED = "HTTPS://Pages.Example:443/"


@pytest.mark.parametrize(
    ("listed", "origin", "allowed"),
    [
        (LISTED, "https://pages.example", True),
        (LISTED, "https://pages.example:443", True),
        (LISTED, "http://pages.example", False),
        (LISTED, "https://pages.example:8443", False),
        (LISTED, "https://pages.example.evil", False),
        (LISTED, "null", False),
        ("http://[::1]:80", "http://[::1]", True),
        ("*", "https://anywhere.example", True),
        ("*", "null", True),
        ("null", "null", True),
        ("null", "https://anywhere.example", False),
    ],
)
def test_one_matcher_decides_on_origins_for_http_and_websocket(
    engine: Engine, listed: str, origin: str, allowed: bool
) -> None:
    with TestClient(api.create_app(settings(origins=listed), engine)) as client:
        answer = client.get("/health", headers={"Origin": origin})
        assert (answer.headers.get("access-control-allow-origin") in (origin, "*")) is allowed
        flight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        flight["Access-Control-Request-Headers"] = "x-stainless-os,x-stainless-lang,authorization"
        answer = client.options("/v1/completions", headers=flight)
        assert (answer.status_code == 200) is allowed
        if allowed:
            assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
        refused = False
        try:
            with client.websocket_connect("/ws", headers={"Origin": origin}):
                pass
        except WebSocketDisconnect:
            refused = True
        assert refused is not allowed


def test_the_servers_own_page_needs_no_origin_in_the_settings(engine: Engine) -> None:
    for host, origin in (("testserver:80", "http://testserver"), ("TestServer", "http://testserver:80")):
        with (
            TestClient(api.create_app(settings(), engine)) as client,
            client.websocket_connect("/ws", headers={"Origin": origin, "Host": host}) as socket,
        ):
            socket.send_json({"action": "ping"})
            assert socket.receive_json() == {"type": "pong"}


def test_a_refused_origin_is_logged_with_what_it_was_compared_with(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("api").propagate = True
    with TestClient(api.create_app(settings(origins="https://a.example/,b.example"), engine)) as client:
        client.get("/health", headers={"Origin": "https://c.example"})
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws", headers={"Origin": "null"}):
            pass
        client.get("/health", headers={"Origin": "https://a.example"})
        client.get("/health", headers={"Origin": "http://testserver"})
    rows = [(record.getMessage(), record.fields) for record in caplog.records if "origin" in record.getMessage()]  # type: ignore[attr-defined]
    assert [name for name, _ in rows] == ["origin_ignored", "origin_refused", "origin_refused"]
    assert rows[0][1]["origin"] == "b.example" and "scheme" in rows[0][1]["message"]
    assert rows[1][1] == {"origin": "https://c.example", "host": "testserver", "allowed": ["https://a.example"]}
    assert rows[2][1]["origin"] == "null"


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
        "vlg_between_tokens_seconds_count",
        "vlg_text_tokens_per_second_count",
        "vlg_running",
        "vlg_waiting",
        "vlg_rejected_total",
        "vlg_tokens_total",
        "vlg_tokens_per_s",
    ):
        assert name in metrics, name
    assert float(re.search(r"^vlg_between_tokens_seconds_count (\S+)", metrics, re.M)[1]) >= 3  # type: ignore[index]
    assert float(re.search(r"^vlg_tokens_total (\S+)", metrics, re.M)[1]) >= 4  # type: ignore[index]


def test_log_lines_are_json_and_hide_keys() -> None:
    from server.logs import HideQuery, JsonLog

    record = logging.LogRecord("api", logging.INFO, "", 0, "request", (), None)
    record.fields = {"status": 200}
    assert json.loads(JsonLog().format(record))["status"] == 200
    line = logging.LogRecord("uvicorn.error", logging.INFO, "", 0, '%s - "WebSocket %s"', ("a:1", "/ws?token=k"), None)
    assert HideQuery().filter(line) and line.getMessage() == 'a:1 - "WebSocket /ws"'


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
    described = client.get("/openapi.json").json()["components"]["schemas"]["GenerateBody"]["properties"]
    sliders = {name: setting.slider for name, setting in SETTINGS.items() if setting.slider}
    assert {name: tuple(part["x-slider"]) for name, part in described.items() if "x-slider" in part} == sliders
    assert described["top_p"]["x-label"] == "Top-p" and described["top_p"]["x-step"] == 0.01
    assert client.get("/../api.py").status_code == 404


def test_a_text_ends_with_an_error_when_the_server_stops(engine: Engine) -> None:
    app = api.create_app(settings(grace_s=0.2), engine)
    service: Service = app.state.service
    done = []

    async def stop() -> None:
        await drain(service, lambda: done.append(True))

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


def test_a_request_cancelled_during_tokenization_leaves_no_job(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(settings(), engine)
    started, jobs = threading.Event(), []
    submit = engine.submit

    def slow(*given: Any, **more: Any) -> Any:
        started.set()
        time.sleep(0.3)
        jobs.append(submit(*given, **more))
        return jobs[-1]

    monkeypatch.setattr(engine, "submit", slow)

    async def give_up() -> None:
        task = asyncio.create_task(service.start("fog " * 2000, GenerationParams(max_tokens=4000)))
        await asyncio.to_thread(started.wait)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while not jobs or not jobs[0].cancelled:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(give_up(), 10))
    assert until(lambda: engine.stats()["running"] + engine.stats()["waiting"] == 0)


def test_a_full_queue_is_429_with_retry_after(model: GPT, tokenizer: Tokenizer) -> None:
    import openai

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


def test_head_answers_like_get_without_a_body(engine: Engine) -> None:
    with TestClient(api.create_app(settings(api_keys="k"), engine)) as client:
        for path in (
            "/",
            "/client.js",
            "/health",
            "/livez",
            "/readyz",
            "/ping",
            "/docs",
            "/openapi.json",
            "/v1/models",
        ):
            whole = client.get(path, headers={"X-API-Key": "k"})
            head = client.head(path, headers={"X-API-Key": "k"})
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-type"] == whole.headers["content-type"]
            if "uptime_s" not in whole.text:
                assert head.headers["content-length"] == str(len(whole.content))
        assert client.head("/v1/models").status_code == 401
        assert client.head("/nowhere").status_code == 401
        assert client.head("/generate", headers={"X-API-Key": "k"}).status_code == 405
        metrics = client.get("/metrics", headers={"X-API-Key": "k"}).text
        assert 'vlg_requests_total{method="HEAD",route="/livez",status="200"} 1.0' in metrics


def test_head_on_a_socket_leaves_the_connection_usable(live: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("api").propagate = True
    with httpx.Client(base_url=live) as client:
        for path in ("/health", "/generate", "/health", "/client.js"):
            answer = client.head(path)
            assert answer.status_code == (405 if path == "/generate" else 200) and answer.content == b""
        assert client.get("/livez").json() == {"status": "ok"}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_open_paths_stay_open_under_a_proxys_prefix(engine: Engine) -> None:
    app = api.create_app(settings(api_keys="k"), engine)
    with TestClient(app, root_path="/writer") as client:
        assert client.get("/writer/health").status_code == client.get("/writer/livez").status_code == 200
        assert client.get("/writer/v1/models").status_code == 401


def test_model_names_may_hold_slashes_and_may_be_left_empty(engine: Engine) -> None:
    with TestClient(api.create_app(settings(name="house/victorian:mini"), engine)) as client:
        assert client.get("/v1/models/house/victorian:mini").json()["id"] == "house/victorian:mini"
        assert client.get("/v1/models/house").status_code == 404
        assert client.get("/v1/models/").json()["object"] == "list"
        for given in ({}, {"model": ""}, {"model": None}, {"model": "house/victorian:mini"}):
            body = {"prompt": PROMPT, "max_tokens": 1, **given}
            assert client.post("/v1/completions", json=body).status_code == 200, given
        assert client.post("/v1/completions", json={"prompt": PROMPT, "model": "house"}).status_code == 404


def test_messages_about_a_request_speak_of_its_fields(client: TestClient) -> None:
    for given, message in (
        ({"stop": [str(number) for number in range(17)]}, "stop: at most 16 items are allowed, not 17"),
        ({"top_k": "3"}, "top_k: must be an integer"),
        ({"temperature": -1}, "temperature: must be 0 or more"),
        ({"stream": "yes"}, "stream: must be true or false"),
        ({"wings": 2}, "wings: there is no such field"),
        ({"prompt": 3}, "prompt: must be a string"),
    ):
        error = client.post("/generate", json={"prompt": "x", **given}).json()["error"]
        assert error["message"] == message
    assert client.post("/generate", json={}).json()["error"]["message"] == "prompt: is required"
