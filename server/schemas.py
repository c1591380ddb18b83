"""What the server accepts and answers: its settings, the bodies of each request and reply, and its errors.

VLG_MODEL=runs/sample/best VLG_API_KEYS=one,two python api.py
>>> settings = read_settings(port=9000)
>>> body = GenerateBody.model_validate({"prompt": "The fog", "max_tokens": 20})
>>> body.params(settings, {"temperature": 0.7})
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, model_validator

from config import GenerationParams, unicode_text
from server.errors import bad_value
from server.settings import ServerFlags


def whole(kind: type[BaseModel], value: Any) -> Any:
    """`2.0` where an integer belongs is that integer, as JSON Schema has it; strict types would refuse it."""
    if not isinstance(value, dict):
        return value
    return value | {name: as_integer(value[name]) for name in _integers(kind) if name in value}


@cache
def _integers(kind: type[BaseModel]) -> list[str]:
    """Every name under which a body may give an integer."""
    found: list[str] = []
    for name, field in kind.model_fields.items():
        if _takes_integers(field.annotation):
            alias = field.validation_alias
            found += [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [name]
    return found


def _takes_integers(annotation: Any) -> bool:
    """Whether a field is an `int`, with or without bounds, perhaps or null."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return any(_takes_integers(part) for part in get_args(annotation))
    return annotation is int


def _integral(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def as_integer(value: Any) -> Any:
    """`2.0` as 2; anything else as it is."""
    return int(value) if _integral(value) else value


class Body(BaseModel):
    """Base of request bodies: strict types, so that neither `true` nor `"3"` passes for a number."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return whole(cls, value)


Text = Annotated[str, AfterValidator(unicode_text)]
RequestId = Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]


class SamplingBody(GenerationParams):
    """How the text is sampled; all fields are optional."""

    model_config = Body.model_config

    max_length: int | None = Field(None, ge=0, le=100_000)
    """Another name for max_tokens, which wins where both are given."""

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return whole(cls, value)

    def params(self, settings: ServerFlags, defaults: Mapping[str, Any]) -> GenerationParams:
        """The sampling settings, within this server's limits; ApiError names the one that exceeds them.

        defaults: what the model's folder recommends, for fields that the request leaves open.
        """
        values = self.model_dump(include=set(GenerationParams.model_fields))
        values |= {name: value for name, value in defaults.items() if name not in self.model_fields_set}
        if self.max_length is not None and "max_tokens" not in self.model_fields_set:
            values["max_tokens"] = self.max_length
        elif "max_tokens" not in self.model_fields_set:
            values["max_tokens"] = min(values["max_tokens"], settings.max_tokens)
        return check_limits(GenerationParams(**values), settings)


def check_limits(params: GenerationParams, settings: ServerFlags) -> GenerationParams:
    """`params` if the server's limits allow them, no sentence finished beyond its max_tokens; ApiError otherwise."""
    for field, limit in (("max_tokens", settings.max_tokens), ("n", settings.max_n)):
        if getattr(params, field) > limit:
            raise bad_value(f"{field}: this server allows at most {limit}", field, "limit_exceeded")
    finish = min(params.finish_sentence, settings.max_tokens - params.max_tokens)
    return params if finish == params.finish_sentence else params.model_copy(update={"finish_sentence": finish})


class GenerateBody(SamplingBody):
    """A prompt and how to continue it."""

    prompt: Text
    """Text to continue; empty: starts from nothing."""
    return_full_text: bool = False
    """Begin the texts with the prompt, as transformers' text-generation pipeline names it."""
    stream: bool = False
    """Send the text as it is written."""
    request_id: RequestId | None = None
    """Returned in the response; generated if omitted."""


class InvocationBody(GenerateBody):
    """What SageMaker's one entry takes: a prompt, or the question for the settings."""

    action: Literal["generate", "settings"] = "generate"
    """settings: answer as `GET /settings`, and write nothing."""


class BatchBody(SamplingBody):
    """Several prompts written under the same settings, all at once."""

    prompts: list[Text] = Field(min_length=1)
    """Text or texts to continue."""
    return_full_text: bool = False
    """Begin each text with its prompt."""


class SocketBody(GenerateBody):
    """A WebSocket's `generate` message."""

    action: Literal["generate"]


class ScoreBody(Body):
    """A text whose every token is to be judged."""

    text: Text = Field(min_length=1)
    """The text."""
    top: int = Field(5, ge=0, le=50)
    """Likeliest alternatives listed for each token."""


class OriginalityBody(Body):
    """A text to search for passages copied word for word from the training text."""

    text: Text = Field(min_length=1)
    """The text."""
    min_tokens: int = Field(0, ge=0, le=100_000)
    """Length from which a passage counts as copied; 0 (default): 12 tokens, or 50 for character tokenizers."""


class Reply(BaseModel):
    """Base of answers."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ErrorDetail(Reply):
    message: str
    """What is wrong and, where possible, how to fix it."""
    type: str
    """invalid_request_error, authentication_error, rate_limit_error, unavailable_error or server_error."""
    param: str | None
    """The field with the error."""
    code: str
    """A word for programs."""


class ErrorReply(Reply):
    error: ErrorDetail


class Usage(Reply):
    prompt_tokens: int
    """Tokens read; of a prompt that outgrew the context, those that were kept."""
    completion_tokens: int
    """Tokens written, all samples together."""
    total_tokens: int


FinishReason = Literal["stop", "length", "cancelled", "deadline"]


class Sample(Reply):
    index: int
    text: str
    finish_reason: FinishReason
    """stop: the text ended itself or met a stop string; length: max_tokens; deadline: the server's time limit."""
    tokens: int


class GenerateReply(Reply):
    generated_text: str
    """The first sample, without the prompt unless `return_full_text` asks for it."""
    finish_reason: FinishReason
    usage: Usage
    seed: int
    """With the same prompt and settings it gives this text again."""
    samples: list[Sample]
    request_id: str
    model: str
    truncated: bool
    """The prompt was longer than the context; its end was kept."""


class BatchReply(Reply):
    results: list[GenerateReply]
    """In the order of the prompts."""
    usage: Usage
    model: str


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionReply(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    truncated: bool
    """A prompt was longer than the context, or than truncate_prompt_tokens; its end was kept."""


class TokenEntry(Reply):
    id: int
    token: str
    """Its text; of an alternative that is no whole character its bytes, like `bytes:\\xe5`."""
    bytes: list[int]
    logprob: float
    """Natural logarithm."""


class WrittenToken(TokenEntry):
    top_logprobs: list[TokenEntry]
    """The most likely tokens, the likeliest first."""


class SampledEntry(Reply):
    id: int
    token: str
    bytes: list[int]
    prob: float


class SampledToken(SampledEntry):
    top_probs: list[SampledEntry]


class KoboldLogprobs(Reply):
    content: list[WrittenToken]


class KoboldResult(Reply):
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: KoboldLogprobs | None
    prompt_tokens: int
    completion_tokens: int


class KoboldReply(Reply):
    results: list[KoboldResult]
    """One for each sample."""


class LlamaSample(Reply):
    index: int
    content: str
    tokens: list[int]
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    generation_settings: dict[str, Any]
    """Under llama.cpp's names; `seed` is the one that was used."""
    prompt: str
    """As the model read it."""
    truncated: bool
    stop_type: Literal["eos", "limit", "word"]
    stopping_word: str
    timings: dict[str, float]
    completion_probabilities: list[WrittenToken] | list[SampledToken] = []


LlamaReply = LlamaSample | list[LlamaSample]


class TokenPiece(Reply):
    id: int
    piece: str | list[int]


class TokenizeReply(Reply):
    tokens: list[int] | list[TokenPiece]
    count: int
    max_model_len: int


class DetokenizeReply(Reply):
    content: str
    prompt: str


class TokenizerReply(Reply):
    tokenizer_class: str
    eos_token: str | None
    bos_token: str | None
    unk_token: str | None
    pad_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


class ModelReply(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Context in tokens."""
    styles: list[str]
    """What `style` can name; empty where the model has none."""


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelReply]


class Alternative(Reply):
    id: int
    text: str
    logprob: float
    probability: float


class ScoredToken(Reply):
    id: int
    text: str
    start: int
    """Start of the token in the text, in characters."""
    logprob: float | None
    """Natural logarithm; null for the first token, which nothing precedes."""
    probability: float | None
    rank: int | None
    """1: no token was likelier."""
    top: list[Alternative]


class ScoreReply(Reply):
    model: str
    tokens: list[ScoredToken]
    logprob: float
    """Sum over the tokens."""


class CopySource(Reply):
    name: str
    """The document's name."""
    document: int
    token: int
    """Place in the document, in tokens."""
    before: str
    after: str


class CopiedRun(Reply):
    start: int
    stop: int
    """The run is text[start:stop], in characters."""
    tokens: int
    text: str
    occurrences: int
    """How often the training text has it."""
    sources: list[CopySource]


class OriginalityReply(Reply):
    tokens: int
    longest: int
    """Tokens of the longest copied run; runs below `shortest` may be missed."""
    shortest: int
    min_tokens: int
    copied_tokens: int
    share: float
    """Of the tokens that lie in copied runs."""
    runs: list[CopiedRun]


class HealthReply(Reply):
    status: Literal["ok"]
    model: str
    device: str
    context: int
    """Tokens."""
    vocabulary: int
    parameters: int
    styles: list[str]
    """What `style` can name."""
    running: int
    waiting: int
    uptime_s: float


class SettingsReply(Reply):
    model: str
    """The model's name, with its steps and bits a byte where they are known."""
    context: int
    """Tokens."""
    settings: dict[str, Any]
    """JSON schema of each sampling setting; `default` is what a request gets that leaves it open."""


class StatusReply(Reply):
    status: Literal["ok"]
