"""A tiny model behind the server, and how to ask it: what the tests of the server share."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
import torch
import uvicorn
from starlette.testclient import TestClient

import api
from config import ModelConfig
from inference.engine import Engine
from model import GPT
from server.settings import Settings, read_settings
from tokenizer import Tokenizer, train_bpe, with_styles

if TYPE_CHECKING:
    import openai

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
    return tiny_model(tokenizer)


def tiny_model(tokenizer: Tokenizer) -> GPT:
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


def ending_model(tokenizer: Tokenizer, prompt: str) -> GPT:
    """A tiny model that finds the end of text likeliest after `prompt`."""
    model = tiny_model(tokenizer)
    states: list[torch.Tensor] = []
    hook = model.ln_f.register_forward_hook(lambda module, given, output: states.append(output.detach()))
    model(torch.tensor([tokenizer.encode(prompt)]))
    hook.remove()
    with torch.no_grad():
        model.wte.weight[tokenizer.eot] = states[-1].reshape(-1, 32)[-1]
    return model


@pytest.fixture(scope="module")
def ending() -> Iterator[tuple[TestClient, GPT, Tokenizer]]:
    """A client of a model that finds the end of text likeliest after PROMPT."""
    tokenizer = with_styles(train_bpe([TEXT * 20], 300), ["austen", "dickens"])
    model = ending_model(tokenizer, PROMPT)
    engine = Engine(model, tokenizer, name="ending", slots=8)
    with TestClient(api.create_app(settings(), engine)) as client:
        yield client, model, tokenizer
    engine.close(5)


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The app behind a real socket; gives its address."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, access_log=False, proxy_headers=False, timeout_graceful_shutdown=3)
    )
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


def kobold_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, data) of each event of KoboldAI's API, read as Kobold Lite does; nothing may lie between them."""
    form = re.compile(r"^event: (.*)\ndata: (.*)(\r?\n){2}", re.M)
    assert form.sub("", text) == ""
    return [(match[1], json.loads(match[2])) for match in form.finditer(text)]


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


def openai_client(address: str, **given: Any) -> openai.OpenAI:
    import openai  # here: it takes three seconds

    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", **{"max_retries": 0, "timeout": 30, **given})
