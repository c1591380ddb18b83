"""Graceful shutdown: on SIGTERM running texts may finish, new ones are refused, and then the connections close."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from server.logs import LOG
from server.service import Service

INTERRUPT_S = 2.0  # seconds that readers have to take the error


def catch_signals(service: Service) -> Callable[[], None]:
    """Let SIGTERM and SIGINT drain the service first, before the HTTP server's own handlers close the connections.

    uvicorn, alone and as gunicorn's worker, cuts WebSockets as soon as it hears a signal. A second signal goes
    straight to its handlers. Returns a function that restores them.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    loop = asyncio.get_running_loop()
    previous: dict[int, Any] = {}
    tasks: set[asyncio.Task[None]] = set()

    def start_drain(number: int) -> None:
        tasks.add(loop.create_task(drain(service, lambda: previous[number](number, None))))

    def on_signal(number: int, frame: Any) -> None:
        if service.draining:
            previous[number](number, frame)
        else:
            service.draining = True
            loop.call_soon_threadsafe(start_drain, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        if callable(handler):
            previous[number] = handler
            signal.signal(number, on_signal)

    def restore() -> None:
        for number, handler in previous.items():
            with suppress(ValueError):
                signal.signal(number, handler)

    return restore


async def drain(service: Service, then: Callable[[], None]) -> None:
    """Give running texts `grace_s` seconds to finish, interrupt the rest, then call `then`."""
    grace_s = service.settings.grace_s
    LOG.info("draining", extra={"fields": {"streams": len(service.generations), "grace_s": grace_s}})
    end = time.monotonic() + grace_s
    while service.generations and time.monotonic() < end:
        await asyncio.sleep(0.05)
    await interrupt_all(service)
    await asyncio.sleep(0.05)  # the last lines leave before the connections close
    then()


async def interrupt_all(service: Service) -> None:
    """End every running text with an error that its reader sees; waits `INTERRUPT_S` at most for them to take it."""
    for generation in list(service.generations):
        generation.interrupt()
    end = time.monotonic() + INTERRUPT_S
    while service.generations and time.monotonic() < end:
        await asyncio.sleep(0.02)
