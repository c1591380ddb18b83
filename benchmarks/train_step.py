"""Tokens a second of a training step, beside transformers' GPT-2 and a local checkout of nanoGPT.

    python benchmarks/train_step.py --seconds 60
    python benchmarks/train_step.py --shapes chars --nanogpt ../nanoGPT
    python benchmarks/train_step.py --shapes wide --device cuda --compile

A step is forward, backward, clipping and update of one random batch; dropout 0. Every candidate has the same shape, AdamW
with its project's own settings, and the candidates take turns of a second. nanoGPT computes in float32 on CPUs, as its train.py does.
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

from common import interleaved_timing, middle, report, worker_loop

# layers, heads, channels, context, vocabulary, batch
SHAPES = {
    "wide": (6, 6, 384, 128, 50_304, 16),
    "middle": (4, 4, 256, 256, 4_096, 16),
    "chars": (4, 4, 128, 64, 65, 12),
    "2/64": (2, 2, 64, 64, 4_096, 32),
    "2/128": (2, 2, 128, 64, 8_192, 32),
    "4/192": (4, 4, 192, 128, 4_096, 8),  # the sample preset
    "6/384": (6, 6, 384, 128, 8_192, 16),
    "12/768": (12, 12, 768, 256, 50_304, 4),
}
STANDARD = ["wide", "middle", "chars"]


def ours(shape: tuple[int, ...], precision: str, device: Any, compile: bool, parts: int = 0) -> Callable[[], None]:
    """A step as train.py takes it, in `parts` (0: as it would choose)."""
    import torch

    from config import Config, ModelConfig, TrainConfig
    from devices import DistributedContext
    from model import GPT
    from training.model_setup import wrapped
    from training.optimizer import Optimizer
    from training.split import step_threads, with_parts
    from training.step import take_step

    n_layer, n_head, n_embd, block, vocab, batch = shape
    config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block, vocab_size=vocab, dropout=0.0)
    train = TrainConfig(max_steps=1000, compile="on" if compile else "off", parts=parts)
    distributed = DistributedContext(0, 1, "none", device)
    model = GPT(config).to(device)
    train, _ = with_parts(train, config, batch, distributed)
    module = wrapped(model, Config(model=config, train=train), distributed, device)
    threads = contextlib.ExitStack()
    threads.enter_context(step_threads(module))
    optimizer = Optimizer(model, train)
    optimizer.set_lr(1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    x, y = batch_of(vocab, batch, block, device)

    def step(threads: contextlib.ExitStack = threads) -> None:  # which end with the last reference to it
        take_step(module, optimizer, scaler, iter([(x, y)]), 1, train, precision, distributed)

    return step


def batch_of(vocab: int, batch: int, block: int, device: Any) -> tuple[Any, Any]:
    """Random ids and their successors, each [batch, block]."""
    import torch

    ids = torch.randint(0, vocab, (batch, block + 1), device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def transformers_step(shape: tuple[int, ...], precision: str, device: Any, compile: bool = False) -> Callable[[], None]:
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
    module: Any = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, _ = batch_of(vocab, batch, block, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
            loss = module(input_ids=x, labels=x).loss
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


def names(args: argparse.Namespace, device: Any) -> list[str]:
    """Names of the candidates to time."""
    from devices import native_bf16

    precisions = ["fp32", "bf16"] if args.bf16 or native_bf16(device) else ["fp32"]
    found = [f"ours {precision}" for precision in precisions]
    found += [f"ours {precisions[-1]} compiled"] if args.compile else []
    if args.nanogpt:
        found += ["nanoGPT", *(["nanoGPT compiled"] if args.compile else [])]
    return found + ([] if args.without_transformers else [f"transformers {precision}" for precision in precisions])


def candidate(name: str, args: argparse.Namespace, shape: tuple[int, ...], device: Any) -> Callable[[], None]:
    """The step of one of `names`; ours with the memory settings that train.py makes."""
    who, *how = name.split()
    if who == "ours":
        from devices import keep_memory

        if device.type == "cpu":
            keep_memory()
        return ours(shape, how[0], device, "compiled" in how, parts=1 if "unsplit" in how else 0)
    if who == "nanoGPT":
        return nanogpt_step(args.nanogpt, shape, device, "compiled" in how)
    return transformers_step(shape, how[0], device)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=STANDARD)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each shape")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of steps in a turn; 0: one step")
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--bf16", action="store_true", help="also where the processor has no bf16 instructions")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if (args.play or "").startswith("ours"):  # before torch is loaded, as in train.py; not for the others
        importlib.import_module("config")

    import torch

    from config import ModelConfig
    from devices import pick_device
    from model import GPT

    device = pick_device(args.device)
    torch.manual_seed(0)
    if args.play:
        worker_loop(candidate(args.play, args, SHAPES[args.shapes[0]], device))
        return 0
    rows = []
    for name in args.shapes:
        n_layer, n_head, n_embd, block, vocab, batch = SHAPES[name]
        script = [sys.executable, __file__, *words, "--shapes", name, "--play"]
        times = interleaved_timing({who: [*script, who] for who in names(args, device)}, args.seconds, turn=args.turn)
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
                    "turns": len(spent),
                }
            )
    report("train_step", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
