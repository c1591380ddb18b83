"""OpenAI's own client as a contract test, and the OpenAPI document under schemathesis."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import api
from inference.engine import Engine
from model import GPT
from support.api_support import PROMPT, openai_client, running, settings, until
from tokenizer import Tokenizer


def test_openai_client_completes(live: str, tokenizer: Tokenizer) -> None:
    with openai_client(live) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=3)
        assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
        assert whole.choices[0].finish_reason == "length" and whole.choices[0].text
        assert whole.usage is not None and whole.usage.completion_tokens == 12
        again = client.completions.create(
            model="tiny", prompt=tokenizer.encode(PROMPT), max_tokens=12, seed=3, extra_body={"top_k": -1, "min_p": 0}
        )
        assert again.choices[0].text == whole.choices[0].text
        only = client.completions.create(
            model="tiny", prompt="a", max_tokens=3, logit_bias={str(tokenizer.encode("b")[0]): 100}
        )
        assert only.choices[0].text == "bbb"
        asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        penalised = client.completions.create(**asked, presence_penalty=2, frequency_penalty=2).choices[0].text
        assert penalised != client.completions.create(**asked, presence_penalty=None).choices[0].text
        many = client.completions.create(model="tiny", prompt=[PROMPT, "a"], n=2, max_tokens=5, seed=3)
        assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
        assert client.completions.create(model="tiny", prompt="a", seed=1).usage.completion_tokens == 16  # type: ignore[union-attr]
        stopped = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, seed=3, stop=whole.choices[0].text[2:4]
        )
        assert stopped.choices[0].finish_reason == "stop"
        assert whole.choices[0].text.startswith(stopped.choices[0].text)


def test_openai_client_streams(live: str) -> None:
    with openai_client(live) as client:
        asked: dict[str, Any] = {"model": "tiny", "prompt": [PROMPT, "a"], "n": 2, "max_tokens": 9, "seed": 3}
        whole = client.completions.create(**asked)
        pieces = ["", "", "", ""]
        reasons: dict[int, str | None] = {}
        usage = None
        for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                pieces[choice.index] += choice.text
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
        assert pieces == [choice.text for choice in whole.choices]
        assert reasons == dict.fromkeys(range(4), "length")
        assert usage is not None and usage == whole.usage


def test_openai_client_logprobs_and_echo(live: str, model: GPT, tokenizer: Tokenizer) -> None:
    with openai_client(live) as client:
        done = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=6, logprobs=2, echo=True, temperature=0
        )
        choice = done.choices[0]
        found = choice.logprobs
        assert choice.text.startswith(PROMPT) and found is not None
        prompt = tokenizer.encode(PROMPT)
        assert len(found.tokens or []) == len(prompt) + 6
        assert found.token_logprobs is not None and found.token_logprobs[0] is None
        logp = model(torch.tensor([prompt]))[0].log_softmax(-1).detach()
        for at in range(1, len(prompt)):
            assert found.token_logprobs[at] == pytest.approx(float(logp[at - 1, prompt[at]]), abs=1e-4)
        assert found.token_logprobs[len(prompt)] == pytest.approx(float(logp[-1].max()), abs=1e-4)
        assert found.top_logprobs is not None and len(found.top_logprobs[-1]) in (2, 3)
        assert found.text_offset is not None and found.text_offset == sorted(found.text_offset)
        assert found.text_offset[len(prompt)] == len(PROMPT)
        scored = client.completions.create(model="tiny", prompt=prompt, max_tokens=0, logprobs=1, echo=True)
        assert scored.choices[0].text == PROMPT and len(scored.choices[0].logprobs.tokens or []) == len(prompt)  # type: ignore[union-attr]
        streamed = list(
            client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=6, logprobs=2, echo=True, temperature=0, stream=True
            )
        )
        assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
        parts = [chunk.choices[0].logprobs.tokens or [] for chunk in streamed if chunk.choices[0].logprobs]
        assert [token for part in parts for token in part] == found.tokens


def test_openai_client_errors(live: str, engine: Engine) -> None:
    import openai

    with openai_client(live) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="tiny", prompt="x", temperature=3)
        assert bad.value.param == "temperature" and bad.value.code == "less_than_equal" and bad.value.request_id
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve("gpt-9")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-9", prompt="x")
        with pytest.raises(openai.NotFoundError, match="use /v1/completions"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
    with (
        running(api.create_app(settings(api_keys="good"), engine)) as address,
        openai_client(address) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_openai_client_raises_when_a_stream_fails_midway(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai

    app = api.create_app(settings(), engine)
    with running(app) as address, openai_client(address) as client:
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4000, stream=True)
        next(iter(stream))
        for generation in list(app.state.service.generations):
            generation.interrupt()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert until(lambda: engine.stats()["running"] == 0)


def beyond_the_bounds_of_a_seed(body: Any) -> bool:
    """Whether a seed is above its maximum of 2**63 - 1: schemathesis counts some above it as valid, as a float cannot tell."""
    seeds = [body.get(name) for name in ("seed", "sampler_seed")] if isinstance(body, dict) else []
    return any(isinstance(seed, int) and seed >= 2**63 for seed in seeds)


def test_schemathesis_finds_nothing(engine: Engine) -> None:
    import hypothesis
    import schemathesis
    from hypothesis import HealthCheck

    limits = settings(max_tokens=8, max_n=2, max_prompts=3, max_prompt_chars=200, stall_s=5)
    app = api.create_app(limits, engine)
    with TestClient(app):
        document = schemathesis.openapi.from_asgi("/openapi.json", app)
        operations = [result.ok() for result in document.get_all_operations()]
        modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        for operation, mode in itertools.product(operations, modes):
            if mode == schemathesis.GenerationMode.NEGATIVE and operation.method.upper() == "GET":
                continue  # nothing in it could be wrong

            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            @hypothesis.settings(
                max_examples=12,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            def check(case: Any) -> None:
                hypothesis.assume(not beyond_the_bounds_of_a_seed(case.body))
                case.call_and_validate()

            check()
    assert len(operations) == 33
