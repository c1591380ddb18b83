"""A step split over threads: every thread computes part of the micro-batch alone, without a barrier before the end.

torch's own way is to split every operation over the threads and to wait for all of them after each. A small model has
thousands of small operations in a step, and where another program keeps one core busy each of these waits lasts until the
scheduler has run both. Here a thread waits once a step. The result depends on the number of parts, which is a setting of
the run, and not on how many threads compute them or on how busy the machine is.

>>> module = SplitModel(model, parts=2)
>>> with module.threads():
...     loss = module.backward(x, y, share=1.0)   # x, y [B, T]
...     module.sum_gradients()                    # now in model.parameters()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from config import ModelConfig, TrainConfig
from devices import DistributedContext
from loss import IGNORE, SoftTargets
from model import GPT, RECOMPUTE_FROM

T = TypeVar("T")

# Beyond this size an operation keeps its threads busy for long enough, and every further part would hold gradients of
# its own in memory.
LARGEST = 60_000_000  # parameters


def with_parts(
    train: TrainConfig, model: ModelConfig, batch: int, distributed: DistributedContext
) -> tuple[TrainConfig, str]:
    """The settings with `parts` filled in for micro-batches of `batch` windows, and a warning or "".

    In place of 0: one for each thread that torch would use (OMP_NUM_THREADS or the cores) if the model is small, else 1.
    """
    parts, unsplit = _parts(train, model, batch, distributed)
    warning = f"--train.parts {train.parts}: {unsplit}" if unsplit and train.parts > 1 else ""
    return train.model_copy(update={"parts": parts}), warning


def _parts(train: TrainConfig, model: ModelConfig, batch: int, distributed: DistributedContext) -> tuple[int, str]:
    """(parts, why the step cannot be split or "")."""
    unsplit = ""
    if distributed.device.type != "cpu" or distributed.mode != "none":
        unsplit = "only a run of one process on a CPU splits its steps"
    elif train.compile == "on":
        unsplit = "a compiled model is not split"
    elif model.dropout and model.block_size >= RECOMPUTE_FROM:
        unsplit = f"with dropout a context of {model.block_size} is not split: attention is computed twice"
    if unsplit or train.parts:
        return 1 if unsplit else min(train.parts, batch), unsplit
    with torch.device("meta"):
        small = GPT(model).num_parameters() <= LARGEST
    return min(torch.get_num_threads(), batch) if small else 1, ""


def sharing_weights(model: GPT) -> GPT:
    """A second model on the same weights, in the same memory, with gradients of its own."""
    with torch.device("meta"):
        twin = GPT(model.config)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(path), leaf, nn.Parameter(parameter.detach()))
    for name, buffer in model.named_buffers():
        setattr(twin, name, buffer)
    return twin


class SplitModel(nn.Module):
    """A model whose batches are cut into `parts` by rows, each computed by one thread.

    It is called like the model with targets, and gives the same mean loss up to the order of sums. Dropout is drawn from
    one generator for each part, which `seed_dropout` seeds.
    """

    def __init__(self, model: GPT, parts: int):
        super().__init__()
        self.twins = nn.ModuleList([model, *(sharing_weights(model) for _ in range(parts - 1))])
        self.generators = [torch.Generator() for _ in range(parts)]
        for twin, generator in zip(self._models, self.generators, strict=True):
            twin.draw_dropout_from(generator if model.config.dropout else None)
        self.pool: ThreadPoolExecutor | None = None

    @property
    def _models(self) -> list[GPT]:
        return [cast(GPT, twin) for twin in self.twins]

    def seed_dropout(self, seed: int) -> None:
        """Seed every part's dropout, each differently."""
        for number, generator in enumerate(self.generators):
            generator.manual_seed(seed + number)

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """Threads for the parts while inside, each of which computes its operations alone, as does the caller."""
        before = torch.get_num_threads()
        workers = min(before, len(self.twins)) - 1  # the caller is one of them
        torch.set_num_threads(1)
        try:
            if workers:
                self.pool = ThreadPoolExecutor(workers, "step")  # new threads start with what was set last
            yield
        finally:
            if self.pool:
                self.pool.shutdown()
            self.pool = None
            torch.set_num_threads(before)

    def each(self, work: Callable[..., T], *arguments: Any) -> list[T]:
        """`work` on each tuple of zipped `arguments`, in threads of `threads()`; results in the arguments' order."""
        calls = list(zip(*arguments, strict=False))
        if self.pool is None:
            return [work(*call) for call in calls]
        # torch keeps both of these per thread
        autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        gradients = torch.is_grad_enabled()

        def inside(*call: Any) -> T:
            with torch.set_grad_enabled(gradients), torch.autocast("cpu", autocast[1], enabled=autocast[0]):
                return work(*call)

        waiting = [self.pool.submit(inside, *call) for call in calls[1:]]
        try:
            return [work(*calls[0]), *(future.result() for future in waiting)]
        finally:  # if a part failed, no other may still be computing when the error is handled
            for future in waiting:
                future.exception()

    def _shares(self, y: Tensor) -> tuple[tuple[Tensor, ...], list[float]]:
        """Targets by part, and each part's share of the targets that count."""
        targets = y.chunk(len(self.twins))
        counts = [int((part != IGNORE).sum()) for part in targets]
        return targets, [count / max(1, sum(counts)) for count in counts]

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids, targets [B, T] -> the mean loss in nats a token, without a graph for gradients: for validation."""
        parts, shares = self._shares(targets)
        with torch.no_grad():
            losses = self.each(lambda model, x, y: model(x, y), self._models, ids.chunk(len(self.twins)), parts)
        return torch.stack([loss * share for loss, share in zip(losses, shares, strict=True)]).sum()

    def backward(
        self, x: Tensor, y: Tensor, share: float, soft: Callable[[Tensor, Tensor], SoftTargets] | None = None
    ) -> Tensor:
        """Add the gradient of `share` times the mean loss of a micro-batch x, y [B, T] to the parts'; returns that loss.

        soft: makes the soft targets of some rows, as for `training.step.take_step`.
        """

        def work(model: GPT, x: Tensor, y: Tensor, weight: float) -> Tensor:
            loss = model(x, y, *([soft(x, y)] if soft else [])) * weight
            loss.backward()
            return cast(Tensor, loss.detach())

        parts, shares = self._shares(y)
        weights = [share * part for part in shares]
        losses: list[Tensor] = self.each(work, self._models, x.chunk(len(self.twins)), parts, weights)
        return torch.stack(losses).sum()

    def sum_gradients(self) -> None:
        """Sum the parts' gradients in the model's own, in the order of the parts, and drop the parts'."""
        first, *others = ([p for p in twin.parameters() if p.grad is not None] for twin in self._models)
        for twin in filter(None, others):  # a batch of fewer rows than parts leaves some without
            torch._foreach_add_([cast(Tensor, p.grad) for p in first], [cast(Tensor, p.grad) for p in twin])
            for parameter in twin:
                parameter.grad = None


def step_threads(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The threads of a split model; nothing for any other."""
    return module.threads() if isinstance(module, SplitModel) else contextlib.nullcontext()
