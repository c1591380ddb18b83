"""The dial's run with counted n-grams beside the same without, in equal processor time of one thread.

    python benchmarks/counting.py --plain data/novels-4096 --counted data/novels-8192 --seconds 60 --seeds 1 2 3

Both get so many seconds of processor time for everything from the first count to the last step; reading texts and
evaluation are left out. Each takes the shape, rates and schedule that `train.py --minutes` would choose at --rate, each
with its own vocabulary of the same texts. The runs alternate, in processes of their own. Bits per byte over
--eval-tokens tokens spread over the validation split, in windows of the model's context.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import report


def trained(folder: Path, counted: bool, seconds: float, seed: int, rate: float, eval_tokens: int) -> dict[str, Any]:
    """Train on the prepared texts in `folder` for `seconds` of this process; a row of the table."""
    import torch

    from config import TrainConfig
    from dataset import TokenData, WindowSampler, training_batches
    from devices import DistributedContext, keep_memory, pick_precision
    from model import GPT
    from training.autotune import Budget, choose_model, choose_training
    from training.counting import Counting
    from training.ngram_start import counted_start
    from training.ngram_teacher import Teacher, teacher_weight
    from training.optimizer import Optimizer
    from training.schedule import lr_scale, time_limited_end_step
    from training.step import step_seed, take_step, validate

    keep_memory()
    torch.set_num_threads(1)
    data, cpu = TokenData.open(folder), torch.device("cpu")
    splits, precision = data.manifest.splits, pick_precision("auto", cpu)[0]
    budget = Budget(rate * seconds, splits.train.bytes)
    shape = choose_model(budget, data.manifest.tokenizer.vocab_size, counted)
    values, dropout = choose_training(shape, budget, seconds / 60, fits=64)
    shape, train = shape.model_copy(update={"dropout": dropout}), TrainConfig(**values)

    began = time.process_time()
    torch.manual_seed(seed)
    model = GPT(shape)
    teacher = None
    if counted:
        counts = Counting.of(data).model
        counted_start(model, counts, seed, train.sampled_softmax)
        teacher = Teacher(counts, cpu, sampled=train.sampled_softmax)
    before = time.process_time() - began
    train = train.model_copy(update={"max_minutes": (seconds - before) / 60})
    optimizer, alone = Optimizer(model, train), DistributedContext(0, 1, "none", cpu)
    scaler, accumulate = torch.amp.GradScaler("cpu", enabled=False), train.tokens_per_step // shape.block_size
    accumulate //= train.batch_size
    source = training_batches(
        data.train,
        WindowSampler(len(data.train), shape.block_size, seed),
        batch_size=train.batch_size,
        grad_accum_steps=accumulate,
    )
    spent, step, total = 0.0, 0, 0
    while not total or step < total:
        total = total or time_limited_end_step(step, spent, 0.0, train)
        began = time.process_time()
        torch.manual_seed(step_seed(seed, step, 0))
        optimizer.set_lr(lr_scale(step, total, train))
        model.train()
        weight = teacher_weight(step * train.tokens_per_step, train.ngram_teacher)
        soft = None
        if teacher and (weight or teacher.sampled):
            soft = functools.partial(teacher.targets, weight=weight, seed=step_seed(seed, step, 0))
        take_step(model, optimizer, scaler, source, accumulate, train, precision, alone, soft)
        spent, step = spent + time.process_time() - began, step + 1
    nats = validate(model, data.val, shape.block_size, 32, precision, alone, eval_tokens)
    return {
        "counted": counted,
        "seed": seed,
        "shape": f"{shape.n_layer} x {shape.n_embd}, {shape.vocab_size} ids",
        "before the first step (s)": round(before, 1),
        "processor time (s)": round(before + spent, 1),
        "steps": step,
        "ms a step": round(1000 * spent / step),
        "bits per byte": round(nats / math.log(2) * splits.val.tokens / splits.val.bytes, 4),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=Path, required=True, help="prepared texts, for the run without counts")
    parser.add_argument("--counted", type=Path, required=True, help="the same texts, for the run with counts")
    parser.add_argument("--seconds", type=float, default=60.0, help="of processor time for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rate", type=float, default=6e10, help="FLOP/s by which the dial's rules choose")
    parser.add_argument("--eval-tokens", type=int, default=130_000)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        counted = args.run[0] == "counted"
        folder = args.counted if counted else args.plain
        print(json.dumps(trained(folder, counted, args.seconds, int(args.run[1]), args.rate, args.eval_tokens)))
        return 0
    rows = []
    for seed in args.seeds:
        for kind in ("plain", "counted"):
            words = ["--plain", args.plain, "--counted", args.counted, "--seconds", args.seconds, "--rate", args.rate]
            words += ["--eval-tokens", args.eval_tokens, "--run", kind, seed]
            command = [sys.executable, __file__, *map(str, words)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    report("counting", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
