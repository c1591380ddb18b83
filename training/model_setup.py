"""The model that a run starts from, compiled and distributed for the loop, and its full weights for the disk.

>>> model = start_model(config, data, tokenizer)      # new, or from the weights that `--init-from` names
>>> module = wrapped(model.to(device), config, distributed, device)
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from config import Config, ConfigError, ModelConfig, build

if TYPE_CHECKING:
    import torch

    from dataset import TokenData
    from devices import DistributedContext
    from model import GPT
    from tokenizer import Tokenizer
    from training.counting import Counting


def origin_shape(origin: str) -> dict[str, Any]:
    """The shape of the model that `--init-from` names, as a [model] table; hub names are downloaded first."""
    from checkpoint import fetch_model, read_model_config

    try:
        return read_model_config(fetch_model(origin)).model_dump()
    except ValueError as error:
        raise ConfigError([f"--init-from {origin}: {str(error).removeprefix(f'--model {origin}: ')}"]) from None


def shape_faults(origin: str, theirs: dict[str, Any], requested: ModelConfig, start: bool = False) -> list[str]:
    """Settings that conflict with --init-from: of the shape only context and dropout may differ. start: from counts."""
    free = ("block_size", "dropout", "vocab_used")
    return [
        f"--model.{name.replace('_', '-')} {value}: --init-from {origin} has {theirs[name]}: leave it out (only "
        "--model.block-size and --model.dropout can differ)"
        for name, value in requested.model_dump().items()
        if name not in free and value != theirs[name] and not (name == "vocab_size" and not value)
    ] + ([f"--train.ngram-start: --init-from {origin} has weights already: leave one of them out"] if start else [])


def start_model(config: Config, data: TokenData, tokenizer: Tokenizer, counting: Counting) -> GPT:
    """A new model with the tokenizer's vocabulary, or that of `config.init_from` with this run's dropout and context.

    With --train.ngram-start the new model's weights come from `counting`, what has been counted in the training text.

    Styles in the texts that the weights do not know yet get new rows of the embedding.
    """
    import torch

    from model import GPT

    torch.manual_seed(config.train.seed)
    init_from = config.init_from
    if not init_from:
        model = GPT(fitted(config.model, tokenizer))
        if config.train.ngram_start:
            from training.ngram_start import counted_start

            counted_start(model, counting.model, config.train.seed, config.train.sampled_softmax)
        return model
    from checkpoint import fetch_model, load_model

    folder = fetch_model(init_from)
    model, theirs = load_model(folder, block_size=config.model.block_size, dropout=config.model.dropout)
    if tokenizer.extends(theirs):
        return with_rows(model, tokenizer.vocab_size)
    if theirs.fingerprint != tokenizer.fingerprint:
        flag = "--tokenizer gpt2" if theirs.kind == "gpt2" else f"--tokenizer-from {folder}"
        raise ConfigError(
            [
                f"--init-from {init_from}: its tokenizer is not the one of {data.folder}: prepare the texts with "
                f"`python prepare_data.py --input my_books/ {flag} --out data/mine` and give --data data/mine"
            ]
        )
    return model


def fitted(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's settings with the tokenizer's size filled in. Raises ConfigError if it does not fit."""
    size = model.vocab_size or tokenizer.vocab_size
    if tokenizer.styles:  # a preset for GPT-2's 50,257 ids grows by those of the styles
        size = max(size, tokenizer.vocab_size)
    values = model.model_dump() | {"vocab_size": size, "vocab_used": tokenizer.vocab_size}
    return build(ModelConfig, values)


def with_rows(model: GPT, tokens: int) -> GPT:
    """The model with `tokens` rows in its embedding; new rows are the mean of the others plus noise, which makes them unlikely at first."""
    import torch

    from model import GPT

    old = model.config.tokens
    values = {"vocab_size": max(model.config.vocab_size, tokens), "vocab_used": tokens}
    grown = GPT(model.config.model_copy(update=values))
    state = model.state_dict()
    for name in {"wte.weight", "lm_head.weight"} & set(state):
        table = torch.zeros(grown.config.vocab_size, state[name].size(1))
        table[:old] = state[name][:old]
        noise = 0.1 * torch.randn(tokens - old, table.size(1)) * table[:old].std()
        table[old:tokens] = table[:old].mean(dim=0) + noise
        state[name] = table
    grown.load_state_dict(state)
    return grown


def wrapped(model: GPT, config: Config, distributed: DistributedContext, device: torch.device) -> torch.nn.Module:
    """The model as the loop calls it: split over threads (training/split.py), or compiled and distributed.

    Saved weights never carry a wrapper's names.
    """
    import torch

    from training.split import SplitModel

    if config.train.parts > 1:
        return SplitModel(model, config.train.parts)
    module: torch.nn.Module = model
    if distributed.mode == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.h:
            fully_shard(block)
        fully_shard(model)
    compile_it = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    if compile_it:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is, with a warning
        module = torch.compile(module)  # type: ignore[assignment]
    if distributed.mode == "ddp":
        parallel = torch.nn.parallel.DistributedDataParallel
        # The only buffer is constant, and ranks validate different numbers of batches. torch 2.13 renamed the setting.
        known = inspect.signature(parallel).parameters
        sync: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        module = parallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **sync,
        )
    return module


def full_tensor(value: Any) -> Any:
    """A sharded tensor gathered from all ranks (collective), anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def full_state_dict(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with full tensors on every rank, also where they are sharded (collective under FSDP)."""
    return {
        name: full_state_dict(value) if isinstance(value, dict) else full_tensor(value) for name, value in state.items()
    }


def unsharded_model(model: GPT, distributed: DistributedContext) -> GPT:
    """The model itself, or under FSDP an unsharded copy of it on the CPU (collective)."""
    if distributed.mode != "fsdp":
        return model
    from model import GPT

    plain = GPT(model.config)
    plain.load_state_dict({name: full_tensor(value).cpu() for name, value in model.state_dict().items()})
    return plain


def dividing_batch(tokens_per_step: int, batch: int, block: int, world: int) -> int:
    """The largest micro-batch up to `batch` that keeps `tokens_per_step` on `world` processes; `batch` if none does."""
    fits = (size for size in range(batch, 0, -1) if tokens_per_step % (size * block * world) == 0)
    return next(fits, batch)
