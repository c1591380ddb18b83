"""Settings: presets carry their figures, faults come all at once, flags lie over files over presets."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from cli import bounds, flag_given, flag_value, parse_flags, run_main
from config import (
    ROOT,
    Config,
    ConfigError,
    FrozenSettings,
    GenerationParams,
    ModelConfig,
    TrainConfig,
    build,
    load_config,
    preset_names,
    to_toml,
)


class Flags(FrozenSettings):
    """A script."""

    name: str = ""
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig(max_steps=5)


def test_eleven_presets_load() -> None:
    assert preset_names() == sorted(
        ["sample", "victorian", "victorian-fast", "starter", "shakespeare-char", "shakespeare-124m", "finetune"]
        + [f"story-{size}" for size in ("nano", "small", "medium", "large")]
    )
    for name in preset_names():
        assert load_config(name).description


def story(n_layer: int, n_head: int, n_embd: int, block_size: int) -> dict:
    """One of the TinyStories models: the shapes differ, the training is the same."""
    return {
        "model": dict(
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            block_size=block_size,
            vocab_size=50257,
            dropout=0.1,
            bias=True,
            positions="learned",
            tied_head=True,
        ),
        "train": dict(
            lr=1e-4,
            max_steps=20_000,
            batch_size=32,
            tokens_per_step=32 * 32 * block_size,
            warmup_steps=1000,
            schedule="cosine",
            grad_clip=0.5,
            patience=10,
            precision="auto",
        ),
        "data": dict(source="tinystories", tokenizer="gpt2"),
    }


FIGURES = {
    "victorian": {
        "model": dict(n_layer=12, n_embd=768, n_head=12, block_size=2048, vocab_size=50304, dropout=0.2, bias=True),
        "train": dict(
            tokens_per_step=524_288,
            lr=1e-4,
            schedule="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            grad_clip=1.0,
            precision="fp16",
        ),
        "data": dict(source="pg19", tokenizer="gpt2", shard_tokens=100_000_000),
        "generation": dict(max_tokens=200, temperature=1.3, top_k=50, top_p=0.95, repetition_penalty=1.2),
    },
    "starter": {
        "model": dict(
            n_layer=2, n_head=4, n_embd=256, block_size=256, positions="sinusoidal", tied_head=False, bias=True
        ),
        "train": dict(
            epochs=10,
            batch_size=8,
            lr=3e-4,
            min_lr=0.0,
            warmup_steps=0,
            schedule="cosine",
            grad_clip=1.0,
            log_interval=20,
            each_epoch=True,
        ),
        "data": dict(source="data/*.txt", tokenizer="bpe", vocab_size=5000),
    },
    "story-nano": story(4, 4, 128, 64),
    "story-small": story(6, 6, 384, 128),
    "story-medium": story(8, 8, 512, 256),
    "story-large": story(12, 12, 768, 512),
    "shakespeare-char": {
        "train": dict(batch_size=16, lr=1e-3, optimizer="adamw", max_steps=5000, eval_interval=100, tokens_per_step=0),
        "data": dict(tokenizer="char", val_fraction=0.1),
    },
    "shakespeare-124m": {
        "model": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257),
        "train": dict(schedule="onecycle", optimizer="adamw", grad_clip=0.5, target_loss=0.1, max_steps=20_000),
    },
}


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_presets_carry_the_published_figures(name: str) -> None:
    config = load_config(name).model_dump()
    for table, values in FIGURES[name].items():
        assert {key: config[table][key] for key in values} == values


def test_every_preset_value_carries_a_comment() -> None:
    for name in preset_names():
        for line in (ROOT / "presets" / f"{name}.toml").read_text(encoding="utf-8").splitlines():
            if (
                "=" in line
                and not line.startswith(("#", "description", "sample_prompt"))
                and "[generation]" not in line
            ):
                table_done = line.split("=")[0].strip() in GenerationParams.model_fields
                assert "#" in line or table_done, f"{name}: {line}"


def test_victorian_states_every_training_setting() -> None:
    stated = tomllib.loads((ROOT / "presets/victorian.toml").read_text(encoding="utf-8"))["train"]
    named = "batch_size tokens_per_step max_steps epochs max_minutes lr min_lr warmup_steps schedule optimizer weight_decay grad_clip"
    named += " precision seed compile device parallel log_interval eval_interval sample_interval checkpoint_interval patience"
    assert set((named + " target_loss keep_last").split()) <= set(stated)


def test_settings_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        ModelConfig().n_layer = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match="model.n-layr: unknown setting"):
        build(Config, {"model": {"n_layr": 3}})


def test_all_faults_at_once_each_with_its_flag() -> None:
    with pytest.raises(ConfigError) as caught:
        build(
            Config,
            {"model": {"n_embd": 100, "n_head": 7}, "train": {"lr": -1, "max_steps": 5}, "generation": {"top_p": 0}},
        )
    text = str(caught.value)
    assert len(caught.value.faults) == 3
    assert "--model.n-head 7 does not divide --model.n-embd 100: try --model.n-head 5" in text
    assert "--train.lr -1" in text and "--generation.top-p 0" in text


@pytest.mark.parametrize(
    "values",
    [
        dict(temperature=-0.1),
        dict(temperature=2.1),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_p=float("nan")),
        dict(top_k=-1),
        dict(top_k=1_000_001),
        dict(repetition_penalty=0.0),
        dict(repetition_penalty=float("inf")),
        dict(min_p=1.0),
        dict(n=0),
        dict(stop=("",)),
        dict(seed=-1),
    ],
)
def test_sampling_bounds(values: dict) -> None:
    with pytest.raises(ValidationError):
        GenerationParams(**values)


def test_flags_over_file_over_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nlr = 5e-4\nmax_steps = 7\n")
    config = load_config("story-nano", file, values={"train": {"max_steps": 9}})
    assert (config.train.lr, config.train.max_steps, config.model.n_embd) == (5e-4, 9, 128)
    flags = parse_flags(Flags, ["--model.n-layer", "3", "--train.max_steps", "4"], defaults={"model": {"n_head": 2}})
    assert (flags.model.n_layer, flags.model.n_head, flags.train.max_steps) == (3, 2, 4)


def test_a_flag_can_be_a_mapping() -> None:
    class Weighted(FrozenSettings):
        weights: dict[int, float] = Field(default_factory=dict)

    assert parse_flags(Weighted, []).weights == {}
    assert parse_flags(Weighted, ["--weights", "5", "-1.5", "7", "2"]).weights == {5: -1.5, 7: 2.0}
    assert parse_flags(Weighted, [], defaults={"weights": {"5": 1}}).weights == {5: 1.0}


def test_flags_report_all_faults_and_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_main(lambda: int(bool(parse_flags(Flags, ["--train.lr", "-1", "--model.n-layer", "0"]))))
    text = capsys.readouterr().err
    assert code == 2
    assert "--train.lr -1.0" in text and "--model.n-layer 0" in text
    with pytest.raises(SystemExit) as caught:
        parse_flags(Flags, ["--model.n-layr", "3"])
    assert caught.value.code == 2


def test_help_shows_defaults_and_bounds() -> None:
    script = "from cli import parse_flags\nfrom tests.test_config import Flags\nparse_flags(Flags, ['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env={"COLUMNS": "200", "PATH": ""}
    )
    assert done.returncode == 0
    assert "[1 to 200]" in done.stdout and "(default: 4)" in done.stdout


def test_bounds_as_text() -> None:
    fields = GenerationParams.model_fields
    assert bounds(fields["temperature"]) == "0 to 2"
    assert bounds(fields["top_p"]) == "above 0 to 1"
    assert bounds(TrainConfig.model_fields["max_steps"]) == "0 or more"
    assert bounds(TrainConfig.model_fields["schedule"]) == ""


def test_toml_round_trip() -> None:
    for name in preset_names():
        config = load_config(name)
        assert build(Config, tomllib.loads(to_toml(config))) == config
    odd = build(
        Config, {"train": {"sample_prompt": 'a "b"\\\n\t£\x01', "max_steps": 1}, "generation": {"stop": ["x", "\n"]}}
    )
    assert build(Config, tomllib.loads(to_toml(odd))) == odd


def test_a_run_needs_an_end() -> None:
    with pytest.raises(ConfigError, match="no end is set"):
        build(Config, {"train": {"lr": 1e-3}})
    with pytest.raises(ConfigError, match="needs to know its last step"):
        build(Config, {"train": {"max_minutes": 2}})
    build(Config, {"train": {"max_minutes": 2, "schedule": "constant"}})


def test_unknown_preset_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of .*victorian"):
        load_config("victorien")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = [")
    with pytest.raises(ConfigError, match="bad.toml"):
        load_config(str(bad))


def test_flag_value() -> None:
    assert flag_value(["--a", "1", "--out=x=y"], "out") == "x=y"
    assert flag_value(["--a", "1"], "a") == "1"
    assert flag_value(["--a"], "a") is None
    assert flag_value(["--init_from", "gpt2"], "init-from") == "gpt2"
    assert flag_value(["--outer", "1", "--out-dir", "2"], "out") is None
    assert flag_given(["--x", "1", "--resume"], "resume") and not flag_given(["--resumed"], "resume")


class Bare(FrozenSettings):
    """A script with a flag that may come without its value."""

    plan: str = Field("", json_schema_extra={"bare": "here"})
    out: str = ""


@pytest.mark.parametrize(
    ("words", "plan"),
    [("", ""), ("--plan", "here"), ("--plan --out x", "here"), ("--plan T4", "T4"), ("--out x --plan=T4", "T4")],
)
def test_a_flag_without_its_value(words: str, plan: str) -> None:
    assert parse_flags(Bare, words.split()).plan == plan


TEXT = "“Fœtus” — ἀγάπη"
PRINTS = f"import sys; from cli import run_main; sys.exit(run_main(lambda: print({TEXT!a}) or 0))"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        # a locale without characters beyond ASCII, as on a bare server; of Windows the like holds for `>`
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, TEXT.encode()),
        ({"PYTHONIOENCODING": "cp1252"}, "“Fœtus” — ?????".encode("cp1252")),
        ({"PYTHONIOENCODING": "utf-8"}, TEXT.encode()),
    ],
    ids=["no code page", "asked for", "UTF-8"],
)
def test_a_code_page_loses_no_text(environment: dict[str, str], expected: bytes) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_", "LANG"))}
    command = [sys.executable, "-c", PRINTS]
    done = subprocess.run(command, cwd=ROOT, env=plain | environment, capture_output=True)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


def test_a_preset_that_is_no_file_yet_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"my\.toml: no such file; copy one of presets/"):
        load_config(str(tmp_path / "my.toml"))
