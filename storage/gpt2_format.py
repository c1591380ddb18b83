"""GPT-2 folders as `transformers` reads and writes them: tensor names and layout, config.json, tokenizer, model card.

    >>> tensors = export_state(model)                      # what GPT2LMHeadModel calls and how it lays out each weight
    >>> model.load_state_dict(import_state(tensors, model.config))
    >>> config = read_model_config("runs/sample/best")     # from config.json alone, without loading torch

Differences that the mapping bridges: GPT-2's Conv1D keeps [in, out] where nn.Linear keeps [out, in]; it always has biases
and a learned position table; it has no rows that only pad the vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import FINISH_SENTENCE, SETTINGS, ConfigError, GenerationParams, ModelConfig, build
from storage.atomic import FORMAT, CheckpointError, present, read_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from model import GPT
    from tokenizer import Tokenizer

OURS = "victorian_gpt"  # our key in config.json and generation_config.json
WRAPPERS = ("_orig_mod", "module")  # what torch.compile and DDP put into names
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # [in, out] in GPT-2
HEADS = ("wte.weight", "lm_head.weight")  # one row for each id
LIMITS = (
    "It continues a text in the manner of what it was trained on, with the errors and the opinions of that. "
    "It states inventions as facts, follows no instructions, and sees no further back than its context."
)


def unwrapped(model: Any) -> GPT:
    """The GPT inside torch.compile's and DistributedDataParallel's wrappers, in any order."""
    while inner := [model._modules[name] for name in WRAPPERS if name in model._modules]:
        model = inner[0]
    found: GPT = model
    return found


def clean_name(name: str) -> str:
    """A tensor's name without the wrappers' parts: `module._orig_mod.h.0.ln_1.weight` -> `h.0.ln_1.weight`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def export_state(model: Any, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights as GPT2LMHeadModel names and lays them out: float32, where they lie, views rather than copies.

    The embedding (and an untied head) is cut to the ids the tokenizer has, missing biases become zeros and the
    sinusoidal table becomes `wpe`. `weights` stands for `model.state_dict()` where that was gathered before (FSDP).
    """
    import torch

    from model import sinusoids

    core = unwrapped(model)
    config, given = core.config, core.state_dict() if weights is None else weights
    state = {clean_name(name): tensor.detach().float() for name, tensor in given.items()}
    if config.positions == "sinusoidal":
        state["wpe.weight"] = sinusoids(config.block_size, config.n_embd)
    exported = {}
    for name, tensor in state.items():
        full = name if name == "lm_head.weight" else f"transformer.{name}"
        kept = tensor[: config.tokens] if name in HEADS else tensor
        exported[full] = kept.t() if name.endswith(CONV1D) else kept
        if not config.bias and name.startswith(("h.", "ln_f.")):
            exported[full.removesuffix("weight") + "bias"] = torch.zeros(tensor.size(0), device=tensor.device)
    return exported


def import_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our `state_dict` from GPT-2's names and layout; every tensor is a copy of its own, in the dtype it came in.

    With or without the prefix `transformer.` and those of wrappers. Rows between the tokenizer's ids and
    `config.vocab_size` become zeros. Raises CheckpointError with every missing, extra or misshapen tensor.
    """
    import torch

    from model import GPT

    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    given = {clean_name(name).removeprefix("transformer."): tensor for name, tensor in state.items()}
    made, wrong = {}, []
    for name, shape in shapes.items():
        tensor = given.pop(name, None)
        if tensor is None or not tensor.is_floating_point():
            wrong.append(f"{name} is {'missing' if tensor is None else f'{tensor.dtype}, not floating point'}")
            continue
        if name.endswith(CONV1D) and tensor.dim() == 2:
            tensor = tensor.t()
        elif name in HEADS and tensor[: config.tokens].shape == (config.tokens, config.n_embd):
            used, tensor = tensor[: config.tokens], tensor.new_zeros(shape)
            tensor[: config.tokens] = used
        if tuple(tensor.shape) != shape:
            wrong.append(f"{name} has shape {list(tensor.shape)} where config.json asks for {list(shape)}")
        made[name] = tensor if name in HEADS else tensor.clone(memory_format=torch.contiguous_format)
    for name in given:
        derived = (
            name.endswith((".attn.bias", ".attn.masked_bias"))  # old files carry the causal mask
            or (name == "lm_head.weight" and config.tied_head)
            or (name == "wpe.weight" and config.positions == "sinusoidal")
            or (name.endswith(".bias") and not config.bias)
        )
        if not derived:
            wrong.append(f"{name} has no place in a GPT-2 with this config.json")
    if wrong:
        more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise CheckpointError(f"the weights do not fit: {'; '.join(wrong[:6])}{more}")
    return made


def extend_positions(table: Tensor, rows: int) -> Tensor:
    """A learned position table [T, C] for `rows` positions; fewer cut it, and the first T stay exactly as they are.

    New rows repeat the second half of the table, again and again: neighbours keep the distances that the model has
    learned, as in Longformer's tiled table (Beltagy et al. 2020, section 5), but the first rows, which mean that a
    text begins, do not come again. The model still has to be trained on longer windows.
    """
    import torch

    T = table.size(0)
    half = T // 2
    index = [at if at < T else half + (at - T) % (T - half) for at in range(rows)]
    return table[torch.tensor(index, device=table.device)]


def gpt2_config(config: ModelConfig, tokenizer: Tokenizer, card: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json`: GPT2LMHeadModel's fields, and ours under one key of its own."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.tokens,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # llama.cpp's converter asks for it
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.eot,  # null, not absent: transformers would fill in 50256
        "eos_token_id": tokenizer.eot,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": "float32",
        OURS: {
            "format": FORMAT,
            "model": config.model_dump(),
            "tokenizer": {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint},
            "card": dict(card),
        },
    }


def generation_config(
    params: GenerationParams, eot: int | None, controls: Iterable[int] = (), *, context: int
) -> dict[str, Any]:
    """`generation_config.json`: how transformers and vLLM sample from this model unless told otherwise.

    There a text ends where the `context` does: transformers raises IndexError at the first position beyond it, and
    `max_new_tokens` takes no account of the prompt. Our own `max_tokens`, which may go beyond, is under our own key.
    A filter that is off, as it is by default, is left out, and at temperature 0 all that have no effect there.
    transformers never writes the `controls`. vLLM does not look at `suppress_tokens`; it leaves them out of the text as
    special tokens, and training makes them improbable.
    """
    values: dict[str, Any] = {"max_length": context, "do_sample": params.temperature > 0}
    given = params.model_dump(mode="json")
    for name, setting in SETTINGS.items():
        default = GenerationParams.model_fields[name].default
        usual = getattr(params, name) == default and setting.off in (None, default)
        if setting.hf and setting.in_presets and not usual and (params.temperature > 0 or setting.at_zero):
            values[setting.hf] = given[name]
    values |= {"suppress_tokens": sorted(controls)} if controls else {}
    values[OURS] = {"max_tokens": params.max_tokens}
    return values if eot is None else values | {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}


def model_card(name: str, config: ModelConfig, tokenizer: Tokenizer, card: Mapping[str, Any]) -> str:
    """`README.md`. `card` may hold `description`, `data` and `limits` as text; the rest becomes rows of the table."""
    rows = {
        "layers, heads, channels": f"{config.n_layer}, {config.n_head}, {config.n_embd}",
        "context": f"{config.block_size:,} tokens, {config.positions} positions",
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids",
    }
    rows |= {
        key.replace("_", " "): value for key, value in card.items() if key not in ("description", "data", "limits")
    }
    rows |= {"styles": ", ".join(tokenizer.styles)} if tokenizer.styles else {}
    styled = ""
    if tokenizer.styles:
        first = next(iter(tokenizer.styles))
        styled = (
            f"\nA style is asked for by its control token at the beginning of a text: `<|{first}|>`"
            f" to transformers, `--style {first}` to generate.py.\n"
        )
    table = "".join(f"| {_cell(key)} | {_cell(value)} |\n" for key, value in rows.items() if value is not None)
    return (
        "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\nlanguage: en\n---\n\n"
        f"# {name}\n\n{card.get('description') or 'A GPT-2 style language model, trained from scratch.'}\n\n"
        f"| | |\n|---|---|\n{table}\n"
        f"## Data\n\n{card.get('data') or 'Not recorded.'}\n\n## Limits\n\n{card.get('limits') or LIMITS}\n\n## Use\n\n"
        "FOLDER is where this file lies.\n\n"
        '```\npython generate.py --model FOLDER --prompt "It was a dark night"\n```\n\n'
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n' + styled
    )


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def read_model_config(folder: Path | str) -> ModelConfig:
    """The model's shape from `config.json` alone, of our folders and of GPT-2s saved by transformers."""
    path = present(folder) / "config.json"
    return parse_config(read_json(path), path)


def parse_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """The standard Hugging Face fields take precedence; our own key holds the rest."""
    ours = raw.get(OURS) or {}
    if ours.get("format", FORMAT) > FORMAT:
        raise CheckpointError(f"{path}: format {ours['format']} is newer than this program's {FORMAT}: update it")
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}
    shape |= {key: raw[key] for key in shape if key in raw}
    shape["block_size"] = raw.get("n_positions", raw.get("n_ctx", 1024))
    wanted: dict[str, tuple[Any, ...]] = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "n_inner": (None, 4 * shape["n_embd"]),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    wrong = [
        f"{key} {raw.get(key)!r} (must be {allowed[-1]!r})"
        for key, allowed in wanted.items()
        if (key in raw or key == "model_type") and raw.get(key) not in allowed
    ]
    if wrong:
        raise CheckpointError(f"{path}: only plain GPT-2 models load here; this one has {', '.join(wrong)}")
    values = {"dropout": raw.get("resid_pdrop", 0.1), **ours.get("model", {})}
    rows, used = values.get("vocab_size", 0), values.get("vocab_used", 0)
    same = (used or rows) == shape["vocab_size"]
    shape |= {"vocab_size": rows, "vocab_used": used} if same else {"vocab_used": 0}
    try:
        return build(ModelConfig, {**values, **shape, "tied_head": raw.get("tie_word_embeddings", True)})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def folder_tokenizer(folder: Path, raw: dict[str, Any]) -> Tokenizer:
    """The tokenizer beside a model whose `config.json` is `raw`; CheckpointError if the model was trained with another."""
    from tokenizer import load_tokenizer

    if OURS not in raw:
        return _foreign_tokenizer(folder, raw)
    try:
        loaded = load_tokenizer(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    trained = raw[OURS].get("tokenizer", {})
    if trained.get("fingerprint") != loaded.fingerprint:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} is not the tokenizer that the model was trained with (kind "
            f"{trained.get('kind')}, with another vocabulary): put back the file that was saved with the model"
        )
    return loaded


def _foreign_tokenizer(folder: Path, raw: dict[str, Any]) -> Tokenizer:
    """GPT-2 folders may name the end of text only in `config.json`, or have `vocab.json` and `merges.txt` alone.

    What is missing is put together in a temporary folder.
    """
    from tokenizer import load_tokenizer

    vocab, merges, settings = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json"))
    if (folder / "tokenizer.json").is_file():
        data = read_json(folder / "tokenizer.json")
    elif vocab.is_file() and merges.is_file():
        data = _from_merges(read_json(vocab), merges.read_text(encoding="utf-8"))
    else:
        raise CheckpointError(f"{folder} has no tokenizer.json: save the model's tokenizer there as well")
    extra = read_json(settings) if settings.is_file() else {}
    end = raw.get("eos_token_id", 50256)
    try:
        added = {token["id"]: token["content"] for token in data.get("added_tokens", [])}
        extra["eos_token"] = extra.get("eos_token") or added.get(end[0] if isinstance(end, list) else end)
        with tempfile.TemporaryDirectory() as place:
            write_text(Path(place) / "tokenizer.json", json.dumps(data))
            write_text(Path(place) / "tokenizer_config.json", extra)
            return load_tokenizer(Path(place))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be used: {error}") from None


def _from_merges(vocab: dict[str, Any], merges: str) -> dict[str, Any]:
    """GPT-2's older pair of files as the content of a `tokenizer.json`."""
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    end = "<|endoftext|>"
    return {
        "added_tokens": [{"id": vocab[end], "content": end}] if end in vocab else [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": lines},
    }


def as_trained(config: ModelConfig, weights: Mapping[str, Tensor]) -> ModelConfig:
    """`config` without what a training by transformers has undone: zero biases, a fixed position table."""
    import torch

    from model import sinusoids

    found = {clean_name(name).removeprefix("transformer."): tensor for name, tensor in weights.items()}
    biases = [
        found[name] for name in found if re.fullmatch(r"(h\.\d+\.(ln_\d|attn\.c_\w+|mlp\.c_\w+)|ln_f)\.bias", name)
    ]
    changed: dict[str, Any] = {}
    if not config.bias and any(bool(bias.any()) for bias in biases):
        changed["bias"] = True
    if config.positions == "sinusoidal" and "wpe.weight" in found:
        table = found["wpe.weight"]
        fixed = sinusoids(config.block_size, config.n_embd).to(table.dtype)
        if table.shape != fixed.shape or not torch.allclose(table.float(), fixed.float(), atol=1e-6):
            changed["positions"] = "learned"
    return config.model_copy(update=changed)


def folder_defaults(folder: Path) -> dict[str, Any]:
    """The settings that people write with: those in a model folder's generation_config.json that are within our bounds,
    and to finish the sentence.
    """
    values: dict[str, Any] = {"finish_sentence": FINISH_SENTENCE}
    try:
        held = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return values
    found = {name: held[setting.hf] for name, setting in SETTINGS.items() if held.get(setting.hf) is not None}
    if isinstance(own := held.get(OURS), dict):
        found["max_tokens"] = own.get("max_tokens")
    if not found.get("max_tokens"):
        found.pop("max_tokens", None)
    if held.get("do_sample") is False and "temperature" not in found:
        found["temperature"] = 0.0
    for name, value in found.items():
        with contextlib.suppress(ConfigError):
            build(GenerationParams, {name: value})
            values[name] = value
    return values
