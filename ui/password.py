"""Who may use the app: on this machine anyone; beyond it those who know the password, and no one where there is none.

    >>> require_password()      # draws the question and stops the page until it is answered

The password is read from the environment variable VLG_APP_PASSWORD, so that no list of processes shows it.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import threading
import time
from collections.abc import Callable

import streamlit as st

from config import ConfigError

VARIABLE = "VLG_APP_PASSWORD"
SHORTEST = 8
WINDOW_S = 60.0
MOST, MOST_OF_ALL = 5, 30  # wrong passwords in WINDOW_S of one address, and of all together


class Attempts:
    """Checks passwords in constant time, and refuses to after too many wrong ones of an address or of all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._lock = clock, threading.Lock()
        self._wrong: list[tuple[float, str]] = []  # MOST_OF_ALL at most

    def check(self, given: str, password: str, address: str) -> bool | None:
        """Whether `given` is the password; None where too many wrong ones came before: it is not even compared."""
        with self._lock:
            now = self._clock()
            self._wrong = [(then, whose) for then, whose in self._wrong if now - then < WINDOW_S]
            own = sum(whose == address for _, whose in self._wrong)
            if own >= MOST or len(self._wrong) >= MOST_OF_ALL:
                return None
            right = secrets.compare_digest(given.encode("utf-8", "replace"), password.encode("utf-8", "replace"))
            if not right:
                self._wrong.append((now, address))
            return right


ATTEMPTS = Attempts()  # of this process; not among Streamlit's cached resources, which any browser may ask it to clear


def is_loopback(address: str | None) -> bool:
    """Whether only programs on this machine reach a server that listens on `address` (None: on every interface)."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address or "0.0.0.0").is_loopback
    except ValueError:
        return False


def needed_password(address: str | None, without: bool) -> str:
    """The password to ask for; empty where none is needed. Raises ConfigError where one is and none, or a short one, is set.

    without: the flag --without-password.
    """
    password = os.environ.get(VARIABLE, "")
    if password and len(password) < SHORTEST:
        raise ConfigError([f"{VARIABLE}: {len(password)} characters; take at least {SHORTEST}"])
    if password or without or is_loopback(address):
        return password
    raise ConfigError(
        [
            f"--server.address {address or '0.0.0.0'}: everyone on the network could read and delete all stories, upload "
            f"texts and start trainings. Set a password (VLG_APP_PASSWORD=… streamlit run app.py --server.address …), or "
            f"leave the flag out and use the app on this machine only. Where something else keeps strangers away, a proxy "
            f"or a port that is published to 127.0.0.1: -- --without-password"
        ]
    )


def client_address() -> str:
    """The address of this session's browser; empty for this machine."""
    return st.context.ip_address or ""


def require_password(without: bool) -> None:
    """Stop the page until this session has given the password. Raises ConfigError as `needed_password`."""
    password = needed_password(st.get_option("server.address"), without)
    if not password or st.session_state.get("admitted"):
        return
    question = st.empty()  # taken away at once when it is answered, not when the page that follows is ready
    with question.container():
        st.title("The Victorian Literature Generator", anchor=False)
        form = st.form("password_form", border=False)
    with form:
        given = st.text_input("Password", type="password", key="password_given", max_chars=1000)
        pressed = st.form_submit_button("Enter", type="primary")
    if pressed:
        right = ATTEMPTS.check(given, password, client_address())
        if right:
            st.session_state["admitted"] = True
            question.empty()
            st.rerun()
        st.error(
            "This is not the password."
            if right is False
            else f"Too many wrong passwords: wait {WINDOW_S:.0f} seconds, then try again."
        )
    st.stop()
