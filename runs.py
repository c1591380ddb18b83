"""A run: its folder and lock, its data and model, what it remembers, its checkpoints.

with locked(run):
    save = Saver(run, config, data, tokenizer, model, optimizer, scaler, team, batch, tokens_per_step)
    save(progress, best=False)
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
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


def last_good(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; None where it was stopped before its first one.

    Raises CheckpointError where there are some and all are damaged: beginning anew would write over what can be saved.
    """
    from checkpoint import CHECKPOINT_NAME, CheckpointError, newest_checkpoint

    found = newest_checkpoint(run)
    if found is None and run.is_dir() and any(CHECKPOINT_NAME.fullmatch(path.name) for path in run.iterdir()):
        raise CheckpointError(
            f"--resume: no checkpoint in {run} is whole: copy one back there, or go on from the weights of a model folder: "
            f"--init-from {run / 'best'} with another --out"
        )
    return found


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


def free_run_folder(preset: str, restart: bool) -> Path:
    """runs/PRESET, or the first of runs/PRESET-2, -3 … that is free; after an elastic restart the newest taken one."""
    base = ROOT / "runs" / Path(preset).stem
    names = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    taken = [name for name in names if (name / "config.toml").exists()]
    if restart and taken:
        return max(taken, key=lambda path: (path / "config.toml").stat().st_mtime)
    return next(name for name in names if not (name / "config.toml").exists())


@dataclass
class Stop:
    """Set by SIGTERM or Ctrl-C: finish the step, save, end. A second Ctrl-C stops at once."""

    reason: str = ""
    previous: dict[int, Any] = field(default_factory=dict)

    def install(self) -> None:
        def handle(number: int, frame: Any) -> None:
            if self.reason and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.reason = signal.Signals(number).name

        with contextlib.suppress(ValueError):  # not the main thread: then nobody sends us signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, handle)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


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


def prepared(folder: Path | None, preset: str) -> Path:
    """The data folder to train on; the preset's own texts are prepared where they are not yet (by the leader alone)."""
    if folder is not None and str(folder).startswith("s3:"):
        from s3 import download_folder, s3_url

        target = ROOT / "data" / "s3" / s3_url(folder).removeprefix("s3://")
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
    import prepare_data

    target = prepare_data.default_out(preset)
    source = str(preset_values(preset).get("data", {}).get("source", ""))
    if not source and not (target / "manifest.json").is_file():
        raise ConfigError(
            [
                f"--preset {preset} has no texts of its own: prepare yours with `python prepare_data.py --input … "
                f"--out data/mine` and add --data data/mine"
            ]
        )
    local = source.endswith(".txt")
    if local or not (target / "manifest.json").is_file():  # local texts may have changed since
        code = prepare_data.main(["--preset", preset, "--out", str(target)])
        if code:
            raise SystemExit(code)
    return target


def origin_shape(origin: str) -> dict[str, Any]:
    """The shape of the model that `--init-from` names, as a [model] table; hub names are downloaded first."""
    from checkpoint import fetch_model, read_model_config

    try:
        return read_model_config(fetch_model(origin)).model_dump()
    except ValueError as error:
        raise ConfigError([f"--init-from {origin}: {str(error).removeprefix(f'--model {origin}: ')}"]) from None


def shape_faults(origin: str, theirs: dict[str, Any], asked: ModelConfig) -> list[str]:
    """What of the asked shape the weights of `origin` do not allow: all but the context and the dropout."""
    free = ("block_size", "dropout", "vocab_used")
    return [
        f"--model.{name.replace('_', '-')} {value}: --init-from {origin} has {theirs[name]}: leave it out (only "
        "--model.block-size and --model.dropout can differ)"
        for name, value in asked.model_dump().items()
        if name not in free and value != theirs[name] and not (name == "vocab_size" and not value)
    ]


def start_model(config: Config, data: TokenData, tokenizer: Tokenizer) -> GPT:
    """A new model of the right vocabulary, or the weights of `config.init_from` with this run's dropout and context.

    Where the texts have styles that the weights do not know yet, these get rows of their own.
    """
    import torch

    from model import GPT

    torch.manual_seed(config.train.seed)
    init_from = config.init_from
    if not init_from:
        return GPT(fitted(config.model, tokenizer))
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
                f"`python prepare_data.py {flag} …`"
            ]
        )
    return model


def fitted(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's settings with the tokenizer's size filled in. Raises ConfigError where it does not fit."""
    size = model.vocab_size or tokenizer.vocab_size
    if tokenizer.styles:  # a preset for GPT-2's 50,257 ids grows by those of the styles
        size = max(size, tokenizer.vocab_size)
    values = model.model_dump() | {"vocab_size": size, "vocab_used": tokenizer.vocab_size}
    return build(ModelConfig, values)


def with_rows(model: GPT, tokens: int) -> GPT:
    """The model with rows for `tokens` ids, the new ones near the mean of the others, so that they start out unlikely."""
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
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # the only buffer is constant, and ranks validate different numbers of batches
        )
    return module


def whole(value: Any) -> Any:
    """A sharded tensor gathered (on all ranks together), anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with full tensors on every rank, whatever is sharded (a joint call under FSDP)."""
    return {name: gathered(value) if isinstance(value, dict) else whole(value) for name, value in state.items()}


def kept_batch(tokens_per_step: int, batch: int, block: int, world: int) -> int:
    """The largest micro-batch up to `batch` that keeps `tokens_per_step` on `world` processes; `batch` if none does."""
    fits = (size for size in range(batch, 0, -1) if tokens_per_step % (size * block * world) == 0)
    return next(fits, batch)


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
