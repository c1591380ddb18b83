"""How long one waits: `--help` of the scripts, and the first word of a model from the shell.

python benchmarks/startup.py --model runs/sample/best
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, middle, report


def until_first_output(words: list[str]) -> float:
    """Seconds from the start of a command to its first byte of standard output."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        first = process.stdout.read(1) if process.stdout else b""
        spent = time.perf_counter() - begin
        process.kill()
    if not first:
        raise SystemExit(f"{' '.join(words)}: printed nothing")
    return spent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; default: the newest, as generate.py finds it")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    model = ["--model", str(args.model.resolve())] if args.model else []
    commands = {
        "python train.py --help": ["train.py", "--help"],
        "python generate.py --help": ["generate.py", "--help"],
        "python prepare_data.py --help": ["prepare_data.py", "--help"],
        "first word": ["generate.py", "--prompt", "The old house stood", "--max-tokens", "20", "--seed", "1", *model],
    }
    times = {name: [until_first_output(words) for _ in range(args.rounds)] for name, words in commands.items()}
    report("startup", [{"what": name, "seconds": middle(spent)} for name, spent in times.items()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
