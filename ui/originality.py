"""Originality of a text: passages copied from the training text are marked, numbered, and listed with their sources.

>>> marked("It was the best of times.", [{"start": 7, "stop": 24}])
'It was <mark ...>the best of times</mark><sup>[1]</sup>.'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from ui import state
from ui.backends import Backend, BackendError

HELP = "Marks passages that occur word for word in the training text"
STYLE = """
<style>
mark.copied { color: inherit; background: color-mix(in srgb, currentColor 12%, transparent);
  text-decoration: underline solid 2px; text-underline-offset: 0.25em; padding-inline: 0.1em; }
mark.copied::before { content: "⟦"; }
mark.copied::after { content: "⟧"; }
</style>
"""


def marked(text: str, copied: Sequence[dict[str, Any]]) -> str:
    """`text` as HTML, escaped, each copied passage marked and numbered; of two that overlap the later one is cut."""
    parts, at = [], 0
    for number, passage in enumerate(copied, 1):
        start, stop = max(at, passage["start"]), passage["stop"]
        if start >= stop:
            continue
        parts.append(state.escaped(text[at:start]))
        parts.append(f'<mark class="copied">{state.escaped(text[start:stop])}</mark><sup>[{number}]</sup>')
        at = stop
    return "".join([*parts, state.escaped(text[at:])])


def source_line(number: int, passage: dict[str, Any]) -> str:
    """Where a copied passage comes from, as HTML."""
    source = passage["sources"][0]
    often = f", {passage['occurrences']:,} times in the training text" if passage["occurrences"] > 1 else ""
    before, after = (" ".join(source[side].split()) for side in ("before", "after"))
    around = f"… {before[-80:]} ⟦{' '.join(passage['text'].split())}⟧ {after[:80]} …"
    head = state.escaped(f"[{number}] {passage['tokens']} tokens from {source['name']}{often}")
    return f'<div class="quiet">{head}</div><div class="prose small">{state.escaped(around)}</div>'


@st.cache_data(show_spinner="Comparing with the training text …", max_entries=20)
def report_of(_backend: Backend, name: str, last_modified: float, text: str) -> dict[str, Any]:
    return _backend.originality(text)


def draw_originality(backend: Backend, text: str) -> None:
    """A switch that shows which passages occur word for word in the training text, and their sources."""
    if not st.toggle("Is it original?", key="originality", help=HELP):
        return
    try:
        report = report_of(backend, backend.name, state.last_modified(backend.place), text)
    except BackendError as error:
        st.info("Originality cannot be checked.", icon=":material/info:")
        st.text(str(error))
        return
    summary = (
        f"{report['share']:.0%} of the tokens are in passages of {report['min_tokens']} tokens or more that also occur in "
        f"the training text; the longest has {report['longest']} tokens."
    )
    st.html(f'<div class="quiet" data-testid="originality">{summary}</div>')
    st.html(f'{STYLE}<div class="prose">{marked(text, report["runs"])}</div>')
    for number, passage in enumerate(report["runs"], 1):
        st.html(source_line(number, passage))
