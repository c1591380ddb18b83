"""Training: loss curves and samples of runs, compared; start a run on your own texts, stop it, resume it."""

from __future__ import annotations

from typing import Any

import streamlit as st

from config import ConfigError, preset_names, preset_values
from training.console import duration
from ui import state, training_runs
from ui.charts import CURVES, curve_chart, loss_chart, run_frame
from ui.training_runs import Run, TrainingError

POLL_S = 2.0
MINUTES, PRESET = "Minutes", "Preset"


def found_runs() -> list[Run]:
    return training_runs.runs(state.flags().runs)


def run_action(action: str, run: Run) -> None:
    """Stop or resume a run; the page shows why it cannot."""
    try:
        getattr(training_runs, action)(run)
    except (TrainingError, OSError) as error:
        st.session_state["training_fault"] = str(error)


def draw_head(run: Run, running: bool) -> None:
    """Progress and figures of a run, and the buttons to stop or resume it."""
    rows = run.rows()
    last = rows[-1] if rows else {}
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader(run.name, anchor=False, width="content")
        if running:
            st.badge("training", icon=":material/model_training:", color="green")
            st.button("Stop and save", icon=":material/stop:", key="stop_run", on_click=run_action, args=("stop", run))
        elif run.resumable():
            st.badge("stopped", color="orange")
            st.button(
                "Resume", icon=":material/play_arrow:", key="resume_run", on_click=run_action, args=("resume", run)
            )
        elif rows:
            st.badge("finished", icon=":material/check:", color="gray")
    if description := run.config().get("description"):
        st.caption(state.plain(str(description)))
    if running and not rows:
        st.info("Preparing the texts; the first numbers appear shortly.", icon=":material/hourglass_top:")
    share, left_s = run.progress(last)
    if share:
        left = f", about {duration(left_s)} left" if running and left_s is not None else ""
        st.progress(share, text=run.position(last) + left)
    vals = [row for row in rows if "val_loss" in row]
    best = min(vals, key=lambda row: row["val_loss"]) if vals else None
    trained = [row for row in rows if "train_loss" in row]
    speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s")]
    cells = [
        (
            "Training loss",
            f"{trained[-1]['train_loss']:.3f}" if trained else "–",
            "nats a token, at the last logged step",
        ),
        (
            "Best validation loss",
            f"{best['val_loss']:.3f}" if best else "–",
            f"at step {best['step']:,}" if best else "not measured yet",
        ),
        ("Tokens seen", f"{last.get('tokens', 0):,}", "in all steps so far"),
        ("Tokens a second", f"{speeds[-1]:,.0f}" if speeds else "–", "not counting evaluation and saving"),
        ("Time", duration(last.get("elapsed_s", 0)), "by the clock, evaluation and saving included"),
    ]
    with st.grid(min_column_width=150, gap="small"):
        for label, value, help_text in cells:
            st.metric(label, value, help=help_text)


def draw_charts(runs: list[Run]) -> None:
    rows = {run.name: run.rows() for run in runs}
    rows = {name: given for name, given in rows.items() if len(given) > 1}  # one row makes no line
    if not rows:
        return
    frame = run_frame(rows)
    with st.container(horizontal=True, vertical_alignment="center"):
        x = st.segmented_control(
            "Horizontal axis",
            ["step", "tokens", "minutes"],
            default="step",
            key="horizontal_axis",
            required=True,
            persist_state="session",
        )
        log = st.toggle("Logarithmic loss axis", key="log_loss", persist_state="session")
    axis = x if x in frame else "step"
    if "train_loss" in frame or "val_loss" in frame:
        st.altair_chart(loss_chart(frame, x=axis, log=log), alt="Training and validation loss")
    with st.grid(min_column_width=300):
        for column, (title, _) in CURVES.items():
            if column in frame and frame[column].notna().any():
                st.altair_chart(curve_chart(frame, column, x=axis), alt=title)


def draw_samples(run: Run) -> None:
    """What the model wrote from the same prompt at different steps."""
    samples = run.samples()
    if not samples:
        return
    st.subheader("Watch it learn", anchor=False)
    by_step = {sample["step"]: sample for sample in samples}
    steps = sorted(by_step)
    if len(steps) > 1:
        state_key = f"sample_{run.name}"
        if st.session_state.get(state_key) not in steps:
            st.session_state[state_key] = steps[-1]
        step = st.select_slider("Step", steps, key=state_key, format_func=lambda value: f"{value:,}")
    else:
        step = steps[0]
        st.caption(f"step {step:,}")
    sample = by_step[step]
    with st.container(border=True):
        st.html(
            f'<div class="prose"><span style="opacity:.55">{state.escaped(sample.get("prompt", ""))}</span>'
            f"{state.escaped(sample.get('text', ''))}</div>"
        )


def draw_run(run: Run, others: list[Run], polling: bool) -> None:
    """Everything about one run; a fragment that reruns every two seconds while it trains."""
    running = run.running()
    if fault := st.session_state.pop("training_fault", ""):
        st.error(state.plain(fault))
    draw_head(run, running)
    draw_charts([run, *others])
    draw_samples(run)
    tail = run.log_tail()
    failed = not running and not run.rows() and bool(tail)
    if failed:
        st.error("This run ended before its first step. Its output:")
    if tail:
        with st.expander("Output of train.py", expanded=failed):
            st.code(tail, language=None, wrap_lines=True)
    if polling != running:
        st.rerun()


def begin(name: str, texts: dict[str, bytes] | None, **choice: Any) -> None:
    """Start a run by preset and flags, or by minutes; the page shows why it cannot."""
    given = state.flags()
    try:
        run = training_runs.start(name, runs_folder=given.runs, data_folder=given.data, texts=texts, **choice)
    except (TrainingError, ConfigError, OSError) as error:
        st.error(state.plain(str(error)))
        return
    st.session_state["run_shown"] = run.name
    st.rerun()


def choose_limits(preset: str) -> tuple[str, dict[str, Any]]:
    """(the run's name, the arguments of `training_runs.start`) for a preset, shortened if wanted."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.text_input("Name", value=preset, max_chars=60)
        steps = st.number_input("Steps (0: the preset's)", 0, 10_000_000, 0, step=100)
        minutes = st.number_input("Minutes at most (0: no limit)", 0.0, 100_000.0, 0.0, step=5.0, format="%g")
    limits = {"train.max-steps": int(steps), "train.max-minutes": float(minutes)}
    return name, {"preset": preset, "flags": {flag: value for flag, value in limits.items() if value}}


def draw_start(expanded: bool) -> None:
    """The form for a new run."""
    with st.expander("Train a new model", icon=":material/add:", expanded=expanded):
        by = st.segmented_control(
            "Choose model size and settings by", [MINUTES, PRESET], default=MINUTES, key="by_new", required=True
        )
        preset = ""
        if by == PRESET:
            # not finetune: it has no shape
            presets = [name for name in preset_names() if "model" in preset_values(name)]
            preset = st.selectbox(
                "Preset",
                presets,
                index=presets.index("sample"),
                key="preset_new",
                format_func=lambda name: f"{name} — {preset_values(name).get('description', '')}",
            )
        else:
            st.caption(
                "Measures this machine and chooses the model that learns most from your texts in the given minutes."
            )
        files = st.file_uploader(  # one label for both: a widget with another label would lose its files
            "Texts to train on (plain text, EPUB, Word and others). Leave empty to use the preset's texts or the sample stories",
            type=[suffix.removeprefix(".") for suffix in training_runs.BOOKS],
            accept_multiple_files=True,
        )
        if preset:
            name, choice = choose_limits(preset)
        else:
            with st.container(horizontal=True, vertical_alignment="bottom"):
                name = st.text_input("Name", value="mine", max_chars=60)
                choice = {"minutes": float(st.number_input("Minutes", 1.0, 100_000.0, 10.0, step=5.0, format="%g"))}
        if st.button("Start training", type="primary", icon=":material/model_training:"):
            texts = {file.name: file.getvalue() for file in files} if files else None
            begin(name.strip(), texts, **choice)


def draw() -> None:
    st.title("Training", anchor=False)
    runs = found_runs()
    draw_start(not runs)
    if not runs:
        st.info("No model has been trained yet. The sample preset takes about three minutes on two cores.")
        return
    names = [run.name for run in runs]
    if st.session_state.get("run_shown") not in names:
        st.session_state["run_shown"] = names[0]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        shown = st.selectbox("Run", names, key="run_shown", persist_state="session")
        others = (
            st.multiselect("Compare with", [name for name in names if name != shown], key="runs_beside")
            if len(names) > 1
            else []
        )
    run = next(run for run in runs if run.name == shown)
    beside = [other for other in runs if other.name in others]
    running = run.running()
    st.fragment(draw_run, run_every=POLL_S if running else None, key="run")(run, beside, running)


draw()
