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

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
    model_validator,
)

from config import SETTINGS, GenerationParams, Setting, unicode_text
from server.errors import bad_value
from server.settings import ServerFlags


def _whole(kind: type[BaseModel], value: Any) -> Any:
    """`2.0` where an integer belongs is that integer, as JSON Schema has it; strict types would refuse it."""
    if not isinstance(value, dict):
        return value
    return value | {name: int(value[name]) for name in _integers(kind) if _integral(value.get(name))}


@cache
def _integers(kind: type[BaseModel]) -> list[str]:
    return [name for name, field in kind.model_fields.items() if _takes_integers(field.annotation)]


def _takes_integers(annotation: Any) -> bool:
    """Whether a field is an `int`, with or without bounds, perhaps or null."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return any(_takes_integers(part) for part in get_args(annotation))
    return annotation is int


def _integral(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


class Body(BaseModel):
    """Base of request bodies: strict types, so that neither `true` nor `"3"` passes for a number."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return _whole(cls, value)


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
        return _whole(cls, value)

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
    """`params` if the server's limits allow them; ApiError otherwise."""
    for field, limit in (("max_tokens", settings.max_tokens), ("n", settings.max_n)):
        if getattr(params, field) > limit:
            raise bad_value(f"{field}: this server allows at most {limit}", field, "limit_exceeded")
    return params


class GenerateBody(SamplingBody):
    """A prompt and how to continue it."""

    prompt: Text
    """Text to continue; empty: starts from nothing."""
    stream: bool = False
    """Send the text as it is written."""
    request_id: RequestId | None = None
    """Returned in the response; generated if omitted."""


class BatchBody(SamplingBody):
    """Several prompts written under the same settings, all at once."""

    prompts: list[Text] = Field(min_length=1)
    """Text or texts to continue."""


class SocketBody(GenerateBody):
    """A WebSocket's `generate` message."""

    action: Literal["generate"]


def _completion_prompt(value: Any) -> Any:
    if isinstance(value, list):
        value = [[_id(item) for item in part] if isinstance(part, list) else _id(part) for part in value]
    texts = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    if isinstance(value, str) or texts or _token_ids(value):
        return value
    if isinstance(value, list) and value and all(_token_ids(item) for item in value):
        return value
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists; none empty")


def _id(value: Any) -> Any:
    return int(value) if _integral(value) else value


def _token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


_IDS_JSON: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_JSON: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS_JSON,
        {"type": "array", "items": _IDS_JSON, "minItems": 1},
    ]
}
CompletionPrompt = Annotated[
    Text | list[Text] | list[int] | list[list[int]], BeforeValidator(_completion_prompt), WithJsonSchema(_PROMPT_JSON)
]


class StreamOptions(BaseModel):
    """Extras of a streamed completion."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool | None = False


class _OpenAIOnly(Body):
    """What OpenAI's request has besides the prompt and the sampling settings."""

    model_config = ConfigDict(**{**Body.model_config, "extra": "allow"})

    model: str | None = None
    """Name of the model, as in /v1/models."""
    stream: bool | None = False
    """Send the text as it is written."""
    stream_options: StreamOptions | None = None
    """Only read when streaming."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """Log-probability of each token, and of this many most likely ones."""
    echo: bool | None = False
    """Begin the answer with the prompt."""
    user: str | None = None
    """Ignored."""
    best_of: int | None = Field(None, ge=1, le=128)
    """Samples written for each prompt, of which the n with the highest mean log-probability of a token are answered.

    Below n it is n. A stream of the best starts when all samples are complete.
    """
    suffix: str | None = Field(None, max_length=0)
    """Not supported: no infilling."""


def _or_null(name: str) -> Any:
    """A sampling setting as OpenAI's clients send it: null means OpenAI's default, which switches it off."""
    field, off = GenerationParams.model_fields[name], SETTINGS[name].off
    kind = Annotated[field.annotation, *(part for part in field.metadata if not isinstance(part, Setting))]  # type: ignore[name-defined]
    default = field.get_default(call_default_factory=True) if off is None else off
    return kind | None, Field(default, description=field.description)


_OpenAISampling = create_model("_OpenAISampling", __base__=_OpenAIOnly, **{name: _or_null(name) for name in SETTINGS})


class CompletionBody(_OpenAISampling):
    """OpenAI's `POST /v1/completions`, with the extra fields that vLLM has. Fields it does not know are ignored."""

    prompt: CompletionPrompt
    """A text, token ids, or a list of either."""
    max_tokens: int | None = Field(16, ge=0, le=100_000)
    """New tokens at most."""
    top_k: int | None = Field(0, ge=-1, le=100)
    """Keep the k most likely tokens; 0 or -1: all."""

    def prompts(self) -> list[str | list[int]]:
        """Every prompt of the request."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)

    def params(self, settings: ServerFlags) -> GenerationParams:
        """The sampling settings within this server's limits; null means the default."""
        given = self.model_dump(include=set(GenerationParams.model_fields), exclude_none=True, exclude_unset=True)
        defaults = {name: setting.off for name, setting in SETTINGS.items() if setting.off is not None}
        values = {**defaults, "max_tokens": min(16, settings.max_tokens), **given}
        values["top_k"] = max(0, values["top_k"])
        return check_limits(GenerationParams(**values), settings)


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
    """The first sample, without the prompt."""
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


class StatusReply(Reply):
    status: Literal["ok"]
