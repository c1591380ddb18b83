"""Decoding on NVIDIA GPUs as CUDA graphs: a step of the whole model is one launch instead of several hundred.

    >>> graphs = record_graphs(model, cache, row_counts(model))    # None without a GPU, or when not batch-invariant
    >>> logits = graphs([17, 3], [0, 2], rows=8)                   # as model.decode([17, 3], cache, [0, 2], 8), on the CPU

A graph repeats fixed kernels on fixed shapes. So there is one for each number of rows and each span, the number of
positions that attention looks back at; each is recorded when it is first needed. Rows of padding use the cache's last slot.

The bits of a row must not depend on the other rows here either. `is_batch_invariant` tests that with the model's own
attention; where it fails, there are no graphs.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from model import GPT, Block, KVCache

SHORTEST_SPAN = 128  # positions; each further span is twice as long, up to the context


def attention_spans(context: int) -> list[int]:
    """Numbers of positions that attention may look back at: SHORTEST_SPAN, doubled up to the context."""
    spans = [context]
    while spans[0] > SHORTEST_SPAN:
        spans.insert(0, max(SHORTEST_SPAN, spans[0] // 2))
    return spans


class DecodeGraphs:
    """`GPT.decode` for one cache as recorded graphs. On devices other than CUDA (in tests) the same step is not recorded."""

    def __init__(self, model: GPT, cache: KVCache, row_counts: Sequence[int], spans: Sequence[int]):
        self.model, self.cache, self.spans = model, cache, spans
        self.device = cache.layers[0].device
        self.cuda = self.device.type == "cuda"
        self.padding_slot = len(cache.length) - 1
        most = row_counts[-1]
        # A graph reads and writes fixed addresses: inputs go through these buffers, [0] ids, [1] slots, [2] positions.
        self.host_inputs = torch.zeros(3, most, dtype=torch.int64, pin_memory=self.cuda)
        self.inputs = torch.zeros(3, most, dtype=torch.int64, device=self.device)
        self.host_logits = torch.zeros(most, model.config.tokens, pin_memory=self.cuda)
        self.steps: dict[tuple[int, int], Callable[[], Tensor]] = {}  # by (rows, span)
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int], slots: Sequence[int], rows: int = 0) -> Tensor:
        """One new token for each of `slots`; logits [len(slots), N] on the CPU, valid until the next call."""
        lengths = [self.cache.length[slot] for slot in slots]
        if max(lengths) >= self.model.config.block_size:
            raise ValueError(
                f"a slot is full at {self.model.config.block_size} tokens: prefill the end of its text again"
            )
        rows = max(rows, len(slots))
        padding = [0] * (rows - len(slots))
        given = [[*ids, *padding], [*slots, *([self.padding_slot] * len(padding))], [*lengths, *padding]]
        span = next(span for span in self.spans if span > max(lengths))
        if (rows, span) not in self.steps:
            self.record(rows, span)
        self.host_inputs[:, :rows] = torch.tensor(given)
        self.inputs.copy_(self.host_inputs, non_blocking=True)
        logits = self.steps[rows, span]()
        host_logits = self.host_logits[: len(slots)]
        host_logits.copy_(logits[: len(slots)], non_blocking=True)
        if self.cuda:
            torch.cuda.current_stream(self.device).synchronize()
        for slot in slots:
            self.cache.length[slot] += 1
        return host_logits

    @torch.inference_mode()
    def record(self, rows: int, span: int) -> None:
        """Prepare the step for so many rows and positions; it returns logits [rows, N] on the device."""
        ids, slots, positions = (part[:rows] for part in self.inputs)

        def step() -> Tensor:
            return self.model.decode_fixed(ids, self.cache, slots, positions, span)

        if not self.cuda:
            self.steps[rows, span] = step
            return
        # What runs during recording must not write over a text: all rows point at the slot for padding.
        self.inputs[1].fill_(self.padding_slot)
        self.inputs[2].zero_()
        with torch.cuda.device(self.device):
            # Libraries allocate their workspaces at the first calls, which no graph may contain: warm up beside it.
            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(warm_up)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        self.steps[rows, span] = replay


@torch.inference_mode()
def is_batch_invariant(model: GPT, row_counts: Sequence[int], spans: Sequence[int]) -> bool:
    """Whether attention gives a row the same bits for any number of rows and any span, tested on random numbers."""
    config, weight = model.config, model.wte.weight
    generator = torch.Generator().manual_seed(0)
    most, device = row_counts[-1], weight.device
    x = torch.randn(most, config.n_embd, generator=generator).to(weight)
    shape = (2, config.n_head, config.block_size, config.head_size)
    layer = torch.randn(shape, generator=generator).to(weight).repeat(most, 1, 1, 1, 1)  # of the cache, as if filled
    slots = torch.arange(most, device=device)
    positions = slots * 7 % spans[0]
    attention = cast(Block, model.h[0]).attn

    def attend(rows: int, span: int) -> Tensor:
        mask = model.span_mask(positions[:rows], span, x.dtype)
        return attention.decode_fixed(x[:rows].contiguous(), layer, slots[:rows], positions[:rows], mask)

    reference = attend(most, spans[-1])
    tried = itertools.product(row_counts, spans)
    return all(torch.equal(attend(rows, span), reference[:rows]) for rows, span in tried)


def record_graphs(model: GPT, cache: KVCache, row_counts: Sequence[int]) -> DecodeGraphs | None:
    """Graphs for a model on a GPU; None on other devices, or when decoding is not batch-invariant."""
    if cache.layers[0].device.type != "cuda":
        return None
    try:
        for spans in (attention_spans(model.config.block_size), [model.config.block_size]):
            if is_batch_invariant(model, row_counts, spans):
                graphs = DecodeGraphs(model, cache, row_counts, spans)
                graphs.record(row_counts[0], spans[0])
                return graphs
    except RuntimeError as error:
        warnings.warn(f"writing without CUDA graphs, several times slower: {error}", stacklevel=2)
    return None
