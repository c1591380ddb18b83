"""What a run counts in its training text before the first step: for its start, as its teacher, and as its yardstick.

>>> counting = Counting.of(data, vocab)
>>> counting.validation_loss(data.val, block_size=256, limit=100_000)     # nats a token, of counting alone
>>> compare(state)                                                        # beside the model's, at the end of a run
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
from devices import autocast
from evaluation.yardstick import YardstickSums
from inference.writing import eval_mode
from training.checkpointing import bits_per_byte
from training.ngram import NgramModel
from training.ngram_teacher import SoftTargets, Teacher

if TYPE_CHECKING:
    from model import GPT
    from training.state import TrainState

COMPARED_TOKENS = 50_000  # tokens at most that the model and counting are compared on at the end of a run
MAX_LOGITS = 1 << 26  # numbers of logits in memory at once


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
        counted_start(model, counts, train.seed)
    sampler = WindowSampler(len(data.train), model.config.block_size, train.seed)
    batches = training_batches(data.train, sampler, batch_size=batch, grad_accum_steps=1, device=device)
    return functools.partial(Teacher(counts, device).targets, weight=0.5) if train.ngram_teacher else None, batches


@torch.no_grad()
def compare(state: TrainState) -> dict[str, float]:
    """Bits a byte of counting, of the model, and of the best mixture, over the first tokens of the validation pass.

    A joint call of all ranks.
    """
    config, distributed, sums = state.model.config, state.distributed, YardstickSums()
    # as in `validate`: under FSDP all ranks must run the same batches
    rank, world = (0, 1) if distributed.mode == "fsdp" else (distributed.rank, distributed.size)
    batch = max(1, MAX_LOGITS // (config.block_size * config.vocab_size))
    limit = min(state.train.eval_tokens or COMPARED_TOKENS, COMPARED_TOKENS)
    with eval_mode(state.module), autocast(distributed.device, state.precision):
        for x, y in validation_batches(state.data.val, config.block_size, batch, limit, rank, world):
            logits = state.module(x.to(distributed.device)).float()
            found = logits.log_softmax(dim=-1).gather(-1, y.to(distributed.device)[:, :, None])[:, :, 0].exp()
            counted = state.counting.model.probabilities(rows_of(x, y))
            sums.add(found.flatten().cpu().double().numpy(), counted.ravel())
    tokens, *nats = distributed.sum_over_ranks([float(sums.tokens), *sums.nats.tolist()])
    total = YardstickSums(int(tokens), np.array(nats))
    split = state.data.manifest.splits.val
    return total.figures(size=tokens * split.bytes / split.tokens)


def counted_columns(state: TrainState) -> dict[str, float]:
    """Columns of a row of metrics with a validation loss: the loss of counting alone, the same in every row."""
    limit = state.train.eval_tokens
    loss = state.counting.validation_loss(state.data.val, state.sizes.block_size, limit)
    return {"counted_loss": loss, "counted_bpb": bits_per_byte(loss, state.data)}
