"""Milliseconds a token while writing, beside transformers and CTranslate2; and what batching eight sequences gains.

    python benchmarks/decode.py --seconds 120
    python benchmarks/decode.py --model runs/sample/best --without-peers
    python benchmarks/decode.py --device cuda --streams 1 64

The model is GPT-2's 124M shape with random weights unless --model names a folder; sampling as the defaults have it. A run
generates some tokens after a prompt of 64; the figure is the median gap between two tokens. The candidates run alternately,
and what is claimed are ratios within a round. The peers choose greedily, which costs them nothing; ours sample with the
defaults. CTranslate2 reads the same model folder through its own converter.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import middle, report, table

RunOnce = Callable[[int], list[float]]  # generates that many tokens; the seconds between them
Candidates = dict[str, tuple[RunOnce, Callable[[], float]]]  # by name: one run, and a long prompt's time to first token
Rounds = dict[str, list[float]]  # by name: seconds, one figure a round
PROMPT = 64
FIRST = 512  # tokens of the prompt for the time to the first token
REST = 0.4  # seconds between runs: the threads of a library spin for a while after its work, at the next one's cost


def gaps(moments: list[float]) -> list[float]:
    """Seconds between consecutive moments."""
    return [later - sooner for sooner, later in pairwise(moments)]


def random_folder(folder: Path) -> Path:
    """A model folder of GPT-2's 124M shape, with random weights and GPT-2's tokenizer."""
    import torch

    from checkpoint import save_model
    from config import GenerationParams, ModelConfig
    from model import GPT
    from tokenizer import gpt2_tokenizer

    torch.manual_seed(0)
    config = ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50_257, vocab_used=50_257)
    save_model(folder, GPT(config), gpt2_tokenizer(), card={}, generation=GenerationParams())
    return folder


def time_ours(folder: Path, dtype: str, streams: int, device: str) -> tuple[RunOnce, Callable[[], float]]:
    """(one run, time to the first token of a long prompt) with our decoder, a batch of `streams` sequences."""
    from config import GenerationParams
    from inference import decoder
    from inference.quantize import load_for_writing

    model, tokenizer, _ = load_for_writing(folder, device=device, dtype=dtype)
    tokenizer.eot = None  # no text ends before its time
    batch = decoder.BatchDecoder(model, streams)
    count = [0]

    def text(length: int, tokens: int) -> decoder.Sequence:
        count[0] += 1
        ids = [(count[0] * 7919 + at * 31) % model.config.tokens for at in range(length)]
        params = GenerationParams(max_tokens=tokens, repetition_penalty=1.2)
        made = decoder.Sequence(tokenizer, ids, params, seed=count[0], index=0, context=model.config.block_size)
        batch.add(made)
        return made

    def run_once(tokens: int) -> list[float]:
        for _ in range(streams):
            text(PROMPT, tokens + streams + 1)  # the first ones write while the others are prefilled
        while any(one.prefilling for one in batch.sequences):
            batch.step()
        moments = [time.perf_counter()]
        for _ in range(tokens):
            batch.step()
            moments.append(time.perf_counter())
        for one in list(batch.sequences):
            batch.remove(one)
        return gaps(moments)

    def first() -> float:
        begun = time.perf_counter()
        made = text(min(FIRST, model.config.block_size // 2), 1)
        while made in batch.sequences:
            batch.step()
        return time.perf_counter() - begun

    return run_once, first


def time_transformers(folder: Path, dtype: str, device: str) -> tuple[RunOnce, Callable[[], float]]:
    """The same with transformers' GPT2LMHeadModel and its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
    vocab = model.config.vocab_size
    count = [0]

    def prompt(length: int) -> Any:
        count[0] += 1
        return torch.tensor([[(count[0] * 7919 + at * 31) % vocab for at in range(length)]], device=device)

    @torch.inference_mode()
    def run_once(tokens: int) -> list[float]:
        out = model(prompt(PROMPT), use_cache=True)
        moments = [time.perf_counter()]
        for _ in range(tokens):
            best = out.logits[:, -1:].argmax(-1)
            out = model(best, past_key_values=out.past_key_values, use_cache=True)
            int(best)
            moments.append(time.perf_counter())
        return gaps(moments)

    @torch.inference_mode()
    def first() -> float:
        begun = time.perf_counter()
        int(
            model(prompt(min(FIRST, model.config.n_positions // 2)), use_cache=True, logits_to_keep=1)
            .logits[0, -1]
            .argmax()
        )
        return time.perf_counter() - begun

    return run_once, first


def time_ctranslate2(
    converted: Path, tokens_of: list[str], kind: str, threads: int
) -> tuple[RunOnce, Callable[[], float]]:
    """The same with CTranslate2, from the folder that its converter wrote."""
    import ctranslate2

    generator = ctranslate2.Generator(str(converted), compute_type=kind, intra_threads=threads)
    count = [0]

    def prompt(length: int) -> list[str]:
        count[0] += 1
        return [tokens_of[(count[0] * 7919 + at * 31) % len(tokens_of)] for at in range(length)]

    def run(length: int, tokens: int) -> list[float]:
        moments = [time.perf_counter()]

        def called(_: Any) -> bool:
            moments.append(time.perf_counter())
            return False

        generator.generate_batch(
            [prompt(length)],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=called,
        )
        return moments

    def first() -> float:
        moments = run(FIRST, 2)
        return moments[1] - moments[0]

    return lambda tokens: gaps(run(PROMPT, tokens + 1)[1:]), first


def convert(folder: Path, target: Path) -> list[str]:
    """Run CTranslate2's converter on a model folder; the tokens of its vocabulary by id."""
    import json

    words = ["--model", str(folder), "--output_dir", str(target), "--force"]
    script = [sys.executable, "-m", "ctranslate2.converters.transformers"]
    made = subprocess.run([*script, *words], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"CTranslate2's converter failed on {folder}:\n{made.stderr[-2000:]}")
    found: list[str] = json.loads((target / "vocabulary.json").read_text(encoding="utf-8"))
    return found


def candidates(args: argparse.Namespace, folder: Path, scratch: Path, kinds: Sequence[str], device: Any) -> Candidates:
    """The candidates by name: ours in each number format and number of streams, then the peers."""
    import torch

    made: Candidates = {}
    for kind in kinds:
        for streams in args.streams:
            made[f"ours {kind}, {streams} at once"] = time_ours(folder, kind, streams, args.device)
    if args.without_peers:
        return made
    for kind in [kind for kind in kinds if kind not in ("int8", "float16")]:
        made[f"transformers {kind}"] = time_transformers(folder, kind, str(device))
    if device.type == "cpu":
        vocabulary = convert(folder, scratch / "converted")
        for kind in ("float32", "int8"):
            name = f"CTranslate2 {kind}"
            made[name] = time_ctranslate2(scratch / "converted", vocabulary, kind, torch.get_num_threads())
    return made


def interleaved_timing(made: Candidates, seconds: float, tokens: int) -> tuple[Rounds, Rounds]:
    """(seconds a step, seconds to the first token) of each candidate, a median or a figure each round."""
    steps: Rounds = {name: [] for name in made}
    firsts: Rounds = {name: [] for name in made}
    for run_once, first in made.values():
        run_once(4), first()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(firsts.values()))) < 3:
        for name, (run_once, first) in made.items():
            time.sleep(REST)
            steps[name].append(middle(run_once(tokens)))
            firsts[name].append(first())
    return steps, firsts


def compared(steps: Rounds, firsts: Rounds, usual: str, few: int, many: int) -> list[dict[str, Any]]:
    """What is claimed, as ratios within a round; the median of the rounds. `usual`: the format that auto chooses."""
    peer = "bfloat16" if usual == "bfloat16" else "float32"
    ours, small = f"ours {usual}, {few} at once", f"ours int8, {few} at once"
    comparisons = [
        ("a token, beside CTranslate2 float32", steps, "CTranslate2 float32", ours, 1.0),
        (f"a token, beside transformers {peer}", steps, f"transformers {peer}", ours, 1.4),
        ("a token in int8, beside CTranslate2 int8", steps, "CTranslate2 int8", small, 1.5),
        (f"first token of {FIRST}, beside transformers {peer}", firsts, f"transformers {peer}", ours, 1.0),
    ]
    rows: list[dict[str, Any]] = []
    for what, times, theirs, mine, target in comparisons:
        if theirs in times and mine in times:
            ratio = middle([other / own for other, own in zip(times[theirs], times[mine], strict=True)])
            rows.append({"what": what, "times as fast": ratio, "aim": target})
    for kind in (usual, "int8"):
        alone, together = f"ours {kind}, {few} at once", f"ours {kind}, {many} at once"
        if few < many and alone in steps and together in steps:
            pairs = zip(steps[alone], steps[together], strict=True)
            ratio = middle([many / few * one / all_of_them for one, all_of_them in pairs])
            row = {"what": f"{many} streams in {kind}, tokens/s beside {few}", "times as fast": ratio}
            rows.append(row | {"aim": 5.0 if (few, many) == (1, 8) else None})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; default: random weights in GPT-2's 124M shape")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tokens", type=int, default=16, help="tokens in one run")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--without-peers", action="store_true")
    args = parser.parse_args(argv)

    from devices import native_bf16, pick_device

    device = pick_device(args.device)
    usual = "bfloat16" if device.type != "cpu" and native_bf16(device) else "float16"
    kinds = ["float32", usual] + (["int8"] if device.type == "cpu" else [])
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or random_folder(Path(scratch) / "model")
        made = candidates(args, folder, Path(scratch), kinds, device)
        steps, firsts = interleaved_timing(made, args.seconds, args.tokens)
    rows: list[dict[str, Any]] = []
    for name in made:
        streams = int(name.split(", ")[1].split()[0]) if ", " in name else 1
        rows.append(
            {
                "what": name,
                "ms a step": middle(steps[name]) * 1000,
                "tokens/s": streams / middle(steps[name]),
                f"first token of {FIRST}, ms": middle(firsts[name]) * 1000,
                "rounds": len(steps[name]),
            }
        )
    ratios = compared(steps, firsts, usual, min(args.streams), max(args.streams))
    if ratios:
        print(table(ratios), end="\n\n")
    report(f"decode_{device.type}", rows, ratios=ratios)
    return 0


if __name__ == "__main__":
    sys.exit(main())
