"""Noticing that a client has hung up, so that its work ends.

>>> await cancelled_on_disconnect(request, finish_all(generations))      # ClientDisconnected when nobody waits any more
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request
from starlette.types import Receive

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client hung up before it had its answer."""


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client hangs up (ClientDisconnected)."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
