"""Where text is generated: an engine in this process, a server, or a WebSocket gateway, behind one interface.

    >>> backend = connect(BackendLocation("server", "http://127.0.0.1:8000"))
    >>> for update in backend.write("The fog", GenerationParams(max_tokens=20)):
    ...     print(update.text, end="")

`api.py`'s `/ws` and the gateway in front of SageMaker speak the same protocol, so one class streams from both.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from config import GenerationParams

if TYPE_CHECKING:
    from evaluation.originality import Index
    from inference.engine import Engine

CONNECT_S = 5.0
SILENCE_S = 120.0  # a server that sends nothing for this long is taken for dead
DESCRIBE_S = 10.0  # how long to wait for a gateway's description; a model that is starting takes longer
KNOWN_S = 600.0  # how long a description holds: another model may run there by then
UNKNOWN_S = 60.0  # how long a server without one is not asked again
STOP_WAIT_S = 5.0  # how long to wait for the end of a text after asking to stop
RECEIVE_S = 0.5  # how long one wait for a message lasts before the time limits are checked
RETRYABLE_CODES = ("endpoint_failed", "stream_truncated", "stalled")  # error codes of a gateway whose model has died


class BackendError(RuntimeError):
    """The request was refused or cannot be answered; the message gives the reason and the fix."""


class BackendLost(BackendError):
    """The connection broke; the same request may succeed once the server is back."""


@dataclass(frozen=True)
class BackendLocation:
    """What a backend is made from. `where`: a model folder, an http(s) URL, or a ws(s) URL."""

    kind: Literal["local", "server", "gateway"]
    where: str
    key: str = ""
    dtype: str = "auto"


@dataclass(frozen=True)
class Update:
    """One event of a text: `started`, then `text` pieces of sample `index`, then `ended` once for each sample."""

    kind: Literal["started", "text", "ended"]
    index: int = 0
    text: str = ""
    tokens: int = 0
    seed: int | None = None
    prompt_tokens: int | None = None
    truncated: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Alternative:
    """A token the model could have chosen instead, with its probability."""

    text: str
    probability: float


@dataclass(frozen=True)
class Scored:
    """A token of a text: where it starts (in characters), its probability and rank, and the most likely alternatives."""

    text: str
    start: int
    probability: float | None
    rank: int | None
    top: tuple[Alternative, ...]


@dataclass(frozen=True)
class VisibleText:
    """How much of a text the model reads: its tokens, the context, the first character read; `exact` or estimated."""

    tokens: int
    context: int
    start: int
    exact: bool = True


class UpdateStream(Protocol):
    """The updates of a text being generated; `cancel` from any thread ends it soon."""

    def __iter__(self) -> Iterator[Update]: ...
    def cancel(self) -> None: ...


class Backend(Protocol):
    """A model as the pages use it, wherever it runs."""

    place: BackendLocation
    name: str

    @property
    def styles(self) -> list[str]:
        """Values of `GenerationParams.style`; empty where the model has none or they are unknown."""
        ...

    def write(self, prompt: str, params: GenerationParams) -> UpdateStream: ...
    def score(self, text: str, top: int = 10) -> list[Scored]: ...
    def originality(self, text: str) -> dict[str, Any]: ...
    def visible_text(self, text: str, params: GenerationParams) -> VisibleText | None: ...
    def alive(self) -> bool: ...
    def close(self) -> None: ...


class LocalStream:
    """An engine job as updates."""

    def __init__(self, job: Any):
        self.job = job

    def cancel(self) -> None:
        self.job.cancel()

    def __iter__(self) -> Iterator[Update]:
        job = self.job
        yield Update("started", seed=job.seed, prompt_tokens=job.prompt_tokens, truncated=bool(job.truncated))
        for event in job:
            if event.kind == "token":
                yield Update("text", event.index, event.text, tokens=int(event.token_id is not None))
            elif event.kind == "done":
                if event.text or event.token_id is not None:
                    yield Update("text", event.index, event.text, tokens=int(event.token_id is not None))
                yield Update("ended", event.index, reason=event.finish_reason or "")
            elif event.kind == "error":
                raise BackendError(event.message or "the model failed")


class LocalBackend:
    """An engine in this process."""

    def __init__(self, place: BackendLocation, engine: Engine):
        self.place, self.engine, self.name = place, engine, engine.name
        self.styles = engine.styles
        self.index: Index | None = None

    def write(self, prompt: str, params: GenerationParams) -> UpdateStream:
        try:
            return LocalStream(self.engine.submit(prompt, params))
        except (ValueError, RuntimeError) as error:
            raise BackendError(str(error)) from None

    def score(self, text: str, top: int = 10) -> list[Scored]:
        import math

        def share(logprob: float | None) -> float | None:
            return None if logprob is None else math.exp(logprob)

        try:
            scores = self.engine.score(text, top)
        except (ValueError, RuntimeError) as error:
            raise BackendError(str(error)) from None
        return [
            Scored(
                token.text,
                token.start,
                share(token.logprob),
                token.rank,
                tuple(Alternative(word, math.exp(logprob)) for _, word, logprob in token.top),
            )
            for token in scores
        ]

    def originality(self, text: str) -> dict[str, Any]:
        from evaluation.originality import Index, data_of

        try:
            data = data_of(Path(self.place.where))
            if data is None:
                raise BackendError(
                    "this model folder does not say which texts it was trained on, so originality cannot be checked"
                )
            self.index = self.index or Index.open(data)
            return asdict(self.index.check(text))
        except (OSError, ValueError) as error:
            raise BackendError(str(error)) from None

    def visible_text(self, text: str, params: GenerationParams) -> VisibleText | None:
        from inference.writing import prompt_window

        tokenizer, context = self.engine.tokenizer, self.engine.context
        try:
            ids = tokenizer.encode(text)
        except ValueError:
            return None
        kept, cut = prompt_window(ids, context, params)
        newest = len(kept) - min(params.keep, len(kept) - 1) if cut else len(ids)
        start = len(text) - len(tokenizer.decode(ids[-newest:])) if cut else 0
        return VisibleText(len(ids), context, max(0, start))

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        self.engine.close(timeout=5.0, finish=False)


class SocketStream:
    """One request over a WebSocket of its own."""

    def __init__(self, url: str, headers: dict[str, str], prompt: str, params: GenerationParams):
        from websockets.exceptions import InvalidHandshake, InvalidURI
        from websockets.sync.client import connect

        self.id = uuid.uuid4().hex
        self.cancelled = threading.Event()
        self.n = params.n
        body = {name: value for name, value in params.model_dump(mode="json").items() if value is not None}
        shown = url.partition("?")[0]  # without the query, which may hold a key
        try:
            self.socket = connect(url, additional_headers=headers, open_timeout=CONNECT_S, max_size=None)
        except InvalidURI:
            raise BackendError(f"{shown}: not a WebSocket address: it begins with ws:// or wss://") from None
        except InvalidHandshake as error:
            raise refused(shown, error) from None
        except (OSError, TimeoutError) as error:
            raise BackendLost(f"{shown}: cannot be reached ({reason(error)})") from None
        self._send({"action": "generate", "request_id": self.id, "prompt": prompt, **body})

    def _send(self, message: dict[str, Any]) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            self.socket.send(json.dumps(message))
        except (ConnectionClosed, OSError) as error:
            raise BackendLost(f"the connection to the server broke ({reason(error)})") from None

    def cancel(self) -> None:
        self.cancelled.set()
        try:
            self._send({"action": "stop", "request_id": self.id})
        except BackendLost:
            return

    def _messages(self) -> Iterator[dict[str, Any]]:
        """The messages of this request, tokens in the order of `seq`; ends early once cancelled and silent."""
        from websockets.exceptions import ConnectionClosed

        heard, due = time.monotonic(), 0
        early: dict[int, dict[str, Any]] = {}
        while True:
            try:
                message = json.loads(self.socket.recv(timeout=RECEIVE_S))
            except TimeoutError:
                silence = time.monotonic() - heard
                if self.cancelled.is_set() and silence > STOP_WAIT_S:
                    return
                if silence > SILENCE_S:
                    raise BackendLost(f"the server sent nothing for {SILENCE_S:g} s") from None
                continue
            except (ConnectionClosed, OSError) as error:
                if self.cancelled.is_set():
                    return
                raise BackendLost(f"the connection to the server broke ({reason(error)})") from None
            if message.get("request_id") not in (self.id, None):
                continue
            heard = time.monotonic()
            if message.get("type") != "token":
                yield from (early[seq] for seq in sorted(early))  # earlier ones were lost
                early.clear()
                yield message
                continue
            if message.get("seq", due) >= due:
                early[message.get("seq", due)] = message
            while due in early:
                yield early.pop(due)
                due += 1

    def __iter__(self) -> Iterator[Update]:
        open_samples, started = set(range(self.n)), False
        try:
            for message in self._messages():
                kind = message.get("type")
                if kind is None and message.get("connectionId") and not started:
                    raise BackendLost(f"the gateway answered: {message.get('message')}")
                if kind == "started":
                    started = True
                    yield Update(
                        "started",
                        seed=message.get("seed"),
                        prompt_tokens=message.get("prompt_tokens"),
                        truncated=bool(message.get("truncated")),
                    )
                elif kind == "token":
                    yield Update(
                        "text", message.get("index", 0), message.get("text", ""), tokens=message.get("count", 1)
                    )
                elif kind == "complete":
                    for sample in message.get("samples") or ():
                        open_samples.discard(sample["index"])
                        yield Update(
                            "ended", sample["index"], tokens=sample.get("tokens", 0), reason=sample["finish_reason"]
                        )
                    for index in sorted(open_samples):
                        yield Update("ended", index, reason=message.get("finish_reason") or "")
                    return
                elif kind == "error":
                    raise failure(message.get("error") or {})
        finally:
            self.socket.close()


_descriptions: dict[BackendLocation, tuple[float, dict[str, Any]]] = {}


def description(place: BackendLocation) -> dict[str, Any]:
    """What a server or gateway says of its model: `model`, `context` and `settings`, as `GET /settings` of a server.

    Empty where it does not say: it is older, cannot be reached, or its model is still starting.
    """
    until, found = _descriptions.get(place, (0.0, {}))
    if time.monotonic() >= until:
        found = _asked_gateway(place) if place.kind == "gateway" else _asked_server(place)
        if not isinstance(found.get("model"), str) or not isinstance(found.get("settings"), dict):
            found = {}  # a gateway whose model is silent gives general defaults, not the model's
        _descriptions[place] = (time.monotonic() + (KNOWN_S if found else UNKNOWN_S), found)
    return found


def _asked_server(place: BackendLocation) -> dict[str, Any]:
    import httpx

    try:
        address = place.where.rstrip("/") + "/settings"
        answer = httpx.get(address, headers=key_header(place), timeout=httpx.Timeout(DESCRIBE_S, connect=CONNECT_S))
        found = answer.json() if answer.is_success else {}
    except (httpx.TransportError, httpx.InvalidURL, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _asked_gateway(place: BackendLocation) -> dict[str, Any]:
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    until = time.monotonic() + DESCRIBE_S
    try:
        with connect(
            place.where, additional_headers=key_header(place), open_timeout=CONNECT_S, close_timeout=1, max_size=None
        ) as socket:
            socket.send('{"action": "settings"}')
            while True:
                message = json.loads(socket.recv(timeout=max(0.0, until - time.monotonic())))
                if message.get("type") == "settings":
                    return dict(message)
                if message.get("type") == "error" or message.get("connectionId"):
                    return {}
    except (WebSocketException, OSError, ValueError):
        return {}


def key_header(place: BackendLocation) -> dict[str, str]:
    """The header that carries the place's key."""
    return {"Authorization": f"Bearer {place.key}"} if place.key else {}


class RemoteBackend:
    """A server's `/ws`, `/health`, `/v1/score` and `/v1/originality`; of a gateway, only its WebSocket."""

    def __init__(self, place: BackendLocation):
        self.place = place
        url = place.where.rstrip("/")
        self.gateway = place.kind == "gateway"
        self.socket_url = place.where if self.gateway else "ws" + url.removeprefix("http") + "/ws"
        self.http_url = "" if self.gateway else url
        self.headers = key_header(place)
        self.name = url.split("//")[-1].split("?")[0]
        self.health: dict[str, Any] = {}
        self.characters_a_token = 4.0
        if not self.gateway:
            self.health = self._http("GET", "/health")
            self.name = self.health["model"]

    @property
    def context(self) -> int | None:
        """The model's context in tokens; None where it is unknown."""
        found: int | None = (self.health or description(self.place)).get("context")
        return found

    @property
    def styles(self) -> list[str]:
        if self.gateway:
            return list(description(self.place).get("settings", {}).get("style", {}).get("examples", []))
        return list(self.health.get("styles", []))

    def _http(self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float = 60.0) -> Any:
        import httpx

        try:
            limits = httpx.Timeout(timeout, connect=CONNECT_S)
            answer = httpx.request(method, self.http_url + path, json=body, headers=self.headers, timeout=limits)
        except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise BackendLost(f"{self.http_url}: cannot be reached ({reason(error)})") from None
        try:
            content = answer.json()
        except ValueError:
            raise BackendError(f"{self.http_url}{path}: answered {answer.status_code}, not in JSON") from None
        if answer.is_error:
            raise failure(content.get("error") or {}, answer.status_code)
        return content

    def write(self, prompt: str, params: GenerationParams) -> UpdateStream:
        return MeasuredStream(self, SocketStream(self.socket_url, self.headers, prompt, params), len(prompt))

    def score(self, text: str, top: int = 10) -> list[Scored]:
        if self.gateway:
            raise BackendError("a gateway cannot score texts: choose a model folder or a server on the Model page")
        return [
            Scored(
                token["text"],
                token["start"],
                token["probability"],
                token["rank"],
                tuple(Alternative(other["text"], other["probability"]) for other in token["top"]),
            )
            for token in self._http("POST", "/v1/score", {"text": text, "top": top})["tokens"]
        ]

    def originality(self, text: str) -> dict[str, Any]:
        if self.gateway:
            raise BackendError(
                "a gateway cannot check originality: choose a model folder or a server on the Model page"
            )
        report: dict[str, Any] = self._http("POST", "/v1/originality", {"text": text})
        return report

    def visible_text(self, text: str, params: GenerationParams) -> VisibleText | None:
        context = self.context
        if context is None:
            return None
        room = context - min(params.max_tokens, context // 4) - params.keep
        start = max(0, len(text) - round(max(1, room) * self.characters_a_token))
        return VisibleText(round(len(text) / self.characters_a_token), context, start, exact=False)

    def alive(self) -> bool:
        if self.gateway:
            return True
        try:
            self._http("GET", "/health", timeout=CONNECT_S)
        except BackendError:
            return False
        return True

    def close(self) -> None:
        return


class MeasuredStream:
    """A stream that measures characters per token of its prompt for the backend's estimates."""

    def __init__(self, backend: RemoteBackend, inner: SocketStream, characters: int):
        self.backend, self.inner, self.characters = backend, inner, characters

    def cancel(self) -> None:
        self.inner.cancel()

    def __iter__(self) -> Iterator[Update]:
        for update in self.inner:
            if update.kind == "started" and update.prompt_tokens and not update.truncated and self.characters > 20:
                self.backend.characters_a_token = self.characters / update.prompt_tokens
            yield update


def reason(error: BaseException) -> str:
    """What went wrong, in a few words."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def refused(url: str, error: Exception) -> BackendError:
    """The error for a handshake that was answered, but not with a WebSocket."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return BackendError(f"{url}: the key was not accepted: give the right one")
    if status is not None and (status >= 500 or status == 429):
        return BackendLost(f"{url}: answered {status}")
    return BackendError(f"{url}: no WebSocket there (answered {status or reason(error)})")


def failure(error: dict[str, Any], status: int | None = None) -> BackendError:
    """The server's error object as an exception; one that passes with time is a BackendLost."""
    message = error.get("message") or f"the server answered {status}"
    if error.get("type") == "unavailable_error" or status == 503 or error.get("code") in RETRYABLE_CODES:
        return BackendLost(message)
    return BackendError(message)


def connect(place: BackendLocation) -> Backend:
    """The backend at a location. Raises BackendError (or what loading a model raises) with a fix."""
    if place.kind == "local":
        from inference.engine import Engine

        return LocalBackend(place, Engine.load(Path(place.where), dtype=place.dtype))
    if place.kind == "server" and not place.where.startswith(("http://", "https://")):
        raise BackendError(f"{place.where}: a server's address begins with http:// or https://")
    if place.kind == "gateway" and not place.where.startswith(("ws://", "wss://")):
        raise BackendError(f"{place.where}: a gateway's address begins with ws:// or wss://")
    return RemoteBackend(place)
