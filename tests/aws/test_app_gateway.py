"""The app's backend against the gateway: an address and a token are all it needs."""

from __future__ import annotations

from typing import Any

import pytest
from aws_fakes import FakeContainer, wait_for, words
from local_stack import Quotas, Stack

from config import GenerationParams
from ui.backends import BackendError, BackendLocation, BackendLost, connect, description
from ui.background import BackgroundGeneration
from ui.settings import recommended_settings


def bare(stack: Stack) -> str:
    return stack.url.partition("?")[0]


def test_words_come_before_the_end_and_every_sample_is_whole(stack: Stack, container: FakeContainer) -> None:
    container.pace, container.produced = 0.02, 0
    updates, before = [], 0
    for update in connect(BackendLocation("gateway", stack.url)).write(
        "It was", GenerationParams(max_tokens=30, n=2, seed=5)
    ):
        if update.kind == "text" and not before:
            before = container.produced
        updates.append(update)
    assert 0 < before < 60
    assert (updates[0].kind, updates[0].seed, updates[0].prompt_tokens) == ("started", 5, 2)
    for index in range(2):
        text = "".join(update.text for update in updates if update.kind == "text" and update.index == index)
        assert text == "".join(words("It was", 30, index))
    assert [(update.index, update.reason) for update in updates if update.kind == "ended"] == [
        (0, "length"),
        (1, "length"),
    ]


def test_the_key_travels_in_the_address_or_in_a_header(stack: Stack, container: FakeContainer) -> None:
    generation = BackgroundGeneration(
        connect(BackendLocation("gateway", bare(stack), "local")), "It was", GenerationParams(max_tokens=2)
    ).start()
    generation.join(10)
    assert generation.status == "done" and generation.samples[0].text == "".join(words("It was", 2))
    for place in (BackendLocation("gateway", bare(stack)), BackendLocation("gateway", bare(stack), "wrong")):
        with pytest.raises(BackendError, match="the key was not accepted"):
            connect(place).write("It was", GenerationParams())


def test_the_model_behind_the_gateway_is_described(container: FakeContainer) -> None:
    own = {"temperature": {"default": 0.8}, "top_k": {"default": 50}, "style": {"default": "", "examples": ["ash"]}}
    own |= {"max_tokens": {"default": 9, "maximum": 500}, "n": {"default": 1, "maximum": 3}}
    with FakeContainer() as fake, Stack(fake.url) as stack:
        fake.described = {"model": "ours (9 steps)", "context": 64, "settings": own}
        place = BackendLocation("gateway", bare(stack), "local")
        backend = connect(place)
        assert backend.styles == ["ash"] and description(place)["model"] == "ours (9 steps)"
        seen = backend.visible_text("x" * 400, GenerationParams(max_tokens=9))
        assert seen is not None and seen.context == 64
        found = recommended_settings(place)
        assert (found["temperature"], found["top_k"], found["top_p"]) == (0.8, 50, 0.95) and fake.asked == 1


def test_nothing_is_recommended_where_the_container_is_older(stack: Stack, container: FakeContainer) -> None:
    place = BackendLocation("gateway", stack.url)
    assert recommended_settings(place) == {} and connect(place).styles == []


def test_stopping_ends_the_endpoints_work_and_keeps_the_words(stack: Stack, container: FakeContainer) -> None:
    generation = BackgroundGeneration(
        connect(BackendLocation("gateway", stack.url)), "It was", GenerationParams(max_tokens=2000)
    ).start()
    wait_for(lambda: generation.tokens > 3)
    generation.cancel()
    generation.join(10)
    assert generation.status == "stopped" and generation.samples[0].reason == "cancelled"
    assert generation.samples[0].text == "".join(words("It was", generation.tokens))
    wait_for(lambda: container.running == 0)


def test_gathered_tokens_are_counted(stack: Stack, container: FakeContainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUSH_MS", "5000")
    generation = BackgroundGeneration(
        connect(BackendLocation("gateway", stack.url)), "It was", GenerationParams(max_tokens=12)
    ).start()
    generation.join(10)
    assert generation.samples[0].tokens == 12


@pytest.mark.parametrize("fault", ["abort", "ended"])
def test_an_endpoint_that_dies_in_mid_story_is_waited_for(
    stack: Stack, container: FakeContainer, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("ui.background.RETRY_S", 0.05)
    container.fault = fault
    generation = BackgroundGeneration(
        connect(BackendLocation("gateway", stack.url)), "It was", GenerationParams(max_tokens=9)
    ).start()
    wait_for(lambda: generation.status == "lost")
    kept = generation.samples[0].text
    assert kept.startswith("".join(words("It was", 3))) and generation.message
    container.fault = ""
    generation.join(15)
    assert generation.status == "done" and generation.samples[0].text.startswith(kept) and generation.tokens == 9
    assert container.requests[1]["prompt"] == "It was" + "".join(words("It was", 3))


def test_a_gateway_that_dies_in_mid_story_is_waited_for(
    container: FakeContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ui.background.RETRY_S", 0.05)
    monkeypatch.setattr("ui.background.MAX_RETRY_S", 0.2)
    container.pace = 0.03
    with Stack(container.url) as stack:
        port = stack.port
        generation = BackgroundGeneration(
            connect(BackendLocation("gateway", stack.url)), "It was", GenerationParams(max_tokens=500)
        ).start()
        wait_for(lambda: generation.tokens > 3)
    wait_for(lambda: generation.status == "lost")
    kept = generation.samples[0].text
    with Stack(container.url, port=port):
        wait_for(lambda: len(generation.samples[0].text) > len(kept) + 10)
        assert generation.status == "running" and generation.samples[0].text.startswith(kept)
        generation.cancel()
        generation.join(10)
    assert generation.status == "stopped"


@pytest.mark.parametrize(("burst", "said"), [(1, "Too Many Requests"), (0.5, "429")])
def test_what_the_gateway_itself_refuses_is_told_at_once(container: FakeContainer, burst: float, said: str) -> None:
    with Stack(container.url, quotas=Quotas(rate=0.001, burst=burst)) as stack:
        with pytest.raises(BackendLost, match=said):
            list(connect(BackendLocation("gateway", stack.url)).write("It was", GenerationParams()))
    assert not container.requests


def test_a_whole_answer_of_an_endpoint_that_cannot_stream(container: FakeContainer) -> None:
    with Stack(container.url, serverless=True) as stack:
        generation = BackgroundGeneration(
            connect(BackendLocation("gateway", stack.url)), "It was", GenerationParams(max_tokens=6, n=2)
        ).start()
        generation.join(15)
    texts: list[Any] = [sample.text for sample in generation.samples]
    assert generation.status == "done" and texts == ["".join(words("It was", 6, index)) for index in range(2)]
