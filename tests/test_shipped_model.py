"""A model under models/ writes until there is a run of one's own: at the terminal, in the server and in the app."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import streamlit as st
from starlette.testclient import TestClient

import api
import generate
from server import lifecycle
from support.api_support import settings, until
from support.tiny_models import random_model, save, shape, tiny_tokenizer
from ui import state

SHIPPED, OWN = ("models", "victorian-mini"), ("runs", "mine", "best")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with nothing but a model under models/, seen from another folder."""
    tokenizer = tiny_tokenizer()
    save(tmp_path.joinpath(*SHIPPED), random_model(shape(tokenizer)), tokenizer)
    for module in (generate, lifecycle):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def add_own(root: Path) -> None:
    """A run that is older than the shipped model, as after a fresh `git pull`; it says what the other cannot."""
    import os

    tokenizer = tiny_tokenizer()
    folder = save(root.joinpath(*OWN), random_model(shape(tokenizer), seed=1), tokenizer)
    os.utime(folder / "config.json", (1e9, 1e9))
    (root / "runs" / "only-begun").mkdir()


def written(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert generate.main(["--prompt", "It was", "--max-tokens", "8", "--seed", "3"]) == 0
    return capsys.readouterr().out


def test_generate_writes_with_the_shipped_model_and_then_with_the_run(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = written(root, capsys)
    add_own(root)
    own = written(root, capsys)
    assert shipped != own
    for parts, text in ((SHIPPED, shipped), (OWN, own)):
        words = ["--model", str(root.joinpath(*parts)), "--prompt", "It was", "--max-tokens", "8", "--seed", "3"]
        assert generate.main(words) == 0 and capsys.readouterr().out == text


@pytest.mark.parametrize(("own", "name"), [(False, "victorian-mini"), (True, "mine")])
def test_the_server_serves_it(root: Path, own: bool, name: str) -> None:
    if own:
        add_own(root)
    with TestClient(api.create_app(settings())) as client:
        assert until(lambda: client.get("/health").status_code == 200, 60)
        assert client.get("/v1/models").json()["data"][0]["id"] == name


def test_the_app_begins_with_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for name in ("runs", "models") for word in (f"--{name}", str(root / name))]
    monkeypatch.setattr(sys, "argv", ["app.py", *words])
    st.cache_resource.clear()
    place = state.default_place()
    assert place is not None and Path(place.where) == root.joinpath(*SHIPPED)
    add_own(root)
    place = state.default_place()
    assert place is not None and Path(place.where) == root.joinpath(*OWN)
    assert [found.label for found in state.found_models()] == ["victorian-mini", "mine · best"]
    st.cache_resource.clear()
