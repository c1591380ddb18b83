"""Beyond this machine the app shows nothing before the password, and refuses to start without one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from config import ConfigError
from support.helpers import ROOT
from ui import password, state
from ui.password import MOST, MOST_OF_ALL, VARIABLE, WINDOW_S, Attempts, is_loopback, needed_password


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        (None, False),
        ("", False),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("localhost.example.org", False),
    ],
)
def test_only_this_machines_own_addresses_need_no_password(
    address: str | None, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert is_loopback(address) is here
    assert needed_password(address, without=True) == ""
    if here:
        assert needed_password(address, without=False) == ""
        return
    with pytest.raises(ConfigError, match="everyone on the network could") as refused:
        needed_password(address, without=False)
    assert VARIABLE in str(refused.value) and "--without-password" in str(refused.value)


def test_a_password_that_is_set_is_asked_for_everywhere_and_must_not_be_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "eight ch")
    assert needed_password("127.0.0.1", without=False) == needed_password(None, without=True) == "eight ch"
    monkeypatch.setenv(VARIABLE, "seven c")
    with pytest.raises(ConfigError, match="7 characters; take at least 8"):
        needed_password("127.0.0.1", without=False)


def test_guessing_is_limited_by_address_and_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    attempts = Attempts(clock=lambda: now[0])
    assert attempts.check("open sesame", "open sesame", "a") is True
    assert [attempts.check("wrong", "open sesame", "a") for _ in range(MOST)] == [False] * MOST
    assert attempts.check("open sesame", "open sesame", "a") is None  # not even the right one
    assert attempts.check("open sesame", "open sesame", "b") is True
    now[0] += WINDOW_S
    assert attempts.check("open sesame", "open sesame", "a") is True
    for number in range(MOST_OF_ALL):
        assert attempts.check("\ud800é", "open sesame", f"address {number}") is False
    assert attempts.check("open sesame", "open sesame", "one more") is None


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppTest]:
    names = {"--runs": "runs", "--models": "models", "--history": "h.sqlite", "--data": "data"}
    words = [word for flag, name in names.items() for word in (flag, str(tmp_path / name))]
    monkeypatch.setattr(sys, "argv", ["app.py", *words])
    st.cache_resource.clear()
    yield AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)
    state.history().close()
    st.cache_resource.clear()


def test_nothing_is_shown_before_the_password(app: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "open sesame")
    monkeypatch.setattr(password, "ATTEMPTS", Attempts())
    monkeypatch.setattr(password, "client_address", lambda: "192.168.1.7")  # a test has no browser
    app.run()

    def answer(text: str) -> None:
        app.text_input(key="password_given").set_value(text)
        app.button[0].click()
        app.run()

    def title() -> str:
        return str(app.title[0].value)

    assert len(app.button) == len(app.text_input) == 1 and not app.sidebar.children
    app.switch_page("ui/pages/history.py")
    app.run()
    assert title() == "The Victorian Literature Generator" and len(app.button) == 1
    answer("open barley")
    assert app.error[0].value == "This is not the password." and len(app.button) == 1
    for _ in range(MOST):
        answer("open barley")
    answer("open sesame")
    assert app.error[0].value.startswith("Too many wrong passwords")
    monkeypatch.setattr(password, "ATTEMPTS", Attempts())  # as if a minute had passed
    answer("open sesame")
    assert title() in ("History", "A place to write") and not app.error
    app.run()
    assert not app.text_input or app.text_input[0].key != "password_given"


def test_beyond_this_machine_the_app_refuses_to_start_without_a_password(
    app: AppTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    option = st.get_option
    monkeypatch.setattr(st, "get_option", lambda name: "0.0.0.0" if name == "server.address" else option(name))
    app.run()
    assert "--server.address 0.0.0.0: everyone on the network could" in app.text[0].value
    assert not app.button and not app.title
