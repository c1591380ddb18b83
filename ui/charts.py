"""Charts of training runs and of what was written, in Altair; Streamlit's theme gives fonts and colours.

>>> st.altair_chart(loss_chart(frame), alt="loss")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

CURVES = {
    "lr": ("Learning rate", ".2e"),
    "grad_norm": ("Gradient norm", ".3f"),
    "tokens_per_s": ("Tokens a second", ",.0f"),
    "val_bpb": ("Validation, bits a byte", ".3f"),
    "mfu": ("Share of the peak (MFU)", ".1%"),
}
AXES = {"step": "step", "tokens": "tokens seen", "minutes": "minutes"}
HEIGHT = 340


def run_frame(rows_by_run: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """The logged rows of several runs as one table, a column `run` in front and `minutes` added."""
    import pandas as pd

    frames = []
    for name, rows in rows_by_run.items():
        frame = pd.DataFrame(rows)
        frame.insert(0, "run", name)
        frames.append(frame)
    whole = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"run": []})
    if "elapsed_s" in whole:
        whole["minutes"] = whole["elapsed_s"] / 60
    return whole


def downsample(frame: pd.DataFrame, most: int = 1500) -> pd.DataFrame:
    """At most `most` rows a run, evenly spaced, so that the browser stays fast."""
    parts = [part.iloc[:: max(1, -(-len(part) // most))] for _, part in frame.groupby("run", sort=False)]
    import pandas as pd

    return pd.concat(parts, ignore_index=True) if parts else frame


def loss_chart(frame: pd.DataFrame, *, x: str = "step", log: bool = False) -> Any:
    """Training loss as thin lines, validation loss as thick ones with points, what counting alone reaches as a dashed line.

    One colour a run.
    """
    import altair as alt
    import pandas as pd

    kinds = {"train_loss": "training", "val_loss": "validation", "counted_loss": "counting alone"}
    have = [name for name in kinds if name in frame]
    parts = []
    for name in have:
        part = frame.dropna(subset=[name])[["run", x, name]].rename(columns={name: "loss"})
        part["kind"] = kinds[name]
        parts.append(downsample(part))
    long = pd.concat(parts, ignore_index=True)
    several = frame["run"].nunique() > 1
    color = (
        alt.Color("run:N", title=None, legend=alt.Legend(orient="top"))
        if several
        else alt.Color(
            "kind:N", title=None, sort=["validation", "training", "counting alone"], legend=alt.Legend(orient="top")
        )
    )
    base = alt.Chart(long).encode(
        x=alt.X(f"{x}:Q", title=AXES[x]),
        y=alt.Y("loss:Q", title="loss (nats a token)", scale=alt.Scale(zero=False, type="log" if log else "linear")),
        color=color,
        tooltip=["run", "kind", alt.Tooltip(f"{x}:Q", format=",.6~g"), alt.Tooltip("loss:Q", format=".4f")],
    )
    train = base.transform_filter("datum.kind == 'training'").mark_line(strokeWidth=1.2, opacity=0.75)
    val = base.transform_filter("datum.kind == 'validation'").mark_line(
        strokeWidth=2.2, point=alt.OverlayMarkDef(size=36)
    )
    # the same at every step, so a rule across the chart: below it a model is worth more than counting
    counted = (
        alt.Chart(long)
        .transform_filter("datum.kind == 'counting alone'")
        .mark_rule(strokeDash=[6, 4], strokeWidth=1.4)
        .encode(
            y="mean(loss):Q", color=color, tooltip=["kind:N", alt.Tooltip("mean(loss):Q", format=".4f", title="loss")]
        )
    )
    layers = [train, val, counted] if "counted_loss" in have else [train, val]
    return alt.layer(*layers).properties(height=HEIGHT)


def curve_chart(frame: pd.DataFrame, column: str, *, x: str = "step") -> alt.Chart:
    """One logged quantity, a line for each run."""
    import altair as alt

    title, form = CURVES[column]
    part = downsample(frame.dropna(subset=[column])[["run", x, column]])
    return (
        alt.Chart(part)
        .mark_line(strokeWidth=1.6)
        .encode(
            x=alt.X(f"{x}:Q", title=AXES[x]),
            y=alt.Y(f"{column}:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color("run:N", legend=None),
            tooltip=[
                "run",
                alt.Tooltip(f"{x}:Q", format=",.6~g"),
                alt.Tooltip(f"{column}:Q", format=form, title=title),
            ],
        )
        .properties(height=190, title=title)
    )


def bars(frame: pd.DataFrame, x: str, y: str, *, kind: str = "N") -> alt.Chart:
    """A bar for each value of `x`."""
    import altair as alt

    return (
        alt.Chart(frame)
        .mark_bar(cornerRadiusEnd=3, size=24)
        .encode(
            x=alt.X(f"{x}:{kind}", title=None, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y(f"{y}:Q", title=y, axis=alt.Axis(format=",d", tickMinStep=1)),
            tooltip=list(frame.columns),
        )
        .properties(height=240)
    )


def by_model(frame: pd.DataFrame) -> Any:
    """A colour for each model; without a legend, which takes height from the plot, where there is only one."""
    import altair as alt

    several = frame["model"].nunique() > 1
    return alt.Color("model:N", title=None, legend=alt.Legend(orient="top", offset=4) if several else None)


def histogram(frame: pd.DataFrame, column: str, *, axis: str, whole: bool = False, bins: int = 20) -> alt.Chart:
    """A histogram from zero on, one colour for each model. whole: the values are counts, and so are the bins' ends."""
    import altair as alt

    known = frame.dropna(subset=[column])
    most = float(known[column].max()) if len(known) else 0.0
    bin = alt.Bin(maxbins=bins, extent=[0, most or 1.0], minstep=1 if whole else alt.Undefined)
    return (
        alt.Chart(known)
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            x=alt.X(
                f"{column}:Q", bin=bin, title=axis, axis=alt.Axis(format=",d" if whole else ".2~f", labelOverlap=True)
            ),
            y=alt.Y("count():Q", title="passages", axis=alt.Axis(format="d", tickMinStep=1)),
            color=by_model(frame),
            tooltip=["model", alt.Tooltip("count()", title="passages")],
        )
        .properties(height=240)
    )


def by_temperature(frame: pd.DataFrame, share: str, title: str) -> alt.Chart:
    """A point for each passage: a share of it over the temperature it was written at; the axis ends at 10%, 100% or between."""
    import altair as alt

    known = frame.dropna(subset=["temperature", share])
    top = min(1.0, max(0.1, float(known[share].max()))) if len(known) else 1.0
    hottest = max(2.0, float(known["temperature"].max())) if len(known) else 2.0
    return (
        alt.Chart(known)
        .mark_circle(size=46, opacity=0.6)
        .encode(
            x=alt.X("temperature:Q", scale=alt.Scale(domain=[0, hottest])),
            y=alt.Y(f"{share}:Q", title=title, scale=alt.Scale(domain=[0, top]), axis=alt.Axis(format="%")),
            color=by_model(frame),
            tooltip=[
                "model",
                alt.Tooltip("temperature:Q", format=".2f"),
                alt.Tooltip(f"{share}:Q", format=".1%", title=title),
            ],
        )
        .properties(height=240)
    )
