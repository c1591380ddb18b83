"""Tokens a second and MFU of GPT-2 small at context 2048 on one NVIDIA GPU, compiled, in bf16; beside it transformers' GPT-2.

    python benchmarks/train_gpu.py                               # about four minutes, most of them compiling
    python benchmarks/train_gpu.py --nanogpt ../nanoGPT --seconds 30
    python benchmarks/train_gpu.py --shape wide --batches 64

A step is one micro-batch of random ids forward and backward, clipping and update; dropout 0. One candidate has the GPU at a
time, in a process of its own. MFU counts 6 N + 12 L C T operations a token against the data sheet's rate. Without a GPU
nothing is measured and the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import middle, report
from train_step import SHAPES, nanogpt_step, ours, transformers_step

VICTORIAN = (
    12,
    12,
    768,
    2048,
    50_304,
    16,
)  # as presets/victorian.toml: layers, heads, channels, context, vocabulary, batch


def candidate(name: str, args: argparse.Namespace, shape: tuple[int, ...]) -> Callable[[], None]:
    """The step of `ours compiled`, `ours eager`, `transformers compiled` or `nanoGPT compiled`."""
    import torch

    device = torch.device("cuda", 0)
    who, how = name.split()
    if who == "ours":
        return ours(shape, "bf16", device, how == "compiled")
    if who == "nanoGPT":
        return nanogpt_step(args.nanogpt, shape, device, how == "compiled")
    return transformers_step(shape, "bf16", device, how == "compiled")


def measured(step: Callable[[], None], seconds: float) -> dict[str, float]:
    """The first step's seconds (it compiles), then the median of the steps that fit into `seconds`, at least five."""
    import torch

    def timed() -> float:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    first = timed()
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(spent) < 5:
        spent.append(timed())
    found = {"seconds": middle(spent), "first_s": first, "steps": len(spent)}
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())  # where a compiled step fell apart
    return found | {"memory_gb": torch.cuda.max_memory_allocated() / 1e9, "breaks": breaks}


def run_in_process(name: str, batch: int, args: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """What `measured` found for one candidate in a process of its own, or {"failed": why}."""
    command = [sys.executable, __file__, *words, "--play", name, "--batches", str(batch)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {args.limit:g} s"}
    said = done.stderr.strip().splitlines()
    print("\n".join(said[-20:]), file=sys.stderr)
    if done.returncode:
        return {"failed": said[-1][:120] if said else f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["victorian", *SHAPES], default="victorian")
    parser.add_argument("--batches", type=int, nargs="+", help="micro-batches to try; default: the shape's own")
    parser.add_argument("--seconds", type=float, default=20.0, help="of steps for each candidate, after compiling")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which a candidate is stopped")
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--eager", action="store_true", help="also without torch.compile")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    args = parser.parse_args(words)

    import torch

    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing was measured", file=sys.stderr)
        return 0
    from config import ModelConfig
    from devices import peak_flops
    from model import GPT

    own = (SHAPES | {"victorian": VICTORIAN})[args.shape]
    if args.play:
        torch.manual_seed(0)
        print(json.dumps(measured(candidate(args.play, args, (*own[:-1], args.batches[0])), args.seconds)))
        return 0
    names = ["ours compiled", *(["ours eager"] if args.eager else [])]
    if not args.without_peers:
        names += [*(["nanoGPT compiled"] if args.nanogpt else []), "transformers compiled"]
    n_layer, n_head, n_embd, block, vocab, _ = own
    config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block, vocab_size=vocab)
    with torch.device("meta"):
        flops = GPT(config).flops_per_token()
    peak = peak_flops(torch.cuda.get_device_name(), "bf16")
    rows: list[dict[str, Any]] = []
    for batch in args.batches or [own[-1]]:
        for name in names:
            found = run_in_process(name, batch, args, words)
            speed = batch * block / found["seconds"] if "seconds" in found else None
            rows.append(
                {
                    "shape": f"{n_layer}/{n_embd}/ctx {block}/V {vocab}/batch {batch}",
                    "what": name,
                    "ms a step": found["seconds"] * 1000 if speed else None,
                    "tokens/s": speed,
                    "MFU": speed * flops / peak if speed and peak else None,
                    "GPU memory, GB": found.get("memory_gb"),
                    "first step, s": found.get("first_s"),
                    "graph breaks": found.get("breaks"),
                    "steps": found.get("steps", found.get("failed")),
                }
            )
            report("train_gpu", rows)  # after each, so that what is known stands if the next one hangs
    return 0


if __name__ == "__main__":
    sys.exit(main())
