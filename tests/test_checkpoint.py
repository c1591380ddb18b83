"""Model folders and checkpoints: the Hugging Face mapping both ways, names on disk, resume, finding the newest."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import gpt2_format
import storage
from checkpoint import (
    AsyncSaver,
    CheckpointError,
    extend_positions,
    fetch_model,
    find_model,
    load_model,
    load_training,
    newest_checkpoint,
    prune_checkpoints,
    read_model_config,
    save_model,
    save_training,
    unwrapped,
)
from config import GPT2_TOKENS, GenerationParams, ModelConfig, load_config, preset_names
from model import GPT, sinusoids
from tokenizer import Tokenizer, char_tokenizer, gpt2_tokenizer, train_bpe

TEXT = "It was the best of times, it was the worst of times; “Pip’s” £5 café."
GENERATION = GenerationParams()
SHAPES = {
    "tied": {},
    "untied": {"tied_head": False},
    "no bias": {"bias": False},
    "sinusoidal": {"positions": "sinusoidal"},
    "padded": {"padding": 7},
    "all at once": {"tied_head": False, "bias": False, "positions": "sinusoidal", "padding": 7},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT] * 4, 280)


def shape(tokenizer: Tokenizer, padding: int = 0, **values: Any) -> ModelConfig:
    small = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_used": tokenizer.vocab_size}
    return ModelConfig(**{**small, "vocab_size": tokenizer.vocab_size + padding, **values})


def random_model(config: ModelConfig, seed: int = 0) -> GPT:
    """Every parameter far from its initial value, biases and LayerNorms too; padding rows zero."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        for matrix in (model.wte.weight, model.lm_head.weight):
            matrix[config.tokens :] = 0
    return model


def some_ids(config: ModelConfig) -> torch.Tensor:
    return torch.randint(config.tokens, (2, config.block_size), generator=torch.Generator().manual_seed(1))


def save(folder: Path, model: Any, tokenizer: Tokenizer, **card: Any) -> Path:
    save_model(folder, model, tokenizer, card=card, generation=GENERATION)
    return folder


def same_state(one: GPT, two: GPT) -> bool:
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def check_both_ways(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """The folder gives transformers the same logits and ids, and gives us the same model bit for bit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save(folder, model, tokenizer)
    ids = some_ids(model.config)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.config.vocab_size == tokenizer.vocab_size and theirs.dtype == torch.float32
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(folder).encode(TEXT) == tokenizer.encode(TEXT)
    again, loaded = load_model(folder)
    assert again.config == model.config == read_model_config(folder) and loaded.fingerprint == tokenizer.fingerprint
    assert same_state(model, again) and torch.equal(again(ids), model(ids)) and not again.training
    if model.config.tied_head:
        assert again.lm_head.weight is again.wte.weight


@pytest.mark.parametrize("values", SHAPES.values(), ids=SHAPES.keys())
def test_transformers_gives_the_same_logits(values: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    check_both_ways(tmp_path / "model", random_model(shape(tokenizer, **values)), tokenizer)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_gives_transformers_the_same_logits(preset: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = load_config(preset).model
    kept = {"n_head": config.n_head, "n_embd": 4 * config.n_head, "bias": config.bias, "positions": config.positions}
    kept |= {
        "tied_head": config.tied_head,
        "dropout": config.dropout,
        "padding": 7 if config.vocab_size > GPT2_TOKENS else 0,
    }
    check_both_ways(tmp_path / preset, random_model(shape(tokenizer, **kept)), tokenizer)


def test_characters_without_an_end_of_text_work_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    chars = char_tokenizer([TEXT], documents=1)
    save(tmp_path / "m", random_model(shape(chars)), chars)
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert config.bos_token_id is None and config.eos_token_id is None
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id is None
    assert AutoTokenizer.from_pretrained(tmp_path / "m").encode(TEXT) == chars.encode(TEXT)


def saved_by_transformers(folder: Path, tokenizer: Tokenizer, how: dict[str, Any], **values: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    small = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": tokenizer.vocab_size}
    ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "initializer_range": 0.5}
    theirs = GPT2LMHeadModel(GPT2Config(**{**small, **ends, **values})).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.to(how.pop("dtype", torch.float32))
    (theirs.transformer if how.pop("bare", False) else theirs).save_pretrained(folder, **how)
    tokenizer.save(folder)
    return theirs.float()


@pytest.mark.parametrize(
    ("how", "values"),
    [
        ({}, {}),
        ({}, {"tie_word_embeddings": False}),
        ({}, {"vocab_size": 300, "n_inner": 64}),
        ({"bare": True}, {"activation_function": "gelu_pytorch_tanh"}),
        ({"dtype": torch.bfloat16}, {}),
        ({"dtype": torch.float16, "max_shard_size": "10KB"}, {}),
    ],
    ids=["tied", "untied", "more rows than ids", "no prefix", "bfloat16", "float16 in pieces"],
)
def test_gpt2_saved_by_transformers_loads(
    how: dict[str, Any], values: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pieces = "max_shard_size" in how
    theirs = saved_by_transformers(tmp_path, tokenizer, dict(how), **values)
    assert pieces == (not (tmp_path / "model.safetensors").exists())
    model, loaded = load_model(tmp_path)
    ids = some_ids(model.config)
    assert model.wte.weight.dtype == torch.float32 and loaded.fingerprint == tokenizer.fingerprint
    torch.testing.assert_close(model(ids), theirs(ids).logits[..., : tokenizer.vocab_size], atol=1e-4, rtol=0)
    assert model.config.tokens == tokenizer.vocab_size and not model.wte.weight[model.config.tokens :].any()


def test_hub_gpt2_folder_has_the_tokenizer_of_our_data(tmp_path: Path) -> None:
    """openai-community/gpt2 names no end of text beside its tokenizer; older folders have vocab.json and merges.txt."""
    ours = gpt2_tokenizer()
    hub, old = tmp_path / "hub", tmp_path / "old"
    saved_by_transformers(hub, ours, {}, n_embd=8, n_layer=1, n_positions=8)
    (hub / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    weights = load_file(hub / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # the causal mask, as in the hub's file
    save_file(weights, hub / "model.safetensors", metadata={"format": "pt"})
    saved_by_transformers(old, ours, {}, n_embd=8, n_layer=1, n_positions=8)
    parts = json.loads((old / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (old / "vocab.json").write_text(json.dumps(parts["vocab"]), encoding="utf-8")
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in parts["merges"])
    (old / "merges.txt").write_text(merges, encoding="utf-8")
    (old / "tokenizer.json").unlink()
    (old / "tokenizer_config.json").unlink()
    for folder in (hub, old):
        _, loaded = load_model(folder)
        assert (loaded.kind, loaded.eot, loaded.fingerprint) == ("gpt2", 50256, ours.fingerprint)


def test_training_by_transformers_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Fine-tuned there, a model without biases has some, and a sinusoidal table has moved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save(tmp_path / "a", random_model(shape(tokenizer, bias=False, positions="sinusoidal")), tokenizer)
    theirs, words = (kind.from_pretrained(tmp_path / "a") for kind in (AutoModelForCausalLM, AutoTokenizer))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.eval().save_pretrained(tmp_path / "b")
    words.save_pretrained(tmp_path / "b")
    model, loaded = load_model(tmp_path / "b")
    ids = some_ids(model.config)
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert model.config.bias and model.config.positions == "learned" and loaded.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu"},
        {"n_inner": 32},
        {"scale_attn_by_inverse_layer_idx": True},
        {"layer_norm_epsilon": 1e-6},
        {"model_type": "llama"},
        {"n_head": 3},
        {"victorian_gpt": {"format": 99}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_models_that_would_compute_something_else_are_refused(
    change: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save(tmp_path / "m", random_model(shape(tokenizer)), tokenizer)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load_model(tmp_path / "m")
    assert next(iter(change)).replace("_", "-") in str(caught.value).replace("_", "-") or "format 99" in str(
        caught.value
    )


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


def test_names_on_disk_are_the_same_for_every_wrapper(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(shape(tokenizer, tied_head=False))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        wrapped = [model, torch.compile(model), parallel, torch.compile(parallel)]
        wrapped.append(torch.nn.parallel.DistributedDataParallel(torch.compile(model)))
        files = []
        for number, one in enumerate(wrapped):
            assert unwrapped(one) is model
            folder = save(tmp_path / f"m{number}", one, tokenizer)
            files.append((folder / "model.safetensors").read_bytes())
            gathered = checkpoint.export_state(model, weights=one.state_dict())
            assert gathered.keys() == load_file(folder / "model.safetensors").keys()
    finally:
        torch.distributed.destroy_process_group()
    assert len(set(files)) == 1
    names = list(load_file(tmp_path / "m0" / "model.safetensors"))
    assert not [name for name in names if "_orig_mod" in name or "module" in name]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.transformer.", ""])
def test_old_files_with_prefixes_load(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(shape(tokenizer))
    path = save(tmp_path / "m", model, tokenizer) / "model.safetensors"
    plain = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file({prefix + name: tensor for name, tensor in plain.items()}, path, metadata={"format": "pt"})
    assert same_state(load_model(tmp_path / "m")[0], model)


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


def test_read_model_config_needs_no_torch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", random_model(shape(tokenizer)), tokenizer)
    code = "import sys, checkpoint; print(checkpoint.read_model_config(sys.argv[1]).n_embd, 'torch' in sys.modules)"
    root = Path(checkpoint.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["16", "False"], done.stderr


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
    assert file.name in said[0] and "passed over" in said[0] and len(said) == 1
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
    assert newest_checkpoint(tmp_path) is None and capsys.readouterr().err.count("passed over") == 2


def test_find_model(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    with pytest.raises(CheckpointError, match=r"python train\.py --preset sample"):
        find_model(root=tmp_path)
    model = random_model(shape(tokenizer))
    save(tmp_path / "models" / "given", model, tokenizer)
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


def test_fetch_model(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(name)
        assert not [pattern for pattern in allow_patterns if "bin" in pattern]
        return str(tmp_path / "cached")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch_model("openai-community/gpt2") == fetch_model("gpt2-xl") == tmp_path / "cached"
    here = save(tmp_path / "mine" / "one", random_model(shape(tokenizer)), tokenizer)
    assert fetch_model(here) == here and fetch_model("mine/one") == Path("mine/one") and len(asked) == 2
    for typo in ("runs/smaple", "mine/tow", "some/deep/path", "modle"):
        with pytest.raises(CheckpointError, match="no model there"):
            fetch_model(typo)
    assert asked == ["openai-community/gpt2", "gpt2-xl"]
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="check the name and the network"):
        fetch_model("nobody-at-all/no-such-model")


def test_extended_positions_keep_the_old_context_exactly(tokenizer: Tokenizer, tmp_path: Path) -> None:
    table = torch.arange(6.0)[:, None] * torch.ones(1, 3)
    assert extend_positions(table, 13)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3]
    assert torch.equal(extend_positions(table, 4), table[:4])
    for positions in ("learned", "sinusoidal"):
        model = random_model(shape(tokenizer, positions=positions))
        folder = save(tmp_path / positions, model, tokenizer)
        longer, _ = load_model(folder, block_size=40, dropout=0.25)
        assert (longer.config.block_size, longer.config.dropout) == (40, 0.25)
        ids = some_ids(model.config)
        assert torch.equal(longer(ids), model(ids))
        assert torch.isfinite(longer(torch.cat((ids, ids[:, :16]), dim=1))).all()
        if positions == "sinusoidal":
            assert torch.equal(longer.positions, sinusoids(40, 16))
        shorter, _ = load_model(folder, block_size=8)
        assert torch.equal(shorter(ids[:, :8]), model(ids[:, :8]))
    half, _ = load_model(tmp_path / "sinusoidal", dtype=torch.bfloat16)
    assert {t.dtype for t in (*half.parameters(), *half.buffers())} == {torch.bfloat16} and half(ids).isfinite().all()


def test_generation_defaults_for_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    model = random_model(shape(tokenizer))
    for temperature in (0.0, 0.8):
        params = GenerationParams(temperature=temperature, top_k=7, top_p=0.5, min_p=0.1, max_tokens=33)
        save_model(tmp_path / "m", model, tokenizer, card={}, generation=params)
        read = GenerationConfig.from_pretrained(tmp_path / "m")
        assert (read.max_new_tokens, read.repetition_penalty) == (33, 1.2)
        assert (read.eos_token_id, read.bos_token_id, read.pad_token_id) == (tokenizer.eot,) * 3
        assert read.do_sample == (temperature > 0)
        if temperature:
            assert (read.temperature, read.top_k, read.top_p, read.min_p) == (0.8, 7, 0.5, 0.1)


def test_model_card_and_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    model = random_model(shape(tokenizer, dropout=0.2))
    facts = {"data": "Nine novels.", "limits": "Short.", "steps": 12000, "val_loss": 3.25, "note": "a | b\nc"}
    folder = save(tmp_path / "m", model, tokenizer, **facts)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name, card.data.language) == ("mit", "transformers", "en")
    assert card.data.pipeline_tag == "text-generation"
    for line in ("| steps | 12,000 |", "| val loss | 3.25 |", "| note | a \\| b c |", "## Data\n\nNine novels."):
        assert line in card.text
    assert f"| parameters | {model.num_parameters():,} |" in card.text and "## Limits\n\nShort." in card.text
    raw = json.loads((folder / "config.json").read_text())
    assert raw["n_ctx"] == raw["n_positions"] == 24 and raw["n_inner"] in (None, 64) and raw["attn_pdrop"] == 0.2
    assert raw["architectures"] == ["GPT2LMHeadModel"] and raw["torch_dtype"] == "float32"
    assert raw["victorian_gpt"]["card"]["val_loss"] == 3.25
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == files | {"README.md"}


def test_saving_in_the_background_writes_what_was_there_at_submit(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, gate, order = random_model(shape(tokenizer)), threading.Event(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state: dict[str, Any] = {"step": 1, "moments": torch.ones(4), "list": [1]}
    card: dict[str, Any] = {"steps": 1}
    write = checkpoint.write_tensors

    def slow(*args: Any, **kwargs: Any) -> str:
        assert gate.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    with AsyncSaver(pending=2) as saver:
        common: dict[str, Any] = {"card": card, "generation": GENERATION}
        saver.submit(tmp_path / "last", model, tokenizer, state=state, then=lambda: order.append("last"), **common)
        saver.submit(tmp_path / "best", model, tokenizer, then=lambda: order.append("best"), **common)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        state["moments"].add_(1)
        state["list"].append(2)
        card["steps"] = 2
        assert not (tmp_path / "last").exists() and not order
        gate.set()
        saver.wait()
        assert order == ["last", "best"]
    found = load_training(tmp_path / "last")
    assert found["moments"].tolist() == [1] * 4 and found["list"] == [1]
    for folder in ("last", "best"):
        loaded = load_model(tmp_path / folder)[0].state_dict()
        assert all(torch.equal(loaded[name], before[name]) for name in before)
        assert json.loads((tmp_path / folder / "config.json").read_text())["victorian_gpt"]["card"]["steps"] == 1


def test_background_errors_are_raised_once_and_saving_goes_on(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(shape(tokenizer))
    saver = AsyncSaver()
    common: dict[str, Any] = {"card": {}, "generation": GENERATION}
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.submit(tmp_path / "best", model, tokenizer, **common)
        with pytest.raises(OSError, match="best could not be saved: No space left on device; nothing was written"):
            saver.wait()
        saver.submit(tmp_path / "best", model, tokenizer, **common)
        with pytest.raises(OSError, match="No space left"):
            saver.submit(tmp_path / "best", model, tokenizer, **common)
    saver.wait()
    saver.submit(tmp_path / "best", model, tokenizer, **common)
    saver.wait()
    assert same_state(load_model(tmp_path / "best")[0], model)
    assert gpt2_format.clean_name("module._orig_mod.h.0.ln_1.weight") == "h.0.ln_1.weight"
