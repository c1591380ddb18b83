"""What share of the training time checkpoints take: a real run with the timer at its default of ten minutes.

    python benchmarks/checkpoint.py                              # GPT-2 small (124M) for 21 minutes: two on the timer
    python benchmarks/checkpoint.py --minutes 6 --every 2

The run learns the sample stories in GPT-2's ids with short windows: what is written does not depend on them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import parse_flags, run_main  # noqa: E402
from config import FrozenSettings  # noqa: E402


class Args(FrozenSettings):
    """Measure the cost of checkpoints."""

    preset: str = "shakespeare-124m"
    """Preset whose model is trained."""
    minutes: float = 21.0
    """Length of the run; the timer saves every ten minutes, the end once more."""
    every: float = 10.0
    """Minutes between checkpoints, if not the default."""


def body() -> int:
    args = parse_flags(Args, None, examples=__doc__)
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        prepare = ["prepare_data.py", "--preset", "sample", "--tokenizer", "gpt2", "--out", str(data)]
        subprocess.run([sys.executable, *prepare], cwd=ROOT, check=True)
        flags = ["--preset", args.preset, "--data", str(data), "--out", str(out), "--model.block-size", "64"]
        flags += ["--train.batch-size", "1", "--train.tokens-per-step", "0", "--train.max-steps", "0"]
        flags += ["--train.schedule", "constant", "--train.max-minutes", str(args.minutes), "--train.target-loss", "0"]
        flags += ["--train.eval-interval", "0", "--train.sample-interval", "0", "--train.epochs", "0"]
        flags += ["--train.checkpoint-minutes", str(args.every)]
        done = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        files = [path for path in (out / "last").iterdir() if path.is_file()]
        written = sum(path.stat().st_size for path in files)
    summary = next(line for line in done.stderr.splitlines() if " checkpoint_s=" in line)
    print(summary, file=sys.stderr)
    spent = float(re.findall(r"checkpoint_s=([\d.]+)", summary)[0])
    folders = int(re.findall(r"folders_written=(\d+)", summary)[0])
    # one best/ of the weights alone, a third of the bytes and not hashed, closes the run
    lasts = folders - 1
    each = spent / (lasts + 1 / 3)
    print(f"last/ holds {written / 1e9:.2f} GB; {lasts} written, {each:.1f} s each")
    print(f"{each / (args.every * 60 + each):.2%} of the training time at one every {args.every:g} minutes")
    return 0


def main() -> int:
    """Print the seconds a checkpoint takes and their share; exit code 1 where the run fails."""
    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
