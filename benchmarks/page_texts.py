"""One seed, one text: how often the web page parts from generate.py's float32 texts, at which token, and why.

    python benchmarks/page_texts.py                       # the shipped model: 100 greedy texts, 1,000 from seeds
    python benchmarks/page_texts.py --texts 200 --filters --minutes 10

Both write 100 tokens from the same prompts, pieces of data/sample. Where a text parts, both are asked for the logits of
that token: what is shown is their largest difference, the tokens that only one of the two filters left, and how far the
random number lay from the nearest border between two tokens, as a share of all probability. Needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, report

import export
from checkpoint import load_model
from config import GenerationParams
from inference.decoder import BatchDecoder, Sequence
from model import GPT
from sampling import TokenHistory, candidates, sample_seed, softmax
from storage.gpt2_format import folder_defaults
from tokenizer import Tokenizer

TOKENS, BATCH, LONGEST = 100, 10, 24
# Every filter at once, mildly.
ALL = {
    "temperature": 1.0, "top_k": 60, "top_p": 0.97, "min_p": 0.005, "typical_p": 0.97, "top_n_sigma": 4.0,
    "xtc_probability": 0.2, "xtc_threshold": 0.1, "dry_multiplier": 0.8, "presence_penalty": 0.2,
    "frequency_penalty": 0.1, "repetition_penalty": 1.1, "penalty_last_n": 64,
}  # fmt: skip
WRITE = """async (jobs) => {
    const found = [];
    for (const [prompt, settings] of jobs) {
        const ids = [];
        for await (const step of write(model, tokenizer, prompt, settings)) if (step.id !== undefined) ids.push(step.id);
        found.push(ids);
    }
    return found;
}"""
NEXT = """([ids, prompt, settings, drawn]) => {
    model.keep([-1]);
    let logits;
    ids.forEach((id, at) => { logits = model.forward(id, at === ids.length - 1); });
    for (const id of tokenizer.controls) logits[id] = -Infinity;
    const history = new TokenHistory(ids, prompt, tokenizer), generator = new Generator(seedOf(settings.seed));
    for (let n = 0; n < drawn; n++) generator.random();
    const kept = candidates(logits, settings, history, generator)[1];
    return { logits: Array.from(logits, (value) => Math.max(value, -3e38)), kept };
}"""


def prompts(tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """Beginnings of 3 to 11 words at random places of the sample stories; always the same."""
    texts = [path.read_text(encoding="utf-8").split() for path in sorted((ROOT / "data" / "sample").glob("*.txt"))]
    chance = random.Random(18)
    while count:
        words = chance.choice(texts)
        begin = chance.randrange(len(words) - 11)
        prompt = " ".join(words[begin : begin + chance.randint(3, 11)])
        if len(tokenizer.encode(prompt)) <= LONGEST:
            yield prompt
            count -= 1


def ours(model: GPT, tokenizer: Tokenizer, jobs: list[tuple[str, GenerationParams]]) -> list[list[int]]:
    """The ids that generate.py's decoder writes for each job, side by side; the same as alone."""
    decoder, sequences = BatchDecoder(model, len(jobs)), []
    for prompt, params in jobs:
        ids = tokenizer.encode(prompt)
        sequences.append(
            Sequence(tokenizer, ids, params, seed=params.seed or 0, index=0, context=model.config.block_size)
        )
        decoder.add(sequences[-1])
    while decoder.sequences:
        decoder.step()
    return [sequence.output_ids for sequence in sequences]


def why(
    page: Any, model: GPT, tokenizer: Tokenizer, prompt: str, params: GenerationParams, written: list[int]
) -> dict[str, Any]:
    """What both say of the token behind `prompt` and `written`."""
    ids = tokenizer.encode(prompt) + written
    begun = len(ids) - len(written)
    mine = torch.from_numpy(
        BatchDecoder(model, 1)._read(ids, 0)
    )  # not model(ids): these are the bits that are written from
    mine[list(tokenizer.controls.values())] = float("-inf")
    settings = params.model_dump(mode="json") | {"seed": str(params.seed)}
    theirs = page.evaluate(NEXT, [ids, begun, settings, len(written)])
    generator = torch.Generator().manual_seed(sample_seed(params.seed or 0, 0))
    for _ in written:
        torch.rand((), generator=generator, dtype=torch.float64)
    values, kept = candidates(mine, params, TokenHistory(list(ids), begun, tokenizer), generator)
    shares = softmax(values.numpy()).cumsum(dtype=np.float64)
    drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
    known = mine.isfinite()
    random = bool(params.temperature) and not params.xtc_probability  # else no draw, or how many came before is unknown
    return {
        "token": len(written),
        "logits_differ": float((mine - torch.tensor(theirs["logits"]))[known].abs().max()),
        "kept": len(kept),
        "kept_by_one_only": sorted(set(kept.tolist()) ^ set(theirs["kept"])),
        "draw_to_border": float(np.abs(shares / shares[-1] - drawn).min()) if random else None,
        "settings": params.model_dump(exclude_defaults=True, mode="json"),
        "prompt": prompt,
    }


def compare(
    page: Any, folder: Path, kinds: dict[str, tuple[dict[str, Any], int]], begin: int, end: float
) -> list[dict[str, Any]]:
    """A row for each kind of settings: (values, number of texts). begin: number of the first; end: by time.monotonic."""
    model, tokenizer = load_model(folder)
    base, rows = folder_defaults(folder), []
    for kind, (values, count) in kinds.items():
        jobs = []
        for number, prompt in enumerate(prompts(tokenizer, begin + count)):
            jobs.append((prompt, GenerationParams(**{**base, **values, "max_tokens": TOKENS, "seed": number})))
        jobs = jobs[begin:]
        row: dict[str, Any] = {"settings": kind, "texts": 0, "tokens": 0, "parted": 0, "at": []}
        times = {"page": 0.0, "ours": 0.0}
        while jobs and time.monotonic() < end:
            some, jobs = jobs[:BATCH], jobs[BATCH:]
            begun = time.perf_counter()
            theirs = page.evaluate(
                WRITE,
                [[prompt, {**params.model_dump(mode="json"), "seed": str(params.seed)}] for prompt, params in some],
            )
            halfway = time.perf_counter()
            mine = ours(model, tokenizer, some)
            times["page"] += halfway - begun
            times["ours"] += time.perf_counter() - halfway
            for (prompt, params), one, other in zip(some, mine, theirs, strict=True):
                row["texts"] += 1
                row["tokens"] += len(one)
                if one != other:
                    row["parted"] += 1
                    same = next(
                        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
                        min(len(one), len(other)),
                    )
                    row["at"].append(why(page, model, tokenizer, prompt, params, one[:same]))
        rows.append(row | {f"{name}_s": round(taken, 1) for name, taken in times.items()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "victorian-mini")
    parser.add_argument("--texts", type=int, default=1000, help="texts from seeds")
    parser.add_argument("--greedy", type=int, default=100, help="texts of the most likely tokens")
    parser.add_argument("--filters", action="store_true", help="instead with every filter at once")
    parser.add_argument("--from-seed", type=int, default=0, help="the first text's number and seed")
    parser.add_argument("--minutes", type=float, default=40, help="begin no further texts after these")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    kinds: dict[str, tuple[dict[str, Any], int]] = {"every filter": (ALL, args.texts)}
    if not args.filters:
        greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
        kinds = {"greedy": (greedy, args.greedy), "the model's own": ({}, args.texts)}
    with tempfile.TemporaryDirectory() as place, sync_playwright() as driver:
        made = Path(place) / "model.html"
        if export.main(["--model", str(args.model), "--to", "html", "--out", str(made)]):
            raise SystemExit(1)
        browser = driver.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(600_000)
        page.goto(made.as_uri())
        page.locator("#status").filter(has_text="Ready.").wait_for()
        rows = compare(page, args.model, kinds, args.from_seed, time.monotonic() + 60 * args.minutes)
        browser.close()
    shown = [{key: value for key, value in row.items() if key != "at"} for row in rows]
    report("page_texts_filters" if args.filters else "page_texts", shown, parted=[row["at"] for row in rows])


if __name__ == "__main__":
    main()
