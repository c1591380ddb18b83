"""Exact resume: interrupted equals uninterrupted, bit for bit, however it was interrupted (correctness 17, 20, 21)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import rows, run, same, weights

import train
from checkpoint import load_training, newest_checkpoint
from dataset import TokenData, Windows
from helpers import ROOT, TINY_FLAGS

LONG = ["--train.max-steps", "20"]


def moments(out: Path) -> dict[str, torch.Tensor]:
    state = load_training(out / "last")
    return {f"{name}.{key}": value for name, part in state["optimizer"].items() for key, value in part.items()}


def losses(out: Path) -> list[tuple]:
    return [(row["step"], row["train_loss"], row["lr"], row["grad_norm"], row.get("val_loss")) for row in rows(out)]


def assert_equal_runs(one: Path, two: Path) -> None:
    assert same(weights(one), weights(two))
    assert same(weights(one, "best"), weights(two, "best"))
    assert same(moments(one), moments(two))
    assert losses(one) == losses(two)
    progress = [load_training(out / "last")["progress"] | {"elapsed_s": 0} for out in (one, two)]
    assert progress[0] == progress[1]


@pytest.fixture(scope="module", params=["adamw", "muon"])
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / request.param
    assert run(tiny_data, out, *LONG, "--train.optimizer", request.param) == 0
    return out


def per_epoch(data: Path) -> int:
    """Optimizer steps in an epoch of the tiny run, not a whole number of them."""
    return Windows(len(TokenData.open(data).train), 16, 1337).per_epoch // 4


@pytest.mark.parametrize("place", ["first step", "mid-epoch", "epoch edge", "past the edge", "epoch 2", "last but one"])
def test_interrupted_equals_uninterrupted(
    undisturbed: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, one_thread: None
) -> None:
    edge = per_epoch(tiny_data)
    assert 3 < edge < 15
    at = {
        "first step": 1,
        "mid-epoch": edge // 2,
        "epoch edge": edge,
        "past the edge": edge + 1,
        "epoch 2": edge + 5,
        "last but one": 19,
    }
    ends = train.training_ends
    asked = train.training_ends.__code__.co_varnames.index("progress")
    monkeypatch.setattr(train, "training_ends", lambda *a: "interrupted" if a[asked].step == at[place] else ends(*a))
    out = tmp_path / "run"
    flags = [*LONG, "--train.optimizer", undisturbed.name]
    assert run(tiny_data, out, *flags) == 0
    assert load_training(out / "last")["progress"]["step"] == at[place]
    monkeypatch.setattr(train, "training_ends", ends)
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert_equal_runs(undisturbed, out)


def test_resuming_a_finished_run_changes_nothing(tiny_data: Path, tmp_path: Path, one_thread: None) -> None:
    out = tmp_path / "run"
    run(tiny_data, out, "--train.max-steps", "6")
    before = weights(out)
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert same(before, weights(out))
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]


def test_the_schedule_does_not_move(tiny_data: Path, tmp_path: Path, one_thread: None) -> None:
    out = tmp_path / "run"
    run(tiny_data, out, "--train.max-steps", "20", "--train.max-tokens", "640")
    assert rows(out)[-1]["lr"] == pytest.approx(1e-4)
    assert train.main(["--resume", "--out", str(out), "--train.max-tokens", "0"]) == 0
    assert len(rows(out)) == 20 and rows(out)[10]["lr"] > 1e-4


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, one_thread: None
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(tiny_data, whole, *LONG)
    run(
        tiny_data,
        out,
        "--train.max-steps",
        "20",
        "--train.max-tokens",
        "768",
        "--train.checkpoint-interval",
        "5",
        "--train.keep-last",
        "2",
    )
    newest = newest_checkpoint(out)
    assert newest == out / "last"
    file = out / "last/training_state.safetensors"
    content = bytearray(file.read_bytes())
    if fault == "truncated":
        file.write_bytes(content[:-100])
    elif fault == "flipped":
        content[-50] ^= 4
        file.write_bytes(content)
    else:
        file.unlink()
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(out), "--train.max-tokens", "0"]) == 0
    text = capsys.readouterr().err
    assert "training_state.safetensors" in text and "resumed at step 10" in text


def command(data: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "--data", str(data), "--out", str(out), *TINY_FLAGS, *flags]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_code_0(tiny_data: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(tiny_data, out, "--train.max-steps", "1000000"), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(rows(out)) > 3)
        process.send_signal(number)
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"stopped by {signal.Signals(number).name}" in text
    assert "python train.py --resume --out" in text
    saved = load_training(out / "last")["progress"]["step"]
    assert saved == rows(out)[-1]["step"]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def killed_session(words: list[str], out: Path, delay: float | None) -> bool:
    """Run train.py in a process of its own; SIGKILL it `delay` seconds after its first new line (None: let it finish).

    The process is forked from this one, which has torch loaded already. True if it ended by itself.
    """
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 1
        try:
            code = train.main(words)
        finally:
            os._exit(code)
    if delay is not None:
        before = len(rows(out)) if (out / "metrics.jsonl").exists() else 0
        end = time.monotonic() + 60
        while time.monotonic() < end and os.waitpid(child, os.WNOHANG)[0] == 0:
            if (out / "metrics.jsonl").exists() and len(rows(out)) != before:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False
            time.sleep(0.002)
        return True
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_at_random_moments_ends_bitwise_equal(
    tiny_data: Path, tmp_path: Path, request: pytest.FixtureRequest, one_thread: None
) -> None:
    soak = float(request.config.getoption("--soak"))
    kills, steps = (20, 150) if not soak else (10_000, 10_000)
    flags = ["--train.max-steps", str(steps), "--train.checkpoint-interval", "3", "--train.keep-last", "2"]
    flags += ["--train.eval-interval", "10"]
    rng, end = random.Random(int(soak)), time.monotonic() + soak
    out, count, resuming = tmp_path / "killed", 0, False
    while count < kills and (not soak or time.monotonic() < end):
        words = ["--resume", "--out", str(out)] if resuming else command(tiny_data, out, *flags)[2:]
        finished = killed_session(words, out, rng.random() * 0.12)
        resuming = resuming or newest_checkpoint(out) is not None
        if not resuming:
            for left in out.iterdir():  # killed before the first checkpoint: nothing to resume, so begin anew
                left.unlink() if left.is_file() else None
        count += not finished
        if finished:
            break
    assert count >= 20 or soak, f"only {count} kills before the run ended"
    stop = ["--train.max-tokens", str(64 * max(row["step"] for row in rows(out)) + 640)] if soak else []
    assert killed_session(["--resume", "--out", str(out), *stop], out, None)
    whole = tmp_path / "whole"
    assert killed_session(command(tiny_data, whole, *flags, *stop)[2:], whole, None)
    assert_equal_runs(whole, out)
    assert not list(out.glob("*.tmp*"))
    print(
        f"{count} kills survived over {json.loads((out / 'metrics.jsonl').read_text().splitlines()[-1])['step']} steps"
    )
