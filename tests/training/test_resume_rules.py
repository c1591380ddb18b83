"""What may change at --resume: applied, or refused by name before anything is written; and what is said."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

import train
from checkpoint import load_training
from config import read_toml
from support.helpers import nonsense, prepare_text
from support.samples import hashes
from test_train import rows, run

SHORT = ["--train.max-steps", "6", "--train.eval-interval", "2"]


@pytest.fixture
def begun(tiny_data: Path, tmp_path: Path) -> Path:
    assert run(tiny_data, tmp_path / "run", *SHORT) == 0
    return tmp_path / "run"


def resume(out: Path, *flags: object) -> int:
    return train.main(["--resume", "--out", str(out), *map(str, flags)])


def contents(out: Path) -> dict[str, str]:
    kept = {f"{where}/{name}": digest for where in ("last", "best") for name, digest in hashes(out / where).items()}
    return kept | {name: (out / name).read_text() for name in ("config.toml", "metrics.jsonl")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.optimizer", "muon"], "--train.optimizer muon: this run has adamw, which cannot change"),
        (["--train.seed", "7"], "--train.seed 7: this run has 1337"),
        (["--model.n-layer", "3"], "--model.n-layer 3: this run has"),
        (["--model.block-size", "8"], "--model.block-size 8: this run has"),
        (["--model.positions", "sinusoidal"], "--model.positions sinusoidal: this run has"),
        (["--preset", "story-small"], "--preset story-small: this run was begun with other settings"),
        (["--init-from", "gpt2"], "--init-from gpt2: this run has weights of its own"),
        (["--config", "other.toml"], "--train.optimizer muon: this run has adamw"),
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_is_written(
    flags: list[str], message: str, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.toml").write_text('[train]\noptimizer = "muon"\n')
    before = contents(begun)
    assert resume(begun, *flags, "--train.max-steps", 9) == 2
    assert message in capsys.readouterr().err
    assert contents(begun) == before
    assert resume(begun, "--train.max-steps", 9) == 0
    assert load_training(begun / "last")["step"] == 9


def test_every_other_flag_is_applied(begun: Path) -> None:
    flags = {"lr": 5e-4, "eval-interval": 3, "patience": 7, "keep-last": 2, "weight-decay": 0.0, "log-interval": 1, "grad-clip": 0.5}  # fmt: skip
    given = [word for name, value in flags.items() for word in (f"--train.{name}", str(value))]
    assert resume(begun, *given, "--train.max-steps", 9, "--model.dropout", 0.25, "--train.schedule", "constant") == 0
    held = read_toml(begun / "config.toml")
    assert {name: held["train"][name.replace("-", "_")] for name in flags} == flags
    assert held["model"]["dropout"] == 0.25
    assert [row["lr"] for row in rows(begun)][-3:] == [5e-4] * 3
    assert [row["step"] for row in rows(begun, "val_loss")] == [2, 4, 6, 9]
    assert (begun / "last" / "config.json").read_text().count("0.25") >= 3  # GPT-2's three rates
    assert resume(begun, "--train.max-steps", 10) == 0  # the new settings are the run's own now
    assert read_toml(begun / "config.toml")["model"]["dropout"] == 0.25


def test_other_texts_are_refused_or_begin_anew(begun: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "other").mkdir()
    other = prepare_text(tmp_path / "other", nonsense(800)[::-1], "--tokenizer-from", str(tiny_data))
    before = contents(begun)
    assert resume(begun, "--data", other, "--train.max-steps", 9) == 2
    shown = capsys.readouterr().err
    assert "other texts than this run was trained on" in shown and "--new-texts" in shown and str(other) in shown
    assert contents(begun) == before
    assert resume(begun, "--data", other, "--new-texts", "--train.max-steps", 9, "--train.eval-interval", 9) == 0
    assert "begin anew" in capsys.readouterr().err
    held = load_training(begun / "last")["progress"]
    assert held["step"] == 9 and held["windows"] == 3 * 4 and held["best_step"] == 9 and held["stale"] == 0
    assert resume(begun, "--train.max-steps", 10) == 0  # these are its texts now


def test_the_same_texts_prepared_anew_are_the_same(begun: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    import shutil

    from storage.shards import MANIFEST

    shutil.copytree(tiny_data, tmp_path / "moved")
    manifest = tmp_path / "moved" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"identity": "', '"identity": "f'))
    assert resume(begun, "--data", tmp_path / "moved", "--train.max-steps", 8) == 0
    assert resume(begun, "--data", tmp_path / "moved", "--new-texts", "--train.max-steps", 9) == 0
    assert "nothing begins anew" in capsys.readouterr().err
    assert load_training(begun / "last")["progress"]["windows"] == 9 * 4


def test_new_texts_go_with_resume(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_data, tmp_path / "run", *SHORT, "--new-texts") == 2
    assert "--new-texts goes with --resume" in capsys.readouterr().err


def test_a_rate_that_jumps_is_said_with_what_follows(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(begun, "--train.max-steps", 20) == 0
    shown = capsys.readouterr().err
    assert "note: the learning rate goes from " in shown and "by --train.schedule cosine to " in shown
    assert "at step 20" in shown and "--train.schedule constant --train.lr " in shown
    assert resume(begun) == 0
    assert "learning rate goes" not in capsys.readouterr().err


@pytest.mark.parametrize("parts", ["1", "2"])
def test_another_number_of_threads_is_said(
    parts: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    assert run(tiny_data, tmp_path / "run", *SHORT, "--train.parts", parts) == 0
    torch.set_num_threads(2)
    assert resume(tmp_path / "run", "--train.max-steps", 7) == 0
    # where a step is cut into parts, no number depends on the threads
    assert ("note: 1 threads before, 2 now" in capsys.readouterr().err) == (parts == "1")


def test_a_run_is_resumed_from_another_folder(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_data.parent)
    assert run(Path(tiny_data.name), tmp_path / "run", *SHORT) == 0
    monkeypatch.chdir(tmp_path)
    assert resume(tmp_path / "run", "--train.max-steps", 7) == 0


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    data = prepare_text(tmp_path, nonsense(3000))
    assert run(data, tmp_path / "run", "--preset", "sample", *SHORT) == 0
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert "trains in under three minutes" not in card
    assert "A GPT-2 style language model, trained from scratch on " in card
    flags = [
        "--init-from",
        str(tmp_path / "run" / "best"),
        *SHORT[:2],
        "--data",
        str(data),
        "--train.precision",
        "fp32",
    ]
    assert train.main([*flags, "--out", str(tmp_path / "tuned")]) == 0
    assert "fine-tuned on " in (tmp_path / "tuned" / "best" / "README.md").read_text()


@pytest.mark.skipif(not os.environ.get("WANDB_PYTHON"), reason="WANDB_PYTHON names no interpreter that has wandb")
def test_the_real_weights_and_biases_offline(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for steps in ("2", "4"):
        flags = [] if steps == "4" else ["--data", str(tiny_data), "--train.batch-size", "4"]
        words = ["train.py", *flags, "--out", str(out), "--train.max-steps", steps, "--train.wandb"]
        made = subprocess.run(
            [os.environ["WANDB_PYTHON"], *words, *(["--resume"] if steps == "4" else [])],
            cwd=Path(train.__file__).parent, env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
    records = list((out / "wandb").glob("offline-run-*"))
    identity = (out / "wandb_id.txt").read_text()
    assert len(records) == 2 and all(path.name.endswith(identity) for path in records)
    assert all(next(path.glob("*.wandb")).stat().st_size > 0 for path in records)
