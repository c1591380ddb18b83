"""Statistics: amount, speed, variety and repetition of the generated passages."""

from __future__ import annotations

import streamlit as st

from ui import state
from ui.charts import bars, histogram, scatter
from ui.passage_statistics import passage_frame


def draw() -> None:
    st.title("Statistics", anchor=False)
    rows = state.history().passages()
    if not rows:
        st.info("There are no statistics yet: they are computed from the passages that models write for you.")
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
        ("Passages", f"{len(frame):,}", "newest 5,000 at most"),
        ("Words", f"{frame['words'].sum():,}", "written by models"),
        ("Tokens", f"{frame['tokens'].sum():,}", ""),
        ("Tokens a second", figure("tokens_per_s", ".0f"), "mean over passages, all versions of one request together"),
        ("First word", figure("first_s", ".2f") + " s", "mean time to the first word"),
        ("Distinct-2", figure("distinct_2", ".0%"), "different pairs of words among all pairs of a passage, mean"),
        ("Repetition-4", figure("repetition_4", ".1%"), "groups of four words that stood in the passage before, mean"),
    ]
    with st.grid(min_column_width=150, gap="small"):
        for label, value, help_text in cells:
            st.metric(label, value, help=help_text or None)
    days = frame.groupby("day", as_index=False)["words"].sum()
    left, right = st.columns(2)
    left.altair_chart(bars(days, "day", "words", title="Words a day", kind="O"), alt="Words a day")
    right.altair_chart(
        histogram(frame, "words", title="Length of passages", axis="words"), alt="How long the passages are"
    )
    left.altair_chart(histogram(frame, "tokens_per_s", title="Speed", axis="tokens a second"), alt="Speed of passages")
    right.altair_chart(
        histogram(frame, "first_s", title="Time to the first word", axis="seconds"), alt="Time to the first word"
    )
    left.altair_chart(
        scatter(
            frame,
            "temperature",
            "distinct_2",
            title="Variety by temperature",
            x_title="temperature",
            y_title="distinct-2",
        ),
        alt="Variety by temperature",
    )
    right.altair_chart(
        scatter(
            frame,
            "temperature",
            "repetition_4",
            title="Repetition by temperature",
            x_title="temperature",
            y_title="share of repeated four-word groups",
        ),
        alt="Repetition by temperature",
    )
    with st.expander("All passages as a table"):
        st.dataframe(frame.drop(columns="day"), hide_index=True, alt="All passages with their figures")


draw()
