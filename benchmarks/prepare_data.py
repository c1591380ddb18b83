"""How fast prepare_data.py turns books into tokens, against tiktoken alone, and how much memory it takes.

    python benchmarks/prepare_data.py                        # 200 MB
    python benchmarks/prepare_data.py --gigabytes 5          # minutes; needs 5 GB + 2.5 GB of disk
    python benchmarks/prepare_data.py --kind parquet --workers 4

The books are made of the sample stories' paragraphs in random order, hard-wrapped, with Project Gutenberg's licence,
italics and illustrations. Every few seconds the preparation is halted and tiktoken measured, on one core and on all at
once, so that both see the same machine; the halts do not count. Writes a table, and JSON to benchmarks/out/.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(1, str(ROOT))

from pydantic import Field  # noqa: E402

from cli import parse_flags, run_main  # noqa: E402
from config import FrozenSettings  # noqa: E402

OUT = ROOT / "benchmarks" / "out"
HEADER = "The Project Gutenberg eBook of Number {0}\n\n*** START OF THE PROJECT GUTENBERG EBOOK NUMBER {0} ***\n\n\n"
FOOTER = "\n\n*** END OF THE PROJECT GUTENBERG EBOOK NUMBER {0} ***\n\nLicence.\n"
CHUNK = 1 << 18  # bytes of text that tiktoken alone is given at a time


class Flags(FrozenSettings):
    """Measure prepare_data.py."""

    gigabytes: float = Field(0.2, gt=0.0, le=1000.0)
    """Size of the corpus."""
    kind: Literal["txt", "jsonl", "parquet"] = "txt"
    """How it is stored: a file a book, or 200 books a file."""
    book_bytes: int = Field(400_000, ge=1000)
    """Bytes of a book."""
    workers: int = Field(0, ge=0, le=1024)
    """Processes of prepare_data.py; default: one per core."""
    every: float = Field(10.0, gt=0.0)
    """Seconds of preparation between two halts; a short run is halted at least three times."""
    halt: float = Field(2.0, gt=0.0)
    """Seconds of each measurement of tiktoken."""
    folder: Path = Path(tempfile.gettempdir())
    """Where the corpus is put; it is deleted at the end."""
    seed: int = 1
    """Seed of the books."""


def paragraphs() -> list[str]:
    """The sample stories' paragraphs."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "data" / "sample").glob("*.txt"))]
    return [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text) if len(part) > 80]


def books(flags: Flags) -> list[bytes]:
    """One hundred books; the corpus repeats them, each with its own number."""
    draw = random.Random(flags.seed)
    wrapped = [textwrap.fill(text, 72, break_on_hyphens=False) for text in paragraphs()]
    made = []
    for _ in range(100):
        parts, size = [], 0
        while size < flags.book_bytes:
            part = draw.choice(wrapped)
            if draw.random() < 0.05:
                first, _, rest = part.partition(" ")
                part = f"_{first}_ {rest}"
            parts.append("[Illustration: A house]" if draw.random() < 0.005 else part)
            size += len(parts[-1]) + 2
        made.append("\n\n".join(parts).encode())
    return made


def make_corpus(folder: Path, flags: Flags) -> int:
    """Write the books into `folder`; their bytes."""
    stock = books(flags)
    count = max(2, round(flags.gigabytes * 1e9 / flags.book_bytes))
    written, rows = 0, []
    for number in range(count):
        text = HEADER.format(number).encode() + stock[number % len(stock)] + FOOTER.format(number).encode()
        written += len(text)
        if flags.kind == "txt":
            place = folder / f"{number // 1000:03d}"
            place.mkdir(exist_ok=True)
            (place / f"{number:06d}.txt").write_bytes(text)
            continue
        rows.append(text.decode())
        if len(rows) == 200 or number == count - 1:
            write_rows(folder / f"{number:06d}.{flags.kind}", rows)
            rows = []
    return written


def write_rows(path: Path, rows: list[str]) -> None:
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": row}) + "\n" for row in rows)
        return
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=100)


def tiktoken_alone(seconds: float, text: str) -> float:
    """Bytes a second that tiktoken encodes in this process."""
    from tokenizer import gpt2_tokenizer

    encoding = gpt2_tokenizer()._encoding  # type: ignore[attr-defined]
    chunks = [text[at : at + CHUNK] for at in range(0, len(text), CHUNK)]
    sizes = [len(chunk.encode()) for chunk in chunks]
    for chunk in chunks[:2]:
        encoding.encode_to_numpy(chunk, disallowed_special=())
    begun, done, number = time.perf_counter(), 0, 0
    while time.perf_counter() - begun < seconds:
        encoding.encode_to_numpy(chunks[number % len(chunks)], disallowed_special=())
        done += sizes[number % len(chunks)]
        number += 1
    return done / (time.perf_counter() - begun)


def memory(process: Any) -> dict[str, int]:
    """Bytes held: by the largest process, and by all together, shared pages counted once."""
    import psutil

    held = []
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            full = one.memory_full_info()
            held.append((full.rss, getattr(full, "pss", full.rss)))
    return {"largest": max((rss for rss, _ in held), default=0), "all": sum(pss for _, pss in held)}


def measure(corpus: Path, out: Path, flags: Flags) -> dict[str, Any]:
    """Prepare `corpus`, halted now and then for tiktoken alone. Seconds, bytes, bytes a second."""
    import psutil

    from corpus.workers import cores

    sample = "\n\n".join(paragraphs() * 2)
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--input", str(corpus), "--out", str(out)]
    command += ["--tokenizer", "gpt2", "--workers", str(flags.workers)]
    one: list[float] = []
    together: list[float] = []
    with multiprocessing.get_context("spawn").Pool(cores()) as pool:
        ask = [(flags.halt, sample)] * cores()
        pool.starmap(tiktoken_alone, [(0.1, sample)] * cores(), 1)

        def compare() -> None:
            one.append(pool.apply(tiktoken_alone, ask[0]))
            together.append(sum(pool.starmap(tiktoken_alone, ask, 1)))

        compare()
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        watched = psutil.Process(process.pid)
        begun = time.perf_counter()
        halted = sum_halted = 0.0
        seen: list[tuple[float, dict[str, int]]] = []
        every = min(flags.every, max(0.5, flags.gigabytes * 1e9 / (median(together) * 4)))
        last = begun
        while process.poll() is None:
            now = time.perf_counter()
            with contextlib.suppress(psutil.Error):
                seen.append((now - begun - sum_halted, memory(watched)))
            if now - last > every:
                halted = time.perf_counter()
                os.killpg(process.pid, signal.SIGSTOP)
                compare()
                os.killpg(process.pid, signal.SIGCONT)
                last = time.perf_counter()
                sum_halted += last - halted
            time.sleep(0.1)
        seconds = time.perf_counter() - begun - sum_halted
        error = process.stderr.read() if process.stderr else ""
        compare()
    if process.returncode:
        raise RuntimeError(f"prepare_data.py failed: {error}")
    told = re.search(r"MB of text in ([\d.]+) s", error)
    early = [held["all"] for at, held in seen if at < seconds / 4] or [0]
    return {
        "seconds": seconds,
        "seconds_without_start": float(told[1]) - sum_halted if told else seconds,
        "tiktoken_one_core": median(one),
        "tiktoken_all_cores": median(together),
        "halts": len(one) - 2,
        "peak_largest_process": max(held["largest"] for _, held in seen),
        "peak_all_processes": max(held["all"] for _, held in seen),
        "growth_after_first_quarter": max(0, max(held["all"] for _, held in seen) - max(early)),
    }


def report(made: dict[str, Any]) -> str:
    """The figures as a table."""
    from corpus.workers import cores

    speed, one, together = made["text_bytes"] / made["seconds"], made["tiktoken_one_core"], made["tiktoken_all_cores"]
    begun = made["text_bytes"] / made["seconds_without_start"]
    rows = [
        (
            "corpus",
            f"{made['corpus_bytes'] / 1e6:,.0f} MB {made['kind']}, {made['text_bytes'] / 1e6:,.0f} MB once clean",
        ),
        ("time", f"{made['seconds']:.1f} s, start and checks included ({made['halts']} halts not counted)"),
        ("speed", f"{speed / 1e6:.2f} MB/s, {made['tokens'] / made['seconds']:,.0f} tokens/s"),
        ("tiktoken, one core", f"{one / 1e6:.2f} MB/s"),
        (f"tiktoken, {cores()} cores at once", f"{together / 1e6:.2f} MB/s"),
        (f"share of {cores()} x one core", f"{speed / one / cores():.1%}"),
        ("share of all cores at once", f"{speed / together:.1%}"),
        ("the same without Python's start", f"{begun / one / cores():.1%} and {begun / together:.1%}"),
        ("memory, largest process", f"{made['peak_largest_process'] / 1e6:.0f} MB"),
        ("memory, all processes", f"{made['peak_all_processes'] / 1e6:.0f} MB"),
        ("growth after the first quarter", f"{made['growth_after_first_quarter'] / 1e6:.0f} MB"),
    ]
    return "\n".join(f"| {name:<31} | {value} |" for name, value in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; see the module's first lines. Returns the exit code."""

    def body() -> int:
        from storage.shards import Manifest

        flags = parse_flags(Flags, argv, description=__doc__)
        work = Path(tempfile.mkdtemp(prefix="vlg-benchmark-", dir=flags.folder))
        try:
            (work / "corpus").mkdir()
            size = make_corpus(work / "corpus", flags)
            made = measure(work / "corpus", work / "out", flags)
            splits = Manifest.load(work / "out").splits
        finally:
            shutil.rmtree(work, ignore_errors=True)
        made |= {"corpus_bytes": size, "kind": flags.kind, "workers": flags.workers}
        made |= {"text_bytes": splits.train.bytes + splits.val.bytes, "tokens": splits.train.tokens + splits.val.tokens}
        OUT.mkdir(parents=True, exist_ok=True)
        name = f"prepare_data-{flags.kind}-{flags.gigabytes:g}GB.json"
        (OUT / name).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        print(report(made))
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
