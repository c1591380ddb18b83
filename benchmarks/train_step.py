"""Tokens a second of a training step, beside transformers' GPT-2 and a local checkout of nanoGPT.

    python benchmarks/train_step.py --seconds 60
    python benchmarks/train_step.py --shapes chars --nanogpt ../nanoGPT
    python benchmarks/train_step.py --shapes wide --device cuda --compile

A step is forward, backward, clipping and update of one random batch; dropout 0. Every candidate has the same shape, AdamW
with its project's own settings, and takes turns with the others. nanoGPT computes in float32 on CPUs, as its train.py does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import interleaved, middle, report

# layers, heads, channels, context, vocabulary, batch
SHAPES = {
    "wide": (6, 6, 384, 128, 50_304, 16),
    "middle": (4, 4, 256, 256, 4_096, 16),
    "chars": (4, 4, 128, 64, 65, 12),
}


def ours(shape: tuple[int, ...], precision: str, device: Any, compile: str) -> Callable[[], None]:
    """A step as train.py takes it."""
    import torch

    from config import ModelConfig, TrainConfig
    from devices import Team
    from model import GPT
    from optim import Optimizer
    from train import take_step

    n_layer, n_head, n_embd, block, vocab, batch = shape
    config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block, vocab_size=vocab, dropout=0.0)
    train = TrainConfig(max_steps=1000, compile="on" if compile else "off")
    model = GPT(config).to(device)
    module: Any = torch.compile(model) if compile else model
    optimizer = Optimizer(model, train)
    optimizer.set_lr(1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    team = Team(0, 1, "none", device)
    x, y = batch_of(vocab, batch, block, device)

    def step() -> None:
        take_step(module, optimizer, scaler, iter([(x, y)]), 1, train, precision, team)

    return step


def batch_of(vocab: int, batch: int, block: int, device: Any) -> tuple[Any, Any]:
    """Random ids and their successors, each [batch, block]."""
    import torch

    ids = torch.randint(0, vocab, (batch, block + 1), device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def transformers_step(shape: tuple[int, ...], precision: str, device: Any) -> Callable[[], None]:
    """transformers' GPT2LMHeadModel with torch's AdamW, as its Trainer runs it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_head, n_embd, block, vocab, batch = shape
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=block,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, _ = batch_of(vocab, batch, block, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def nanogpt_step(checkout: Path, shape: tuple[int, ...], device: Any, compile: bool) -> Callable[[], None]:
    """nanoGPT's model and optimizer out of a local checkout, in the order of its train.py."""
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"--nanogpt {checkout}: no model.py there: give the folder of a nanoGPT checkout")
    theirs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = theirs
    spec.loader.exec_module(theirs)
    n_layer, n_head, n_embd, block, vocab, batch = shape
    with contextlib.redirect_stdout(sys.stderr):
        settings = theirs.GPTConfig(block, vocab, n_layer, n_head, n_embd, 0.0, False)
        model = theirs.GPT(settings).to(device).train()
        optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.95), device.type)
    module = torch.compile(model) if compile else model
    x, y = batch_of(vocab, batch, block, device)
    amp = device.type == "cuda"

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16) if amp else contextlib.nullcontext():
            _, loss = module(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def candidates(args: argparse.Namespace, shape: tuple[int, ...], device: Any) -> dict[str, Callable[[], None]]:
    """Everything that takes turns, by name."""
    from devices import native_bf16

    found = {"ours fp32": ours(shape, "fp32", device, "")}
    bf16 = args.bf16 or native_bf16(device)
    if bf16:
        found["ours bf16"] = ours(shape, "bf16", device, "")
    if args.compile:
        found["ours compiled"] = ours(shape, "bf16" if bf16 else "fp32", device, "on")
    if args.nanogpt:
        found["nanoGPT"] = nanogpt_step(args.nanogpt, shape, device, False)
        if args.compile:
            found["nanoGPT compiled"] = nanogpt_step(args.nanogpt, shape, device, True)
    if not args.without_transformers:
        found["transformers fp32"] = transformers_step(shape, "fp32", device)
        if bf16:
            found["transformers bf16"] = transformers_step(shape, "bf16", device)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=40.0, help="for each shape")
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--bf16", action="store_true", help="also where the processor has no bf16 instructions")
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args(argv)

    import torch

    from config import ModelConfig
    from devices import pick_device
    from model import GPT

    device = pick_device(args.device)
    rows = []
    for name in args.shapes:
        n_layer, n_head, n_embd, block, vocab, batch = shape = SHAPES[name]
        torch.manual_seed(0)
        times = interleaved(candidates(args, shape, device), args.seconds)
        config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block, vocab_size=vocab)
        flops = GPT(config).flops_per_token() * batch * block
        best = min(middle(spent) for who, spent in times.items() if who.startswith("ours"))
        for who, spent in times.items():
            took = middle(spent)
            rows.append(
                {
                    "shape": f"{n_layer}/{n_embd}/ctx {block}/V {vocab}/batch {batch}",
                    "what": who,
                    "ms a step": took * 1000,
                    "tokens/s": batch * block / took,
                    "GFLOP/s": flops / took / 1e9,
                    "our best is faster by": took / best if not math.isclose(took, best) else None,
                    "steps": len(spent),
                }
            )
    report("train_step", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
