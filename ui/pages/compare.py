"""Compare: several openings with several sampling settings, side by side and as a table."""

from __future__ import annotations

from functools import partial

import streamlit as st

from config import ConfigError, GenerationParams, build
from ui import settings, state
from ui.backends import Backend
from ui.background import BackgroundGeneration
from ui.comparison import Comparison, read_prompts, table
from ui.history import History

POLL_S = 0.4
CURRENT = "As set on the Write page"
FILE_MB = 10  # an uploaded file of openings at most
SHOWN = 24  # cells drawn as cards; the table holds all


def save_texts(history: History, generation: BackgroundGeneration) -> None:
    """Save every text to the history."""
    for index, sample in enumerate(generation.samples):
        if sample.text:
            history.add_passage(
                story_id=None,
                prompt=generation.prompt,
                text=sample.text,
                params={**generation.params.model_dump(mode="json"), "seed": generation.seed, "index": index},
                seed=generation.seed,
                model=generation.backend.name,
                tokens=sample.tokens,
                seconds=generation.seconds,
                first_s=generation.first_s,
                finish_reason=sample.reason,
            )


def chosen_settings(names: list[str], tokens: int, n: int, seed: int | None) -> dict[str, GenerationParams]:
    known = settings.known_presets(state.place(), state.history())
    base = settings.current().model_dump()
    return {
        name: build(GenerationParams, {**base, **known.get(name, {}), "max_tokens": tokens, "n": n, "seed": seed})
        for name in names
    }


def draw_form(backend: Backend, busy: bool) -> None:
    known = [CURRENT, *settings.known_presets(state.place(), state.history())]
    with st.container(border=True):
        typed = st.text_area(
            "Openings, one per line",
            key="compare_prompts",
            height=120,
            placeholder="The fog lay thick upon the river\nIt was the last evening of the year",
            persist_state="session",
        )
        file = st.file_uploader(
            "Or a file of openings: text with one a line, CSV or JSON Lines",
            type=["txt", "csv", "jsonl"],
            key="compare_file",
            max_upload_size=FILE_MB,
        )
        names = st.multiselect(
            "Settings", known, default=["Faithful", "Fanciful"], key="compare_settings", persist_state="session"
        )
        with st.container(horizontal=True, vertical_alignment="bottom"):
            tokens = st.number_input("Length", 1, 4000, 80, step=20, key="compare_tokens", width=140)
            n = st.number_input("Texts each", 1, 8, 1, key="compare_n", width=140)
            seed = st.number_input(
                "Seed", 0, 2**53 - 1, None, key="compare_seed", width=200, placeholder="new each time"
            )
        if st.button(
            "Write them all", type="primary", key="compare_start", disabled=busy, icon=":material/play_arrow:"
        ):
            try:
                prompts = [line for line in typed.splitlines() if line.strip()]
                prompts += read_prompts(file.name, file.getvalue()) if file else []
                wanted = chosen_settings([str(name) for name in names], int(tokens), int(n), seed)
            except (ConfigError, ValueError) as error:
                st.error(state.plain(str(error)))
                return
            if not prompts or not wanted:
                st.warning("Type at least one opening, and choose at least one of the settings.")
                return
            history = state.history()
            st.session_state["comparison"] = Comparison(
                backend, prompts, wanted, on_end=partial(save_texts, history)
            ).start()
            st.rerun()


def open_text(text: str) -> None:
    state.switch_story().atomic_write_text(text)


def draw_results(comparison: Comparison, polling: bool) -> None:
    running = comparison.running
    rows = comparison.rows()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.progress(
            comparison.done / len(comparison.cells), text=f"{comparison.done} of {len(comparison.cells)} written"
        )
        if running:
            st.button("Stop", key="compare_stop", icon=":material/stop:", on_click=comparison.cancel)
    failed = {cell.generation.message for cell in comparison.cells if cell.generation.status == "failed"}
    for message in sorted(failed):
        st.error(state.plain(message))
    if rows and not running:
        with st.container(horizontal=True):
            for suffix, mime in (("csv", "text/csv"), ("jsonl", "application/jsonlines")):
                st.download_button(
                    f"Save the table as .{suffix}",
                    data=partial(table, rows, suffix),
                    file_name=f"compared.{suffix}",
                    mime=mime,
                    on_click="ignore",
                    icon=":material/download:",
                    key=f"compare_{suffix}",
                )
    names = list(dict.fromkeys(cell.settings for cell in comparison.cells))
    for start in range(0, min(len(comparison.cells), SHOWN), len(names)):
        st.html(f'<p class="lead">{state.escaped(comparison.cells[start].prompt)}</p>')
        columns = st.columns(len(names))
        for column, cell in zip(columns, comparison.cells[start : start + len(names)], strict=True):
            for number, sample in enumerate(cell.generation.samples):
                with column.container(border=True):
                    st.html(f'<div class="quiet">{state.escaped(cell.settings)}</div>')
                    st.html(f'<div class="prose small version">{state.escaped(sample.text.strip()) or "…"}</div>')
                    if (
                        cell.generation.over
                        and sample.text
                        and st.button(
                            "Continue this",
                            key=f"open_{start}_{names.index(cell.settings)}_{number}",
                            on_click=open_text,
                            args=(cell.generation.prompt + sample.text,),
                        )
                    ):
                        st.switch_page("ui/pages/write.py")
    if rows and not running:
        with st.expander(f"The table, {len(rows)} rows", expanded=len(comparison.cells) > SHOWN):
            st.dataframe(rows, hide_index=True, alt="All texts with their settings")
    if polling != running:
        st.rerun()


def draw() -> None:
    st.title("Compare", anchor=False)
    st.html('<p class="lead">The same openings, continued with different settings.</p>')
    settings.start(state.place(), state.history())
    with st.spinner(state.LOADING):
        backend = state.backend()
    if backend is None:
        st.info("There is no model yet.", icon=":material/deployed_code:")
        st.page_link("ui/pages/model.py", label="Choose a model", icon=":material/deployed_code:")
        return
    comparison: Comparison | None = st.session_state.get("comparison")
    draw_form(backend, comparison is not None and comparison.running)
    if comparison is not None:
        running = comparison.running
        st.fragment(draw_results, run_every=POLL_S if running else None, key="comparison")(comparison, running)


draw()
