"""Settings from the training time alone: what minutes and text choose, and schedules that end by the clock."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from config import Config, ConfigError, ModelConfig, TrainConfig, build, read_toml
from model import GPT
from storage.shards import Manifest
from support.helpers import nonsense, prepare_text
from training import autotune
from training.autotune import (
    Budget,
    choose_model,
    choose_training,
    counting_helps,
    counting_s,
    fitting_vocabulary,
    flops_per_token,
)
from training.schedule import decay_start_step, lr_scale, time_limited_end_step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock takes 60 ms, and a step a few looks, however fast or busy the machine is."""
    now = itertools.count(time.monotonic(), 0.06)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))


CLOCK = TrainConfig(max_minutes=1, schedule="wsd", decay_fraction=0.4, warmup_steps=5)


@pytest.mark.parametrize("pace_s", [0.07, 0.5, 3.1])
@pytest.mark.parametrize("reserve_s", [0.0, 4.0])
def test_the_clock_sets_an_end_that_it_meets(pace_s: float, reserve_s: float) -> None:
    ends = ((step, time_limited_end_step(step, step * pace_s, reserve_s, CLOCK)) for step in range(10_000))
    step, total = next((step, total) for step, total in ends if total)
    assert abs(total * pace_s + reserve_s - 60) <= 2 * pace_s
    assert all(lr_scale(taken, total, CLOCK) == 1.0 for taken in range(CLOCK.warmup_steps, step))
    assert lr_scale(total - 1, total, CLOCK) == 0.0


def test_no_step_already_taken_falls_into_the_decay() -> None:
    """The machine has become so slow that the decay should have begun long ago."""
    total = time_limited_end_step(100, 59.0, 0.0, CLOCK)
    assert decay_start_step(total, CLOCK) >= 100 and decay_start_step(total - 1, CLOCK) < 100
    assert time_limited_end_step(0, 0.0, 0.0, CLOCK) == 0


def test_a_run_by_the_clock_is_repeated_by_its_settings(tmp_path: Path, clock: None) -> None:
    data = prepare_text(tmp_path, nonsense(4000), "--tokenizer", "char")
    small = "--model.n-layer 1 --model.n-head 2 --model.n-embd 16 --model.block-size 16 --train.batch-size 2"
    quiet = "--train.eval-interval 0 --train.sample-interval 0 --train.no-tensorboard --train.device cpu"
    clock = "--train.max-steps 0 --train.schedule wsd --train.max-minutes 0.15 --train.warmup-steps 3"
    run, again = tmp_path / "run", tmp_path / "again"
    assert train.main(["--data", str(data), "--out", str(run), *f"{small} {quiet} {clock}".split()]) == 0
    kept = read_toml(run / "config.toml")["train"]
    assert kept["max_steps"] > 0 and kept["max_minutes"] == 0
    assert train.main(["--preset", str(run / "config.toml"), "--data", str(data), "--out", str(again)]) == 0
    assert read_toml(again / "config.toml")["train"] == kept
    first, second = (load_file(folder / "last" / "model.safetensors") for folder in (run, again))
    assert all(first[name].equal(second[name]) for name in first)


def test_more_compute_buys_larger_models() -> None:
    sizes = [flops_per_token(choose_model(Budget(10.0**power, 6e7))) for power in range(11, 20)]
    assert sizes == sorted(sizes) and sizes[-1] > 100 * sizes[0]
    assert choose_model(Budget(1e15, 6e7), vocab=777).vocab_size == 777


def test_the_cost_is_the_models_own() -> None:
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=300, bias=False)
    assert flops_per_token(shape) == pytest.approx(GPT(shape).flops_per_token(), rel=0.01)


def test_a_model_that_starts_from_counts_is_wide_and_has_a_head_of_its_own() -> None:
    """Its channels hold the bigrams; its vocabulary is larger, as n-grams of longer tokens reach further."""
    budget = Budget(3e12, 6e7)
    plain, counted = choose_model(budget), choose_model(budget, counted=True)
    assert plain.tied_head and plain.n_embd < 128 and plain.vocab_size == 4096
    assert not counted.tied_head and counted.n_embd == 128 and counted.vocab_size == 32768
    tables = [choose_training(model, budget, 1, fits=64)[0] for model in (plain, counted)]
    assert [table["ngram_start"] for table in tables] == [False, True]
    assert not tables[0]["ngram_teacher"] and tables[1]["ngram_teacher"] > 0
    assert not tables[0]["sampled_softmax"] and 0 < tables[1]["sampled_softmax"] < 32768 / 4
    config = {"model": counted.model_dump(), "train": tables[1]}
    assert not build(Config, config).faults()


def test_a_sampled_softmax_makes_a_large_vocabulary_cheap() -> None:
    few, many, all_of_them = (choose_model(Budget(3e12, 6e7), vocab, counted=True) for vocab in (8192, 32768, 2048))
    assert flops_per_token(many) == flops_per_token(
        few.model_copy(update={"n_layer": many.n_layer, "n_embd": many.n_embd})
    )
    assert not autotune.sampled_ids(all_of_them) and autotune.sampled_ids(many)
    assert not autotune.sampled_ids(many.model_copy(update={"tied_head": True}))  # nothing is counted for it


def test_counting_is_for_texts_that_are_large_enough() -> None:
    assert counting_helps("cpu", 6e7, 0) and counting_helps("cpu", 6e7, 8192)
    assert not counting_helps("cpu", 1e4, 0)  # too little to count
    assert counting_helps("cpu", 6e7, 50257) and not counting_helps("cpu", 6e7, 1 << 17)  # a start that takes minutes
    assert not counting_helps("cuda", 6e7, 0)
    assert counting_s(choose_model(Budget(3e12, 6e7), counted=True), 6e7, 5e10) < 30


def test_a_small_text_holds_the_model_and_its_vocabulary_back() -> None:
    large, small = (choose_model(Budget(1e15, text)) for text in (1e9, 2e5))
    assert flops_per_token(small) < flops_per_token(large) / 3
    assert fitting_vocabulary(192, 2e4) < fitting_vocabulary(192, 1e8)
    assert choose_model(Budget(1e13, 500.0)).block_size <= 32


def test_the_training_table_is_whole() -> None:
    model = choose_model(Budget(3e13, 6e7))
    values, dropout = choose_training(model, Budget(3e13, 6e7), 10, fits=4)
    chosen = TrainConfig(**values)
    assert chosen.batch_size <= 4 and chosen.tokens_per_step % (chosen.batch_size * model.block_size) == 0
    assert chosen.max_minutes == 10 and not chosen.max_steps and dropout == 0
    assert choose_training(model, Budget(3e13, 1e6), 10, fits=4)[1] > 0  # read many times over
    steps = 3e13 / flops_per_token(model) / chosen.tokens_per_step
    assert chosen.warmup_steps < steps / 10 and math.isclose(chosen.eval_interval, steps / 10, rel_tol=0.2)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--minutes 1 --preset starter", "--preset"),
        ("--minutes 1 --plan", "--plan"),
        ("--minutes 1 --data b", "no manifest.json"),
        ("--input a.txt", "--minutes"),
    ],
)
def test_flags_that_exclude_minutes(words: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        train.read_args(words.split())


def test_too_little_time_is_said_before_training(tmp_path: Path) -> None:
    data = prepare_text(tmp_path, nonsense(4000), "--tokenizer", "char")
    with pytest.raises(ConfigError, match="give more"):
        train.read_args(["--minutes", "0.05", "--data", str(data)])


def test_prepared_texts_are_not_written_over(tmp_path: Path) -> None:
    data = prepare_text(tmp_path, nonsense(4000), "--tokenizer", "char")
    before = (data / "manifest.json").read_bytes()
    (tmp_path / "other.txt").write_text(nonsense(4000, seed=2), encoding="utf-8")
    with pytest.raises(ConfigError, match="prepared already"):
        train.read_args(["--minutes", "0.05", "--input", str(tmp_path / "other.txt"), "--data", str(data)])
    assert (data / "manifest.json").read_bytes() == before


def test_of_more_text_than_the_time_allows_a_part_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: None
) -> None:
    monkeypatch.setattr(autotune, "measured_rate", lambda *_: 1e8)
    monkeypatch.setattr(autotune, "PREPARE_RATE", 240_000 / 30 / autotune.PREPARE_SHARE / torch.get_num_threads() / 3.5)
    for number in range(12):
        (tmp_path / f"{number:02d}.txt").write_text(nonsense(20_000, seed=number), encoding="utf-8")
    args, _ = train.read_args(["--minutes", "0.5", "--input", str(tmp_path), "--data", str(tmp_path / "data")])
    assert "one document in 4 is read" in capsys.readouterr().err
    splits = Manifest.load(args.data or tmp_path).splits
    assert splits.train.documents + splits.val.documents == 3


@pytest.mark.parametrize("where", ["", "elsewhere"])
def test_from_texts_and_minutes_to_a_model(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], clock: None
) -> None:
    """On a machine reported as slow the smallest model is chosen; a flag given besides --minutes counts."""
    monkeypatch.setattr(autotune, "ROOT", tmp_path)
    monkeypatch.setattr(autotune, "measured_rate", lambda *_: 1e8)
    texts, run, elsewhere = tmp_path / "books", tmp_path / "run", tmp_path / where if where else None
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(nonsense(20_000, seed=number), encoding="utf-8")
    words = [
        "--input",
        str(texts),
        *(["--data", str(elsewhere)] if elsewhere else []),
        "--minutes",
        "0.5",
        "--out",
        str(run),
        "--train.no-tensorboard",
        "--train.lr",
        "0.004",
    ]
    assert train.main(words) == 0
    said = capfd.readouterr().err
    assert "ngram_start = false" in said  # counting would take longer than training
    assert "Chosen, as a preset" in said and "n_layer = 2" in said and "the learning rate falls from here" in said
    kept = read_toml(run / "config.toml")["train"]
    assert kept["lr"] == 0.004 and kept["max_steps"] > 0
    assert (run / "best" / "model.safetensors").is_file() and len(list(tmp_path.rglob("manifest.json"))) == 1
    assert list((elsewhere or tmp_path / "data").glob("manifest.json" if where else "books-*/manifest.json"))
