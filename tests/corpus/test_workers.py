"""workers.py: order, look-ahead, and processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corpus import workers
from corpus.workers import CALLS_PER_WORKER, Pool, Progress, run_in_child
from support.helpers import ROOT


def later(number: int) -> tuple[int, int]:
    time.sleep(0.02 * (number % 3))
    return number, os.getpid()


def broken(number: int) -> int:
    if number == 3:
        raise ValueError("number 3 is bad")
    return number


def killed(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order_from_that_many_processes(count: int) -> None:
    with Pool(count) as pool:
        results = list(pool.map(later, ((number,) for number in range(20))))
    assert [number for number, _ in results] == list(range(20))
    processes = {process for _, process in results}
    assert len(processes) == count
    assert (os.getpid() in processes) == (count == 1)


def test_arguments_are_read_only_a_little_ahead() -> None:
    read = 0

    def arguments() -> Iterator[tuple[int]]:
        nonlocal read
        for read in range(1, 101):
            yield (read,)

    with Pool(2) as pool:
        for done, _ in enumerate(pool.map(later, arguments()), 1):
            assert read <= done + CALLS_PER_WORKER * 2
            if done == 20:
                break


@pytest.mark.parametrize("count", [1, 2])
def test_an_exception_arrives(count: int) -> None:
    with Pool(count) as pool:
        results = pool.map(broken, ((number,) for number in range(9)))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="number 3 is bad"):
            next(results)


def test_a_killed_process_is_reported() -> None:
    with Pool(2) as pool, pytest.raises(RuntimeError, match="killed, possibly out of memory: try --workers 1"):
        list(pool.map(killed, [(1,)]))


def test_workers_end_when_their_parent_is_killed() -> None:
    code = (
        "import sys; sys.path[:0] = ['.', 'tests', 'tests/corpus']\n"
        "from corpus.workers import Pool; import test_workers, os, signal\n"
        "pool = Pool(2); found = {p for _, p in pool.map(test_workers.later, [(n,) for n in range(12)])}\n"
        "print(*found, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    processes = [int(word) for word in done.stdout.split()]
    assert len(processes) == 2 and done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{number}").exists() and alive(number) for number in processes):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def alive(number: int) -> bool:
    """Not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_progress_is_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LINE_SECONDS", 0.0)
    with Progress("encoding", 4_000_000, 1_000_000) as progress:
        progress.add(1_000_000)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("encoding: 50% of 4.0 MB, ")
    assert "\r" not in shown.err and shown.err.count("\n") == 1


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("encoding", 4_000_000) as progress:
        progress.add(4_000_000)
    assert "\rencoding: " in capsys.readouterr().err


def test_a_child_returns_raises_and_is_left(tmp_path: Path) -> None:
    run_in_child("writing", Path.write_text, tmp_path / "a", "done")
    assert (tmp_path / "a").read_text() == "done"
    with pytest.raises(FileNotFoundError):
        run_in_child("reading", os.stat, tmp_path / "none")
    with pytest.raises(RuntimeError, match="ending: the process was killed"):
        run_in_child("ending", os._exit, 3)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started without
    try:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            run_in_child("sleeping", time.sleep, 60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()
