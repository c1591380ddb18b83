"""How near `train.py --plan` comes to the run it announces: memory and time of both, and their ratios.

    python benchmarks/plan.py                                    # three shapes, two minutes each
    python benchmarks/plan.py --presets story-small --data data/novels --minutes 5

Without --data the runs learn the sample stories in the tokenizer of each preset. A run gets as many steps as the plan thinks
fit into the time. Use an idle machine: both measure what they find.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, report

from cli import parse_flags, run_main
from config import FrozenSettings, preset_values


class Args(FrozenSettings):
    """Compare plans with their runs."""

    presets: tuple[str, ...] = ("sample", "shakespeare-char", "story-nano")
    """Presets to plan and to train: small words, letters, GPT-2's vocabulary."""
    data: Path | None = None
    """Folder written by prepare_data.py; default: the sample stories."""
    minutes: float = 2.0
    """How long each run should take."""


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


def prepared(preset: str, folder: Path) -> Path:
    """The sample stories in the tokenizer of `preset`."""
    kind = preset_values(preset).get("data", {}).get("tokenizer", "gpt2")
    out = folder / f"data-{kind}"
    if not out.exists():
        words = ["prepare_data.py", "--preset", "sample", "--tokenizer", kind, "--out", str(out)]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    return out


def compared(preset: str, data: Path, minutes: float, out: Path) -> list[dict[str, Any]]:
    """Two rows, memory and time: what was planned, what the run took, and their ratio."""
    words = ["--preset", preset, "--data", str(data)]
    guess = 10_000
    _, long = plan(words, guess)
    steps = max(2, round(guess * minutes * 60 / long))
    planned_bytes, planned_s = plan(words, steps)
    used_bytes, used_s = train(words, steps, out)
    pairs = {"memory, MB": (planned_bytes / 1e6, used_bytes / 1e6), "time, s": (planned_s, used_s)}
    rows: list[dict[str, Any]] = []
    for what, (planned, used) in pairs.items():
        row = {"preset": preset, "steps": steps, "what": what, "plan": planned, "run": used}
        rows.append(row | {"plan / run": planned / used})
        print(f"{preset}, {what}: planned {planned:,.0f}, used {used:,.0f}", file=sys.stderr)
    return rows


def body() -> int:
    args = parse_flags(Args, None, examples=__doc__)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as scratch:
        for preset in args.presets:
            data = args.data or prepared(preset, Path(scratch))
            rows += compared(preset, data, args.minutes, Path(scratch) / f"run-{preset}")
    report("plan", rows)
    return 0


def main() -> int:
    """Print plans, runs and their ratios; exit code 1 where one fails."""
    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
