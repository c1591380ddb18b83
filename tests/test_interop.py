"""Exported models in other programs: each writes the same text as generate.py.

transformers is compared in test_gpt2_format.py, the web page in tests/web/test_offline_page.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import export
from checkpoint import load_model
from config import GenerationParams
from inference.writing import generate
from storage.gguf import SAMPLERS, write_gguf
from support.exports import KINDS, ODD, exported, story
from support.helpers import ROOT
from support.llama import Llama
from support.tiny_models import TEXT, random_model, save, shape, tiny_tokenizer
from tokenizer import train_bpe

PROMPT = "It was the best"
GREEDY = GenerationParams(temperature=0, repetition_penalty=1.0, max_tokens=24)


@pytest.fixture(scope="module", params=["tied", "no bias"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never writes end-of-text, because its row of the embedding is far from every other."""
    tokenizer = train_bpe([TEXT] * 4, 280) if request.param == "tied" else tiny_tokenizer()
    config = shape(tokenizer, n_layer=2, n_head=2, n_embd=64, block_size=64, bias=request.param == "tied")
    return save(tmp_path_factory.mktemp("model"), random_model(config, seed=3), tokenizer)


def ours(folder: Path) -> tuple[list[int], str]:
    model, tokenizer = load_model(folder)
    (result,) = generate(model, tokenizer, PROMPT, GREEDY)
    return tokenizer.encode(PROMPT), result.text


def test_ctranslate2_writes_the_same(folder: Path, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(tmp_path / "made"))
    prompt, text = ours(folder)
    _, tokenizer = load_model(folder)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    generator = ctranslate2.Generator(str(tmp_path / "made"))
    found = generator.generate_batch(
        [theirs.convert_ids_to_tokens(prompt)], max_length=24, sampling_topk=1, include_prompt_in_result=False
    )
    assert text and tokenizer.decode(found[0].sequences_ids[0]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_writes_the_same(kind: str, tmp_path: Path) -> None:
    """From a GGUF file: the same ids, the same 80 most likely tokens, the same probabilities of all tokens."""
    model, tokenizer = exported(kind)
    params = GREEDY.model_copy(update={"max_tokens": 80})
    write_gguf(tmp_path / "m.gguf", model, tokenizer, name="mine", generation=params, dtype="f32")
    llama = Llama(tmp_path / "m.gguf")
    text = story() + ODD * (tokenizer.kind != "char")
    assert llama.ids(text) == tokenizer.encode(text)

    prompt = tokenizer.encode(PROMPT)
    ids = llama.greedy(PROMPT, 80)["tokens"]
    assert len(ids) == 80 or ids[-1:] == [tokenizer.eot]
    logits = model(torch.tensor([prompt + ids]))[0]
    logits[:, [*tokenizer.controls.values()]] = float("-inf")
    best, taken = logits[len(prompt) - 1 : -1].max(1).values, logits[range(len(prompt) - 1, len(prompt + ids) - 1), ids]
    assert (best - taken).max() < 0.02  # llama.cpp rounds inside its GELU: of two as likely it may take the other

    (first,) = llama.greedy(PROMPT, 1, probabilities=len(logits[0]) + 1)["completion_probabilities"]
    shown = {row["id"]: row["logprob"] for row in first["top_logprobs"]}
    known = [id for id in range(len(logits[0])) if id in shown and id not in tokenizer.controls.values()]
    assert len(known) > 40
    found = torch.tensor([shown[id] for id in known])
    ours = logits[len(prompt) - 1][known]
    torch.testing.assert_close(found - found[0], ours - ours[0], atol=0.03, rtol=0)


def test_llama_cpp_writes_what_the_shipped_model_writes(tmp_path: Path) -> None:
    folder = ROOT / "models" / "victorian-mini"
    assert export.main(["--model", str(folder), "--to", "gguf", "--out", str(tmp_path / "m.gguf")]) == 0
    llama, (model, tokenizer) = Llama(tmp_path / "m.gguf"), load_model(folder)
    params = GREEDY.model_copy(update={"max_tokens": 80})
    for prompt in ("The old house stood", "It was a dark night, and", "“Mr. Pip,” said she"):
        (result,) = generate(model, tokenizer, prompt, params)
        assert llama.greedy(prompt, 80)["content"] == result.text


def test_llama_cpp_takes_over_the_settings_and_writes_no_control_token(tmp_path: Path) -> None:
    """A style's id, made the most likely by hand, is not written; in front of a prompt it is read."""
    model, tokenizer = exported("characters with a style")
    (control,) = tokenizer.controls.values()
    params = GenerationParams(temperature=0.75, top_k=33, top_p=0.5, min_p=0.0, repetition_penalty=1.25)
    write_gguf(tmp_path / "m.gguf", model, tokenizer, name="mine", generation=params, dtype="f32")
    llama = Llama(tmp_path / "m.gguf")
    held = llama.ask("/props")["default_generation_settings"]
    assert held["n_ctx"] == model.config.block_size
    names = {"temperature": 0.75, "top_k": 33, "top_p": 0.5, "min_p": 0.0, "repeat_penalty": 1.25, "repeat_last_n": -1}
    assert {name: round(held["params"][name], 6) for name in names} == names
    assert held["params"]["samplers"] == SAMPLERS.split(";")
    pushed = llama.ask(
        "/completion", prompt="It was", n_predict=8, logit_bias=[[control, 100.0]], return_tokens=True, temperature=1.0
    )
    assert pushed["tokens"] and control not in pushed["tokens"]
    (result,) = generate(model, tokenizer, PROMPT, GREEDY.model_copy(update={"style": "pip"}))
    assert llama.greedy(f"<|pip|>{PROMPT}", 24)["tokens"] == result.ids
