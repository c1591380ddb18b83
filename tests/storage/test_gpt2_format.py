"""GPT-2 folders: the same logits and ids in transformers, both ways, for every shape; names, config, card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import CheckpointError, extend_positions, load_model, read_model_config, save_model, unwrapped
from config import GPT2_TOKENS, GenerationParams, load_config, preset_names
from model import GPT, sinusoids
from storage.gpt2_format import folder_defaults
from support.helpers import ROOT
from support.tiny_models import (
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
from tokenizer import Tokenizer, char_tokenizer, gpt2_tokenizer, with_styles


@pytest.fixture
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


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


def test_read_model_config_needs_no_torch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", random_model(shape(tokenizer)), tokenizer)
    code = "import sys, checkpoint; print(checkpoint.read_model_config(sys.argv[1]).n_embd, 'torch' in sys.modules)"
    root = Path(checkpoint.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["16", "False"], done.stderr


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
        assert (read.max_new_tokens, read.max_length, read.repetition_penalty) == (None, 24, 1.2)
        assert folder_defaults(tmp_path / "m")["max_tokens"] == 33
        assert (read.eos_token_id, read.bos_token_id, read.pad_token_id) == (tokenizer.eot,) * 3
        assert read.do_sample == (temperature > 0)
        if temperature:
            assert (read.temperature, read.top_k, read.top_p, read.min_p) == (0.8, 7, 0.5, 0.1)


def check_pipeline(folder: Path, prompts: tuple[str, ...]) -> None:
    """transformers' pipeline, and generate() on what its tokenizer makes, both without arguments, stay in the context."""
    from transformers import pipeline

    write = pipeline("text-generation", str(folder))
    for prompt in prompts:
        torch.manual_seed(0)
        (written,) = write(prompt)
        assert written["generated_text"].startswith(prompt)
        ids = write.tokenizer(prompt, return_tensors="pt")
        assert ids["input_ids"].size(1) < write.model.generate(**ids).size(1) <= write.model.config.n_positions


@pytest.mark.parametrize("preset", preset_names())
def test_a_pipeline_without_arguments_writes_to_the_end_of_the_context(
    preset: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = load_config(preset)
    kept = config.model.model_dump(include={"bias", "positions", "tied_head", "dropout"})
    context = min(96, config.model.block_size)  # beyond it transformers raises IndexError; its length costs time only
    model = random_model(shape(tokenizer, **kept, block_size=context))
    save_model(tmp_path / "m", model, tokenizer, card={}, generation=config.generation)
    check_pipeline(tmp_path / "m", ("It was", TEXT))


@pytest.mark.parametrize("kind", ["gpt2", "char", "char with an end", "char with a style", "bpe with styles"])
def test_a_pipeline_without_arguments_takes_every_tokenizer(kind: str, tmp_path: Path) -> None:
    made = {
        "gpt2": gpt2_tokenizer,
        "char": lambda: char_tokenizer([TEXT], documents=1),
        "char with an end": lambda: char_tokenizer([TEXT], documents=2),
        "char with a style": lambda: with_styles(char_tokenizer([TEXT], documents=2), ["pip"]),
        "bpe with styles": lambda: with_styles(tiny_tokenizer(), ["pip", "joe"]),
    }
    tokenizer = made[kind]()
    save_model(
        tmp_path / "m", random_model(shape(tokenizer)), tokenizer, card={}, generation=GenerationParams(temperature=0.0)
    )
    check_pipeline(tmp_path / "m", ("It was", "times"))


def test_the_shipped_folder_writes_in_a_pipeline_without_arguments() -> None:
    check_pipeline(ROOT / "models" / "victorian-mini", ("The old house", "The old house stood by the river. " * 8))
    assert folder_defaults(ROOT / "models" / "victorian-mini")["max_tokens"] == 200


def test_model_card_and_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    model = random_model(shape(tokenizer, dropout=0.2))
    facts = {"data": "Nine novels.", "limits": "Short.", "steps": 12000, "val_loss": 3.25, "note": "a | b\nc"}
    folder = save(tmp_path / "novels" / "best", model, tokenizer, **facts)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name, card.data.language) == ("mit", "transformers", "en")
    assert card.data.pipeline_tag == "text-generation"
    for line in (
        "# novels\n",
        "| steps | 12,000 |",
        "| val loss | 3.25 |",
        "| note | a \\| b c |",
        "## Data\n\nNine novels.",
    ):
        assert line in card.text
    assert f"| parameters | {model.num_parameters():,} |" in card.text and "## Limits\n\nShort." in card.text
    raw = json.loads((folder / "config.json").read_text())
    assert raw["n_ctx"] == raw["n_positions"] == 24 and raw["n_inner"] in (None, 64) and raw["attn_pdrop"] == 0.2
    assert raw["architectures"] == ["GPT2LMHeadModel"] and raw["torch_dtype"] == "float32"
    assert raw["victorian_gpt"]["card"]["val_loss"] == 3.25
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == files | {"README.md"}
