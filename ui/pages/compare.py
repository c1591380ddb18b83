"""Compare: several beginnings under several settings, side by side, and all of it as one file."""

from __future__ import annotations

from functools import partial

import streamlit as st

from config import ConfigError, GenerationParams, build
from ui import settings, state
from ui.backends import Backend
from ui.batch import Batch, read_prompts, table
from ui.history import History
from ui.jobs import Job

POLL_S = 0.4
HERE = "As set on the Write page"
SHOWN = 24  # cells drawn as cards; the table holds all


def keep(history: History, job: Job) -> None:
    """Every text goes into the history as well."""
    for index, sample in enumerate(job.samples):
        if sample.text:
            history.add_passage(
                story_id=None,
                prompt=job.prompt,
                text=sample.text,
                params={**job.params.model_dump(mode="json"), "seed": job.seed, "index": index},
                seed=job.seed,
                model=job.backend.name,
                tokens=sample.tokens,
                seconds=job.seconds,
                first_s=job.first_s,
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
    known = [HERE, *settings.known_presets(state.place(), state.history())]
    with st.container(border=True):
        typed = st.text_area(
            "Beginnings, one a line",
            key="compare_prompts",
            height=120,
            placeholder="The fog lay thick upon the river\nIt was the last evening of the year",
            persist_state="session",
        )
        file = st.file_uploader(
            "… or a file of them (.txt, .csv, .jsonl)", type=["txt", "csv", "jsonl"], key="compare_file"
        )
        with st.container(horizontal=True, vertical_alignment="bottom"):
            names = st.multiselect(
                "Manners", known, default=["Faithful", "Fanciful"], key="compare_manners", persist_state="session"
            )
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
                st.warning("Give at least one beginning and one manner.")
                return
            history = state.history()
            st.session_state["batch"] = Batch(backend, prompts, wanted, on_end=partial(keep, history)).start()
            st.rerun()


def open_text(text: str) -> None:
    state.put_on_desk().put(text)


def draw_results(batch: Batch, polling: bool) -> None:
    running = batch.running
    rows = batch.rows()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.progress(batch.done / len(batch.cells), text=f"{batch.done} of {len(batch.cells)} written")
        if running:
            st.button("Stop", key="compare_stop", icon=":material/stop:", on_click=batch.cancel)
    failed = {cell.job.message for cell in batch.cells if cell.job.status == "failed"}
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
    manners = list(dict.fromkeys(cell.settings for cell in batch.cells))
    for start in range(0, min(len(batch.cells), SHOWN), len(manners)):
        st.html(f'<p class="lead">{state.escaped(batch.cells[start].prompt)}</p>')
        columns = st.columns(len(manners))
        for column, cell in zip(columns, batch.cells[start : start + len(manners)], strict=True):
            for number, sample in enumerate(cell.job.samples):
                with column.container(border=True):
                    st.html(f'<div class="quiet">{state.escaped(cell.settings)}</div>')
                    st.html(f'<div class="prose small take">{state.escaped(sample.text.strip()) or "…"}</div>')
                    if (
                        cell.job.over
                        and sample.text
                        and st.button(
                            "Go on with this",
                            key=f"open_{start}_{manners.index(cell.settings)}_{number}",
                            on_click=open_text,
                            args=(cell.job.prompt + sample.text,),
                        )
                    ):
                        st.switch_page("ui/pages/write.py")
    if rows and not running:
        with st.expander(f"The table, {len(rows)} rows", expanded=len(batch.cells) > SHOWN):
            st.dataframe(rows, hide_index=True, alt="All texts with their settings")
    if polling != running:
        st.rerun()


def draw() -> None:
    st.title("Compare", anchor=False)
    st.html('<p class="lead">The same beginnings in several manners.</p>')
    settings.start(state.place(), state.history())
    with st.spinner(state.LOADING):
        backend = state.backend()
    if backend is None:
        st.info("There is no model to write with yet.", icon=":material/deployed_code:")
        st.page_link("ui/pages/model.py", label="Choose a model", icon=":material/deployed_code:")
        return
    batch: Batch | None = st.session_state.get("batch")
    draw_form(backend, batch is not None and batch.running)
    if batch is not None:
        running = batch.running
        st.fragment(draw_results, run_every=POLL_S if running else None, key="batch")(batch, running)


draw()
