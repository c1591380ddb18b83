"""Statistics: amount, speed, variety and repetition of the generated passages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from ui import state
from ui.charts import bars, by_temperature, histogram
from ui.passage_statistics import passage_frame

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 5  # passages that charts are drawn from


def draw() -> None:
    st.title("Statistics", anchor=False)
    rows = state.history().passages()
    if not rows:
        st.info("Nothing to count yet: the figures are of the passages that models write for you.")
        st.page_link("ui/pages/write.py", label="Begin a story", icon=":material/edit_note:")
        return
    frame = passage_frame(rows)
    models = sorted(frame["model"].unique())
    if len(models) > 1:
        chosen = st.multiselect("Models", models, default=models, key="stat_models")
        frame = frame[frame["model"].isin(chosen)]
        if frame.empty:
            return
    mean = frame.mean(numeric_only=True)

    def figure(name: str, form: str) -> str:
        value = mean.get(name)
        return "–" if value is None or value != value else format(value, form)

    cells = [
        ("Passages", f"{len(frame):,}", "the newest 5,000 at most"),
        ("Words", f"{frame['words'].sum():,}", "written by models"),
        ("Tokens", f"{frame['tokens'].sum():,}", ""),
        ("Tokens a second", figure("tokens_per_s", ".0f"), "mean; versions written at the same time count together"),
        ("First word", figure("first_s", ".2f") + " s", "mean time to the first word"),
        (
            "Different pairs",
            figure("distinct_2", ".0%"),
            "share of a passage's word pairs that differ from each other (mean): more is more varied",
        ),
        (
            "Repetition",
            figure("repetition_4", ".1%"),
            "share of a passage's groups of four words that are repeated (mean): less is better",
        ),
    ]
    with st.grid(min_column_width=150, gap="small"):
        for label, value, help_text in cells:
            st.metric(label, value, help=help_text or None)
    if len(frame) < FEWEST:
        st.info(f"The charts appear once there are {FEWEST} passages.", icon=":material/bar_chart:")
    else:
        draw_charts(frame)
    with st.expander("All passages as a table"):
        st.dataframe(frame.drop(columns="day"), hide_index=True, alt="All passages with their figures")


def draw_charts(frame: pd.DataFrame) -> None:
    """Amount and speed, and how variety depends on the temperature."""
    days = frame.groupby("day", as_index=False)["words"].sum()
    left, right = st.columns(2)
    charts = (
        ("Words a day", bars(days, "day", "words", kind="O")),
        ("Length of passages", histogram(frame, "words", axis="words", whole=True)),
        ("Speed", histogram(frame, "tokens_per_s", axis="tokens a second", whole=True)),
        ("Time to the first word", histogram(frame, "first_s", axis="seconds")),
        ("Variety by temperature", by_temperature(frame, "distinct_2", "different pairs")),
        ("Repetition by temperature", by_temperature(frame, "repetition_4", "repeated groups")),
    )
    for column, (title, chart) in zip((left, right) * 3, charts, strict=True):
        column.altair_chart(chart.properties(title=title), alt=title)


draw()
