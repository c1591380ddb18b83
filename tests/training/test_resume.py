"""Exact resume: interrupted equals uninterrupted, bit for bit, however it was interrupted."""

from __future__ import annotations

import itertools
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

import devices
import train
from checkpoint import load_training, newest_checkpoint
from dataset import TokenData, WindowSampler
from support.forked import PYTHON
from support.helpers import ROOT, TINY_FLAGS, prepare_text
from test_train import rows, run, same, weights
from training import plan
from training import state as training_state
from training import step as training_step

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
    for folder in ("best", "last"):
        assert (one / folder / "config.json").read_text() == (two / folder / "config.json").read_text()
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
    return WindowSampler(len(TokenData.open(data).train), 16, 1337).per_epoch // 4


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
    ends = training_step.training_ends
    asked = training_step.training_ends.__code__.co_varnames.index("progress")
    monkeypatch.setattr(
        training_step, "training_ends", lambda *a: "interrupted" if a[asked].step == at[place] else ends(*a)
    )
    out = tmp_path / "run"
    flags = [*LONG, "--train.optimizer", undisturbed.name]
    assert run(tiny_data, out, *flags) == 0
    assert load_training(out / "last")["progress"]["step"] == at[place]
    monkeypatch.setattr(training_step, "training_ends", ends)
    torch.rand(7)  # another process would not go on in this one's random numbers either
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert_equal_runs(undisturbed, out)


def test_a_resumed_run_remembers_its_best(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(training_state, "validate", lambda *_: next(found))
    flags = ["--train.eval-interval", "5", "--train.max-steps"]
    assert run(tiny_data, tmp_path / "run", *flags, "10") == 0
    best = weights(tmp_path / "run", "best")
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--train.max-steps", "15"]) == 0
    assert [row["best_val_loss"] for row in rows(tmp_path / "run", "val_loss")] == [3.0, 1.0, 1.0]
    assert same(weights(tmp_path / "run", "best"), best)


def test_a_crash_between_log_lines_leaves_no_trace(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Crashed after step 12, resumed from step 7: the mean logged at 8 covers 6 and 7 too, and every row stands once."""
    flags = ["--train.log-interval", "4", "--train.sample-interval", "3", "--train.sample-tokens", "5", *LONG]
    flags += ["--train.checkpoint-interval", "7", "--train.tensorboard"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(tiny_data, whole, *flags) == 0
    step, calls = training_step.take_step, itertools.count(1)

    def crashing(*args: object) -> tuple[float, float, bool]:
        if next(calls) == 13:
            raise RuntimeError("the machine is gone")
        return step(*args)

    monkeypatch.setattr(training_step, "take_step", crashing)
    assert run(tiny_data, out, *flags) == 1
    assert rows(out)[-1]["step"] == 12 and load_training(out / "last")["step"] == 7
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert_equal_runs(whole, out)
    assert (whole / "samples.jsonl").read_text() == (out / "samples.jsonl").read_text()
    assert [row["step"] for row in rows(out)] == [1, 4, 5, 8, 10, 12, 15, 16, 20]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder in (whole, out):
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("train_loss")] == [1, 4, 5, 8, 10, 12, 15, 16, 20]
        assert "sample/text_summary" in events.Tags()["tensors"]


def test_an_automatic_batch_is_kept(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """More memory is free at the second start: the batch stays that of the first."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    found = iter([4, 4, 8])
    monkeypatch.setattr(plan, "largest_batch", lambda *a: next(found))
    assert run(tiny_data, whole, *LONG, "--train.batch-size", "0") == 0
    ends = training_step.training_ends
    monkeypatch.setattr(training_step, "training_ends", lambda *a: "interrupted" if a[1].step == 8 else ends(*a))
    assert run(tiny_data, out, *LONG, "--train.batch-size", "0") == 0
    monkeypatch.setattr(training_step, "training_ends", ends)
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert_equal_runs(whole, out)
    assert next(found) == 8


def test_the_scaler_goes_on_exactly(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """fp16 with a scale so high that it overflows a few times before and after the interruption."""
    monkeypatch.setattr(devices, "pick_precision", lambda *a: ("fp16", ""))
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda kind, enabled: scaler(kind, 2.0**40, growth_interval=3, enabled=enabled)
    )
    flags = ["--train.max-steps", "40", "--train.eval-interval", "20"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(tiny_data, whole, *flags) == 0
    ends = training_step.training_ends
    monkeypatch.setattr(training_step, "training_ends", lambda *a: "interrupted" if a[1].step == 5 else ends(*a))
    assert run(tiny_data, out, *flags) == 0
    early = load_training(out / "last")["scaler"]
    assert early["scale"] < 2.0**40
    monkeypatch.setattr(training_step, "training_ends", ends)
    assert train.main(["--resume", "--out", str(out)]) == 0
    late = [load_training(folder / "last")["scaler"] for folder in (whole, out)]
    assert late[0] == late[1] and late[0]["scale"] < early["scale"]
    assert_equal_runs(whole, out)
    assert rows(out)[-1]["train_loss"] < rows(out)[0]["train_loss"]


def test_stopped_before_its_first_checkpoint_a_run_begins_anew(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    """From the same foreign weights, and without a trace of the first attempt in its records."""
    origin, whole, out = tmp_path / "origin", tmp_path / "whole", tmp_path / "run"
    assert run(tiny_data, origin, "--train.max-steps", "2", "--train.seed", "5") == 0
    flags = [
        "--init-from",
        str(origin),
        "--train.max-steps",
        "6",
        "--train.sample-interval",
        "2",
        "--train.tensorboard",
    ]
    assert run(tiny_data, whole, *flags, "--train.sample-tokens", "5") == 0
    step, calls = training_step.take_step, itertools.count(1)

    def crashing(*args: object) -> tuple[float, float, bool]:
        if next(calls) == 4:
            raise RuntimeError("the machine is gone")
        return step(*args)

    monkeypatch.setattr(training_step, "take_step", crashing)
    assert run(tiny_data, out, *flags, "--train.sample-tokens", "5") == 1
    assert rows(out)[-1]["step"] == 3 and not (out / "last").exists()
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert f"no checkpoint in {out} yet: starting from the beginning" in capsys.readouterr().err
    assert_equal_runs(whole, out)
    assert (whole / "samples.jsonl").read_text() == (out / "samples.jsonl").read_text()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(tiny_data, out, "--train.max-steps", "6", "--train.max-tokens", "256") == 0
    file = out / "last/training_state.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert train.main(["--resume", "--out", str(out), "--train.max-tokens", "0"]) == 1
    said = capsys.readouterr().err
    assert "training_state.safetensors is damaged" in said and f"no intact checkpoint in {out}" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept


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
    assert train.read_args(["--resume", "--out", str(out)])[1].train.max_tokens == 0  # kept for the next one


def test_a_run_does_not_go_on_in_another_tokenizer(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(tiny_data, out, "--train.max-steps", "2")
    (tmp_path / "other").mkdir()
    other = prepare_text(tmp_path / "other", "Quite different letters: JKQXZ. " * 40)
    assert train.main(["--resume", "--out", str(out), "--data", str(other), "--train.max-steps", "3"]) == 2
    assert "not the tokenizer this run was trained with" in capsys.readouterr().err


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
        [*PYTHON, *command(tiny_data, out, "--train.max-steps", "1000000")[1:]], stderr=subprocess.PIPE, text=True
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


def test_a_second_ctrl_c_stops_at_once(tiny_data: Path, tmp_path: Path) -> None:
    """The first one waits for the step, here one of minutes; the second does not, and nothing is saved."""
    out = tmp_path / "run"
    script = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); import train; from training import run_folder; from training import step as training_step; from pathlib import Path\n"
        f"out, count, step = Path({str(out)!r}), [0], training_step.take_step\n"
        "def slow(*args):\n"
        "    count[0] += 1\n"
        "    if count[0] == 4:\n"
        "        (out / 'waiting').touch()\n"
        "        while True:\n"
        "            time.sleep(0.02)\n"
        "            if train.stopping.reason: (out / 'told').touch()\n"
        "    return step(*args)\n"
        "install = run_folder.Stop.install\n"
        "def remember(self):\n"
        "    train.stopping = self\n"
        "    install(self)\n"
        "training_step.take_step, run_folder.Stop.install = slow, remember\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    words = [*PYTHON, "-c", script, *command(tiny_data, out, *LONG)[2:]]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (out / "waiting").exists())
        process.send_signal(signal.SIGINT)
        wait_for(lambda: (out / "told").exists())
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and text.strip().endswith("stopped")
    assert "Traceback" not in text and not (out / "last").exists()
    assert [row["step"] for row in rows(out)] == [1, 2, 3]


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
        log = out / "metrics.jsonl"

        def lines() -> int:
            """Whole ones: a line may be read while it is being written."""
            return log.read_bytes().count(b"\n") if log.exists() else 0

        before, end = lines(), time.monotonic() + 300
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            late = time.monotonic() > end
            if late or lines() != before:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                assert not late, "no step in five minutes"
                return False
            time.sleep(0.002)
    else:
        ended = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_at_random_moments_ends_bitwise_equal(
    tiny_data: Path, tmp_path: Path, request: pytest.FixtureRequest, one_thread: None
) -> None:
    import torch._dynamo  # noqa: F401 - which optimizers need: else every forked session would load it anew

    soak = float(request.config.getoption("--soak"))
    kills, steps = (20, 400) if not soak else (10_000, 10_000)
    flags = ["--train.max-steps", str(steps), "--train.checkpoint-interval", "3", "--train.keep-last", "2"]
    flags += ["--train.eval-interval", "10"]
    if soak:  # where it will end is not known yet, and other schedules depend on that
        flags += ["--train.schedule", "constant"]
    rng, end = random.Random(int(soak)), time.monotonic() + soak
    out, count = tmp_path / "killed", 0
    while count < kills and (not soak or time.monotonic() < end):
        begun = (out / "config.toml").exists()  # perhaps killed before the first checkpoint, too
        words = ["--resume", "--out", str(out)] if begun else command(tiny_data, out, *flags)[2:]
        finished = killed_session(words, out, rng.random() * 0.12)
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
