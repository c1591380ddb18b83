"""Schedules and parameter groups."""

from __future__ import annotations

import itertools

import pytest
import torch

from config import ModelConfig, TrainConfig
from model import GPT
from training.optimizer import AdamW, Optimizer, StackedMuon, parameter_groups
from training.schedule import lr_scale

MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=24, vocab_used=20)


def settings(**values: object) -> TrainConfig:
    return TrainConfig(**({"max_steps": 100, "warmup_steps": 10, "lr": 1e-3, "min_lr": 1e-4} | values))


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_the_ends_of_a_schedule(schedule: str, warmup: int) -> None:
    train = settings(schedule=schedule, warmup_steps=warmup)
    rates = [lr_scale(step, 100, train) for step in range(100)]
    assert rates[0] > 0
    assert rates[max(0, warmup - 1)] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert all(later <= sooner + 1e-12 for sooner, later in itertools.pairwise(rates[warmup:]))
    assert all(later >= sooner for sooner, later in itertools.pairwise(rates[:warmup]))


def test_constant_holds_after_the_warm_up() -> None:
    train = settings(schedule="constant")
    assert [lr_scale(step, 0, train) for step in (0, 9, 1000)] == pytest.approx([0.1, 1.0, 1.0])  # ended by the clock
    assert [lr_scale(step, 100, train) for step in (9, 50, 99)] == [1.0, 1.0, 1.0]


def test_wsd_holds_and_then_falls_straight() -> None:
    rates = [lr_scale(step, 100, settings(schedule="wsd", decay_fraction=0.2, min_lr=0.0)) for step in range(100)]
    assert rates[10:79] == [1.0] * 69
    falls = [sooner - later for sooner, later in itertools.pairwise(rates[79:])]
    assert max(falls) == pytest.approx(min(falls))
    assert rates[-1] == pytest.approx(0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_groups_are_disjoint_and_complete(optimizer: str, tied: bool) -> None:
    model = GPT(MODEL.model_copy(update={"tied_head": tied}))
    groups = parameter_groups(model, settings(optimizer=optimizer))
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(p.dim() >= 2 for p in groups[1].values())
    assert all(p.dim() < 2 for p in groups[2].values())
    assert bool(groups[0]) == (optimizer == "muon")
    held = [
        p
        for part in Optimizer(model, settings(optimizer=optimizer)).parts
        for g in part.param_groups
        for p in g["params"]
    ]
    assert len({id(p) for p in held}) == len(held) == len(list(model.parameters()))


def test_vectors_are_not_decayed_and_matrices_are() -> None:
    model = GPT(MODEL)
    optimizer = Optimizer(model, settings(weight_decay=0.3))
    for group in optimizer.parts[0].param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.dim() >= 2 else 0.0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_by_name_goes_on_bitwise(kind: str) -> None:
    def step(model: GPT, optimizer: Optimizer, seed: int) -> None:
        x = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x, x.roll(1)).backward()
        optimizer.set_lr(0.5)
        for part in optimizer.parts:
            part.step()

    torch.manual_seed(0)
    first = GPT(MODEL)
    one = Optimizer(first, settings(optimizer=kind))
    for seed in range(3):
        step(first, one, seed)
    second = GPT(MODEL)
    second.load_state_dict(first.state_dict())
    two = Optimizer(second, settings(optimizer=kind))
    two.load_state_dict(one.state_dict())
    step(first, one, 9)
    step(second, two, 9)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="no optimizer state for"):
        two.load_state_dict(dict(list(one.state_dict().items())[1:]))
    three = Optimizer(second, settings(optimizer=kind))
    three.load_state_dict(Optimizer(first, settings(optimizer=kind)).state_dict())
    assert not three.state_dict()


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_torchs_adamw(fused: bool) -> None:
    """Fifty steps of a model with two groups: the same losses, weights and moments, bit for bit."""
    models, losses = [], []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20))
        groups = [
            {"params": [p for p in model.parameters() if (p.dim() > 1) == matrix], "weight_decay": 0.1 * matrix}
            for matrix in (True, False)
        ]
        optimizer = kind(groups, lr=1e-2, betas=(0.9, 0.95), fused=fused)
        for step in range(50):
            torch.manual_seed(step)
            loss = model(torch.randint(20, (4, 8)), torch.randint(20, (4, 8)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.step()
            losses.append(loss.item())
        models.append((model, optimizer))
    assert losses[:50] == losses[50:]
    (ours, one), (theirs, two) = models
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad
        assert all(torch.equal(one.state[a][key], two.state[b][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_stacked_muon_is_torchs_muon() -> None:
    """Several shapes, a matrix without a gradient, ten steps: as torch's own, whose bfloat16 rounds to three digits."""
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (24, 8), (5, 5)]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    sets: list[list[torch.nn.Parameter]] = []
    for _ in range(2):
        torch.manual_seed(0)
        sets.append([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])
    ours, theirs = StackedMuon(sets[0], **settings), torch.optim.Muon(sets[1], **settings)
    start = [p.detach().clone() for p in sets[0]]
    for step in range(10):
        for parameters in sets:
            torch.manual_seed(step)
            for parameter in parameters[:-1]:
                parameter.grad = torch.randn(parameter.shape)
        ours.step()
        theirs.step()
    for one, two, before in zip(*sets, start, strict=True):
        moved = (one - before).norm()
        assert float((one - two).norm()) <= 0.03 * float(moved)
        assert torch.equal(one, before) == (one.shape == (5, 5))
        assert (one in ours.state) == (two in theirs.state)
    for one, two in zip(sets[0][:-1], sets[1][:-1], strict=True):
        assert torch.allclose(ours.state[one]["momentum_buffer"], theirs.state[two]["momentum_buffer"], atol=1e-6)
