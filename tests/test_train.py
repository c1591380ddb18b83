"""The training loop: what it optimises, what it leaves behind, when it stops."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from checkpoint import finished
from config import Config, ConfigError, ModelConfig, TrainConfig, load_config
from dataset import TokenData
from devices import DistributedContext
from model import GPT
from support.helpers import ROOT, TINY_FLAGS, nonsense, prepare_text
from training import metrics, run_folder
from training import optimizer as optimizers
from training import state as training_state
from training import step as training_step
from training.checkpointing import CheckpointWriter
from training.metrics import time_left
from training.optimizer import Optimizer
from training.schedule import total_steps

ALONE = DistributedContext(0, 1, "none", torch.device("cpu"))
TINY = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=20)


def run(data: Path, out: Path, *flags: str) -> int:
    return train.main(["--data", str(data), "--out", str(out), *TINY_FLAGS, *flags])


def rows(out: Path, key: str = "train_loss") -> list[dict]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if key in row]


def weights(out: Path, which: str = "last") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / which / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Recorder:
    """A scaler that writes down what is called on it, and on the optimizer through it."""

    def __init__(self, calls: list[str]):
        self.calls = calls

    def is_enabled(self) -> bool:
        return False

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        self.calls.append("scale")
        loss.register_hook(lambda _: self.calls.append("backward"))
        return loss

    def unscale_(self, part: object) -> None:
        self.calls.append("unscale")

    def step(self, part: torch.optim.Optimizer) -> None:
        self.calls.append("step")
        part.step()

    def update(self) -> None:
        self.calls.append("update")


def batches(count: int, rows: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randint(0, 20, (rows, 9), generator=generator)
        yield x[:, :-1], x[:, 1:]


def gradients(model: GPT, source, accumulate: int, settings: TrainConfig) -> tuple[dict[str, torch.Tensor], float]:
    """The gradients a step hands to the optimizer, and the loss it reports."""
    caught: dict[str, torch.Tensor] = {}
    optimizer = Optimizer(model, settings)
    optimizer.parts[0].step = lambda: caught.update({n: p.grad.clone() for n, p in model.named_parameters()})
    loss, _, _ = training_step.take_step(model, optimizer, Recorder([]), source, accumulate, settings, "fp32", ALONE)
    return caught, loss


def test_micro_batches_add_up_to_one_batch() -> None:
    torch.manual_seed(0)
    model, settings = GPT(TINY), TrainConfig(max_steps=1, grad_clip=0)
    whole = list(batches(4, 2))
    joined = iter([(torch.cat([x for x, _ in whole]), torch.cat([y for _, y in whole]))])
    split, loss = gradients(model, iter(whole), 4, settings)
    once, expected = gradients(model, joined, 1, settings)
    assert loss == pytest.approx(expected, rel=1e-6)
    for name in once:
        torch.testing.assert_close(split[name], once[name], rtol=1e-5, atol=1e-7)


def test_the_logged_loss_is_the_mean_of_all_micro_batches() -> None:
    torch.manual_seed(0)
    model = GPT(TINY)
    source = list(batches(3, 2))
    _, loss = gradients(model, iter(source), 3, TrainConfig(max_steps=1))
    with torch.no_grad():
        assert loss == pytest.approx(sum(float(model(x, y)) for x, y in source) / 3, rel=1e-6)


def test_the_order_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    model, settings = GPT(TINY), TrainConfig(max_steps=1)
    optimizer = Optimizer(model, settings)
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: (calls.append("clip"), clip(*a))[1])
    monkeypatch.setattr(optimizer, "zero_grad", lambda: calls.append("zero"))
    training_step.take_step(model, optimizer, Recorder(calls), batches(2, 2), 2, settings, "fp32", ALONE)
    assert calls == ["scale", "backward"] * 2 + ["unscale", "clip", "step", "update", "zero"]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(fault: str) -> None:
    torch.manual_seed(0)
    model, settings = GPT(TINY), TrainConfig(max_steps=1)
    optimizer = Optimizer(model, settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    training_step.take_step(model, optimizer, scaler, batches(1, 2), 1, settings, "fp32", ALONE)
    if fault == "loss":
        with torch.no_grad():
            model.ln_f.bias[0] = math.nan
    else:
        model.wpe.weight.register_hook(lambda g: g * math.inf)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {name: value["exp_avg"].clone() for name, value in optimizer.state_dict().items()}
    _, _, finite = training_step.take_step(model, optimizer, scaler, batches(1, 2), 1, settings, "fp32", ALONE)
    assert not finite
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    for name, value in optimizer.state_dict().items():
        assert torch.equal(value["exp_avg"], moments[name])


def test_an_overflow_in_one_part_of_the_optimizer_stops_both() -> None:
    """fp16 with Muon: an infinite gradient of one hidden matrix keeps AdamW's parameters where they are, too."""
    torch.manual_seed(0)
    model, settings = GPT(TINY), TrainConfig(max_steps=1, optimizer="muon")
    optimizer, scaler = Optimizer(model, settings), torch.amp.GradScaler("cpu", 1024.0)
    hook = model.h[1].mlp.c_fc.weight.register_hook(lambda g: g * math.inf)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = training_step.take_step(model, optimizer, scaler, batches(1, 2), 1, settings, "fp32", ALONE)
    assert not found[2] and math.isfinite(found[0]) and not math.isfinite(found[1])
    assert same(model.state_dict(), before)
    assert scaler.get_scale() == 512 and all(p.grad is None for p in model.parameters())
    hook.remove()
    assert training_step.take_step(model, optimizer, scaler, batches(1, 2), 1, settings, "fp32", ALONE)[2]
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items() if value.dim() > 1)


def test_overflows_are_allowed_until_the_scale_is_used_up() -> None:
    from training.checkpointing import Progress

    class Log:
        def say(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    progress, settings, scaler = Progress(step=4), TrainConfig(max_steps=9), torch.amp.GradScaler("cpu", 1.0)
    training_step.bad_step(progress, scaler, settings, 3.0, math.inf, Path("runs/x"), Log())
    assert progress.skipped == 0 and not said
    with pytest.raises(training_step.TrainingFailed, match=r"step 5: loss nan.*last good checkpoint is in runs.x"):
        training_step.bad_step(progress, scaler, settings, math.nan, math.nan, Path("runs/x"), Log())
    small = torch.amp.GradScaler("cpu", 0.5)
    with pytest.raises(training_step.TrainingFailed, match="gradient norm inf"):
        training_step.bad_step(Progress(), small, settings, 3.0, math.inf, Path("runs/x"), Log())


def test_clipping_limits_the_norm() -> None:
    torch.manual_seed(0)
    caught, _ = gradients(GPT(TINY), batches(1, 2), 1, TrainConfig(max_steps=1, grad_clip=0.01))
    assert math.sqrt(sum(float((g**2).sum()) for g in caught.values())) == pytest.approx(0.01, rel=1e-3)


def test_a_run_leaves_its_folder(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw_losses: Callable[[Path], Path | None]
) -> None:
    monkeypatch.setattr(metrics, "draw_losses", draw_losses)
    out = tmp_path / "run"
    assert (
        run(
            tiny_data,
            out,
            "--train.max-steps",
            "60",
            "--train.lr",
            "1e-2",
            "--train.sample-interval",
            "30",
            "--train.tensorboard",
        )
        == 0
    )
    losses = [row["train_loss"] for row in rows(out)]
    assert len(losses) == 60 and losses[-1] < losses[0] - 0.5
    last = rows(out, "val_loss")[-1]
    assert set(last) >= {
        "step",
        "tokens",
        "train_loss",
        "val_loss",
        "val_bpb",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "elapsed_s",
    }
    assert last["step"] == 60 and last["tokens"] == 60 * 64
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / math.log(2), rel=0.02)  # one ASCII character a token
    assert "mfu" not in last  # nobody knows this processor's peak
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 30, 60]
    assert (out / "loss.png").stat().st_size > 1000
    assert list((out / "tensorboard").iterdir())
    settings = tomllib.loads((out / "config.toml").read_text())
    assert settings["model"]["vocab_used"] == settings["model"]["vocab_size"] > 5
    for folder in ("best", "last"):
        assert {p.name for p in (out / folder).iterdir()} >= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "README.md",
        }


def test_intervals_do_not_change_the_weights(tiny_data: Path, tmp_path: Path, one_thread: None) -> None:
    run(tiny_data, tmp_path / "a", "--train.max-steps", "12")
    flags = "--train.max-steps 12 --train.eval-interval 3 --train.sample-interval 2 --train.log-interval 5 --train.checkpoint-interval 4"
    run(tiny_data, tmp_path / "b", *flags.split())
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_the_time_left_is_the_nearest_end(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert time_left(100, 2.0, 0, 5.0) == 50 and time_left(100, 2.0, 0.5, 5.0) == 25
    assert time_left(math.inf, 2.0, 1, 50.0) == 10 and time_left(math.inf, 2.0, 1, 70.0) == 0
    assert time_left(math.inf, 2.0, 0, 5.0) is None
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def taking(*_: object) -> tuple[float, float, bool]:
        now[0] += 10
        return 2.0, 1.0, True

    monkeypatch.setattr(training_step, "take_step", taking)
    clock = ["--train.max-steps", "0", "--train.max-minutes", "2", "--train.log-interval", "3"]
    for schedule in ("constant", "wsd"):
        assert run(tiny_data, tmp_path / schedule, *clock, "--train.schedule", schedule) == 0
        said = re.findall(r"^step=(\d+) .* eta=(\S+)$", capsys.readouterr().err, re.M)
        assert [(step, eta) for step, eta in said if step in "13"] == [("1", "1m50s"), ("3", "1m30s")], schedule
    tokens = ["--train.max-steps", "0", "--train.max-tokens", str(64 * 6), "--train.log-interval", "3"]
    assert run(tiny_data, tmp_path / "tokens", *tokens) == 0
    assert re.search(r"^step=3 .* eta=30s$", capsys.readouterr().err, re.M)


def test_best_is_the_minimum_ever_seen(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([3.0, 1.0, 2.0, 1.0, 5.0, 9.0])
    monkeypatch.setattr(training_state, "validate", lambda *a: next(figures))
    run(tiny_data, tmp_path / "a", "--train.max-steps", "25")
    assert [row["val_loss"] for row in rows(tmp_path / "a", "val_loss")] == [3.0, 1.0, 2.0, 1.0, 5.0]
    assert [row["best_val_loss"] for row in rows(tmp_path / "a", "val_loss")] == [3.0, 1.0, 1.0, 1.0, 1.0]
    run(tiny_data, tmp_path / "b", "--train.max-steps", "10", "--train.eval-interval", "0", "--train.lr", "1e-3")
    card = json.loads((tmp_path / "a/best/config.json").read_text())["victorian_gpt"]
    assert "10" in str(card) and not same(weights(tmp_path / "a", "best"), weights(tmp_path / "a"))


def test_validation_is_repeatable_and_weighted_by_tokens(tiny_data: Path) -> None:
    data = TokenData.open(tiny_data)
    model = GPT(TINY.model_copy(update={"vocab_size": data.manifest.tokenizer.vocab_size, "dropout": 0.5}))
    model.train()
    found = [training_step.validate(model, data.val, 8, 3, "fp32", ALONE) for _ in range(2)]
    assert found[0] == found[1]
    assert model.training
    model.eval()
    tokens = torch.from_numpy(data.val.read(0, len(data.val)).astype("int64"))
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 8):
            x = tokens[start : start + 9]
            total += float(model(x[None, :-1], x[None, 1:])) * (len(x) - 1)
            count += len(x) - 1
    assert (len(tokens) - 1) % 8 != 0  # the last window is a short one
    assert found[0] == pytest.approx(total / count, rel=1e-6)
    assert training_step.validate(model, data.val, 8, 7, "fp32", ALONE) == pytest.approx(found[0], rel=1e-6)


def test_validation_takes_no_gradients_and_training_mode_comes_back_after_an_exception(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT(TINY)
    model.train()

    def failing(*_: object) -> None:
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("seen")

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(RuntimeError, match="seen"):
        training_step.validate(model, TokenData.open(tiny_data).val, 8, 3, "fp32", ALONE)
    assert model.training and torch.is_grad_enabled()


def test_the_number_of_updates_is_exact(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = [0]
    step = optimizers.AdamW.step
    monkeypatch.setattr(
        optimizers.AdamW, "step", lambda self, *a: (count.__setitem__(0, count[0] + 1), step(self, *a))[1]
    )
    run(tiny_data, tmp_path / "a", "--train.max-steps", "7")
    assert count == [7]
    assert rows(tmp_path / "a")[-1]["lr"] == pytest.approx(train.read_args([])[1].train.min_lr)


def test_training_without_compiling_never_loads_the_compiler(tiny_data: Path, tmp_path: Path) -> None:
    """It takes two seconds, which torch's own optimizers spend at every start."""
    flags = [*TINY_FLAGS, "--train.optimizer", "muon", "--train.max-steps", "2"]
    words = ["--data", str(tiny_data), "--out", str(tmp_path / "run"), *flags]
    script = f"import sys, train; code = train.main({words!r}); sys.exit(code or 'torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_ends_in_steps_epochs_and_tokens() -> None:
    def steps(**values: float) -> int:
        return total_steps(TrainConfig(**values), per_epoch=100, windows_per_step=8, block_size=16)

    assert steps(max_steps=50) == 50
    assert steps(epochs=2) == 25
    assert steps(max_tokens=1281) == 11
    assert steps(max_steps=50, epochs=2, max_tokens=10_000) == 25
    assert steps(max_minutes=1, schedule="constant") == 0


def test_tokens_per_step_must_divide() -> None:
    settings = TrainConfig(max_steps=1, tokens_per_step=1000)
    with pytest.raises(
        ConfigError, match="--train.tokens-per-step 1000 is not a multiple .* try --train.tokens-per-step 896"
    ):
        training_step.grad_accum_steps(settings, 4, 16, 2)
    assert training_step.grad_accum_steps(settings.model_copy(update={"tokens_per_step": 1024}), 4, 16, 2) == 8
    victorian = load_config("victorian").train
    assert [training_step.grad_accum_steps(victorian, 16, 2048, world) for world in (1, 8)] == [16, 2]


@pytest.mark.parametrize(
    ("flags", "reason", "steps"),
    [
        ("--train.max-steps 7", "all steps done", 7),
        ("--train.max-steps 0 --train.max-tokens 320", "all steps done", 5),
        ("--train.max-steps 0 --train.epochs 1", "all steps done", 12),
        ("--train.max-steps 500 --train.target-loss 50", "running average of the loss", 1),
        (
            "--train.max-steps 500 --train.patience 2 --train.min-improvement 10 --train.eval-interval 2",
            "no better validation loss in 2 passes",
            6,
        ),
        ("--train.max-steps 100000 --train.max-minutes 0.02", "--train.max-minutes 0.02 are over", None),
        (
            "--train.max-steps 0 --train.schedule constant --train.max-minutes 0.02",
            "--train.max-minutes 0.02 are over",
            None,
        ),
    ],
)
def test_stop_rules(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, reason: str, steps: int | None
) -> None:
    assert run(tiny_data, tmp_path / "a", *flags.split()) == 0
    assert reason in capsys.readouterr().err
    last = rows(tmp_path / "a")[-1]["step"]
    assert last == steps if steps else 0 < last < 100_000
    assert (tmp_path / "a/best/config.json").is_file() and (tmp_path / "a/last/checksums.json").is_file()


def test_a_target_is_met_by_the_running_average(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One lucky step is not enough; a leap upwards is told."""
    losses = iter([2.0] * 60 + [0.1] + [9.0] + [0.5] * 400)
    monkeypatch.setattr(training_step, "take_step", lambda *a: (next(losses), 1.0, True))
    assert run(tiny_data, tmp_path / "a", "--train.max-steps", "900", "--train.target-loss", "0.9") == 0
    said = capsys.readouterr().err
    warnings = [line for line in said.splitlines() if "far above its average" in line]
    assert len(warnings) == 1 and "step 62: loss 9.000 is far above its average 1.9" in warnings[0]
    assert "running average of the loss 0.89" in said
    assert 62 < rows(tmp_path / "a")[-1]["step"] < 200


def test_speed_leaves_out_compilation_evaluation_and_checkpoints(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock of our own: a step takes 2 s, the first two 500 s, an evaluation 100 s, a checkpoint 30 s."""
    import devices

    now = [0.0]

    def taking(seconds: float, result: object) -> object:
        now[0] += seconds
        return result

    count = itertools.count()
    save = CheckpointWriter.__call__
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(training_step, "take_step", lambda *a: taking(500 if next(count) < 2 else 2, (2.0, 1.0, True)))
    monkeypatch.setattr(training_state, "validate", lambda *a: taking(100, 2.0))
    monkeypatch.setattr(
        CheckpointWriter, "__call__", lambda self, progress, best: taking(30, save(self, progress, best=best))
    )
    monkeypatch.setattr(devices, "peak_flops", lambda *a: 1e12)
    monkeypatch.setattr(devices, "energy_meter", lambda device: lambda: 3.6e6 * now[0])
    monkeypatch.setattr(training_state, "gpu_memory", lambda device: 12.5)
    flags = ["--train.max-steps", "10", "--train.eval-interval", "2", "--train.checkpoint-interval", "3"]
    assert run(tiny_data, tmp_path / "a", *flags) == 0
    found = rows(tmp_path / "a")
    assert ["tokens_per_s" in row for row in found] == [False, False] + [True] * 8
    assert {row["tokens_per_s"] for row in found[2:]} == {64 / 2}
    data = TokenData.open(tiny_data)
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=data.manifest.tokenizer.vocab_size)
    assert found[-1]["mfu"] == pytest.approx(32 * GPT(shape).flops_per_token() / 1e12)
    seconds = 500 * 2 + 8 * 2 + 5 * 100 + 30 + 3 * 30 + 30  # two slow steps, eight, five looks, one best, four last
    said = capsys.readouterr().err
    assert f"energy_kwh={seconds - 30:.4f}" in said and "gpu_memory_gb=12.50" in said and "tokens_per_s=32" in said
    assert f"time={(seconds - 30) // 60}m" in said and "best_val_loss=2.0000" in said
    assert "tokens=640" in said and "folders_written=5" in said
    assert train.main(["--resume", "--out", str(tmp_path / "a"), "--train.max-steps", "11"]) == 0
    energy = float(re.search(r"energy_kwh=([\d.]+)", capsys.readouterr().err)[1])
    assert energy > seconds  # of both sessions


def test_log_lines_can_be_read_by_cloudwatch(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_data, tmp_path / "a", "--train.max-steps", "5")
    said = capsys.readouterr().err
    for row in rows(tmp_path / "a"):
        line = next(line for line in said.splitlines() if line.startswith(f"step={row['step']} "))
        read = {key: float(value) for key, value in re.findall(r"(\w+)=(-?\d[\d.e+-]*)(?: |$)", line)}
        for key in {"train_loss", "val_loss", "val_bpb", "lr", "grad_norm"} & row.keys():
            assert read[key] == pytest.approx(row[key], rel=1e-3, abs=1e-4), key
    assert "val_loss=" in said


def test_energy_comes_from_nvml_and_mfu_from_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    import devices

    counters, asked = iter([1_000_000, 4_600_000]), []
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counters),
    )
    gpu = torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    assert devices.energy_meter(gpu) is None and devices.energy_meter(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = devices.energy_meter(gpu)
    assert meter is not None and meter() == 3600.0 and asked == ["GPU-12-34"]
    assert devices.gpu_memory(torch.device("cpu")) is None
    for name, precision, rate in (
        ("NVIDIA A100-SXM4-40GB", "fp16", 312e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("Tesla T4", "bf16", None),
        ("NVIDIA L4", "fp16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("Some Accelerator 9", "fp32", None),
    ):
        assert devices.peak_flops(name, precision) == rate, name


def test_weights_and_biases(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert run(tiny_data, tmp_path / "a", "--train.max-steps", "2", "--train.wandb") == 2
    assert "pip install wandb" in capsys.readouterr().err and not (tmp_path / "a").exists()
    monkeypatch.setattr(train, "find_spec", lambda name: name)
    logged: list[tuple[int, float]] = []
    begun: list[dict] = []
    ended: list[bool] = []
    there = SimpleNamespace(
        log=lambda row, step: logged.append((step, row["train_loss"])), finish=lambda: ended.append(True)
    )
    fake = SimpleNamespace(init=lambda **given: (begun.append(given), there)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert run(tiny_data, tmp_path / "a", "--train.max-steps", "2", "--train.wandb") == 0
    assert train.main(["--resume", "--out", str(tmp_path / "a"), "--train.max-steps", "3"]) == 0
    assert logged == [(row["step"], row["train_loss"]) for row in rows(tmp_path / "a")] and len(logged) == 3
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["name"] == "a" and len(ended) == 2


def test_each_epoch_reports_its_average(tiny_data: Path, tmp_path: Path) -> None:
    flags = "--train.max-steps 0 --train.epochs 3 --train.each-epoch --train.eval-interval 0"
    run(tiny_data, tmp_path / "a", *flags.split())
    epochs = rows(tmp_path / "a", "epoch_loss")
    assert len(epochs) == 3 and [int(row["epoch"]) for row in epochs] == [1, 2, 3]
    first = [row["train_loss"] for row in rows(tmp_path / "a") if row["step"] <= epochs[0]["step"]]
    assert epochs[0]["epoch_loss"] == pytest.approx(sum(first) / len(first))
    assert epochs[-1]["best_epoch_loss"] == min(row["epoch_loss"] for row in epochs)
    assert len((tmp_path / "a/samples.jsonl").read_text().splitlines()) == 3


def test_summary_json_says_whether_a_run_has_ended(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert run(tiny_data, out, "--train.max-steps", "2") == 0
    found = json.loads((out / "summary.json").read_text())
    assert found["done"] and found["reason"] == "all steps done" and found["steps"] == 2
    assert finished(out)

    def broken(*_: object) -> None:
        raise RuntimeError("the power is cut")

    monkeypatch.setattr(training_step, "take_step", broken)
    assert train.main(["--resume", "--out", str(out), "--train.max-steps", "4"]) == 1
    assert not (out / "summary.json").exists()
    assert not finished(out)


def test_texts_in_data_that_a_run_does_not_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    monkeypatch.setattr(train, "train_in_folder", lambda *_: {})
    monkeypatch.setattr(metrics, "finish", lambda _: None)
    assert train.main([]) == 0
    assert "found" not in capsys.readouterr().err
    for name in ("one", "two", "three", "four"):
        (tmp_path / "data" / f"{name}.txt").write_text("It was.")
    assert train.main([]) == 0
    told = capsys.readouterr().err
    assert "found data/four.txt, data/one.txt, data/three.txt …, which this run does not read" in told
    assert "python train.py --preset starter" in told  # which tests/training and the README's commands run
    assert train.main(["--preset", "sample"]) == 0
    assert "found" not in capsys.readouterr().err


def test_nothing_is_overwritten(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_data, tmp_path / "a", "--train.max-steps", "2")
    before = weights(tmp_path / "a")
    assert run(tiny_data, tmp_path / "a", "--train.max-steps", "3") == 2
    assert "already holds a run: add --resume" in capsys.readouterr().err
    assert same(before, weights(tmp_path / "a"))
    assert train.main(["--resume", "--out", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_two_trainers_on_one_folder_are_refused(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from training.run_folder import locked

    with locked(tmp_path / "a"):
        assert run(tiny_data, tmp_path / "a", "--train.max-steps", "2") == 2
    assert "another train.py is writing there" in capsys.readouterr().err
    assert run(tiny_data, tmp_path / "a", "--train.max-steps", "2") == 0


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, calls = GPT.forward, [0]

    def poisoned(self: GPT, ids: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if self.training:
            calls[0] += 1
        return forward(self, ids, targets) * (math.nan if self.training and calls[0] in (6, 7) else 1.0)

    monkeypatch.setattr(GPT, "forward", poisoned)
    assert run(tiny_data, tmp_path / "a", "--train.max-steps", "10", "--train.checkpoint-interval", "5") == 1
    text = capsys.readouterr().err
    assert "step 6: loss nan" in text and "--train.skip-bad-steps 1" in text
    assert all(bool(torch.isfinite(value).all()) for value in weights(tmp_path / "a").values())
    calls[0] = 0
    assert run(tiny_data, tmp_path / "b", "--train.max-steps", "10", "--train.skip-bad-steps", "2") == 0
    assert rows(tmp_path / "b")[-1]["step"] == 10
    assert "skipped (2 of 2 allowed)" in capsys.readouterr().err


def test_fine_tuning_starts_from_a_model_folder(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_data, tmp_path / "a", "--train.max-steps", "40", "--train.lr", "1e-2")
    assert (
        run(
            tiny_data,
            tmp_path / "b",
            "--init-from",
            str(tmp_path / "a/best"),
            "--train.max-steps",
            "2",
            "--train.lr",
            "1e-5",
        )
        == 0
    )
    assert rows(tmp_path / "b")[0]["train_loss"] < rows(tmp_path / "a")[0]["train_loss"] - 0.3
    assert (
        run(
            tiny_data,
            tmp_path / "d",
            "--init-from",
            str(tmp_path / "a/best"),
            "--train.max-steps",
            "1",
            "--model.block-size",
            "32",
        )
        == 0
    )
    assert weights(tmp_path / "d")["transformer.wpe.weight"].shape[0] == 32
    other = tmp_path / "other"
    other.mkdir()
    foreign = prepare_text(other, "Quite different letters: JKQXZ. " * 40)
    capsys.readouterr()
    assert run(foreign, tmp_path / "c", "--init-from", str(tmp_path / "a/best"), "--train.max-steps", "2") == 2
    assert "its tokenizer is not the one of" in capsys.readouterr().err


def test_muon_and_the_other_schedules_train(tiny_data: Path, tmp_path: Path) -> None:
    for number, schedule in enumerate(("onecycle", "wsd", "constant")):
        out = tmp_path / str(number)
        assert (
            run(tiny_data, out, "--train.max-steps", "30", "--train.optimizer", "muon", "--train.schedule", schedule)
            == 0
        )
        assert rows(out)[-1]["train_loss"] < rows(out)[0]["train_loss"]


def test_the_lowest_average_so_far_is_logged(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([3.0, 2.0, 9.0, 9.0, 1.0, 1.0])
    monkeypatch.setattr(training_step, "take_step", lambda *a: (next(losses), 1.0, True))
    run(tiny_data, tmp_path / "a", "--train.max-steps", "6", "--train.eval-interval", "0")
    averages = [row["avg_loss"] for row in rows(tmp_path / "a")]
    assert [row["best_avg_loss"] for row in rows(tmp_path / "a")] == list(itertools.accumulate(averages, min))
    assert averages[2] > averages[1]
    assert f"best_avg_loss={min(averages):.4f}" in capsys.readouterr().err


def test_the_running_average() -> None:
    from training.checkpointing import Progress

    progress = Progress()
    assert progress.running_loss == math.inf
    progress.add_loss(4.0)
    assert progress.running_loss == pytest.approx(4.0)
    for _ in range(500):
        progress.add_loss(2.0)
    assert progress.running_loss == pytest.approx(2.0, abs=1e-3)


def test_progress_keeps_its_keys_on_disk() -> None:
    from training.checkpointing import Progress

    progress = Progress(step=3, evals_since_best=2, losses=[1.5])
    kept = progress.to_state()
    assert kept["stale"] == 2 and "evals_since_best" not in kept
    assert Progress.from_state(json.loads(json.dumps(kept))) == progress


def test_a_preset_needs_no_flags_but_its_texts(tmp_path: Path) -> None:
    args, config = train.read_args(["--preset", "story-nano", "--train.max-steps", "3", "--model.n-layer=2"])
    assert isinstance(config, Config)
    assert (config.model.n_layer, config.model.n_embd, config.train.max_steps, config.train.lr) == (2, 128, 3, 1e-4)
    assert args.preset == "story-nano"


def test_shakespeare_by_characters_has_its_known_split(shared_data: Path, tmp_path: Path) -> None:
    import prepare_data

    words = [
        "--input",
        str(shared_data / "tinyshakespeare.txt"),
        "--tokenizer",
        "char",
        "--no-unwrap",
        "--out",
        str(tmp_path / "data"),
    ]
    assert prepare_data.main(words) == 0
    data = TokenData.open(tmp_path / "data", verify=True)
    assert (len(data.train), len(data.val), data.manifest.tokenizer.vocab_size) == (1_003_854, 111_540, 65)


def test_nonsense_is_deterministic() -> None:
    assert nonsense(100) == nonsense(100) and len(nonsense(777)) == 777


@pytest.mark.parametrize(
    ("capability", "has", "expected"),
    [("AVX512", True, "bf16"), ("AVX512", False, "fp32"), ("AVX2", True, "fp32"), ("DEFAULT", False, "fp32")],
)
def test_auto_is_bf16_only_where_torch_may_use_its_instructions(
    capability: str, has: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import devices

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert devices.pick_precision("auto", torch.device("cpu")) == (expected, "")
