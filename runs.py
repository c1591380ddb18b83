"""A run: its folder and lock, its data and model, what it remembers, its checkpoints.

with locked(run):
    save = Saver(run, config, data, tokenizer, model, optimizer, scaler, team, tokens_per_step)
    save(progress, best=False, val_loss=None)
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import ROOT, Config, ConfigError, ModelConfig, build, preset_values

if TYPE_CHECKING:
    import torch

    from dataset import TokenData
    from devices import Team
    from model import GPT
    from optim import Optimizer
    from tokenizer import Tokenizer


@dataclass
class Progress:
    """Everything besides weights and optimizer that a resumed run needs; saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    windows: int = 0  # training windows used, over all ranks
    best_val: float = math.inf  # lowest validation loss ever seen
    best_step: int = 0
    stale: int = 0  # validation passes since the best one
    average: float = 0.0  # running average of the training loss (decay 0.98), uncorrected
    average_weight: float = 0.0
    epoch_loss: float = 0.0  # sum over the steps of the present epoch
    epoch_steps: int = 0
    best_epoch_loss: float = math.inf
    skipped: int = 0  # steps with a non-finite loss
    elapsed_s: float = 0.0  # wall-clock over all sessions of the run

    @property
    def running_loss(self) -> float:
        return self.average / self.average_weight if self.average_weight else math.inf

    def count(self, loss: float) -> None:
        """Take in one step's loss."""
        self.average = 0.98 * self.average + 0.02 * loss
        self.average_weight = 0.98 * self.average_weight + 0.02
        self.epoch_loss += loss
        self.epoch_steps += 1


def model_card(
    config: Config, data: TokenData, progress: Progress, tokens_per_step: int, val_loss: float | None
) -> dict[str, Any]:
    """What the model folder's README and config.json say of its making."""
    splits = data.manifest.splits
    return {
        "description": config.description,
        "source": str(data.manifest.source),
        "train_tokens_in_text": splits.train.tokens,
        "train_documents": splits.train.documents,
        "steps": progress.step,
        "tokens_seen": progress.step * tokens_per_step,
        "val_loss": val_loss,
        "val_bpb": None if val_loss is None else bits_per_byte(val_loss, data),
    }


def bits_per_byte(loss: float, data: TokenData) -> float:
    """Nats a token -> bits a UTF-8 byte of the validation text: the figure that compares across tokenizers."""
    split = data.manifest.splits.val
    return loss / math.log(2) * split.tokens / max(1, split.bytes)


def free_run_folder(preset: str, restart: bool) -> Path:
    """runs/PRESET, or the first of runs/PRESET-2, -3 … that is free; after an elastic restart the newest taken one."""
    base = ROOT / "runs" / Path(preset).stem
    names = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    taken = [name for name in names if (name / "config.toml").exists()]
    if restart and taken:
        return max(taken, key=lambda path: (path / "config.toml").stat().st_mtime)
    return next(name for name in names if not (name / "config.toml").exists())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder: a second trainer on it is refused. The lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no flock
        except OSError:
            raise ConfigError(
                [f"--out {folder}: another train.py is writing there: stop it, or give another --out"]
            ) from None
        yield


def default_data(preset: str) -> Path:
    """Where a preset's prepared texts lie: data/PRESET, or tokens/ inside it where that folder holds the texts."""
    folder = ROOT / "data" / Path(preset).stem
    return folder / "tokens" if any(folder.glob("*.txt")) else folder


def prepared(folder: Path | None, preset: str) -> Path:
    """The data folder to train on; the preset's own texts are prepared where they are not yet (by the leader alone)."""
    if folder is not None and str(folder).startswith("s3:"):
        from s3 import download_folder, s3_url

        target = ROOT / "data" / folder.name
        download_folder(s3_url(folder), target)
        return target
    if folder is not None:
        if not (folder / "manifest.json").is_file():
            raise ConfigError(
                [
                    f"--data {folder}: no manifest.json there: prepare it with `python prepare_data.py --input … --out {folder}`"
                ]
            )
        return folder
    target = default_data(preset)
    import prepare_data

    local = str(preset_values(preset).get("data", {}).get("source", "")).endswith(".txt")
    if local or not (target / "manifest.json").is_file():  # local texts may have changed since
        code = prepare_data.main(["--preset", preset, "--out", str(target)])
        if code:
            raise SystemExit(code)
    return target


def start_model(config: Config, data: TokenData, tokenizer: Tokenizer, init_from: str) -> GPT:
    """A new model of the right vocabulary, or the weights of `init_from` with this run's dropout and context."""
    import torch

    from model import GPT

    torch.manual_seed(config.train.seed)
    if not init_from:
        return GPT(fitted(config.model, tokenizer))
    from checkpoint import fetch_model, load_model

    wanted = config.model.block_size if "block_size" in config.model.model_fields_set else None
    model, theirs = load_model(fetch_model(init_from), block_size=wanted)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            [
                f"--init-from {init_from}: its tokenizer is not the one of {data.folder}: prepare the texts with "
                f"`python prepare_data.py --tokenizer-from {init_from} …`"
            ]
        )
    fresh = GPT(model.config.model_copy(update={"dropout": config.model.dropout}))
    fresh.load_state_dict(model.state_dict())
    return fresh


def fitted(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's settings with the tokenizer's size filled in. Raises ConfigError where it does not fit."""
    size = model.vocab_size or tokenizer.vocab_size
    values = model.model_dump() | {"vocab_size": size, "vocab_used": tokenizer.vocab_size}
    return build(ModelConfig, values)


def wrapped(model: GPT, config: Config, team: Team, device: torch.device) -> torch.nn.Module:
    """The model as the loop calls it: compiled and distributed. The wrappers never reach the disk."""
    import torch

    module: torch.nn.Module = model
    if team.mode == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.h:
            fully_shard(block)
        fully_shard(model)
    compile_it = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    if compile_it:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is, with a warning
        module = torch.compile(module)  # type: ignore[assignment]
    if team.mode == "ddp":
        module = torch.nn.parallel.DistributedDataParallel(
            module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    return module


def whole(value: Any) -> Any:
    """A sharded tensor gathered (on all ranks together), anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def gathered(model: GPT, optimizer: Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Full weights and optimizer state on every rank, whatever is sharded (a joint call under FSDP)."""
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    state = {name: {key: whole(value) for key, value in part.items()} for name, part in optimizer.state_dict().items()}
    return weights, state


def whole_model(model: GPT, team: Team) -> GPT:
    """The model itself, or under FSDP an unsharded copy of it (a joint call)."""
    if team.mode != "fsdp":
        return model
    from model import GPT

    plain = GPT(model.config)
    plain.load_state_dict({name: whole(value).cpu() for name, value in model.state_dict().items()})
    return plain


def shelve(run: Path) -> None:
    """Put last/ aside as last-STEP/, so that writing the next one does not replace it."""
    last = run / "last"
    if (last / "checksums.json").is_file():
        step = json.loads((last / "checksums.json").read_text(encoding="utf-8"))["step"] or 0
        aside = run / f"last-{step:08d}"
        shutil.rmtree(aside, ignore_errors=True)
        last.rename(aside)


@dataclass
class Saver:
    """Writes best/ and last/ of one run; only the leader touches the disk."""

    run: Path
    config: Config
    data: TokenData
    tokenizer: Tokenizer
    model: GPT
    optimizer: Optimizer
    scaler: Any
    team: Team
    tokens_per_step: int
    seconds: float = 0.0  # time spent writing

    def __call__(self, progress: Progress, *, best: bool, val_loss: float | None) -> None:
        """Save best/ (weights only) or last/ (weights and training state), whole or not at all."""
        from checkpoint import prune_checkpoints, save_model, save_training

        began = time.monotonic()
        weights, moments = gathered(self.model, self.optimizer)
        if self.team.leader:
            card = model_card(self.config, self.data, progress, self.tokens_per_step, val_loss)
            shared: dict[str, Any] = {"card": card, "generation": self.config.generation, "weights": weights}
            if best:
                save_model(self.run / "best", self.model, self.tokenizer, **shared)
            else:
                keep, world = self.config.train.keep_last, self.team.size
                state = {"step": progress.step, "progress": asdict(progress), "optimizer": moments, "world": world}
                state["scaler"] = self.scaler.state_dict()
                if keep > 1:
                    shelve(self.run)
                save_training(self.run / "last", self.model, self.tokenizer, state=state, **shared)
                prune_checkpoints(self.run, keep)
        self.team.barrier()
        self.seconds += time.monotonic() - began
