"""The n-gram's distribution as a part of the targets: gradients against autograd's, and the occurrence that is left out."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from config import ModelConfig
from loss import LinearCrossEntropy
from model import GPT
from support.ngrams import VOCAB, some_ids, stream_of
from training import ngram_teacher
from training.ngram import NgramModel
from training.ngram_teacher import Teacher, teacher_weight
from training.split import SplitModel

CPU = torch.device("cpu")


def counted(folder: Path) -> tuple[list[int], NgramModel]:
    ids = some_ids()
    return ids, NgramModel.counted(stream_of(folder, ids), VOCAB, 3)


def distributions(teacher: Teacher, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What the teacher says of every position, [M, vocab]."""
    found = torch.zeros(x.numel(), VOCAB)
    soft = teacher.targets(x, y, 1.0)
    for start in range(0, len(found), 5):
        soft.subtract(found[start : start + 5], start)
    return -found


def windows(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y [3, 9] of the text, and one window of ids that seldom or never follow each other in it."""
    rows = torch.tensor([ids[0:10], ids[250:260], [10, 9, 10, 0, 9, 9, 8, 9, 7, 10]])
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("kept", [1, 4 * VOCAB, 1 << 24])
def test_without_leaving_out_the_teacher_says_what_was_counted(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether few or all of the distributions after single ids are kept in memory."""
    monkeypatch.setattr(ngram_teacher, "FREQUENT", kept)
    ids, model = counted(tmp_path)
    x, y = windows(ids)
    found = distributions(Teacher(model, CPU, leave_out=False), x, y)
    for number, row in enumerate(x.tolist()):
        for at in range(len(row)):
            expected = model.distribution(np.array(row[: at + 1]))
            if at == 0:  # the window does not show what came before, so nothing but the bigram counts
                expected = Teacher(model, CPU).bigrams(torch.tensor(row[:1]))[0].numpy()
            assert found[number * 9 + at].numpy() == pytest.approx(expected, abs=1e-6)


def test_the_taught_occurrence_is_left_out(tmp_path: Path) -> None:
    """Against counts from which the 3-gram has been taken once, with the discounts of all counts."""
    ids, model = counted(tmp_path)
    x, y = windows(ids)
    found = distributions(Teacher(model, CPU), x, y)
    grams = Counter(tuple(ids[at : at + 3]) for at in range(len(ids) - 2))
    pairs = Counter(gram[1:] for gram in grams)
    below, above = (level.discounts for level in model.levels)
    p = model.unigram
    seen = Counter[int]()
    for number, row in enumerate(x.tolist()):
        for at in range(1, len(row)):
            u, v, w = row[at - 1], row[at], int(y[number, at])
            times = grams[u, v, w]
            seen[min(times, 3)] += 1
            bigrams = {b: c - (b == w and times == 1) for (a, b), c in pairs.items() if a == v}
            trigrams = {c: n - (c == w and times > 0) for (a, b, c), n in grams.items() if (a, b) == (u, v)}

            def mixed(counts: dict[int, int], off: np.ndarray, lower: np.ndarray) -> np.ndarray:
                total = sum(counts.values())
                if not total:
                    return lower
                held_back = sum(off[min(c, 3)] for c in counts.values())
                kept = np.array([counts.get(i, 0) - off[min(counts.get(i, 0), 3)] for i in range(VOCAB)])
                return (kept + held_back * lower) / total

            expected = mixed(trigrams, above, mixed(bigrams, below, p))
            got = found[number * 9 + at].numpy()
            assert got.sum() == pytest.approx(1.0, abs=1e-5)
            assert got[w] == pytest.approx(expected[w], abs=1e-5)
            assert got == pytest.approx(expected, abs=5e-3)  # the other ids share what an only occurrence leaves
            if times > 1:
                assert got == pytest.approx(expected, abs=1e-6)
    assert min(seen[times] for times in range(4)) > 0


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("leave_out", [True, False], ids=["left out", "counted"])
def test_gradients_are_those_of_autograd(weight: float, leave_out: bool, tmp_path: Path) -> None:
    ids, model = counted(tmp_path)
    x, y = windows(ids)
    teacher = Teacher(model, CPU, leave_out)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(rows, 6, generator=generator, requires_grad=True) for rows in (27, VOCAB + 3))
    flat = y.reshape(-1).clone()
    flat[4] = -1  # ignored
    loss = LinearCrossEntropy.apply(hidden, head, flat, VOCAB, torch.float32, 8, teacher.targets(x, y, weight))
    found = torch.autograd.grad(loss / 26, [hidden, head])

    logits = hidden @ head[:VOCAB].t()
    hard = F.cross_entropy(logits, flat, ignore_index=-1)
    kept = (flat >= 0)[:, None]
    soft = -(distributions(teacher, x, y) * logits.log_softmax(-1) * kept).sum() / 26
    expected = torch.autograd.grad((1 - weight) * hard + weight * soft, [hidden, head])
    assert float(loss.detach()) / 26 == pytest.approx(
        float(hard.detach()), abs=1e-5
    )  # the value is that of the one-hot targets
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_split_step_is_taught_the_same(tmp_path: Path) -> None:
    ids, counts = counted(tmp_path)
    soft = functools.partial(Teacher(counts, CPU).targets, weight=0.7)
    x, y = windows(ids)
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=9, vocab_size=VOCAB))
    model(x, y, soft(x, y)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    split = SplitModel(model, parts=2)
    with split.threads():
        split.backward(x, y, share=1.0, soft=soft)
        split.sum_gradients()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_the_weight_falls_with_the_tokens() -> None:
    weights = [teacher_weight(tokens, 1e6) for tokens in (0, 1e5, 1e6, 1e7, 1e8)]
    assert weights[0] == 1.0 and weights[2] == 0.5 and weights[-1] == 0.0 and weights == sorted(weights, reverse=True)
    assert teacher_weight(0, 0.0) == 0.0
