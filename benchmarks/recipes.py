"""Validation loss against training time: the recipe of `victorian-fast` beside that of `victorian`, on one shape and text.

    python benchmarks/recipes.py --data data/novels --minutes 5
    python benchmarks/recipes.py --data data/novels --minutes 3 --n-embd 192 --batch 1024 --also-tuned

Both start from the same weights and read the same windows in the same order. They alternate, some steps each,
in separate processes, until each has trained for --minutes; evaluation is not counted. A recipe's schedule is laid
over the steps that its own pace allows. Each is run to the end and, for the faster one, also to half of the time: does
it have by then the loss that the other ends with?
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import report

# what each preset says of its optimizer; warm-ups are a share of the steps, as 100 of 5,500 and 200 of 11,000
RECIPES: dict[str, dict[str, Any]] = {
    "victorian": {"optimizer": "adamw", "lr": 1e-4, "min_lr": 1e-5, "schedule": "cosine", "weight_decay": 0.01},
    "victorian, rate tuned": {
        "optimizer": "adamw",
        "lr": 3e-3,
        "min_lr": 3e-4,
        "schedule": "cosine",
        "weight_decay": 0.01,
    },
    "victorian-fast": {
        "optimizer": "muon",
        "lr": 2e-3,
        "muon_lr": 0.02,
        "min_lr": 0.0,
        "schedule": "wsd",
        "decay_fraction": 0.4,
        "weight_decay": 0.1,
    },
}


def worker_loop(args: argparse.Namespace) -> None:
    """Loop of one recipe's process. Commands on standard input: `plan STEPS` in all, `steps N` to take, `look`.

    Each is answered with the steps done, the seconds they took, and after `look` the validation loss (else 0).
    """
    import torch

    from config import ModelConfig, TrainConfig
    from dataset import TokenData, WindowSampler, training_batches
    from devices import DistributedContext, keep_memory
    from model import GPT
    from training.optimizer import Optimizer
    from training.schedule import lr_scale
    from training.step import step_seed, take_step, validate

    keep_memory()
    data = TokenData.open(args.data)
    size = data.manifest.tokenizer.vocab_size
    distributed = DistributedContext(0, 1, "none", torch.device("cpu"))
    torch.manual_seed(1337)
    heads = args.n_embd // (64 if args.n_embd % 64 == 0 else 32)
    shape = ModelConfig(n_layer=args.n_layer, n_head=heads, n_embd=args.n_embd, block_size=args.block, vocab_size=size)
    model = GPT(shape)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = args.batch // args.block
    source = training_batches(
        data.train, WindowSampler(len(data.train), args.block, 1337), batch_size=batch, grad_accum_steps=1
    )
    recipe = TrainConfig(max_steps=1, warmup_steps=1, **RECIPES[args.play])
    optimizer = Optimizer(model, recipe)
    total, step, spent = 0, 0, 0.0
    print("ready", flush=True)
    for order in sys.stdin:
        word, _, value = order.strip().partition(" ")
        if word == "plan":  # the pace is known: so many steps in all
            total = int(value)
            recipe = recipe.model_copy(update={"max_steps": total, "warmup_steps": max(1, total // 50)})
        elif word == "steps":
            begin = time.perf_counter()
            for _ in range(int(value)):
                torch.manual_seed(step_seed(1337, step, 0))
                optimizer.set_lr(lr_scale(step, total, recipe))
                take_step(model, optimizer, scaler, source, 1, recipe, "fp32", distributed)
                step += 1
            spent += time.perf_counter() - begin
        loss = (
            validate(model, data.val, args.block, batch, "fp32", distributed, args.eval_tokens)
            if word == "look"
            else 0.0
        )
        print(step, spent, loss, flush=True)


class RecipeProcess:
    """A process that trains by one recipe."""

    def __init__(self, name: str, words: list[str], share: float, minutes: float):
        self.name, self.share, self.seconds = name, share, minutes * 60 * share
        command = [sys.executable, __file__, *words, "--play", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()
        self.total = self.step = 0
        self.spent = 0.0

    def _line(self) -> str:
        said = str(self.process.stdout.readline())  # type: ignore[union-attr]
        if not said:
            raise SystemExit(f"{self.name} ended early")
        return said

    def ask(self, order: str) -> float:
        """Send an order; returns the loss it answers with."""
        self.process.stdin.write(order + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        step, spent, loss = self._line().split()
        self.step, self.spent = int(step), float(spent)
        return float(loss)


def pace(name: str, words: list[str]) -> float:
    """Seconds a step of this recipe takes, in a process that is then thrown away."""
    process = RecipeProcess(name, words, 1.0, 1.0)
    process.ask("plan 1000")
    process.ask("steps 3")
    before = process.spent
    process.ask("steps 10")
    process.process.kill()
    return (process.spent - before) / 10


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare_data.py")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training for each recipe")
    parser.add_argument("--n-layer", type=int, default=3)
    parser.add_argument("--n-embd", type=int, default=160)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2048, help="tokens a step")
    parser.add_argument("--eval-tokens", type=int, default=51_200)
    parser.add_argument("--also-tuned", action="store_true", help="also AdamW at a rate tuned for this small shape")
    parser.add_argument("--play", choices=RECIPES, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.play:
        worker_loop(args)
        return 0
    names = [name for name in RECIPES if args.also_tuned or "tuned" not in name]
    processes = [RecipeProcess(name, words, 1.0, args.minutes) for name in names]
    processes.append(RecipeProcess("victorian-fast", words, 0.5, args.minutes))
    paces = {name: pace(name, words) for name in names}
    for process in processes:
        process.total = max(10, int(process.seconds / paces[process.name]))
        process.ask(f"plan {process.total}")
    for _ in range(10):  # alternately, so that a slow minute affects all of them
        for process in processes:
            process.ask(f"steps {-(-process.total // 10) if process.step + process.total // 10 < process.total else 0}")
    rows = []
    for process in processes:
        if process.step < process.total:
            process.ask(f"steps {process.total - process.step}")
        loss = process.ask("look")
        process.process.kill()
        rows.append(
            {
                "recipe": process.name,
                "share of the time": process.share,
                "seconds of training": process.spent,
                "steps": process.step,
                "tokens": process.step * args.batch,
                "validation loss": loss,
            }
        )
    report("recipes", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
