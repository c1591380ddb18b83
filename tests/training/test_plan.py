"""The plan: estimates near what is measured, refusals that name flags that fit."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

import train
from config import ConfigError, ModelConfig, TrainConfig, load_config
from support.helpers import TINY_FLAGS
from training import plan
from training import step as training_step
from training.plan_report import show_plan

GPT2 = ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, vocab_used=50257)
SETTINGS = TrainConfig(max_steps=10)


def figure(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found.group(1).replace(",", ""))


def test_a_named_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--preset", "victorian", "--plan", "p4d.24xlarge", "--price-per-hour", "20"]) == 0
    text = capsys.readouterr().out
    assert "8 x A100 (p4d.24xlarge), fp16: micro-batch 16 x 2 accumulated = 524,288 tokens a step" in text
    assert figure(text, r"total +([\d,]+) parameters") == 125_262_336
    speed = figure(text, r"speed: ([\d,]+) tokens/s")
    evaluation = 23 * 5_242_880 / 3  # tokens evaluated in 5,532 steps, a third of the price of training on them
    hours = (5532 * 524_288 + evaluation) / speed / 3600
    assert figure(text, r"cost: ([\d.]+) at 20") == pytest.approx(hours * 20, rel=1e-3)
    assert "(including evaluation " in text
    assert "35% of 2,496 TFLOP/s assumed" in text


def test_plan_and_documentation_assume_the_same_utilisation(capsys: pytest.CaptureFixture[str]) -> None:
    text = (plan.ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"| at {plan.MFU:.0%} of it |" in text and f"\n{plan.MFU:.0%} is what good PyTorch code reaches" in text
    rows = re.findall(r"\| one (\S+), .*? \| [\d.]+(?: PFLOP/s)? \| [\d.]+ \| ([\d,]+) \|", text)
    assert len(rows) == 4
    for machine, speed in rows:
        assert train.main(["--preset", "victorian", "--plan", machine, "--train.precision", "bf16"]) == 0
        planned = figure(capsys.readouterr().out, r"speed: ([\d,]+) tokens/s")
        assert planned == pytest.approx(float(speed.replace(",", "")), rel=0.02)


def test_what_is_known_is_printed_before_anything_is_measured(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []

    def measure(*given: object, **more: object) -> plan.Costs:
        shown.append(capsys.readouterr().out)
        return plan.Costs(1.0)

    monkeypatch.setattr(plan, "measure_here", measure)
    show_plan("story-small", load_config("story-small"), tiny_data, "here")
    for part in ("total", "parameters", "tokens a step", "memory: about ", "steps, "):
        assert part in shown[0], part
    assert "speed: " not in shown[0] and "speed: " in capsys.readouterr().out


def test_what_cannot_fit_is_refused_with_flags_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--preset", "victorian", "--plan", "T4"]) == 2
    text = capsys.readouterr().err
    batch = int(figure(text, r"try --train.batch-size (\d+)"))
    assert batch < 16
    assert train.main(["--preset", "victorian", "--plan", "T4", "--train.batch-size", str(batch)]) == 0
    assert train.main(["--preset", "victorian", "--plan", "Z80"]) == 2
    assert "choose `here` or one of" in capsys.readouterr().err


def test_no_batch_fits() -> None:
    text = plan.out_of_memory_message(GPT2, SETTINGS, 1, int(2.4e9), "fp32", "cpu", 1)
    assert "--train.batch-size 1" in text and "try --model." in text
    with pytest.raises(ConfigError, match="are available: try"):
        monkey = pytest.MonkeyPatch()
        with monkey.context() as patch:
            patch.setattr(plan, "available_memory", lambda device: int(1e9))
            plan.largest_batch(GPT2, SETTINGS, 1024, 1, torch.device("cpu"), "fp32")


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("room", [0.5e9, 0.6e9, 0.8e9, 1.2e9, 2.4e9, 4e9, 20e9])
def test_a_refusal_names_flags_that_fit(room: float, world: int) -> None:
    """Each remedy a tighter place calls for: a smaller batch, shards, a shorter context, a smaller model; or none at all."""
    model = GPT2.model_copy(update={"block_size": 2048})
    text = plan.out_of_memory_message(model, SETTINGS, 64, int(room), "fp32", "cpu", world)
    least = ModelConfig(n_layer=1, n_head=1, n_embd=64, block_size=64, vocab_size=50304)
    if plan.memory_needed(least, SETTINGS, 1, "fp32", "cpu").total > 0.9 * room:
        assert "use a machine with more memory" in text
        return
    remedy = text.split("try ")[1]
    flags = {name.replace("-", "_"): int(value) for name, value in re.findall(r"--\w+\.([\w-]+) (\d+)", remedy)}
    batch = flags.pop("batch_size")
    shards = world if "--train.parallel fsdp" in remedy else 1
    shape = ModelConfig(**model.model_dump() | flags)
    assert plan.memory_needed(shape, SETTINGS, batch, "fp32", "cpu", shards).total <= 0.9 * room
    assert shards == 1 or plan.memory_needed(model, SETTINGS, 1, "fp32", "cpu").total > 0.9 * room


def test_automatic_batch_keeps_the_global_one() -> None:
    settings = TrainConfig(max_steps=1, batch_size=0, tokens_per_step=3 * 1024 * 8)
    batch = plan.fitting_batch(GPT2, settings, 1, 10**12, "bf16", "cuda")
    assert batch == 8 and training_step.grad_accum_steps(settings, batch, 1024, 1) == 3
    assert plan.fitting_batch(GPT2, settings, 1, 10**6, "bf16", "cuda") == 0


def test_memory_grows_as_it_should() -> None:
    def need(**changes: object) -> plan.Memory:
        return plan.memory_needed(GPT2.model_copy(update=changes), SETTINGS, 4, "fp32", "cpu")

    base = need()
    assert base.total == sum(vars(base).values())
    assert base.weights == 4 * 124_475_904 and base.optimizer == 8 * 124_475_904
    assert need(n_layer=24).activations > 1.8 * base.activations
    assert need(dropout=0.1).activations > base.activations
    assert base.logits < 4 * 1024 * 50304 * 4  # never the whole float32 logits


def test_counted_n_grams_need_memory_up_to_a_bound() -> None:
    taught = SETTINGS.model_copy(update={"ngram_teacher": 4e6})
    assert plan.counts_memory(SETTINGS, 10**7, "cpu") == 12 * 10**7 and not plan.counts_memory(SETTINGS, 10**7, "cuda")
    assert plan.counts_memory(taught, 10**7, "cpu") == 34 * 10**7 + 4 * 2**24
    assert plan.counts_memory(taught, 10**7, "cuda") == 22 * 10**7 + 4 * 2**24
    assert plan.counts_memory(taught, 10**10, "cpu") == plan.counts_memory(taught, 2**25, "cpu") < 1.3e9
    assert not plan.counts_memory(taught, 0, "cpu")


def test_the_estimate_of_a_plan_has_the_counts(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure_here", lambda *args, **more: plan.Costs(1.0))
    config = load_config(values={"train": {"max_steps": 10, "device": "cpu", "precision": "fp32"}})
    text = plan.make_plan("sample", config, tiny_data, "here")
    bare = plan.memory_needed(text.config.model, config.train, text.batch_size, "fp32", "cpu").total
    assert text.estimated_bytes >= bare + plan.COUNTS_BYTES * text.corpus > bare


def test_the_trial_measures_this_machine(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(tiny_data), *TINY_FLAGS, "--train.max-steps", "50", "--plan"]
    assert train.main(words) == 0
    text = capsys.readouterr().out
    assert figure(text, r"memory: ([\d.]+) (?:MB|GB) measured") > 0
    assert "50 steps, 3,200 tokens" in text
    assert not list(tmp_path.iterdir())


def test_a_plan_counts_what_a_run_will_count(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial process is told of the prepared texts, starts its model from them and takes its steps with the teacher."""
    config = load_config(
        values={
            "model": {"n_layer": 1, "n_head": 1, "n_embd": 48, "block_size": 16, "tied_head": False, "vocab_size": 0},
            "train": {"ngram_start": True, "ngram_teacher": 1e6, "device": "cpu", "precision": "fp32"},
        }
    )
    monkeypatch.setattr(plan.time, "perf_counter", itertools.count().__next__)  # every look at the clock is a second
    answers: list[dict] = []

    def trial(*_: object, input: str, **__: object) -> subprocess.CompletedProcess:
        job = json.loads(input)
        assert job["taught"] == str(tiny_data)
        answers.append(plan.benchmark_steps(job | {"batch": 2}))
        return subprocess.CompletedProcess([], 0, stdout=json.dumps(answers[0]), stderr="")

    monkeypatch.setattr(plan.subprocess, "run", trial)
    found = plan.make_plan("sample", config, tiny_data, "here")
    assert found.non_training_s["counting"] == answers[0]["counting_s"] == 1


def test_unprepared_data_uses_known_figures() -> None:
    args, config = train.read_args(["--preset", "victorian"])
    assert plan.corpus_tokens(args.preset, config, args.data) == (2_900_000_000, 5_242_880)
    assert plan.vocabulary(args.preset, config, args.data).vocab_size == 50304
    assert load_config("starter").model.vocab_size == 0


def test_passes_over_texts_that_are_not_there_yet_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were taken as passes over a single window: ten of them in two steps and one second."""
    monkeypatch.setattr(plan, "measure_here", lambda *given, **more: plan.Costs(1.0))
    show_plan("starter", load_config("starter"), tmp_path / "none", "here")
    text = capsys.readouterr().out
    assert (
        "so the 10 passes over them are not counted" in text
        and "steps" not in text.split("speed: ")[1].split("time: ")[1]
    )
    assert "time: 1h21m for each million tokens of text (some 4 MB), read 10 times" in text  # 2,048 tokens a second
    limited = load_config("starter").model_copy(deep=True)
    limited = limited.model_copy(update={"train": limited.train.model_copy(update={"max_steps": 500})})
    show_plan("starter", limited, tmp_path / "none", "here")
    assert "length: 500 steps, 1,024,000 tokens" in capsys.readouterr().out


def test_overhead_of_evaluation_samples_and_checkpoints() -> None:
    costs = plan.Costs(step_s=1.0, eval_s=0.01, sample_s=0.5, save_s=2.0, counting_s=3.0)
    settings = TrainConfig(
        max_steps=100, eval_interval=30, eval_tokens=50, sample_interval=40, sample_tokens=10, checkpoint_minutes=0
    )
    assert plan.non_training_time(settings, 100, 2.5, 1000, costs) == {
        "evaluation": 4 * 50 * 0.01,  # at 30, 60, 90 and the end
        "samples": 3 * 10 * 0.5,  # before the first step, at 40 and 80
        "checkpoints": (4 + 3) * 2.0,  # a best each time, one last of three times the bytes
        "counting": 3.0,  # once, before the first step
    }
    each = settings.model_copy(update={"eval_interval": 0, "sample_interval": 0, "each_epoch": True, "eval_tokens": 0})
    assert (
        plan.non_training_time(each, 100, 2.5, 1000, costs)["evaluation"] == 3 * 1000 * 0.01
    )  # two epochs and the end
    assert plan.non_training_time(each, 100, 2.5, 1000, costs)["samples"] == 2 * 10 * 0.5
    timed = settings.model_copy(update={"checkpoint_minutes": 0.5, "checkpoint_interval": 50})
    assert plan.non_training_time(timed, 100, 2.5, 1000, costs)["checkpoints"] == (4 + 3 * (1 + 2 + 3)) * 2.0
