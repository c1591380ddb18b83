"""Training beside other programs: the time of a step while busy loops take their share of the cores.

    python benchmarks/busy.py --beside 0 2
    python benchmarks/busy.py --shapes 2/64 4/192 --beside 0 1 2 4 --nanogpt ../nanoGPT --seconds 40

The candidates are those of benchmarks/train_step.py, and ours once more with its steps not split over threads. They take
turns of a second, in which steps follow each other as in a run. Each busy loop is a process that counts, and ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import interleaved_timing, middle, report
from train_step import SHAPES

LOOP = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"
LONGEST = 600.0  # seconds after which a busy loop ends, whatever has become of the benchmark


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that each keep one core busy while inside."""
    loops = [subprocess.Popen([sys.executable, "-c", LOOP, str(LONGEST)]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def names(args: argparse.Namespace) -> list[str]:
    """Names of the candidates; see train_step.candidate."""
    found = ["ours fp32", "ours fp32 unsplit"]
    found += ["nanoGPT"] if args.nanogpt else []
    return found + ([] if args.without_transformers else ["transformers fp32"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["2/64", "2/128", "4/192", "6/384"])
    parser.add_argument("--beside", nargs="+", type=int, default=[0, 1, 2, 4], help="busy processes")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each shape and number of busy processes")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of steps in a turn; 0: one step")
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args(argv)
    step = [sys.executable, str(Path(__file__).with_name("train_step.py")), "--device", "cpu"]
    step += ["--nanogpt", str(args.nanogpt)] if args.nanogpt else []
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        idle: dict[str, float] = {}
        for count in args.beside:
            commands = {name: [*step, "--shapes", shape, "--play", name] for name in names(args)}
            with busy(count):
                times = interleaved_timing(commands, args.seconds, turn=args.turn)
            took = {name: middle(spent) for name, spent in times.items()}
            print(
                f"{shape} beside {count}:",
                {name: round(1000 * seconds) for name, seconds in took.items()},
                file=sys.stderr,
            )
            idle = idle or took
            rows += [
                {
                    "shape": shape,
                    "beside": count,
                    "what": name,
                    "ms a step": 1000 * seconds,
                    "of its own idle speed": idle[name] / seconds if args.beside[0] == 0 else None,
                    "ours is faster by": seconds / took["ours fp32"],
                    "turns": len(times[name]),
                }
                for name, seconds in took.items()
            ]
    report("busy", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
