"""A model as one GGUF file, which llama.cpp and the programs built on it run.

    >>> write_gguf("mine.gguf", model, tokenizer, name="mine", generation=GenerationParams())

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, written with the package `gguf`. The vocabulary goes in
as byte-level BPE with GPT-2's splitting of words, the only kind of ours that llama.cpp has: a vocabulary of characters
becomes one whose merges join the bytes of each character.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from config import SETTINGS, GenerationParams
from sampling import FILTERS
from storage.atomic import CheckpointError, atomic_file
from tokenizer import END_OF_TEXT, BytePairTokenizer, CharTokenizer, Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from model import GPT

Dtype = Literal["f16", "q8_0", "f32"]
SUPPRESS = "tokenizer.ggml.suppress_tokens"  # ids never written; llama.cpp honours it, the package has no name for it
# llama.cpp's samplers that do what our filters do. Its top_k is part of our temperature's filter and comes behind it.
SAMPLER_OF = {
    "repetition_penalty": "penalties",
    "frequency_penalty": "penalties",
    "presence_penalty": "penalties",
    "dry_multiplier": "dry",
    "top_n_sigma": "top_n_sigma",
    "temperature": "temperature;top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typ_p",
    "xtc_probability": "xtc",
}
APART = ("logit_bias",)  # belongs to one request, there too
SAMPLERS = ";".join(
    dict.fromkeys(SAMPLER_OF[name] for name, _ in FILTERS if name not in APART)
)  # its own order differs
NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OTHERS = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}


@dataclass
class Vocabulary:
    """A tokenizer in GGUF's terms: tokens in GPT-2's printable stand-ins for bytes, and merges as `first second`."""

    tokens: list[str]
    merges: list[str]
    end: int
    controls: list[int]  # of styles: they are read and never written
    invented: bool = False  # whether `end` is an id that the model does not have


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer as byte-level BPE.

    Where it has no end of text one is invented: llama.cpp takes id 11 for the end of a vocabulary that names none. An
    alphabet of single bytes gets a merge that makes no token, because llama.cpp loads no BPE without merges.
    """
    tokens = [""] * tokenizer.vocab_size
    if isinstance(tokenizer, BytePairTokenizer):
        for text, number in tokenizer.vocab.items():
            tokens[number] = text
        merges = [f"{first} {second}" for first, second in tokenizer.merges]
    elif isinstance(tokenizer, CharTokenizer):
        tokens[: len(tokenizer.alphabet)] = map(_stand_ins, tokenizer.alphabet)
        pairs = ((text[:end], text[end]) for text in tokens for end in range(1, len(text)))
        merges = list(dict.fromkeys(f"{first} {second}" for first, second in pairs)) or [_stand_ins("\0") + " Ā"]
    else:
        raise CheckpointError(f"a {tokenizer.kind} vocabulary cannot be written as GGUF")
    end = tokenizer.eot
    if end is None:
        tokens.append("")
        end = len(tokens) - 1
    for name, number in {END_OF_TEXT: end, **tokenizer.controls}.items():
        tokens[number] = name
    for number, text in enumerate(tokens):
        tokens[number] = text or f"<|unused-{number}|>"
    return Vocabulary(tokens, merges, end, sorted(tokenizer.controls.values()), tokenizer.eot is None)


def _stand_ins(character: str) -> str:
    """The bytes of a character in GPT-2's printable stand-ins."""
    from tokenizers.pre_tokenizers import ByteLevel

    level = ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(part for part, _ in level.pre_tokenize_str(character))


def gguf_name(name: str) -> str:
    """A tensor's name there: `h.0.attn.c_attn.weight` -> `blk.0.attn_qkv.weight`."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("h."):
        return f"{OTHERS[stem]}.{kind}"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def gguf_tensors(model: GPT, extra_rows: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """(name there, float32 array) of every tensor: no rows that only pad, all biases, the position table written out.

    Matrices lie as in nn.Linear, [out, in]. extra_rows: rows of zeros behind the embedding's (and an untied head's).
    """
    import torch

    from model import sinusoids

    config = model.config
    state = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    if config.positions == "sinusoidal":
        state["wpe.weight"] = sinusoids(config.block_size, config.n_embd)
    for name, tensor in state.items():
        if name in ("wte.weight", "lm_head.weight"):
            tensor = torch.cat((tensor[: config.tokens], tensor.new_zeros(extra_rows, config.n_embd)))
        yield gguf_name(name), tensor.contiguous().numpy()
        if not config.bias and name.startswith(("h.", "ln_f.")):
            yield gguf_name(name.removesuffix("weight") + "bias"), np.zeros(len(tensor), np.float32)


def packed(name: str, values: np.ndarray, dtype: Dtype) -> tuple[np.ndarray, Any]:
    """(the numbers as they are written, the package's name for their type) of one float32 tensor.

    Vectors and positions stay float32: they are small, and llama.cpp adds them as such. q8_0 has blocks of 32 numbers:
    rows that do not divide into them are float16. Raises CheckpointError where a number is too large for float16.
    """
    from gguf import GGMLQuantizationType, quants

    if dtype == "f32" or values.ndim == 1 or name.startswith("position_embd"):
        return values, GGMLQuantizationType.F32
    if dtype == "q8_0" and values.shape[-1] % 32 == 0:
        return quants.quantize(values, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise CheckpointError(f"{name} holds numbers beyond float16's largest: take --type f32")
    return half, GGMLQuantizationType.F16


def write_gguf(
    path: Path | str,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    name: str,
    generation: GenerationParams,
    description: str = "",
    licence: str = "",
    dtype: Dtype = "f16",
) -> None:
    """Write the model as one GGUF file atomically, replacing an older one of that name.

    generation: what the programs sample with unless told otherwise. Raises CheckpointError, and OSError for the disk.
    """
    import gguf

    words, config = vocabulary(tokenizer), model.config
    file_type = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
    with atomic_file(path) as draft:
        writer = gguf.GGUFWriter(draft, "gpt2")
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        if told := " ".join(part for part in (description, notice(tokenizer), unsaid(generation)) if part):
            writer.add_description(told)
        if licence:
            writer.add_license(licence)
        writer.add_languages(["en"])
        writer.add_file_type(file_type.get(dtype, gguf.LlamaFileType.MOSTLY_Q8_0))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(config.block_size)  # a longer one loads too, and writes badly beyond what was trained
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(1e-5)
        _add_vocabulary(writer, words)
        _add_sampling(writer, generation)
        for label, values in gguf_tensors(model, extra_rows=int(words.invented)):
            numbers, form = packed(label, values, dtype)
            writer.add_tensor(label, numbers, raw_dtype=form)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def notice(tokenizer: Tokenizer) -> str:
    """What a reader of the file's description has to know of its vocabulary; empty for a byte-level BPE."""
    if tokenizer.kind != "char":
        return ""
    return "Its vocabulary is single characters: llama.cpp drops those that it does not know without a message."


def unsaid(generation: GenerationParams) -> str:
    """What the file's description says of settings for which GGUF has no key; empty where none of them is on."""
    found = [
        f"{name} {getattr(generation, name)}"
        for name, setting in SETTINGS.items()
        if setting.in_presets
        and not setting.gguf
        and setting.off is not None
        and getattr(generation, name) != setting.off
    ]
    return f"Written best with {', '.join(found)}, which this file cannot set." if found else ""


def _add_vocabulary(writer: GGUFWriter, words: Vocabulary) -> None:
    import gguf

    unwritten = [*words.controls, *([words.end] if words.invented else [])]
    kinds = [int(gguf.TokenType.NORMAL)] * len(words.tokens)
    for number in (words.end, *words.controls):
        kinds[number] = int(gguf.TokenType.CONTROL)
    for number, token in enumerate(words.tokens):
        if token == f"<|unused-{number}|>":
            kinds[number] = int(gguf.TokenType.UNUSED)
            unwritten.append(number)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words.tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(words.merges)
    writer.add_bos_token_id(words.end)
    writer.add_eos_token_id(words.end)
    writer.add_eot_token_id(words.end)
    writer.add_pad_token_id(words.end)
    writer.add_unk_token_id(words.end)
    writer.add_add_bos_token(False)
    if unwritten:
        writer.add_array(SUPPRESS, sorted(unwritten))


def _add_sampling(writer: GGUFWriter, generation: GenerationParams) -> None:
    """All settings that have a key, those that are off too: llama.cpp has other defaults (min_p 0.05)."""
    writer.add_sampling_sequence(SAMPLERS)
    for name, setting in SETTINGS.items():
        if setting.gguf:
            value = getattr(generation, name)
            if name == "penalty_last_n":
                value = value or -1  # over all that is in view, as ours; 0 is none there
            add = writer.add_int32 if isinstance(value, int) else writer.add_float32
            add(f"general.sampling.{setting.gguf}", value)
