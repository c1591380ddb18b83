"""Look inside: the probability of every token, and what the model would have written instead."""

from __future__ import annotations

import contextlib
import math

import streamlit as st

from config import ConfigError
from ui import settings, state
from ui.backends import Backend, BackendError, Scored
from ui.token_view import token_view

WRITE = "ui/pages/write.py"
TOP = 10  # alternatives for each token
STORY, OTHER = "The open story", "Another text"
LEGEND = """
<style>
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.3rem; }
.legend span { text-underline-offset: 0.3em; }
.alternative { display: grid; grid-template-columns: 7rem 1fr 3.6rem; gap: 0.8rem; align-items: center; }
.alternative b { font: 500 1.05rem/1.3 var(--book); white-space: pre; overflow: hidden; text-overflow: ellipsis; }
.alternative i { display: block; height: 0.55rem; border-radius: 3px; background: currentColor; opacity: 0.55; }
.alternative em { font-style: normal; text-align: end; font-variant-numeric: tabular-nums; }
</style>
<div class="legend quiet">
<span>likely: no line, 50 % and more</span>
<span style="text-decoration: underline dotted 1.5px">fair: dotted, 10 to 50 %</span>
<span style="text-decoration: underline dashed 1.5px">surprising: dashed, 1 to 10 %</span>
<span style="text-decoration: underline double 2px">rare: double, below 1 %</span>
</div>
"""


def visible(token: str) -> str:
    """A token with its spaces and line breaks made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}" if share >= 0.00095 else "< 0.1%"


@st.cache_data(show_spinner="Scoring the text …", max_entries=20)
def scored(_backend: Backend, name: str, last_modified: float, text: str) -> list[Scored]:
    return _backend.score(text, TOP)


def continue_from(text: str) -> None:
    """Make `text` the open story, let the model continue it, and switch to the Write page."""
    opened = state.open_story()
    if st.session_state.get("looking_at") == OTHER:
        opened = state.switch_story()
    opened.atomic_write_text(text)
    backend = state.backend()
    if backend is not None:
        with contextlib.suppress(ConfigError):
            opened.continue_text(backend, settings.current())
    st.session_state["continued"] = True


def first_read(backend: Backend, text: str) -> int:
    """The first character that the model reads when it continues `text`, as on the Write page."""
    try:
        params = settings.current()
    except ConfigError:
        params = settings.DEFAULTS
    visible = backend.visible_text(text, params)
    return visible.start if visible else max(0, len(text) - 4000)


def draw_figures(tokens: list[Scored]) -> None:
    """How well the model predicted the tokens, of which at least one has a probability."""
    known = [token.probability for token in tokens if token.probability]
    nats = -sum(math.log(p) for p in known) / len(known)
    first = sum(token.rank == 1 for token in tokens if token.probability)
    with st.grid(min_column_width=110, gap="small"):
        st.metric(
            "Perplexity",
            f"{math.exp(nats):,.1f}",
            help="The model was as uncertain as if it chose among this many equally likely tokens",
        )
        st.metric("First choices", f"{first / len(known):.0%}", help="Tokens that were the model's most likely choice")
        st.metric("Tokens", f"{len(tokens):,}", help="Words and parts of words, as the model reads them")


def draw_alternatives(text: str, token: Scored, key: int) -> None:
    """The alternatives to `token`, each with a button that continues from it."""
    before = text[: token.start]
    shown = " ".join(before.split()[-10:])
    st.html(
        f'<div class="lead">… {state.escaped(shown)} <b>{state.escaped(token.text.strip() or visible(token.text))}</b></div>'
    )
    rank = f"rank {token.rank}" if token.rank and token.rank > 1 else "the most likely token"
    st.caption(f"{percent(token.probability or 0.0)}, {rank}")
    most = max((other.probability for other in token.top), default=1.0)
    for number, other in enumerate(token.top):
        row = st.container(horizontal=True, vertical_alignment="center", wrap=False, gap="small")
        mark = " ◂" if other.text == token.text else ""
        row.html(
            f'<div class="alternative"><b>{state.escaped(visible(other.text))}{mark}</b>'
            f'<i style="width:{other.probability / most:.0%}"></i><em>{percent(other.probability)}</em></div>',
            width="stretch",
        )
        row.button(
            "Use this",
            key=f"use_{key}_{number}",
            on_click=continue_from,
            args=(before + other.text,),
            disabled="\ufffd" in other.text,  # a part of a character
            help="Cut the story here, put this in, and let the model continue",
        )


def draw(backend: Backend) -> None:
    if st.session_state.pop("continued", False):
        st.switch_page(WRITE)
    st.title("Look inside", anchor=False)
    st.html('<p class="lead">How likely the model found each word, and what it would have written instead.</p>')
    where = st.segmented_control(
        "Text to look at", [STORY, OTHER], default=STORY, key="looking_at", required=True, label_visibility="collapsed"
    )
    if where == OTHER:
        text = st.text_area("Text", key="inside_text", height=160, persist_state="session")
    else:
        text = state.open_story().view().text
    if not text.strip():
        st.info(
            "Type or paste a text above." if where == OTHER else "The open story is empty.",
            icon=":material/edit_note:",
        )
        st.page_link(WRITE, label="Write something", icon=":material/edit_note:")
        return
    begin = first_read(backend, text)
    part = text[begin:]
    if begin:
        st.caption(f"The model reads the last {len(part.split()):,} of {len(text.split()):,} words.")
    try:
        tokens = scored(backend, backend.name, state.last_modified(backend.place), part)
    except BackendError as error:
        st.error("The model cannot score this text.")
        st.text(str(error))
        return
    known = any(token.probability for token in tokens)
    if known:
        draw_figures(tokens)
    numbers = st.toggle("Show percentages", key="inside_numbers")
    st.html(LEGEND)
    chosen = st.session_state.get("inside_chosen", -1)
    if chosen >= len(tokens) or st.session_state.get("inside_shown") != part:
        chosen = max(range(len(tokens)), key=lambda at: -(tokens[at].probability or 1.0)) if known else -1
    st.session_state["inside_shown"], st.session_state["inside_chosen"] = part, chosen
    left, right = st.columns([6, 5], gap="large")
    with left.container(border=True):
        picked = token_view(tokens, chosen=chosen, numbers=numbers, key="token_view")
    if picked is not None and picked != chosen:
        st.session_state["inside_chosen"] = picked
        st.rerun()
    with right:
        if chosen >= 0 and tokens[chosen].probability is not None:
            token = tokens[chosen]
            moved = Scored(token.text, begin + token.start, token.probability, token.rank, token.top)
            draw_alternatives(text, moved, chosen)


settings.start(state.place(), state.history())
backend = state.backend()
if backend is None:
    st.title("Look inside", anchor=False)
    st.info("There is no model to look inside yet.", icon=":material/deployed_code:")
    st.page_link("ui/pages/model.py", label="Choose a model", icon=":material/deployed_code:")
else:
    draw(backend)
