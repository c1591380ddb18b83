"""Clients of the gateway: Python, Node's `ws` and the web page, also with the real server, model and `generate.py` behind."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import websockets
from aws_fakes import FakeContainer, ask, hear, text, wait_for, words
from local_stack import Quotas, Stack, load_handlers

from config import FINISH_SENTENCE, GenerationParams, ModelConfig
from support.forked import PYTHON
from support.helpers import ROOT


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed: the Node client is not tried")
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-save", "--prefix", str(folder), "ws@8"]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    except subprocess.TimeoutExpired:
        pytest.skip("npm install ws took over a minute: the Node client is not tried")
    if made.returncode or not (folder / "node_modules" / "ws").is_dir():
        pytest.skip(f"npm install ws failed: {made.stderr.strip()[-200:]}")
    return folder


def run_node(folder: Path, url: str) -> dict[str, Any]:
    script = Path(__file__).with_name("client.mjs")
    done = subprocess.run(["node", script, folder, url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_node_client(stack: Stack, container: FakeContainer, node_modules: Path) -> None:
    seen = run_node(node_modules, stack.url)
    assert seen["refused"] == 403
    assert [m["type"] for m in seen["whole"]] == ["queued", "started", *["token"] * 12, "complete"]
    assert text(seen["whole"]) == "".join(words("It was", 12))
    assert seen["stopped"][-1]["finish_reason"] == "cancelled"
    assert seen["wrong"][-1]["error"]["param"] == "temperature"


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The page of web/, opened as a file, with nothing but the gateway's address."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r requirements-dev.txt")
    browser_path = shutil.which("chromium")
    if not browser_path:
        pytest.skip("chromium is not installed: the web page is not tried")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{(ROOT / 'web' / 'index.html').as_uri()}?server={quote(url, safe='')}")
        page.fill("#opening", "It was")
        page.wait_for_selector("#write:enabled")
        yield page
        browser.close()


def test_web_page_in_chromium(stack: Stack, container: FakeContainer) -> None:
    with opened(stack.url) as page:
        container.produced, container.pace = 0, 0.02
        page.click("#write")
        page.wait_for_function("document.querySelector('.page .text')?.textContent.trim()")
        assert container.produced < 200
        page.wait_for_selector("#stop:disabled")
        page.wait_for_selector("#write:enabled")
        assert "".join(words("It was", 200)).strip() in page.text_content(".page .text")
        page.click("#write")
        page.wait_for_function("document.querySelector('.page .text')?.textContent.trim()")
        page.click("#stop")
        page.wait_for_selector("#stop:disabled")
        assert not page.is_visible("#error-box")
    wait_for(lambda: container.running == 0)


def test_the_web_page_tells_what_the_gateway_itself_refuses(container: FakeContainer) -> None:
    with Stack(container.url, quotas=Quotas(rate=0.001, burst=1)) as stack, opened(stack.url) as page:
        page.wait_for_selector("text=/does not say which settings/")  # the question for them was refused, too
        assert not page.is_visible("#error-box")
        page.click("#write")
        page.wait_for_selector("#error-box:visible")
        assert "Too Many Requests" in page.inner_text("#error-box")
        page.wait_for_selector("#write:enabled")
    assert not container.requests


def test_the_web_page_shows_no_default_that_an_older_container_does_not_tell(
    stack: Stack, container: FakeContainer
) -> None:
    with opened(stack.url) as page:
        page.wait_for_selector("#temperature")
        shown = {name: page.input_value(f"#{name}") for name in ("temperature", "top_k", "n", "max_tokens")}
        assert shown == {"temperature": "", "top_k": "", "n": "", "max_tokens": "200"}
        assert page.get_attribute("#temperature", "placeholder") == "the model's own"
        assert not page.is_visible("#model")
        page.fill("#top_k", "7")
        page.fill("#max_tokens", "3")
        page.click("#write")
        page.wait_for_selector(r"text=/Done: 3 tokens/")
        assert page.locator(".page").count() == 1
    sent = container.requests[-1].keys() - {"request_id", "stream", "prompt"}
    assert {name: container.requests[-1][name] for name in sent} == {"top_k": 7, "max_tokens": 3}


def test_the_web_page_gives_a_silent_gateway_up(container: FakeContainer) -> None:
    """An asynchronous invocation is answered 202 before anything runs, and a failed post is not repeated for ever."""
    relay = load_handlers()

    def deaf(event: dict[str, Any], context: Any) -> Any:
        if event["requestContext"]["routeKey"] == "generate":
            return {"statusCode": 200}
        return relay.router(event, context)

    handlers = {"authorizer": relay.authorizer, "router": deaf, "worker": relay.worker}
    with Stack(container.url, handlers=handlers) as stack, opened(stack.url) as page:
        page.clock.install()
        page.click("#write")
        page.wait_for_selector("#stop:enabled")
        page.clock.fast_forward("01:50")
        assert not page.is_visible("#error-box")
        page.clock.fast_forward("00:20")
        page.wait_for_selector("#error-box:visible")
        assert "sent nothing for two minutes" in page.inner_text("#error-box")
        page.wait_for_selector("#write:enabled")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, in a model folder of its own."""
    try:
        for name in ("api", "checkpoint", "generate", "tokenizer"):
            importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"the server is not complete: {error}")
    import torch

    from checkpoint import save_model
    from model import GPT
    from tokenizer import char_tokenizer

    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,\n", 1)
    torch.manual_seed(3)
    net = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=tokenizer.vocab_size))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(folder, net, tokenizer, card={"steps": 3}, generation=GenerationParams(temperature=0.45, top_k=7))
    return folder


def written(model: Path, prompt: str, seed: int, tokens: int) -> str:
    """What `generate.py` writes to standard output."""
    command = [*PYTHON, ROOT / "generate.py", "--model", model, "--prompt", prompt, "--seed", str(seed)]
    command += ["--max-tokens", str(tokens), "--json", "--dtype", "float32"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    found = found[0] if isinstance(found, list) else found
    return found["text"] if "text" in found else found["samples"][0]["text"]


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`local_stack.py` as a program with its own api.py: the address that it prints."""
    command = [*PYTHON, ROOT / "lambda" / "local_stack.py", "--model", model, "--port", "0", "--aws-port", "0"]
    log = tmp_path_factory.mktemp("local-aws") / "log"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "VLG_DTYPE": "float32"}
    with log.open("w") as errors:
        program = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True, env=variables, cwd=ROOT
        )
    try:
        assert program.stdout is not None
        url = program.stdout.readline().strip()
        assert url.startswith("ws://127.0.0.1:"), log.read_text()
        yield url
    finally:
        program.terminate()
        program.wait(60)
    assert program.returncode == 0, log.read_text()


@pytest.mark.slow
def test_python_hears_through_the_whole_path_what_generate_writes(address: str, model: Path) -> None:
    async def conversation() -> list[list[dict[str, Any]]]:
        async with websockets.connect(address) as socket:
            await ask(socket, "first", prompt="It was the", seed=11, max_tokens=90)
            first = await hear(socket, "first", 60)
            await ask(socket, "pair", prompt="The", seed=12, max_tokens=20, n=2)
            pair = await hear(socket, "pair", 60)
            await ask(socket, "long", prompt="The", max_tokens=4000)
            while json.loads(await socket.recv())["type"] != "token":
                pass
            await socket.send('{"action": "stop", "request_id": "long"}')
            return [first, pair, await hear(socket, "long", 60)]

    first, pair, stopped = asyncio.run(conversation())
    count = first[-1]["usage"]["completion_tokens"]
    assert first[-1]["type"] == "complete" and 90 <= count <= 90 + FINISH_SENTENCE
    assert sum(m["type"] == "token" for m in first) == count
    assert text(first) == written(model, "It was the", 11, 90)
    assert text(pair, 0) and text(pair, 1) and text(pair, 0) != text(pair, 1)
    assert text(pair) == written(model, "The", 12, 20)
    assert stopped[-1]["finish_reason"] == "cancelled"


@pytest.mark.slow
def test_node_hears_the_same(address: str, model: Path, node_modules: Path) -> None:
    seen = run_node(node_modules, address)
    count = seen["whole"][-1]["usage"]["completion_tokens"]
    assert 12 <= count <= 12 + FINISH_SENTENCE
    assert [m["type"] for m in seen["whole"]] == ["queued", "started", *["token"] * count, "complete"]
    assert text(seen["whole"]) == written(model, "It was", 5, 12)
    heard = seen["stopped"]
    assert heard[-1]["finish_reason"] == "cancelled" and 3 <= sum(m["type"] == "token" for m in heard) < 2000


def test_the_web_page_writes_with_the_model_in_lambda(model: Path) -> None:
    with Stack("", in_lambda=model, environment={"VLG_DTYPE": "float32"}) as stack, opened(stack.url) as page:
        page.wait_for_selector("#temperature")
        assert (page.input_value("#temperature"), page.input_value("#top_k")) == ("0.45", "7"), "the model's own"
        assert page.inner_text("#model") == "Model: tiny (3 steps)"
        page.fill("#max_tokens", "60")
        page.fill("#seed", "21")
        page.click("#write")
        page.wait_for_selector(r"text=/Done: \d+ tokens/", timeout=90_000)
        shown = page.text_content(".text")
        stack.tables["requests"].items.clear()
    assert shown == "It was" + written(model, "It was", 21, 60)


@pytest.mark.slow
def test_the_web_page_shows_the_same(address: str, model: Path) -> None:
    with opened(address) as page:
        page.fill("#max_tokens", "60")
        page.fill("#seed", "21")
        page.click("#write")
        page.wait_for_selector(r"text=/Done: \d+ tokens/")
        assert page.text_content(".text") == "It was" + written(model, "It was", 21, 60)
        page.fill("#max_tokens", "4000")
        page.click("#write")
        page.wait_for_function("document.querySelector('.page .text')?.textContent.length > 12")
        page.click("#stop")
        page.wait_for_selector("text=/stopped ·/")
        assert len(page.text_content(".text")) < 4000
