"""What only an NVIDIA GPU can show: compiled steps, fp16, exact positions after a resume, pinned transfers (`make bench-gpu`).

Kernels on a GPU add up in an order of their own, so runs are compared within a tolerance that another dropout mask, another
batch or lost moments would break.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import devices
import train
from checkpoint import load_model, load_training
from config import Config, GenerationParams, ModelConfig, TrainConfig
from dataset import TokenData, WindowSampler, pinned, prefetched, training_batches
from devices import DistributedContext, seed_dropout
from inference.writing import generate
from loss import LinearCrossEntropy
from model import GPT
from support.helpers import ROOT, TINY_FLAGS
from test_dataset import stream
from test_train import ALONE, rows, weights
from training import step as training_step
from training.model_setup import wrapped
from training.optimizer import Optimizer

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=512, vocab_used=500)


def run(data: Path, out: Path, *flags: str) -> int:
    return train.main(["--data", str(data), "--out", str(out), *TINY_FLAGS, "--train.device", DEVICE, *flags])


def losses(out: Path) -> list[float]:
    return [row["train_loss"] for row in rows(out)]


def far(one: Path, two: Path) -> float:
    """Largest difference between the weights of two runs."""
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def steps(device: str, precision: str, compile: str) -> list[float]:
    """Losses of the first six steps of one fixed training, two micro-batches each."""
    settings = TrainConfig(max_steps=6, compile=compile)
    torch.manual_seed(0)
    place = torch.device(device)
    distributed = DistributedContext(0, 1, "none", place)
    core = GPT(SMALL).to(place)
    module = wrapped(core, Config(model=SMALL, train=settings), distributed, place)
    optimizer, scaler = Optimizer(core, settings), torch.amp.GradScaler(place.type, enabled=False)
    optimizer.set_lr(1.0)
    found = []
    for step in range(6):
        ids = torch.randint(0, 500, (2, 8, 33), generator=torch.Generator().manual_seed(step)).to(place)
        batches = ((part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids)
        loss, _, finite = training_step.take_step(
            module, optimizer, scaler, batches, 2, settings, precision, distributed
        )
        assert finite
        found.append(loss)
    return found


def test_the_gpu_loses_what_the_processor_loses() -> None:
    expected = steps("cpu", "fp32", "off")
    assert steps(DEVICE, "fp32", "off") == pytest.approx(expected, abs=1e-3)
    assert steps(DEVICE, "bf16", "off") == pytest.approx(expected, abs=0.03)


def test_compiled_steps_lose_the_same_in_one_graph_and_one_compilation() -> None:
    expected = steps(DEVICE, "bf16", "off")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert steps(DEVICE, "bf16", "on") == pytest.approx(expected, abs=0.02)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_the_lean_loss_on_the_gpu() -> None:
    """Chunks, ignored targets, padding rows: value and gradients of the plain computation."""
    torch.manual_seed(0)
    x = torch.randn(50, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(40, 16, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, 33, (50,), device=DEVICE)
    targets[::7] = -1
    ours = LinearCrossEntropy.apply(x, weight, targets, 33, torch.float32, 16)
    plain = F.cross_entropy((x @ weight.t())[:, :33], targets, ignore_index=-1, reduction="sum")
    assert float(ours) == pytest.approx(float(plain), rel=1e-4)
    for one, two in zip(torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(plain, (x, weight)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_a_run_on_the_gpu_is_a_model_for_any_machine(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--train.max-steps",
        "60",
        "--train.lr",
        "1e-2",
        "--train.compile",
        "auto",
        "--train.sample-interval",
        "30",
    ]
    assert run(tiny_data, tmp_path / "run", *flags) == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.5
    last = rows(tmp_path / "run")[-1]
    known = devices.peak_flops(torch.cuda.get_device_name(), "bf16")
    assert last["gpu_memory_gb"] > 0 and ("mfu" in last) == bool(known)
    assert "gpu_memory_gb=" in capsys.readouterr().err
    model, tokenizer = load_model(tmp_path / "run/best", device="cpu")
    assert not any("_orig_mod" in name for name in weights(tmp_path / "run"))
    state = load_training(tmp_path / "run/last")
    assert {value.device.type for part in state["optimizer"].values() for value in part.values()} == {"cpu"}
    data = training_step.validate(model, TokenData.open(tiny_data).val, 16, 4, "fp32", ALONE)
    assert data == pytest.approx(rows(tmp_path / "run", "val_loss")[-1]["val_loss"], abs=0.02)
    there, _ = load_model(tmp_path / "run/best", device=DEVICE)
    params = GenerationParams(max_tokens=40, temperature=0.0, seed=1)
    assert (
        generate(there, tokenizer, "The old", params)[0].text == generate(model, tokenizer, "The old", params)[0].text
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_interrupted_on_the_gpu_it_goes_on(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Weights, moments, scaler, dropout and position: 20 steps = 9, a resume, and 11."""
    flags = ["--train.max-steps", "20", "--train.precision", precision, "--model.dropout", "0.2"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(tiny_data, whole, *flags) == 0
    ends = training_step.training_ends
    monkeypatch.setattr(training_step, "training_ends", lambda *a: "interrupted" if a[1].step == 9 else ends(*a))
    assert run(tiny_data, out, *flags) == 0
    monkeypatch.setattr(training_step, "training_ends", ends)
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert losses(out) == pytest.approx(losses(whole), abs=2e-3 if precision == "fp16" else 1e-4)
    assert far(out, whole) < (2e-3 if precision == "fp16" else 1e-4)
    scalers = [load_training(folder / "last")["scaler"] for folder in (out, whole)]
    assert scalers[0] == scalers[1] and bool(scalers[0]) == (precision == "fp16")
    assert losses(out)[-1] < losses(out)[0] - 0.1


def test_an_overflow_in_fp16_changes_nothing_but_the_scale() -> None:
    settings = TrainConfig(max_steps=1)
    torch.manual_seed(0)
    core = GPT(SMALL).to(DEVICE)
    optimizer, scaler = Optimizer(core, settings), torch.amp.GradScaler(DEVICE, 2.0**60)
    before = {name: value.clone() for name, value in core.state_dict().items()}
    ids = torch.randint(0, 500, (8, 33), device=DEVICE)
    distributed = DistributedContext(0, 1, "none", torch.device(DEVICE))
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss, norm, stepped = training_step.take_step(
        core, optimizer, scaler, iter([batch]), 1, settings, "fp16", distributed
    )
    assert not stepped and np.isfinite(loss) and not np.isfinite(norm)
    assert all(torch.equal(value, before[name]) for name, value in core.state_dict().items())
    assert scaler.get_scale() == 2.0**59


def test_one_seed_one_dropout_mask() -> None:
    place = torch.device(DEVICE, 0)
    masks = []
    for seed in (5, 6, 5):
        seed_dropout(place, seed)
        masks.append(F.dropout(torch.ones(4096, device=place), 0.5))
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


def test_batches_arrive_whole_through_pinned_memory(tmp_path: Path) -> None:
    """Far more batches than wait at once, each compared only after the next ones were sent on their way."""
    tokens = stream(tmp_path, np.arange(30_000) % 60_000, [9_000, 20_000])
    windows = WindowSampler(len(tokens), 64, seed=1)
    plain = training_batches(tokens, windows, batch_size=8, grad_accum_steps=2)
    fast = training_batches(
        tokens, WindowSampler(len(tokens), 64, seed=1), batch_size=8, grad_accum_steps=2, device=torch.device(DEVICE, 0)
    )
    ahead = [next(fast) for _ in range(200)]
    for x, y in ahead:
        expected = next(plain)
        assert x.is_cuda and x.is_contiguous()
        assert torch.equal(x.cpu(), expected[0]) and torch.equal(y.cpu(), expected[1])
    fast.close()
    with prefetched(lambda: training_batches(tokens, windows, batch_size=8, grad_accum_steps=1), pinned) as ready:
        pair = next(ready)
    assert all(part.is_pinned() and part.is_contiguous() for part in pair)


def test_one_process_of_a_team_on_nccl(tiny_data: Path, tmp_path: Path) -> None:
    """DDP around a compiled model, as on a node of eight, gives what the process alone gives."""
    flags = ["--train.max-steps", "4", "--train.precision", "fp32", "--model.dropout", "0", "--train.compile", "on"]
    assert run(tiny_data, tmp_path / "alone", *flags) == 0
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py"]
    words += ["--data", str(tiny_data), "--out", str(tmp_path / "team"), *TINY_FLAGS, "--train.device", DEVICE, *flags]
    done = subprocess.run([*words, "--train.parallel", "ddp"], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert far(tmp_path / "team", tmp_path / "alone") < 1e-4


def test_the_plan_measures_the_gpu(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(tiny_data), *TINY_FLAGS, "--train.device", DEVICE, "--train.max-steps", "50", "--plan"]
    assert train.main([*words, "--train.batch-size", "0"]) == 0
    text = capsys.readouterr().out
    assert torch.cuda.get_device_name() in text and "50 steps" in text


def test_the_benchmark_has_a_row_for_this_gpu(tmp_path: Path) -> None:
    words = ["--shape", "chars", "--seconds", "0.2", "--without-peers", "--eager"]
    script = str(ROOT / "benchmarks" / "train_gpu.py")
    done = subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    held = json.loads((ROOT / "benchmarks" / "out" / "train_gpu.json").read_text(encoding="utf-8"))
    assert [row["what"] for row in held["rows"]] == ["ours compiled", "ours eager"]
    assert all(row["tokens/s"] > 0 and row["steps"] >= 5 for row in held["rows"])
