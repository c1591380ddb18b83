"""Weights that know the counted bigrams before the first step, and two heads that look one and two tokens back.

>>> counted_start(model, NgramModel.counted(data.train, vocab), seed=1337)

The logarithm of bigram over unigram probability, weighted by frequency, is factorised (Levy & Goldberg 2014 showed that
word embeddings do the same): its two sides become embedding and head, so the model needs a head of its own. The residual
projections begin at zero, so that at first only the final LayerNorm is between them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from loss import head_loss
from training.ngram import NgramModel
from training.ngram_teacher import Teacher
from training.optimizer import AdamW

if TYPE_CHECKING:
    from model import GPT, Block

POSITIONS = 16  # channels for positions, as pairs of sine and cosine
RARE = 0.95  # share of the text whose embeddings keep their length; those of rarer ids are cut to the same
EMBEDDING_RMS = 0.5  # of embedding and position together
SHARPNESS = 10.0  # by how much a looking-back head's score of its target exceeds the others, at least
POLISH_STEPS, POLISH_CONTEXTS, POLISH_RATE = 40, 2048, 4e-3


def factors(model: NgramModel, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(embeddings [V, rank], heads [V, rank], frequencies of the contexts [V]): log P(w|v) ~ e_v . h_w + log p(w).

    model: of order 2. A randomised SVD (Halko et al. 2011) of diag(sqrt f) log(P2 / p1) diag(sqrt p1), which is a
    sparse matrix of the bigrams that occur and one of rank 1 for the others.
    """
    level, size = model.levels[0], model.vocab
    v, w = level.keys >> model.bits, level.keys & ((1 << model.bits) - 1)
    p = model.unigram
    place = np.searchsorted(level.contexts, v)
    kept = level.counts - level.discounts[np.minimum(level.counts, 3)]
    frequency = np.zeros(size)
    frequency[level.contexts] = level.totals / level.totals.sum()
    log_weight = np.zeros(size)  # of the unigram after each context: log(P2 / p1) of what has not occurred
    log_weight[level.contexts] = np.log(level.held_back / level.totals)
    seen = np.log1p(kept / (level.held_back[place] * p[w]))
    row, column = np.sqrt(frequency), np.sqrt(p)
    sparse = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([v, w])),
        torch.from_numpy((seen * row[v] * column[w]).astype(np.float32)),
        (size, size),
        is_coalesced=True,
        check_invariants=False,
    )
    turned = sparse.t().coalesce()
    left, right = (torch.from_numpy(side.astype(np.float32))[:, None] for side in (row * log_weight, column))

    def times(x: Tensor) -> Tensor:
        x = (
            x.contiguous()
        )  # QR returns columns one after the other, with which a sparse product takes seven times as long
        return cast(Tensor, torch.sparse.mm(sparse, x) + left * (right.t() @ x))

    def times_turned(x: Tensor) -> Tensor:
        x = x.contiguous()
        return cast(Tensor, torch.sparse.mm(turned, x) + right * (left.t() @ x))

    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(times(torch.randn(size, min(size, rank + 8), generator=generator)))[0]
    for _ in range(2):
        q = torch.linalg.qr(times(torch.linalg.qr(times_turned(q))[0]))[0]
    u, s, vt = torch.linalg.svd(times_turned(q).t(), full_matrices=False)
    u, s, vt = (q @ u)[:, :rank], s[:rank], vt[:rank]
    root = s.sqrt()
    rows = np.maximum(row, np.sqrt(0.1 / level.totals.sum()))[:, None]
    return (u * root).numpy() / rows, (vt.t() * root).numpy() / column[:, None], frequency


def frequencies(length: int) -> Tensor:
    """Angles a position turns by, [POSITIONS / 2]: spread over (0, pi) so that no two offsets below `length` look alike."""
    half = POSITIONS // 2
    offsets = torch.arange(1, max(2, length), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    best, found = math.inf, torch.zeros(half, dtype=torch.float64)
    for _ in range(200):
        angles = math.pi * (torch.arange(half) + torch.rand(half, generator=generator, dtype=torch.float64)) / half
        alike = float((offsets[:, None] * angles).cos().sum(1).max())
        if alike < best:
            best, found = alike, angles
    return found


def turned_positions(angles: Tensor, first: int, length: int) -> Tensor:
    """Sines and cosines of positions first .. first+length-1, [length, POSITIONS], of norm sqrt(POSITIONS / 2)."""
    angle = torch.arange(first, first + length, dtype=torch.float64)[:, None] * angles
    return torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)


@torch.no_grad()
def counted_start(model: GPT, counts: NgramModel, seed: int, sampled: int = 0) -> None:
    """Set the weights of a new model: embedding, positions, head, final LayerNorm, residual projections, first layer's heads.

    sampled: ids that a softmax computes, about; 0: all.
    """
    C, V = model.config.n_embd, model.config.tokens
    positions = POSITIONS if model.config.positions == "learned" else 0
    rank = min(C - 2 - positions, V)
    bigrams = counts.lower(2)
    e, h, frequency = (torch.from_numpy(one).float() for one in factors(bigrams, rank, seed))

    # 1. An orthonormal basis [C, C] whose first column is constant: what LayerNorm takes out, and what its bias alone adds.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(C, C, generator=generator)
    noise[:, 0] = 1.0
    basis = torch.linalg.qr(noise)[0]
    basis[:, 0] = 1 / math.sqrt(C)
    tokens, fill, places = basis[:, 1 : 1 + rank], basis[:, 1 + rank], basis[:, C - positions :]

    # 2. Embeddings of one length, so that LayerNorm only scales: one channel fills up what a row's own lacks.
    norm = e.norm(dim=1)
    order = norm.argsort()
    enough = frequency[order].cumsum(0) >= RARE * frequency.sum()
    length = float(norm[order][enough][0])
    e *= (length / norm.clamp(min=1e-9)).clamp(max=1.0)[:, None]
    filled = (length**2 - e.square().sum(1)).clamp(min=0.0).sqrt()
    room = EMBEDDING_RMS * math.sqrt(C)  # length of a position's whole input
    amplitude = room * math.sqrt(positions / C)  # of the position's part
    scale = math.sqrt(room**2 - amplitude**2) / length
    model.wte.weight[:V] = scale * (e @ tokens.t() + filled[:, None] * fill)
    head = cast(Tensor, model.lm_head.weight)
    head[:V] = (h @ tokens.t()) * (room / math.sqrt(C) / scale)

    # 3. The unigram, through the final LayerNorm's bias.
    log_unigram = torch.from_numpy(np.log(bigrams.unigram)).float()
    model.ln_f.bias.fill_(1.0)
    head[:V] += (log_unigram / math.sqrt(C))[:, None] * basis[:, 0]

    # 4. Blocks that add nothing yet.
    for block in cast("list[Block]", model.h):
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            projection.weight.zero_()
    if positions:
        angles = frequencies(model.config.block_size)
        table = turned_positions(angles, 0, model.config.block_size).float() / math.sqrt(positions / 2)
        model.wpe.weight.copy_(amplitude * table @ places.t())
        look_back(model, angles, places, tokens, amplitude / room * math.sqrt(C))
    polish(model, Teacher(bigrams, torch.device("cpu"), leave_out=False, sampled=sampled), frequency, seed)


def look_back(model: GPT, angles: Tensor, places: Tensor, tokens: Tensor, amplitude: float) -> None:
    """Let the first heads of the first layer attend to the token one back, two back, … and carry its embedding.

    amplitude: length of the position's part after the first LayerNorm.
    """
    attention = cast("Block", model.h[0]).attn
    D, C, T = attention.head_size, model.config.n_embd, model.config.block_size
    pairs = min(D, POSITIONS) // 2  # of sine and cosine that fit into a head
    kept = 2 * pairs
    offsets = torch.arange(1, max(2, T), dtype=torch.float64)[:, None]
    gap = pairs - float((offsets * angles[:pairs]).cos().sum(1).max())
    # of query and key each; the scores of positions are amplitude^2 / (POSITIONS / 2) times the cosines
    gain = math.sqrt(SHARPNESS * math.sqrt(D) * (POSITIONS / 2) / gap) / amplitude
    weight = attention.c_attn.weight.view(3, attention.n_head, D, C)
    for back in range(1, 1 + min(2, attention.n_head)):
        turn = torch.zeros(POSITIONS, POSITIONS)
        for pair, angle in enumerate((-back * angles).tolist()):
            c, s = math.cos(angle), math.sin(angle)
            turn[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = torch.tensor([[c, -s], [s, c]])
        weight[0, back - 1, :kept] = gain * (turn @ places.t())[:kept]
        weight[1, back - 1, :kept] = gain * places.t()[:kept]
        some = tokens.t()[:D]
        weight[2, back - 1, : len(some)] = some


@torch.enable_grad()
def polish(model: GPT, teacher: Teacher, frequency: Tensor, seed: int) -> None:
    """A few steps of embedding, head and final LayerNorm towards the counted bigrams, without any text."""
    head = cast(Tensor, model.lm_head.weight)
    parts: list[Any] = [model.wte.weight, head, *model.ln_f.parameters()]
    optimizer = AdamW(parts, lr=POLISH_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    middle = model._positions(0, model.config.block_size)
    for step in range(POLISH_STEPS):
        ids = torch.multinomial(frequency, POLISH_CONTEXTS, replacement=True, generator=generator)[:, None]
        at = torch.randint(len(middle), (POLISH_CONTEXTS,), generator=generator)
        x = model.ln_f(model.wte(ids[:, 0]) + middle[at].detach())
        soft = teacher.targets(ids, torch.zeros_like(ids), 1.0, seed=step)
        loss = head_loss(x, head, torch.zeros_like(ids[:, 0]), model.config.tokens, x.dtype, soft)
        optimizer.param_groups[0]["lr"] = POLISH_RATE * (1 - step / POLISH_STEPS)
        (loss / POLISH_CONTEXTS).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
