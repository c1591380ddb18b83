"""The page that writes by itself, in a real browser from a file: the words of generate.py, no network, nothing as markup."""

from __future__ import annotations

import os
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
from config import SETTINGS, GenerationParams, ModelConfig
from inference.writing import generate
from model import GPT
from sampling import FILTERS, sample_seed
from storage.atomic import CheckpointError, read_tensors, write_tensors
from storage.web_page import WITHOUT, write_page
from support.exports import KINDS, ODD, exported, story
from support.helpers import ROOT
from support.static_host import served
from support.tiny_models import save, tiny_tokenizer

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
    return {**params.model_dump(mode="json"), "seed": str(params.seed or 0)}


# Each filter alone or with what it works beside, and all at once.
FILTERED: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 0, "top_p": 1.0},
    {"top_k": 0, "min_p": 0.02, "temperature": 2.0},
    {"top_k": 7, "top_p": 0.6},
    {"top_k": 0, "top_p": 1.0, "typical_p": 0.7},
    {"top_k": 30, "top_n_sigma": 1.2},
    {"xtc_probability": 0.5, "xtc_threshold": 0.02},
    {"repetition_penalty": 1.0, "dry_multiplier": 3.0, "dry_base": 1.5, "dry_allowed_length": 1},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4, "penalty_last_n": 12},
    {"logit_bias": {"40": 2.5, "41": -100.0, "70000": 1.0}, "keep": 5},
    {
        "typical_p": 0.9, "top_n_sigma": 2.5, "xtc_probability": 0.3, "xtc_threshold": 0.05, "dry_multiplier": 0.8,
        "presence_penalty": -0.3, "frequency_penalty": 0.2, "penalty_last_n": 40, "min_p": 0.01, "keep": 9,
    },
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_has_the_ids_and_the_words_of_generate(kind: str, browser: Any, folder: Path) -> None:
    """From short, empty and over-long prompts, beyond the context, with every filter, in a style and in a blend."""
    model, tokenizer = exported(kind)
    text = story() + ODD * (tokenizer.kind != "char")
    styles = ["", *tokenizer.styles]
    few = tokenizer.kind == "gpt2"  # each token of a large vocabulary takes long
    tries = [(prompt, GREEDY) for prompt in ("It was", "", story()[:3000], "\ufeffIt was\r\nthe")]
    tries.append(("It was", GREEDY.model_copy(update={"max_tokens": 20 if few else 150, "style": styles[-1]})))
    if len(styles) > 2:
        blend = {"style": f"{styles[1]}:0.7, {styles[2]}:2", "seed": 5}
        tries += [("It was", GREEDY.model_copy(update=blend)), ("", GenerationParams(max_tokens=40, **blend))]
        tries.append((story()[:2000], GenerationParams(max_tokens=40, keep=7, **blend)))
    for number, values in enumerate(FILTERED):
        count = 20 if few else 150 if number < 2 else 50
        params = GenerationParams(max_tokens=count, seed=2**60 + number, style=styles[-1], **values)
        tries.append(("It was the best", params))
    with opened(browser, page_of(folder, kind)) as page:
        assert page.evaluate("text => tokenizer.encode(text)", text) == tokenizer.encode(text)
        for prompt, params in tries:
            (ours,) = generate(model, tokenizer, prompt, params)
            found = page.evaluate(WRITE, [prompt, settings(params)])
            assert (found["ids"], found["text"]) == (ours.ids, ours.text), (prompt[:20], params)


def test_no_setting_and_no_filter_is_forgotten(browser: Any, folder: Path) -> None:
    """The page's filters are sampling.FILTERS, in order and off where those are; every setting but `n` has a field."""
    off = {name: setting.off for name, setting in SETTINGS.items()} | {"logit_bias": {}}
    with opened(browser, page_of(folder, KINDS[0])) as page:
        assert page.evaluate("FILTERS.map(([name]) => name)") == [name for name, _ in FILTERS]
        on = "values => FILTERS.filter(([,, filter]) => activeFilters(values).includes(filter)).map(([name]) => name)"
        assert page.evaluate(on, off) == ["temperature"]
        for name, _ in FILTERS:
            changed = {**off, name: {"3": 1.0} if name == "logit_bias" else 0.5}
            assert page.evaluate(on, changed) == [one for one, _ in FILTERS if one in (name, "temperature")]
        listed = page.evaluate("[...FIELDS]")
        assert sorted(listed) == sorted(set(SETTINGS) - set(WITHOUT))
        held = page.evaluate("settings()")
    (params,) = [GenerationParams(max_tokens=12)]
    expected = params.model_dump(mode="json", exclude={"seed", *WITHOUT})
    assert {name: held[name] for name in expected} == expected


def test_stop_strings_cut_the_text_where_generate_does(browser: Any, folder: Path) -> None:
    model, tokenizer = exported("own vocabulary")
    free = GenerationParams(max_tokens=80, seed=11)
    text = generate(model, tokenizer, "It was", free)[0].text
    with opened(browser, page_of(folder, "own vocabulary")) as page:
        for stop in (
            (text[9:12],),
            (text[20:22], text[15:23]),
            (text[30:34] + "?", text[40:41]),
            ("never there",),
            (text[-3:] + "x",),
        ):
            params = free.model_copy(update={"stop": stop})
            (ours,) = generate(model, tokenizer, "It was", params)
            assert page.evaluate(WRITE, ["It was", settings(params)])["text"] == ours.text, stop
        page.fill("#text", "It was")
        page.fill("#max_tokens", "80")
        page.fill("#seed", "11")
        page.locator("#more summary").first.click()
        page.fill("#stop", r"never\n|" + page.evaluate("text => asLine([text])", text[20:22]))
        page.click("#continue")
        wait(page, "A stop phrase ended the text.*from seed 11")
        params = free.model_copy(update={"stop": ("never\n", text[20:22])})
        assert page.input_value("#text") == "It was" + generate(model, tokenizer, "It was", params)[0].text
        ends = page.evaluate("written.map(token => [token.start, token.end])")
        assert ends[0][0] == 6 and ends[-1][1] <= len(page.input_value("#text"))


def test_a_blend_is_chosen_and_carried_by_a_link(browser: Any, folder: Path) -> None:
    with opened(browser, page_of(folder, "gpt2 styles")) as page:
        assert page.is_hidden("#blend")
        page.select_option("#style", label="a blend …")
        page.fill("#blend", "pip:1, mary:1")
        page.fill("#text", "It was")
        page.fill("#max_tokens", "5")
        page.fill("#seed", "3")
        page.click("#continue")
        wait(page, "This model has no style “mary”. It has: pip, joe")
        page.fill("#blend", "pip:1, joe:3")
        page.click("#continue")
        wait(page, "from seed 3")
        text = page.input_value("#text")
        link = "#" + page.evaluate("address()").split("#", 1)[1]
    model, tokenizer = exported("gpt2 styles")
    params = GenerationParams(max_tokens=5, seed=3, style="pip:1,joe:3")
    assert text == "It was" + generate(model, tokenizer, "It was", params)[0].text
    with opened(browser, page_of(folder, "gpt2 styles"), link) as page:
        assert page.input_value("#blend") == "pip:1, joe:3" and page.is_visible("#blend")
        page.click("#continue")
        wait(page, "from seed 3")
        assert page.input_value("#text") == text


def test_a_field_that_cannot_be_is_named_and_a_link_brings_all_settings(browser: Any, folder: Path) -> None:
    path = page_of(folder, KINDS[0])
    wrong = {
        "top_p": ("0", "Top-p 0 is outside 0 to 1"),
        "min_p": ("1", "Min-p 1 is outside 0 to 1"),
        "top_k": ("2.5", "Top-k 2.5 is no whole number"),
        "logit_bias": ("3:1000", "Logit bias 3:1000 is not like"),
        "stop": ("|".join("abcdefghijklmnopq"), "is more than 16 phrases"),
    }
    context = browser.new_context()
    with opened(browser, path, context=context) as page:
        page.fill("#text", "It was")
        for name, (value, message) in wrong.items():
            before = page.input_value(f"#{name}")
            page.evaluate("([name, value]) => { at(name).value = value; }", [name, value])
            page.click("#continue")
            wait(page, message)
            assert page.is_visible(f"#{name}") and page.input_value("#text") == "It was"
            page.fill(f"#{name}", before)
        changed = {
            "dry_multiplier": "0.8",
            "dry_sequence_breakers": r"\n|a\|b|\\",
            "logit_bias": "3:1.5, 4:-2",
            "keep": "3",
        }
        for name, value in changed.items():
            page.evaluate("([name, value]) => { at(name).value = value; }", [name, value])
        held = page.evaluate("settings()")
        assert held["dry_sequence_breakers"] == ["\n", "a|b", "\\"] and held["logit_bias"] == {"3": 1.5, "4": -2}
        page.fill("#seed", "8")
        page.click("#continue")
        wait(page, "from seed 8")
        text, link = page.input_value("#text"), "#" + page.evaluate("address()").split("#", 1)[1]
    assert "typical_p" not in link and "dry_multiplier=0.8" in link
    with opened(browser, path, context=context) as page:  # a reader with settings of her own
        page.evaluate("at('presence_penalty').value = '1'; keep()")
    with opened(browser, path, link, context=context) as page:
        assert page.input_value("#presence_penalty") == "0"
        page.click("#continue")
        wait(page, "from seed 8")
        assert page.input_value("#text") == text
    context.close()


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
        assert page.is_visible("#halt")
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


def as_folder(place: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Export a model with a style as a folder; the model and its tokenizer, as loaded again."""
    model, tokenizer = exported("characters with a style")
    source = save(place.parent / f"{place.name}-model", model, tokenizer)
    weights = {name: tensor.to(dtype) for name, tensor in read_tensors(source / "model.safetensors").items()}
    write_tensors(place.parent / "copy", weights)
    os.replace(place.parent / "copy", source / "model.safetensors")
    (source / "checksums.json").unlink(missing_ok=True)
    assert export.main(["--model", str(source), "--to", "html", "--folder", "--out", str(place)]) == 0
    return load_model(source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_folder_on_a_static_host_asks_for_its_own_two_files(browser: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    model, tokenizer = as_folder(tmp_path / "page", dtype)
    asked: list[str] = []
    faults: list[str] = []
    with served(tmp_path / "page") as address:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.goto(address)
        wait(page, r"^Ready\.$")
        for params in (GREEDY, GenerationParams(max_tokens=60, seed=4, style="pip")):
            (ours,) = generate(model, tokenizer, "It was", params)
            assert page.evaluate(WRITE, ["It was", settings(params)])["text"] == ours.text
        assert asked == [address, f"{address}model.safetensors"] and not faults
        other = page.evaluate("fetch('https://example.invalid/').then(() => 'went', () => 'held back')")
        assert other == "held back" and "Content Security Policy" in faults[0]
        page.close()


def test_a_folder_whose_file_is_missing_cut_or_another_says_so(browser: Any, tmp_path: Path) -> None:
    as_folder(tmp_path / "page")
    weights = tmp_path / "page" / "model.safetensors"
    whole = weights.read_bytes()
    with served(tmp_path / "page") as address:
        for content in (None, whole[:-9], whole[:-1] + b"x"):
            weights.unlink(missing_ok=True)
            if content is not None:
                weights.write_bytes(content)
            page = browser.new_page()
            page.goto(address)
            wait(page, "model.safetensors beside this page is missing, or is not the one")
            assert page.is_disabled("#continue") and page.input_value("#text") == ""
            page.close()


def test_a_folder_opened_from_a_file_says_that_it_needs_a_host(browser: Any, tmp_path: Path) -> None:
    as_folder(tmp_path / "page")
    asked: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "page" / "index.html").as_uri())
    wait(page, "Put both on a web host, or have the one-file page made: python export.py --to html")
    assert len(asked) == 1 and page.is_disabled("#continue")
    page.close()


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
