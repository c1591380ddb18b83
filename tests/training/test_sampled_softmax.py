"""The softmax of some ids in place of all: gradients against autograd's, estimates without bias, and runs that repeat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import loss
from config import ModelConfig
from loss import IGNORE, Candidates, LinearCrossEntropy, head_loss
from model import GPT
from support.ngrams import VOCAB, some_ids, stream_of
from training.ngram import NgramModel
from training.ngram_teacher import SoftTargets, Teacher, inclusion

CPU = torch.device("cpu")


def teacher(folder: Path, sampled: int = 6, order: int = 3) -> Teacher:
    counts = NgramModel.counted(stream_of(folder, some_ids()), VOCAB, order)
    return Teacher(counts, CPU, sampled=sampled)


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    """x and y [3, 9]: two windows of the text, and one of ids that seldom or never follow each other in it."""
    ids = some_ids()
    rows = torch.tensor([ids[0:10], ids[250:260], [10, 9, 10, 0, 9, 9, 8, 9, 7, 10]])
    return rows[:, :-1], rows[:, 1:]


def head(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a network [27, 4] and the weight of a head [VOCAB, 4]."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, 4, generator=draw).requires_grad_() for rows in (27, VOCAB))  # type: ignore[return-value]


def gradients(total: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(total, of)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_with_every_id_drawn_nothing_changes(weight: float, order: int, tmp_path: Path) -> None:
    x, y = windows()
    every = teacher(tmp_path, order=order)
    every.sampled = VOCAB
    exact = teacher(tmp_path, sampled=0, order=order)
    h, w = head()
    flat = y.reshape(-1).clone()
    flat[5] = IGNORE
    results = []
    for one in (exact, every):
        total = head_loss(h, w, flat, VOCAB, torch.float32, one.targets(x, y, weight))
        results.append((total.detach(), *gradients(total, h, w)))
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_sample_of_the_whole_vocabulary_is_the_exact_softmax(tmp_path: Path) -> None:
    assert teacher(tmp_path, sampled=VOCAB).sampled == 0 and teacher(tmp_path, sampled=VOCAB - 1).sampled


def plain(h: torch.Tensor, w: torch.Tensor, drawn: Candidates, weight: float) -> torch.Tensor:
    """The sum of the estimated cross-entropies against one-hot and soft targets, by autograd."""
    log_p = F.log_softmax(h @ w[drawn.ids].t() - drawn.inclusion.log(), dim=1)
    hot = -log_p.gather(1, drawn.targets[:, None]).sum()
    return hot if drawn.soft is None else (1 - weight) * hot - weight * (drawn.soft * log_p).sum()


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_gradients_are_those_of_the_estimate(weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "SAMPLED_ROWS", 10)
    (x, y), some = windows(), teacher(tmp_path)
    h, w = head()
    found = gradients(head_loss(h, w, y.reshape(-1), VOCAB, torch.float32, some.targets(x, y, weight)), h, w)
    soft = some.targets(x, y, weight)
    parts = [plain(h[at : at + 10], w, soft.candidates(at, min(27, at + 10)), weight) for at in (0, 10, 20)]
    for one, other in zip(found, gradients(torch.stack(parts).sum(), h, w), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def many(some: Teacher, weight: float, draws: int = 4000) -> tuple[SoftTargets, list[Candidates]]:
    x, y = windows()
    soft = some.targets(x, y, weight)
    return soft, [soft.candidates(0, 27) for _ in range(draws)]


def test_the_sum_over_all_ids_is_estimated_without_bias(tmp_path: Path) -> None:
    h, w = (one.detach() for one in head())
    x, y = windows()
    x, y = x[:1, :3], y[:1, :3]  # few targets, so that much is left to chance
    soft = teacher(tmp_path, sampled=6).targets(x, y, 0.0)
    drawn = [soft.candidates(0, 3) for _ in range(4000)]
    each = torch.stack([(h[:3] @ w[one.ids].t()).exp().div(one.inclusion).sum(1) for one in drawn])
    off = (each.mean(0) - (h[:3] @ w.t()).exp().sum(1)) / (each.std(0) / len(each) ** 0.5)
    assert off.abs().max() < 4 and each.std() > 0
    assert sum(len(one.ids) for one in drawn) / len(drawn) == pytest.approx(6, abs=0.1)


def test_targets_are_always_drawn(tmp_path: Path) -> None:
    soft, drawn = many(teacher(tmp_path, sampled=3), 0.0, draws=50)
    for one in drawn:
        assert one.ids[one.targets].equal(soft.targets) and bool((one.inclusion[one.targets] == 1).all())
        assert one.ids.equal(one.ids.unique())


def test_soft_targets_are_estimated(tmp_path: Path) -> None:
    """Rows sum to 1, and their mean is near the distribution itself."""
    x, y = windows()
    x, y = x[:1, :6], y[:1, :6]
    soft = teacher(tmp_path, sampled=8).targets(x, y, 0.5)
    mean = torch.zeros(6, VOCAB)
    for _ in range(2000):
        one = soft.candidates(0, 6)
        assert one.soft is not None
        torch.testing.assert_close(one.soft.sum(1), torch.ones(6))
        mean[:, one.ids] += one.soft / 2000
    whole = torch.zeros(6, VOCAB)
    teacher(tmp_path, sampled=0).targets(x, y, 1.0).subtract(whole, 0)
    torch.testing.assert_close(mean, -whole, atol=0.03, rtol=0)


def test_what_the_bigrams_call_probable_is_drawn_more_often(tmp_path: Path) -> None:
    """Id 0 is more probable after 8 than after 2 by 0.2."""
    some = teacher(tmp_path, sampled=4)
    after_8, after_2 = teacher(tmp_path, sampled=0).bigrams(torch.tensor([8, 2]))[:, 0]
    seen = torch.zeros(2, VOCAB)
    for row, context in enumerate((8, 2)):
        soft = some.targets(torch.tensor([[context] * 4]), torch.tensor([[9] * 4]), 0.0)
        for _ in range(600):
            seen[row, soft.candidates(0, 4).ids] += 1
    assert after_8 > after_2 + 0.2 and seen[0, 0] > 1.5 * seen[1, 0]
    assert seen.min() > 0  # nothing is impossible


def test_chances_sum_to_what_was_asked() -> None:
    score = torch.tensor([100.0, 10, 1, 1, 1, 0])
    for expected in (1.0, 2.0, 3.5):
        found = inclusion(score, expected)
        assert float(found.sum()) == pytest.approx(expected, abs=0.02) and float(found.max()) <= 1
        assert found.sort(descending=True)[0].equal(found)
    assert inclusion(score, 5.0).equal(torch.tensor([1.0, 1, 1, 1, 1, 0]))


def test_the_seed_and_the_text_decide_what_is_drawn(tmp_path: Path) -> None:
    (x, y), some = windows(), teacher(tmp_path, sampled=6)

    def drawn(x: torch.Tensor, seed: int) -> list[list[int]]:
        soft = some.targets(x, y, 0.3, seed)
        return [soft.candidates(at, at + 3).ids.tolist() for at in range(0, 27, 3)]

    assert drawn(x, 5) == drawn(x, 5)
    assert drawn(x, 5) != drawn(x, 6)
    numbers = {float(torch.rand(1, generator=some.targets(text, y, 0.3, 5).generator)) for text in (x, x, x.flip(0))}
    assert len(numbers) == 2  # threads and ranks that compute other rows draw for themselves


def test_without_gradients_the_loss_is_exact(tmp_path: Path) -> None:
    (x, y), some = windows(), teacher(tmp_path)
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=9, vocab_size=VOCAB))
    with torch.no_grad():
        assert model(x, y, some.targets(x, y, 0.5)).equal(model(x, y))
    assert not model(x, y, some.targets(x, y, 0.5)).detach().equal(model(x, y).detach())
    assert LinearCrossEntropy is not loss.SampledCrossEntropy
