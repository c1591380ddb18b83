"""What a training run will need, before its first step: parameters, memory, speed, time and cost.

    python train.py --preset story-small --plan
    python train.py --preset victorian --plan p4d.24xlarge --price-per-hour 22

On this machine a few real steps are measured in a process of their own; for another machine the speed comes from its data
sheet and an assumed utilisation, which is printed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import ROOT, Config, ConfigError, ModelConfig, TrainConfig, build

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model import GPT


MFU = 0.35  # share of the data sheet's rate assumed at 768 channels; narrower models reach proportionally less
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
COUNTS_BYTES, TEACHER_BYTES = 12, 22  # kept for each counted token: the 3-grams, and a teacher's tables of them
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
    # kept for the backward pass, per token and block: two LayerNorm inputs (float32), their outputs, q k v, attention
    # and its output, both sides of the GELU
    kept = 2 * 4 * C + wide * (2 * C + 3 * C + C + 4 * C + 4 * C) + (4 * H if precision != "fp32" else 0)
    once = 0
    if model.dropout:
        heads = heads_at_once(batch, T, H, model.dropout, device)
        kept += 2 * C + ((2 * wide + 1) * H * T if device == "cpu" and not heads else 0)  # masks; on CPUs the weights
        once = 8 * wide * heads * T  # recomputed: the weights of a few heads, their gradients, what they come from
    rows = min(tokens, chunk_rows(V, torch.device(device)))
    moments = 1.35 if train.optimizer == "muon" else 2
    copies = 2 if precision != "fp32" else 0  # autocast keeps 16-bit copies of the matrices
    return Memory(
        weights=(4 + copies) * count // shards,
        gradients=(4 * count + 4 * V * C) // shards,  # and the head's, while it is computed
        optimizer=int(4 * moments * count) // shards,
        activations=tokens * (model.n_layer * kept + 6 * 4 * C + once),
        logits=rows * V * (4 + 4 + wide),
        runtime=RUNTIME_BYTES.get(device, 1_000_000_000),
    )


def counts_memory(train: TrainConfig, tokens: int, kind: str) -> int:
    """Bytes that the counted n-grams of so many training tokens keep on one device of `kind`; a GPU holds a teacher's only."""
    from training.ngram import MOST_TOKENS
    from training.ngram_teacher import FREQUENT

    counted = min(tokens, MOST_TOKENS)
    teacher = counted * TEACHER_BYTES if train.ngram_teacher or train.sampled_softmax else 0
    teacher += 4 * FREQUENT if counted and train.ngram_teacher and not train.sampled_softmax else 0
    return teacher + (counted * COUNTS_BYTES if kind == "cpu" else 0)


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
    """Largest micro-batch (a power of two, at most 64 on a CPU) within `limit` bytes that divides tokens_per_step; 0 if none does."""
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
    """Batch size that `--train.batch-size 0` means on this device. Raises ConfigError if not even 1 fits."""
    room = available_memory(device)
    found = fitting_batch(model, train, world, room, precision, device.type)
    if not found:
        raise ConfigError([out_of_memory_message(model, train, 1, room, precision, device.type, world)])
    return found


def out_of_memory_message(
    model: ModelConfig, train: TrainConfig, batch: int, room: int, precision: str, device: str, world: int
) -> str:
    """Error message: memory needed, memory available, and flags that would fit."""
    need = memory_needed(model, train, batch, precision, device).total
    text = f"--train.batch-size {batch} at --model.block-size {model.block_size} needs about {gigabytes(need)}, {gigabytes(room)} are available: "
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


@dataclass(frozen=True)
class Costs:
    """What the parts of a run take on one machine, in seconds."""

    step_s: float  # an optimizer step
    eval_s: float = 0.0  # a token of validation
    sample_s: float = 0.0  # a token of a sample
    save_s: float = 0.0  # writing the weights once
    counting_s: float = 0.0  # counting n-grams and the start made of them
    peak_bytes: float | None = None  # most memory held, where it was measured


def measure_here(
    config: Config, batch: int, accumulate: int, precision: str, steps: int = 4, data: Path | None = None
) -> Costs:
    """Measure a few real steps, an evaluation, a sample and a checkpoint in a process of their own.

    accumulate: micro-batches in a step. data: prepared texts, whose n-grams are counted if the settings say so. Raises ConfigError if the process runs out of memory.
    """
    train = config.train
    counts = train.ngram_start or train.ngram_teacher or train.sampled_softmax
    taught = str(data) if data and counts else ""
    job = {"config": config.model_dump(), "batch": batch, "precision": precision, "steps": steps, "taught": taught}
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
    step_s = found["micro_batch_s"] * accumulate + found["update_s"]
    return Costs(step_s, found["eval_s"], found["sample_s"], found["save_s"], found["counting_s"], found["bytes"])


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


def benchmark_steps(job: dict[str, Any]) -> dict[str, float]:
    """Work of the measured process: steps as the training loop takes them, on random tokens, at least `steps` and 4 seconds.

    Seconds of a micro-batch, of the rest of a step, of a token validated or sampled, of writing the weights; peak bytes.
    """
    import torch

    from devices import DistributedContext, pick_device
    from model import GPT
    from training.counting import counted_trial
    from training.model_setup import wrapped
    from training.optimizer import Optimizer
    from training.split import step_threads, with_parts
    from training.step import take_step

    config, precision = build(Config, job["config"]), job["precision"]
    device = pick_device(config.train.device)
    distributed = DistributedContext(0, 1, "none", device)
    model = GPT(config.model).to(device)
    train, _ = with_parts(config.train, config.model, job["batch"], distributed)
    module = wrapped(model, config.model_copy(update={"train": train}), distributed, device)
    optimizer = Optimizer(model, config.train)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    batches = random_batches(job["batch"], config.model, device)
    soft, counting_s = None, 0.0
    if taught := job.get("taught"):
        began = time.perf_counter()
        soft, batches = counted_trial(Path(taught), job["batch"], model, config.train)
        counting_s = time.perf_counter() - began

    def step(accumulate: int) -> None:
        take_step(module, optimizer, scaler, batches, accumulate, config.train, precision, distributed, soft)

    # steps of one micro-batch and of two in turn: their difference is a micro-batch, what remains is the update
    timings: dict[int, list[float]] = {1: [], 2: []}
    with step_threads(module):
        step(1)
        began = time.perf_counter()
        while len(timings[2]) < job["steps"] or (time.perf_counter() - began < 4 and len(timings[2]) < 50):
            for accumulate, found in timings.items():
                found.append(timed(functools.partial(step, accumulate), device))
        rest = benchmark_non_training(config, model, module, batches, precision, device)
    once, twice = (statistics.median(found) for found in timings.values())
    micro_batch_s = max(twice - once, 0.3 * once)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory()
    return {
        "micro_batch_s": micro_batch_s,
        "update_s": max(0.0, once - micro_batch_s),
        "bytes": float(peak),
        "counting_s": counting_s,
        **rest,
    }


def random_batches(batch: int, model: ModelConfig, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless micro-batches (x, y) of random tokens, each [batch, T]."""
    import torch

    while True:
        x = torch.randint(0, model.tokens, (batch, model.block_size))
        yield x.to(device), x.roll(1).to(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, what it has started on a GPU included."""
    import torch

    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def benchmark_non_training(
    config: Config,
    model: GPT,
    module: torch.nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    precision: str,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of a token of validation (`eval_s`) and of a sample (`sample_s`), and of writing the weights (`save_s`)."""
    import tempfile

    import torch

    from devices import autocast
    from inference.writing import eval_mode
    from storage.atomic import write_tensors
    from training.metrics import RunLog

    sampled = min(16, config.model.block_size)

    def evaluate() -> None:
        with eval_mode(module), autocast(device, precision):
            float(module(*next(batches)))

    def sample() -> None:
        cache = model.new_cache(1)
        for at in range(sampled):
            model.decode([at % config.model.tokens], cache, [0])

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        log = RunLog(Path(folder), total_steps=1, tensorboard=config.train.tensorboard)
        log.metrics({"step": 1, "train_loss": 1.0})  # a run's memory includes that of its records
        evaluate()
        eval_s = timed(evaluate, device) / next(batches)[0].numel()
        with eval_mode(model):
            sample()
            sample_s = timed(sample, device) / sampled
        save_s = timed(lambda: write_tensors(Path(folder) / "weights", model.state_dict()), device)
        log.close()
    return {"eval_s": eval_s, "sample_s": sample_s, "save_s": save_s}


def non_training_time(train: TrainConfig, steps: int, epochs: float, val_tokens: int, costs: Costs) -> dict[str, float]:
    """Seconds that a run of `steps` spends on evaluation, samples and checkpoints, if each evaluation is a new best."""
    ends = math.floor(epochs) if train.each_epoch else 0
    evaluations = (math.ceil(steps / train.eval_interval) if train.eval_interval else 1) + ends
    samples = (1 + steps // train.sample_interval if train.sample_interval else 0) + ends
    saves = 1 + (steps // train.checkpoint_interval if train.checkpoint_interval else 0)
    if train.checkpoint_minutes:
        saves += int(steps * costs.step_s / 60 / train.checkpoint_minutes)
    return {
        "evaluation": evaluations * min(train.eval_tokens or val_tokens, val_tokens) * costs.eval_s,
        "samples": samples * train.sample_tokens * costs.sample_s,
        "checkpoints": (evaluations + 3 * saves) * costs.save_s,  # two moments beside the weights
        "counting": costs.counting_s,
    }


def corpus_tokens(preset: str, config: Config, data: Path | None) -> tuple[int, int]:
    """(training, validation) tokens of the data that would be used; a published figure if it is not prepared yet."""
    from corpus.preparation import default_out
    from storage.shards import Manifest

    folder = data or default_out(preset)
    if (folder / "manifest.json").is_file():
        splits = Manifest.load(folder).splits
        return splits.train.tokens, splits.val.tokens
    return CORPUS_TOKENS.get(config.data.source, 0), config.train.eval_tokens


def vocabulary(preset: str, config: Config, data: Path | None) -> ModelConfig:
    """The model's settings with the vocabulary that the data has, or at most will have."""
    from config import GPT2_TOKENS
    from corpus.preparation import default_out
    from storage.shards import Manifest

    folder = data or default_out(preset)
    if (folder / "manifest.json").is_file():
        tokenizer = Manifest.load(folder).tokenizer
        used = tokenizer.vocab_size
        if tokenizer.styles and 0 < config.model.vocab_size < used:  # as model_setup.fitted does
            return build(ModelConfig, config.model.model_dump() | {"vocab_size": used, "vocab_used": used})
    else:
        used = {"gpt2": GPT2_TOKENS, "char": 100}.get(config.data.tokenizer, config.data.vocab_size)
    return build(
        ModelConfig, config.model.model_dump() | {"vocab_size": config.model.vocab_size or used, "vocab_used": used}
    )


@dataclass(frozen=True)
class Machine:
    """What a plan is made for: this machine, or one from the tables."""

    label: str
    kind: str  # of device: cpu, cuda …
    precision: str
    world: int  # devices
    memory: int  # bytes of one device that a run may use
    gpu: str = ""  # its name in the tables; empty: this machine, which is measured
    warning: str = ""


def this_machine(train: TrainConfig) -> Machine:
    """The device that training would use here."""
    from devices import device_name, pick_device, pick_precision

    device = pick_device(train.device)
    precision, warning = pick_precision(train.precision, device)
    return Machine(device_name(device), device.type, precision, 1, available_memory(device), warning=warning)


def named_machine(target: str, train: TrainConfig) -> Machine:
    """A GPU or an AWS instance by name. Raises ConfigError if the tables do not have it."""
    world, gpu = INSTANCES.get(target, (1, target.upper()))
    match = gpu if gpu in GPU_MEMORY else next((key for key in GPU_MEMORY if key in gpu), None)
    if match is None:
        known = ", ".join([*INSTANCES, *GPU_MEMORY])
        raise ConfigError([f"--plan {target}: unknown; choose `here` or one of {known}"])
    precision = "bf16" if train.precision == "auto" else train.precision
    return Machine(
        f"{world} x {match} ({target})", "cuda", precision, world, int(GPU_MEMORY[match] * 0.95e9), gpu=match
    )


@dataclass(frozen=True)
class Outline:
    """What is known of a run before anything is measured."""

    preset: str
    config: Config  # with the vocabulary filled in
    parts: list[tuple[str, int, int]]  # (component, parameters, bytes), the total last
    flops_per_token: float
    machine: Machine
    batch_size: int
    grad_accum_steps: int
    tokens_per_step: int
    estimated_bytes: int  # of memory on one device
    steps: int  # 0: only time limits the run, or passes over texts that are not prepared yet
    corpus: int  # training tokens, 0 if unknown
    val_tokens: int
    data: Path  # where the prepared texts are, or would be


@dataclass(frozen=True)
class Plan(Outline):
    """What a run will need."""

    costs: Costs
    basis: str  # of the speed: measured or assumed
    non_training_s: dict[str, float]  # evaluation, samples, checkpoints

    @property
    def tokens_per_s(self) -> float:
        """In the steps alone."""
        return self.tokens_per_step / self.costs.step_s

    @property
    def total_s(self) -> float:
        """Seconds from the first step to the last checkpoint."""
        return self.steps * self.costs.step_s + sum(self.non_training_s.values())


def spec_sheet_estimate(machine: Machine, flops_per_token: float, tokens_per_step: int) -> tuple[Costs, str]:
    """(costs, basis) from the GPU's data sheet. Raises ConfigError for a precision that it does not list."""
    from devices import peak_flops

    rate = peak_flops(machine.gpu, machine.precision)
    if rate is None:
        raise ConfigError(
            [f"--train.precision {machine.precision}: {machine.gpu} has no figure for it: try --train.precision fp16"]
        )
    token_s = flops_per_token / (machine.world * rate * MFU)
    basis = f"{MFU:.0%} of {rate * machine.world / 1e12:,.0f} TFLOP/s assumed"
    return Costs(tokens_per_step * token_s, eval_s=token_s / 3), basis  # forward alone is a third of training


def make_plan(preset: str, config: Config, data: Path | None, target: str) -> Plan:
    """Work out what a run needs. Raises ConfigError if it cannot fit.

    data: the prepared texts; None: the preset's own. target: `here`, a GPU's name or an AWS instance.
    """
    return completed(outline(preset, config, data, target))


def outline(preset: str, config: Config, data: Path | None, target: str) -> Outline:
    """The part of `make_plan` that takes no measuring."""
    import torch

    from corpus.preparation import default_out
    from model import GPT
    from training.schedule import total_steps
    from training.step import grad_accum_steps

    # 1 model and machine
    model, train = vocabulary(preset, config, data), config.train
    config = config.model_copy(update={"model": model})
    with torch.device("meta"):
        gpt = GPT(model)
    machine = this_machine(train) if target == "here" else named_machine(target, train)

    # 2 memory, and with it the batch
    corpus, val_tokens = corpus_tokens(preset, config, data)
    counts = counts_memory(train, corpus, machine.kind)
    shards = machine.world if train.parallel == "fsdp" else 1
    fits = (machine.precision, machine.kind, shards)
    batch = train.batch_size or fitting_batch(model, train, machine.world, machine.memory - counts, *fits)
    need = memory_needed(model, train, max(1, batch), *fits).total + counts
    if not batch or need > machine.memory:
        message = out_of_memory_message(
            model, train, max(1, batch), machine.memory, machine.precision, machine.kind, machine.world
        )
        raise ConfigError([message])
    accumulate = grad_accum_steps(train, batch, model.block_size, machine.world)
    tokens_per_step = accumulate * batch * machine.world * model.block_size

    # 3 the number of steps
    per_epoch = max(1, math.ceil(corpus / model.block_size))
    counted = train if corpus else train.model_copy(update={"epochs": 0.0})  # of texts that are not there yet
    steps = total_steps(counted, per_epoch, tokens_per_step // model.block_size, model.block_size)
    return Outline(
        preset,
        config,
        gpt.report(),
        gpt.flops_per_token(),
        machine,
        batch,
        accumulate,
        tokens_per_step,
        need,
        steps,
        corpus,
        val_tokens,
        data or default_out(preset),
    )


def completed(known: Outline) -> Plan:
    """An outline with what a run costs: measured on this machine, or from the data sheet of another."""
    from storage.shards import MANIFEST

    if known.machine.gpu:
        costs, basis = spec_sheet_estimate(known.machine, known.flops_per_token, known.tokens_per_step)
    else:
        taught = known.data if (known.data / MANIFEST).is_file() else None
        costs = measure_here(
            known.config, known.batch_size, known.grad_accum_steps, known.machine.precision, data=taught
        )
        basis = "measured over a few steps"
    epochs = known.steps * known.tokens_per_step / known.corpus if known.corpus else 0.0
    elsewhere = non_training_time(known.config.train, known.steps, epochs, known.val_tokens, costs)
    return Plan(**vars(known), costs=costs, basis=basis, non_training_s=elsewhere)


if __name__ == "__main__":
    from cli import help_alone

    help_alone(__doc__)
    print(json.dumps(benchmark_steps(json.load(sys.stdin))))
