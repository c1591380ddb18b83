"""A pool of processes whose results come in order, and progress on a terminal or in a log.

with Pool(0) as pool:                                       # one process a core
    for result in pool.map(function, [(1,), (2,)]): ...     # function(1), function(2), in this order
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

R = TypeVar("R")
CALLS_PER_WORKER = 3  # calls sent ahead: enough to keep all workers busy, few enough to keep memory flat
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Calls functions in `workers` processes (0: one a core; 1: in this process).

    On Linux the workers are forked, so they start with everything that this process has loaded. They leave Ctrl-C to this
    process, and end when it ends or is killed.
    """

    def __init__(self, workers: int):
        self.workers = workers or cores()
        self._executor: ProcessPoolExecutor | None = None
        if self.workers > 1:
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._executor = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_follow_parent)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[..., R], arguments: Iterable[tuple[Any, ...]]) -> Iterator[R]:
        """function(*a) for each `a` of `arguments`, in their order; `arguments` is read only a little ahead.

        Exceptions of the function are raised here; RuntimeError when a worker was killed.
        """
        if self._executor is None:
            yield from (function(*given) for given in arguments)
            return
        waiting: deque[Future[R]] = deque()
        try:
            for given in arguments:
                waiting.append(self._executor.submit(function, *given))
                if len(waiting) >= CALLS_PER_WORKER * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"one of {self.workers} worker processes was killed, possibly out of memory: try --workers "
                f"{self.workers // 2}"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def run_in_child(what: str, function: Callable[..., None], *arguments: Any) -> None:
    """function(*arguments) in a process of its own, so that Ctrl-C is heard during long calls into libraries.

    The process is a new one and no fork: libraries with threads of their own do not survive that. A line of progress is
    printed every LINE_SECONDS. Raises what the function raises, KeyboardInterrupt, RuntimeError if the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    child.start()
    theirs.close()
    begun = shown = time.monotonic()
    try:
        while not ours.poll(0.2):
            if time.monotonic() - shown >= LINE_SECONDS:
                shown = time.monotonic()
                print(f"{what}: {shown - begun:.0f} s", file=sys.stderr, flush=True)
        error = ours.recv()
    except EOFError:
        raise RuntimeError(f"{what}: the process was killed, possibly out of memory") from None
    finally:
        child.kill()
        child.join()
    if error is not None:
        raise error


def _answer(connection: Any, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _follow_parent()
    try:
        function(*arguments)
    except Exception as error:
        connection.send(error)
    else:
        connection.send(None)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent process, and end when it ends: a pool's workers would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Progress:
    """Progress in bytes on standard error: a bar on a terminal, otherwise a plain line every LINE_SECONDS."""

    def __init__(self, what: str, total: int, done: int = 0):
        self.what, self.total, self.done = what, max(total, 1), done
        self._begun = self._shown = time.monotonic()
        self._first = done
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no monitor thread
            self._bar = tqdm(total=total, initial=done, desc=what, unit="B", unit_scale=True, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, size: int) -> None:
        """Count `size` more bytes as done."""
        self.done += size
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(size)
        elif now - self._shown >= LINE_SECONDS:
            self._shown = now
            speed = (self.done - self._first) / (now - self._begun)
            left = (self.total - self.done) / max(speed, 1)
            with contextlib.suppress(OSError):
                print(
                    f"{self.what}: {self.done / self.total:.0%} of {self.total / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s, "
                    f"{left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )
