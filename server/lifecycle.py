"""Model lifecycle: the model is loaded in the background when the server starts and closed when it stops.

>>> FastAPI(lifespan=partial(lifespan, service))
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from config import ROOT
from server.logs import LOG, hide_queries
from server.service import Service
from server.shutdown import catch_signals, interrupt_all


@asynccontextmanager
async def lifespan(service: Service, app: Any) -> AsyncIterator[None]:
    """Load in the background; when the server stops, end what still runs and close the engine."""
    hide_queries()
    if service.engine is None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=load, args=(service, loop), name="load", daemon=True).start()
    restore_signals = catch_signals(service)
    try:
        yield
    finally:
        restore_signals()
        service.draining = True
        await interrupt_all(service)
        if service.engine is not None and service.owned:
            await asyncio.to_thread(service.engine.close, 5.0, finish=False)


def load(service: Service, loop: asyncio.AbstractEventLoop) -> None:
    """Load the model of the settings into the service, in a thread of its own; a failure is kept in `failure`."""
    settings = service.settings
    begun = time.monotonic()
    try:
        from checkpoint import described, find_model
        from inference.engine import Engine
        from storage.gpt2_format import folder_defaults

        folder = service.folder = find_model(settings.model, ROOT)
        service.defaults = folder_defaults(folder)
        engine = Engine.load(
            folder,
            device=settings.device,
            dtype=settings.dtype,
            name=settings.name or folder_name(folder.resolve().parts),
            slots=settings.slots,
            queue_size=settings.queue_size,
            max_tokens_limit=settings.max_tokens,
            stall_s=settings.stall_s,
        )
    except Exception as error:
        service.failure = str(error)
        expected = isinstance(error, (OSError, ValueError, RuntimeError))
        LOG.error("load_failed", exc_info=not expected, extra={"fields": {"message": service.failure}})
        loop.call_soon_threadsafe(service.on_failure)
        return
    service.engine = engine
    seconds = round(time.monotonic() - begun, 2)
    LOG.info("ready", extra={"fields": {"model": engine.name, "folder": described(folder, ROOT), "seconds": seconds}})


def folder_name(parts: tuple[str, ...]) -> str:
    """A model's name from its folder: `runs/NAME/best` is NAME."""
    plain = [part for part in parts if part not in ("best", "last", "/")]
    return plain[-1] if plain else "model"
