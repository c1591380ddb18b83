"""Wall-clock to a full-pass validation loss of 1.88 on Tiny Shakespeare's characters: the published CPU recipe and ours.

    python benchmarks/shakespeare.py --text tinyshakespeare.txt

The published recipe is nanoGPT's for a laptop (README: 4 layers, 4 heads, 128 wide, context 64, batch 12, 2,000 steps,
AdamW at 1e-3 with cosine decay), trained by this repository's train.py, whose step is no slower. Ours changes what it likes.
Each is a whole command, started one after the other, --rounds times; the loss is over all 111,539 predicted characters.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, middle, report

WANTED = 1.88
COMMON = "--preset shakespeare-char --train.eval-tokens 0 --train.sample-interval 0 --train.no-tensorboard --train.eval-interval 0"
RECIPES = {
    "published": (
        "--model.n-layer 4 --model.n-head 4 --model.n-embd 128 --model.block-size 64 --model.dropout 0 "
        "--train.batch-size 12 --train.tokens-per-step 0 --train.max-steps 2000 --train.optimizer adamw --train.lr 1e-3 "
        "--train.min-lr 1e-4 --train.schedule cosine --train.warmup-steps 100 --train.beta2 0.99 --train.weight-decay 0.1"
    ),
    "ours": (
        "--model.n-layer 3 --model.n-head 3 --model.n-embd 96 --model.block-size 64 --model.dropout 0 "
        "--train.batch-size 16 --train.tokens-per-step 0 --train.max-steps {steps} --train.optimizer muon --train.muon-lr 0.03 "
        "--train.lr 1e-2 --train.min-lr 0 --train.schedule wsd --train.decay-fraction 0.8 --train.warmup-steps 20 "
        "--train.weight-decay 0.1"
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the Tiny Shakespeare file")
    parser.add_argument("--steps", type=int, default=440, help="of our recipe")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args(argv)

    from training.metrics import METRICS, read_jsonl

    seconds: dict[str, list[float]] = {name: [] for name in RECIPES}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare = ["prepare_data.py", "--input", str(args.text), "--tokenizer", "char", "--out", str(data)]
        subprocess.run([sys.executable, *prepare], cwd=ROOT, check=True)
        for round_number in range(args.rounds):
            for name, flags in RECIPES.items():
                run = Path(folder) / f"{name}-{round_number}"
                words = [
                    *COMMON.split(),
                    *flags.format(steps=args.steps).split(),
                    "--data",
                    str(data),
                    "--out",
                    str(run),
                ]
                begin = time.perf_counter()
                subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - begin)
                losses[name] = [row["val_loss"] for row in read_jsonl(run / METRICS) if "val_loss" in row][-1]
    published = middle(seconds["published"])
    rows = [
        {
            "recipe": name,
            "seconds, start and evaluation included": middle(seconds[name]),
            "share of the published": middle(seconds[name]) / published,
            "validation loss": losses[name],
            f"at most {WANTED}": "yes" if losses[name] <= WANTED else "no",
        }
        for name in RECIPES
    ]
    report("shakespeare", rows, text=args.text.name, steps=args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
