"""Decoding in fixed shapes: the same numbers as the plain steps, whatever is beside a row; on a GPU as recorded graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from config import GenerationParams
from inference.cuda_graphs import DecodeGraphs, attention_spans, is_batch_invariant, record_graphs
from inference.decoder import BatchDecoder, Sequence
from inference.quantize import prepare, row_counts
from model import GPT, KVCache
from support.tiny_models import random_model, shape, tiny_tokenizer

LENGTHS = [4, 8, 24]


def filled(model: GPT, slots: int) -> KVCache:
    """A cache whose slots have read 1, 3, 5, ... tokens; the last one none."""
    cache = model.new_cache(slots + 1)
    for slot in range(slots):
        model.prefill([(7 + slot + at) % 250 for at in range(1 + 2 * slot)], cache, slot)
    return cache


def test_spans_double_up_to_the_context() -> None:
    assert attention_spans(1024) == [128, 256, 512, 1024] and attention_spans(1000) == [128, 250, 500, 1000]
    assert attention_spans(64) == [64] and attention_spans(128) == [128] and attention_spans(129) == [128, 129]


@pytest.mark.parametrize("form", [{}, {"positions": "sinusoidal", "tied_head": False, "padding": 9}, {"bias": False}])
def test_fixed_shapes_give_the_plain_logits(form: dict) -> None:
    model = random_model(shape(tiny_tokenizer(), **form), seed=1)
    plain, fixed = filled(model, 7), filled(model, 7)
    graphs = DecodeGraphs(model, fixed, (2, 8), LENGTHS)
    asked = (([5, 6, 7], [0, 3, 6], 8, 3), ([9], [2], 2, 5), ([1, 2, 3, 4, 5, 6, 7], list(range(7)), 8, 3))
    for ids, slots, rows, steps in asked:
        for _ in range(steps):
            expected = model.decode(ids, plain, slots)
            found = graphs(ids, slots, rows)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert fixed.length == plain.length
    for ours, theirs in zip(fixed.layers, plain.layers, strict=True):  # rows that only pad have written nothing
        for slot, held in enumerate(plain.length[:-1]):
            torch.testing.assert_close(ours[slot, :, :, :held], theirs[slot, :, :, :held], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="full at 24"):
        for _ in range(30):
            graphs([1], [6], 2)
    assert fixed.length[6] == 24 and set(graphs.steps) == {(8, 24), (2, 8), (2, 24)}


class Thrice(nn.Module):
    """Queries, keys and values alike: no matrix product whose bits could depend on the rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 3)


@pytest.mark.parametrize("depends_on", ["nothing", "rows", "span"])
def test_rows_that_depend_on_each_other_are_detected(monkeypatch: pytest.MonkeyPatch, depends_on: str) -> None:
    model = random_model(shape(tiny_tokenizer()), seed=1)
    model.h[0].attn.c_attn, model.h[0].attn.c_proj = Thrice(), nn.Identity()

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        """Row by row, without what is masked, with an error that depends on the rows or the span if asked."""
        seen = (attn_mask[:, 0, 0] == 0).sum(1).tolist()
        rows = [(q[at] @ k[at, :, :n].mT).softmax(-1) @ v[at, :, :n] for at, n in enumerate(seen)]
        return torch.stack(rows) * (1 + 1e-6 * {"nothing": 0, "rows": len(q), "span": k.size(2)}[depends_on])

    monkeypatch.setattr("model.F.scaled_dot_product_attention", attend)
    assert is_batch_invariant(model, (2, 4), LENGTHS) is (depends_on == "nothing")


def test_there_are_no_graphs_without_a_gpu() -> None:
    model = random_model(shape(tiny_tokenizer()), seed=1)
    batch = BatchDecoder(model, 3)
    assert batch.graphs is None and len(batch.cache.length) == 3
    assert record_graphs(model, batch.cache, (1, 2)) is None


def written_by(model: GPT, slots: int) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    asked = [GenerationParams(max_tokens=30 + 7 * number, seed=number, temperature=1.0) for number in range(9)]
    batch, waiting = BatchDecoder(model, slots), list(asked)
    texts: list[Sequence] = []
    while waiting or batch.sequences:
        while waiting and batch.free_slots:
            params = waiting.pop(0)
            ids = tokenizer.encode("It was the best of times"[: 3 + 2 * len(waiting)])
            texts.append(
                Sequence(tokenizer, ids, params, seed=params.seed or 0, index=0, context=model.config.block_size)
            )
            batch.add(texts[-1])
        batch.step()
    return [text.output_ids for text in texts]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graphs_give_the_plain_logits_and_the_same_texts_in_any_batch(dtype: str) -> None:
    model = random_model(shape(tiny_tokenizer(), block_size=256, n_embd=64), seed=2).cuda()
    prepare(model, dtype)
    batch = BatchDecoder(model, 4)
    assert batch.graphs is not None, "this GPU's attention depends on a row's neighbours"
    assert written_by(model, 1) == written_by(model, 4) == written_by(model, 9)
    plain, fixed = filled(model, 4), filled(model, 4)
    graphs = record_graphs(model, fixed, row_counts(model))
    assert graphs is not None
    for _ in range(5):
        expected = model.decode([5, 6], plain, [1, 3], 8).cpu()
        torch.testing.assert_close(graphs([5, 6], [1, 3], 8), expected, rtol=0.02, atol=0.05 * float(expected.std()))
