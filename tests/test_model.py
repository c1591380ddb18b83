"""The GPT: counts, initialisation, causality, padding, loss, cache."""

from __future__ import annotations

import copy
import math
import mmap
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from config import ModelConfig, load_config, preset_names
from devices import keep_memory
from loss import LinearCrossEntropy
from model import GPT, KVCache, sinusoids
from support.helpers import ROOT

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=104, vocab_used=100)


def tiny(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(TINY.model_copy(update=changes)).eval()


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("preset", "changes", "count"),
    [
        ("victorian", {}, 125_262_336),
        ("victorian", {"bias": False}, 125_160_192),
        ("shakespeare-124m", {}, 124_439_808),
        ("starter", {"vocab_size": 986}, 2_084_864),
    ],
)
def test_parameter_counts(preset: str, changes: dict, count: int) -> None:
    with torch.device("meta"):
        model = GPT(load_config(preset).model.model_copy(update=changes))
    assert model.num_parameters() == count
    assert model.report()[-1] == ("total", count, 4 * count)
    assert sum(row[1] for row in model.report()[:-1]) == count


def test_the_docs_state_the_true_counts() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([\w-]+)` \|(.+)\|$", text, re.M))
    assert sorted(table) == preset_names()
    del table["finetune"]  # it takes the shape of another model
    for name, row in table.items():
        shape, context, vocabulary, parameters, _ = row.split(" | ")
        config = load_config(name).model
        stated = [int(number) for number in shape.split(", ")]
        assert stated == [config.n_layer, config.n_head, config.n_embd] and int(context) == config.block_size
        ids = 986 if name == "starter" else int(re.match(r"[\d,]+", vocabulary)[0].replace(",", ""))
        with torch.device("meta"):
            model = GPT(config.model_copy(update={"vocab_size": config.vocab_size or ids}))
        assert model.num_parameters() == int(parameters.split(" at ")[0].replace(",", "")), name


def test_untrained_loss_and_initialisation() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=8, n_head=4, n_embd=128, block_size=32, vocab_size=50304, vocab_used=50257))
    x = torch.randint(0, 50257, (4, 32))
    assert 10.8 < model(x, x.roll(1)).item() < 11.1
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert float(parameter.std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        elif name.endswith("bias"):
            assert not parameter.any()
        elif ".ln_" in f".{name}":
            assert bool((parameter == 1).all())
    assert not model.wte.weight[50257:].any()


def test_one_batch_can_be_overfitted() -> None:
    model = tiny()
    x = ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.1
    assert not model.wte.weight[100:].any()  # padding rows stay zero through training


def test_the_tie_cannot_break() -> None:
    model = tiny()
    with torch.device("meta"):
        hollow = GPT(TINY)
    hollow.to_empty(device="cpu")
    assigned = tiny()
    assigned.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    loaded = tiny()
    loaded.load_state_dict(model.state_dict())
    for each in (model, model.to(torch.float64), hollow, assigned, loaded, copy.deepcopy(model)):
        assert each.lm_head.weight is each.wte.weight
        assert sum(p is each.wte.weight for p in each.parameters()) == 1
        assert "lm_head.weight" not in each.state_dict()


def test_untied_head_has_its_own_weight() -> None:
    model = tiny(tied_head=False)
    assert model.lm_head.weight is not model.wte.weight
    assert "lm_head.weight" in model.state_dict()


@pytest.mark.parametrize("plain", [False, True])
def test_the_future_is_not_seen(plain: bool) -> None:
    model = tiny()
    model.use_plain_attention(plain)
    x = ids(2, 16)
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 100
    with torch.no_grad():
        a, b = model(x), model(changed)
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.equal(a[:, 9:], b[:, 9:])


def test_padding_ids_cannot_appear() -> None:
    model = tiny()
    with torch.no_grad():
        model.wte.weight.normal_()
    assert model(ids(1, 4)).shape == (1, 4, 100)
    assert model.prefill([1, 2], model.new_cache(1), 0).shape == (100,)


def test_plain_attention_equals_the_fused_one() -> None:
    model, x = tiny(), ids(3, 16)
    with torch.no_grad():
        fused = model(x)
        model.use_plain_attention()
        plain = model(x)
        model.use_plain_attention(False)
    assert (fused - plain).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "chunk"), [(7, 3), (8, 4), (5, 100), (1, 1)])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_lean_loss_equals_the_plain_one(rows: int, chunk: int, ignored: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 6, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(12, 6, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 10, (rows,), generator=generator)
    if ignored == "some":
        targets[::2] = -1
    elif ignored == "all":
        targets[:] = -1
    count = int((targets != -1).sum().clamp(min=1))
    lean = LinearCrossEntropy.apply(x, weight, targets, 10, dtype, chunk) / count
    gradients = torch.autograd.grad(lean, (x, weight))
    plain = F.cross_entropy((x @ weight.t())[:, :10], targets, ignore_index=-1, reduction="sum") / count
    expected = torch.autograd.grad(plain, (x, weight))
    assert float(lean) == pytest.approx(float(plain), abs=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_lean_loss_keeps_small_gradients_in_half_precision() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.arange(64) % 20
    (LinearCrossEntropy.apply(x, weight, targets, 20, torch.bfloat16, 16) * 1e-6).backward()
    scale = weight.grad / 1e-6
    F.cross_entropy(x.detach().float() @ weight.t(), targets, reduction="sum")
    assert bool(torch.isfinite(scale).all())
    assert float(scale.abs().max()) > 0.1


def test_all_ignored_gives_zero() -> None:
    model = tiny()
    loss = model(ids(2, 8), torch.full((2, 8), -1))
    assert float(loss) == 0.0


def test_a_compiled_step_is_one_graph() -> None:
    """Nothing in the model or its loss sends the compiler back to Python, chunks and ignored targets included."""
    model, x = tiny(dropout=0.1).train(), ids(2, 17)
    y = x[:, 1:].clone()
    y[0, 0] = -1
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(x[:, :-1].contiguous(), y)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_loss_equals_the_eager_one_without_recompiling() -> None:
    model, x = tiny(), ids(2, 17)
    expected = float(model(x[:, :-1], x[:, 1:]))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter)
    found = [float(compiled(x[:, :-1], x[:, 1:])) for _ in range(2)]
    after_two = counter.frame_count
    found += [float(compiled(x[:, :-1], x[:, 1:])) for _ in range(3)]
    assert counter.frame_count == after_two
    assert found == pytest.approx([expected] * 5, abs=1e-4)


def test_sinusoids_follow_the_formula() -> None:
    table = sinusoids(50, 8)
    for position in (0, 7, 49):
        for pair in range(4):
            angle = position / 10_000 ** (2 * pair / 8)
            assert float(table[position, 2 * pair]) == pytest.approx(math.sin(angle), abs=1e-5)
            assert float(table[position, 2 * pair + 1]) == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("shape", [{}, {"positions": "sinusoidal", "tied_head": False}, {"bias": False}])
@pytest.mark.parametrize("chunk", [1, 3, 15])
def test_cached_logits_equal_the_full_pass(chunk: int, shape: dict) -> None:
    model, x = tiny(**shape), ids(1, 16)[0].tolist()
    full = model(torch.tensor([x]))[0]
    cache = model.new_cache(2)
    for start in range(0, 15, chunk):
        part = x[start : min(15, start + chunk)]
        last = model.prefill(part, cache, 1)
        torch.testing.assert_close(last, full[start + len(part) - 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.decode(x[15:], cache, [1])[0], full[15], rtol=1e-5, atol=1e-5)
    assert cache.length == [0, 16]


def test_the_context_ends_with_a_clear_error() -> None:
    model, x = tiny(), ids(1, 17)[0].tolist()
    cache = model.new_cache(1)
    with pytest.raises(ValueError, match="context of 16"):
        model(torch.tensor([x]))
    with pytest.raises(ValueError, match="do not fit"):
        model.prefill(x, cache, 0)
    model.prefill(x[:16], cache, 0)
    with pytest.raises(ValueError, match="full at 16"):
        model.decode([1], cache, [0])


def test_a_copied_slot_goes_on_alone() -> None:
    model = tiny()
    cache: KVCache = model.new_cache(2)
    model.prefill([1, 2, 3], cache, 0)
    cache.copy(0, 1)
    both = model.decode([4, 5], cache, [0, 1])
    alone = model.new_cache(1)
    model.prefill([1, 2, 3], alone, 0)
    torch.testing.assert_close(both[1], model.decode([5], alone, [0])[0], rtol=1e-5, atol=1e-5)
    cache.reset(1)
    assert cache.length == [4, 0]


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory in use is read from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_takes_its_memory_when_it_is_used(dtype: torch.dtype) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    keep_memory()  # as in a run that writes samples: what is freed stays with the process
    config, held = TINY.model_copy(update={"block_size": 1024, "n_embd": 1024}), torch.ones(1 << 26)
    del held
    before = resident()
    cache = KVCache(config, 32, torch.device("cpu"), dtype)
    size = sum(layer.nbytes for layer in cache.layers)
    assert size == 2 * 2 * 32 * 1024 * 1024 * dtype.itemsize and resident() - before < size / 8
    assert {layer.dtype for layer in cache.layers} == {dtype} and {layer.data_ptr() % 64 for layer in cache.layers} == {
        0
    }
    cache.layers[1][5] += 1
    assert size / 64 <= resident() - before < size / 4
    assert int(cache.layers[1].count_nonzero()) == cache.layers[1][5].numel()


@pytest.mark.parametrize("heads", [1, 2])
def test_recomputed_attention_is_the_same(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on a CPU over long windows: few heads' weights at a time, with the same masks in the backward pass."""
    held: list[tuple[int, ...]] = []

    def gradients(drop: float, **limits: int) -> list[torch.Tensor]:
        for name, value in limits.items():
            monkeypatch.setattr(f"model.{name}", value)
        model = tiny(n_layer=1).train()
        model.h[0].attn.dropout = drop  # in the attention alone, so that what is kept can be told by its size
        torch.manual_seed(5)
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(tuple(t.shape)) or t, lambda t: t):
            model(ids(3, 12), ids(3, 12, seed=2)).backward()
        return [p.grad for p in model.parameters()]

    kept = gradients(0.5 if heads == 2 else 1e-12, RECOMPUTE_FROM=10**9)
    assert any(shape[-2:] == (12, 12) for shape in held)
    again = gradients(0.5 if heads == 2 else 1e-12, RECOMPUTE_FROM=8, RECOMPUTE_AT_ONCE=3 * heads * 12 * 12)
    assert held and not any(shape[-2:] == (12, 12) for shape in held)
    for first, second in zip(kept, again, strict=True):
        assert torch.equal(first, second) if heads == 2 else torch.allclose(first, second, atol=1e-6)


def test_fifty_steps_lose_what_the_plain_computation_loses() -> None:
    """Chunked loss and fused attention against logits, cross_entropy and attention spelled out: the same training."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=90, vocab_used=83)
    losses: list[list[float]] = []
    for plain in (False, True):
        torch.manual_seed(1)
        model = GPT(config)
        model.use_plain_attention(plain)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses.append([])
        for step in range(50):
            ids = torch.randint(0, 83, (4, 17), generator=torch.Generator().manual_seed(step % 5))
            x, y = ids[:, :-1], ids[:, 1:].clone()
            y[0, :3] = -1
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1) if plain else model(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_generate_draws_what_the_model_finds_likely() -> None:
    model = GPT(TINY).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    more = TINY.block_size + 4  # past the context
    best = model.generate(ids, more, temperature=0)
    assert best.shape == (2, 3 + more) and torch.equal(best[:, :3], ids)
    for at in range(3, best.size(1)):
        assert torch.equal(best[:, at], model(best[:, max(0, at - TINY.block_size) : at])[:, -1].argmax(-1))
    assert torch.equal(model.generate(ids, more, top_k=1), best)
    torch.manual_seed(5)
    drawn = model.generate(ids[:1].repeat(3000, 1), 1, temperature=0.7, top_k=4)[:, -1]
    logits = model(ids[:1])[0, -1]
    expected = torch.zeros_like(logits)
    expected[logits.topk(4).indices] = (logits.topk(4).values / 0.7).softmax(-1)
    shares = torch.bincount(drawn, minlength=len(logits)) / len(drawn)
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="temperature -1 is negative"):
        model.generate(ids, 1, temperature=-1)
