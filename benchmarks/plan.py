"""How near `train.py --plan` comes to the run it announces: memory and time of both, and their ratios.

    python benchmarks/plan.py                                    # preset sample, two minutes
    python benchmarks/plan.py --preset story-small --data data/novels --minutes 5

The run gets as many steps as the plan thinks fit into the time. Use an idle machine: both measure what they find.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import Strict, parse_flags, preset_values, run_main  # noqa: E402


class Args(Strict):
    """Compare a plan with its run."""

    preset: str = "sample"
    """Preset to plan and to train."""
    data: Path | None = None
    """Folder written by prepare_data.py; none: the preset's own texts."""
    minutes: float = 2.0
    """How long the run should take."""


def seconds(text: str) -> float:
    """`45s`, `3m20s` or `5h07m` in seconds."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", text))


def size(text: str, after: str) -> float:
    """The bytes of `AFTER 1.23 GB` or `AFTER 456 MB`."""
    number, unit = re.findall(after + r" ([\d.]+) (GB|MB)", text)[0]
    return float(number) * {"GB": 1e9, "MB": 1e6}[unit]


def plan(words: list[str], steps: int) -> tuple[float, float]:
    """Bytes and seconds that `--plan` announces for so many steps."""
    command = [sys.executable, "train.py", *words, "--train.max-steps", str(steps), "--plan"]
    text = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(text, file=sys.stderr)
    found = re.findall(r"^time: (\S+) for", text, re.M)
    return size(text, "memory:"), seconds(found[0])


def train(words: list[str], steps: int, out: Path) -> tuple[float, float]:
    """Bytes and seconds that the run takes; the seconds are those its summary counts."""
    command = [sys.executable, "train.py", *words, "--train.max-steps", str(steps), "--out", str(out)]
    log = out.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    text = log.read_text(encoding="utf-8")
    if status:
        raise RuntimeError(text[-2000:])
    summary = next(line for line in text.splitlines() if " time=" in line)
    print(summary, file=sys.stderr)
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, seconds(re.findall(r" time=(\S+)", summary)[0])


def body() -> int:
    args = parse_flags(Args, None)
    words = ["--preset", args.preset, *(["--data", str(args.data)] if args.data else [])]
    if args.data is None and preset_values(args.preset).get("data", {}).get("source"):
        subprocess.run([sys.executable, "prepare_data.py", "--preset", args.preset], cwd=ROOT, check=True)
    guess = 10_000
    _, long = plan(words, guess)
    steps = max(10, round(guess * args.minutes * 60 / long))
    planned_bytes, planned_s = plan(words, steps)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        used_bytes, used_s = train(words, steps, Path(folder) / "run")
    print(f"{'':<8} {'plan':>10} {'run':>10} {'plan / run':>11}")
    print(
        f"{'memory':<8} {planned_bytes / 1e6:>7.0f} MB {used_bytes / 1e6:>7.0f} MB {planned_bytes / used_bytes:>11.2f}"
    )
    print(f"{'time':<8} {planned_s:>8.0f} s {used_s:>8.0f} s {planned_s / used_s:>11.2f}")
    return 0


def main() -> int:
    """Print both and their ratios; exit code 1 where the plan or the run fails."""
    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
