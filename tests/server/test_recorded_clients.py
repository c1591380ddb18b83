"""What real clients send, as recorded when they were run: each is answered as that client needs it.

client_requests.json holds the requests with their version; prompts of prose are other prose of that length. Lengths are cut here, to write little.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from starlette.testclient import TestClient

import api
from inference.engine import Engine
from support.api_support import events, kobold_events, settings
from support.helpers import ROOT

RECORDED: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parent / "client_requests.json").read_text())
LENGTHS = ("max_tokens", "max_length", "n_predict", "max_new_tokens")
WRITTEN = 6


@pytest.fixture(scope="module")
def shipped() -> Iterator[TestClient]:
    """The shipped model, since the clients' requests hold its name and its token ids."""
    engine = Engine.load(ROOT / "models" / "victorian-mini", dtype="float32", device="cpu", slots=4)
    with TestClient(api.create_app(settings(origins="*", name="victorian-mini"), engine)) as client:
        yield client
    engine.close(5)


def shortened(body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    short = {name: WRITTEN for name in LENGTHS if isinstance(body.get(name), int) and not 0 <= body[name] < WRITTEN}
    return {**body, **short}


@pytest.mark.parametrize("client", RECORDED)
def test_every_recorded_request_is_answered(shipped: TestClient, client: str) -> None:
    assert RECORDED[client]
    for asked in RECORDED[client]:
        body = shortened(asked["body"])
        content = None if body is None else body if isinstance(body, str) else json.dumps(body)
        answer = shipped.request(asked["method"], asked["path"], headers=asked["headers"], content=content)
        assert answer.status_code == 200, (asked["path"], body, answer.text)
        if "origin" in asked["headers"]:
            assert answer.headers["access-control-allow-origin"] == "*"
        if asked["method"] == "OPTIONS":
            wanted = {name.strip() for name in asked["headers"].get("access-control-request-headers", "").split(",")}
            allowed = {
                name.strip().lower() for name in answer.headers.get("access-control-allow-headers", "").split(",")
            }
            assert wanted - {""} <= allowed
        elif asked["path"] in CHECKS:
            CHECKS[asked["path"]](body, answer)


def check_completions(body: Any, answer: httpx.Response) -> None:
    if body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
    chunks = events(answer) if body.get("stream") else [answer.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    prompts = len(body["prompt"]) if isinstance(body["prompt"], list) and not isinstance(body["prompt"][0], int) else 1
    assert {choice["index"] for choice in choices} == set(range(prompts * (body.get("n") or 1)))
    if body.get("logprobs"):
        for choice in choices:
            for found in (choice["logprobs"] or {}).get("top_logprobs", []):
                assert found is None or len(found) in (body["logprobs"], body["logprobs"] + 1)
    if not body.get("stream"):
        assert chunks[0]["usage"]["total_tokens"] and chunks[0]["object"] == "text_completion"
    elif (body.get("stream_options") or {}).get("include_usage"):
        assert chunks[-1]["usage"]["total_tokens"]


def check_completion(body: Any, answer: httpx.Response) -> None:
    parts = events(answer) if body.get("stream") else [answer.json()]
    last = parts[-1]
    assert last["stop"] is True and last["tokens_predicted"] == WRITTEN
    if body.get("n_probs"):
        entries = [entry for part in parts for entry in part.get("completion_probabilities", [])]
        assert len(entries) >= WRITTEN
        if body.get("post_sampling_probs"):  # only what the filters leave
            assert all(0 < len(entry["top_probs"]) <= body["n_probs"] for entry in entries)
        else:
            assert all(len(entry["top_logprobs"]) == body["n_probs"] for entry in entries)


def check_kobold_stream(body: Any, answer: httpx.Response) -> None:
    found = [data for _, data in kobold_events(answer.text)]
    assert found[-1]["finish_reason"] == "length" and all("token" in data for data in found)
    if body.get("logprobs"):
        assert sum("top_logprobs" in data for data in found) == WRITTEN


def check_kobold_count(body: Any, answer: httpx.Response) -> None:
    assert answer.json()["value"] == len(answer.json()["ids"]) > 0


def check_tokenize(body: Any, answer: httpx.Response) -> None:
    assert answer.json()["count"] == len(answer.json()["tokens"]) > 0


CHECKS: dict[str, Any] = {
    "/v1/completions": check_completions,
    "/completion": check_completion,
    "/api/extra/generate/stream": check_kobold_stream,
    "/api/extra/tokencount": check_kobold_count,
    "/tokenize": check_tokenize,
}
