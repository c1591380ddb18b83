"""An evaluation as Markdown and as a picture.

>>> report = json.loads(Path("reports/novels/report.json").read_text())
>>> print(markdown(report)); plot(report, Path("report.png"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.yardstick import yardstick_line

BARS = 24  # authors or texts in the picture
ROWS = 200  # texts in the table
FIGURES = (
    ("loss", "loss (nats a token)", "{:.4f}"),
    ("perplexity", "perplexity a token", "{:,.2f}"),
    ("word_perplexity", "perplexity a word (as for PG-19)", "{:,.2f}"),
    ("bits_per_byte", "bits per byte", "{:.4f}"),
    ("top1", "next token right", "{:.1%}"),
    ("top5", "next token among five", "{:.1%}"),
)
WRITTEN = (
    ("distinct_1", "different words (distinct-1)", "{:.1%}"),
    ("distinct_2", "different pairs (distinct-2)", "{:.1%}"),
    ("distinct_3", "different triples (distinct-3)", "{:.1%}"),
    ("repetition_4", "repeated runs of four words", "{:.1%}"),
    ("self_bleu", "likeness of the texts to each other (self-BLEU)", "{:.1f}"),
)


def formatted(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)


def cell(text: str) -> str:
    """Text that cannot break a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(head), ["---"] + ["---:"] * (len(head) - 1), *rows]
    return [f"| {' | '.join(cell(part) for part in line)} |" for line in lines] + [""]


def names(report: dict[str, Any]) -> list[str]:
    """The models' names, numbered where there are several."""
    found = [part["model"] for part in report["models"]]
    return found if len(found) == 1 else [f"({number}) {name}" for number, name in enumerate(found, 1)]


def grouped(report: dict[str, Any], kind: str, key: str) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """(name, each model's figures) of every author or text, in the first model's order."""
    by_name = [{row[key]: row for row in part[kind]} for part in report["models"]]
    order = list(dict.fromkeys(row[key] for part in report["models"] for row in part[kind]))
    return [(name, [rows.get(name) for rows in by_name]) for name in order]


def markdown(report: dict[str, Any]) -> str:
    """The report for people: one column a model."""
    models = report["models"]
    first = models[0]["total"]
    lines = ["# Evaluation", "", f"{report['texts']}: {first['documents']:,} texts, {first['words']:,} words.", ""]
    facts = [[f"{part['parameters']:,}", f"{part['context']:,}", f"{part['stride']:,}"] for part in models]
    kinds = [f"{part['tokenizer']['kind']}, {part['tokenizer']['ids']:,} ids" for part in models]
    rows = [
        [label, *row] for label, row in zip(("parameters", "context", "stride"), zip(*facts, strict=True), strict=True)
    ]
    rows += [["tokenizer", *kinds], ["tokens scored", *(f"{part['total']['tokens']:,}" for part in models)]]
    rows += [[label, *(formatted(part["total"][key], form) for part in models)] for key, label, form in FIGURES]
    rows += [["calibration error", *(f"{part['calibration']['error']:.4f}" for part in models)]]
    lines += table(["", *names(report)], rows)
    lines += _yardstick(report)
    authors = grouped(report, "authors", "author")
    if len(authors) > 1 or authors[0][0]:
        lines += ["## By author", "", *_by(report, "author", authors)]
    texts = grouped(report, "documents", "name")
    lines += ["## By text", "", *_by(report, "text", texts[:ROWS])]
    if len(texts) > ROWS:
        lines += [f"… and {len(texts) - ROWS:,} more in the JSON report.", ""]
    lines += ["## Calibration: how sure it is, and how often right", "", *_calibration(report)]
    for name, part in zip(names(report), models, strict=True):
        if part.get("dial"):
            lines += _style_section(name, part["dial"])
    if "written" in models[0]:
        lines += _written(report)
    return "\n".join(lines).rstrip() + "\n"


def _yardstick(report: dict[str, Any]) -> list[str]:
    """Each model beside counted n-grams of its training text."""
    found = [
        (name, part["yardstick"])
        for name, part in zip(names(report), report["models"], strict=True)
        if "yardstick" in part
    ]
    many = len(report["models"]) > 1
    return [part for name, one in found for part in (f"{f'{cell(name)}: ' if many else ''}{yardstick_line(one)}.", "")]


def _by(report: dict[str, Any], what: str, groups: Sequence[tuple[str, list[dict[str, Any] | None]]]) -> list[str]:
    keys = (("loss", "loss"), ("perplexity", "perplexity"), ("bits_per_byte", "bits per byte"), ("top1", "right"))
    several = len(report["models"]) > 1
    head = [what, "words"]
    for number in range(1, len(report["models"]) + 1):
        head += [f"{label} ({number})" if several else label for _, label in keys]
    forms = {key: form for key, _, form in FIGURES}
    rows = []
    for name, figures in groups:
        row = [name or "(not named)", next(f"{one['words']:,}" for one in figures if one)]
        for one in figures:
            row += [formatted(one[key], forms[key]) if one else "–" for key, _ in keys]
        rows.append(row)
    return table(head, rows)


def _calibration(report: dict[str, Any]) -> list[str]:
    head = ["probability of the likeliest token"]
    for name in names(report):
        head += [f"tokens ({name})", "it says", "it is right"]
    rows = []
    for bins in zip(*(part["calibration"]["bins"] for part in report["models"]), strict=True):
        row = [f"{bins[0]['from']:.0%} to {bins[0]['to']:.0%}"]
        for one in bins:
            row += [f"{one['tokens']:,}", formatted(one["confidence"], "{:.1%}"), formatted(one["accuracy"], "{:.1%}")]
        rows.append(row)
    return table(head, rows)


def _style_section(name: str, found: dict[str, Any]) -> list[str]:
    """Held-out loss by the text's style (rows) under each requested style (columns)."""
    summary, columns = found["summary"], [style for style in found["matrix"]]

    def gain(against: str) -> str:
        value = summary.get(f"gain_over_{against}")
        if value is None:
            return "–"
        error = value["standard_error"]
        return f"{value['mean']:+.4f}{'' if error is None else f' ± {error:.4f}'}"

    rows = [
        ["under the right style", f"{summary['right']:.4f}", ""],
        ["under none", f"{summary['none']:.4f}", gain("none")],
        ["under the wrong ones, on average", formatted(summary["wrong"], "{:.4f}"), gain("wrong")],
    ]
    lines = [f"## Do the styles work? ({cell(name)})", ""]
    lines += table(["held-out text", "loss (nats a token)", "the right style is better by"], rows)
    lines += [
        f"The right style is the best of {summary['styles']} for {summary['first']} of {summary['texts']} texts "
        f"(by chance {summary['chance']:.1f}).",
        "",
    ]
    matrix = []
    for style, losses in found["matrix"].items():
        best = min(losses[other] for other in found["styles"])
        texts = [f"{losses[other]:.3f}" for other in columns]
        marked = [f"**{text}**" if losses[other] == best else text for other, text in zip(columns, texts, strict=True)]
        matrix.append([style, *marked, f"{losses['none']:.3f}"])
    return [*lines, *table(["text by, written as", *columns, "none"], matrix)]


def _written(report: dict[str, Any]) -> list[str]:
    parts = [part["written"] for part in report["models"]]
    rows = [["texts", *(str(part["texts"]) for part in parts)]]
    rows += [[label, *(formatted(part[key], form) for part in parts)] for key, label, form in WRITTEN]
    scores = [part["bleu"] for part in parts]
    rows += [
        ["BLEU of continuations against the held-out texts", *(f"{one['score']:.2f}" if one else "–" for one in scores)]
    ]
    if all("originality" in part for part in parts):
        found = [part["originality"] for part in parts]
        least = found[0]["min_tokens"]
        rows += [[f"in copied runs of {least} tokens or more", *(f"{one['share']:.2%}" for one in found)]]
        rows += [["longest copied run (tokens)", *(str(one["longest"]) for one in found)]]
    lines = ["## What it writes", "", *table(["", *names(report)], rows)]
    signature = next((one["signature"] for one in scores if one), "")
    lines += [f"sacrebleu: `{signature}`", ""] if signature else []
    for name, part in zip(names(report), parts, strict=True):
        if runs := part.get("originality", {}).get("runs"):
            lines += [f"### Copied by {name}", ""]
            lines += [
                f"- {run['tokens']} tokens, from {cell(run['sources'][0]['name'])}: “{' '.join(run['text'].split())}”"
                for run in runs
            ]
            lines += [""]
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    """Bits per byte by author (or text) and the reliability diagram, as a PNG."""
    groups = grouped(report, "authors", "author")
    if len(groups) < 2:
        groups = grouped(report, "documents", "name")
    groups = groups[:BARS]
    figure = Figure(figsize=(11, max(4.0, 1.2 + 0.28 * len(groups) * len(report["models"]))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    many = len(report["models"])
    for number, model in enumerate(names(report)):
        style = {"color": ("#4a6fa5", "#c27c2c")[number % 2], "hatch": ("", "//")[number % 2], "edgecolor": "white"}
        places = [at + (number - (many - 1) / 2) * 0.8 / many for at in range(len(groups))]
        values = [row[number]["bits_per_byte"] if row[number] else 0.0 for _, row in groups]  # type: ignore[index]
        left.barh(places, values, height=0.8 / many, label=model, **style)
        bins = [one for one in report["models"][number]["calibration"]["bins"] if one["tokens"]]
        points = ([one["confidence"] for one in bins], [one["accuracy"] for one in bins])
        right.plot(*points, marker="os"[number % 2], color=style["color"], label=model)
    left.set_yticks(range(len(groups)), [(name or "(not named)").replace("$", r"\$")[:40] for name, _ in groups])
    left.invert_yaxis()
    left.set(xlabel="bits per byte (less is better)")
    right.plot([0, 1], [0, 1], color="#888888", linestyle=":", linewidth=1)
    right.set(
        xlabel="probability it gives its first choice", ylabel="how often that is right", xlim=(0, 1), ylim=(0, 1)
    )
    right.legend(loc="upper left", frameon=False)
    figure.savefig(path, dpi=130)
