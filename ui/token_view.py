"""The text on the Look inside page as a Streamlit component: tokens shaded by probability, each can be selected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from ui.backends import Scored

HERE = Path(__file__).parent
CSS = (HERE / "token_view.css").read_text("utf-8")
JS = (HERE / "token_view.js").read_text("utf-8")
HTML = """
<div class="token-view" role="listbox" tabindex="0"></div>
"""


@st.cache_resource(show_spinner=False)
def _component() -> Any:
    return st.components.v2.component("token_view", html=HTML, css=CSS, js=JS)


def token_view(tokens: Sequence[Scored], *, chosen: int, numbers: bool, key: str) -> int | None:
    """Show the tokens; returns the index of one that was just selected, or None. numbers: show each percentage."""
    component = _component()
    result = component(
        key=key,
        data={
            "tokens": [{"text": token.text, "p": token.probability, "rank": token.rank} for token in tokens],
            "chosen": chosen,
            "numbers": numbers,
            "label": "The text, token by token. The arrow keys move from one to the next.",
        },
        on_pick_change=lambda: None,
    )
    picked = result.pick
    return None if picked is None else int(picked)
