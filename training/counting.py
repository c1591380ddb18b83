"""What a run counts in its training text before the first step: for its start, as its teacher, and as its yardstick.

>>> counting = Counting.of(data)
>>> counting.validation_loss(data.val, block_size=256, limit=100_000)     # nats a token, of counting alone
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from config import TrainConfig
from dataset import TokenData, TokenStream, WindowSampler, training_batches, validation_batches
from training.ngram import NgramModel
from training.ngram_teacher import SoftTargets, Teacher

if TYPE_CHECKING:
    from model import GPT


def rows_of(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """The windows [B, T + 1] that x and y [B, T] were cut from."""
    return torch.cat((x, y[:, -1:]), dim=1).numpy()


@dataclass
class Counting:
    """Counted n-grams of a run's training text."""

    model: NgramModel
    val_loss: float | None = field(init=False, default=None)
    """Loss of counting alone over the validation pass, once it is known."""

    @classmethod
    def of(cls, data: TokenData) -> Counting:
        """Count the training split."""
        return cls(NgramModel.counted(data.train, data.manifest.tokenizer.vocab_size))

    def validation_loss(self, stream: TokenStream, block_size: int, limit: int) -> float:
        """Loss of counting alone over the fixed validation pass, in nats a token; it sees of each window what a model sees."""
        if self.val_loss is not None:
            return self.val_loss
        nats, count = 0.0, 0
        for x, y in validation_batches(stream, block_size, 64, limit):
            found = self.model.probabilities(rows_of(x, y))
            nats, count = nats - float(np.log(found).sum()), count + found.size
        self.val_loss = nats / count
        return self.val_loss


def counted_trial(
    folder: Path, batch: int, model: GPT, train: TrainConfig
) -> tuple[Callable[[torch.Tensor, torch.Tensor], SoftTargets] | None, Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """For `--plan`: start `model` from the prepared texts in `folder` if `train` says so, and make what its steps need.

    Returns what makes the soft targets of a micro-batch (None without teacher), and endless micro-batches.
    """
    from training.ngram_start import counted_start

    data, device = TokenData.open(folder), model.wte.weight.device
    counts = Counting.of(data).model
    if train.ngram_start:
        counted_start(model, counts, train.seed, train.sampled_softmax)
    sampler = WindowSampler(len(data.train), model.config.block_size, train.seed)
    batches = training_batches(data.train, sampler, batch_size=batch, grad_accum_steps=1, device=device)
    if not (train.ngram_teacher or train.sampled_softmax):
        return None, batches
    teacher = Teacher(counts, device, sampled=train.sampled_softmax)
    return functools.partial(teacher.targets, weight=0.5 if train.ngram_teacher else 0.0), batches
