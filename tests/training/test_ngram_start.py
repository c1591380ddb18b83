"""Runs that start from counts and are taught by them: what the start knows, exact resuming, several processes, the folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ddp import together
from test_resume import assert_equal_runs

import train
from checkpoint import load_model, load_training, save_model
from config import GenerationParams, ModelConfig
from dataset import TokenData
from model import GPT
from support.helpers import nonsense, prepare_text
from test_train import rows, run, same, weights
from tokenizer import load_tokenizer
from training import step as training_step
from training.counting import Counting
from training.ngram_start import counted_start

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = ["--model.n-embd", "64", "--model.no-tied-head"]
COUNTED = [*WIDE, "--train.ngram-start", "--train.ngram-teacher", "2000"]
SAMPLED = [*COUNTED, "--train.sampled-softmax", "24"]  # of some fifty characters
LONG = ["--train.max-steps", "20"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """Sentences from a small stock of words, by 300 ids."""
    folder = tmp_path_factory.mktemp("words")
    return TokenData.open(prepare_text(folder, nonsense(60_000), "--tokenizer", "bpe", "--vocab-size", "300"))


def started(data: TokenData, **shape: object) -> GPT:
    values = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 48, "vocab_size": 300, "tied_head": False}
    torch.manual_seed(0)
    model = GPT(ModelConfig.model_validate(values | {"vocab_used": data.manifest.tokenizer.vocab_size} | shape))
    counted_start(model, Counting.of(data).model, seed=1)
    return model.eval()


def test_the_start_knows_the_counted_bigrams(words: TokenData) -> None:
    """Without one step: within 0.05 nats of the bigrams themselves, where a new model is more than 3 nats above them."""
    model, counts = started(words), Counting.of(words).model.lower(2)
    ids = words.val.read(0, 48 * 20 + 1).astype(np.int64)
    x, y = torch.from_numpy(ids[:-1]).view(20, 48), torch.from_numpy(ids[1:]).view(20, 48)
    bigrams = -np.log(counts.probabilities(ids)).mean()
    with torch.no_grad():
        assert float(model(x, y)) == pytest.approx(bigrams, abs=0.05)
        torch.manual_seed(0)
        assert float(GPT(model.config)(x, y)) > bigrams + 3


@pytest.mark.parametrize("shape", [{}, {"n_head": 1}, {"n_head": 8, "n_embd": 64}], ids=["64", "128", "8 a head"])
def test_the_first_heads_look_one_and_two_tokens_back(words: TokenData, shape: dict[str, int]) -> None:
    model = started(words, **shape)
    block, heads = model.h[0], model.config.n_head
    x = torch.from_numpy(words.val.read(0, 48).astype(np.int64))[None]
    with torch.no_grad():
        parts = block.attn.c_attn(block.ln_1(model.wte(x) + model.wpe.weight)).view(48, 3, heads, -1)
        q, k, _ = parts.permute(1, 2, 0, 3)
        scores = (q @ k.transpose(1, 2) / q.size(-1) ** 0.5).masked_fill(~torch.ones(48, 48).tril().bool(), -torch.inf)
        attention = scores.softmax(-1)  # [H, T, T]
    for back in range(1, 1 + min(2, heads)):
        assert float(attention[back - 1].diagonal(-back).min()) > 0.9


def test_a_started_model_is_a_plain_gpt2_folder(words: TokenData, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model = started(words)
    save_model(tmp_path / "m", model, load_tokenizer(words.folder), card={}, generation=GenerationParams())
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval()
    x = torch.from_numpy(words.val.read(0, 96).astype(np.int64)).view(2, 48)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(load_model(tmp_path / "m")[0](x), model(x))


def trained(data: Path, folder: Path, flags: list[str]) -> Path:
    """A run of 20 steps with `flags`, in one thread."""
    torch.set_num_threads(1)
    assert run(data, folder / "whole", *LONG, *flags) == 0
    return folder / "whole"


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_data, tmp_path_factory.mktemp("counted"), COUNTED)


def test_start_and_teacher_change_what_is_learned(undisturbed: Path, tiny_data: Path, tmp_path: Path) -> None:
    assert run(tiny_data, tmp_path / "taught", *LONG, *WIDE, "--train.ngram-teacher", "2000") == 0
    assert run(tiny_data, tmp_path / "plain", *LONG, *WIDE) == 0
    first = [rows(out)[0]["train_loss"] for out in (undisturbed, tmp_path / "taught", tmp_path / "plain")]
    assert first[0] < first[1] - 0.5 and first[1] == first[2]  # the teacher acts on gradients, not on the loss shown
    assert not same(weights(tmp_path / "taught"), weights(tmp_path / "plain"))


@pytest.fixture(scope="module")
def sampled(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_data, tmp_path_factory.mktemp("sampled"), SAMPLED)


def test_a_softmax_of_some_ids_learns_nearly_as_well(undisturbed: Path, sampled: Path) -> None:
    assert not same(weights(undisturbed), weights(sampled))
    losses = [rows(out, "val_loss")[-1]["val_loss"] for out in (undisturbed, sampled)]
    assert losses[1] == pytest.approx(losses[0], abs=0.1)


def test_a_softmax_of_some_ids_needs_no_teacher(tiny_data: Path, tmp_path: Path) -> None:
    for name, flags in (("some", ["--train.sampled-softmax", "24"]), ("all", [])):
        assert run(tiny_data, tmp_path / name, "--train.max-steps", "3", *flags) == 0
    some, whole = (rows(tmp_path / name)[-1]["val_loss"] for name in ("some", "all"))
    assert some != whole and some == pytest.approx(whole, abs=0.05)


@pytest.mark.parametrize(("whole", "flags"), [("undisturbed", COUNTED), ("sampled", SAMPLED)], ids=["all", "sampled"])
def test_a_counted_run_is_resumed_exactly(
    whole: str,
    flags: list[str],
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """The teacher's weight depends on the tokens seen, draws on step and text; the start is not made again."""
    ends = training_step.training_ends
    monkeypatch.setattr(
        training_step, "training_ends", lambda t, p, *a: "interrupted" if p.step == 7 else ends(t, p, *a)
    )
    out = tmp_path / "run"
    assert run(tiny_data, out, *LONG, *flags) == 0
    assert load_training(out / "last")["progress"]["step"] == 7
    monkeypatch.setattr(training_step, "training_ends", ends)
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert_equal_runs(out, request.getfixturevalue(whole))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_count_and_learn_as_one(parallel: str, tiny_data: Path, tmp_path: Path) -> None:
    flags = [*COUNTED, "--train.max-steps", "4", "--train.batch-size", "2", "--train.tokens-per-step", "64"]
    text = together(2, tiny_data, tmp_path / "two", *flags, "--train.parallel", parallel)
    assert run(tiny_data, tmp_path / "one", *flags, "--model.dropout", "0", "--train.lr", "1e-3") == 0
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-5) for name in theirs)
    assert text.count("counting alone: ") == 1
    columns = [rows(tmp_path / name, "counted_loss")[-1]["counted_loss"] for name in ("one", "two")]
    assert columns[0] == columns[1]


def test_the_end_of_a_run_says_what_counting_alone_reaches(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_data, tmp_path / "run", "--train.max-steps", "2") == 0
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("counting alone: ")]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    counted, model, together = (float(part.split(":")[1].split()[0]) for part in found[0].split(";"))
    assert counted == pytest.approx(last["counted_bpb"], abs=2e-3) and model == pytest.approx(last["val_bpb"], abs=2e-3)
    assert together <= min(counted, model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.ngram-start"], "--model.no-tied-head"),
        ([*WIDE, "--train.ngram-start", "--model.no-bias"], "leave out --model.no-bias"),
        (["--model.no-tied-head", "--train.ngram-start", "--model.n-embd", "32"], "--model.n-embd 32"),
    ],
    ids=["tied", "no bias", "narrow"],
)
def test_shapes_that_cannot_start_from_counts_are_refused(
    flags: list[str], message: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_data, tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err


def test_counts_cannot_start_a_model_that_has_weights(
    undisturbed: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--init-from", str(undisturbed / "best"), "--train.ngram-start", "--out", str(tmp_path / "run")]
    assert train.main(["--data", str(tiny_data), *flags]) == 2
    assert "--train.ngram-start: --init-from" in capsys.readouterr().err


def test_the_card_tells_that_counts_were_used(undisturbed: Path, tiny_data: Path, tmp_path: Path) -> None:
    assert (
        "| counted 3 grams | the first weights and a part of the targets |"
        in (undisturbed / "best" / "README.md").read_text()
    )
    assert run(tiny_data, tmp_path / "plain", "--train.max-steps", "1") == 0
    assert "counted" not in (tmp_path / "plain" / "best" / "README.md").read_text()
