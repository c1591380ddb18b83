"""Lambda on one machine: functions run in threads, with reserved concurrency, a queue of events, and destinations.

>>> functions = LambdaRuntime({"router": relay.router}, {"router": 10.0}, {"worker": 50}, "router")
>>> await functions.invoke("router", event)
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Context:
    """What Lambda gives a handler besides the event."""

    function_name: str
    timeout: float
    aws_request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    memory_limit_in_mb: int = 256
    began: float = field(default_factory=time.monotonic)

    @property
    def invoked_function_arn(self) -> str:
        return f"arn:aws:lambda:eu-west-1:000000000000:function:{self.function_name}"

    def get_remaining_time_in_millis(self) -> int:
        return max(0, round((self.timeout - (time.monotonic() - self.began)) * 1000))


Handler = Callable[[dict[str, Any], Any], Any]


class LambdaRuntime:
    """Lambda: handlers in threads, each event and answer through JSON.

    `reserved` limits how many events of a function run at once. Asynchronous events wait in Lambda's queue for at most
    `event_age_s`; an event that is too old, or whose handler raised, goes to `destination` as a record
    (https://docs.aws.amazon.com/lambda/latest/dg/invocation-async-retain-records.html).
    """

    def __init__(
        self, handlers: dict[str, Handler], timeouts: dict[str, float], reserved: dict[str, int], destination: str
    ):
        self.handlers, self.timeouts, self.reserved, self.destination = handlers, timeouts, reserved, destination
        self.event_age_s = 60.0
        self.pool = concurrent.futures.ThreadPoolExecutor(200, "lambda")
        self.results: list[tuple[str, Any]] = []
        self.running: set[str] = set()
        self.busy: dict[str, int] = {}
        self.waiting: set[asyncio.Task[None]] = set()

    def _run(self, name: str, call: Callable[[Any], Any]) -> Any:
        context = Context(name, self.timeouts[name])
        self.running.add(context.aws_request_id)
        try:
            result = call(context)
        except Exception as error:
            self.results.append((name, error))
            print(f"[{name}] {type(error).__name__}: {error}", file=sys.stderr)
            raise
        finally:
            self.running.discard(context.aws_request_id)
        self.results.append((name, result))
        return result

    def full(self, name: str) -> bool:
        return self.busy.get(name, 0) >= self.reserved.get(name, 1000)

    async def call(self, name: str, call: Callable[[Any], Any]) -> Any:
        """Run `call(context)` in one of the function's places; BlockingIOError if all are taken."""
        if self.full(name):
            raise BlockingIOError(f"{name}: Rate Exceeded.")
        self.busy[name] = self.busy.get(name, 0) + 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, self._run, name, call)
        finally:
            self.busy[name] -= 1

    async def invoke(self, name: str, event: dict[str, Any], wait: bool = True) -> Any:
        """Run a function; KeyError if there is none of this name. With wait=False the event is queued."""
        handler = self.handlers[name]

        def call(context: Context) -> Any:
            return json.loads(json.dumps(handler(json.loads(json.dumps(event)), context)))

        if wait:
            return await self.call(name, call)
        task = asyncio.ensure_future(self._queued(name, event, call))
        self.waiting.add(task)
        task.add_done_callback(self.waiting.discard)
        return None

    async def _queued(self, name: str, event: dict[str, Any], call: Callable[[Any], Any]) -> None:
        until = time.monotonic() + self.event_age_s
        while self.full(name) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        condition = ""
        try:
            await self.call(name, call)
        except BlockingIOError:
            condition = "EventAgeExceeded"
        except Exception:
            condition = "RetriesExhausted"
        if condition and self.destination:
            context = {"requestId": str(uuid.uuid4()), "functionArn": f"{name}:$LATEST", "condition": condition}
            record = {"version": "1.0", "timestamp": "", "requestContext": context, "requestPayload": event}
            with contextlib.suppress(Exception):
                await self.invoke(self.destination, record)
