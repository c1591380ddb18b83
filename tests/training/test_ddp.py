"""Several processes train as one: gloo on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from test_resume import assert_equal_runs, wait_for

import train
from checkpoint import load_training, newest_checkpoint
from dataset import TokenData
from support.forked import PYTHON
from support.helpers import ROOT, TINY_FLAGS
from test_train import rows, run, weights

FLAGS = ["--model.dropout", "0", "--train.lr", "1e-3"]


def started(start: list[str], words: list[str], **env: str) -> subprocess.Popen:
    whole = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.Popen([*PYTHON, *start, *words], cwd=ROOT, env=whole, stderr=subprocess.PIPE, text=True)


def team(count: int, words: list[str], **env: str) -> subprocess.Popen:
    """`count` gloo processes on this machine, as torchrun would start them."""
    return started([str(ROOT / "tests" / "support" / "team.py"), str(count)], words, **env)


def torchrun(count: int, words: list[str], **env: str) -> subprocess.Popen:
    """torchrun itself, which starts forked processes in place of new ones."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return started(torchrun, words, **env)


def said(process: subprocess.Popen) -> str:
    """What it wrote to standard error until its end; none of the family is left behind."""
    try:
        return process.communicate(timeout=400)[1]
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise


def together(count: int, data: Path, out: Path, *flags: str, script: str = "train.py", **env: str) -> str:
    process = team(count, [script, "--data", str(data), "--out", str(out), *TINY_FLAGS, *FLAGS, *flags], **env)
    text = said(process)
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
    assert "128 tokens a step" in text and "FutureWarning" not in text
    assert load_training(out / "last")["progress"]["windows"] == 5 * 8


COUNTER = """
import sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist, train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from training import model_setup
wrapped, counts = model_setup.wrapped, []
def counting(*args):
    module = wrapped(*args)
    def hook(state, bucket):
        counts.append(bucket.is_last())
        return allreduce_hook(None, bucket)
    module.register_comm_hook(None, hook)
    return module
model_setup.wrapped = counting
assert train.main(sys.argv[1:]) == 0
assert sum(counts) == 5, counts
"""


def test_one_gradient_reduction_a_step(tiny_data: Path, tmp_path: Path) -> None:
    script = tmp_path / "count.py"
    script.write_text(COUNTER.format(root=str(ROOT)))
    flags = ["--train.max-steps", "5", "--train.batch-size", "2", "--train.tokens-per-step", "256"]
    together(2, tiny_data, tmp_path / "run", *flags, script=str(script))


OVERFLOW = """
import json, math, os, sys
sys.path.insert(0, {root!r})
import torch, devices, train
from training import step as training_step
devices.pick_precision = lambda *a: ("fp16", "")
scaler = torch.amp.GradScaler
torch.amp.GradScaler = lambda kind, enabled: scaler(kind, 1024.0, enabled=enabled)
step, seen = training_step.take_step, []
def poisoned(module, optimizer, scaler, *rest):
    rank, model = int(os.environ["RANK"]), module.module
    hook = None
    if rank == 1 and len(seen) == 2:
        hook = model.h[0].attn.c_attn.weight.register_hook(lambda g: g * math.inf)
    before = [p.detach().clone() for p in model.parameters()]
    found = step(module, optimizer, scaler, *rest)
    moved = not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    seen.append([found[2], moved, scaler.get_scale(), float(sum(p.double().sum() for p in model.parameters()))])
    if hook:
        hook.remove()
    return found
training_step.take_step = poisoned
assert train.main(sys.argv[1:]) == 0
json.dump(seen, open({out!r} + os.environ["RANK"], "w"))
"""


def test_an_overflow_on_one_rank_skips_the_step_on_all(tiny_data: Path, tmp_path: Path) -> None:
    script, told = tmp_path / "overflow.py", str(tmp_path / "rank")
    script.write_text(OVERFLOW.format(root=str(ROOT), out=told))
    flags = ["--train.max-steps", "5", "--train.optimizer", "muon"]
    together(2, tiny_data, tmp_path / "run", *flags, script=str(script))
    ranks = [json.loads(Path(told + rank).read_text()) for rank in "01"]
    assert ranks[0] == ranks[1]
    assert [stepped for stepped, *_ in ranks[0]] == [True, True, False, True, True]
    assert [moved for _, moved, *_ in ranks[0]] == [True, True, False, True, True]
    assert [scale for _, _, scale, _ in ranks[0]] == [1024, 1024, 512, 512, 512]
    assert load_training(tmp_path / "run/last")["scaler"]["scale"] == 512


COMPILED = """
import sys
sys.path.insert(0, {root!r})
import torch, train
compiled = torch.compile
torch.compile = lambda module, **_: compiled(module, backend="eager")
assert train.main(sys.argv[1:]) == 0
"""


@pytest.mark.slow
def test_compiled_in_parallel_with_waves_for_positions(tiny_data: Path, tmp_path: Path, one_thread: None) -> None:
    """A buffer in the model, compile inside DDP, and ranks that validate different numbers of batches."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED.format(root=str(ROOT)))
    shape = ["--model.positions", "sinusoidal", "--model.no-tied-head", "--train.max-steps", "2"]
    flags = [*shape, "--train.batch-size", "1", "--train.tokens-per-step", "32", "--train.eval-interval", "1"]
    together(2, tiny_data, tmp_path / "two", *flags, "--train.compile", "on", script=str(script))
    assert run(tiny_data, tmp_path / "one", *FLAGS, *flags) == 0
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    assert not any("module" in name or "_orig_mod" in name for name in ours)
    data = TokenData.open(tiny_data)
    assert -(-(len(data.val) - 1) // 16) % 2 == 1  # an odd number of batches of one window
    for a, b in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)


def test_a_stop_that_reaches_one_process_saves_for_all(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    script = tmp_path / "stops.py"
    script.write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\nfrom training import step as training_step\n"
        "step, seen = training_step.take_step, [0]\n"
        "def signalled(*args):\n"
        "    seen[0] += 1\n"
        "    if seen[0] == 4 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(*args)\n"
        "training_step.take_step = signalled\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    text = together(2, tiny_data, out, "--train.max-steps", "1000", script=str(script))
    assert "another process stopped" in text and "python train.py --resume --out" in text
    assert load_training(out / "last")["step"] == rows(out)[-1]["step"] == 4


def test_a_batch_that_does_not_divide_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    words = ["train.py", "--data", str(tiny_data), "--out", str(tmp_path / "run"), *TINY_FLAGS]
    process = team(2, [*words, "--train.max-steps", "2", "--train.tokens-per-step", "192"])
    text = said(process)
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
    text = together(2, tiny_data, out, *flags, "--resume")
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
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """Two processes of 4 sequences, then one: still 8 a step, by accumulation, and the same weights in the end."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    flags = ["--train.max-steps", "7", "--train.schedule", "constant"]  # which does not depend on the steps in all
    together(2, tiny_data, out, *flags, "--train.max-tokens", str(5 * 128))
    assert rows(out)[-1]["tokens"] == 5 * 128
    assert train.main(["--resume", "--out", str(out), "--train.max-tokens", "0"]) == 0
    assert "2 processes before, 1 now" in capfd.readouterr().err
    assert [row["tokens"] for row in rows(out)] == [128 * step for step in range(1, 8)]
    assert run(tiny_data, whole, *FLAGS, *flags, "--train.batch-size", "8") == 0
    ours, theirs = weights(out), weights(whole)
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < 1e-5, name


def test_an_elastic_restart_goes_on_from_the_last_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    script = tmp_path / "fails_once.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\nfrom training import step as training_step\n"
        "first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "step = training_step.take_step\nseen = [0]\n"
        "def failing(*args):\n"
        "    seen[0] += 1\n"
        "    if first and seen[0] == 8:\n"
        "        os._exit(9)\n"
        "    return step(*args)\n"
        "training_step.take_step = failing\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    flags = ["--train.max-steps", "12", "--train.checkpoint-interval", "3"]
    process = torchrun(
        2,
        [
            "--max-restarts=1",
            "--no-python",
            *PYTHON,
            str(script),
            "--data",
            str(tiny_data),
            "--out",
            str(tmp_path / "run"),
            *TINY_FLAGS,
            *flags,
        ],
    )
    text = said(process)
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
