"""Steps split over threads: the same gradients, whatever the number of threads."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from config import ModelConfig, TrainConfig
from devices import DistributedContext, autocast
from loss import IGNORE
from model import GPT
from support.helpers import ROOT
from training.optimizer import Optimizer
from training.split import SplitModel, step_threads, with_parts
from training.step import seed_step, take_step

CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, "none", CPU)


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """As many threads as parts in most tests, however few cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def shape(**values: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 32,
            "block_size": 16,
            "vocab_size": 64,
            "vocab_used": 60,
            "dropout": 0.0,
        }
        | values
    )


def made(config: ModelConfig) -> GPT:
    torch.manual_seed(5)
    return GPT(config)


def batch(config: ModelConfig, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, config.tokens, (rows, config.block_size + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:].clone()


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def split_gradients(config: ModelConfig, x: torch.Tensor, y: torch.Tensor, parts: int) -> tuple[float, dict[str, Any]]:
    model = made(config)
    module = SplitModel(model, parts)
    module.seed_dropout(3)
    with module.threads():
        loss = module.backward(x, y, share=1.0)
        module.sum_gradients()
    return float(loss), gradients(model)


@pytest.mark.parametrize("values", [{}, {"tied_head": False, "bias": False}, {"positions": "sinusoidal"}], ids=str)
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_parts_gradients_add_up_to_those_of_the_whole_batch(values: dict[str, Any], parts: int) -> None:
    config = shape(**values)
    x, y = batch(config, rows=5)
    y[1, 3:] = IGNORE  # parts with different numbers of targets that count
    y[4] = IGNORE
    whole = made(config)
    expected = whole(x, y)
    expected.backward()
    loss, found = split_gradients(config, x, y, parts)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert found.keys() == gradients(whole).keys()
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_bits_do_not_depend_on_the_number_of_threads(dropout: float) -> None:
    config = shape(dropout=dropout)
    x, y = batch(config, rows=8)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(split_gradients(config, x, y, parts=4))
        assert torch.get_num_threads() == threads  # given back
    for loss, found in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(found[name], gradient) for name, gradient in results[0][1].items())


def test_each_part_draws_dropout_of_its_own_and_the_seed_decides_it() -> None:
    config = shape(dropout=0.5)
    x, y = (half.repeat(2, 1) for half in batch(config, rows=2))  # both parts read the same rows
    module = SplitModel(made(config), 2)
    train = TrainConfig(max_steps=1)

    def loss_of(model: GPT, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x, y).detach()

    def losses(step: int) -> list[float]:
        seed_step(module, train, step, ALONE)
        return [float(loss) for loss in module.each(loss_of, module.twins, x.chunk(2), y.chunk(2))]

    with module.threads():
        first = losses(0)
        assert first[0] != first[1]
        assert losses(1) != first
        assert losses(0) == first
        module.eval()
        quiet = losses(0)
        assert quiet[0] == quiet[1] == pytest.approx(float(module(x, y)))


def test_dropout_from_a_generator_of_ones_own_is_torchs() -> None:
    config = shape(dropout=0.4)
    x, y = batch(config, rows=3)
    model = made(config)
    model.use_plain_attention()  # torch's fused attention draws in another order
    torch.default_generator.manual_seed(11)
    expected = model(x, y)
    generator = torch.Generator().manual_seed(11)
    model.draw_dropout_from(generator)
    assert torch.equal(model(x, y), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_in_parts_trains_like_a_step_in_one(precision: str) -> None:
    config, train = shape(), TrainConfig(max_steps=9, lr=1e-2)
    losses = {}
    for parts in (1, 2):
        model = made(config)
        module = SplitModel(model, parts) if parts > 1 else model
        optimizer, scaler = Optimizer(model, train), torch.amp.GradScaler("cpu", enabled=False)
        batches = itertools.cycle([batch(config, 4, seed) for seed in range(2)])
        with step_threads(module):
            losses[parts] = [
                take_step(module, optimizer, scaler, batches, 2, train, precision, ALONE)[0] for _ in range(9)
            ]
    assert losses[1][-1] < losses[1][0] - 0.3
    assert losses[2] == pytest.approx(losses[1], rel=1e-4 if precision == "fp32" else 2e-2)


def test_both_optimizers_step_at_once_and_change_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one after the other in one thread; each of two threads takes one of them."""
    config, train = shape(), TrainConfig(max_steps=3, lr=1e-2, optimizer="muon")
    found, threads = [], set[str]()
    for threaded in (True, False):
        model = made(config)
        module, optimizer = SplitModel(model, 2), Optimizer(model, train)
        for part in optimizer.parts:
            update = part.step
            names = threads if threaded else set[str]()
            monkeypatch.setattr(part, "step", lambda u=update, n=names: n.add(threading.current_thread().name) or u())
        batches = itertools.cycle([batch(config, 4, seed) for seed in range(2)])
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        if not threaded:
            torch.set_num_threads(1)
        with module.threads() if threaded else contextlib.nullcontext():
            for _ in range(3):
                take_step(module, optimizer, scaler, batches, 1, train, "fp32", ALONE)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(one.equal(other) for one, other in zip(*found, strict=True))
    assert len(threads) == 2 and len(optimizer.parts) == 2


def test_threads_compute_in_the_callers_number_format_and_gradient_mode() -> None:
    seen = []

    def look(model: GPT) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.get_num_threads()))

    module = SplitModel(made(shape()), 3)
    with module.threads(), autocast(CPU, "bf16"), torch.no_grad():
        module.each(look, module.twins)
    assert seen == [(True, False, 1)] * 3


def test_a_part_that_fails_is_reported_when_the_others_have_ended() -> None:
    module = SplitModel(made(shape()), 2)
    ended = []

    def work(number: int) -> None:
        if not number:
            raise ValueError("part 0")
        time.sleep(0.05)
        ended.append(number)

    with module.threads():
        with pytest.raises(ValueError, match="part 0"):
            module.each(work, range(2))
        assert ended == [1]


def test_the_twins_hold_no_second_copy_of_the_weights() -> None:
    model = made(shape(positions="sinusoidal"))
    module = SplitModel(model, 3)
    for twin in module.twins:
        for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert mine.data_ptr() == theirs.data_ptr(), name
    with torch.no_grad():
        model.wte.weight += 1.0
    assert torch.equal(module.twins[2].lm_head.weight, model.wte.weight)


@pytest.mark.parametrize(
    ("train", "model", "mode", "parts", "said"),
    [
        ({}, {}, "none", 3, ""),
        ({"parts": 5}, {}, "none", 5, ""),
        ({"parts": 50}, {}, "none", 8, ""),  # no part without a row
        ({"parts": 1}, {}, "none", 1, ""),
        ({}, {}, "ddp", 1, ""),
        ({"parts": 2}, {}, "ddp", 1, "one process"),
        ({"parts": 2, "compile": "on"}, {}, "none", 1, "compiled"),
        ({"parts": 2}, {"dropout": 0.1, "block_size": 512}, "none", 1, "dropout"),
        ({}, {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50304}, "none", 1, ""),  # too large
    ],
)
def test_the_number_of_parts(train: dict[str, Any], model: dict[str, Any], mode: str, parts: int, said: str) -> None:
    distributed = DistributedContext(0, 1, mode, CPU)
    found, warning = with_parts(TrainConfig(max_steps=1, **train), shape(**model), 8, distributed)
    assert found.parts == parts
    assert said in warning
    assert bool(warning) == bool(said)


def test_a_step_of_the_benchmark_is_computed_by_threads_as_in_a_run() -> None:
    code = (
        "import threading, train_step, torch\n"
        "torch.set_num_threads(2)\n"
        "step = train_step.ours((1, 1, 32, 8, 64, 4), 'fp32', torch.device('cpu'), False)\n"
        "step()\n"
        "print([thread.name for thread in threading.enumerate()], torch.get_num_threads())"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "['MainThread', 'step_0'] 1\n"
