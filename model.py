"""GPT-2 in plain PyTorch: the one model behind training, generation, the server and the app.

    >>> model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=100))
    >>> loss = model(ids, targets)           # training: mean cross-entropy in nats a token
    >>> logits = model(ids)                  # every position at once
    >>> cache = model.new_cache(slots=1)     # generation: prefill once, then one token per step
    >>> logits = model.prefill([5, 17, 3], cache, slot=0)

Architecture: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
Letters: B batch, T time, C channels (n_embd), H heads, D head size (C/H), V rows of the embedding,
N ids the tokenizer has (N <= V; rows between N and V only pad the matrix and stay zero), S cache slots.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from config import ModelConfig
from loss import IGNORE, SoftTargets, head_loss

# On CPUs torch has no fused attention with dropout, so the [T, T] weights exist. From this context on they are computed
# again in the backward pass instead of being kept, this many numbers at a time.
RECOMPUTE_FROM = 512  # tokens
RECOMPUTE_AT_ONCE = 1 << 23  # attention weights


def sinusoids(length: int, channels: int) -> Tensor:
    """Fixed position table [length, channels] (Vaswani et al. 2017, section 3.5): sine in even, cosine in odd columns."""
    # Frequencies fall geometrically from 1 to about 1/10,000, one for each pair of columns; float64, as angles are large.
    rate = torch.exp(torch.arange(0, channels, 2, dtype=torch.float64) * (-math.log(10_000.0) / channels))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rate[None, :]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


def drop(x: Tensor, dropout: float, generator: torch.Generator | None = None) -> Tensor:
    """Dropout with the mask drawn from `generator`, as threads need it that each draw their own; None: torch's."""
    if generator is None or not dropout:
        return F.dropout(x, dropout) if dropout else x
    return x * torch.empty_like(x).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Causal attention spelled out: the reference that scaled_dot_product_attention is tested against.

    q, k, v are [B, H, T, D]; returns [B, H, T, D]. Holds the whole [B, H, T, T] matrix in memory.
    """
    T = q.size(-2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # [B, H, T, T], scaled so that softmax keeps a slope
    # a token may look at itself and at what came before: the upper triangle gets probability 0
    scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool, device=q.device).tril(), float("-inf"))
    weights = drop(scores.softmax(dim=-1), dropout, generator)  # each row summed to 1 before
    return weights @ v  # [B, H, T, D]: a weighted mean of the values


def heads_at_once(batch: int, length: int, heads: int, dropout: float, device: str) -> int:
    """Heads whose attention weights [B, heads, T, T] exist at once, to be recomputed in the backward pass; 0: no recomputing.

    Nothing is recomputed where a fused kernel needs no weights, or where they are few enough to keep. The weights and
    dropout masks of every layer would take 9 GB on a CPU at 124M parameters and T = 2048.
    """
    if device != "cpu" or not dropout or length < RECOMPUTE_FROM:
        return 0
    return min(heads, max(1, RECOMPUTE_AT_ONCE // (batch * length**2)))


def zeros_on_demand(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros whose memory a CPU takes only as it is written to; `torch.zeros` writes to all of it at once."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # A mapping of its own: what the C library hands out may have been used before, and would be cleared at once.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class KVCache:
    """Keys and values of the tokens each slot has read, so that each decoding step computes only the newest token.

    `layers[i]` is [S, 2, H, block_size, D], keys before values, allocated once; on a CPU a slot takes its memory when it
    is first used. Of a slot the first `length[slot]` tokens are valid.
    """

    def __init__(self, config: ModelConfig, slots: int, device: torch.device, dtype: torch.dtype):
        shape = (slots, 2, config.n_head, config.block_size, config.head_size)
        self.layers = [zeros_on_demand(shape, device, dtype) for _ in range(config.n_layer)]
        # Created once, as creating the views at every token would cost time.
        self.stores = [layer.unsqueeze(2).unbind() for layer in self.layers]  # views by slot, [2, 1, H, block_size, D]
        self.length = [0] * slots

    def reset(self, slot: int) -> None:
        """Forget what the slot has read."""
        self.length[slot] = 0

    def copy(self, source: int, target: int, tokens: int | None = None) -> None:
        """Let `target` continue from the first `tokens` (None: all) of `source`: samples share a prefill."""
        tokens = self.length[source] if tokens is None else tokens
        for layer in self.layers:
            # only the valid part: rows beyond `tokens` are overwritten before they are read
            layer[target, :, :, :tokens] = layer[source, :, :, :tokens]
        self.length[target] = tokens


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and the positions before it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys and values in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)  # mixes the heads' results
        self.n_head, self.head_size, self.dropout = config.n_head, config.head_size, config.dropout
        self.plain = False  # the reference implementation, for comparison
        self.generator: torch.Generator | None = None  # of the dropout; None: torch's own

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        # One matrix product for all three; C is split into H heads of D channels, which attend independently.
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        dropout = self.dropout if self.training else 0.0
        if self.plain or (dropout and self.generator):  # the fused kernels draw from torch's own generator
            y = plain_attention(q, k, v, dropout, self.generator)
        elif heads := heads_at_once(B, T, self.n_head, dropout, x.device.type):
            parts = zip(q.split(heads, 1), k.split(heads, 1), v.split(heads, 1), strict=True)
            attend = F.scaled_dot_product_attention  # a few heads at a time, each time without keeping the weights
            y = torch.cat([checkpoint(attend, *part, None, dropout, True, use_reentrant=False) for part in parts], 1)
        else:
            # fused kernel where torch has one (FlashAttention: Dao et al. 2022): it never stores the [T, T] weights
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return drop(self.c_proj(y), dropout, self.generator)

    def prefill(self, x: Tensor, store: Tensor, past: int, mask: Tensor | None) -> Tensor:
        """x [T, C] after the `past` tokens of one slot, whose keys and values [2, H, block_size, D] are extended.

        mask [T, past + T]: None if nothing came before, as is_causal aligns its triangle at the top left.
        """
        T, C = x.shape
        q, k, v = self.c_attn(x).view(T, 3, self.n_head, self.head_size).permute(1, 2, 0, 3)  # each [H, T, D]
        # write the new keys and values behind the past ones, then attend to both
        store[0, :, past : past + T], store[1, :, past : past + T] = k, v
        read = store[:, None, :, : past + T].to(q.dtype)  # [2, 1, H, past + T, D]
        y = F.scaled_dot_product_attention(q[None], read[0], read[1], attn_mask=mask, is_causal=mask is None)
        return cast(Tensor, self.c_proj(y[0].transpose(0, 1).reshape(T, C)))

    def decode(self, x: Tensor, stores: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """x [R, C], one new token for each of `stores`, the slots' keys and values, each [2, 1, H, block_size, D].

        Rows beyond the slots only pad. Attention goes row by row, so that a row's result does not depend on how long its
        neighbours are. The operations are few and plain: at one token a step, calling them costs as much as computing.
        """
        R, C = x.shape
        rows = []
        qkv = self.c_attn.forward(x).view(R, 3, 1, self.n_head, 1, self.head_size).unbind()  # each [3, 1, H, 1, D]
        for new, store, past in zip(qkv, stores, lengths, strict=False):
            store.narrow(3, past, 1).copy_(new.narrow(0, 1, 2))  # the new token's key and value, behind the others
            k, v = store.narrow(3, 0, past + 1).unbind()  # each [1, H, past + 1, D]
            rows.append(F.scaled_dot_product_attention(new[0], k, v))  # no mask: the newest token sees all others
        if R > len(rows):
            rows.append(x.new_zeros(R - len(rows), self.n_head, 1, self.head_size))
        return self.c_proj.forward((torch.cat(rows) if R > 1 else rows[0]).view(R, C))

    def decode_fixed(self, x: Tensor, layer: Tensor, slots: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """`decode` with shapes that do not depend on what the slots hold, as CUDA graphs need it.

        x [R, C] for `slots` [R] of the cache's `layer`, at `positions` [R]; mask [R, 1, 1, span] from GPT.span_mask.
        """
        R, C = x.shape
        q, k, v = self.c_attn(x).view(R, 3, self.n_head, self.head_size).unbind(1)  # each [R, H, D]
        layer[slots, 0, :, positions], layer[slots, 1, :, positions] = k, v
        # Every row reads the same span; the mask excludes positions that its slot has not filled.
        read = layer[:, :, :, : mask.size(-1)].index_select(0, slots)  # [R, 2, H, span, D]
        y = F.scaled_dot_product_attention(q[:, :, None], read[:, 0], read[:, 1], attn_mask=mask)  # [R, H, 1, D]
        return cast(Tensor, self.c_proj(y.reshape(R, C)))


class MLP(nn.Module):
    """Two linear layers, four times wider inside, with GPT-2's tanh GELU (Hendrycks & Gimpel 2016) between."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        # applied to each position on its own: only attention mixes positions
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # [B, T, 4C] inside
        return drop(x, self.dropout, self.generator) if self.training else x


class Block(nn.Module):
    """Pre-LayerNorm residual block: attention, then MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        # each half adds to the residual stream, which gradients pass unchanged; its input alone is normalised
        x = x + self.attn(self.ln_1(x))
        return cast(Tensor, x + self.mlp(self.ln_2(x)))

    def decode(self, x: Tensor, stores: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """One new token a row, x [R, C] -> [R, C]; see CausalSelfAttention.decode."""
        # .forward instead of a call skips torch's hook machinery, which costs time at every token
        x = x + self.attn.decode(self.ln_1.forward(x), stores, lengths)
        return x + self.mlp.forward(self.ln_2.forward(x))


class TiedHead(nn.Module):
    """The output head of a tied model: it has no weight of its own and reads the embedding's, so the tie cannot break."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.__dict__["embedding"] = embedding  # not registered: the weight is counted and saved once

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.__dict__["embedding"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def embedding(rows: int, channels: int) -> nn.Embedding:
    """An embedding [rows, channels]; on the meta device without drawing numbers, which would load torch's compiler (1.6 s)."""
    weight = torch.empty(rows, channels)
    return nn.Embedding(rows, channels, _weight=weight if weight.is_meta else None)


class GPT(nn.Module):
    """GPT-2: token and position embeddings, pre-norm blocks, a final LayerNorm and a (tied) head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not config.vocab_size:
            raise ValueError("vocab_size 0: set it to the tokenizer's size before the model is built")
        self.config = config
        self.generator: torch.Generator | None = None
        self.wte = embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = embedding(config.block_size, config.n_embd)
        else:
            # not persistent: it can be computed again, so it is not saved
            self.register_buffer("positions", sinusoids(config.block_size, config.n_embd), persistent=False)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head: nn.Module = (
            TiedHead(self.wte) if config.tied_head else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections N(0, 0.02/sqrt(2 n_layer)), padding rows zero."""
        if self.wte.weight.is_meta:
            return
        # every block adds two projections to the residual stream: the smaller they start, the deeper the model may be
        residual = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            # Matrices and tables are normal; biases start at 0 and LayerNorm weights at 1.
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=residual if name.endswith("c_proj.weight") else 0.02)
            else:
                nn.init.constant_(parameter, 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0)
        if self.config.positions == "sinusoidal":
            self.positions = sinusoids(self.config.block_size, self.config.n_embd).to(self.wte.weight.device)
        # rows beyond the tokenizer's ids only pad the matrices; a tied weight appears once
        for matrix in {id(w): w for w in (self.wte.weight, cast(Tensor, self.lm_head.weight))}.values():
            matrix[self.config.tokens :] = 0.0

    def _positions(self, start: int, stop: int) -> Tensor:
        table = self.wpe.weight if self.config.positions == "learned" else self.positions
        return table[start:stop]

    def _logits(self, x: Tensor) -> Tensor:
        """x [..., C] -> float32 logits [..., N]: ids that only pad the vocabulary do not appear at all."""
        if not isinstance(self.lm_head, (nn.Linear, TiedHead)):  # rounded, by inference/quantize.py
            return cast(Tensor, self.lm_head(x))[..., : self.config.tokens].float()
        weight = self.lm_head.weight
        rows = weight if weight.is_cuda else weight[: self.config.tokens]  # GPUs multiply the padded matrix faster
        return F.linear(x, rows)[..., : self.config.tokens].float()

    def forward(self, ids: Tensor, targets: Tensor | None = None, soft: SoftTargets | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, N]; with targets [B, T] the mean loss in nats a token, float32.

        Targets of -1 are ignored; if all are, the loss is 0. T beyond block_size raises ValueError. soft: distributions
        beside the targets, for the gradients alone; with `soft.sampled` the loss is an estimate where gradients are on.
        """
        B, T = ids.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens exceed the model's context of {self.config.block_size}: pass fewer")
        # Token embedding plus position embedding: attention itself does not see the order.
        x = self.wte(ids) + self._positions(0, T)  # [B, T, C]
        x = drop(x, self.config.dropout, self.generator) if self.training else x
        for block in self.h:
            x = block(x)  # [B, T, C]: every block adds what it has found to the stream
        x = self.ln_f(x)  # pre-norm blocks leave the stream unnormalised
        if targets is None:
            return self._logits(x)
        # head and loss in one, in the number format of autocast: the logits of the whole batch are never materialized
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        flat, weight = targets.reshape(-1), cast(Tensor, self.lm_head.weight)
        total = head_loss(x.view(B * T, -1), weight, flat, self.config.tokens, dtype, soft)
        return total / (flat != IGNORE).sum().clamp(min=1)  # the sum's mean over the targets that count

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        """ids [B, T] with `max_new_tokens` more drawn behind them, [B, T + max_new_tokens]: the whole idea in six lines.

        For notebooks: it computes the last block_size ids anew at every token, in the mode the model is in, and draws from
        torch's generator. Temperature 0 takes the likeliest. The commands write with `inference/`, which remembers.
        """
        if temperature < 0:
            raise ValueError(f"temperature {temperature:g} is negative: give 0 for the likeliest token, or more")
        for _ in range(max_new_tokens):
            logits = self(ids[:, -self.config.block_size :])[:, -1]  # [B, N], after the last token
            if top_k:
                logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
            if temperature:
                new = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
            else:
                new = logits.argmax(dim=-1, keepdim=True)
            ids = torch.cat((ids, new), dim=1)
        return ids

    def new_cache(self, slots: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `slots` sequences: 2 * n_layer * slots * block_size * n_embd numbers."""
        return KVCache(self.config, slots, self.wte.weight.device, dtype or self.ln_f.weight.dtype)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int] | Tensor, cache: KVCache, slot: int, every: bool = False) -> Tensor:
        """Read T tokens into a slot after those it has; returns the logits [N] after the last one, or [T, N]."""
        past, T = cache.length[slot], len(ids)
        if not T or past + T > self.config.block_size:
            raise ValueError(f"{past} + {T} tokens do not fit 1..{self.config.block_size}: pass the end of the text")
        x = self.wte(torch.as_tensor(ids, device=self.wte.weight.device)) + self._positions(past, past + T)  # [T, C]
        # [T, past + T]: a new token sees all past ones, and of the new ones those up to itself
        mask = torch.full((T, past + T), float("-inf"), dtype=x.dtype, device=x.device).triu(past + 1) if past else None
        for store, block in zip(cache.layers, cast(Sequence[Block], self.h), strict=True):
            x = x + block.attn.prefill(block.ln_1(x), store[slot], past, mask)
            x = x + block.mlp(block.ln_2(x))
        cache.length[slot] = past + T
        # generation needs only the logits after the last token: skip the head for the others
        return self._logits(self.ln_f(x)) if every else self._logits(self.ln_f(x[-1:]))[0]

    @torch.inference_mode()
    def decode(self, ids: Sequence[int], cache: KVCache, slots: Sequence[int], rows: int = 0) -> Tensor:
        """One new token for each of `slots`; returns logits [len(slots), N].

        rows: pad the batch to this many, as the last bits of a matrix product may depend on it (quantize.row_counts).
        """
        lengths = [cache.length[slot] for slot in slots]
        if max(lengths) >= self.config.block_size:
            raise ValueError(f"a slot is full at {self.config.block_size} tokens: prefill the end of its text again")
        device = self.wte.weight.device
        table = self._positions(0, self.config.block_size)  # each row is at its own position
        padding = [0] * (rows - len(slots))
        x = self.wte(torch.tensor([*ids, *padding], device=device))  # [R, C]
        x = x + table[torch.tensor([*lengths, *padding], device=device)]
        for stores, block in zip(cache.stores, cast(Sequence[Block], self.h), strict=True):
            x = block.decode(x, [stores[slot] for slot in slots], lengths)
        for slot in slots:
            cache.length[slot] += 1
        return self._logits(self.ln_f(x))[: len(slots)]

    @staticmethod
    def span_mask(positions: Tensor, span: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[R, 1, 1, span]: 0 up to each row's position, minus infinity beyond it."""
        beyond = torch.arange(span, device=positions.device) > positions[:, None]  # [R, span]
        return torch.zeros(beyond.shape, device=positions.device, dtype=dtype).masked_fill(beyond, -math.inf)[
            :, None, None
        ]

    @torch.inference_mode()
    def decode_fixed(self, ids: Tensor, cache: KVCache, slots: Tensor, positions: Tensor, span: int) -> Tensor:
        """`decode` in tensors alone (ids, slots, positions [R] on the model's device): logits [R, N].

        Every position must be below `span`. The cache's lengths are neither read nor changed.
        """
        x = self.wte(ids) + self._positions(0, self.config.block_size)[positions]  # [R, C]
        mask = self.span_mask(positions, span, x.dtype)
        for layer, block in zip(cache.layers, cast(Sequence[Block], self.h), strict=True):
            x = x + block.attn.decode_fixed(block.ln_1(x), layer, slots, positions, mask)
            x = x + block.mlp(block.ln_2(x))
        return self._logits(self.ln_f(x))

    def use_plain_attention(self, plain: bool = True) -> None:
        """Switch every block to the reference attention (slow; for comparison) or back."""
        for block in self.h:
            cast(Block, block).attn.plain = plain

    def draw_dropout_from(self, generator: torch.Generator | None) -> None:
        """Draw dropout from this generator, for a model that runs beside others in threads; None: from torch's own."""
        self.generator = generator
        for block in self.h:
            cast(Block, block).attn.generator = cast(Block, block).mlp.generator = generator

    def num_parameters(self) -> int:
        """Trainable numbers, the tied weight counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def report(self) -> list[tuple[str, int, int]]:
        """(component, parameters, bytes) of every part and, last, of the whole."""
        groups: dict[str, list[nn.Parameter]] = {}
        names = {"wte": "token embedding", "wpe": "position embedding", "lm_head": "output head", "ln_f": "LayerNorm"}
        for name, parameter in self.named_parameters():
            top = name.split(".")[0]
            inner = {"attn": "attention", "mlp": "MLP"}.get(name.split(".")[2], "LayerNorm") if top == "h" else ""
            groups.setdefault(inner or names[top], []).append(parameter)
        rows = [
            (name, sum(p.numel() for p in ps), sum(p.numel() * p.element_size() for p in ps))
            for name, ps in groups.items()
        ]
        return [*rows, ("total", sum(row[1] for row in rows), sum(row[2] for row in rows))]

    def flops_per_token(self) -> float:
        """Training cost of a token in FLOPs: 6 N + 12 L C T (Chowdhery et al. 2022, appendix B).

        Looking up an embedding costs nothing, so N leaves out tables that are only looked up.
        """
        c = self.config
        matrices = self.num_parameters() - (c.block_size * c.n_embd if c.positions == "learned" else 0)
        matrices -= 0 if c.tied_head else c.vocab_size * c.n_embd
        return 6.0 * matrices + 12.0 * c.n_layer * c.n_embd * c.block_size
