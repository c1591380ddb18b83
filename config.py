"""Configuration: model shape, training, sampling.

Every script takes its flags from the models below. Values are laid over each other in this order:
a preset (`presets/NAME.toml`), then `--config FILE.toml`, then single flags.

To change settings, do not edit the defaults here: what a preset states goes before them. Give a flag, or copy a preset,
change the copy and name it: `python train.py --preset my.toml`.

    python train.py --preset story-small --train.lr 3e-4
    python train.py --preset victorian --config my.toml --model.n-layer 6
"""

from __future__ import annotations

import math
import os
import re
import tomllib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

# Rounds that an OpenMP thread of torch spins before it sleeps, read when torch is loaded, which comes after this module.
# By default 300,000: beside another program every operation then waits for the scheduler (docs/experiments.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

ROOT = Path(__file__).resolve().parent
PRESET_DIR = ROOT / "presets"
GPT2_TOKENS = 50257  # ids of the GPT-2 tokenizer, end-of-text included
GPT2_ROWS = 50304  # its vocabulary padded to a multiple of 128: the ids between are free for styles
NGRAM_CHANNELS = 48  # the fewest that a start from counts can be made of
BLEND = 4  # styles that one text can blend
FINISH_SENTENCE = 60  # tokens after max_tokens within which 63 of 64 texts of models/victorian-mini ended a sentence


class ConfigError(ValueError):
    """Settings that cannot work together; the message lists every error, each with its fix."""

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("\n".join(f"- {fault}" for fault in self.faults))


class FrozenSettings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Validated(Protocol):
    """Settings that can list their own errors."""

    def faults(self) -> list[str]:
        """One line for each error; empty if there is none."""


C = TypeVar("C", bound=Validated)


def raise_faults(settings: C) -> C:
    """For validators: the settings themselves, or a ValueError with all their errors."""
    found = settings.faults()
    if found:
        raise ValueError("\n".join(found))
    return settings


class ModelConfig(FrozenSettings):
    """The shape of the network (GPT-2: Radford et al. 2019, section 2.3)."""

    n_layer: int = Field(4, ge=1, le=200)
    """Transformer blocks."""
    n_head: int = Field(4, ge=1, le=256)
    """Attention heads; must divide n_embd."""
    n_embd: int = Field(192, ge=8, le=16384)
    """Channels of the residual stream."""
    block_size: int = Field(256, ge=8, le=131072)
    """Context length in tokens."""
    vocab_size: int = Field(0, ge=0, le=1_000_000)
    """Rows of the token embedding; default: the tokenizer's number of ids. Rows beyond those only pad the matrix."""
    vocab_used: int = Field(0, ge=0, le=1_000_000)
    """Ids the tokenizer has, set from the data; the model never generates an id at or above it."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Fraction of activations set to zero in training (embeddings, attention weights, both residual branches)."""
    bias: bool = True
    """Biases in linear layers and LayerNorms (never in the head)."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """learned: a trained position table (GPT-2); sinusoidal: the fixed one of Vaswani et al. 2017, section 3.5."""
    tied_head: bool = True
    """The output head shares the token embedding's weights."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        return raise_faults(self)

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def tokens(self) -> int:
        """Ids that can be produced: `vocab_used`, or all rows where it is not set."""
        return self.vocab_used or self.vocab_size

    def faults(self) -> list[str]:
        """Every error of this shape; each names the flag, the value and the fix."""
        found = []
        if self.n_embd % self.n_head:
            near = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            best = min(near, key=lambda h: abs(h - self.n_head))
            found.append(
                f"--model.n-head {self.n_head} does not divide --model.n-embd {self.n_embd}: try --model.n-head {best}"
            )
        if self.positions == "sinusoidal" and self.n_embd % 2:
            found.append(
                f"--model.n-embd {self.n_embd} is odd: sinusoidal positions need an even number, "
                f"try --model.n-embd {self.n_embd + 1}"
            )
        if self.vocab_size and self.vocab_used > self.vocab_size:
            found.append(
                f"--model.vocab-size {self.vocab_size} is smaller than the tokenizer's {self.vocab_used} ids: "
                f"use --model.vocab-size 0 to take the tokenizer's size"
            )
        return found


class DataConfig(FrozenSettings):
    """Where the texts of a preset come from, and what `prepare_data.py` does with them."""

    source: str = ""
    """`pg19`, `tinystories`, `tinyshakespeare`, OWNER/NAME on the hub, or files like `data/*.txt`; default: the texts given by --input."""
    years: str = Field("", pattern=r"^(\d{1,4}-\d{1,4})?$")
    """Only books published in these years, like 1837-1901 (pg19, parquet files with a publication_date); default: all."""
    tokenizer: Literal["gpt2", "bpe", "char"] = "gpt2"
    """gpt2: OpenAI's 50,257 ids; bpe: trained on the texts; char: one id for each character."""
    vocab_size: int = Field(4096, ge=257, le=65536)
    """Ids of the bpe vocabulary; as a flag, it implies --tokenizer bpe."""
    val_fraction: float = Field(0.1, gt=0.0, lt=1.0)
    """Fraction of the documents (of a single document: its end) held out for validation."""
    shard_tokens: int = Field(100_000_000, ge=1024)
    """Tokens per shard file."""
    unwrap: bool = True
    """Join hard-wrapped lines of Gutenberg-style texts into paragraphs; in prose, close double spaces between words."""
    strip_licence: bool = True
    """Remove Project Gutenberg's headers and licences."""
    strip_notes: bool = True
    """Remove transcriber's notes from e-texts (licensed by Project Gutenberg, or hard-wrapped)."""
    strip_illustrations: bool = True
    """Remove [Illustration: …] from e-texts."""
    strip_italics: bool = True
    """Remove the underscores around _italics_ in e-texts."""
    fix_mojibake: bool = False
    """Repair UTF-8 that was decoded as Windows-1252, like â€œ for “."""
    drop_duplicates: bool = False
    """Keep each text once; copies of validation texts are dropped from training."""
    control: str = Field("", max_length=1000)
    """Mark each document's style: author, folder, decade, a field of the rows, or a .csv or .toml file (see docs/data.md)."""


class TrainConfig(FrozenSettings):
    """How the weights are fitted. Every interval is in optimizer steps; 0 switches it off."""

    batch_size: int = Field(16, ge=0)
    """Sequences in one forward pass on one device (micro-batch); 0: as many as fit into memory."""
    tokens_per_step: int = Field(0, ge=0)
    """Tokens in one optimizer step over all devices, by gradient accumulation; default: one micro-batch on each device."""
    max_steps: int = Field(0, ge=0)
    """Optimizer steps; default: set by epochs or max_tokens."""
    epochs: float = Field(0.0, ge=0.0)
    """Passes over the training text; default: set by max_steps or max_tokens."""
    max_tokens: int = Field(0, ge=0)
    """Training tokens; default: set by max_steps or epochs."""
    max_minutes: float = Field(0.0, ge=0.0)
    """Stop and save after this much wall-clock time; if it alone ends a wsd run, the decay is timed to end then; default: no limit."""
    lr: float = Field(1e-3, gt=0.0, le=10.0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0.0)
    """Learning rate of the last step (cosine, onecycle, wsd)."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "onecycle", "wsd", "constant"] = "cosine"
    """Learning-rate schedule; wsd: warm up, hold, then decay linearly over the last decay_fraction of the steps."""
    decay_fraction: float = Field(0.4, gt=0.0, le=1.0)
    """Fraction of the steps over which wsd decays."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: torch.optim.Muon for the matrices inside the blocks, AdamW for the rest."""
    muon_lr: float = Field(0.02, gt=0.0)
    """Peak learning rate of the matrices that Muon updates."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay rate of AdamW's first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay rate of AdamW's second moment."""
    eps: float = Field(1e-8, gt=0.0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled weight decay of matrices; biases and LayerNorms are not decayed."""
    grad_clip: float = Field(1.0, ge=0.0)
    """Gradients are clipped to this norm; 0: no clipping."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 if the hardware multiplies it, otherwise fp16 on NVIDIA GPUs, otherwise fp32."""
    ngram_start: bool = False
    """Start a new model from counted bigrams of the training text: embedding, an untied head, two heads that look back."""
    ngram_teacher: float = Field(0.0, ge=0.0)
    """Training tokens after which a counted 3-gram's share of the targets has fallen from 1 to one half; 0: no teacher."""
    sampled_softmax: int = Field(0, ge=0)
    """Ids that a training step's softmax computes, about, drawn by counted bigrams for every few hundred positions; 0: all."""
    seed: int = Field(1337, ge=0)
    """Seed of initialisation, data order and dropout."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on for CUDA, off elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, mps or xla."""
    parts: int = Field(0, ge=0, le=256)
    """On CPUs: parts into which a step's sequences are cut, each computed by one thread; they decide the last bits of the
    weights, the number of threads does not. 0: one for each thread, for small models; 1: threads share each operation."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """auto: ddp under torchrun, none otherwise."""
    log_interval: int = Field(10, ge=1)
    """Steps between log lines."""
    eval_interval: int = Field(250, ge=0)
    """Steps between validation passes."""
    eval_tokens: int = Field(0, ge=0)
    """Tokens in a validation pass, always the same windows, evenly spread; default: the whole validation text."""
    sample_interval: int = Field(0, ge=0)
    """Steps between samples."""
    each_epoch: bool = False
    """Also evaluate, sample and report the average loss at the end of every epoch."""
    sample_prompt: str = ""
    """Prompt of the samples."""
    sample_tokens: int = Field(120, ge=1)
    """Tokens in a sample."""
    checkpoint_interval: int = Field(0, ge=0)
    """Steps between checkpoints, in addition to those by checkpoint_minutes."""
    checkpoint_minutes: float = Field(10.0, ge=0.0)
    """Minutes between checkpoints; 0: no timed checkpoints."""
    keep_last: int = Field(1, ge=1)
    """Checkpoints kept in addition to best/."""
    patience: int = Field(0, ge=0)
    """Stop after this many validation passes without improvement; 0: never."""
    min_improvement: float = Field(0.0, ge=0.0)
    """Decrease of the validation loss, in nats, that patience counts as an improvement."""
    target_loss: float = Field(0.0, ge=0.0)
    """Stop when the running average of the training loss falls below this; 0: never."""
    skip_bad_steps: int = Field(0, ge=0)
    """Steps with a non-finite loss or gradient that may be skipped before training stops."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb: bool = False
    """Log to Weights & Biases as well (the package must be installed)."""

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        return raise_faults(self)

    def faults(self) -> list[str]:
        """Every error among these values; each names the flag, the value and the fix."""
        found = []
        if not (self.max_steps or self.epochs or self.max_tokens or self.max_minutes):
            found.append(
                "no end is set: give --train.max-steps, --train.epochs, --train.max-tokens or --train.max-minutes"
            )
        known = self.max_steps or self.epochs or self.max_tokens
        if self.max_minutes and not known and self.schedule not in ("constant", "wsd"):
            found.append(
                f"--train.schedule {self.schedule} needs to know its last step: give --train.max-steps, "
                f"or --train.schedule wsd (which decays in time) or constant with --train.max-minutes alone"
            )
        return found


def style_name(text: str) -> str:
    """Style name as a slug: lower-case letters and digits without accents, joined by hyphens. `Henry James` is `henry-james`."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    return "-".join("".join(c if c.isalnum() else " " for c in plain).split())


def style_blend(text: str) -> dict[str, float]:
    """`dickens:0.7,austen:0.3` -> each style's share; they sum to 1, and a name without a weight weighs 1.

    Raises ValueError that names the part and the error.
    """
    shares: dict[str, float] = {}
    parts = [part for part in text.split(",") if part.strip()]
    for part in parts:
        name, colon, weight = part.partition(":")
        try:
            share = float(weight) if colon else 1.0
        except ValueError:
            share = 0.0
        if not style_name(name) or not 0 < share < math.inf:
            raise ValueError(
                f"style {part.strip()!r}: write NAME or NAME:WEIGHT with a weight above 0, like dickens:0.7"
            )
        shares[style_name(name)] = shares.get(style_name(name), 0.0) + share
    if len(shares) > BLEND:
        raise ValueError(f"style {text!r}: {len(shares)} styles, at most {BLEND} can be blended: leave some out")
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _blendable(text: str) -> str:
    """For validators: `text` itself if it can name styles."""
    text.encode()  # half a surrogate pair is no text: UnicodeEncodeError is a ValueError
    style_blend(text)
    return text


StyleText = Annotated[str, AfterValidator(_blendable)]


@dataclass(frozen=True)
class Setting:
    """Label, slider and other programs' names of a sampling setting; metadata of a field of GenerationParams.

    All surfaces read it: sliders of the app and of the web page (as `x-label`, `x-step` ... in the OpenAPI document), the
    gateway's limits, `/v1/completions`, generation_config.json and the requests to vLLM.
    """

    label: str
    """Name beside its control."""
    slider: tuple[float, float] | None = None
    """Ends of its slider: the useful part of the allowed range; None: no slider."""
    step: float = 1
    """Step of the slider."""
    off: Any = None
    """The value that switches it off, which is also its default in `/v1/completions`; None: it cannot be off."""
    hf: str = ""
    """Name in generation_config.json; empty: not written there. Programs skip names that they do not know."""
    openai: str = ""
    """Name in requests to OpenAI and vLLM; empty: neither has it."""
    gguf: str = ""
    """Name among a GGUF file's `general.sampling` keys, which llama.cpp takes over; empty: there is none."""
    at_zero: bool = False
    """Changes the choice at temperature 0 as well."""
    in_presets: bool = True
    """It affects how tokens are chosen, so it is part of named presets; False: it belongs to one request."""
    rare: bool = False
    """Shown with the rarely used settings."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        shown = handler(schema) | {"x-label": self.label}
        if self.slider is not None:
            shown |= {"x-slider": list(self.slider), "x-step": self.step}
        return shown | ({"x-rare": True} if self.rare else {})


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def unicode_text(text: str) -> str:
    """For validators: `text`, without lone surrogates, which JSON can hold and no text can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    return text


PHRASES, PHRASE_CHARACTERS = 16, 1000  # strings in a list of phrases, and their length
_PHRASE_JSON = {"type": "string", "minLength": 1, "maxLength": PHRASE_CHARACTERS}
_PHRASES_JSON = {"anyOf": [_PHRASE_JSON, {"type": "array", "items": _PHRASE_JSON, "maxItems": PHRASES}]}
Phrase = Annotated[str, Field(min_length=1, max_length=PHRASE_CHARACTERS), AfterValidator(unicode_text)]
Phrases = Annotated[
    tuple[Phrase, ...], Field(max_length=PHRASES), BeforeValidator(_as_tuple), WithJsonSchema(_PHRASES_JSON)
]


def _integer_keys(value: Any) -> Any:
    """JSON and TOML have only strings as keys."""
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) else key: value[key] for key in value}


BIASES = 1024  # ids in a logit_bias
_BIAS_JSON = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": BIASES,
}
LogitBias = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100.0, le=100.0)]],
    BeforeValidator(_integer_keys),
    PlainSerializer(lambda bias: {str(id): value for id, value in bias.items()}),
    WithJsonSchema(_BIAS_JSON),
]


def openai_penalty(label: str, name: str) -> Setting:
    """A penalty as OpenAI defines it, which has the same name everywhere: -2 to 2, off at 0."""
    return Setting(label, (-2, 2), 0.05, off=0.0, hf=name, openai=name, at_zero=True, rare=True)


class GenerationParams(FrozenSettings):
    """Sampling settings, with the bounds of REST bodies, flags and sliders.

    `sampling.FILTERS` is the order in which they are applied.
    """

    max_tokens: Annotated[
        int, Setting("Length", (10, 1000), 10, hf="max_new_tokens", openai="max_tokens", in_presets=False)
    ] = Field(200, ge=0, le=100_000)
    """New tokens at most, before those that finish the sentence."""
    finish_sentence: Annotated[int, Setting("Finish the sentence", (0, 200), 10, off=0, in_presets=False)] = Field(
        0, ge=0, le=1000
    )
    """More tokens at most, until a sentence ends; 0: none."""
    temperature: Annotated[
        float, Setting("Temperature", (0, 2), 0.05, off=1.0, hf="temperature", gguf="temp", openai="temperature")
    ] = Field(1.3, ge=0.0, le=2.0)
    """Below 1 safer, above 1 more surprising; 0 always takes the most likely token."""
    top_k: Annotated[int, Setting("Top-k", (0, 100), off=0, hf="top_k", gguf="top_k", openai="top_k")] = Field(
        50, ge=0, le=1_000_000
    )
    """Keep only the k most likely tokens; 0: all."""
    top_p: Annotated[float, Setting("Top-p", (0.05, 1), 0.01, off=1.0, hf="top_p", gguf="top_p", openai="top_p")] = (
        Field(0.95, gt=0.0, le=1.0)
    )
    """Keep the smallest set of tokens whose probabilities sum to p (Holtzman et al. 2020); 1: all."""
    min_p: Annotated[float, Setting("Min-p", (0, 0.5), 0.01, off=0.0, hf="min_p", gguf="min_p", openai="min_p")] = (
        Field(0.0, ge=0.0, lt=1.0)
    )
    """Keep tokens at least this share as likely as the most likely one; 0: all."""
    typical_p: Annotated[float, Setting("Typical-p", (0.05, 1), 0.01, off=1.0, hf="typical_p", rare=True)] = Field(
        1.0, gt=0.0, le=1.0
    )
    """Keep the tokens whose surprise is nearest to the expected one, until p is reached (Meister et al. 2023); 1: all."""
    top_n_sigma: Annotated[float, Setting("Top-n-sigma", (0, 5), 0.1, off=0.0, hf="top_n_sigma", rare=True)] = Field(
        0.0, ge=0.0, le=20.0
    )
    """Keep tokens whose logit is within this many standard deviations of the largest (Tang et al. 2024); 0: all."""
    xtc_probability: Annotated[
        float,
        Setting("XTC probability", (0, 1), 0.05, off=0.0, hf="xtc_probability", gguf="xtc_probability", rare=True),
    ] = Field(0.0, ge=0.0, le=1.0)
    """How often the top choices are excluded: all more likely than xtc_threshold but the least likely of them; 0: never."""
    xtc_threshold: Annotated[
        float, Setting("XTC threshold", (0.01, 0.5), 0.01, hf="xtc_threshold", gguf="xtc_threshold", rare=True)
    ] = Field(0.1, gt=0.0, le=0.5)
    """Probability from which on a token is a top choice for XTC."""
    dry_multiplier: Annotated[
        float, Setting("DRY multiplier", (0, 3), 0.05, off=0.0, hf="dry_multiplier", at_zero=True, rare=True)
    ] = Field(0.0, ge=0.0, le=10.0)
    """Strength of DRY, which penalises tokens that would continue a repetition of an earlier passage; 0: none, 0.8 is usual."""
    dry_base: Annotated[float, Setting("DRY base", (1, 4), 0.05, hf="dry_base", at_zero=True, rare=True)] = Field(
        1.75, ge=1.0, le=8.0
    )
    """DRY's penalty is the multiplier times this to the power of the repeated tokens beyond dry_allowed_length."""
    dry_allowed_length: Annotated[
        int, Setting("DRY allowed length", (1, 20), hf="dry_allowed_length", at_zero=True, rare=True)
    ] = Field(2, ge=1, le=1000)
    """Tokens that may be repeated before DRY penalises the next one."""
    dry_sequence_breakers: Annotated[
        Phrases, Setting("DRY sequence breakers", hf="dry_sequence_breakers", at_zero=True, rare=True)
    ] = ("\n", ":", '"', "*")
    """Strings at which DRY's repeated passages end."""
    presence_penalty: Annotated[float, openai_penalty("Presence penalty", "presence_penalty")] = Field(
        0.0, ge=-2.0, le=2.0
    )
    """Taken off the logits of tokens that have been written (OpenAI's); the prompt does not count; 0: none."""
    frequency_penalty: Annotated[float, openai_penalty("Frequency penalty", "frequency_penalty")] = Field(
        0.0, ge=-2.0, le=2.0
    )
    """Taken off a token's logit for each time it has been written (OpenAI's); the prompt does not count; 0: none."""
    penalty_last_n: Annotated[
        int,
        Setting("Penalty window", (0, 1024), 16, hf="penalty_last_n", gguf="penalty_last_n", at_zero=True, rare=True),
    ] = Field(0, ge=0, le=1_000_000)
    """Newest tokens that repetition, presence, frequency penalty and DRY look at (llama.cpp's); 0: all of the text."""
    logit_bias: Annotated[
        LogitBias, Setting("Logit bias", off={}, openai="logit_bias", at_zero=True, in_presets=False, rare=True)
    ] = Field({}, max_length=BIASES)
    """Added to the logits of token ids: -100 forbids one, 100 all others. Ids that the model lacks change nothing."""
    repetition_penalty: Annotated[
        float,
        Setting(
            "Repetition penalty",
            (1, 2),
            0.05,
            off=1.0,
            hf="repetition_penalty",
            gguf="penalty_repeat",
            openai="repetition_penalty",
            at_zero=True,
        ),
    ] = Field(1.2, ge=0.01, le=10.0)
    """Divide (or multiply, below zero) the logits of tokens already seen (Keskar et al. 2019); 1: none."""
    n: Annotated[int, Setting("Versions at once", (1, 6), openai="n", in_presets=False)] = Field(1, ge=1, le=128)
    """Samples of the same prompt."""
    seed: Annotated[int | None, Setting("Seed", openai="seed", in_presets=False)] = Field(None, ge=0, lt=2**63)
    """Makes the text reproducible; default: a random one each time."""
    stop: Annotated[Phrases, Setting("End before", openai="stop", in_presets=False)] = ()
    """Strings that end the text; they are not part of it."""
    keep: Annotated[int, Setting("Keep in view", (0, 256), in_presets=False)] = Field(0, ge=0)
    """Tokens of the opening that stay in view when the story outgrows the context."""
    style: Annotated[StyleText, Setting("Author", in_presets=False)] = Field("", max_length=200)
    """Style of a model trained with `--control`, like `dickens`, or several, like `dickens:0.7,austen:0.3`; default: no style."""


SETTINGS: dict[str, Setting] = {
    name: next(part for part in field.metadata if isinstance(part, Setting))
    for name, field in GenerationParams.model_fields.items()
}


class Config(FrozenSettings):
    """One preset: everything needed to prepare data, train and write."""

    description: str = ""
    """One line for tables and --help."""
    preset: str = ""
    """In a run's config.toml: the preset that it was begun with."""
    data_folder: str = ""
    """In a run's config.toml: the folder of prepared texts it was trained on."""
    init_from: str = ""
    """In a run's config.toml: the model whose weights it started from."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig(max_steps=1000)
    generation: GenerationParams = GenerationParams()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        return raise_faults(self)

    def faults(self) -> list[str]:
        """Every error between the tables; each names the flag, the value and the fix."""
        found: list[str] = []
        if not self.train.ngram_start:
            return found
        if self.model.tied_head:
            found.append(
                "--train.ngram-start needs a head with weights of its own: add --model.no-tied-head, or leave out --train.ngram-start"
            )
        if not self.model.bias:
            found.append("--train.ngram-start needs the biases: leave out --model.no-bias or --train.ngram-start")
        if self.model.n_embd < NGRAM_CHANNELS:
            found.append(
                f"--train.ngram-start needs {NGRAM_CHANNELS} channels: --model.n-embd {self.model.n_embd} are too few"
            )
        return found


def preset_names() -> list[str]:
    """Names of the presets, in alphabetical order."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.toml"))


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; a missing or malformed file is a ConfigError that names it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, table by table."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def preset_values(name: str) -> dict[str, Any]:
    """The raw tables of one preset, by name or by path to a `.toml` file."""
    path = Path(name) if name.endswith(".toml") else PRESET_DIR / f"{name}.toml"
    if not path.is_file() and name.endswith(".toml"):
        raise ConfigError([f"--preset {name}: no such file; copy one of presets/ to that name and change the copy"])
    if not path.is_file():
        raise ConfigError([f"--preset {name}: unknown; choose one of {', '.join(preset_names())}"])
    return read_toml(path)


def describe_faults(error: ValidationError) -> list[str]:
    """Each error of a pydantic ValidationError in one line: flag, value, what is allowed."""
    lines = []
    for fault in error.errors():
        flag = ".".join(str(part) for part in fault["loc"]).replace("_", "-")
        if fault["type"] == "value_error":
            text = str(fault["ctx"]["error"])
            lines += text.split("\n")
        elif fault["type"] == "extra_forbidden":
            lines.append(f"{flag}: unknown setting")
        else:
            lines.append(f"--{flag} {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return lines


M = TypeVar("M", bound=BaseModel)


def build(kind: type[M], values: dict[str, Any]) -> M:
    """Validate `values` as `kind`; one ConfigError reports all errors together."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe_faults(error)) from None


def load_config(preset: str = "sample", *files: Path | str, values: dict[str, Any] | None = None) -> Config:
    """A preset with TOML files and then `values` (nested tables) laid over it.

    Raises ConfigError that reports all errors together.
    """
    tables = preset_values(preset)
    for file in files:
        tables = merge(tables, read_toml(Path(file)))
    return build(Config, merge(tables, values or {}))


def to_toml(config: BaseModel | dict[str, Any]) -> str:
    """The settings as TOML that `read_toml` and `--config` accept; None values are left out."""
    return tomli_w.dumps(_without_none(config if isinstance(config, dict) else config.model_dump()))


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """The table and its tables without the keys whose value is None, which TOML cannot write."""
    kept = {key: value for key, value in table.items() if value is not None}
    return {key: _without_none(value) if isinstance(value, dict) else value for key, value in kept.items()}
