"""Decoding on NVIDIA GPUs as CUDA graphs: a step of the whole model is one launch instead of several hundred.

    >>> graphs = graphed(model, cache, row_counts(model))       # None where there is no GPU, or no gain to be had
    >>> logits = graphs([17, 3], [0, 2], rows=8)                # as model.decode([17, 3], cache, [0, 2], 8), on the CPU

A graph repeats fixed kernels on fixed shapes, so there is one for each number of rows and each span of positions that
attention looks back at, recorded when it is first needed. The rows of a batch must still not touch each other's bits:
`agrees` tries that with the model's own attention, and where it does not hold, texts are decoded row by row.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from model import GPT, Block, KVCache

SHORTEST = 128  # positions; each further span is twice as long, up to the context


def spans(context: int) -> list[int]:
    """Lengths that attention may look back at: SHORTEST, doubled up to the context."""
    lengths = [context]
    while lengths[0] > SHORTEST:
        lengths.insert(0, max(SHORTEST, lengths[0] // 2))
    return lengths


class Graphs:
    """`GPT.decode` for one cache, replayed. Its last slot belongs to the rows that only pad.

    On other devices than CUDA the same computation runs without being recorded, for the tests.
    """

    def __init__(self, model: GPT, cache: KVCache, counts: Sequence[int], lengths: Sequence[int]):
        self.model, self.cache, self.lengths = model, cache, lengths
        self.device = cache.layers[0].device
        self.cuda = self.device.type == "cuda"
        self.scratch = len(cache.length) - 1
        most = counts[-1]
        self.given = torch.zeros(3, most, dtype=torch.int64, pin_memory=self.cuda)  # ids, slots, positions
        self.taken = torch.zeros(3, most, dtype=torch.int64, device=self.device)
        self.shown = torch.zeros(most, model.config.tokens, pin_memory=self.cuda)
        self.plays: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int], slots: Sequence[int], rows: int = 0) -> Tensor:
        """One new token for each of `slots`; logits [len(slots), N] on the CPU, valid until the next call."""
        lengths = [self.cache.length[slot] for slot in slots]
        if max(lengths) >= self.model.config.block_size:
            raise ValueError(
                f"a slot is full at {self.model.config.block_size} tokens: prefill the end of its text anew"
            )
        rows = max(rows, len(slots))
        padding = [0] * (rows - len(slots))
        wanted = [[*ids, *padding], [*slots, *([self.scratch] * len(padding))], [*lengths, *padding]]
        span = next(length for length in self.lengths if length > max(lengths))
        if (rows, span) not in self.plays:
            self.record(rows, span)
        self.given[:, :rows] = torch.tensor(wanted)
        self.taken.copy_(self.given, non_blocking=True)
        logits = self.plays[rows, span]()
        shown = self.shown[: len(slots)]
        shown.copy_(logits[: len(slots)], non_blocking=True)
        if self.cuda:
            torch.cuda.current_stream(self.device).synchronize()
        for slot in slots:
            self.cache.length[slot] += 1
        return shown

    @torch.inference_mode()
    def record(self, rows: int, span: int) -> None:
        """Prepare the step for so many rows and positions, which then returns its logits [rows, N]."""
        ids, slots, positions = (part[:rows] for part in self.taken)

        def step() -> Tensor:
            return self.model.decode_fixed(ids, self.cache, slots, positions, span)

        if not self.cuda:
            self.plays[rows, span] = step
            return
        self.taken[1].fill_(self.scratch)  # what is computed now must not be written over a text
        self.taken[2].zero_()
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up at their first calls, which no graph may hold
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                logits = step()

        def play() -> Tensor:
            graph.replay()
            return logits

        self.plays[rows, span] = play


@torch.inference_mode()
def agrees(model: GPT, counts: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether attention gives a row the same bits for any number of rows and any span, tried on random numbers."""
    config, weight = model.config, model.wte.weight
    generator = torch.Generator().manual_seed(0)
    most, device = counts[-1], weight.device
    x = torch.randn(most, config.n_embd, generator=generator).to(weight)
    shape = (2, config.n_head, config.block_size, config.head_size)
    layer = torch.randn(shape, generator=generator).to(weight).repeat(most, 1, 1, 1, 1)
    slots = torch.arange(most, device=device)
    positions = slots * 7 % lengths[0]
    attention = cast(Block, model.h[0]).attn

    def rows(count: int, span: int) -> Tensor:
        mask = model.span_mask(positions[:count], span, x.dtype)
        return attention.decode_fixed(x[:count].contiguous(), layer, slots[:count], positions[:count], mask)

    reference = rows(most, lengths[-1])
    return all(torch.equal(rows(*tried), reference[: tried[0]]) for tried in itertools.product(counts, lengths))


def graphed(model: GPT, cache: KVCache, counts: Sequence[int]) -> Graphs | None:
    """Graphs for a model on a GPU; None on other devices, and where a row's bits would depend on its neighbours."""
    if cache.layers[0].device.type != "cuda":
        return None
    try:
        for lengths in (spans(model.config.block_size), [model.config.block_size]):
            if agrees(model, counts, lengths):
                graphs = Graphs(model, cache, counts, lengths)
                graphs.record(counts[0], lengths[0])
                return graphs
    except RuntimeError as error:
        warnings.warn(f"writing without CUDA graphs, several times slower: {error}", stacklevel=2)
    return None
