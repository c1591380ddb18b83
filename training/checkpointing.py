"""A run: its folder and lock, its data and model, what it remembers, its checkpoints.

with locked(run):
    save = Saver(run, config, data, tokenizer, model, optimizer, scaler, team, batch, tokens_per_step)
    save(progress, best=False)
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config
from training.model_setup import gathered

if TYPE_CHECKING:
    from dataset import TokenData
    from devices import Team
    from model import GPT
    from tokenizer import Tokenizer
    from training.optimizer import Optimizer


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
    best_average: float = math.inf  # lowest running average
    epoch_loss: float = 0.0  # sum over the steps of the present epoch
    epoch_steps: int = 0
    best_epoch_loss: float = math.inf
    skipped: int = 0  # steps with a non-finite loss
    losses: list[float] = field(default_factory=list)  # of the steps since the last log line
    val_loss: float | None = None  # of the last validation pass
    elapsed_s: float = 0.0  # wall-clock over all sessions of the run
    energy_j: float = 0.0  # drawn by the GPUs over all sessions, where NVML tells

    @property
    def running_loss(self) -> float:
        return self.average / self.average_weight if self.average_weight else math.inf

    def count(self, loss: float) -> None:
        """Take in one step's loss."""
        self.average = 0.98 * self.average + 0.02 * loss
        self.average_weight = 0.98 * self.average_weight + 0.02
        self.best_average = min(self.best_average, self.running_loss)
        self.epoch_loss += loss
        self.epoch_steps += 1
        self.losses.append(loss)

    def spike(self, loss: float) -> bool:
        """Whether a loss lies more than a nat above the running average, once that has settled (46 steps)."""
        return self.average_weight > 0.6 and loss > self.running_loss + 1.0


def model_card(config: Config, data: TokenData, progress: Progress) -> dict[str, Any]:
    """What the model folder's README and config.json say of its making."""
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
    }


def bits_per_byte(loss: float, data: TokenData) -> float:
    """Nats a token -> bits a UTF-8 byte of the validation text: the figure that compares across tokenizers."""
    split = data.manifest.splits.val
    return loss / math.log(2) * split.tokens / max(1, split.bytes)


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
    batch: int
    tokens_per_step: int
    seconds: float = 0.0  # time spent writing
    folders: int = 0  # best/ and last/ written
    step: int = -1  # of the newest last/

    def __call__(self, progress: Progress, *, best: bool) -> None:
        """Save best/ (weights only) or last/ (weights and training state), whole or not at all."""
        from checkpoint import prune_checkpoints, save_model, save_training

        began = time.monotonic()
        weights = gathered(self.model.state_dict())
        moments = {} if best else gathered(self.optimizer.state_dict())
        if self.team.leader:
            card = model_card(self.config, self.data, progress)
            shared: dict[str, Any] = {"card": card, "generation": self.config.generation, "weights": weights}
            if best:
                save_model(self.run / "best", self.model, self.tokenizer, **shared)
            else:
                state = {
                    "step": progress.step,
                    "progress": asdict(progress),
                    "optimizer": moments,
                    "scaler": self.scaler.state_dict(),
                    "world": self.team.size,
                    "batch": self.batch,
                    "tokens_per_step": self.tokens_per_step,
                }
                if self.config.train.keep_last > 1:
                    shelve(self.run)
                save_training(self.run / "last", self.model, self.tokenizer, state=state, **shared)
                prune_checkpoints(self.run, self.config.train.keep_last)
        self.team.barrier()
        self.step = self.step if best else progress.step
        self.folders += 1
        self.seconds += time.monotonic() - began
