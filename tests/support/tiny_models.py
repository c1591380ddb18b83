"""Tiny models with random weights, saved by this project or by transformers, for the tests of files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from checkpoint import save_model
from config import GenerationParams, ModelConfig
from model import GPT
from tokenizer import Tokenizer, train_bpe

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


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Tokenizer:
    """A trained vocabulary of 280 ids."""
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
