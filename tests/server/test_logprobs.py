"""Log-probabilities of `/v1/completions`: an entry for every token, names that no two tokens share, offsets that fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from model import GPT
from server.logprobs import token_name
from support.api_support import PARAMS, PROMPT, events
from tokenizer import Tokenizer


def logprobs_of(client: TestClient, **body: Any) -> list[dict[str, list[Any]]]:
    """The logprobs of every choice, of a stream with its parts joined."""
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "logprobs": 5, **body})
    assert answer.status_code == 200, answer.text
    chunks = events(answer) if body.get("stream") else [answer.json()]
    found: dict[int, dict[str, list[Any]]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        for key, values in (choice["logprobs"] or {}).items():
            found.setdefault(choice["index"], {}).setdefault(key, []).extend(values)
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("shape", [{}, {"n": 2}, {"prompt": [PROMPT, PROMPT]}])
def test_the_end_of_text_has_an_entry(
    ending: tuple[TestClient, GPT, Tokenizer], stream: bool, echo: bool, shape: dict[str, Any]
) -> None:
    client, model, tokenizer = ending
    body = {"max_tokens": 4, "temperature": 0, "echo": echo, "stream": stream, **shape}
    ids = tokenizer.encode(PROMPT)
    expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    found = logprobs_of(client, **body)
    assert len(found) == (2 if shape else 1)
    for logprobs in found:
        assert len(logprobs["tokens"]) == (len(ids) if echo else 0) + 1
        assert logprobs["tokens"][-1] == "" and logprobs["text_offset"][-1] == len(PROMPT)
        assert logprobs["token_logprobs"][-1] == pytest.approx(float(expected[tokenizer.eot]), abs=1e-4)
        top = logprobs["top_logprobs"][-1]
        assert max(top, key=top.get) == "" and len(top) == 5
    if not stream:
        reply = client.post("/v1/completions", json={"prompt": PROMPT, **body}).json()
        assert reply["usage"]["completion_tokens"] == 0 and reply["choices"][0]["finish_reason"] == "stop"


def test_no_two_tokens_share_a_name(ending: tuple[TestClient, GPT, Tokenizer]) -> None:
    tokenizer = ending[2]
    names = [token_name(tokenizer, token) for token in range(tokenizer.vocab_size)]
    assert len(set(names)) == len(names)
    assert token_name(tokenizer, tokenizer.styles["dickens"]) == "<|dickens|>"
    assert token_name(tokenizer, tokenizer.encode("é")[0]) in ("é", "bytes:\\xc3")


@pytest.mark.parametrize("stream", [False, True])
def test_every_alternative_is_there_with_its_own_value(
    client: TestClient, model: GPT, tokenizer: Tokenizer, stream: bool
) -> None:
    found = logprobs_of(client, max_tokens=20, echo=True, temperature=0, stream=stream)[0]
    ids = tokenizer.encode(PROMPT)
    names = [token_name(tokenizer, token) for token in range(tokenizer.vocab_size)]
    assert found["tokens"][: len(ids)] == [names[token] for token in ids]
    ids += [names.index(name) for name in found["tokens"][len(ids) :]]
    logp = model(torch.tensor([ids]))[0].log_softmax(-1).detach()
    assert any(name.startswith("bytes:") for top in found["top_logprobs"][1:] for name in top)
    for at in range(1, len(ids)):
        assert found["token_logprobs"][at] == pytest.approx(float(logp[at - 1, ids[at]]), abs=1e-3)
        expected = {names[other]: float(logp[at - 1, other]) for other in [*logp[at - 1].topk(5).indices, ids[at]]}
        assert found["top_logprobs"][at] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, "“é", ""])
def test_offsets_point_at_each_tokens_own_text(client: TestClient, prompt: str, echo: bool) -> None:
    body = {"prompt": prompt, "max_tokens": 40, "echo": echo, "seed": 3, "temperature": 1.0}
    whole = client.post("/v1/completions", json={**body, "logprobs": 0}).json()["choices"][0]["text"]
    full = whole if echo else prompt + whole
    stop = full[len(prompt) + 12 : len(prompt) + 15]
    for more in ({}, {"stop": [stop]}, {"stop": [whole[-2:] + "#"]}):
        (found,) = logprobs_of(client, **body, **more)
        (streamed,) = logprobs_of(client, **body, **more, stream=True)
        assert streamed == found
        assert found["text_offset"][0] == (0 if echo else len(prompt))
        assert found["text_offset"] == sorted(found["text_offset"])
        for name, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert name.startswith("bytes:") or full.startswith(name, offset), (name, offset)


def test_logprobs_of_a_prompt_given_as_ids_that_split_a_character(client: TestClient, tokenizer: Tokenizer) -> None:
    ids = [token for token in range(256) if tokenizer.piece(token) in (b"\xe5", b"\x93")]
    (found,) = logprobs_of(client, prompt=[*ids, *tokenizer.encode("a")], max_tokens=0, echo=True)
    assert found["tokens"][-1] == "a" and all(name.startswith("bytes:\\x") for name in found["tokens"][:-1])
    assert found["text_offset"][0] == 0


def test_logprobs_do_not_change_the_text(client: TestClient) -> None:
    body = {"prompt": PROMPT, **PARAMS}
    plain, scored = (
        client.post("/v1/completions", json={**body, **more}).json()["choices"][0]["text"]
        for more in ({}, {"logprobs": 5})
    )
    assert plain == scored


def test_twenty_alternatives_can_be_asked_for(client: TestClient) -> None:
    (found,) = logprobs_of(client, max_tokens=3, logprobs=20, temperature=0)
    assert [len(top) for top in found["top_logprobs"]] == [20, 20, 20]


def test_best_of_answers_the_samples_with_the_highest_mean_logprob(client: TestClient) -> None:
    body = {"prompt": [PROMPT, "a"], "max_tokens": 8, "seed": 5}
    every = client.post("/v1/completions", json={**body, "n": 6, "logprobs": 0}).json()["choices"]
    for more in ({}, {"logprobs": 2}):
        answer = client.post("/v1/completions", json={**body, "n": 2, "best_of": 6, **more}).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        for first, choices in ((0, every[:6]), (2, every[6:])):
            means = {choice["text"]: sum(choice["logprobs"]["token_logprobs"]) / 8 for choice in choices}
            best = sorted(means, key=means.__getitem__, reverse=True)[:2]
            assert [choice["text"] for choice in answer["choices"][first : first + 2]] == best
        assert answer["usage"]["completion_tokens"] == 2 * 6 * 8
        assert (answer["choices"][0]["logprobs"] is None) is (not more)
        stream = events(client.post("/v1/completions", json={**body, "n": 2, "best_of": 6, **more, "stream": True}))
        assert [chunk["choices"][0] for chunk in stream] == answer["choices"]
    for best_of in (1, 6):
        same = client.post("/v1/completions", json={**body, "n": 6, "best_of": best_of}).json()["choices"]
        assert [choice["text"] for choice in same] == [choice["text"] for choice in every]
