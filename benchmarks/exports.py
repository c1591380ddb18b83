"""Exported models beside the programs that run them: token ids, greedy texts, logits, bytes, and tokens a second in turns.

    python benchmarks/exports.py                               # llama.cpp (xllamacpp) and the page in Chromium
    npm install @wllama/wllama@3.8.1
    python benchmarks/exports.py --wllama node_modules/@wllama/wllama   # and llama.cpp in the browser
    python benchmarks/exports.py --large                       # GPT-2's 124M shape as GGUF, and that the page refuses

Five kinds of small models with random weights (tests/support/exports.py) and the shipped one, each as GGUF in f32, f16 and
q8_0 and as a page. Compared with this program in float32: ids of 200,000 characters of the sample stories, greedy texts
of 80 tokens from three prompts, the largest difference of a logit behind the first prompt. Then all write 100 tokens in
turns, one thread each; the figure is the median, and what can be compared are ratios within the row.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from common import ROOT, middle, report

sys.path.insert(0, str(ROOT / "tests"))

from checkpoint import load_model
from config import GenerationParams
from inference.writing import generate
from model import GPT
from storage.atomic import CheckpointError
from storage.gguf import write_gguf
from storage.web_page import write_page
from support.exports import KINDS, exported
from support.llama import Llama
from support.static_host import served
from tokenizer import Tokenizer

SHIPPED = "victorian-mini"
TYPES: tuple[Literal["f32", "f16", "q8_0"], ...] = ("f32", "f16", "q8_0")
PROMPTS = ("It was the best", "The old house stood", "“I am glad,” said she")
GREEDY = GenerationParams(temperature=0.0, repetition_penalty=1.0, max_tokens=80)
LENGTH, CHARACTERS = 100, 200_000
WRITE = """async ([prompt, settings]) => {
    let text = ""; const ids = [], begun = performance.now();
    for await (const step of write(model, tokenizer, prompt, settings)) { text += step.text; if (step.id !== undefined) ids.push(step.id); }
    return { text, ids, seconds: (performance.now() - begun) / 1000 };
}"""
LOGITS = """(ids) => {
    model.keep([-1]);
    let logits;
    ids.forEach((id, at) => { logits = model.forward(id, at === ids.length - 1); });
    return Array.from(logits);
}"""
START_WLLAMA = """async (url) => {
    const { Wllama } = await import("./esm/index.js");
    const quiet = { debug() {}, log() {}, warn() {}, error() {} };
    const made = new Wllama({ default: "./esm/wasm/wllama.wasm" }, { suppressNativeLog: true, logger: quiet });
    await made.loadModelFromUrl(url, { n_threads: 1, n_gpu_layers: 0, useCache: false });
    (window.made ??= {})[url] = made;
}"""
WLLAMA = """async ([url, prompt, count]) => {
    const begun = performance.now();
    const settings = { temperature: 0, top_k: 1, repeat_penalty: 1.0, cache_prompt: false };
    const answer = await window.made[url].createCompletion({ prompt, max_tokens: count, ...settings });
    return { text: answer.choices[0].text, tokens: answer.usage?.completion_tokens ?? null,
             seconds: (performance.now() - begun) / 1000 };
}"""


def passage(tokenizer: Tokenizer) -> str:
    """Some 200,000 characters of the sample stories; without those that a vocabulary of characters lacks."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "data" / "sample").glob("*.txt")))
    if tokenizer.kind == "char":
        known = {tokenizer.decode([id]) for id in range(tokenizer.vocab_size)}
        text = "".join(character for character in text if character in known)
    return text[:CHARACTERS]


def next_logits(model: GPT, tokenizer: Tokenizer, ids: list[int]) -> torch.Tensor:
    """Logits [N] of the token behind `ids`, control ids at minus infinity."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    logits[list(tokenizer.controls.values())] = float("-inf")
    return logits


def logit_difference(mine: torch.Tensor, theirs: dict[int, float]) -> float:
    """The largest difference of log-probabilities of ids that both give."""
    known = [id for id in range(len(mine)) if id in theirs and mine[id].isfinite()]
    ours, found = mine[known].double(), torch.tensor([theirs[id] for id in known], dtype=torch.float64)
    return float(((ours - ours.logsumexp(0)) - (found - found.logsumexp(0))).abs().max())


def greedy_texts(model: GPT, tokenizer: Tokenizer) -> list[str]:
    """This program's text behind each of PROMPTS."""
    return [generate(model, tokenizer, prompt, GREEDY)[0].text for prompt in PROMPTS]


def compare_gguf(
    path: Path, model: GPT, tokenizer: Tokenizer, text: str, expected: list[str]
) -> tuple[dict[str, Any], Llama]:
    """What llama.cpp makes of a GGUF file beside this program.

    gap: how far a token that it took was below the likeliest, in logits of this program. With random weights two tokens
    are often closer than llama.cpp's rounding; then its text is another, and no worse.
    """
    llama, prompt, same, gap = Llama(path), tokenizer.encode(PROMPTS[0]), 0, 0.0
    for begin, mine in zip(PROMPTS, expected, strict=True):
        answer = llama.greedy(begin, GREEDY.max_tokens)
        same += answer["content"] == mine
        ids, taken = tokenizer.encode(begin), [id for id in answer["tokens"] if id < model.config.tokens]
        with torch.no_grad():
            logits = model(torch.tensor([(ids + taken)[: model.config.block_size]]))[0, len(ids) - 1 : -1]
        logits[:, list(tokenizer.controls.values())] = float("-inf")
        gap = max(gap, float((logits.max(1).values - logits[range(len(logits)), taken[: len(logits)]]).max()))
    mine_next = next_logits(model, tokenizer, prompt)
    (first,) = llama.greedy(PROMPTS[0], 1, probabilities=len(mine_next) + 1)["completion_probabilities"]
    theirs = {row["id"]: row["logprob"] for row in first["top_logprobs"]}
    ids_same = "equal" if llama.ids(text) == tokenizer.encode(text) else "differ"
    row = {"ids": ids_same, "greedy": f"{same} of {len(PROMPTS)}", "gap": gap}
    return row | {"logits": logit_difference(mine_next, theirs), "bytes": f"{path.stat().st_size:,}"}, llama


def compare_page(
    page: Any, path: Path, model: GPT, tokenizer: Tokenizer, text: str, expected: list[str]
) -> dict[str, Any]:
    settings = GREEDY.model_dump(mode="json") | {"seed": "0"}
    same = sum(
        page.evaluate(WRITE, [begin, settings])["text"] == mine for begin, mine in zip(PROMPTS, expected, strict=True)
    )
    prompt = tokenizer.encode(PROMPTS[0])
    theirs = dict(enumerate(page.evaluate(LOGITS, prompt)))
    ids = "equal" if page.evaluate("text => tokenizer.encode(text)", text) == tokenizer.encode(text) else "differ"
    difference = logit_difference(next_logits(model, tokenizer, prompt), theirs)
    row = {"ids": ids, "greedy": f"{same} of {len(PROMPTS)}", "gap": None, "logits": difference}
    return row | {"bytes": f"{path.stat().st_size:,}"}


def in_turns(writers: dict[str, Callable[[], float]], rounds: int) -> dict[str, float | None]:
    """Tokens a second of each writer, the median of `rounds`; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(rounds):
        for name, write in writers.items():
            times[name].append(write())
    return {name: None if any(map(math.isnan, found)) else round(middle(found), 1) for name, found in times.items()}


def llama_speed(llama: Llama) -> float:
    body = {"prompt": PROMPTS[0], "n_predict": LENGTH, "temperature": 0, "repeat_penalty": 1.0, "cache_prompt": False}
    begun = time.perf_counter()
    answer = llama.ask("/completion", ignore_eos=True, **body)
    return float(answer["tokens_predicted"] / (time.perf_counter() - begun))


def page_speed(page: Any) -> float:
    settings = GREEDY.model_copy(update={"max_tokens": LENGTH}).model_dump(mode="json") | {"seed": "0"}
    page.evaluate("model.keep([-1]); undefined")
    answer = page.evaluate(WRITE, [PROMPTS[0], settings])
    return float(len(answer["ids"]) / answer["seconds"])


def wllama_speed(page: Any, url: str, tokenizer: Tokenizer) -> float:
    """NaN where it fails: with random weights a text may be no UTF-8, which wllama 3.8.1 does not hand over."""
    from playwright.sync_api import Error

    try:
        answer = page.evaluate(WLLAMA, [url, PROMPTS[0], LENGTH])
    except Error as error:
        print(f"wllama, {url}: {str(error).splitlines()[0]}", flush=True)
        return math.nan
    return float((answer["tokens"] or len(tokenizer.encode(answer["text"]))) / answer["seconds"])


def of_kind(
    kind: str, model: GPT, tokenizer: Tokenizer, place: Path, browser: Any, wllama: Any, rounds: int
) -> list[dict[str, Any]]:
    """The rows of one model: three GGUF files and the page."""
    text, rows, expected = passage(tokenizer), [], greedy_texts(model, tokenizer)
    card: dict[str, Any] = {}
    writers: dict[str, Callable[[], float]] = {}
    stem = kind.replace(" ", "-").replace(",", "").replace("'", "")
    for dtype in TYPES:
        path = place / f"{stem}-{dtype}.gguf"
        write_gguf(path, model, tokenizer, name=kind, generation=GREEDY, dtype=dtype)
        row, llama = compare_gguf(path, model, tokenizer, text, expected)
        rows.append({"model": kind, "form": f"GGUF {dtype}", **row})
        writers[dtype] = partial(llama_speed, llama)
        if wllama is not None:
            wllama.evaluate(START_WLLAMA, path.name)
            writers[f"wllama {dtype}"] = partial(wllama_speed, wllama, path.name, tokenizer)
    path = place / f"{stem}.html"
    write_page(path, model, tokenizer, name=kind, generation=GREEDY, card=card)
    page = browser.new_page()
    page.set_default_timeout(300_000)
    page.goto(path.as_uri())
    page.locator("#status").filter(has_text="Ready.").wait_for()
    rows.append({"model": kind, "form": "page", **compare_page(page, path, model, tokenizer, text, expected)})
    writers["page"] = partial(page_speed, page)
    speeds = in_turns(writers, rounds)
    for row, name in zip(rows, (*TYPES, "page"), strict=True):
        row |= {"tokens/s": speeds[name], "wllama tokens/s": speeds.get(f"wllama {name}")}
    page.close()
    if wllama is not None:
        wllama.evaluate(
            "async () => { for (const one of Object.values(window.made)) await one.exit(); window.made = {}; }"
        )
    return rows


def large(place: Path) -> list[dict[str, Any]]:
    """GPT-2's 124M shape with random weights: GGUF in f16 and q8_0; the page refuses."""
    from decode import random_folder

    model, tokenizer = load_model(random_folder(place / "model"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("wpe"):
                parameter.copy_((3 * parameter).half())  # wide, or the likeliest token is the last again; exact in f16
    rows, text, expected = [], passage(tokenizer), greedy_texts(model, tokenizer)
    for dtype in TYPES[1:]:
        path = place / f"large-{dtype}.gguf"
        write_gguf(path, model, tokenizer, name="large", generation=GREEDY, dtype=dtype)
        row, _ = compare_gguf(path, model, tokenizer, text, expected)
        rows.append({"model": "124M", "form": f"GGUF {dtype}", **row})
        print(rows[-1], flush=True)
    try:
        write_page(place / "large.html", model, tokenizer, name="large", generation=GREEDY, card={})
    except CheckpointError as error:
        print(f"page: {error}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wllama", type=Path, help="the npm package's folder")
    parser.add_argument("--models", nargs="+", choices=[*KINDS, SHIPPED], default=[*KINDS, SHIPPED])
    parser.add_argument("--large", action="store_true", help="only the 124M shape")
    parser.add_argument("--rounds", type=int, default=5, help="texts of 100 tokens each program writes in turns")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        if args.large:
            return report("exports_large", large(place), load=os.getloadavg())
        from playwright.sync_api import sync_playwright

        models = {
            kind: load_model(ROOT / "models" / kind) if kind == SHIPPED else exported(kind) for kind in args.models
        }
        rows: list[dict[str, Any]] = []
        with sync_playwright() as driver, served(place) as address:
            browser = driver.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
            wllama = None
            if args.wllama:
                (place / "esm").symlink_to((args.wllama / "esm").resolve())
                (place / "index.html").write_text("<!doctype html><title>wllama</title>", encoding="utf-8")
                wllama = browser.new_page()
                wllama.set_default_timeout(300_000)
                wllama.goto(address)
            for kind, (model, tokenizer) in models.items():
                rows += of_kind(kind, model, tokenizer, place, browser, wllama, args.rounds)
                print(rows[-4:], flush=True)
            version = browser.version
            browser.close()
        report("exports", rows, load=os.getloadavg(), browser=version)


if __name__ == "__main__":
    main()
