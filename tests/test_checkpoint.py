"""Model folders and checkpoints: saving, resume, refusals, finding the newest."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (
    CheckpointError,
    described,
    fetch_model,
    find_model,
    load_model,
    load_training,
    newest_checkpoint,
    prune_checkpoints,
    save_training,
)
from model import GPT
from support.tiny_models import (
    GENERATION,
    SHAPES,
    TEXT,
    random_model,
    same_state,
    save,
    saved_by_transformers,
    shape,
    some_ids,
    tiny_tokenizer,
)
from tokenizer import Tokenizer, char_tokenizer, train_bpe


@pytest.fixture
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def test_the_tie_survives_every_way_of_loading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = shape(tokenizer)
    source = random_model(config)
    loaded, _ = load_model(save(tmp_path / "m", source, tokenizer))
    copied, assigned, emptied = GPT(config), GPT(config), GPT(config)
    copied.load_state_dict(source.state_dict())
    assigned.load_state_dict({name: tensor.clone() for name, tensor in source.state_dict().items()}, assign=True)
    emptied = emptied.to("meta").to_empty(device="cpu")
    for model in (loaded, copied, assigned, emptied, loaded.to(torch.float64)):
        assert model.lm_head.weight is model.wte.weight
        assert len(list(model.parameters())) == len({id(p) for p in model.parameters()}) == len(model.state_dict())
    assert torch.equal(copied(some_ids(config)), assigned(some_ids(config)))


def test_another_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(shape(tokenizer))
    folder = save(tmp_path / "m", model, tokenizer)
    other = train_bpe(["zebra quagga okapi gnu " * 9] * 4, tokenizer.vocab_size)
    other.save(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not the tokenizer"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="save the tokenizer that the model was trained with"):
        save(tmp_path / "n", model, char_tokenizer([TEXT], documents=1))
    assert not (tmp_path / "n").exists()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_model(folder)
    saved_by_transformers(tmp_path / "t", tokenizer, {}, vocab_size=tokenizer.vocab_size - 5)
    with pytest.raises(CheckpointError, match="has 280 ids, the model only 275"):
        load_model(tmp_path / "t")


def test_no_pickle_is_opened(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    saved_by_transformers(tmp_path / "g", tokenizer, {})
    (tmp_path / "g" / "model.safetensors").unlink()
    (tmp_path / "g" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"pickle.*convert it with transformers.*save_pretrained"):
        load_model(tmp_path / "g")
    assert not (tmp_path / "sprung").exists()

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was read or written")

    for place, name in ((torch, "load"), (torch, "save"), (pickle, "loads"), (pickle, "load"), (pickle, "dumps")):
        monkeypatch.setattr(place, name, forbidden)
    state = {"step": 1, "moments": torch.ones(3)}
    save_training(
        tmp_path / "last", random_model(shape(tokenizer)), tokenizer, state=state, card={}, generation=GENERATION
    )
    assert load_training(tmp_path / "last")["moments"].sum() == 3 and load_model(tmp_path / "last")


def test_damaged_model_folders_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(shape(tokenizer))
    weights = save(tmp_path / "m", model, tokenizer) / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 4, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            load_model(tmp_path / "m")
    tensors = load_file(save(tmp_path / "m", model, tokenizer) / "model.safetensors")
    del tensors["transformer.h.1.ln_2.weight"]
    tensors["transformer.ln_f.weight"] = torch.ones(5)
    tensors["score.weight"] = torch.ones(5)
    save_file(tensors, weights)
    with pytest.raises(
        CheckpointError, match=r"h\.1\.ln_2\.weight is missing.*ln_f.* shape \[5\].*score\.weight has no"
    ):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_model(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"nowhere.config\.json: no such file"):
        load_model(tmp_path / "nowhere")


def train_steps(model: GPT, optimizer: torch.optim.Optimizer, dice: torch.Generator, steps: int) -> None:
    model.train()
    for _ in range(steps):
        ids = torch.randint(model.config.tokens, (2, 9), generator=dice)
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()


@pytest.mark.parametrize("values", [{}, SHAPES["all at once"]], ids=["plain", "all at once"])
def test_four_steps_equal_two_and_a_resume_and_two(
    values: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = shape(tokenizer, dropout=0.1, **values)

    def start(model: GPT) -> tuple[GPT, torch.optim.Optimizer, torch.Generator]:
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), torch.Generator().manual_seed(5)

    torch.manual_seed(8)
    whole = start(random_model(config))
    train_steps(*whole, 2)
    state = {
        "step": 2,
        "optimizer": whole[1].state_dict(),
        "dice": whole[2].get_state(),
        "torch": torch.get_rng_state(),
    }
    save_training(tmp_path / "last", whole[0], tokenizer, state=state, card={}, generation=GENERATION)
    train_steps(*whole, 2)
    resumed = start(load_model(tmp_path / "last")[0])
    found = load_training(tmp_path / "last")
    resumed[1].load_state_dict(found["optimizer"])
    resumed[2].set_state(found["dice"])
    torch.set_rng_state(found["torch"])
    train_steps(*resumed, 2)
    assert same_state(whole[0], resumed[0])
    moments = zip(whole[1].state.values(), resumed[1].state.values(), strict=True)
    assert all(torch.equal(one[key], two[key]) for one, two in moments for key in one)


def checkpoints(run: Path, tokenizer: Tokenizer, *names: str) -> GPT:
    model = random_model(shape(tokenizer))
    for step, name in enumerate(names, 1):
        state = {"step": step, "moments": torch.full((50,), float(step))}
        save_training(run / name, model, tokenizer, state=state, card={"steps": step}, generation=GENERATION)
    return model


@pytest.mark.parametrize("damage", ["cut", "flip", "lost", "no sums", "half sums", "config"])
def test_a_damaged_checkpoint_is_named_and_passed_over(damage: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    checkpoints(tmp_path, tokenizer, "last-000001", "last-000002")
    newest = tmp_path / "last-000002"
    assert newest_checkpoint(tmp_path) == newest
    file = newest / {"no sums": "checksums.json", "half sums": "checksums.json", "config": "config.json"}.get(
        damage, "training_state.safetensors"
    )
    content = file.read_bytes()
    middle = len(content) - 20
    if damage in ("lost", "no sums"):
        file.unlink()
    elif damage in ("cut", "half sums"):
        file.write_bytes(content[:-30])
    else:
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == tmp_path / "last-000001"
    assert file.name in said[0] and "skipped" in said[0] and len(said) == 1
    with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
        load_training(newest)
    assert load_training(tmp_path / "last-000001")["moments"][0] == 1


def test_newest_checkpoint_goes_by_time_and_knows_interrupted_exchanges(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    model = checkpoints(tmp_path, tokenizer, "last-000900", "last-000100")
    assert newest_checkpoint(tmp_path) == tmp_path / "last-000100"  # a run begun anew in the same folder
    checkpoints(tmp_path, tokenizer, "last")
    (tmp_path / "last").rename(tmp_path / "last.old-99999999")  # killed between two renames
    assert newest_checkpoint(tmp_path) == tmp_path / "last.old-99999999"
    assert load_training(tmp_path / "last")["step"] == 1 and same_state(load_model(tmp_path / "last")[0], model)
    (tmp_path / "last.tmp-99999999").mkdir()
    (tmp_path / "best").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "last.old-99999999" and not capsys.readouterr().err
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "last-000100"]
    for folder in ("last", "last-000100"):
        (tmp_path / folder / "checksums.json").write_text("{}")
    assert newest_checkpoint(tmp_path) is None and capsys.readouterr().err.count("skipped") == 2


def test_find_model(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    with pytest.raises(CheckpointError, match=r"python train\.py --preset sample"):
        find_model(root=tmp_path)
    model = random_model(shape(tokenizer))
    save(tmp_path / "models" / "given", model, tokenizer)
    assert find_model(root=tmp_path) == tmp_path / "models" / "given"
    save(tmp_path / "models" / "x", model, tokenizer).rename(tmp_path / "models" / "x.tmp-99999999")  # never finished
    assert find_model(root=tmp_path) == tmp_path / "models" / "given"
    checkpoints(tmp_path / "runs" / "old", tokenizer, "last", "last-000007")
    assert find_model(root=tmp_path) == tmp_path / "runs" / "old" / "last"
    best = save(tmp_path / "runs" / "old" / "best", model, tokenizer)
    newer = save(tmp_path / "runs" / "new" / "best", model, tokenizer)
    for folder, age in ((best, 200), (newer, 100)):
        os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "empty").mkdir()
    assert find_model(root=tmp_path) == newer
    assert find_model(tmp_path / "runs" / "old") == find_model(best) == best
    best.rename(best.with_name("best.old-99999999"))
    assert find_model(best) == find_model(tmp_path / "runs" / "old") == best.with_name("best.old-99999999")
    with pytest.raises(CheckpointError, match=r"--model .*empty: no model there.*python train\.py"):
        find_model(tmp_path / "runs" / "empty")


@pytest.mark.parametrize(
    ("own", "settings", "ended", "expected"),
    [
        (1.5, None, None, "own"),  # better than the model that comes along
        (1.8, None, None, "given"),  # worse
        (None, None, None, "given"),  # not measured
        (1.5, "max_steps = 12", True, "own"),
        (1.5, "max_steps = 12", False, "given"),  # stopped: there is something to resume
        (1.5, "max_steps = 12", None, "given"),  # killed, or still training
        (1.5, "max_steps = 7", None, "own"),  # from before there was a summary.json: at its last step
        (1.5, "max_steps = 0", None, "given"),
    ],
)
def test_the_model_that_writes_when_none_is_named(
    own: float | None, settings: str | None, ended: bool | None, expected: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, run = random_model(shape(tokenizer)), tmp_path / "runs" / "own"
    save(tmp_path / "models" / "given", model, tokenizer, val_bpb=1.6, steps=900)
    for name in ("best", "last"):
        save(run / name, model, tokenizer, val_bpb=own, steps=7)
    if settings:
        (run / "config.toml").write_text(f"[train]\n{settings}\n")
    if ended is not None:
        (run / "summary.json").write_text(json.dumps({"done": ended}))
    found = find_model(root=tmp_path)
    assert found == (run / "best" if expected == "own" else tmp_path / "models" / "given")
    assert described(found, tmp_path) in (
        "runs/own/best (7 steps, 1.500 bits a byte)",
        "models/given (900 steps, 1.600 bits a byte)",
    )
    assert find_model(run) == run / "best"  # whatever it is worth, it can be named


def test_a_run_is_all_there_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    best = save(tmp_path / "runs" / "own" / "best", random_model(shape(tokenizer)), tokenizer)
    (tmp_path / "runs" / "own" / "config.toml").write_text("[train]\nmax_steps = 12\n")
    assert find_model(root=tmp_path) == best
    assert described(best) == str(best)


def test_fetch_model(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(name)
        assert not [pattern for pattern in allow_patterns if "bin" in pattern]
        return str(tmp_path / "cached")

    save(tmp_path / "cached", random_model(shape(tokenizer)), tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch_model("openai-community/gpt2") == fetch_model("gpt2-xl") == tmp_path / "cached"
    here = save(tmp_path / "mine" / "one", random_model(shape(tokenizer)), tokenizer)
    assert fetch_model(here) == here and fetch_model("mine/one") == Path("mine/one") and len(asked) == 2
    for typo in ("runs/smaple", "mine/tow", "some/deep/path", "modle"):  # codespell:ignore
        with pytest.raises(CheckpointError, match="no model there"):
            fetch_model(typo)
    assert asked == ["openai-community/gpt2", "gpt2-xl"]
    (tmp_path / "cached" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="gpt2 on the hub has its weights in a pickle"):
        fetch_model("gpt2")
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="check the name and the network"):
        fetch_model("nobody-at-all/no-such-model")


def test_a_copy_to_share_is_the_same_model_at_half_the_size(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(shape(tokenizer))
    source, copy = save(tmp_path / "model", model, tokenizer), tmp_path / "copy"
    assert checkpoint.main(["--model", str(source), "--out", str(copy)]) == 0
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (source, copy)]
    assert sizes[1] < 0.6 * sizes[0]
    again, theirs = load_model(copy)
    assert theirs.fingerprint == tokenizer.fingerprint and again.wte.weight.dtype == torch.float32
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again(ids), model.eval()(ids), atol=5e-3, rtol=0)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    assert config["torch_dtype"] == "float16"
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_pretrained(copy).float()
    torch.testing.assert_close(half(ids).logits, again(ids), atol=1e-2, rtol=0)


def test_a_number_too_large_for_the_copy_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(shape(tokenizer))
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight[0, 0] = 1e6
    source = save(tmp_path / "model", model, tokenizer)
    with pytest.raises(CheckpointError, match="mlp.c_fc.weight .*bfloat16"):
        checkpoint.copy_model(source, tmp_path / "copy", "float16")
    assert not (tmp_path / "copy").exists()
