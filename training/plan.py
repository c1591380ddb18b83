"""What a training run will need, before its first step: parameters, memory, speed, time and cost.

    python train.py --preset story-small --plan
    python train.py --preset victorian --plan p4d.24xlarge --price-per-hour 22

On this machine a few real steps are taken in a process of their own and measured; for another machine the speed comes
from its data sheet and a stated utilisation.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import ROOT, Config, ConfigError, ModelConfig, TrainConfig, build

if TYPE_CHECKING:
    import torch


MFU = 0.40  # share of the data sheet's rate assumed at 768 channels; narrower models reach proportionally less
GPU_MEMORY = {
    "H200": 141,
    "H100": 80,
    "B200": 180,
    "A100-80": 80,
    "A100": 40,
    "A10G": 24,
    "L40S": 48,
    "L4": 24,
    "V100": 16,
    "T4": 16,
}
INSTANCES = {  # AWS instance: (GPUs, name in the tables)
    "p4d.24xlarge": (8, "A100"),
    "p4de.24xlarge": (8, "A100-80"),
    "p5.48xlarge": (8, "H100"),
    "p5en.48xlarge": (8, "H200"),
    "p6-b200.48xlarge": (8, "B200"),
    "g4dn.xlarge": (1, "T4"),
    "g5.xlarge": (1, "A10G"),
    "g5.48xlarge": (8, "A10G"),
    "g6.xlarge": (1, "L4"),
    "g6e.xlarge": (1, "L40S"),
}
CORPUS_TOKENS = {
    "pg19": 2_900_000_000,
    "tinystories": 470_000_000,
    "tinyshakespeare": 301_000,
}  # until they are prepared
RUNTIME_BYTES = {"cpu": 450_000_000, "cuda": 1_500_000_000}  # Python, torch and its libraries before any tensor


@dataclass(frozen=True)
class Memory:
    """Bytes a training step needs on one device, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def memory_needed(
    model: ModelConfig, train: TrainConfig, batch: int, precision: str, device: str, shards: int = 1
) -> Memory:
    """Estimate for one device at micro-batch `batch`; `shards` divides weights, gradients and moments (FSDP)."""
    import torch

    from loss import chunk_rows
    from model import GPT, heads_at_once

    with torch.device("meta"):
        count = GPT(model).num_parameters()
    C, T, H, V = model.n_embd, model.block_size, model.n_head, model.vocab_size
    wide = 4 if precision == "fp32" else 2
    tokens = batch * T
    # kept for backward a token and block: two LayerNorm inputs (float32), their outputs, q k v, attention and its
    # output, both sides of the GELU
    kept = 2 * 4 * C + wide * (2 * C + 3 * C + C + 4 * C + 4 * C) + (4 * H if precision != "fp32" else 0)
    once = 0
    if model.dropout:
        heads = heads_at_once(batch, T, H, model.dropout, device)
        kept += 2 * C + ((2 * wide + 1) * H * T if device == "cpu" and not heads else 0)  # masks; CPUs hold the weights
        once = 8 * wide * heads * T  # or those of few heads, their gradients, and what forms them
    rows = min(tokens, chunk_rows(V, torch.device(device)))
    moments = 1.35 if train.optimizer == "muon" else 2
    copies = 2 if precision != "fp32" else 0  # autocast keeps narrow copies of the matrices
    return Memory(
        weights=(4 + copies) * count // shards,
        gradients=(4 * count + 4 * V * C) // shards,  # and the head's share while it is formed
        optimizer=int(4 * moments * count) // shards,
        activations=tokens * (model.n_layer * kept + 6 * 4 * C + once),
        logits=rows * V * (4 + 4 + wide),
        runtime=RUNTIME_BYTES.get(device, 1_000_000_000),
    )


def available_memory(device: torch.device) -> int:
    """Bytes this process may use: free GPU memory, or what the system and the container leave."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    for name, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, current = Path("/sys/fs/cgroup") / name, Path("/sys/fs/cgroup") / used
        if limit.is_file() and current.is_file() and limit.read_text().strip().isdigit():
            free = min(free, int(limit.read_text()) - int(current.read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fitting_batch(
    model: ModelConfig, train: TrainConfig, world: int, limit: int, precision: str, device: str, shards: int = 1
) -> int:
    """Largest micro-batch (a power of two, at most 64 on a CPU) within `limit` bytes that divides tokens_per_step; 0: none."""
    found = 0
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        once = batch * model.block_size * world
        divides = not train.tokens_per_step or train.tokens_per_step % once == 0
        if device == "cpu" and batch > 64:
            break
        if divides and memory_needed(model, train, batch, precision, device, shards).total <= 0.9 * limit:
            found = batch
    return found


def largest_batch(
    model: ModelConfig, train: TrainConfig, block: int, world: int, device: torch.device, precision: str
) -> int:
    """What `--train.batch-size 0` stands for on this device. Raises ConfigError where not even 1 fits."""
    room = available_memory(device)
    found = fitting_batch(model, train, world, room, precision, device.type)
    if not found:
        raise ConfigError([too_large(model, train, 1, room, precision, device.type, world)])
    return found


def too_large(
    model: ModelConfig, train: TrainConfig, batch: int, room: int, precision: str, device: str, world: int
) -> str:
    """The refusal: what is needed, what is there, and flags that would fit."""
    need = memory_needed(model, train, batch, precision, device).total
    text = f"--train.batch-size {batch} at --model.block-size {model.block_size} needs about {gigabytes(need)}, {gigabytes(room)} are there: "
    fits = fitting_batch(model, train, world, room, precision, device)
    if fits:
        return text + f"try --train.batch-size {fits}"
    if world > 1 and (fits := fitting_batch(model, train, world, room, precision, device, shards=world)):
        return text + f"try --train.parallel fsdp --train.batch-size {fits}"
    blocks = [model.block_size, *(block for block in (1024, 512, 256, 128, 64) if block < model.block_size)]
    layers, heads = model.n_layer, model.n_head
    while layers and heads:
        for block in blocks:
            shape = {"n_layer": layers, "n_head": heads, "n_embd": heads * model.head_size, "block_size": block}
            smaller = model.model_copy(update=shape)
            if memory_needed(smaller, train, 1, precision, device).total <= 0.9 * room:
                changed = {name: value for name, value in shape.items() if value != getattr(model, name)}
                flags = [f"--model.{name.replace('_', '-')} {value}" for name, value in changed.items()]
                return text + " ".join(["try", *flags, "--train.batch-size 1"])
        layers, heads = (0, 0) if layers == heads == 1 else (max(1, layers // 2), max(1, heads // 2))
    return text + "too little for any model of this vocabulary: use a machine with more memory"


def gigabytes(count: float) -> str:
    """Bytes in readable units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def measure_here(config: Config, batch: int, precision: str, steps: int = 4) -> dict[str, float]:
    """Take a few real steps in a process of their own, and one look, sample and checkpoint: {"seconds" a micro-step,
    "update_s" a step's rest, "look_s" and "sample_s" a token, "save_s" the weights, "bytes" at the peak}.

    Raises ConfigError where the process runs out of memory.
    """
    job = {"config": config.model_dump(), "batch": batch, "precision": precision, "steps": steps}
    done = subprocess.run(
        [sys.executable, "-m", "training.plan"],
        cwd=ROOT,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
        raise ConfigError([f"the trial steps at --train.batch-size {batch} failed: {reason[0]}: try a smaller one"])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_memory() -> int:
    """Most memory this process has held at once, in bytes."""
    with contextlib.suppress(
        OSError, StopIteration, ValueError
    ):  # getrusage's figure may be that of the parent process
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trial(job: dict[str, Any]) -> dict[str, float]:
    """The measured process: steps as the training loop takes them, on random tokens, at least `steps` and 4 seconds."""
    import tempfile
    import time

    import torch

    from devices import Team, autocast, pick_device
    from model import GPT
    from storage.atomic import write_tensors
    from training.metrics import RunLog
    from training.model_setup import wrapped
    from training.optimizer import Optimizer
    from training.step import eval_mode, take_step

    config = build(Config, job["config"])
    device = pick_device(config.train.device)
    team = Team(0, 1, "none", device)
    model = GPT(config.model).to(device)
    module = wrapped(model, config, team, device)
    optimizer = Optimizer(model, config.train)
    scaler = torch.amp.GradScaler(device.type, enabled=job["precision"] == "fp16")
    shape = (job["batch"], config.model.block_size)

    def batches() -> Any:
        while True:
            x = torch.randint(0, config.model.tokens, shape)
            yield x.to(device), x.roll(1).to(device)

    def timed(work: Any) -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    source = batches()
    timings: dict[int, list[float]] = {1: [], 2: []}

    def step(micro: int) -> None:
        take_step(module, optimizer, scaler, source, micro, config.train, job["precision"], team)

    step(1)
    began = time.perf_counter()
    while len(timings[2]) < job["steps"] or (time.perf_counter() - began < 4 and len(timings[2]) < 50):
        for micro, found in timings.items():
            found.append(timed(lambda micro=micro: step(micro)))
    once, twice = (statistics.median(found) for found in timings.values())

    def look() -> None:
        with eval_mode(module), autocast(device, job["precision"]):
            float(module(*next(source)))

    def write() -> None:
        cache = model.new_cache(1)
        for at in range(min(16, config.model.block_size)):
            model.decode([at % config.model.tokens], cache, [0])

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        log = RunLog(Path(folder), total_steps=1, tensorboard=config.train.tensorboard)
        log.metrics({"step": 1, "train_loss": 1.0})
        look()
        look_s = timed(look) / (shape[0] * shape[1])
        with eval_mode(model):
            write()
            sample_s = timed(write) / min(16, config.model.block_size)
        save_s = timed(lambda: write_tensors(Path(folder) / "weights", model.state_dict()))
        log.close()
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory()
    seconds = max(twice - once, 0.3 * once)
    rest = {"look_s": look_s, "sample_s": sample_s, "save_s": save_s}
    return {"seconds": seconds, "update_s": max(0.0, once - seconds), "bytes": float(peak), **rest}


def besides(
    train: TrainConfig, steps: int, epochs: float, val_tokens: int, found: dict[str, float]
) -> dict[str, float]:
    """Seconds a run of `steps` spends on evaluation, samples and checkpoints, each evaluation a new best.

    found: "look_s", "sample_s" and "save_s" as `trial` measures them, and "step_s", of a step.
    """
    ends = math.floor(epochs) if train.each_epoch else 0
    looks = (math.ceil(steps / train.eval_interval) if train.eval_interval else 1) + ends
    samples = (1 + steps // train.sample_interval if train.sample_interval else 0) + ends
    saves = 1 + (steps // train.checkpoint_interval if train.checkpoint_interval else 0)
    if train.checkpoint_minutes:
        saves += int(steps * found["step_s"] / 60 / train.checkpoint_minutes)
    return {
        "evaluation": looks * min(train.eval_tokens or val_tokens, val_tokens) * found["look_s"],
        "samples": samples * train.sample_tokens * found["sample_s"],
        "checkpoints": (looks + 3 * saves) * found["save_s"],  # two moments beside the weights
    }


def corpus_tokens(preset: str, config: Config, data: Path | None) -> tuple[int, int]:
    """Training and validation tokens of the data that would be used; a published figure where it is not prepared yet."""
    from corpus.preparation import default_out
    from storage.shards import Manifest

    folder = data or default_out(preset)
    if (folder / "manifest.json").is_file():
        splits = Manifest.load(folder).splits
        return splits.train.tokens, splits.val.tokens
    return CORPUS_TOKENS.get(config.data.source, 0), config.train.eval_tokens


def vocabulary(preset: str, config: Config, data: Path | None) -> ModelConfig:
    """The model's settings with the vocabulary the data has, or will have at most."""
    from config import GPT2_TOKENS
    from corpus.preparation import default_out
    from storage.shards import Manifest

    folder = data or default_out(preset)
    if (folder / "manifest.json").is_file():
        tokenizer = Manifest.load(folder).tokenizer
        used = tokenizer.vocab_size
        if tokenizer.styles and 0 < config.model.vocab_size < used:  # as runs.fitted does
            return build(ModelConfig, config.model.model_dump() | {"vocab_size": used, "vocab_used": used})
    else:
        used = {"gpt2": GPT2_TOKENS, "char": 100}.get(config.data.tokenizer, config.data.vocab_size)
    return build(
        ModelConfig, config.model.model_dump() | {"vocab_size": config.model.vocab_size or used, "vocab_used": used}
    )


def main_plan(preset: str, config: Config, data: Path | None, target: str, price_per_hour: float = 0.0) -> int:
    """Print the plan on standard output. Raises ConfigError where the run cannot fit.

    data: the prepared texts; none: the preset's own. target: `here`, a GPU's name or an AWS instance. price_per_hour: of
    the target, in any currency; 0 leaves the cost out.
    """
    import torch

    from corpus.preparation import default_out
    from devices import device_name, peak_flops, pick_device, pick_precision
    from model import GPT
    from training.metrics import duration
    from training.step import grad_accum_steps, total_steps

    model, train = vocabulary(preset, config, data), config.train
    config = config.model_copy(update={"model": model})
    with torch.device("meta"):
        shape = GPT(model)
    print(f"{preset}: {config.description}")
    for name, count, size in shape.report():
        print(f"  {name:<20} {count:>13,} parameters {size / 1e6:>9.1f} MB")
    here = target == "here"
    if here:
        device = pick_device(train.device)
        precision, warning = pick_precision(train.precision, device)
        world, room, kind, label = 1, available_memory(device), device.type, device_name(device)
        if warning:
            print(f"note: {warning}")
    else:
        world, gpu = INSTANCES.get(target, (1, target.upper()))
        match = gpu if gpu in GPU_MEMORY else next((key for key in GPU_MEMORY if key in gpu), None)
        if match is None:
            known = ", ".join([*INSTANCES, *GPU_MEMORY])
            raise ConfigError([f"--plan {target}: unknown; choose `here` or one of {known}"])
        precision = "bf16" if train.precision == "auto" else train.precision
        room, kind, label = int(GPU_MEMORY[match] * 0.95e9), "cuda", f"{world} x {match} ({target})"
    shards = world if train.parallel == "fsdp" else 1
    batch = train.batch_size or fitting_batch(model, train, world, room, precision, kind, shards)
    need = memory_needed(model, train, max(1, batch), precision, kind, shards)
    if not batch or need.total > room:
        raise ConfigError([too_large(model, train, max(1, batch), room, precision, kind, world)])
    micro = grad_accum_steps(train, batch, model.block_size, world)
    tokens_per_step = micro * batch * world * model.block_size
    corpus, val_tokens = corpus_tokens(preset, config, data)
    per_epoch = max(1, math.ceil(corpus / model.block_size))
    steps = total_steps(train, per_epoch, tokens_per_step // model.block_size, model.block_size)
    print(f"on {label}, {precision}: micro-batch {batch} x {micro} accumulated = {tokens_per_step:,} tokens a step")
    if here:
        found = measure_here(config, batch, precision)
        seconds, used = found["seconds"] * micro + found["update_s"], found["bytes"]
        print(f"memory: {gigabytes(used)} measured of {gigabytes(room)} free (estimated {gigabytes(need.total)})")
        speed, how = tokens_per_step / seconds, "measured over a few steps"
        found["step_s"] = seconds
    else:
        rate = peak_flops(match or "", precision)
        if rate is None:
            raise ConfigError(
                [f"--train.precision {precision}: {match} has no figure for it: try --train.precision fp16"]
            )
        speed, how = (
            world * rate * MFU / shape.flops_per_token(),
            f"{MFU:.0%} of {rate * world / 1e12:,.0f} TFLOP/s assumed",
        )
        forward = shape.flops_per_token() / 3 / (world * rate * MFU)
        found = {"step_s": tokens_per_step / speed, "look_s": forward, "sample_s": 0.0, "save_s": 0.0}
        print(f"memory: about {gigabytes(need.total)} of {gigabytes(room)} a GPU")
    print(f"speed: {speed:,.0f} tokens/s ({how})")
    if not steps:
        print(
            f"ends by the clock after {train.max_minutes:g} minutes: about {speed * train.max_minutes * 60:,.0f} tokens"
        )
        return 0
    passed = steps * tokens_per_step / corpus if corpus else 0.0
    extra = besides(train, steps, passed, val_tokens, found)
    total_s = steps * tokens_per_step / speed + sum(extra.values())
    passes = f" = {passed:.1f} passes over {corpus:,} tokens" if corpus else ""
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in extra.items() if seconds >= 1)
    print(
        f"time: {duration(total_s)} for {steps:,} steps, {steps * tokens_per_step:,} tokens{passes}{f' (of it {parts})' if parts else ''}"
    )
    if train.max_minutes and total_s > train.max_minutes * 60:
        print(
            f"note: --train.max-minutes {train.max_minutes:g} ends it after {train.max_minutes * 60 / total_s:.0%} of that"
        )
    if price_per_hour:
        print(f"cost: {total_s / 3600 * price_per_hour:,.2f} at {price_per_hour:g} an hour")
    if not corpus:
        print(f"note: no prepared texts in {data or default_out(preset)} yet, so epochs are not counted")
    return 0


if __name__ == "__main__":
    print(json.dumps(trial(json.load(sys.stdin))))
