"""The text editor of the Write page, a Streamlit component: `story_editor(opened.view(), key="editor", ...)`.

The writer types in the browser; the text arrives after a pause in typing and whenever the field loses focus, with the
revision it is an edit of. Keyboard commands arrive as the trigger `command`: continue, retry, stop, undo, redo.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

from ui.open_story import EditorView

HERE = Path(__file__).parent
CSS = (HERE / "editor.css").read_text("utf-8")
JS = (HERE / "editor.js").read_text("utf-8")
HTML = """
<div class="editor">
  <input class="title" aria-label="Title" placeholder="Untitled" maxlength="200" autocomplete="off">
  <div class="page">
    <div class="mirror" aria-hidden="true"></div>
    <textarea class="input" spellcheck="false" rows="1" autocapitalize="sentences"></textarea>
  </div>
  <div class="announcement" role="status" aria-live="polite"></div>
</div>
"""
PLACEHOLDER = "Write the first words here, or choose one of the openings below. The model continues from them."


@st.cache_resource(show_spinner=False)
def _component() -> Any:
    return st.components.v2.component("story_editor", html=HTML, css=CSS, js=JS)


def story_editor(
    view: EditorView,
    *,
    rev: str,
    key: str,
    title: str,
    seen: int,
    focus: str,
    on_edit: Callable[[], None],
    on_title: Callable[[], None],
    on_command: Callable[[], None],
) -> None:
    """Show a story. rev: names the text as Python last changed it. seen: the first character that the model still reads.
    focus: a new value moves the caret into the editor.

    The callbacks read `st.session_state[key]`: `.edit` ({"rev", "text", "tries"}), `.title`, `.command`.
    """
    component = _component()
    component(
        key=key,
        data={
            "text": view.text,
            "rev": rev,
            "live": view.running,
            "fresh": view.fresh,
            "seen": seen,
            "title": title,
            "focus": focus,
            "label": "Story",
            "placeholder": PLACEHOLDER,
            "announcement": "The model is writing.",
        },
        on_edit_change=on_edit,
        on_title_change=on_title,
        on_command_change=on_command,
    )
