"""All settings from the training time alone: the best model that this machine can train on this text in so many minutes.

    python train.py --input my_books/ --minutes 10
    python train.py --data data/mine --minutes 60

The machine is measured for a few seconds; compute and text then determine vocabulary, size, context, batch and rates.
The arithmetic and what it was tuned on: docs/decisions.md, "One dial".
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ROOT, Config, ConfigError, ModelConfig, TrainConfig, build, to_toml

# (layers, width) from small to large; a head has 64 channels, or 32 where 64 do not divide the width
SIZES = (
    (2, 64),
    (2, 96),
    (2, 128),
    (3, 128),
    (3, 160),
    (4, 192),
    (4, 256),
    (5, 320),
    (6, 384),
    (8, 512),
    (10, 640),
    (12, 768),
    (16, 1024),
)
VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
REFERENCE = 5e12  # FLOPs: about a minute of two cores, where the rules below were tuned
MOST_EPOCHS = 30.0  # passes after which more training on a text only overfits
BYTES_PER_TOKEN = 3.5  # English prose, vocabularies of 2,048 to 8,192
PREPARE_RATE = 1.2e6  # bytes of text per second and core for training a vocabulary and encoding, at the slowest
PREPARE_SHARE = 0.3  # of the time at most, for preparing
LEARNING_SHARE = 0.6  # of that, for reading what a vocabulary is learned from
ASSUMED_RATE = (5e10, 5e13)  # FLOP/s of a processor and of a GPU, to choose the model that the machine is measured with
START_S = 5.0  # seconds for building the model and opening files, and at the end for the last folders and charts
COUNTED_FROM = 5e4  # bytes of text from which on n-grams are counted: the smallest that was tried (docs/experiments.md)
COUNTED_SHARE = 0.4  # of the time at most, for counting and the start
COUNTED_WIDTH = 128  # the fewest channels of a model that starts from counts: narrower ones cannot hold the bigrams
COUNTED_VOCABULARY = 65536  # the most ids for which the start is worth its time
SAMPLED = 2048  # ids that a step's softmax computes where it starts from counts, of twice as many or more
SAMPLED_COST = 1.8  # what one of them takes, with drawing and gathering, of an id in a whole softmax
MEASURED_IDS = 8192  # of the model that the machine is measured with, at most: it computes them all
COUNTED_HALF = 1.5e6  # tokens after which the counted n-grams teach half as much
COUNT_RATE = 3e6  # tokens counted in a second
EMBEDDING_S = 1.2e-6  # seconds that the start takes for each number of an embedding, besides its steps' products


@dataclass(frozen=True)
class Budget:
    """What a run may use: compute in FLOPs, text in UTF-8 bytes for training."""

    flops: float
    text: float


def model_config(layers: int, width: int, budget: Budget, vocab: int, counted: bool = False) -> ModelConfig:
    """The ModelConfig of one size; a wider model gets a longer context, one that starts from counts a head of its own."""
    block = 64 if width < 192 else 128 if width < 256 else 256 if width < 512 else 512 if width < 768 else 1024
    most = int(budget.text / BYTES_PER_TOKEN / 20)  # at least some twenty different windows in a tiny text
    while block > 32 and block > most:
        block //= 2
    return ModelConfig(
        n_layer=layers,
        n_head=width // (64 if width % 64 == 0 else 32),
        n_embd=width,
        block_size=block,
        vocab_size=vocab,
        tied_head=not counted,
    )


def counting_helps(device: str, text: float, vocab: int) -> bool:
    """Whether n-grams should be counted, for this kind of device, bytes of text and ids (0: not chosen yet).

    A small text has too few of them, a large vocabulary makes the start slow, and on GPUs it has not been measured.
    """
    return device == "cpu" and text >= COUNTED_FROM and vocab <= COUNTED_VOCABULARY


def counting_s(model: ModelConfig, text: float, rate: float) -> float:
    """Seconds for counting and for the start made of it, at `rate` FLOP/s."""
    from training.ngram import MOST_TOKENS
    from training.ngram_start import POLISH_CONTEXTS, POLISH_STEPS

    ids = SAMPLED_COST * sampled_ids(model) or model.vocab_size
    steps = POLISH_STEPS * POLISH_CONTEXTS * 6.0 * ids * model.n_embd
    embedding_s = EMBEDDING_S * model.vocab_size * model.n_embd
    return min(MOST_TOKENS, text / BYTES_PER_TOKEN) / COUNT_RATE + embedding_s + 1.3 * steps / rate


def sampled_ids(model: ModelConfig) -> int:
    """Ids that the softmax computes in training, 0 for all: a model with a head of its own starts from counts, which can draw."""
    return SAMPLED if not model.tied_head and model.vocab_size > 2 * SAMPLED else 0


def flops_per_token(model: ModelConfig) -> float:
    """FLOPs of training on one token: 6 N + 12 L C T without the position table (as GPT.flops_per_token), or what takes as long."""
    ids = SAMPLED_COST * sampled_ids(model) or model.vocab_size
    matrices = 12 * model.n_layer * model.n_embd**2 + ids * model.n_embd
    return 6.0 * matrices + 12.0 * model.n_layer * model.n_embd * model.block_size


def fitting_vocabulary(width: int, text: float, counted: bool = False) -> int:
    """Ids of a new vocabulary: 4096, or 32 per channel if that is more, but each should occur some fifty times in the text.

    With counted n-grams 32,768: they reach further with longer tokens, and a sampled softmax makes a large vocabulary cheap.
    """
    most = min(VOCABULARIES[-1] if counted else max(4096, 32 * width), text / BYTES_PER_TOKEN / 50)
    return max([size for size in VOCABULARIES if size <= most], default=VOCABULARIES[0])


def choose_model(budget: Budget, vocab: int = 0, counted: bool = False) -> ModelConfig:
    """The model size whose ratio of training tokens to block parameters is nearest to the optimum for this compute.

    That is 10 for a minute on two cores and about 20 for an hour on a GPU (Hoffmann et al. 2022).

    vocab: ids of texts that are prepared already; 0 chooses. counted: the model starts from counts. A text that would be
    read more than MOST_EPOCHS times counts as so many times its length.
    """
    candidates = []
    most = MOST_EPOCHS * budget.text / BYTES_PER_TOKEN
    for layers, width in SIZES:
        if counted and width < COUNTED_WIDTH:
            continue
        ids = vocab or fitting_vocabulary(width, budget.text, counted)
        model = model_config(layers, width, budget, ids, counted)
        tokens = min(budget.flops / flops_per_token(model), most)
        good = 10.0 * (tokens * flops_per_token(model) / REFERENCE) ** 0.06
        ratio = tokens / (12 * layers * width**2)
        candidates.append((abs(math.log(ratio / good)), model))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def choose_training(model: ModelConfig, budget: Budget, minutes: float, fits: int) -> tuple[dict[str, Any], float]:
    """([train] table, dropout) for this shape; `fits`: the largest micro-batch that memory holds.

    The batch grows with the cube root of the compute, as longer training gains from less noise; rates fall with the width.
    """
    tokens = budget.flops / flops_per_token(model)
    epochs = tokens * BYTES_PER_TOKEN / budget.text
    sequences = 2 ** max(0, round(math.log2(2048 * (budget.flops / REFERENCE) ** (1 / 3) / model.block_size)))
    batch = min(sequences, fits)
    steps = tokens / (sequences * model.block_size)
    values = {
        "batch_size": batch,
        "tokens_per_step": sequences * model.block_size,
        "max_steps": 0,
        "epochs": 0.0,
        "max_minutes": minutes,
        "optimizer": "muon",
        "lr": float(f"{8e-3 * math.sqrt(128 / model.n_embd):.2g}"),
        "min_lr": 0.0,
        "muon_lr": 0.03,
        "warmup_steps": max(5, min(200, round(steps / 30))),
        "schedule": "wsd",
        "decay_fraction": 0.5,
        "weight_decay": 0.1,
        "ngram_start": not model.tied_head,
        "ngram_teacher": 0.0 if model.tied_head else COUNTED_HALF,
        "sampled_softmax": sampled_ids(model),
        "log_interval": max(1, round(steps / 100)),
        "eval_interval": max(10, round(steps / 10)),
        "eval_tokens": max(2048, min(1_000_000, int(tokens / 200))),
        "sample_interval": max(10, round(steps / 10)),
        "sample_prompt": "The",
        "sample_tokens": 60,
        "checkpoint_minutes": 10.0,
    }
    dropout = 0.0 if epochs < 3 else 0.1 if epochs < 10 else 0.2
    return values, dropout


def measured_rate(device: Any, precision: str, guess: ModelConfig, seconds: float = 3.0) -> float:
    """FLOP/s of real training steps of a model like `guess` on this device."""
    import torch

    from devices import DistributedContext
    from model import GPT
    from training.model_setup import wrapped
    from training.optimizer import Optimizer
    from training.split import step_threads, with_parts
    from training.step import take_step

    train = TrainConfig(max_steps=1, optimizer="muon")
    model = GPT(guess).to(device)
    optimizer, distributed = Optimizer(model, train), DistributedContext(0, 1, "none", device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    rows = max(1, 2048 // guess.block_size)
    ids = torch.randint(0, guess.tokens, (rows, guess.block_size + 1), device=device)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield ids[:, :-1], ids[:, 1:]

    train, _ = with_parts(train, guess, rows, distributed)
    module = wrapped(model, Config(model=guess, train=train), distributed, device)
    source, times = batches(), list[float]()
    end = time.perf_counter() + seconds
    with step_threads(module):
        while len(times) < 4 or time.perf_counter() < end:
            begin = time.perf_counter()
            take_step(module, optimizer, scaler, source, 1, train, precision, distributed)  # the loss ends on the CPU
            times.append(time.perf_counter() - begin)
    late = sorted(times[2:])
    return rows * guess.block_size * model.flops_per_token() / late[len(late) // 2]


def prepared_for(
    inputs: tuple[str, ...], vocab: int, out: Path | None = None, most: float = 0.0, learning_s: float = 0.0
) -> Path:
    """Prepare `inputs` with a new vocabulary of `vocab` ids in `out`, unless that has been done before.

    out: default: a folder in data/ named after the first input. most: bytes of text, 0 for all. learning_s: as of `prepare`.
    Raises ConfigError and DocumentError as `prepare` does.
    """
    from corpus.preparation import PrepareFlags, prepare

    out = out or ROOT / "data" / f"{Path(inputs[0]).stem or 'texts'}-{vocab}"
    flags = {"input": inputs, "tokenizer": "bpe", "vocab_size": vocab, "max_bytes": int(most)}
    prepare(build(PrepareFlags, flags), out, learning_s)
    return out


def most_text(seconds: float, threads: int) -> float:
    """Bytes of text that are prepared within PREPARE_SHARE of the time."""
    return PREPARE_SHARE * seconds * PREPARE_RATE * max(1, threads)


def text_size(inputs: tuple[str, ...]) -> float:
    """Bytes of text for training in `inputs`, estimated by the sizes of the files."""
    from corpus.finder import find

    return 0.9 * sum(path.stat().st_size for path, _ in find(inputs))


@dataclass(frozen=True)
class AutotuneResult:
    """The chosen settings and the measurements behind them."""

    tables: dict[str, Any]  # as of a preset
    data: Path  # the prepared texts
    minutes: float  # as requested
    rate: float  # FLOP/s measured
    budget: Budget  # what training may use
    ends_early: bool  # the text is read MOST_EPOCHS times before the minutes are over

    def described(self) -> str:
        """Measurements and chosen settings as text, the settings in the form of a preset."""
        minutes = self.budget.flops / self.rate / 60
        note = (
            f"note: in {minutes:.1f} minutes this text is read {MOST_EPOCHS:.0f} times, and more passes would only overfit: "
            f"training ends then, not after {self.minutes:g}\n"
        )
        return (note if self.ends_early else "") + (
            f"measured {self.rate / 1e9:,.0f} GFLOP/s; {minutes:.1f} minutes and {self.budget.text / 1e6:.1f} MB of text "
            f"for training. Chosen, as a preset:\n\n{to_toml(self.tables)}"
        )


def conflicting_flags(minutes: float, inputs: tuple[str, ...], data: Path | None, others: list[str]) -> list[str]:
    """Errors for flags that conflict with --minutes."""
    prepared = data is not None and (data / "manifest.json").is_file()
    found = [f"--minutes chooses everything itself: leave out {name}" for name in others]
    if not minutes:
        found.append(
            "--input goes with --minutes: `python train.py --input my_books/ --minutes 10`; for a preset prepare the texts first: "
            "`python prepare_data.py --input my_books/ --out data/mine`, then give --data data/mine"
        )
    if data and not inputs and not prepared:
        found.append(f"--data {data}: no manifest.json there: give the texts with --input, to have them prepared in it")
    if inputs and prepared:
        found.append(f"--data {data} is prepared already: leave out --input to train on it, or name a new folder")
    return found


def autotune(
    minutes: float, inputs: tuple[str, ...], data: Path | None, began: float, others: list[str]
) -> AutotuneResult:
    """The settings and the prepared data for `minutes` counted from `began` (time.monotonic).

    Measures the machine, and with `inputs` prepares the texts, in `data` if given, which takes its share of the time;
    without either it uses the sample stories. others: flags given that conflict with --minutes. Raises ConfigError.
    """
    import torch

    from devices import pick_device, pick_precision
    from storage.shards import Manifest
    from training.plan import available_memory, fitting_batch

    if faults := conflicting_flags(minutes, inputs, data, others):
        raise ConfigError(faults)
    device = pick_device("auto")
    precision, _ = pick_precision("auto", device)
    manifest = Manifest.load(data) if data and not inputs else None
    inputs = inputs or (str(ROOT / "data" / "sample"),)
    text = manifest.splits.train.bytes if manifest else text_size(inputs)
    vocab = manifest.tokenizer.vocab_size if manifest else 0
    counted = counting_helps(device.type, text, vocab)
    seconds = minutes * 60

    def left() -> float:
        return seconds - START_S - (time.monotonic() - began)

    # 1 the machine, with a model of about the size that will be chosen
    guess = choose_model(Budget(ASSUMED_RATE[device.type == "cuda"] * seconds, text), vocab, counted)
    guess = guess.model_copy(update={"vocab_size": min(guess.vocab_size, MEASURED_IDS)})
    rate = measured_rate(device, precision, guess)

    # 2 the texts, with the vocabulary of the model that the time left after preparing will allow
    if data is None or manifest is None:
        most = most_text(seconds, torch.get_num_threads())
        text = min(text, most)
        preparing_s = text / PREPARE_RATE / max(1, torch.get_num_threads())
        budget = Budget(rate * max(0.5 * seconds, left() - preparing_s), text)
        vocab = choose_model(budget, counted=counted).vocab_size
        data = prepared_for(inputs, vocab, data, most, LEARNING_SHARE * PREPARE_SHARE * seconds)
        manifest = Manifest.load(data)
    if left() < 10:
        raise ConfigError(
            [
                f"--minutes {minutes:g}: {seconds - left():.0f} seconds went into measuring and preparing: give more "
                "(prepared texts are kept for the next run)"
            ]
        )

    # 3 the model and its training, with the time actually left
    budget = Budget(rate * left(), manifest.splits.train.bytes)
    model = choose_model(budget, manifest.tokenizer.vocab_size, counted)
    before_s = counting_s(model, budget.text, rate) if counted else 0.0
    if before_s > COUNTED_SHARE * left():  # a machine too slow for it
        model, before_s = choose_model(budget, manifest.tokenizer.vocab_size), 0.0
    budget = Budget(rate * max(5.0, left() - before_s), budget.text)
    enough = MOST_EPOCHS * budget.text / BYTES_PER_TOKEN * flops_per_token(model)
    ends_early = enough < budget.flops
    budget = Budget(min(enough, budget.flops), budget.text)
    fits = fitting_batch(model, TrainConfig(max_steps=1), 1, available_memory(device), precision, device.type)
    training_s = min(left() - before_s, budget.flops / rate)
    train, dropout = choose_training(model, budget, round(max(5.0, training_s) / 60, 3), max(1, fits))
    tables = {
        "description": f"What {minutes:g} minutes make of {data.name}",
        "model": model.model_dump(exclude={"vocab_used"}) | {"dropout": dropout},
        "train": train,
        "generation": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1},
    }
    return AutotuneResult(tables, data, minutes, rate, budget, ends_early)
