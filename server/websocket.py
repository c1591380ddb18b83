"""The WebSocket at `/ws`: `generate`, `settings`, `stop` and `ping` come in, the protocol's messages go out.

>>> await WebSocketConnection(service, websocket).serve()
> {"action": "generate", "request_id": "1", "prompt": "The fog", "max_tokens": 40}
< {"type": "started", "request_id": "1", ...}, {"type": "token", "request_id": "1", "seq": 0, ...}, ...
"""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import aclosing
from typing import Any

from fastapi import WebSocket
from pydantic import ValidationError
from starlette.websockets import WebSocketDisconnect

from server import schemas
from server.auth import has_valid_key
from server.description import described
from server.errors import ApiError, bad_value, from_validation_errors, printable, unexpected
from server.generation import Generation
from server.service import Service
from server.streaming import error_message, messages


class WebSocketConnection:
    """One client: reads its messages and writes any number of texts at the same time."""

    def __init__(self, service: Service, websocket: WebSocket):
        self.service, self.settings, self.websocket = service, service.settings, websocket
        self.generations: dict[str, Generation] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.lock = asyncio.Lock()
        self.reader: asyncio.Task[Any] | None = None
        self.stalled = False  # the client does not read: no use in telling it

    async def serve(self) -> None:
        """Runs until the client leaves, stays silent too long, or stops reading."""
        headers, token = self.websocket.headers, self.websocket.query_params.get("token")
        allowed = self.service.origins.allow(headers.get("origin"), headers.get("host"))
        if not allowed or not has_valid_key(self.settings.api_keys, headers, token):
            await self.websocket.close(1008)  # before accept: the client sees HTTP 403
            return
        await self.websocket.accept()
        self.reader = asyncio.current_task()
        try:
            while await self._next():
                pass
        except (WebSocketDisconnect, TimeoutError):
            pass
        except asyncio.CancelledError:
            if not self.stalled:
                raise
        finally:
            for generation in self.generations.values():
                generation.close()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _next(self) -> bool:
        """Take one message; False when the connection is over."""
        try:
            async with asyncio.timeout(self.settings.ws_idle_s):
                message = await self.websocket.receive()
        except TimeoutError:
            if self.tasks:
                return True
            await self.websocket.close(1000, "idle")
            return False
        if message["type"] == "websocket.disconnect":
            return False
        data = message.get("text") or message.get("bytes") or b""
        value: Any = None
        try:
            value = self._parsed(data)
            await self._handle(value)
        except ApiError as error:
            await self.send(error_message(error, request_id_of(value)))
        except WebSocketDisconnect:
            raise
        except Exception:
            await self.send(error_message(unexpected("websocket", request_id_of(value)), request_id_of(value)))
        return True

    def _parsed(self, data: str | bytes) -> dict[str, Any]:
        if len(data) > self.settings.max_body_bytes:
            raise ApiError(413, f"a message may have at most {self.settings.max_body_bytes} bytes", code="too_large")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise ApiError(400, "the message is not JSON", code="bad_json") from None
        if not isinstance(value, dict):
            raise ApiError(400, "the message is not a JSON object", code="bad_json")
        return value

    async def _handle(self, value: dict[str, Any]) -> None:
        action = value.get("action")
        if action == "generate":
            await self._generate(value)
        elif action == "stop":
            given = value.get("request_id")
            generation = self.generations.get(given) if isinstance(given, str) else None
            if generation is None:
                raise bad_value("no text with this request_id is under way", "request_id", "unknown_request")
            generation.job.cancel()
        elif action == "ping":
            await self.send({"type": "pong"})
        elif action == "settings":
            await self.send({"type": "settings", **described(self.service)})
        else:
            raise bad_value("action must be generate, settings, stop or ping", "action", "unknown_action")

    async def _generate(self, value: dict[str, Any]) -> None:
        try:
            body = schemas.SocketBody.model_validate(value)
        except ValidationError as error:
            raise from_validation_errors(list(error.errors(include_input=False, include_url=False))) from None
        request_id = body.request_id or uuid.uuid4().hex
        if request_id in self.generations:
            raise bad_value("a text with this request_id is under way", "request_id", "duplicate_request")
        if len(self.generations) >= self.settings.ws_requests:
            raise ApiError(
                429,
                f"a connection may have at most {self.settings.ws_requests} texts under way",
                code="too_many_requests",
                kind="rate_limit_error",
            )
        params = body.params(self.settings, self.service.defaults)
        generation = await self.service.start(body.prompt, params, request_id=request_id)
        self.generations[request_id] = generation
        before = body.prompt if body.return_full_text else ""
        task = asyncio.create_task(self._stream(generation, before))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _stream(self, generation: Generation, before: str) -> None:
        try:
            async with aclosing(messages(generation, self.settings.flush_ms / 1000, before)) as items:
                async for message in items:
                    if message["type"] in ("complete", "error"):
                        self.generations.pop(generation.request_id, None)  # the client may use the name again
                    await self.send(message)
        except (WebSocketDisconnect, RuntimeError):
            pass
        except TimeoutError:
            self.stalled = True
            if self.reader is not None:
                self.reader.cancel()
        finally:
            self.generations.pop(generation.request_id, None)
            generation.close()

    async def send(self, message: dict[str, Any]) -> None:
        """One message; TimeoutError when the client has not read for `stall_s`."""
        text = json.dumps(message, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        async with self.lock, asyncio.timeout(self.settings.stall_s):
            await self.websocket.send_text(text)


def request_id_of(value: Any) -> str | None:
    """The request_id of a client's message, as far as it can be given back."""
    given = value.get("request_id") if isinstance(value, dict) else None
    return printable(given, 128) if isinstance(given, str) else None
