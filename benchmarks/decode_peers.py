"""Writing on CPUs beside llama.cpp: processor and wall time of a token, of texts side by side, of a long prompt.

    python benchmarks/decode_peers.py --seconds 120
    python benchmarks/decode_peers.py --model models/victorian-mini --threads 1

The model is GPT-2's 124M shape with random weights unless --model names a folder; llama.cpp (xllamacpp) reads the same
weights from the GGUF files that `export.py` writes. Every candidate runs in its own process, one run at a time in turns,
and samples with the same settings; a run writes --tokens tokens of each text after a short prompt. What is claimed are
ratios within a round. Beside other load the processor times mean more: a process that waits is not charged for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from common import middle, report, table
from decode import random_folder

PROMPT = 8
FIRST = 512
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
Step = Callable[[int, int], None]  # writes so many tokens of every text after a prompt of so many
PEER_FORMATS: dict[str, Literal["q8_0", "f16", "f32"]] = {"int8": "q8_0", "float16": "f16", "float32": "f32"}


def ours(folder: Path, dtype: str, streams: int) -> Step:
    """Our decoder with one batch of `streams` texts."""
    from config import GenerationParams
    from inference.decoder import BatchDecoder, Sequence
    from inference.quantize import load_for_writing

    model, tokenizer, _ = load_for_writing(folder, device="cpu", dtype=dtype)
    tokenizer.eot = None  # no text ends before its time
    batch, count, context = BatchDecoder(model, streams), [0], model.config.block_size

    def step(prompt: int, tokens: int) -> None:
        for _ in range(streams):
            count[0] += 1
            ids = [(count[0] * 7919 + at * 31) % model.config.tokens for at in range(prompt)]
            params = GenerationParams(max_tokens=tokens, repetition_penalty=1.1, **SAMPLING)
            batch.add(Sequence(tokenizer, ids, params, seed=count[0], index=0, context=context))
        while batch.sequences:
            batch.step()

    return step


def theirs(path: Path, streams: int, threads: int, context: int, tokens: int) -> Step:
    """llama.cpp's server in this process, with one slot for each text."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity, params.n_parallel = str(path), -1, streams
    params.n_ctx = context * streams
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server, count = xllamacpp.Server(params), [0]
    pool = ThreadPoolExecutor(streams)

    def ask(number: int, prompt: int, length: int) -> None:
        ids = [(number * 7919 + at * 31) % tokens for at in range(prompt)]
        body = {"prompt": ids, "n_predict": length, "ignore_eos": True, "cache_prompt": False, "repeat_penalty": 1.1}
        request = urllib.request.Request(
            server.listening_address + "/completion",
            json.dumps(body | SAMPLING | {"seed": number}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found = json.load(answer)
        if found["tokens_predicted"] != length:
            raise SystemExit(f"llama.cpp wrote {found['tokens_predicted']} tokens instead of {length}")

    def step(prompt: int, length: int) -> None:
        numbers = range(count[0], count[0] + streams)
        count[0] += streams
        list(pool.map(lambda number: ask(number, prompt, length), numbers))

    return step


def work(step: Step) -> None:
    """A candidate's process: for each line (prompt, tokens) of its input one of (processor seconds, wall seconds)."""
    step(PROMPT, 4)
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, tokens = map(int, line.split())
        begun = time.process_time(), time.perf_counter()
        step(prompt, tokens)
        print(time.process_time() - begun[0], time.perf_counter() - begun[1], flush=True)


class Candidate:
    """A process that writes; `times` are (processor, wall) seconds of each run."""

    def __init__(self, words: Sequence[str], streams: int, threads: int):
        self.streams = streams
        command = [sys.executable, __file__, "--threads", str(threads), "--streams", str(streams), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        self.times: list[tuple[float, float]] = []
        self.firsts: list[tuple[float, float]] = []

    def answer(self) -> list[float]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"a candidate ended early: {' '.join(map(str, self.process.args))}")  # type: ignore[arg-type]
        return [] if line == "ready\n" else [float(value) for value in line.split()]

    def run(self, prompt: int, tokens: int) -> tuple[float, float]:
        if self.process.stdin:
            self.process.stdin.write(f"{prompt} {tokens}\n")
            self.process.stdin.flush()
        processor, wall = self.answer()
        return processor, wall


def measure(made: dict[str, Candidate], args: argparse.Namespace, first: int) -> list[dict[str, Any]]:
    """One row a candidate; runs alternate until the time is up."""
    for candidate in made.values():
        candidate.answer()
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end or len(next(iter(made.values())).times) < 3:
        for candidate in made.values():
            candidate.times.append(candidate.run(PROMPT, args.tokens))
            if candidate.streams == 1:
                candidate.firsts.append(candidate.run(first, 1))
    rows = []
    for name, candidate in made.items():
        each = args.tokens * candidate.streams
        row = {"what": name, "processor ms a token": middle([time[0] for time in candidate.times]) / each * 1000}
        row["wall ms a token"] = middle([time[1] for time in candidate.times]) / each * 1000
        if candidate.firsts:
            row[f"processor ms, prompt of {first}"] = middle([time[0] for time in candidate.firsts]) * 1000
        rows.append(row | {"runs": len(candidate.times)})
    return rows


def compared(made: dict[str, Candidate]) -> list[dict[str, Any]]:
    """Their processor time over ours in the same round, median of the rounds."""
    rows = []
    for name, candidate in made.items():
        peer = name.replace("ours", "llama.cpp")
        if peer != name and peer in made:
            row: dict[str, Any] = {"what": name}
            for what, which in (("a token", "times"), ("long prompt", "firsts")):
                pairs = list(zip(getattr(made[peer], which), getattr(candidate, which), strict=True))
                if pairs:
                    row[f"{what}: llama.cpp / ours"] = middle([other[0] / own[0] for other, own in pairs])
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; default: random weights in GPT-2's 124M shape")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a text in one run")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="texts side by side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "int8"], choices=list(PEER_FORMATS))
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        kind, path = args.work
        if kind != "theirs":
            work(ours(Path(path), kind, args.streams[0]))
        else:
            context, tokens = map(int, Path(path).with_suffix(".txt").read_text().split())
            work(theirs(Path(path), args.streams[0], args.threads, context, tokens))
        return 0

    from checkpoint import load_model
    from config import GenerationParams
    from storage.gguf import write_gguf

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or random_folder(Path(scratch) / "model")
        model, tokenizer = load_model(folder)
        made: dict[str, Candidate] = {}
        for dtype in args.dtypes:
            path = Path(scratch) / f"{dtype}.gguf"
            write_gguf(path, model, tokenizer, name="m", generation=GenerationParams(), dtype=PEER_FORMATS[dtype])
            path.with_suffix(".txt").write_text(f"{model.config.block_size} {model.config.tokens}")
            for streams in args.streams:
                made[f"ours {dtype}, {streams} at once"] = Candidate(
                    ["--work", dtype, str(folder)], streams, args.threads
                )
                made[f"llama.cpp {dtype}, {streams} at once"] = Candidate(
                    ["--work", "theirs", str(path)], streams, args.threads
                )
        try:
            rows = measure(made, args, min(FIRST, model.config.block_size // 2))
        finally:
            for candidate in made.values():
                candidate.process.kill()
                candidate.process.wait()
    ratios = compared(made)
    print(table(ratios), end="\n\n")
    report("decode_peers", rows, ratios=ratios)
    return 0


if __name__ == "__main__":
    sys.exit(main())
