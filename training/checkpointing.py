"""Checkpoints of a run: what resuming needs, and how it is written and read.

>>> start = resumed_run(checkpoint, data, tokenizer)       # model, progress and training state, exactly as saved
>>> save = CheckpointWriter(run, config, data, tokenizer, model, optimizer, scaler, distributed, batch, tokens_per_step)
>>> save(progress, best=False)                             # last/, atomically
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, ConfigError, TrainConfig
from training.model_setup import full_state_dict
from training.resume import check_texts, content_of, thread_notes

if TYPE_CHECKING:
    from dataset import TokenData
    from devices import DistributedContext
    from model import GPT
    from tokenizer import Tokenizer
    from training.optimizer import Optimizer


ON_DISK = {"evals_since_best": "stale"}  # where a field of Progress has another key in training_state.json


@dataclass
class Progress:
    """Everything besides weights and optimizer that a resumed run needs; saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    windows: int = 0  # training windows used, over all ranks: the position in the data
    best_val: float = math.inf  # lowest validation loss ever seen
    best_step: int = 0
    evals_since_best: int = 0  # validation passes without an improvement
    average: float = 0.0  # running average of the training loss (decay 0.98), biased towards 0 at first
    average_weight: float = 0.0  # the sum of its weights, which undoes the bias
    best_average: float = math.inf  # lowest running average
    epoch_loss: float = 0.0  # sum over the steps of the current epoch
    epoch_steps: int = 0
    best_epoch_loss: float = math.inf
    skipped: int = 0  # steps with a non-finite loss
    losses: list[float] = field(default_factory=list)  # of the steps since the last log line
    val_loss: float | None = None  # of the last validation pass
    elapsed_s: float = 0.0  # wall-clock time over all sessions of the run
    energy_j: float = 0.0  # drawn by the GPUs over all sessions, if NVML reports it

    @property
    def running_loss(self) -> float:
        return self.average / self.average_weight if self.average_weight else math.inf

    def add_loss(self, loss: float) -> None:
        """Add one step's loss to the averages."""
        self.average = 0.98 * self.average + 0.02 * loss
        self.average_weight = 0.98 * self.average_weight + 0.02
        self.best_average = min(self.best_average, self.running_loss)
        self.epoch_loss += loss
        self.epoch_steps += 1
        self.losses.append(loss)

    def is_spike(self, loss: float) -> bool:
        """Whether a loss lies more than a nat above the running average, after its first 46 steps."""
        return self.average_weight > 0.6 and loss > self.running_loss + 1.0

    def begun_anew(self) -> Progress:
        """Steps and time so far, and nothing of what was measured on the texts, which are others from here on."""
        return Progress(step=self.step, elapsed_s=self.elapsed_s, energy_j=self.energy_j, skipped=self.skipped)

    def to_state(self) -> dict[str, Any]:
        """The fields under their keys on disk."""
        return {ON_DISK.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """The Progress that `to_state` saved, in this or an earlier version."""
        names = {key: name for name, key in ON_DISK.items()}
        return cls(**{names.get(key, key): value for key, value in state.items()})


@dataclass
class InitialState:
    """Model, progress and training state at the start of a session, from a checkpoint if the run is resumed."""

    model: GPT
    progress: Progress = field(default_factory=Progress)
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)  # the checkpoint's: optimizer, scaler, sizes
    notes: list[str] = field(default_factory=list)  # what is not as it was before

    def restore(self, optimizer: Optimizer, scaler: Any) -> None:
        """Give optimizer and loss scaler the checkpoint's state, if there is one."""
        if self.checkpoint is not None:
            optimizer.load_state_dict(self.state["optimizer"])
            if self.state["scaler"]:  # empty where the run had no fp16 before
                scaler.load_state_dict(self.state["scaler"])


def resumed_run(
    checkpoint: Path, data: TokenData, tokenizer: Tokenizer, device: str, dropout: float, new_texts: bool
) -> InitialState:
    """Model, progress and training state of a checkpoint, with this rate of dropout.

    Raises ConfigError if the data has another tokenizer, or, unless they are `new_texts`, other texts.
    """
    import torch

    from checkpoint import load_model, load_training

    model, kept = load_model(checkpoint, dropout=dropout)
    if kept.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            [f"--data {data.folder}: not the tokenizer this run was trained with: give the run's own data"]
        )
    state = load_training(checkpoint, verify=False)  # its checksums were compared when it was found
    start = InitialState(model, Progress.from_state(state["progress"]), checkpoint, state)
    anew, start.notes = check_texts(state, data.manifest, data.folder, new_texts)
    start.progress = start.progress.begun_anew() if anew else start.progress
    start.notes += thread_notes(state, device, torch.get_num_threads())
    return start


def description(origin: str, texts: str) -> str:
    """What the model is, for its card: of a run whose texts are not those of its preset."""
    return (
        f"A GPT-2 style language model: {origin}, fine-tuned on {texts}."
        if origin
        else f"A GPT-2 style language model, trained from scratch on {texts}."
    )


def model_card(config: Config, data: TokenData, progress: Progress) -> dict[str, Any]:
    """Facts about the training for the model folder's README and config.json."""
    splits, val_loss = data.manifest.splits, progress.val_loss
    return {
        "description": config.description,
        "source": str(data.manifest.source),
        "train_tokens_in_text": splits.train.tokens,
        "train_documents": splits.train.documents,
        "steps": progress.step,
        "tokens_seen": progress.windows * config.model.block_size,
        "val_loss": val_loss,
        "val_bpb": None if val_loss is None else bits_per_byte(val_loss, data),
        "counted_3_grams": counted_for(config.train),
    }


def counted_for(train: TrainConfig) -> str | None:
    """What a run has used the counted 3-grams of its training text for, as a card says it; None: for nothing."""
    uses = [
        use
        for use, used in (
            ("the first weights", train.ngram_start),
            ("a part of the targets", train.ngram_teacher),
            ("which ids a softmax computes", train.sampled_softmax),
        )
        if used
    ]
    return ", ".join(uses[:-1]) + " and " * (len(uses) > 1) + uses[-1] if uses else None


def bits_per_byte(loss: float, data: TokenData) -> float:
    """Nats per token -> bits per UTF-8 byte of the validation text, comparable across tokenizers."""
    split = data.manifest.splits.val
    return loss / math.log(2) * split.tokens / max(1, split.bytes)


def archive_last(run: Path) -> None:
    """Rename last/ to last-STEP/, so that writing the next one does not replace it."""
    last = run / "last"
    if (last / "checksums.json").is_file():
        step = json.loads((last / "checksums.json").read_text(encoding="utf-8"))["step"] or 0
        aside = run / f"last-{step:08d}"
        shutil.rmtree(aside, ignore_errors=True)
        last.rename(aside)


@dataclass
class CheckpointWriter:
    """Writes best/ and last/ of one run; only the leader touches the disk."""

    run: Path
    config: Config
    data: TokenData
    tokenizer: Tokenizer
    model: GPT
    optimizer: Optimizer
    scaler: Any
    distributed: DistributedContext
    batch: int
    tokens_per_step: int
    seconds: float = 0.0  # time spent writing
    folders: int = 0  # best/ and last/ written
    step: int = -1  # of the newest last/ (of a resumed run: of the checkpoint it was resumed from)

    def __call__(self, progress: Progress, *, best: bool) -> None:
        """Save best/ (weights only) or last/ (weights and training state), atomically."""
        import torch

        from checkpoint import prune_checkpoints, save_model, save_training

        began = time.monotonic()
        weights = full_state_dict(self.model.state_dict())
        moments = {} if best else full_state_dict(self.optimizer.state_dict())
        if self.distributed.leader:
            card = model_card(self.config, self.data, progress)
            shared: dict[str, Any] = {"card": card, "generation": self.config.generation, "weights": weights}
            if best:
                save_model(self.run / "best", self.model, self.tokenizer, **shared)
            else:
                state = {
                    "step": progress.step,
                    "progress": progress.to_state(),
                    "optimizer": moments,
                    "scaler": self.scaler.state_dict(),
                    "world": self.distributed.size,
                    "batch": self.batch,
                    "tokens_per_step": self.tokens_per_step,
                    "texts": content_of(self.data.manifest),
                    "train_tokens": self.data.manifest.splits.train.tokens,
                    # where a step is cut into parts, no number depends on the threads
                    "threads": torch.get_num_threads() if self.config.train.parts <= 1 else 0,
                }
                if self.config.train.keep_last > 1:
                    archive_last(self.run)
                save_training(self.run / "last", self.model, self.tokenizer, state=state, **shared)
                prune_checkpoints(self.run, self.config.train.keep_last)
        self.distributed.barrier()
        self.step = self.step if best else progress.step
        self.folders += 1
        self.seconds += time.monotonic() - began
