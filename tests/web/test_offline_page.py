"""The page that writes by itself, in a real browser from a file: the words of generate.py, no network, nothing as markup."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import export
from checkpoint import load_model
from config import GenerationParams, ModelConfig
from inference.writing import generate
from model import GPT
from sampling import sample_seed
from storage.atomic import CheckpointError
from storage.web_page import write_page
from support.exports import KINDS, ODD, exported, story
from support.helpers import ROOT
from support.tiny_models import tiny_tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
SHIPPED = ROOT / "models" / "victorian-mini"
GREEDY = GenerationParams(temperature=0.0, repetition_penalty=1.0, max_tokens=40)
MARKUP = '<img src=x onerror="document.title=1"></script><b>'
WRITE = """async ([prompt, settings]) => {
    const ids = []; let text = "";
    for await (const step of write(model, tokenizer, prompt, settings)) {
        text += step.text;
        if (step.id !== undefined) ids.push(step.id);
    }
    return { ids, text };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@lru_cache
def page_of(folder: Path, kind: str) -> Path:
    """The page of one of the KINDS, of the shipped model, or of one whose names are markup."""
    path = folder / f"{kind.replace(' ', '-')}.html"
    if kind == "shipped":
        assert export.main(["--model", str(SHIPPED), "--to", "html", "--out", str(path)]) == 0
        return path
    model, tokenizer = exported(KINDS[0] if kind == "markup" else kind)
    name = MARKUP if kind == "markup" else "mine"
    card = {"description": MARKUP, "data": MARKUP, "limits": MARKUP}
    write_page(path, model, tokenizer, name=name, generation=GenerationParams(max_tokens=12), card=card, licence=MARKUP)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


def wait(page: Any, text: str) -> None:
    page.locator("#status").filter(has_text=re.compile(text)).wait_for()


@contextmanager
def opened(browser: Any, path: Path, link: str = "", context: Any = None, **options: Any) -> Iterator[Any]:
    """A page from a file, once its model is unpacked; no script may fail, and nothing be asked of any network."""
    own = context or browser.new_context(**options)
    page = own.new_page()
    page.set_default_timeout(120_000)
    faults: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("request", lambda request: asked.append(request.url.split("#")[0]))
    page.goto(path.as_uri() + link)
    wait(page, r"^Ready\.$|^This link")
    yield page
    page.close()
    if context is None:
        own.close()
    assert not faults and set(asked) == {path.as_uri()}


def settings(params: GenerationParams) -> dict[str, Any]:
    return {**params.model_dump(exclude={"stop"}), "seed": str(params.seed or 0)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_has_the_ids_and_the_words_of_generate(kind: str, browser: Any, folder: Path) -> None:
    """From short, empty and over-long prompts, beyond the context, with every filter, in a style."""
    model, tokenizer = exported(kind)
    text = story() + ODD * (tokenizer.kind != "char")
    styles = ["", *tokenizer.styles]
    few = tokenizer.kind == "gpt2"  # each token of a large vocabulary takes long
    tries = [(prompt, GREEDY) for prompt in ("It was", "", story()[:3000])]
    tries.append(("It was", GREEDY.model_copy(update={"max_tokens": 20 if few else 150, "style": styles[-1]})))
    for number, values in enumerate(
        ({}, {"top_k": 0, "top_p": 1.0}, {"top_k": 0, "min_p": 0.02, "temperature": 2.0}, {"top_k": 7, "top_p": 0.6})
    ):
        params = GenerationParams(max_tokens=20 if few else 150, seed=2**60 + number, style=styles[-1], **values)
        tries.append(("It was the best", params))
    with opened(browser, page_of(folder, kind)) as page:
        assert page.evaluate("text => tokenizer.encode(text)", text) == tokenizer.encode(text)
        for prompt, params in tries:
            (ours,) = generate(model, tokenizer, prompt, params)
            found = page.evaluate(WRITE, [prompt, settings(params)])
            assert (found["ids"], found["text"]) == (ours.ids, ours.text), (prompt[:20], params)


def test_characters_that_the_model_lacks_are_named(browser: Any, folder: Path) -> None:
    with opened(browser, page_of(folder, "characters")) as page:
        page.fill("#text", "It was 東京")
        page.click("#continue")
        wait(page, "knows no “東”, “京”")
        assert page.input_value("#text") == "It was 東京"


def test_the_shipped_model_writes_in_the_page_what_it_writes_at_the_terminal(browser: Any, folder: Path) -> None:
    model, tokenizer = load_model(SHIPPED)
    with opened(browser, page_of(folder, "shipped")) as page:
        assert page.evaluate("MODEL.tensors[0].type") == "f16"
        for prompt in ("The old house stood", "“Mr. Pip,” said she"):
            (ours,) = generate(model, tokenizer, prompt, GREEDY)
            assert page.evaluate(WRITE, [prompt, settings(GREEDY)])["text"] == ours.text
        page.fill("#text", "It was a dark night")
        page.fill("#seed", "7")
        page.fill("#max_tokens", "50")
        page.select_option("#style", "dickens")
        page.click("#continue")
        wait(page, "from seed 7")
        params = GenerationParams(temperature=0.8, repetition_penalty=1.1, max_tokens=50, seed=7, style="dickens")
        (ours,) = generate(model, tokenizer, "It was a dark night", params)
        assert page.input_value("#text") == "It was a dark night" + ours.text


def test_chance_is_torchs_and_the_kernel_is_right(browser: Any, folder: Path) -> None:
    draw = "seed => { const g = new Generator(seedOf(seed)); return Array.from({length: 700}, () => g.random()); }"
    with opened(browser, page_of(folder, KINDS[0])) as page:
        for seed in (0, 1, 2**31, 2**53 - 1, 2**63 - 1):
            generator = torch.Generator().manual_seed(sample_seed(seed, 0))
            drawn = [float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(700)]
            assert page.evaluate(draw, str(seed)) == drawn
        found = page.evaluate("""() => [false, true].map((plain) => {
            const memory = new WebAssembly.Memory({initial: 2}), numbers = new Float32Array(memory.buffer);
            for (let n = 0; n < 4096; n++) numbers[n] = Math.sin(n);
            matrixVector(memory, plain)(0, 4 * 3000, 4 * 4000, 33, 4 * 3048, 4 * 16);
            return Array.from(numbers.subarray(4000, 4034));
        })""")
        numbers = np.sin(np.arange(4096)).astype(np.float32)
        rows = numbers[: 33 * 64].reshape(33, 64)[:, :48].astype(np.float64) @ numbers[3000:3048]
        for sums in found:
            np.testing.assert_allclose(sums[:33], rows, atol=2e-5)
            assert sums[33] == pytest.approx(np.sin(4033), abs=1e-6)  # nothing is written behind the last row


def test_writing_undoing_and_trying_again(browser: Any, folder: Path) -> None:
    with opened(browser, page_of(folder, KINDS[0])) as page:
        page.fill("#text", "It was")
        page.keyboard.press("Control+Enter")
        wait(page, "from seed")
        first = page.input_value("#text")
        assert len(first) > 6 and page.locator("#mirror span.last").count() == 12
        seed = page.input_value("#seed")
        page.keyboard.press("Alt+r")
        wait(page, f"from seed (?!{seed}[.])")
        second = page.input_value("#text")
        assert second.startswith("It was") and second != first
        page.click("#undo")
        assert page.input_value("#text") == first
        page.click("#undo")
        assert page.input_value("#text") == "It was" and page.is_disabled("#retry")

        page.fill("#max_tokens", "5000")
        page.click("#continue")
        assert page.is_visible("#stop")
        page.keyboard.press("Escape")
        wait(page, "Stopped")
        assert page.is_visible("#continue") and page.locator("#text").get_attribute("readonly") is None
        page.fill("#max_tokens", "9000")
        page.click("#continue")
        wait(page, "Length 9000 is outside 1 to 5000")


def test_probabilities_show_where_the_pointer_or_the_caret_is(browser: Any, folder: Path) -> None:
    with opened(browser, page_of(folder, KINDS[0])) as page:
        page.fill("#text", "It was")
        page.click("#continue")
        wait(page, "from seed")
        box = page.locator("#mirror span").nth(2).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.locator("#card dt").nth(4).wait_for()
        chosen = page.evaluate("written[2].probability")
        assert 0 < chosen <= 1 and "chosen with" in page.text_content("#card p")
        page.mouse.move(2, 2)
        page.locator("#card").wait_for(state="hidden")
        page.evaluate("sheet.focus(); sheet.setSelectionRange(written[4].start + 1, written[4].start + 1)")
        page.keyboard.press("ArrowLeft")
        page.locator("#card").wait_for(state="visible")
        page.keyboard.press("Escape")
        assert page.is_hidden("#card")


def test_text_and_settings_outlast_a_reload_and_a_link_writes_the_same_again(browser: Any, folder: Path) -> None:
    path = page_of(folder, "characters with a style")
    context = browser.new_context()
    with opened(browser, path, context=context) as page:
        page.fill("#text", "It was & <b>")
        page.fill("#text", "It was")
        page.fill("#seed", "99")
        page.fill("#temperature", "1.2")
        page.select_option("#style", "pip")
        page.click("#continue")
        wait(page, "from seed 99")
        text = page.input_value("#text")
        link = "#" + page.evaluate("address()").split("#", 1)[1]
        page.reload()
        wait(page, "Ready")
        assert page.input_value("#text") == text
        kept = [page.input_value(f"#{name}") for name in ("seed", "temperature", "style", "max_tokens")]
        assert kept == ["99", "1.2", "pip", "12"] and not page.is_checked("#fresh")
    with opened(browser, path, link) as page:
        assert page.input_value("#text") == "It was" and page.input_value("#style") == "pip"
        page.click("#continue")
        wait(page, "from seed 99")
        assert page.input_value("#text") == text
    with opened(browser, path, link, context=context) as page:  # what was there before a link came is one step back
        page.click("#undo")
        assert page.input_value("#text") == text
    context.close()


def test_the_text_is_saved_as_a_file(browser: Any, folder: Path) -> None:
    with opened(browser, page_of(folder, KINDS[0])) as page:
        page.fill("#text", "It was\n\n“the” <best>")
        with page.expect_download() as download:
            page.click("#save")
        assert download.value.suggested_filename == "mine.txt"
        assert Path(download.value.path()).read_text(encoding="utf-8") == "It was\n\n“the” <best>"


def test_names_texts_and_links_are_never_markup(browser: Any, folder: Path) -> None:
    from urllib.parse import urlencode

    link = "#" + urlencode({"prompt": MARKUP, "style": MARKUP, "seed": MARKUP, "temperature": MARKUP})
    with opened(browser, page_of(folder, "markup"), link) as page:
        assert page.title() == MARKUP and page.text_content("h1") == MARKUP and MARKUP in page.text_content("#about")
        assert page.input_value("#text") == MARKUP
        page.click("#continue")
        wait(page, "is no whole number")
        page.check("#fresh")
        page.check("#tint")
        page.click("#continue")
        wait(page, "from seed")
        assert page.input_value("#text").startswith(MARKUP) and page.locator("img, b").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_fits_its_screen(browser: Any, folder: Path, width: int, scheme: str) -> None:
    size = {"width": width, "height": 844}
    with opened(browser, page_of(folder, "markup"), viewport=size, color_scheme=scheme) as page:
        page.fill("#text", "It was " * 40 + "x" * 300)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        red = page.evaluate("parseInt(getComputedStyle(document.documentElement).backgroundColor.slice(4))")
        assert (red < 100) == (scheme == "dark")
        unnamed = "[...document.querySelectorAll('button, input, select, textarea')].filter(e => e.type !== 'hidden' "
        assert (
            page.evaluate(unnamed + "&& !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.id)")
            == []
        )


def test_a_model_too_large_for_a_browser_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(n_layer=6, n_head=12, n_embd=768, block_size=64, vocab_size=32768)
    with torch.device("meta"):
        model = GPT(config)
    with pytest.raises(CheckpointError, match="68 million parameters are too many .* --to gguf"):
        write_page(tmp_path / "m.html", model, tiny_tokenizer(), name="m", generation=GREEDY, card={})
    assert not list(tmp_path.iterdir())
