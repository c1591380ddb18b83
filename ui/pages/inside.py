"""Look inside: how likely the model found every word, and what it would have written instead."""

from __future__ import annotations

import contextlib
import math

import streamlit as st

from config import ConfigError, GenerationParams
from ui import settings, state
from ui.backends import Backend, BackendError, Scored
from ui.glass import glass

WRITE = "ui/pages/write.py"
TOP = 10
STORY, OTHER = "The story on the desk", "Another text"
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


@st.cache_data(show_spinner="The model reads …", max_entries=20)
def scored(_backend: Backend, name: str, stamp: float, text: str) -> list[Scored]:
    return _backend.score(text, TOP)


def take(text: str) -> None:
    """Put `text` on the desk, write on from it, and show that."""
    desk = state.desk()
    if st.session_state.get("looking_at") == OTHER:
        desk = state.put_on_desk()
    desk.put(text)
    backend = state.backend()
    if backend is not None:
        with contextlib.suppress(ConfigError):
            desk.go_on(backend, settings.current())
    st.session_state["taken"] = True


def draw_alternatives(text: str, token: Scored, key: int) -> None:
    """What else could stand in the place of `token`."""
    before = text[: token.start]
    shown = " ".join(before.split()[-10:])
    st.html(
        f'<div class="lead">… {state.escaped(shown)} <b>{state.escaped(token.text.strip() or visible(token.text))}</b></div>'
    )
    rank = f"the model's choice no. {token.rank}" if token.rank and token.rank > 1 else "the model's first choice"
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
            "Take this",
            key=f"take_{key}_{number}",
            on_click=take,
            args=(before + other.text,),
            disabled="\ufffd" in other.text,  # a part of a character
            help="Cut the text here, put this word in, and let the model go on",
        )


def draw(backend: Backend) -> None:
    if st.session_state.pop("taken", False):
        st.switch_page(WRITE)
    st.title("Look inside", anchor=False)
    st.html('<p class="lead">How likely the model found each word, and what it would rather have written.</p>')
    where = st.segmented_control(
        "Text to look at", [STORY, OTHER], default=STORY, key="looking_at", required=True, label_visibility="collapsed"
    )
    if where == OTHER:
        text = st.text_area("Text", key="glass_text", height=160, persist_state="session")
    else:
        text = state.desk().live().text
    if not text.strip():
        st.info(
            "There is no text yet." if where == OTHER else "The story on the desk is empty.",
            icon=":material/edit_note:",
        )
        st.page_link(WRITE, label="Write something", icon=":material/edit_note:")
        return
    seen = backend.seen(text, GenerationParams(max_tokens=0))
    begin = seen.start if seen else max(0, len(text) - 4000)
    part = text[begin:]
    if begin:
        st.caption(f"Only the last {len(part.split()):,} words fit into the model's memory.")
    try:
        tokens = scored(backend, backend.name, state.stamp(backend.place), part)
    except BackendError as error:
        st.error("The model cannot judge this text.")
        st.text(str(error))
        return
    known = [token.probability for token in tokens if token.probability]
    if known:
        nats = -sum(math.log(p) for p in known) / len(known)
        first = sum(token.rank == 1 for token in tokens if token.probability)
        columns = st.columns(3)
        columns[0].metric(
            "Perplexity", f"{math.exp(nats):,.1f}", help="As if it chose among so many equal words each time"
        )
        columns[1].metric(
            "First choices", f"{first / len(known):.0%}", help="Tokens the model would have chosen itself"
        )
        columns[2].metric("Tokens", f"{len(tokens):,}")
    numbers = st.toggle("Write the percentages out", key="glass_numbers")
    st.html(LEGEND)
    chosen = st.session_state.get("glass_chosen", -1)
    if chosen >= len(tokens) or st.session_state.get("glass_for") != part:
        chosen = max(range(len(tokens)), key=lambda at: -(tokens[at].probability or 1.0)) if known else -1
    st.session_state["glass_for"], st.session_state["glass_chosen"] = part, chosen
    left, right = st.columns([6, 5], gap="large")
    with left.container(border=True):
        picked = glass(tokens, chosen=chosen, numbers=numbers, key="glass")
    if picked is not None and picked != chosen:
        st.session_state["glass_chosen"] = picked
        st.rerun()
    with right:
        if chosen >= 0 and tokens[chosen].probability is not None:
            token = tokens[chosen]
            moved = Scored(token.text, begin + token.start, token.probability, token.rank, token.top)
            draw_alternatives(text, moved, chosen)


settings.start(state.place(), state.history())
opened = state.backend()
if opened is None:
    st.title("Look inside", anchor=False)
    st.info("There is no model to look into yet.", icon=":material/deployed_code:")
    st.page_link("ui/pages/model.py", label="Choose a model", icon=":material/deployed_code:")
else:
    draw(opened)
