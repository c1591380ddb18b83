"""The text on the Look inside page, as a Streamlit component: every token can be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from ui.backends import Scored

HERE = Path(__file__).parent
CSS = (HERE / "glass.css").read_text("utf-8")
JS = (HERE / "glass.js").read_text("utf-8")
HTML = """
<div class="glass" role="listbox" tabindex="0"></div>
"""


@st.cache_resource(show_spinner=False)
def _component() -> Any:
    return st.components.v2.component("glass", html=HTML, css=CSS, js=JS)


def glass(tokens: Sequence[Scored], *, chosen: int, numbers: bool, key: str) -> int | None:
    """Show the tokens; the index of one that was just chosen, else None. `numbers` writes each percentage out."""
    component = _component()
    result = component(
        key=key,
        data={
            "tokens": [{"text": token.text, "p": token.probability, "rank": token.rank} for token in tokens],
            "chosen": chosen,
            "numbers": numbers,
            "label": "The text, word by word. Arrow keys move from one to the next.",
        },
        on_pick_change=lambda: None,
    )
    picked = result.pick
    return None if picked is None else int(picked)
