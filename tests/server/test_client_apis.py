"""KoboldAI's and llama.cpp's APIs: the same text as `/generate`, in each client's names, framing and probabilities."""

from __future__ import annotations

import json
import math
import threading
from random import Random
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import api
from config import GenerationParams
from inference.engine import Engine
from model import GPT
from sampling import TokenHistory, filter_logits, sample, sample_seed
from server.client_bodies import CompletionBody, KoboldBody, LlamaBody
from support.api_support import PARAMS, PROMPT, events, kobold_events, running, settings, until
from support.malformed import ROUTES, variation
from tokenizer import END_OF_TEXT, Tokenizer

# every sampling setting under its own name, and under each API's
ALL: dict[str, Any] = {
    "max_tokens": 30,
    "seed": 11,
    "temperature": 1.4,
    "top_k": 60,
    "top_p": 0.95,
    "min_p": 0.01,
    "typical_p": 0.9,
    "top_n_sigma": 0.3,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.05,
    "dry_multiplier": 0.8,
    "dry_base": 1.5,
    "dry_allowed_length": 1,
    "dry_sequence_breakers": ["\n", "."],
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.15,
    "penalty_last_n": 20,
    "logit_bias": {"40": 2.0, "41": -100.0},
}
KOBOLD = {
    "max_tokens": "max_length",
    "seed": "sampler_seed",
    "typical_p": "typical",
    "top_n_sigma": "nsigma",
    "repetition_penalty": "rep_pen",
    "penalty_last_n": "rep_pen_range",
}
LLAMA = {"max_tokens": "n_predict", "repetition_penalty": "repeat_penalty", "penalty_last_n": "repeat_last_n"}
OPENAI = {
    "typical_p": "typical",
    "top_n_sigma": "nsigma",
    "repetition_penalty": "rep_pen",
    "penalty_last_n": "repetition_penalty_range",
}


def renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}


def post(client: TestClient, path: str, body: Any, status: int = 200) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def generated(client: TestClient, **body: Any) -> str:
    text: str = post(client, "/generate", {"prompt": PROMPT, **body})["generated_text"]
    return text


def kobold(client: TestClient, stream: bool = False, **body: Any) -> Any:
    """The answer's first result; of a stream its events."""
    body = {"prompt": PROMPT, **body}
    if not stream:
        return post(client, "/api/v1/generate", body)["results"][0]
    answer = client.post("/api/extra/generate/stream", json=body)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    found = kobold_events(answer.text)
    assert {name for name, _ in found} == {"message"}
    return [data for _, data in found]


def llama(client: TestClient, stream: bool = False, **body: Any) -> Any:
    body = {"prompt": PROMPT, **body}
    if not stream:
        return post(client, "/completion", body)
    return events(client.post("/completion", json={**body, "stream": True}))


def test_every_setting_means_the_same_under_each_clients_names(client: TestClient) -> None:
    expected = generated(client, **ALL)
    assert kobold(client, **renamed(ALL, KOBOLD))["text"] == expected
    assert kobold(client, **ALL)["text"] == expected
    assert llama(client, **renamed(ALL, LLAMA))["content"] == expected
    asked = {"prompt": PROMPT, **renamed(ALL, OPENAI)}
    assert post(client, "/v1/completions", asked)["choices"][0]["text"] == expected
    twice = {"seed": 3, "max_tokens": 2, "typical_p": "none", "repetition_penalty": []}  # the client's own name wins
    assert kobold(client, **{**renamed(ALL, KOBOLD), **twice})["text"] == expected
    pairs = [[40, 2.0], [41, False]]
    assert llama(client, **renamed({**ALL, "logit_bias": pairs}, LLAMA))["content"] == expected
    breakers = json.dumps(ALL["dry_sequence_breakers"])
    assert (
        post(client, "/v1/completions", {**asked, "dry_sequence_breakers": breakers})["choices"][0]["text"] == expected
    )
    for name in {*KOBOLD, *LLAMA, *OPENAI}:  # and each of them counts
        less = {key: value for key, value in ALL.items() if key != name}
        assert generated(client, **less) != expected, name


@pytest.mark.parametrize("stop", [[], ["was", "zzz"]])
def test_streams_give_the_same_text_as_whole_answers(client: TestClient, stop: list[str]) -> None:
    expected = generated(client, **PARAMS, stop=stop)
    whole = kobold(client, **renamed(PARAMS, KOBOLD), stop_sequence=stop)
    streamed = kobold(client, stream=True, **renamed(PARAMS, KOBOLD), stop_sequence=stop)
    assert whole["text"] == expected == "".join(event["token"] for event in streamed)
    reason = "stop" if stop else "length"
    assert whole["finish_reason"] == streamed[-1]["finish_reason"] == reason
    assert {event["finish_reason"] for event in streamed[:-1]} == {None}
    whole = llama(client, **renamed(PARAMS, LLAMA), stop=stop, return_tokens=True)
    streamed = llama(client, stream=True, **renamed(PARAMS, LLAMA), stop=stop)
    assert whole["content"] == expected == "".join(event["content"] for event in streamed)
    assert [event["stop"] for event in streamed] == [False] * (len(streamed) - 1) + [True]
    assert whole["tokens"] == [token for event in streamed for token in event["tokens"]]
    for final in (whole, streamed[-1]):
        assert (final["stop_type"], final["stopping_word"]) == (("word", "was") if stop else ("limit", ""))
        assert final["tokens_predicted"] == len(whole["tokens"]) and final["generation_settings"]["seed"] == 7
        assert final["generation_settings"]["n_predict"] == 24 and final["prompt"] == PROMPT


def test_a_stop_string_can_be_shown(client: TestClient) -> None:
    asked = {**renamed(PARAMS, KOBOLD), "stop_sequence": ["was"]}
    hidden = kobold(client, **asked)["text"]
    assert kobold(client, **asked, trim_stop=False)["text"] == hidden + "was"
    assert "".join(event["token"] for event in kobold(client, stream=True, **asked, trim_stop=False)) == hidden + "was"


@pytest.mark.parametrize("stop", [[], ["was"]])
def test_probabilities_join_to_the_text_and_agree_with_openais(client: TestClient, stop: list[str]) -> None:
    asked = {**PARAMS, "repetition_penalty": 1.2, "stop": stop}
    reference = post(client, "/v1/completions", {"prompt": PROMPT, **asked, "logprobs": 5})["choices"][0]
    expected = reference["logprobs"]["token_logprobs"]
    whole = llama(client, **asked, n_probs=5)
    entries = whole["completion_probabilities"]
    content = kobold(client, **asked, logprobs=True)["logprobs"]["content"]
    parts = llama(client, stream=True, **asked, n_probs=5)
    streamed = [part["completion_probabilities"][0] for part in parts if "completion_probabilities" in part]
    assert entries == content
    assert "".join(entry["token"] for entry in entries) == whole["content"] == reference["text"]
    assert [entry["logprob"] for entry in streamed] == expected
    assert [entry["logprob"] for entry in entries] == expected[: len(entries)]
    spelled = bytes(byte for entry in streamed for byte in entry["bytes"]).decode(errors="replace")
    assert spelled == reference["text"] + "".join(stop)
    ends = len(PROMPT) + len(reference["text"])
    assert len(entries) == sum(
        offset < ends for offset in reference["logprobs"]["text_offset"]
    )  # none of the stop string
    for entry, top in zip(entries, reference["logprobs"]["top_logprobs"], strict=False):
        values = sorted((other["logprob"] for other in entry["top_logprobs"]), reverse=True)
        assert len(values) == 5 and values == sorted(top.values(), reverse=True)[:5]
        own = [other for other in entry["top_logprobs"] if other["id"] == entry["id"]]
        assert all(other["token"] == entry["token"] and other["logprob"] == entry["logprob"] for other in own)
    kobold_parts = kobold(client, stream=True, **asked, logprobs=10)
    assert [part["logprob"] for part in kobold_parts if "logprob" in part] == expected
    assert len(kobold_parts[0]["top_logprobs"]) == 10
    assert "logprob" not in kobold(client, stream=True, **asked)[0] and kobold(client, **asked)["logprobs"] is None
    assert "completion_probabilities" not in llama(client, **asked)


@pytest.mark.parametrize("more", [{}, {"xtc_probability": 0.5, "xtc_threshold": 0.01}, {"temperature": 0}])
def test_probabilities_after_sampling_are_those_the_filters_leave(
    client: TestClient, model: GPT, tokenizer: Tokenizer, more: dict[str, Any]
) -> None:
    asked = {**PARAMS, "max_tokens": 8, "top_k": 12, "repetition_penalty": 1.3, **more}
    whole = llama(client, **asked, n_probs=20, post_sampling_probs=True, return_tokens=True)
    assert whole["content"] == generated(client, **asked)
    streamed = llama(client, stream=True, **asked, n_probs=20, post_sampling_probs=True)
    entries = [part["completion_probabilities"][0] for part in streamed if "completion_probabilities" in part]
    assert [entry["id"] for entry in entries] == whole["tokens"]
    assert [entry["prob"] for entry in entries] == [entry["prob"] for entry in whole["completion_probabilities"]]
    params = GenerationParams(**asked)
    generator = torch.Generator().manual_seed(sample_seed(7, 0))
    ids = tokenizer.encode(PROMPT)
    history = TokenHistory(ids, len(ids), tokenizer)
    for entry in entries:
        logits = model(torch.tensor([ids]))[0, -1].detach()
        before = generator.get_state()
        kept = filter_logits(logits, params, history, generator).softmax(-1)
        generator.set_state(before)
        top = {one["id"]: one["prob"] for one in entry["top_probs"]}
        assert set(top) == set(kept.nonzero().flatten().tolist()) and len(top) <= 12
        assert sum(top.values()) == pytest.approx(1)
        assert all(value == pytest.approx(float(kept[id]), abs=1e-4) for id, value in top.items())
        assert entry["prob"] == top[entry["id"]]
        assert sample(logits, params, generator, history) == entry["id"]
        ids.append(entry["id"])


def test_end_of_text_has_its_entry_and_can_be_forbidden(ending: tuple[TestClient, GPT, Tokenizer]) -> None:
    client, _, tokenizer = ending
    asked = {"temperature": 0, "max_tokens": 5, "repetition_penalty": 1}
    whole = llama(client, **asked, n_probs=2)
    assert (whole["content"], whole["stop_type"]) == ("", "eos")
    (entry,) = whole["completion_probabilities"]
    assert entry["id"] == tokenizer.eot and entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])
    assert llama(client, stream=True, **asked, n_probs=2)[0]["completion_probabilities"] == [entry]
    (part,) = kobold(client, stream=True, **asked, logprobs=True)
    assert (part["id"], part["token"], part["finish_reason"]) == (tokenizer.eot, "", "stop")
    written = llama(client, **asked, ignore_eos=True)
    assert written["tokens_predicted"] == 5 and written["stop_type"] == "limit"
    assert kobold(client, **asked, use_default_badwordsids=True)["text"] == written["content"]
    for name in ("ignore_eos", "ban_eos_token"):
        body = {"prompt": PROMPT, **asked, name: True}
        assert post(client, "/v1/completions", body)["choices"][0]["text"] == written["content"]


@pytest.mark.parametrize("seed", [-1, -(2**63)])
def test_a_negative_seed_is_a_new_one(client: TestClient, seed: int) -> None:
    asks = [
        lambda: kobold(client, sampler_seed=seed, max_length=20, temperature=1.5)["text"],
        lambda: llama(client, seed=seed, n_predict=20, temperature=1.5)["content"],
        lambda: post(client, "/v1/completions", {"prompt": PROMPT, "seed": seed, "max_tokens": 20})["choices"][0][
            "text"
        ],
    ]
    for ask in asks:
        assert ask() != ask()


@pytest.mark.parametrize(
    ("field", "value", "off"),
    [
        ("mirostat", 2, 0),
        ("tfs", 0.97, 1.0),
        ("top_a", 0.2, 0),
        ("dynatemp_range", 0.5, 0.0),
        ("smoothing_factor", 0.3, 0),
        ("grammar", "root ::= x", ""),
        ("banned_tokens", ["the"], []),
        ("guidance_scale", 2.0, 1),
        ("min_tokens", 3, 0),
        ("adaptive_target", 0.5, -0.01),
    ],
)
def test_what_would_change_the_text_is_refused_unless_it_is_off(
    client: TestClient, field: str, value: Any, off: Any
) -> None:
    for path in ("/api/v1/generate", "/api/extra/generate/stream", "/completion", "/v1/completions"):
        refused = post(client, path, {"prompt": PROMPT, "max_tokens": 2, field: value}, 400)["error"]["message"]
        assert refused.startswith(f"{field}: this server does not have it")
        for harmless in (off, None):
            answer = client.post(path, json={"prompt": PROMPT, "max_tokens": 2, field: harmless})
            assert answer.status_code == 200, answer.text


def test_ranges_of_other_servers(client: TestClient) -> None:
    expected = generated(client, **PARAMS | {"top_k": 0})
    for top_k in (-1, 0, 101, 5000):
        body = {"prompt": PROMPT, **PARAMS, "repetition_penalty": 1.2, "top_k": top_k}
        completed = post(client, "/v1/completions", body)["choices"][0]["text"]
        assert completed == llama(client, **PARAMS | {"top_k": top_k})["content"] == kobold(client, **body)["text"]
        assert top_k == 101 or completed == expected
    likeliest = generated(client, **PARAMS | {"temperature": 0})
    for end in ({"top_p": 0}, {"typical_p": 0}, {"min_p": 1}):
        narrow = llama(client, **PARAMS | end)["content"]
        assert "typical_p" in end or narrow == likeliest
        assert narrow == kobold(client, **PARAMS | end)["text"]
    off = {"top_n_sigma": -1, "xtc_probability": 1.0, "xtc_threshold": 0.6, "stop": [""]}
    assert llama(client, **PARAMS, **off)["content"] == generated(client, **PARAMS)
    assert llama(client, n_predict=-1, stop=["e"])["stop_type"] == "word"
    assert post(client, "/v1/completions", {"prompt": PROMPT, "model": "", "max_tokens": 2})["model"] == "tiny"


def test_llamas_windows_and_samplers_switch_off_what_they_leave_out(client: TestClient) -> None:
    asked = {**PARAMS, "repetition_penalty": 1.5, "presence_penalty": 1.0, "dry_multiplier": 2.0}
    plain = generated(client, **PARAMS, repetition_penalty=1)
    off = llama(client, **renamed(asked, LLAMA), repeat_last_n=0, dry_penalty_last_n=0)["content"]
    samplers = ["top_k", "temperature", "top_p"]
    assert off == llama(client, **renamed(asked, LLAMA), samplers=samplers)["content"] == plain
    assert llama(client, **renamed(asked, LLAMA), repeat_last_n=-1)["content"] == generated(client, **asked) != plain
    both = generated(client, **asked, penalty_last_n=12)  # where the two windows differ the wider one counts
    assert llama(client, **renamed(asked, LLAMA), repeat_last_n=5, dry_penalty_last_n=12)["content"] == both
    assert kobold(client, **asked, rep_pen_range=12, dry_penalty_last_n=5)["text"] == both
    without = generated(client, **PARAMS | {"top_p": 1.0})
    assert llama(client, **PARAMS, samplers=["penalties", "top_k", "temperature"])["content"] == without


def test_values_as_other_servers_write_them() -> None:
    limits, breakers = settings(), '["\\n", "."]'
    for body in (
        CompletionBody(prompt="x", dry_sequence_breakers=breakers),
        KoboldBody(dry_sequence_breakers=breakers),
    ):
        given = body.params(limits) if isinstance(body, CompletionBody) else body.params(limits, {})
        assert given.dry_sequence_breakers == ("\n", ".")
    stop = CompletionBody(prompt="x", stop='["a"]').params(limits).stop
    assert stop == ('["a"]',)  # only there a list is written as text
    off = LlamaBody(dry_multiplier=1.0, repeat_penalty=2.0, repeat_last_n=0, dry_penalty_last_n=0).params(limits, {})
    assert (off.dry_multiplier, off.repetition_penalty) == (0, 1)
    on = LlamaBody(dry_multiplier=1.0, repeat_penalty=2.0).params(limits, {"repetition_penalty": 1.3})
    assert (on.dry_multiplier, on.repetition_penalty, on.penalty_last_n) == (1, 2, 0)


def test_several_samples(client: TestClient) -> None:
    expected = [one["text"] for one in post(client, "/generate", {"prompt": PROMPT, **PARAMS, "n": 3})["samples"]]
    results = post(client, "/api/v1/generate", {"prompt": PROMPT, **PARAMS, "n": 3})["results"]
    assert [result["text"] for result in results] == expected
    assert [one["content"] for one in llama(client, **PARAMS, n=3)] == expected
    texts = ["", "", ""]
    for part in llama(client, stream=True, **PARAMS, n=3):
        texts[part["index"]] += part["content"]
    assert texts == expected
    assert "".join(part["token"] for part in kobold(client, stream=True, **PARAMS, n=3)) == expected[0]


def test_a_prompt_is_cut_to_what_the_client_asks(client: TestClient, tokenizer: Tokenizer) -> None:
    long = "The fog lay upon the river. " * 20
    ids = tokenizer.encode(long)
    asked = {**PARAMS, "max_tokens": 8}
    memory = "The lamps. "
    kept = len(tokenizer.encode(memory))
    whole = tokenizer.encode(memory + long)
    room = 64 - 8  # of the model's context
    expected = generated(client, prompt=memory + long, **asked, keep=kept)
    assert kobold(client, prompt=long, memory=memory, **asked)["text"] == expected
    assert (
        expected
        == post(
            client,
            "/v1/completions",
            {"prompt": whole[:kept] + whole[kept - room :], **asked, "repetition_penalty": 1.2},
        )["choices"][0]["text"]
    )
    short = kobold(client, prompt=long, **asked, max_context_length=30)
    assert short["prompt_tokens"] == 22
    body = {**asked, "repetition_penalty": 1.2}
    for prompt in (long, ids):
        answer = client.post("/v1/completions", json={"prompt": prompt, **body, "truncate_prompt_tokens": 22})
        assert answer.json()["choices"][0]["text"] == short["text"] and answer.json()["usage"]["prompt_tokens"] == 22
        assert answer.json()["truncated"] is True and answer.headers["x-prompt-truncated"] == "true"
    for more, cut in (
        ({"truncate_prompt_tokens": -1}, True),
        ({}, True),
        ({"prompt": PROMPT, "truncate_prompt_tokens": 50}, False),
    ):
        answer = client.post("/v1/completions", json={"prompt": long, **body, **more})
        assert answer.json()["truncated"] is cut and answer.headers["x-prompt-truncated"] == str(cut).lower()
        stream = client.post("/v1/completions", json={"prompt": long, **body, **more, "stream": True})
        assert stream.headers["x-prompt-truncated"] == str(cut).lower()
        assert {part["truncated"] for part in events(stream)} == {cut}
    assert llama(client, prompt=long, **asked)["truncated"] is True and llama(client, **asked)["truncated"] is False


def test_texts_are_found_again_by_their_genkey(engine: Engine) -> None:
    with (
        running(api.create_app(settings(), engine)) as address,
        TestClient(api.create_app(settings(), engine)) as other,
    ):
        import httpx2 as httpx

        with httpx.Client(base_url=address, timeout=30) as client:

            def ask(path: str, genkey: str | None) -> Any:
                return client.post(path, **({} if genkey is None else {"json": {"genkey": genkey}})).json()

            for genkey in (None, "KCPP1"):
                asked = {"prompt": PROMPT, "max_length": 4000, "genkey": genkey, "logprobs": True}
                found: list[str] = []

                def read(asked: dict[str, Any], found: list[str]) -> None:
                    with httpx.Client(base_url=address, timeout=60) as reader:
                        found.append(reader.post("/api/extra/generate/stream", json=asked).text)

                thread = threading.Thread(target=read, args=(asked, found))
                thread.start()
                assert until(lambda key=genkey: ask("/api/extra/generate/check", key)["results"][0]["text"] != "")
                assert ask("/api/extra/abort", "KCPP2") == {"success": False}
                assert other.post("/api/extra/abort").json() == {"success": False}  # another server
                assert ask("/api/extra/abort", genkey) == {"success": True}
                thread.join(30)
                text = "".join(data["token"] for _, data in kobold_events(found[0]))
                assert ask("/api/extra/generate/check", genkey)["results"][0]["text"] == text
                content = ask("/api/extra/last_logprobs", genkey)["logprobs"]["content"]
                assert "".join(entry["token"] for entry in content) == text
                assert ask("/api/extra/abort", genkey) == {"success": False}
            assert until(lambda: engine.stats()["running"] == 0)


def test_only_the_last_texts_are_remembered(client: TestClient) -> None:
    from server.routes.kobold import REMEMBERED

    for number in range(REMEMBERED + 2):
        kobold(client, max_length=2, genkey=f"old{number}", logprobs=True)
    found = [
        client.post("/api/extra/last_logprobs", json={"genkey": f"old{number}"}).json()["logprobs"] is not None
        for number in range(REMEMBERED + 2)
    ]
    assert found == [False, False] + [True] * REMEMBERED


def test_what_clients_ask_before_they_write(client: TestClient) -> None:
    def get(path: str) -> Any:
        answer = client.get(path)
        assert answer.status_code == 200 and client.head(path).status_code == 200
        return answer.json()

    assert get("/api/v1/model") == {"result": "tiny"}
    assert get("/api/v1/info/version")["result"] >= "1.2.4"  # from which Kobold Lite sends stop strings
    assert get("/api/v1/config/max_context_length") == get("/api/extra/true_max_context_length") == {"value": 64}
    assert get("/api/v1/config/max_length") == {"value": 200}
    version = get("/api/extra/version")
    assert version["result"] == "KoboldCpp" and version["protected"] is False and version["vision"] is False
    assert get("/api/extra/perf")["idle"] == 1
    props = get("/props")
    assert props["default_generation_settings"]["n_ctx"] == 64 and props["total_slots"] == 16
    assert props["default_generation_settings"]["params"]["repeat_penalty"] == 1.2
    assert props["chat_template"] == "" and props["model_path"] == "tiny"
    assert get("/health")["status"] == "ok"


def test_tokenizer_routes(ending: tuple[TestClient, GPT, Tokenizer]) -> None:
    client, _, tokenizer = ending
    text = f"The “fog”{END_OF_TEXT}<|dickens|>é"
    plain = post(client, "/tokenize", {"content": text, "parse_special": False})["tokens"]
    assert plain == tokenizer.encode(text)
    special = post(client, "/tokenize", {"prompt": text, "add_special_tokens": False})
    assert special["count"] == len(special["tokens"]) < len(plain) and special["max_model_len"] == 64
    assert {tokenizer.eot, tokenizer.controls["<|dickens|>"]} < set(special["tokens"])
    for ids in (plain, special["tokens"]):
        both = post(client, "/detokenize", {"tokens": ids})
        assert both == {"content": text, "prompt": text}
        assert post(client, "/api/extra/detokenize", {"ids": ids}) == {"result": text, "success": True}
    pieces = post(client, "/tokenize", {"content": "œ", "with_pieces": True})["tokens"]
    assert [bytes(one["piece"]) for one in pieces] == [b"\xc5", b"\x93"]
    info = client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["vocab_size"]) == (END_OF_TEXT, tokenizer.vocab_size)
    assert post(client, "/tokenize", {"prompt": info["eos_token"]})["tokens"] == [tokenizer.eot]
    counted = post(client, "/api/extra/tokencount", {"prompt": PROMPT, "special": False})
    assert counted == {"value": len(counted["ids"]), "ids": tokenizer.encode(PROMPT)}
    assert post(client, "/api/extra/tokencount", {"prompt": PROMPT})["ids"] == [tokenizer.eot, *counted["ids"]]
    post(client, "/detokenize", {"tokens": [tokenizer.vocab_size]}, 400)


def test_keys_limits_and_origins_hold_on_every_route(engine: Engine) -> None:
    limits = settings(api_keys="good", max_tokens=50, max_prompt_chars=100, origins="https://pages.example")
    with TestClient(api.create_app(limits, engine)) as client:
        posts = ("/api/v1/generate", "/api/extra/generate/stream", "/completion", "/tokenize", "/detokenize")
        posts += ("/api/extra/tokencount", "/api/extra/abort", "/api/extra/generate/check", "/api/extra/last_logprobs")
        gets = ("/props", "/tokenizer_info", "/api/v1/model", "/api/extra/version", "/api/extra/perf")
        key = {"Authorization": "Bearer good"}
        for path in (*posts, *gets):
            answer = client.request("GET" if path in gets else "POST", path)
            assert answer.status_code == 401, path
            origin = {"Origin": "https://pages.example", "Access-Control-Request-Method": "POST"}
            allowed = client.options(path, headers={**origin, "Access-Control-Request-Headers": "x-stainless-os"})
            assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"]
        for path, name in (("/api/v1/generate", "max_length"), ("/completion", "n_predict")):
            refused = client.post(path, json={"prompt": "x", name: 51}, headers=key).json()["error"]
            assert refused["code"] == "limit_exceeded"
            long = client.post(path, json={"prompt": "x" * 101}, headers=key)
            assert long.status_code == 400 and long.json()["error"]["code"] == "prompt_too_long"
        assert (
            client.post("/completion", json={"prompt": "x", "n_predict": -1}, headers=key).json()["tokens_predicted"]
            == 50
        )
        assert client.post("/completion", json={"prompt": ["x", "y"]}, headers=key).status_code == 400
        assert client.get("/api/extra/version", headers=key).json()["protected"] is True


def test_a_stream_that_fails_midway_says_so(engine: Engine) -> None:
    import httpx2 as httpx

    app = api.create_app(settings(), engine)
    with running(app) as address:
        for path, name in (("/completion", "n_predict"), ("/api/extra/generate/stream", "max_length")):
            body = {"prompt": PROMPT, name: 4000, "stream": True}
            with httpx.stream("POST", address + path, json=body, timeout=30) as answer:
                lines = answer.iter_lines()
                next(lines)
                for generation in list(app.state.service.generations):
                    generation.interrupt()
                last = [line for line in lines if line][-2:]
            assert "shutting down" in last[1] and "error" in last[1]
            assert (last[0] == "event: error") is (path != "/completion")
        assert until(lambda: engine.stats()["running"] == 0)


@pytest.mark.parametrize("path", ROUTES)
def test_malformed_requests_are_refused_or_answered(engine: Engine, path: str) -> None:
    limits = settings(max_tokens=4, max_n=2, max_prompt_chars=400)
    with TestClient(api.create_app(limits, engine), raise_server_exceptions=False) as client:
        rng, statuses = Random(path), set()
        for _ in range(60):
            data, headers = variation(rng, ROUTES[path])
            answer = client.post(path, content=data, headers=headers)
            statuses.add(answer.status_code)
            assert answer.status_code in (200, 400), (answer.text, data)
            assert answer.status_code == 200 or answer.json()["error"]["message"]
        assert statuses == {200, 400}
        assert not client.app.state.service.generations  # type: ignore[attr-defined]
    assert until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)


def test_logprobs_are_natural_logarithms(client: TestClient) -> None:
    entries = llama(client, n_predict=3, n_probs=50)["completion_probabilities"]
    for entry in entries:
        assert 0.1 < sum(math.exp(top["logprob"]) for top in entry["top_logprobs"]) < 1
