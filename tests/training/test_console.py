"""What a run prints: aligned columns that fit a terminal of any width, and lines for patterns anywhere else."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from test_train import run
from training import console, state
from training.console import Console
from training.metrics import closing

ROW: dict[str, Any] = {
    "step": 1234,
    "tokens": 10_485_760,
    "train_loss": 10.9876,
    "avg_loss": 10.5,
    "best_avg_loss": 10.25,
    "lr": 0.00012345,
    "tokens_per_s": 123_456.7,
    "seconds_per_batch": 0.1234,
    "elapsed_s": 12.0,
}
VALIDATED = ROW | {"val_loss": 9.8765, "val_bpb": 2.3456, "epoch": 2.0, "epoch_loss": 8.5, "best_epoch_loss": 8.25}


WIDTHS = pytest.mark.parametrize("width", [32, 60, 80, 120, 200])


def on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch, enabled: bool = True) -> Console:
    """A console that takes standard error for a terminal of this width."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "BAR_S", -1.0)
    return Console(enabled)


@WIDTHS
def test_nothing_on_a_terminal_is_wider_than_it_and_columns_stand_below_each_other(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = on_a_terminal(width, monkeypatch)
    shown.row(ROW, 3.0)
    shown.bar(1234, 99_000, loss=10.9, tokens_per_s=123_456.7, eta_s=123_456.0)
    shown.row(VALIDATED, 36_000.0)
    shown.sample(1234, "The old house stood " * 30 + "\nsecond line")
    lines = re.split(r"[\n\r]", capsys.readouterr().err)
    assert max(map(len, lines)) < width
    heading, first, second = (line for line in lines if re.search(r"step +loss|1,234  ?10\.98", line))
    assert [match.end() for match in re.finditer(r"\S+", first)][:2] == [
        match.end() for match in re.finditer(r"\S+", heading)
    ][:2]
    if width >= 60:
        assert len(heading) == len(first) == len(second)
        at = heading.index("bits/byte") + len("bits/byte")
        assert second[:at].endswith("2.3456") and first[:at].endswith(" ")
    assert ("average" in heading) == (width >= 120)
    assert any("sample at step 1,234" in line for line in lines)


@WIDTHS
def test_the_bar_tells_what_is_left_and_disappears(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = on_a_terminal(width, monkeypatch)
    shown.bar(30, 120, loss=4.5, tokens_per_s=1000.0, eta_s=90.0)
    bar = capsys.readouterr().err
    assert bar.startswith(" 25%") and bar.endswith("\r")
    if width >= 60:
        assert "step 30/120" in bar and "1m30s left" in bar
    shown.bar(30, 0, loss=4.5, tokens_per_s=1000.0, eta_s=None)  # a run that only time or a signal ends
    assert "step 30  loss 4.500"[: width - 1] in capsys.readouterr().err
    shown.say("saved")
    cleared, said = capsys.readouterr().err.split("\r")
    assert not cleared.strip() and said == "saved\n"


def test_what_is_said_while_a_sample_is_written_is_not_behind_the_bar(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_terminal(80, monkeypatch)
    original = state.generate

    def slow(*given: Any) -> Any:
        print("compiling", file=sys.stderr)
        return original(*given)

    monkeypatch.setattr(state, "generate", slow)
    flags = ["--train.max-steps", "3", "--train.log-interval", "9", "--train.sample-interval", "1"]
    assert run(tiny_data, tmp_path / "out", *flags) == 0
    shown = capsys.readouterr().err
    assert "step 2/3" in shown and shown.count("compiling\n") == 4
    for line in shown.split("\n"):
        *_, below, words = ["", *line.split("\r")]
        assert words != "compiling" or not below.strip(), line


def test_elsewhere_each_row_is_a_line_of_keys_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Console()
    shown.bar(30, 120, loss=4.5, tokens_per_s=1000.0, eta_s=90.0)
    shown.row(VALIDATED, 90.0)
    shown.sample(7, "It was.\nSo.")
    line, *sample = capsys.readouterr().err.splitlines()
    assert line.startswith("step=1234 tokens=10485760 train_loss=10.9876 ") and line.endswith(" eta=1m30s")
    assert "val_loss=9.8765 val_bpb=2.3456" in line and "lr=0.000123" in line
    assert sample == ["  sample at step 7:", "    It was.", "    So."]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_a_terminal(80, monkeypatch, enabled=False)
    shown.row(VALIDATED, 1.0)
    shown.bar(1, 2, loss=1.0, tokens_per_s=1.0, eta_s=1.0)
    shown.sample(1, "x")
    shown.note("x", "y")
    assert capsys.readouterr().err == ""


def test_the_summary_is_a_sentence_on_a_terminal() -> None:
    summary = {
        "steps": 1300,
        "tokens": 5000,
        "time": "2m33s",
        "tokens_per_s": 900,
        "best_val_loss": 4.0,
        "best_step": 9,
    }
    assert closing("all steps done", summary) == (
        "\nall steps done: 1,300 steps, 5,000 tokens in 2m33s, 900 tokens/s, best validation loss 4.0000 at step 9"
    )
    assert "None" not in closing("stopped", summary | {"tokens_per_s": None, "best_val_loss": None})
