"""Shards to batches: order, coverage, boundaries, damage, memory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dataset import DataError, TokenData, TokenStream, WindowSampler, prefetched, training_batches, validation_batches
from support.helpers import nonsense, prepare_text


def stream(folder: Path, tokens: np.ndarray, cuts: list[int]) -> TokenStream:
    files = []
    for number, part in enumerate(np.split(tokens, cuts)):
        files.append(folder / f"train_{number:06d}.bin")
        part.astype("<u2").tofile(files[-1])
    return TokenStream(files, [len(part) for part in np.split(tokens, cuts)], "uint16")


@pytest.fixture
def counted(tmp_path: Path) -> TokenStream:
    """Tokens 0..999 in shards of 300, 1, 450 and 249."""
    return stream(tmp_path, np.arange(1000), [300, 301, 751])


def test_shards_read_as_one_sequence(counted: TokenStream) -> None:
    assert len(counted) == 1000
    assert counted.read(0, 1000).tolist() == list(range(1000))
    assert counted.read(298, 303).tolist() == [298, 299, 300, 301, 302]
    with pytest.raises(IndexError):
        counted.read(990, 1001)


def test_y_is_x_one_token_ahead(counted: TokenStream) -> None:
    windows = WindowSampler(len(counted), 16, seed=3)
    x, y = counted.batch(windows.starts(0, windows.per_epoch), 16)
    assert x.dtype == torch.int64
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("tokens", [17, 18, 32, 33, 100, 1000])
def test_an_epoch_covers_the_text(tokens: int) -> None:
    windows = WindowSampler(tokens, 16, seed=3)
    for epoch in range(3):
        starts = windows.starts(epoch * windows.per_epoch, windows.per_epoch)
        assert 0 <= starts.min() and starts.max() + 17 <= tokens
        predicted = {int(start) + 1 + offset for start in starts for offset in range(16)}
        assert predicted == set(range(1, tokens))
    assert windows.per_epoch * 16 <= tokens + 32  # and hardly anything twice


def test_one_token_too_few_is_refused_readably() -> None:
    assert WindowSampler(17, 16, seed=0).starts(0, 2).tolist() == [0, 0]
    with pytest.raises(DataError, match="16 tokens of text are fewer than one window of 16"):
        WindowSampler(16, 16, seed=0)


def test_order_depends_on_seed_and_epoch_only() -> None:
    one, two, other = WindowSampler(999, 16, 1), WindowSampler(999, 16, 1), WindowSampler(999, 16, 2)
    whole = one.starts(0, 200)
    assert two.starts(150, 50).tolist() == whole[150:].tolist()
    assert two.starts(0, 200).tolist() == whole.tolist()
    assert other.starts(0, 200).tolist() != whole.tolist()
    first, second = one.starts(0, one.per_epoch), one.starts(one.per_epoch, one.per_epoch)
    assert sorted(first.tolist()) != sorted(second.tolist())  # another phase
    assert first.tolist() != sorted(first.tolist())


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_are_disjoint_and_together_one_process(counted: TokenStream, world: int) -> None:
    windows = WindowSampler(len(counted), 16, seed=5)
    alone = training_batches(counted, windows, batch_size=2, grad_accum_steps=2 * world)
    step = sorted(row.tolist()[0] for _ in range(2 * world) for row in next(alone)[0])
    shares = []
    for rank in range(world):
        batches = training_batches(counted, windows, batch_size=2, grad_accum_steps=2, rank=rank, world=world)
        shares.append([row.tolist()[0] for _ in range(2) for row in next(batches)[0]])
    assert sorted(start for share in shares for start in share) == step
    per_epoch = [set() for _ in range(world)]
    for rank in range(world):
        starts = [windows.starts(at + rank * 4, 4) for at in range(0, windows.per_epoch - 4 * world + 1, 4 * world)]
        per_epoch[rank] = {int(start) for part in starts for start in part}
    for one in range(world):
        for two in range(one):
            assert not per_epoch[one] & per_epoch[two]


def test_position_is_one_integer(counted: TokenStream) -> None:
    windows = WindowSampler(len(counted), 16, seed=5)
    whole = training_batches(counted, windows, batch_size=3, grad_accum_steps=2)
    later = [next(whole)[0] for _ in range(60)][42:]
    resumed = training_batches(
        counted, WindowSampler(len(counted), 16, seed=5), batch_size=3, grad_accum_steps=2, first=42 * 3
    )
    for expected in later:
        assert torch.equal(next(resumed)[0], expected)


@pytest.mark.parametrize(("limit", "predicted"), [(0, 999), (100, 100), (96, 96), (5000, 999)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_predicts_each_token_once(counted: TokenStream, limit: int, predicted: int, world: int) -> None:
    seen = []
    for rank in range(world):
        for x, y in validation_batches(counted, 16, 4, limit, rank, world):
            assert torch.equal(y, x + 1)
            seen += y.flatten().tolist()
    assert len(seen) == len(set(seen)) == predicted and set(seen) <= set(range(1, 1000))
    if predicted == 999:
        assert sorted(seen) == list(range(1, 1000))


def test_a_limited_validation_is_spread_over_the_text(counted: TokenStream) -> None:
    starts = [int(x[0, 0]) for x, _ in validation_batches(counted, 16, 1, limit=16 * 8)]
    assert starts == sorted(starts) and starts[0] < 16 and starts[-1] > 800
    assert max(np.diff(starts)) - min(np.diff(starts)) <= 16


def test_validation_of_a_text_shorter_than_a_window(tmp_path: Path) -> None:
    short = stream(tmp_path, np.arange(5), [])
    assert [y.tolist() for _, y in validation_batches(short, 16, 4)] == [[[1, 2, 3, 4]]]
    with pytest.raises(DataError, match="fewer than two tokens"):
        list(validation_batches(stream(tmp_path, np.arange(1), []), 16, 4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare_text(tmp_path, nonsense(5000), "--tokenizer", "char", "--shard-tokens", "1024")


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    data = TokenData.open(folder, verify=True)
    assert len(data.train) == data.manifest.splits.train.tokens
    shard = sorted(folder.glob("train_*.bin"))[1]
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-2])
    with pytest.raises(DataError, match=f"{shard.name}.*truncated"):
        TokenData.open(folder)
    shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    TokenData.open(folder)
    with pytest.raises(DataError, match=f"{shard.name}.*altered"):
        TokenData.open(folder, verify=True)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name}.*missing"):
        TokenData.open(folder)


def test_an_id_beyond_the_vocabulary_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["max_id"] = manifest["tokenizer"]["vocab_size"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="max_id .* is not below the tokenizer"):
        TokenData.open(folder)


def test_reading_through_five_gigabytes_keeps_memory_flat(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("less than 6 GB of disk")
    path, size = tmp_path / "train_000000.bin", 5 * 10**9
    with path.open("wb") as file:
        file.truncate(size)  # holes: no disk is used, but every page read is mapped
    long = TokenStream([path], [size // 2], "uint16")
    process, step = psutil.Process(os.getpid()), 4_000_000
    before = process.memory_info().rss
    most = 0
    for start in range(0, len(long) - step, 4 * step):  # every fourth piece: 1.25 GB, from the first byte to the last
        long.read(start, start + step)
        most = max(most, process.memory_info().rss - before)
    assert most < 200e6


def test_prefetching_hands_on_order_and_errors() -> None:
    def source():
        for number in range(5):
            yield torch.tensor([number]), torch.tensor([number])
        raise ValueError("shard lost")

    got = []
    with prefetched(source, lambda pair: pair, depth=2) as ready, pytest.raises(ValueError, match="shard lost"):
        for x, _ in ready:
            got.append(int(x))
    assert got == [0, 1, 2, 3, 4]

    def endless():
        while True:
            yield torch.zeros(1), torch.zeros(1)

    reader = prefetched(endless, lambda pair: pair)
    with reader as ready:
        next(ready)
    assert not reader.thread.is_alive()
