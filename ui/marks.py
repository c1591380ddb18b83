"""Copied passages, marked in the text: numbered, bracketed and underlined, with their sources below.

>>> marked("It was the best of times.", [{"start": 7, "stop": 24}])
'It was <mark ...>the best of times</mark><sup>[1]</sup>.'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from ui import state
from ui.backends import Backend, BackendError

STYLE = """
<style>
mark.copied { color: inherit; background: color-mix(in srgb, currentColor 12%, transparent);
  text-decoration: underline solid 2px; text-underline-offset: 0.25em; padding-inline: 0.1em; }
mark.copied::before { content: "⟦"; }
mark.copied::after { content: "⟧"; }
</style>
"""


def marked(text: str, runs: Sequence[dict[str, Any]]) -> str:
    """`text` as HTML, everything in it escaped, each run marked and numbered; where runs overlap, the later goes on."""
    parts, at = [], 0
    for number, run in enumerate(runs, 1):
        start, stop = max(at, run["start"]), run["stop"]
        if start >= stop:
            continue
        parts.append(state.escaped(text[at:start]))
        parts.append(f'<mark class="copied">{state.escaped(text[start:stop])}</mark><sup>[{number}]</sup>')
        at = stop
    return "".join([*parts, state.escaped(text[at:])])


def source_line(number: int, run: dict[str, Any]) -> str:
    """Where a run comes from, as HTML."""
    source = run["sources"][0]
    often = f", {run['occurrences']:,} times in the training text" if run["occurrences"] > 1 else ""
    before, after = (" ".join(source[side].split()) for side in ("before", "after"))
    around = f"… {before[-80:]} ⟦{' '.join(run['text'].split())}⟧ {after[:80]} …"
    head = state.escaped(f"[{number}] {run['tokens']} tokens from {source['name']}{often}")
    return f'<div class="quiet">{head}</div><div class="prose small">{state.escaped(around)}</div>'


@st.cache_data(show_spinner="Comparing with the training text …", max_entries=20)
def checked(_backend: Backend, name: str, stamp: float, text: str) -> dict[str, Any]:
    return _backend.originality(text)


def draw_originality(backend: Backend, text: str) -> None:
    """A switch; on, the text with what stands word for word in the training text marked, and the sources."""
    if not st.toggle("Mark what is copied from the training text", key="originality"):
        return
    try:
        report = checked(backend, backend.name, state.stamp(backend.place), text)
    except BackendError as error:
        st.info("Copied passages cannot be looked for.", icon=":material/info:")
        st.text(str(error))
        return
    runs = report["runs"]
    told = f"{report['share']:.0%} of the tokens stand in passages of {report['min_tokens']} tokens or more that the training text has too"
    st.html(f'<div class="quiet" data-testid="originality">{told}; the longest has {report["longest"]}.</div>')
    st.html(f'{STYLE}<div class="prose">{marked(text, runs)}</div>')
    for number, run in enumerate(runs, 1):
        st.html(source_line(number, run))
