"""Model folders and training state on disk: saving, loading, finding the newest.

    >>> save_model("models/mine", model, tokenizer, card={"data": "three novels"}, generation=GenerationParams())
    >>> model, tokenizer = load_model("runs/sample/best")          # ours, or a GPT-2 saved by transformers
    >>> model, tokenizer = load_model(fetch_model("openai-community/gpt2"), block_size=2048)
    >>> state = load_training(newest_checkpoint("runs/sample"))
    python checkpoint.py --model runs/novels/best --out models/novels     # a copy to share, at half the size

A model folder is a Hugging Face model (`storage/gpt2_format.py`), a checkpoint a model folder with the training state
beside the weights. `storage/atomic.py` writes each atomically. No pickle is read or written.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cli import parse_flags, run_main
from config import ConfigError, FrozenSettings, GenerationParams, ModelConfig, build, read_toml
from storage.atomic import (
    SUMS,
    CheckpointError,
    atomic_folder,
    discard,
    faults,
    pack,
    present,
    read_json,
    read_tensors,
    recover,
    unfinished,
    unpack,
    write_sums,
    write_tensors,
    write_text,
)
from storage.gpt2_format import (
    OURS,
    as_trained,
    export_state,
    extend_positions,
    folder_tokenizer,
    generation_config,
    gpt2_config,
    import_state,
    model_card,
    parse_config,
    read_model_config,
    unwrapped,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model import GPT
    from tokenizer import Tokenizer

__all__ = [
    "TRAINING_FILES",
    "CheckpointError",
    "default_model",
    "described",
    "export_state",
    "extend_positions",
    "fetch_model",
    "find_model",
    "import_state",
    "load_model",
    "load_training",
    "newest_checkpoint",
    "prune_checkpoints",
    "read_model_config",
    "save_model",
    "save_training",
    "unwrapped",
]

WEIGHTS = "model.safetensors"
STATE_TENSORS, STATE_REST = "training_state.safetensors", "training_state.json"
TRAINING_FILES = {STATE_TENSORS, STATE_REST, SUMS}  # files of a checkpoint that a model folder does not need
SUMMARY = "summary.json"  # of a run: how its training ended
CHECKPOINT_NAME = re.compile(r"last(-\d+)?(\.old-\d+)?")
IN_PICKLE = (
    "has its weights in a pickle, which can run any code and is not opened here; if you trust it, convert it with "
    "transformers: GPT2LMHeadModel.from_pretrained({!r}).save_pretrained('NEW')"
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|gpt2|gpt2-medium|gpt2-large|gpt2-xl|distilgpt2")


def model_title(folder: Path) -> str:
    """The name to print on a model's card: the run's for `runs/NAME/best`, otherwise the folder's own."""
    place = folder.absolute()
    return place.parent.name if place.name == "best" or CHECKPOINT_NAME.fullmatch(place.name) else place.name


def _write(
    folder: Path | str,
    model: Any,
    tokenizer: Tokenizer,
    state: Mapping[str, Any] | None,
    card: Mapping[str, Any],
    generation: GenerationParams,
    weights: Mapping[str, Tensor] | None,
) -> None:
    core = unwrapped(model)
    if tokenizer.vocab_size != core.config.tokens:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids and the model {core.config.tokens:,}: "
            "save the tokenizer that the model was trained with"
        )
    facts = {"parameters": core.num_parameters(), **card}
    texts = {
        "config.json": gpt2_config(core.config, tokenizer, facts),
        "generation_config.json": generation_config(
            generation, tokenizer.eot, tokenizer.controls.values(), context=core.config.block_size
        ),
        "README.md": model_card(model_title(Path(folder)), core.config, tokenizer, facts),
    }
    with atomic_folder(folder, group=None if state is None else "last") as draft:
        sums = {WEIGHTS: write_tensors(draft / WEIGHTS, export_state(model, weights), hashed=state is not None)}
        tokenizer.save(draft)
        for name, content in texts.items():
            write_text(draft / name, content)
        if state is not None:
            rest, tensors = pack(state)
            write_text(draft / STATE_REST, rest)
            sums[STATE_TENSORS] = write_tensors(draft / STATE_TENSORS, tensors)
            write_sums(draft, state.get("step"), sums)


def save_model(
    folder: Path | str,
    model: Any,
    tokenizer: Tokenizer,
    *,
    card: Mapping[str, Any],
    generation: GenerationParams,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model folder atomically, replacing an older one of that name.

    model: a GPT, wrapped or not. card: what `model_card` takes, JSON values only. weights: see `export_state`.
    Raises CheckpointError for a tokenizer of another size, OSError for a full disk.
    """
    _write(folder, model, tokenizer, None, card, generation, weights)


def save_training(
    folder: Path | str,
    model: Any,
    tokenizer: Tokenizer,
    *,
    state: Mapping[str, Any],
    card: Mapping[str, Any],
    generation: GenerationParams,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint: a model folder, the training state beside it, and the sha256 of every file.

    state: tensors, numbers, text, None, and dicts, lists and tuples of those; an int `step` in it orders checkpoints.
    The weights are in the model folder, exactly, and need not be in `state`.
    """
    _write(folder, model, tokenizer, state, card, generation, weights)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the pieces that its index names."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    if index.is_file():
        pieces = sorted({Path(str(name)).name for name in read_json(index).get("weight_map", {}).values()})
        return {name: tensor for piece in pieces for name, tensor in read_tensors(folder / piece).items()}
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt")):
        raise CheckpointError(f"{folder} {IN_PICKLE.format(str(folder))}")
    raise CheckpointError(f"{folder / WEIGHTS}: no such file; copy the folder again")


def load_model(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    block_size: int | None = None,
    dropout: float | None = None,
) -> tuple[GPT, Tokenizer]:
    """The model, in evaluation mode, and its tokenizer: a folder of ours or a GPT-2 saved by transformers.

    dtype: of the parameters, float32 if None, whatever the file holds. block_size: another context, see
    `extend_positions`; dropout: another rate (both for fine-tuning). Raises CheckpointError naming the file and the fix.
    """
    import torch

    from model import GPT, sinusoids

    folder = present(folder)
    raw = read_json(folder / "config.json")
    config = parse_config(raw, folder / "config.json")
    tokenizer = folder_tokenizer(folder, raw)
    if tokenizer.vocab_size > config.tokens:
        raise CheckpointError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} ids, the model only {config.tokens:,}: "
            "save the tokenizer that the model was trained with"
        )
    if tokenizer.vocab_size < config.tokens:  # rows that only pad, in a folder that does not say so
        config = config.model_copy(update={"vocab_used": tokenizer.vocab_size})
    weights = _read_weights(folder)
    config = as_trained(config, weights)
    try:
        state = import_state(weights, config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from None
    if block_size and block_size != config.block_size and "wpe.weight" in state:
        state["wpe.weight"] = extend_positions(state["wpe.weight"], block_size)
    requested = {
        "block_size": block_size or config.block_size,
        "dropout": config.dropout if dropout is None else dropout,
    }
    config = build(ModelConfig, {**config.model_dump(), **requested})
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(state, assign=True)
    if config.positions == "sinusoidal":
        model.positions = sinusoids(config.block_size, config.n_embd)
    return model.to(device=device, dtype=dtype or torch.float32).eval(), tokenizer


def load_training(folder: Path | str, verify: bool = True) -> Any:
    """The training state of a checkpoint, tensors on the CPU, once every file's sha256 has been compared.

    verify: False where `newest_checkpoint` has just compared them, which takes seconds for a large model. Raises
    CheckpointError naming each file that is missing or damaged.
    """
    folder = present(folder)
    wrong = faults(folder) if verify else []
    if wrong:
        raise CheckpointError(f"{'; '.join(wrong)}: resume from another checkpoint of the run, or start training again")
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / STATE_TENSORS).items()}
    return unpack(read_json(folder / STATE_REST), tensors)


def _checkpoints(run: Path) -> list[Path]:
    """The folders of training state in a run, newest first by the time and step in their `checksums.json`."""
    found = []
    for path in run.iterdir() if run.is_dir() else ():
        if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir():
            try:
                sums = read_json(path / SUMS)
                rank = (float(sums["saved"]), int(sums["step"] or 0))
            except (CheckpointError, KeyError, TypeError, ValueError):
                rank = (path.stat().st_mtime, 0)
            found.append((rank, path))
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(run: Path | str, say: Callable[[str], None] | None = None) -> Path | None:
    """The newest undamaged checkpoint of a run folder (`last`, `last-000123`, or one left by an interrupted exchange).

    Every file's sha256 is compared; damaged checkpoints are reported to `say` (default: standard error) and skipped.
    """
    for path in _checkpoints(Path(run)):
        wrong = faults(path)
        if not wrong:
            return path
        (say or _complain)(f"{path} is skipped: {'; '.join(wrong)}")
    return None


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


def prune_checkpoints(run: Path | str, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints of a run folder, and drafts that dead processes left."""
    recover(Path(run), lambda name: CHECKPOINT_NAME.fullmatch(name) is not None)
    for path in _checkpoints(Path(run))[max(1, keep) :]:
        discard(path)


def _model_in(place: Path) -> Path | None:
    """The model folder that `place` is, or of a run folder its best, otherwise its newest checkpoint."""
    for folder in (present(place), present(place / "best"), present(place / "last"), *_checkpoints(place)):
        if (folder / "config.json").is_file():
            return folder
    return None


def find_model(path: Path | str | None = None, root: Path | str = ".") -> Path:
    """A model folder: `path` itself or the best of the run folder `path`; default: `default_model`'s.

    Raises CheckpointError with the command that makes one.
    """
    make = "train one with `python train.py --preset sample`"
    if path is not None:
        found = _model_in(Path(path))
        if found is None:
            raise CheckpointError(f"--model {path}: no model there (no config.json, best/ or last/): {make}")
        return found
    if found := default_model(Path(root) / "runs", Path(root) / "models"):
        return found
    raise CheckpointError(f"no model in {Path(root) / 'runs'} or {Path(root) / 'models'}: {make}")


def _models(parent: Path) -> dict[Path, Path]:
    """The model of each folder in `parent` that holds one, by that folder."""
    places = [place for place in parent.iterdir() if not unfinished(place)] if parent.is_dir() else []
    found = {place: _model_in(place) for place in places}
    return {place: model for place, model in found.items() if model is not None}


def default_model(runs: Path, models: Path) -> Path | None:
    """The model to write with if none is named: the newest finished run with fewer bits a byte than those in `models`.

    If there is none, the newest in `models`, and where that is empty the newest run, finished or not. Bits a byte are
    those on each model's own validation text.
    """
    own, given = _models(runs), list(_models(models).values())
    best = min((_bits_per_byte(model) for model in given), default=math.inf)
    better = [
        model for place, model in own.items() if (_bits_per_byte(model) < best or best == math.inf) and finished(place)
    ]
    for choice in (better, given, list(own.values())):
        if choice:
            return max(choice, key=lambda model: (model / "config.json").stat().st_mtime)
    return None


def _facts(model: Path) -> dict[str, Any]:
    """What the card of a model folder knows of its training; empty for other programs' models."""
    try:
        return dict((read_json(model / "config.json").get(OURS) or {}).get("card") or {})
    except (CheckpointError, TypeError, ValueError, AttributeError):  # no reason not to write with another one
        return {}


def _bits_per_byte(model: Path) -> float:
    found = _facts(model).get("val_bpb")
    return found if isinstance(found, float) and math.isfinite(found) else math.inf


def finished(run: Path) -> bool:
    """Whether a run's training has ended by itself; also for a model folder that no run of ours has made.

    Runs from before `summary.json` was written count as finished if their last checkpoint is at their last step.
    """
    if not (run / "config.toml").is_file():
        return True
    try:
        if (run / SUMMARY).is_file():
            return bool(read_json(run / SUMMARY).get("done"))
        return int(_facts(run / "last")["steps"]) >= int(read_toml(run / "config.toml")["train"]["max_steps"]) > 0
    except (ConfigError, CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return False


def described(model: Path, root: Path | str = ".") -> str:
    """A model in one line: its folder, relative to `root` if it lies there, and its steps and bits a byte if it says so."""
    path = model.absolute()
    place = path.relative_to(Path(root).absolute()) if path.is_relative_to(Path(root).absolute()) else path
    return with_facts(str(place), model)


def with_facts(name: str, model: Path) -> str:
    """A model's name, and in brackets its steps and bits a byte if its folder says so."""
    facts, bits = _facts(model), _bits_per_byte(model)
    known = [f"{facts['steps']:,} steps"] if isinstance(facts.get("steps"), int) else []
    known += [f"{bits:.3f} bits a byte"] if math.isfinite(bits) else []
    return f"{name} ({', '.join(known)})" if known else name


def fetch_model(name: Path | str) -> Path:
    """A model folder on the disk: `name` as in `find_model`, or a GPT-2 of the Hugging Face hub, downloaded once.

    Hub names are `owner/name`, or `gpt2` and its sizes. Only JSON, text and safetensors files are fetched.
    """
    path = Path(name)
    ours = len(path.parts) > 1 and (path.parts[0] in ("runs", "models") or path.parent.is_dir())
    if ours or present(path).exists() or not HUB_NAME.fullmatch(str(name)):
        return find_model(path)
    import huggingface_hub

    try:
        allowed = ["*.json", "*.safetensors", "*.txt"]
        found = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=allowed, ignore_patterns=["*/*"]))
    except Exception as error:
        raise CheckpointError(
            f"{name}: no such folder, and cannot be fetched from the Hugging Face hub ({type(error).__name__}): "
            "check the name and the network, or download the model elsewhere and pass its folder"
        ) from error
    if not list(found.glob("*.safetensors")):
        raise CheckpointError(f"{name} on the hub {IN_PICKLE.format(name)}")
    return found


class CopyArgs(FrozenSettings):
    """Copy a model folder with its weights in another number format: half the size, for sharing."""

    model: Path | None = None
    """The model folder to copy, which stays as it is; default: as for generate.py."""
    out: Path | None = None
    """The folder to write."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format on the disk; the program that loads the model chooses the one it computes in."""


def copy_model(source: Path, folder: Path, dtype: str) -> None:
    """Copy a model folder atomically, with weights as `dtype`, also in config.json; no training state.

    Raises CheckpointError for a folder that is no model, or where a weight is too large for float16.
    """
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    config = read_json(source / "config.json") | {"torch_dtype": dtype}
    tensors = {name: tensor.to(kind) for name, tensor in _read_weights(source).items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{source}: {name} holds numbers beyond {dtype}'s largest: take --dtype bfloat16")
    with atomic_folder(folder) as draft:
        write_tensors(draft / WEIGHTS, tensors, hashed=False)
        write_text(draft / "config.json", config)
        for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
            if (source / name).is_file():
                shutil.copyfile(source / name, draft / name)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 when something failed, 2 for bad flags."""

    def body() -> int:
        args = parse_flags(CopyArgs, argv, examples=__doc__)
        if args.out is None:
            raise ConfigError(["--out is missing: name the folder to write, like --out models/mine"])
        copy_model(find_model(args.model), args.out, args.dtype)
        size = sum(path.stat().st_size for path in args.out.iterdir())
        print(f"{args.out}: {size / 1e6:.1f} MB, {args.dtype}", file=sys.stderr)
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
