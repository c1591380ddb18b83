"""The page in a real browser, against the real server (Chromium and playwright; skipped where they are missing)."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import uvicorn

import api
from config import ROOT, SETTINGS, GenerationParams, ModelConfig
from inference.engine import Engine
from model import GPT
from server.settings import read_settings
from tokenizer import train_bpe

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
PAGE = ROOT / "web" / "index.html"
OPENING = 'The <b>fog</b> & <img src=x onerror="document.title=1">\n“lay”'


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    tokenizer = train_bpe(["<i>The fog</i> lay & “the lamps” burned.\n" * 20], 300)
    tokenizer.eot = None  # no text ends before its time
    torch.manual_seed(1)
    size = tokenizer.vocab_size
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=size, vocab_used=size)).eval()
    engine = Engine(model, tokenizer, name="tiny", slots=4)
    yield engine
    engine.close(5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(engine: Engine, port: int, **settings: Any) -> Iterator[str]:
    app = api.create_app(read_settings(**settings), engine)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """A page on which no script failed and no policy was broken."""
    context = browser.new_context(**options)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: faults.append(m.text) if "Content Security Policy" in m.text else None)
    page.set_default_timeout(15_000)
    page.goto(address)
    yield page
    context.close()
    assert not faults


def test_writing_samples_and_reading_them_as_plain_text(engine: Engine, browser: Any) -> None:
    with serving(engine, free_port()) as address, opened(browser, address) as page:
        page.wait_for_selector(".lamp.open")
        page.fill("#opening", OPENING)
        page.fill("#max_tokens", "30")
        page.fill("#n", "3")
        page.fill("#seed", "9007199254740993")  # more than a JavaScript number holds
        page.click("#write")
        page.wait_for_selector("text=/Done: 90 tokens/")
        written = page.eval_on_selector_all(".text", "all => all.map(one => one.textContent)")
        job = engine.submit(OPENING, GenerationParams(max_tokens=30, n=3, seed=9007199254740993))
        pieces = ["", "", ""]
        for event in job:
            pieces[event.index] += event.text
        assert written == [OPENING + piece for piece in pieces]
        assert page.locator(".text b, .text img, .text i").count() == 0 and page.title() != "1"
        assert "seed 9007199254740993" in page.inner_text(".colophon >> nth=0")
        page.click(".continue >> nth=1")
        assert page.input_value("#opening") == written[1]


def test_stopping_and_faults_are_told(engine: Engine, browser: Any) -> None:
    with serving(engine, free_port(), max_n=2, api_keys="open sesame") as address, opened(browser, address) as page:
        page.wait_for_selector("text=/No connection/")  # no key yet
        page.click("#line summary")
        page.fill("#key", "open sesame")
        page.click("#connect")
        page.wait_for_selector(".lamp.open")
        page.fill("#n", "3")  # this server allows 2, and says so
        page.click("#write")
        assert page.is_visible("#n:invalid") and page.is_enabled("#write")
        page.fill("#n", "1")
        assert not page.is_visible("#style"), "the model knows no authors"
        page.fill("#opening", "x" * 100_001)
        page.click("#write")
        page.wait_for_selector("#error-box:visible")
        assert "100000" in page.inner_text("#error-box")
        page.fill("#opening", "")
        page.fill("#max_tokens", "4096")
        page.click("#write")
        page.locator(".text").filter(has_text=re.compile(r".{20}", re.DOTALL)).wait_for()
        page.keyboard.press("Escape")
        page.wait_for_selector("text=/stopped ·/")
        assert page.is_enabled("#write") and page.is_disabled("#stop")
        assert not page.is_visible("#error-box")


def test_a_lost_connection_keeps_the_text_and_comes_back(engine: Engine, browser: Any) -> None:
    port = free_port()
    # a page opened from a file, which names its server in the address
    address = f"{PAGE.as_uri()}?server=ws://127.0.0.1:{port}/ws"
    with opened(browser, address) as page:
        page.wait_for_selector("text=/No connection.*trying again/")
        with serving(engine, port, origins="null", grace_s=0):
            page.wait_for_selector(".lamp.open", timeout=20_000)
            page.fill("#max_tokens", "4096")
            page.click("#write")
            page.locator(".text").filter(has_text=re.compile(r".{20}", re.DOTALL)).wait_for()
        page.wait_for_selector("text=/No connection.*trying again/")
        assert len(page.inner_text(".text")) > 20 and page.is_disabled("#write")
        with serving(engine, port, origins="null"):
            page.wait_for_selector(".lamp.open", timeout=20_000)
            page.fill("#max_tokens", "5")
            page.click("#write")
            page.wait_for_selector("text=/Done: 5 tokens/")


def test_the_settings_are_those_of_the_server(engine: Engine, browser: Any) -> None:
    with serving(engine, free_port(), max_tokens=120, max_n=3) as address, opened(browser, address) as page:
        page.wait_for_selector("#temperature")
        shown = page.eval_on_selector_all("#sliders .figure, #rare .figure", "all => all.map(one => one.id)")
        assert sorted(shown) == sorted(name for name, setting in SETTINGS.items() if setting.slider)
        for name in shown:
            assert page.inner_text(f"label[for={name}]") == SETTINGS[name].label or SETTINGS[name].rare
            default = min(GenerationParams.model_fields[name].default, 120)
            assert float(page.input_value(f"#{name}")) == default, name
        assert page.get_attribute("#max_tokens", "max") == "120" and page.get_attribute("#n", "max") == "3"
        page.fill("#temperature", "0.7")
        page.click("#reset")
        assert page.input_value("#temperature") == "1.3"


def test_a_setting_is_sent_when_it_was_moved(engine: Engine, browser: Any) -> None:
    sent: list[dict[str, Any]] = []
    with serving(engine, free_port()) as address, opened(browser, address) as page:
        page.on("websocket", lambda socket: socket.on("framesent", lambda text: sent.append(json.loads(text))))

        def settings_sent(**moved: str) -> dict[str, Any]:
            page.goto(address)
            page.wait_for_selector(".lamp.open")
            page.wait_for_selector("#temperature")
            for name, value in moved.items():
                page.fill(f"#{name}", value)
            page.click("#write")
            page.locator(".text").filter(has_text=re.compile(r".{3}", re.DOTALL)).wait_for()
            begun = [message for message in sent if message["action"] == "generate"][-1]
            return {name: begun[name] for name in begun.keys() & SETTINGS.keys()}

        assert settings_sent() == {}
        assert settings_sent(temperature="0", max_tokens="7") == {"temperature": 0, "max_tokens": 7}
        assert settings_sent() == {"temperature": 0, "max_tokens": 7}  # the page remembers what was moved


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_the_page_fits_and_every_control_has_a_name(engine: Engine, browser: Any, width: int, scheme: str) -> None:
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with serving(engine, free_port()) as address, opened(browser, address, **options) as page:
        page.wait_for_selector(".lamp.open")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        nameless = """all => all.filter(one => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())
                                .map(one => one.outerHTML)"""
        assert page.eval_on_selector_all("input, textarea, button", nameless) == []
        light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
        assert (sum(light[:3]) > 380) == (scheme == "light")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the opening"
