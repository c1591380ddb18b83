"""What the benchmarks share: interleaved timing, a description of the machine, a table and a JSON file.

    times = interleaved_timing({name: command_of(name) for name in names}, seconds=30)
    report("train_step", rows)

Machines are shared and noisy. So the candidates run alternately, one step or a second of steps each, until the time is up,
and the published figure is the ratio of their medians: what slows the machine for a while slows all of them. Each runs in
its own process, so that none has the settings or the idling threads of another.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "out"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def worker_loop(step: Callable[[], Any], warm_up: int = 2) -> None:
    """Loop of a candidate's process: steps for the seconds that a line on standard input says, answered with those of one.

    At least one step is taken, and the answer is their mean.
    """
    for _ in range(warm_up):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        turn, steps, spent = float(line), 0, 0.0
        begin = time.perf_counter()
        while not steps or spent < turn:
            step()
            steps += 1
            spent = time.perf_counter() - begin
        print(spent / steps, flush=True)


def interleaved_timing(
    commands: dict[str, list[str]], seconds: float, rounds: int = 5, turn: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of a step in each turn by candidate; they alternate for `seconds` in all, but at least `rounds` times.

    commands: what starts each candidate, which then calls `worker_loop`. turn: seconds of a turn, 0 for one step. Steps
    that follow each other, as in a run, are another thing than steps after a pause: threads sleep, and a scheduler
    favours who has waited.
    """
    processes: dict[str, subprocess.Popen[str]] = {}
    times: dict[str, list[float]] = {name: [] for name in commands}

    def answer(name: str) -> str:
        said = processes[name].stdout.readline()  # type: ignore[union-attr]
        if not said:
            raise SystemExit(f"{name} ended early: run `{' '.join(commands[name])}` to see why")
        return str(said)

    try:
        for name, command in commands.items():
            processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            answer(name)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(next(iter(times.values()))) < rounds:
            for name, process in processes.items():
                process.stdin.write(f"{turn}\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                times[name].append(float(answer(name)))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return times


def middle(times: Sequence[float]) -> float:
    """The median: one disturbed step does not count."""
    return statistics.median(times)


def machine() -> dict[str, Any]:
    """Processor, threads, memory, GPU, versions and commit."""
    import torch

    from devices import device_name

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; the first row's keys are the columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[at]) for line in cells)) for at, column in enumerate(columns)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def shown(value: Any) -> str:
    """A number with three significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def report(name: str, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """Print the table and write benchmarks/out/NAME.json."""
    print(table(rows), flush=True)
    OUT.mkdir(exist_ok=True)
    held = {"benchmark": name, "machine": machine(), "rows": list(rows), **more}
    (OUT / f"{name}.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
