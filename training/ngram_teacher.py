"""A counted n-gram model as the teacher of the network: its whole distribution is a part of each target.

>>> teacher = Teacher(NgramModel.counted(data.train, vocab), device)
>>> loss = model(x, y, teacher.targets(x, y, weight=0.5))

One-hot targets say one bit of what counting knows about a context; the distribution says all of it. It can
also draw the ids that a sampled softmax computes (`SoftTargets.candidates`). The occurrence that is
being taught is left out of the counts (count minus one), since the teacher would otherwise recite it.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from loss import Candidates
from training.ngram import Level, NgramModel

FREQUENT = 1 << 24  # numbers in the kept distributions after the most frequent ids, 64 MB
NEGLIGIBLE = 0.02  # weights below this are taken as 0: they would cost time and teach nothing


def teacher_weight(tokens: float, half: float) -> float:
    """The n-gram's share of the targets after so many training tokens: 1 at first, one half at `half`, later half / tokens."""
    weight = 1.0 / (1.0 + tokens / half) if half else 0.0
    return weight if weight >= NEGLIGIBLE else 0.0


def found_in(table: Tensor, wanted: Tensor) -> Tensor:
    """Place of each of `wanted` in the sorted `table`, its length where it is not there."""
    place = torch.searchsorted(table, wanted)
    there = table[place.clamp(max=len(table) - 1)] == wanted
    return place.masked_fill(~there, len(table))


class Table:
    """A level's n-grams on a device, grouped by context: `starts` [K + 2] into the entries `keys`, `counts`, `kept` [n]."""

    def __init__(self, level: Level, bits: int, device: torch.device):
        def on_device(values: np.ndarray, kind: type, *more: int) -> Tensor:
            return torch.from_numpy(np.append(values, more).astype(kind)).to(device)

        self.mask = (1 << bits) - 1
        self.contexts, self.keys = on_device(level.contexts, np.int64), on_device(level.keys, np.int64)
        self.counts = on_device(level.counts.clip(max=1 << 30), np.int32, 0)
        self.kept = on_device(level.counts - level.discounts[np.minimum(level.counts, 3)], np.float32)
        self.discounts = on_device(level.discounts, np.float32)
        # one more context, for those that are not there: without entries, and all weight goes to the order below
        self.starts = on_device(level.starts, np.int64, len(level.keys))
        self.totals = on_device(level.totals, np.float32, 0)
        self.held_back = on_device(level.held_back, np.float32, 0)

    def kept_of(self, counts: Tensor) -> Tensor:
        """What remains of counts [m] after the discount, float32."""
        return counts - self.discounts[counts.clamp(max=3)]

    def entries(self, place: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row, id, factor times what is kept) of each n-gram of the contexts at `place` [m]; rows count from 0 to m - 1."""
        begin = self.starts[place]
        lengths = self.starts[place + 1] - begin
        row = torch.repeat_interleave(torch.arange(len(place), device=place.device), lengths)
        offset = begin - lengths.cumsum(0) + lengths  # of a row's first entry, from its number in all of them
        entry = offset.index_select(0, row).add_(torch.arange(len(row), device=place.device))
        values = self.kept.index_select(0, entry).mul_(factor.index_select(0, row))
        return row, self.keys.index_select(0, entry).bitwise_and_(self.mask), values

    def add(self, rows: Tensor, place: Tensor, factor: Tensor) -> None:
        """Add factor [m] times what is kept of the n-grams of the contexts at `place` [m] to `rows` [m, vocab]."""
        row, ids, values = self.entries(place, factor)
        rows.view(-1).index_add_(0, ids.add_(row, alpha=rows.size(1)), values)


def inclusion(score: Tensor, expected: float) -> Tensor:
    """min(1, c score) [V] with the c for which the sum is `expected`; all that score at all, if there are not so many."""
    found = (score > 0).to(score.dtype)
    if expected >= float(found.sum()):
        return found
    factor = expected / score.sum()
    for _ in range(6):  # those that reach 1 stay there, and the others share what is left
        full = score * factor >= 1.0
        factor = (expected - full.sum()) / score.masked_fill(full, 0.0).sum()
    return (score * factor).clamp_(max=1.0)


class Teacher:
    """An n-gram model (of order 2 or 3) as tensors; `targets` makes the soft targets of one micro-batch.

    leave_out: the occurrence that is taught does not count (of 3-grams). sampled: ids that a chunk's softmax computes,
    about; 0: all.
    """

    def __init__(self, model: NgramModel, device: torch.device, leave_out: bool = True, sampled: int = 0):
        self.vocab, self.bits, self.leave_out = model.vocab, model.bits, leave_out
        self.sampled = sampled if sampled < model.vocab else 0
        self.unigram = torch.from_numpy(model.unigram.astype(np.float32)).to(device)
        self.tables = [Table(level, model.bits, device) for level in model.levels]
        if self.sampled:
            return
        table, kept = self.tables[0], min(model.vocab, max(1, FREQUENT // model.vocab))
        frequent = table.contexts[table.totals[:-1].argsort(descending=True, stable=True)[:kept]]
        self.frequent = self._bigrams(frequent)
        self.row_of = torch.full((model.vocab,), -1, device=device)  # in `frequent`, by id
        self.row_of[frequent] = torch.arange(len(frequent), device=device)

    def targets(self, x: Tensor, y: Tensor, weight: float, seed: int = 0) -> SoftTargets:
        """Soft targets for x, y [B, T] in which the n-gram has the share `weight`; `seed` and x decide what is sampled."""
        before = torch.cat((torch.full_like(x[:, :1], -1), x[:, :-1]), dim=1)  # -1: unknown, so only the bigram counts
        soft = SoftTargets(self, before.reshape(-1), x.reshape(-1), y.reshape(-1).clamp(min=0), weight)
        if self.sampled:  # by the text and not by a counter, so that threads and ranks each draw their own
            soft.generator.manual_seed(zlib.crc32(x.cpu().numpy().tobytes(), seed & 0xFFFFFFFF))
        return soft

    def bigrams(self, ids: Tensor) -> Tensor:
        """The distributions after each of `ids` alone, [len(ids), vocab]."""
        place = self.row_of[ids]
        rows = self.frequent.index_select(0, place.clamp(min=0))
        rare = (place < 0).nonzero()[:, 0]
        return rows.index_copy_(0, rare, self._bigrams(ids[rare])) if len(rare) else rows

    def _bigrams(self, ids: Tensor) -> Tensor:
        table = self.tables[0]
        place = found_in(table.contexts, ids)
        total, held_back = table.totals[place], table.held_back[place]
        rows = torch.where(total > 0, held_back / total, 1.0)[:, None] * self.unigram
        table.add(rows, place, 1.0 / total.clamp(min=1.0))
        return rows


class SoftTargets:
    """(1 - weight) one-hot targets and `weight` n-gram, of M positions; `loss.LinearCrossEntropy` takes them off by chunks."""

    def __init__(self, teacher: Teacher, before: Tensor, ids: Tensor, targets: Tensor, weight: float):
        self.teacher, self.ids, self.targets, self.weight = teacher, ids, targets, weight
        self.sampled, self.generator = teacher.sampled, torch.Generator()
        if len(teacher.tables) == 1 or not weight:
            return
        bigrams, trigrams = teacher.tables
        pair = torch.where(before < 0, -1, (before << teacher.bits) | ids)
        place, self.place = found_in(bigrams.contexts, ids), found_in(trigrams.contexts, pair)
        # 1 how often the target itself was counted; once less, if the occurrence that is taught is left out
        times = trigrams.counts[found_in(trigrams.keys, torch.where(pair < 0, -1, (pair << teacher.bits) | targets))]
        after = bigrams.counts[found_in(bigrams.keys, (ids << teacher.bits) | targets)]
        taught = (times > 0) & teacher.leave_out
        # 2 the target's bigram probability. If the only 3-gram is left out, the bigram has one id less before it; all
        # other probabilities then change by one factor, so that the sum is 1.
        total = bigrams.totals[place]
        own = self._probability(bigrams, after, total, bigrams.held_back[place], teacher.unigram[targets])
        single = taught & (times == 1) & (after > 0) & (total > 1)
        fewer, held_back = self._without(bigrams, after, bigrams.held_back[place], single)
        left = self._probability(bigrams, fewer, total - single.float(), held_back, teacher.unigram[targets])
        others = torch.where(single, (1.0 - left) / (1.0 - own).clamp(min=1e-6), 1.0)
        # 3 its 3-gram probability, and the parts of the others
        fewer, held_back = self._without(trigrams, times, trigrams.held_back[self.place], taught)
        total = trigrams.totals[self.place] - taught.float()
        self.factor = torch.where(total > 0, 1.0 / total, 0.0)  # of what is kept of 3-grams
        self.share = torch.where(total > 0, held_back / total, 1.0) * others  # of bigram probabilities
        right = self._probability(trigrams, fewer, total, held_back, left)
        self.correction = right - self.share * own - self.factor * trigrams.kept_of(times)  # at the target

    @staticmethod
    def _without(table: Table, counts: Tensor, held_back: Tensor, fewer: Tensor) -> tuple[Tensor, Tensor]:
        """(counts, held back of their contexts) with one occurrence less where `fewer`."""
        left = counts - fewer.to(counts.dtype)
        return left, held_back + table.discounts[left.clamp(max=3)] - table.discounts[counts.clamp(max=3)]

    @staticmethod
    def _probability(table: Table, counts: Tensor, total: Tensor, held_back: Tensor, below: Tensor) -> Tensor:
        """Interpolated probability of ids that were counted so often; that of the order below where nothing was counted."""
        return torch.where(total > 0, (table.kept_of(counts) + held_back * below) / total.clamp(min=1.0), below)

    def subtract(self, probs: Tensor, start: int) -> None:
        """probs [m, vocab], of positions start .. start+m-1: take weight times the n-gram's distribution off, in place."""
        if not self.weight:
            return
        teacher, rows = self.teacher, slice(start, start + len(probs))
        bigrams = teacher.bigrams(self.ids[rows])  # [m, vocab]
        if len(teacher.tables) == 1:
            probs.sub_(bigrams, alpha=self.weight)
            return
        probs.addcmul_(bigrams, self.share[rows, None], value=-self.weight)
        teacher.tables[1].add(probs, self.place[rows], self.factor[rows] * -self.weight)
        probs.scatter_add_(1, self.targets[rows, None], self.correction[rows, None] * -self.weight)

    def candidates(self, start: int, stop: int) -> Candidates:
        """About `sampled` ids for positions start .. stop-1: their targets, and others by how probable the bigrams call them.

        The estimated softmax varies least if each is drawn in proportion to the root of the sum of its squared probabilities
        over the positions; the bigrams stand in for the network, and the unigram keeps every id possible.
        """
        teacher, table, targets = self.teacher, self.teacher.tables[0], self.targets[start:stop]
        contexts, inverse, times = torch.unique(self.ids[start:stop], return_inverse=True, return_counts=True)
        place = found_in(table.contexts, contexts)
        total = table.totals[place]
        row, column, kept = table.entries(place, 1.0 / total.clamp(min=1.0))
        score = teacher.unigram.square() * len(targets)
        score.index_add_(0, column, kept.square().mul_(times.index_select(0, row))).sqrt_()
        certain = torch.unique(targets)
        score[certain] = 0.0
        chance = inclusion(score, max(1, self.sampled - len(certain)))
        chance[certain] = 1.0
        draws = torch.rand(teacher.vocab, generator=self.generator).to(chance.device)
        ids = (draws < chance).nonzero()[:, 0]
        where = torch.full((teacher.vocab,), len(ids), device=ids.device)  # those not drawn share one more column
        where[ids] = torch.arange(len(ids), device=ids.device)
        drawn = Candidates(ids, chance[ids], where[targets], None)
        if not self.weight:
            return drawn
        unigram = torch.cat((teacher.unigram[ids], teacher.unigram.new_zeros(1)))
        bigrams = torch.where(total > 0, table.held_back[place] / total, 1.0)[:, None] * unigram
        bigrams.view(-1).index_add_(0, where.index_select(0, column).add_(row, alpha=len(unigram)), kept)
        soft = bigrams.index_select(0, inverse)  # [m, K + 1]
        if len(teacher.tables) > 1:
            rows = slice(start, stop)
            soft.mul_(self.share[rows, None])
            row, column, kept = teacher.tables[1].entries(self.place[rows], self.factor[rows])
            soft.view(-1).index_add_(0, where.index_select(0, column).add_(row, alpha=len(unigram)), kept)
            soft.scatter_add_(1, drawn.targets[:, None], self.correction[rows, None])
        soft = soft[:, :-1].div(drawn.inclusion)
        return replace(drawn, soft=soft.div_(soft.sum(1, keepdim=True)))
