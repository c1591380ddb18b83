"""Several processes train as one: gloo on this machine (correctness 10, 11, 19, 25)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_resume import assert_equal_runs, wait_for
from test_train import rows, run, weights

from checkpoint import load_training, newest_checkpoint
from helpers import ROOT, TINY_FLAGS

FLAGS = ["--model.dropout", "0", "--train.lr", "1e-3"]


def team(count: int, words: list[str], **env: str) -> subprocess.Popen:
    """`torchrun` with `count` gloo processes on this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    whole = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.Popen([*start, *words], cwd=ROOT, env=whole, stderr=subprocess.PIPE, text=True)


def together(count: int, data: Path, out: Path, *flags: str, script: str = "train.py", **env: str) -> str:
    process = team(count, [script, "--data", str(data), "--out", str(out), *TINY_FLAGS, *FLAGS, *flags], **env)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0, text[-3000:]
    return text


@pytest.fixture(scope="module")
def pair(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two processes, five steps of 2 x 2 micro-batches of 2 sequences."""
    out = tmp_path_factory.mktemp("ddp") / "pair"
    flags = ["--train.max-steps", "5", "--train.batch-size", "2", "--train.tokens-per-step", "128"]
    return out, together(2, tiny_data, out, *flags)


def test_two_processes_equal_one(tiny_data: Path, tmp_path: Path, pair: tuple[Path, str], one_thread: None) -> None:
    out, text = pair
    flags = ["--train.max-steps", "5", "--train.batch-size", "2", "--train.tokens-per-step", "128"]
    assert run(tiny_data, tmp_path / "one", *FLAGS, *flags) == 0
    ours, theirs = weights(out), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < 1e-6, name
    for a, b in zip(rows(out), rows(tmp_path / "one"), strict=True):
        assert a["tokens"] == b["tokens"] == a["step"] * 128
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    assert rows(out, "val_loss")[-1]["val_loss"] == pytest.approx(
        rows(tmp_path / "one", "val_loss")[-1]["val_loss"], abs=1e-5
    )
    assert "128 tokens a step" in text
    assert load_training(out / "last")["progress"]["windows"] == 5 * 8


COUNTER = """
import sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist, train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
wrapped, counts = train.wrapped, []
import runs
def counting(*args):
    module = wrapped(*args)
    def hook(state, bucket):
        counts.append(bucket.is_last())
        return allreduce_hook(None, bucket)
    module.register_comm_hook(None, hook)
    return module
runs.wrapped = counting
assert train.main(sys.argv[1:]) == 0
assert sum(counts) == 5, counts
"""


def test_one_gradient_reduction_a_step(tiny_data: Path, tmp_path: Path) -> None:
    script = tmp_path / "count.py"
    script.write_text(
        COUNTER.format(root=str(ROOT)).replace(
            "wrapped, counts = train.wrapped", "import runs\nwrapped, counts = runs.wrapped"
        )
    )
    flags = ["--train.max-steps", "5", "--train.batch-size", "2", "--train.tokens-per-step", "256"]
    together(2, tiny_data, tmp_path / "run", *flags, script=str(script))


def test_a_batch_that_does_not_divide_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    words = ["train.py", "--data", str(tiny_data), "--out", str(tmp_path / "run"), *TINY_FLAGS]
    process = team(2, [*words, "--train.max-steps", "2", "--train.tokens-per-step", "192"])
    _, text = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "x 2 processes = 128: try --train.tokens-per-step 128" in text


def test_two_processes_killed_and_resumed_are_exact(tiny_data: Path, tmp_path: Path) -> None:
    flags = ["--train.max-steps", "40", "--train.checkpoint-interval", "4", "--model.dropout", "0.2"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    together(2, tiny_data, whole, *flags)
    process = team(2, ["train.py", "--data", str(tiny_data), "--out", str(out), *TINY_FLAGS, *FLAGS, *flags])
    try:
        wait_for(lambda: newest_checkpoint(out) is not None and (out / "metrics.jsonl").exists())
    finally:
        kill_tree(process)
    text = together(2, tiny_data, out, "--resume")
    assert "resumed at step" in text
    assert_equal_runs(whole, out)


def kill_tree(process: subprocess.Popen) -> None:
    import psutil

    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(family, timeout=10)


def test_another_number_of_processes_goes_on_and_says_so(
    tiny_data: Path, tmp_path: Path, pair: tuple[Path, str], capfd
) -> None:
    import shutil

    import train

    out = tmp_path / "run"
    shutil.copytree(pair[0], out)
    assert train.main(["--resume", "--out", str(out), "--train.max-steps", "7"]) == 0
    assert "2 processes before, 1 now" in capfd.readouterr().err
    assert rows(out)[-1]["step"] == 7


def test_an_elastic_restart_goes_on_from_the_last_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    script = tmp_path / "fails_once.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        "first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "step = train.take_step\nseen = [0]\n"
        "def failing(*args):\n"
        "    seen[0] += 1\n"
        "    if first and seen[0] == 8:\n"
        "        os._exit(9)\n"
        "    return step(*args)\n"
        "train.take_step = failing\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    flags = ["--train.max-steps", "12", "--train.checkpoint-interval", "3"]
    process = team(
        2,
        [
            "--max-restarts=1",
            str(script),
            "--data",
            str(tiny_data),
            "--out",
            str(tmp_path / "run"),
            *TINY_FLAGS,
            *flags,
        ],
    )
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0, text[-3000:]
    assert "resumed at step 6" in text
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 13))


def test_sharded_training_writes_plain_model_folders(tiny_data: Path, tmp_path: Path, pair: tuple[Path, str]) -> None:
    out = tmp_path / "fsdp"
    flags = [
        "--train.max-steps",
        "5",
        "--train.batch-size",
        "2",
        "--train.tokens-per-step",
        "128",
        "--train.parallel",
        "fsdp",
    ]
    together(2, tiny_data, out, *flags)
    ours, theirs = weights(out), weights(pair[0])
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < 1e-5, name


def test_names_on_disk_are_the_same_for_every_wrapper(
    tiny_data: Path, tmp_path: Path, pair: tuple[Path, str], one_thread: None
) -> None:
    run(tiny_data, tmp_path / "raw", "--train.max-steps", "1")
    expected = weights(tmp_path / "raw").keys()
    assert weights(pair[0]).keys() == expected
    assert not any("module" in name or "_orig_mod" in name for name in expected)

    torch._dynamo.reset()
    compiled = torch.compile
    try:
        torch.compile = lambda module, **_: compiled(module, backend="eager")  # type: ignore[assignment]
        run(tiny_data, tmp_path / "compiled", "--train.max-steps", "1", "--train.compile", "on")
    finally:
        torch.compile = compiled
    assert weights(tmp_path / "compiled").keys() == expected
