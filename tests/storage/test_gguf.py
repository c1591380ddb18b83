"""GGUF files: every weight, the vocabulary and the settings are in them as llama.cpp wants them; whole or not at all.

What llama.cpp makes of them is tested in test_interop.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, Keys, quants

from config import SETTINGS, GenerationParams
from model import sinusoids
from sampling import FILTERS
from storage.atomic import CheckpointError
from storage.gguf import SAMPLER_OF, SAMPLERS, gguf_tensors, packed, vocabulary, write_gguf
from support.exports import KINDS, exported
from support.tiny_models import TEXT, random_model, shape
from tokenizer import char_tokenizer

UNKEYED = {
    "typical_p": 0.5,
    "top_n_sigma": 1.5,
    "dry_multiplier": 0.8,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
}
PARAMS = GenerationParams(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1)


def written(path: Path, kind: str, **how: Any) -> GGUFReader:
    model, tokenizer = exported(kind)
    write_gguf(path, model, tokenizer, name="mine", generation=PARAMS, **how)
    return GGUFReader(path)


def value_of(path: Path, key: str) -> Any:
    return value(GGUFReader(path), key)


def value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_are_the_models(kind: str, tmp_path: Path) -> None:
    model, _ = exported(kind)
    config, state = model.config, model.state_dict()
    found = {tensor.name: tensor.data for tensor in written(tmp_path / "m.gguf", kind, dtype="f32").tensors}
    rows = config.tokens + (kind == "characters")  # one for the end of text that this vocabulary lacks
    assert found["token_embd.weight"].shape == (rows, config.n_embd)
    assert np.array_equal(found["token_embd.weight"][: config.tokens], state["wte.weight"][: config.tokens])
    assert not found["token_embd.weight"][config.tokens :].any()
    assert ("output.weight" in found) == (not config.tied_head)
    positions = sinusoids(128, 64) if config.positions == "sinusoidal" else state["wpe.weight"]
    assert np.array_equal(found["position_embd.weight"], positions)
    for layer in range(config.n_layer):
        for ours, theirs in (("attn.c_attn", "attn_qkv"), ("mlp.c_proj", "ffn_down"), ("ln_2", "ffn_norm")):
            weight = state[f"h.{layer}.{ours}.weight"]
            bias = state.get(f"h.{layer}.{ours}.bias", torch.zeros(len(weight)))
            assert np.array_equal(found[f"blk.{layer}.{theirs}.weight"], weight)
            assert np.array_equal(found[f"blk.{layer}.{theirs}.bias"], bias)
    assert len(found) == 2 + 2 + 12 * config.n_layer + (not config.tied_head)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_has_every_id(kind: str, tmp_path: Path) -> None:
    _, tokenizer = exported(kind)
    reader = written(tmp_path / "m.gguf", kind)
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    end = tokenizer.vocab_size if tokenizer.eot is None else tokenizer.eot
    assert len(tokens) == len(types) == len(set(tokens)) == max(tokenizer.vocab_size, end + 1)
    assert tokens[end] == "<|endoftext|>" and all(tokens[id] == name for name, id in tokenizer.controls.items())
    assert [id for id, type in enumerate(types) if type == 3] == sorted({end, *tokenizer.controls.values()})
    for role in ("bos", "eos", "eot"):
        assert value(reader, f"tokenizer.ggml.{role}_token_id") == end
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2" and value(reader, "tokenizer.ggml.add_bos_token") is False
    never = sorted({*tokenizer.controls.values()} | ({end} if tokenizer.eot is None else set()))
    assert ("tokenizer.ggml.suppress_tokens" in reader.fields) == bool(never)
    if never:
        assert value(reader, "tokenizer.ggml.suppress_tokens") == never
    assert ("general.description" in reader.fields) == (tokenizer.kind == "char")


def test_the_settings_and_the_true_context_go_with_it(tmp_path: Path) -> None:
    reader = written(tmp_path / "m.gguf", "own vocabulary", description="Of novels.", licence="mit")
    expected = {"temp": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "penalty_repeat": 1.1, "penalty_last_n": -1}
    expected |= {"xtc_probability": 0.0, "xtc_threshold": 0.1}
    for name, wanted in expected.items():
        assert value(reader, f"general.sampling.{name}") == pytest.approx(wanted)
    assert value(reader, "general.sampling.sequence") == SAMPLERS
    assert value(reader, "gpt2.context_length") == 128 and value(reader, "general.architecture") == "gpt2"
    assert (value(reader, "general.name"), value(reader, "general.license")) == ("mine", "mit")
    assert value(reader, "general.description") == "Of novels."


def test_no_setting_is_forgotten(tmp_path: Path) -> None:
    """A setting that shapes the text has a key of its own, or the description names it where it is on."""
    off = {"dry_base", "dry_allowed_length", "dry_sequence_breakers"}  # say nothing while DRY is off
    keyed = {name for name, setting in SETTINGS.items() if setting.gguf}
    assert {name for name, setting in SETTINGS.items() if setting.in_presets} - keyed - off == set(UNKEYED)
    assert set(SAMPLER_OF) == {name for name, _ in FILTERS if SETTINGS[name].in_presets}
    assert SAMPLERS == "penalties;dry;top_n_sigma;temperature;top_k;top_p;min_p;typ_p;xtc"
    known = {key.rpartition(".")[2] for name, key in vars(Keys.General).items() if name.startswith("SAMPLING_")}
    assert {SETTINGS[name].gguf for name in keyed} <= known
    model, tokenizer = exported("own vocabulary")
    for name, value in UNKEYED.items():
        write_gguf(tmp_path / "m.gguf", model, tokenizer, name="m", generation=GenerationParams(**{name: value}))
        told = value_of(tmp_path / "m.gguf", "general.description")
        assert told == f"Written best with {name} {value}, which this file cannot set."


def test_merges_of_characters_join_their_bytes_from_the_left() -> None:
    words = vocabulary(char_tokenizer(["aé—👩"], documents=2))
    assert words.merges == ["Ã ©", "â Ģ", "âĢ Ķ", "ð Ł", "ðŁ ĳ", "ðŁĳ ©"]
    assert words.tokens == ["a", "Ã©", "âĢĶ", "ðŁĳ©", "<|endoftext|>"]


def test_an_alphabet_of_single_bytes_has_a_merge_that_makes_no_token() -> None:
    words = vocabulary(char_tokenizer(["It was\n"], documents=1))
    (merge,) = words.merges
    assert merge.replace(" ", "") not in words.tokens and len(merge.split(" ")) == 2


def test_number_formats(tmp_path: Path) -> None:
    """f16 rounds, q8_0 quantizes rows of 32s and leaves others float16; vectors and positions stay as they are."""
    odd = random_model(shape(char_tokenizer([TEXT], documents=2), n_embd=48, n_head=2))
    tensors = dict(gguf_tensors(odd))
    for name, values in tensors.items():
        kept = {dtype: packed(name, values, dtype) for dtype in ("f32", "f16", "q8_0")}
        assert np.array_equal(kept["f32"][0], values) and kept["f32"][1].name == "F32"
        if values.ndim == 1 or name.startswith("position"):
            assert {form.name for _, form in kept.values()} == {"F32"}
            continue
        assert np.array_equal(kept["f16"][0], values.astype(np.float16)) and kept["f16"][1].name == "F16"
        numbers, form = kept["q8_0"]
        assert form.name == ("Q8_0" if values.shape[1] % 32 == 0 else "F16")
        if form.name == "Q8_0":
            assert np.abs(quants.dequantize(numbers, form) - values).max() <= np.abs(values).max() / 127
    assert {packed(name, values, "q8_0")[1].name for name, values in tensors.items()} == {"F32", "F16", "Q8_0"}
    with pytest.raises(CheckpointError, match=r"token_embd.* --type f32"):
        packed("token_embd.weight", np.full((2, 32), 7e4, np.float32), "f16")


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    model, tokenizer = exported("own vocabulary")
    place = tmp_path / "m.gguf"
    place.write_bytes(b"old")
    huge = random_model(model.config)
    huge.h[0].mlp.c_fc.weight.data[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="--type f32"):
        write_gguf(place, huge, tokenizer, name="mine", generation=PARAMS)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"] and place.read_bytes() == b"old"
