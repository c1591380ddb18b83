"""The five kinds of model that leave the house in different ways, tiny, with random weights."""

from __future__ import annotations

from functools import lru_cache

from model import GPT
from support.helpers import ROOT
from support.tiny_models import TEXT, random_model, shape, tiny_tokenizer
from tokenizer import Tokenizer, char_tokenizer, gpt2_tokenizer, with_styles

KINDS = ("own vocabulary", "gpt2 padded", "gpt2 styles", "characters", "characters with a style")
# White space of every kind, contractions, digits, letters that take two to four bytes, a split emoji, mixed scripts.
ODD = "It's we'll  THEY'VE\t 12³ ½ naïve œuvre\u00a0—\u2028\n\n\n x\r\n ‘Très’ 東京 \u0301é 👩‍🚀\ufeff \x85 _a_ <|endoftext|> 'S  "


def story() -> str:
    """Some 20,000 characters of the repository's own prose."""
    return (ROOT / "data" / "sample" / "the_old_house_at_evenholme.txt").read_text(encoding="utf-8")


@lru_cache
def exported(kind: str) -> tuple[GPT, Tokenizer]:
    """A model of one of the KINDS; none but the plain one has only what GPT-2 has."""
    values: dict[str, object] = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 128}
    if kind == "own vocabulary":
        tokenizer = tiny_tokenizer()
    elif kind == "gpt2 padded":
        tokenizer = gpt2_tokenizer()
        values["padding"] = 47
    elif kind == "gpt2 styles":
        tokenizer = with_styles(gpt2_tokenizer(), ["pip", "joe"])
        values |= {"tied_head": False, "positions": "sinusoidal", "bias": False}
    elif kind == "characters":
        tokenizer = char_tokenizer([TEXT, story()], documents=1)
        values["tied_head"] = False
    else:
        tokenizer = with_styles(char_tokenizer([TEXT, story()], documents=2), ["pip"])
    return random_model(shape(tokenizer, **values), seed=3), tokenizer  # type: ignore[arg-type]
