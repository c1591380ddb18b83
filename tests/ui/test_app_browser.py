"""The app in a real browser: Debian's chromium, driven by Playwright, on a tiny model made here.

apt-get install chromium && pip install playwright
pytest tests/test_app_browser.py
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from config import load_config
from support.forked import PYTHON
from ui import training_runs

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_S = int(os.environ.get("VLG_PATIENCE_S", "120"))  # a busy machine is slow, not wrong
NASTY = "<script>document.title='broken'</script> $x$ *a* <b>bold</b>\n# b\n  two  spaces — “é”"

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
if not CHROMIUM.exists():
    pytest.skip("no /usr/bin/chromium: apt-get install chromium", allow_module_level=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Process:
    """A server in a process of its own that can be killed and started again on the same port."""

    def __init__(self, words: list[str], port: int, path: str, log: Path):
        self.words, self.port, self.path, self.log = words, port, path, log
        self.url = f"http://127.0.0.1:{port}"
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> Process:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [*PYTHON, "-m", *self.words], cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(10 * PATIENCE_S):
            assert self.child.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(self.url + self.path, timeout=2) as answer:
                    if answer.status == 200:
                        return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text()[-3000:])

    def listens(self) -> bool:
        with contextlib.closing(socket.socket()) as asking:
            return asking.connect_ex(("127.0.0.1", self.port)) != errno.ECONNREFUSED

    def stop(self, how: int = signal.SIGKILL) -> None:
        if self.child is not None:
            self.child.send_signal(how)
            self.child.wait(20)
            self.child = None
            while self.listens():
                time.sleep(0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt nothing and writes every character that could go wrong."""
    import torch

    from checkpoint import save_model
    from config import GenerationParams, ModelConfig
    from model import GPT
    from tokenizer import char_tokenizer

    tokenizer = char_tokenizer(
        sorted(set(NASTY + "The fog lay upon the town, and nobody knew why. ABCDEFGHIJKLMNOPQRSTUVWXYZ")), 1
    )
    torch.manual_seed(1)
    size = tokenizer.vocab_size
    # large enough for some seconds of writing, in which a test can press Stop
    made = GPT(ModelConfig(n_layer=6, n_head=8, n_embd=512, block_size=128, vocab_size=size, vocab_used=size))
    folder = tmp_path_factory.mktemp("app") / "runs" / "tiny" / "best"
    save_model(folder, made, tokenizer, card={"description": "test"}, generation=GenerationParams(temperature=1.0))
    return folder


def end_training(runs: Path) -> None:
    """Kill what a test has started and may have left behind."""
    for run in training_runs.runs(runs):
        if process := run.process():
            process.kill()


def app_process(home: Path, *words: str) -> Process:
    port = free_port()
    streamlit = [
        "streamlit",
        "run",
        "app.py",
        "--server.headless=true",
        f"--server.port={port}",
    ]
    streamlit += ["--server.fileWatcherType=none"]
    flags = ["--history", str(home / "h.sqlite"), "--data", str(home / "data"), "--models", str(home / "models")]
    return Process([*streamlit, "--", *flags, *words], port, "/_stcore/health", home / "app.log")


@pytest.fixture(scope="module")
def app(model: Path) -> Iterator[Process]:
    home = model.parent.parent.parent
    process = app_process(home, "--runs", str(home / "runs"), "--model", str(model)).start()
    yield process
    process.stop()
    end_training(home / "runs")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """A browser tab with the app in it."""

    def __init__(self, page: Any):
        self.page = page
        self.story = page.get_by_label("Story", exact=True)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name)

    def open(self, url: str) -> Tab:
        self.page.goto(url)
        self.button("Continue").wait_for()
        return self

    def write(self, text: str) -> Tab:
        self.story.fill(text)
        return self

    def text(self) -> str:
        return str(self.story.input_value())

    def until(self, condition: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.page.locator("body").inner_text()[:2000]
            self.page.wait_for_timeout(50)

    def go(self) -> Tab:
        """Press Continue and wait until the page writes, or has written: a short text may end between two looks."""
        before = self.text()
        self.button("Continue").click()

        def begun() -> bool:
            stop, rest = self.button("Stop").count(), self.button("Continue").count()
            return bool(not rest if stop else rest and self.text() != before)

        self.until(begun)
        return self

    def idle(self) -> Tab:
        self.button("Continue").wait_for()
        return self

    def stop(self) -> Tab:
        """Press Stop until the page is at rest: the text may end by itself while the button is being reached for."""

        def resting() -> bool:
            if not self.button("Continue").count():
                with contextlib.suppress(playwright.TimeoutError):
                    self.button("Stop").click(timeout=2000)
            return bool(self.button("Continue").count())

        self.until(resting)
        return self

    def settled(self) -> Tab:
        """Until nothing on the page belongs to a former run of the script."""
        self.page.wait_for_timeout(200)
        self.until(lambda: self.page.locator("[data-stale=true]").count() == 0)
        return self

    def slider(self, name: str, *keys: str) -> Tab:
        handle = self.page.get_by_role("slider", name=name)
        for key in keys:
            handle.press(key)
        return self

    def finer(self) -> Tab:
        self.page.get_by_text("More settings").click()
        self.page.get_by_role("slider", name="Versions at once").wait_for()
        return self

    def visit(self, name: str) -> Tab:
        self.page.get_by_role("link", name=name).first.click()
        return self


@pytest.fixture
def tab(chromium: Any, app: Process) -> Iterator[Tab]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(PATIENCE_S * 1000)
    yield Tab(context.new_page()).open(app.url)
    context.close()


def test_words_arrive_before_the_end_stop_keeps_them_and_undo_removes_them(tab: Tab) -> None:
    tab.slider("Length", "End").write("The fog").go()
    tab.until(lambda: len(tab.text()) > 15)
    seen = tab.text()
    assert seen.startswith("The fog") and tab.story.get_attribute("readonly") is not None
    tab.until(lambda: len(tab.text()) > len(seen) + 5)
    tab.stop()
    kept = tab.text()
    assert kept.startswith(seen) and len(kept) < 1000
    tab.page.wait_for_timeout(500)
    assert tab.text() == kept
    tab.story.press("Control+End")
    tab.story.press_sequentially(" and more", delay=15)
    tab.story.press("Control+z")
    tab.until(lambda: tab.text() == kept)
    tab.button("Undo").click()
    tab.until(lambda: tab.text() == "The fog")
    tab.button("Redo").click()
    tab.until(lambda: tab.text() == kept)


def test_typing_survives_sliders_reruns_and_a_reload(tab: Tab) -> None:
    tab.write("My own words")
    tab.story.press_sequentially(", more of them", delay=5)
    tab.slider("Temperature", "ArrowRight", "ArrowRight")
    tab.settled()
    assert tab.text() == "My own words, more of them"
    tab.page.reload()
    tab.idle()
    assert tab.text() == "My own words, more of them"


def test_moving_a_slider_while_the_model_writes_loses_nothing(tab: Tab) -> None:
    tab.slider("Length", "End").write("The fog").go()
    tab.until(lambda: len(tab.text()) > 12)
    before = tab.text()
    tab.slider("Temperature", "ArrowLeft", "ArrowLeft")
    tab.until(lambda: len(tab.text()) > len(before))
    assert tab.text().startswith(before)
    tab.page.keyboard.press("Escape")
    tab.idle()
    assert tab.text().startswith(before)


def test_every_character_is_shown_unchanged(tab: Tab) -> None:
    tab.finer().slider("Versions at once", "ArrowRight")
    tab.write(NASTY).go().idle()
    text = tab.text()
    assert text.startswith(NASTY) and len(text) > len(NASTY)
    mirror = tab.page.locator(".mirror")
    assert mirror.text_content() == text + "\u200b" and mirror.locator("b, script").count() == 0
    cards = tab.page.locator(".version")
    assert cards.count() == 2 and cards.locator("script, em, b").count() == 0
    assert cards.first.text_content() == text[len(NASTY) :].strip()
    assert tab.page.title() != "broken"
    tab.visit("History")
    tab.page.get_by_text("$x$ *a* <b>bold</b> # b").first.wait_for()


def test_versions_side_by_side_and_one_after_another(tab: Tab) -> None:
    tab.slider("Length", "Home").finer().slider("Versions at once", "ArrowRight", "ArrowRight")
    tab.write("The fog").go().idle()
    cards = tab.page.locator(".version")
    cards.nth(2).wait_for()
    tab.page.get_by_role("button", name="Use this").nth(2).click()
    tab.page.get_by_text("Version 3 · in the text").wait_for()
    third = str(cards.nth(2).text_content())
    tab.until(lambda: tab.text().strip().endswith(third))
    tab.button("Retry").click()
    tab.page.get_by_text("version 4 of 6").wait_for()
    tab.button("Previous version").click()
    tab.until(lambda: tab.text().strip().endswith(third))


def test_keyboard_alone_writes_stops_and_tries_again(tab: Tab) -> None:
    tab.slider("Length", "Home").write("The fog")
    tab.story.press("Control+Enter")
    tab.until(lambda: len(tab.text()) > 8 and tab.button("Stop").count() == 0)
    first = tab.text()
    tab.story.press("Alt+Enter")
    tab.page.get_by_text("version 2 of 2").wait_for()
    assert tab.text() != first


def test_exports_download(tab: Tab, tmp_path: Path) -> None:
    tab.write("The fog\n<b>lay</b>")
    tab.until(lambda: "story=" in tab.page.url)
    tab.page.wait_for_timeout(700)
    tab.button("More").click()
    for label, suffix in (("plain text", "txt"), ("EPUB", "epub")):
        with tab.page.expect_download() as started:
            tab.button(f"Save as {label}").click()
        path = tmp_path / started.value.suggested_filename
        started.value.save_as(path)
        assert path.suffix == f".{suffix}"
        if suffix == "txt":
            assert path.read_text() == "The fog\n<b>lay</b>\n"
        else:
            assert zipfile.ZipFile(path).testzip() is None


def test_look_inside_and_continue_from_another_word(tab: Tab) -> None:
    tab.slider("Length", "Home").write("The fog lay")
    tab.page.wait_for_timeout(700)
    tab.visit("Look inside")
    token = tab.page.locator(".token").nth(4)
    token.click()
    tab.until(lambda: token.get_attribute("aria-selected") == "true")
    assert tab.page.locator(".alternative").count() == 10
    tab.page.locator(".token-view").press("ArrowRight")
    tab.until(lambda: tab.page.locator(".token").nth(5).get_attribute("aria-selected") == "true")
    tab.settled()
    word = re.sub(r"[ ◂]+$", "", str(tab.page.locator(".alternative b").nth(1).text_content()))
    word = word.replace("␣", " ").replace("⏎", "\n")
    tab.page.get_by_role("button", name="Use this").nth(1).click()
    tab.page.get_by_label("Story", exact=True).wait_for()
    tab.idle()
    assert tab.text().startswith("The f" + word) and len(tab.text()) > 6


def test_compare_two_settings(tab: Tab, tmp_path: Path) -> None:
    tab.visit("Compare")
    tab.page.get_by_label("Openings, one per line").fill("The fog\n<b>The</b> town")
    tab.button("Write them all").click()
    tab.page.get_by_text("4 of 4 written").wait_for()
    tab.button("Save the table as .csv").wait_for()
    with tab.page.expect_download() as started:
        tab.button("Save the table as .csv").click()
    assert started.value.suggested_filename == "compared.csv"
    assert tab.page.locator(".version").count() == 4


def test_two_browsers_write_on_one_model_each_its_own_story(tab: Tab, chromium: Any, app: Process) -> None:
    context = chromium.new_context()
    context.set_default_timeout(PATIENCE_S * 1000)
    other = Tab(context.new_page()).open(app.url)
    tab.slider("Length", "End").write("The town").go()
    other.write("The fog").go()
    tab.until(lambda: len(tab.text()) > 20)
    other.until(lambda: len(other.text()) > 20)
    for one, start in ((tab, "The town"), (other, "The fog")):
        one.stop()
        assert one.text().startswith(start)
    assert tab.page.url != other.page.url
    context.close()


def test_a_phone_is_wide_enough(chromium: Any, app: Process) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    context.set_default_timeout(PATIENCE_S * 1000)
    tab = Tab(context.new_page()).open(app.url)
    tab.write("The fog lay upon the town, and nobody knew why. " * 4)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    ink, mirror = tab.page.locator(".input").bounding_box(), tab.page.locator(".mirror").bounding_box()
    assert ink == mirror and ink["width"] > 280
    tab.button("Expand sidebar").or_(tab.page.get_by_test_id("stExpandSidebarButton")).first.click()
    tab.finer()
    nameless = tab.page.evaluate(
        "[...document.querySelectorAll('button, input, textarea, select, [role=slider]')].filter(e => "
        "e.checkVisibility() && !(e.textContent.trim() || e.ariaLabel || e.title || e.labels?.length || "
        "e.getAttribute('aria-labelledby'))).map(e => e.outerHTML)"
    )
    assert nameless == []
    context.close()


def test_history_after_a_restart(tab: Tab, app: Process) -> None:
    tab.slider("Length", "Home").write("A story that must last").go().idle()
    text, url = tab.text(), tab.page.url
    app.stop(signal.SIGTERM)
    app.start()
    tab.open(url)
    assert tab.text() == text
    tab.visit("History")
    tab.page.get_by_label("Search").fill("must last")
    tab.page.get_by_label("Search").press("Enter")
    tab.page.get_by_text("1 story, saved in").wait_for()
    opening = tab.page.get_by_role("button", name="Open", exact=True)
    tab.until(lambda: opening.count() == 1)
    opening.click()
    tab.idle()
    assert tab.text() == text


def test_words_typed_while_the_app_is_down_are_kept(tab: Tab, app: Process) -> None:
    tab.write("Before the storm").settled()
    tab.until(lambda: "story=" in tab.page.url)
    tab.page.wait_for_timeout(700)
    app.stop()
    tab.story.press("Control+End")
    tab.story.press_sequentially(" and in the midst of it", delay=5)
    whole = tab.text()
    app.start()
    tab.page.wait_for_timeout(1500)
    tab.idle().settled()
    tab.until(lambda: tab.button("Undo").is_enabled())  # the words have reached the story
    assert tab.text() == whole == "Before the storm and in the midst of it"
    tab.page.reload()
    tab.idle()
    tab.until(lambda: tab.text() == whole)  # what was not taken is handed on again within seconds


def test_no_keystroke_is_lost_between_the_command_and_the_first_word(tab: Tab) -> None:
    tab.slider("Length", "Home").write("The fog")
    tab.story.press("Control+Enter")
    tab.story.press_sequentially("XYZ")
    accepted = tab.text().removeprefix("The fog")
    tab.until(lambda: tab.button("Stop").count() == 0 and len(tab.text()) > 12)
    assert tab.text().startswith("The fog" + accepted[:3])


def test_a_training_is_started_watched_and_stopped_from_the_page(tab: Tab, app: Process, tmp_path: Path) -> None:
    text = tmp_path / "fog.txt"
    text.write_text("The fog lay upon the town, and nobody knew why. It was late.\n\n" * 300)
    tab.visit("Training")
    tab.page.get_by_text("No model has been trained yet").wait_for()  # then the form is open
    tab.page.locator("input[type=file]").set_input_files(str(text))
    tab.page.get_by_text("fog.txt").wait_for()
    tab.page.get_by_text("Preset", exact=True).click()
    tab.page.get_by_role("combobox", name="Preset").wait_for()
    tab.page.get_by_label("Name").fill("foggy")
    tab.page.get_by_label("Name").press("Enter")
    tab.button("Start training").click()
    tab.page.get_by_text("Stop and save").wait_for()
    chart = tab.page.get_by_test_id("stVegaLiteChart").first
    chart.wait_for()
    tab.button("Stop and save").click()
    tab.button("Resume").wait_for()
    steps = load_config("sample").train.max_steps
    assert f"of {steps:,}" in tab.page.locator("body").inner_text()


def test_the_app_writes_through_the_gateway_with_its_address_alone(tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("tests/aws", "lambda"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    from aws_fakes import FakeContainer, words
    from local_stack import Stack

    with FakeContainer(pace=0.2) as container, Stack(container.url) as stack:
        tab.visit("Model")
        tab.page.get_by_text("A gateway", exact=True).click()
        tab.page.get_by_label("Address").fill(stack.url)
        tab.button("Use it").click()
        tab.page.get_by_role("heading", name="127.0.0.1").wait_for()
        tab.visit("Write").idle()
        tab.slider("Length", "Home").write("It was").go()
        tab.until(lambda: len(tab.text()) > len("It was"))
        assert container.produced < 10
        tab.idle()
        assert tab.text() == "It was" + "".join(words("It was", 10))
        tab.visit("Look inside")
        tab.page.get_by_text("a gateway cannot score texts").wait_for()


@pytest.mark.slow
def test_without_a_model_one_button_trains_the_sample_preset(chromium: Any, tmp_path: Path) -> None:
    app = app_process(tmp_path, "--runs", str(tmp_path / "runs")).start()
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_S * 1000)
    try:
        tab = Tab(context.new_page())
        tab.page.goto(app.url)
        tab.button("Train the sample model").click()
        tab.page.get_by_text("Stop and save").wait_for()
        tab.page.get_by_test_id("stVegaLiteChart").first.wait_for()
        tab.button("Stop and save").click()
        tab.button("Resume").wait_for()
        tab.visit("Write").idle()  # what was saved can write
        tab.slider("Length", "Home").write("The old house").go().idle()
        assert tab.text().startswith("The old house") and len(tab.text()) > 15
    finally:
        context.close()
        app.stop()
        end_training(tmp_path / "runs")


@pytest.mark.slow
def test_a_text_continues_after_the_server_died_midway(model: Path, chromium: Any, tmp_path: Path) -> None:
    port = free_port()
    api = Process(["api", "--model", str(model), "--port", str(port)], port, "/health", tmp_path / "api.log").start()
    app = app_process(tmp_path, "--runs", str(tmp_path / "runs"), "--server", api.url).start()
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_S * 1000)
    try:
        tab = Tab(context.new_page()).open(app.url)
        tab.slider("Length", "End").write("The fog").go()
        tab.until(lambda: len(tab.text()) > 20)
        api.stop()
        tab.page.get_by_text("Your text is safe").wait_for()
        kept = tab.text()
        assert len(kept) > 20
        api.start()
        tab.until(lambda: len(tab.text()) > len(kept) + 5)
        assert tab.text().startswith(kept)
        tab.page.keyboard.press("Escape")
        tab.idle()
        assert tab.page.get_by_text("Your text is safe").count() == 0
    finally:
        context.close()
        app.stop()
        api.stop()


@pytest.mark.slow
def test_one_seed_one_text_at_the_terminal_by_rest_on_the_page_and_in_the_app(chromium: Any, tmp_path: Path) -> None:
    """Nothing but the opening and the seed is given: the defaults are the same everywhere, too."""
    shipped, opening, seed = str(ROOT / "models" / "victorian-mini"), "The old house stood", "4"
    words = [*PYTHON, "generate.py", "--model", shipped, "--prompt", opening, "--seed", seed]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    texts = {"terminal": done.stdout.strip()}
    port = free_port()
    server = Process(["api", "--model", shipped, "--port", str(port)], port, "/readyz", tmp_path / "api.log").start()
    app = app_process(tmp_path, "--runs", str(tmp_path / "runs"), "--model", shipped).start()
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_S * 1000)
    try:
        body = json.dumps({"prompt": opening, "seed": int(seed)}).encode()
        request = urllib.request.Request(
            server.url + "/generate", body, headers={"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            texts["rest"] = (opening + json.load(answer)["generated_text"]).strip()
        page = context.new_page()
        page.goto(server.url)
        page.locator("#temperature").wait_for()
        page.get_by_label("Opening").fill(opening)
        page.get_by_label("Seed").fill(seed)
        page.get_by_role("button", name="Write").click()
        page.get_by_text("Done:").wait_for()
        texts["page"] = str(page.locator(".text").text_content()).strip()
        tab = Tab(context.new_page()).open(app.url)
        tab.page.get_by_text("More settings").click()
        field = tab.page.get_by_label("Seed", exact=True)
        field.fill(seed)
        field.press("Enter")
        texts["app"] = tab.settled().write(opening).go().idle().text().strip()
    finally:
        context.close()
        server.stop()
        app.stop()
    assert len(texts["terminal"]) > 300 and len(set(texts.values())) == 1, texts
