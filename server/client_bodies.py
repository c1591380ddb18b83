"""The bodies of other programs' APIs: OpenAI's completions, KoboldAI's and llama.cpp's, with their names and ranges.

>>> body = KoboldBody.model_validate({"prompt": "The fog", "max_length": 40, "rep_pen": 1.1, "sampler_seed": -1})
>>> body.params(settings, service.defaults)      # GenerationParams; what they leave open is the server's default

A setting may come under its own name too. Fields that are unknown are ignored; those that would change the text and cannot be
honoured are refused (UNSUPPORTED).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
    model_validator,
)

from config import BIASES, PHRASE_CHARACTERS, PHRASES, SETTINGS, GenerationParams, Setting
from server.errors import bad_value
from server.schemas import Body, Text, as_integer, check_limits
from server.settings import ServerFlags

# settings of other servers that change the text and do not exist here: the values that switch them off, besides nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "dynatemp_range": (0,),
    "dynamic_temperature": (),
    "smoothing_factor": (0,),
    "adaptive_target": (-1,),  # and every other negative value
    "skew": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "num_beams": (1,),
    "use_beam_search": (),
    "min_tokens": (0,),
    "min_length": (0,),
    "grammar": (),
    "grammar_string": (),
    "json_schema": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "response_format": ({"type": "text"},),
    "banned_tokens": (),
    "banned_strings": (),
    "custom_token_bans": (),
    "bad_words": (),
    "allowed_token_ids": (),
    "stop_token_ids": (),
    "include_stop_str_in_output": (),
    "bypass_eos": (),
    "singleline": (),
    "images": (),
    "lora": (),
}


def _phrases(value: Any) -> Any:
    """A string as a list of one; without empty strings, which nothing matches."""
    value = [value] if isinstance(value, str) else value
    return [text for text in value if text != ""] if isinstance(value, list) else value


def _json_phrases(value: Any) -> Any:
    """The same, and of a string that is itself a JSON list what it says: mikupad sends it so."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    return _phrases(value)


def _bias_pairs(value: Any) -> Any:
    """llama.cpp's `[[id, bias], [id, false]]` as `{id: bias}`; false forbids the token."""
    if not isinstance(value, list):
        return value
    found = {}
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or type(id := as_integer(pair[0])) is not int:
            raise ValueError("must be an object of token ids, or a list of pairs [id, bias]")
        found[str(id)] = -100.0 if pair[1] is False else pair[1]
    return found


def _wide(kind: Any, off: Any, **bounds: Any) -> Any:
    """A number of which the negative values mean `off`."""
    return Annotated[kind, Field(**bounds), AfterValidator(lambda value: off if value < 0 else value)]


_PHRASE_JSON = {"type": "string", "maxLength": PHRASE_CHARACTERS}
_PHRASES_JSON = {"anyOf": [_PHRASE_JSON, {"type": "array", "items": _PHRASE_JSON, "maxItems": PHRASES}]}
_BIAS_JSON = {"type": "number", "minimum": -100, "maximum": 100}
_PAIR_JSON = {
    "type": "array",
    "prefixItems": [
        {"type": "integer", "minimum": 0, "maximum": 999_999_999},
        {"anyOf": [_BIAS_JSON, {"const": False}]},
    ],
}
_PAIRS_JSON = {"type": "array", "items": {**_PAIR_JSON, "minItems": 2, "maxItems": 2}, "maxItems": BIASES}
_BIASES_JSON = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": _BIAS_JSON,
    "maxProperties": BIASES,
}


def _annotation(name: str) -> Any:
    """A setting's type without the metadata of controls."""
    field = GenerationParams.model_fields[name]
    return Annotated[field.annotation, *(part for part in field.metadata if not isinstance(part, Setting))]


def _list_type(name: str, convert: Any) -> Any:
    return Annotated[_annotation(name), BeforeValidator(convert), WithJsonSchema(_PHRASES_JSON)]


SMALLEST = 1e-6  # a share of which one token remains: the ends of sliders, 0 and 1, mean the most likely token
# where other servers take more than a GenerationParams does
WIDE: dict[str, Any] = {
    "seed": _wide(int, None, ge=-(2**63), lt=2**63),  # as in llama.cpp and KoboldCpp: a new seed
    "top_k": _wide(int, 0, ge=-1, le=1_000_000),
    "penalty_last_n": _wide(int, 0, ge=-1, le=1_000_000),
    "top_n_sigma": _wide(float, 0.0, ge=-1.0, le=20.0),
    "top_p": Annotated[float, Field(ge=0.0, le=1.0), AfterValidator(lambda p: max(p, SMALLEST))],
    "typical_p": Annotated[float, Field(ge=0.0, le=1.0), AfterValidator(lambda p: max(p, SMALLEST))],
    "min_p": Annotated[float, Field(ge=0.0, le=1.0), AfterValidator(lambda p: min(p, 1 - SMALLEST))],
    "xtc_threshold": Annotated[float, Field(gt=0.0, le=1.0)],  # beyond 0.5 there is nothing to exclude
    "stop": _list_type("stop", _phrases),
    "dry_sequence_breakers": _list_type("dry_sequence_breakers", _json_phrases),
    "logit_bias": Annotated[
        _annotation("logit_bias"), BeforeValidator(_bias_pairs), WithJsonSchema({"anyOf": [_BIASES_JSON, _PAIRS_JSON]})
    ],
}


def _fields(names: Mapping[str, tuple[str, ...]], *, off: bool, **bounds: Any) -> dict[str, Any]:
    """Every sampling setting for `create_model`; null is its default.

    names: other names of a setting, which come before its own. off: the default switches it off, as OpenAI's do; else it
    is the server's. bounds: types that this API has for a setting.
    """
    found: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        field = GenerationParams.model_fields[name]
        default = (
            None if not off else field.get_default(call_default_factory=True) if setting.off is None else setting.off
        )
        kind = bounds.get(name, WIDE.get(name, _annotation(name)))
        alias = AliasChoices(*names[name], name) if name in names else None
        found[name] = kind | None, Field(default, description=field.description, validation_alias=alias)
    return found


class ClientBody(Body):
    """What the three have in common besides the sampling settings."""

    model_config = ConfigDict(**{**Body.model_config, "extra": "allow"})

    stream: bool | None = False
    """Send the text as it is written."""
    ignore_eos: bool | None = Field(
        False, validation_alias=AliasChoices("ignore_eos", "ban_eos_token", "use_default_badwordsids")
    )
    """Never end the text with the end-of-text token."""
    dry_penalty_last_n: int | None = Field(None, ge=-1, le=1_000_000)
    """Newest tokens that DRY looks at; where the penalties look at others too, both look at the larger number."""

    @model_validator(mode="after")
    def _honoured(self) -> ClientBody:
        for name, off in UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            negative = name == "adaptive_target" and isinstance(value, int | float) and value < 0
            if value and value not in off and not negative:
                advice = f"leave it out or set it to {json.dumps(off[0])}" if off else "leave it out"
                message = f"{name}: this server does not have it, and it would change the text: {advice}"
                raise bad_value(message, name, "unsupported")
        return self

    def given(self) -> dict[str, Any]:
        """The sampling settings of the request, without those that are null."""
        # fields only: a setting that comes under two names is also an extra, which has not been validated
        names = self.model_fields_set & set(GenerationParams.model_fields)
        values = {name: self.__dict__[name] for name in names if self.__dict__[name] is not None}
        if values.get("xtc_threshold", 0.0) > 0.5:
            del values["xtc_threshold"]
            values["xtc_probability"] = 0.0
        return values

    def given_with(self, server: ServerFlags, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The sampling settings of the request behind the server's defaults, as `/generate` has them.

        These clients count the tokens that they ask for, so that no sentence is finished beyond them.
        """
        most = min(GenerationParams().max_tokens, server.max_tokens)
        return {"max_tokens": most, **defaults, "finish_sentence": 0, **self.given()}

    def settings(self, values: dict[str, Any], server: ServerFlags) -> GenerationParams:
        """The sampling settings within this server's limits, from all their values."""
        windows = []
        if any(values.get(name, SETTINGS[name].off) != SETTINGS[name].off for name in PENALTIES):
            windows.append(values.get("penalty_last_n", 0))
        if values.get("dry_multiplier"):
            windows.append(
                values.get("penalty_last_n", 0) if self.dry_penalty_last_n is None else self.dry_penalty_last_n
            )
        if windows or "penalty_last_n" in values:
            windows = windows or [values["penalty_last_n"]]
            values = {**values, "penalty_last_n": 0 if min(windows) <= 0 else max(windows)}
        return check_limits(GenerationParams(**values), server)

    def without_end(self, params: GenerationParams, eot: int | None) -> GenerationParams:
        """`params` with the end-of-text id `eot` forbidden, if the request asks for that."""
        if not self.ignore_eos or eot is None:
            return params
        return params.model_copy(update={"logit_bias": {**params.logit_bias, eot: -100.0}})


PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def _completion_prompt(value: Any) -> Any:
    if isinstance(value, list):
        value = [[as_integer(item) for item in part] if isinstance(part, list) else as_integer(part) for part in value]
    texts = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    if isinstance(value, str) or texts or _token_ids(value):
        return value
    if isinstance(value, list) and value and all(_token_ids(item) for item in value):
        return value
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists; none empty")


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


def prompt_list(prompt: Any) -> list[str | list[int]]:
    """Every prompt of a `CompletionPrompt`."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


class StreamOptions(BaseModel):
    """Extras of a streamed completion."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool | None = False


class _OpenAIOnly(ClientBody):
    """What OpenAI's request has besides the prompt and the sampling settings."""

    model: str | None = None
    """Name of the model, as in /v1/models."""
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
    truncate_prompt_tokens: Literal[-1] | Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Keep only this many tokens of a prompt, its last ones (vLLM's); -1: as many as fit into the context."""


# names that text-generation-webui, KoboldCpp and their clients have for vLLM's and llama.cpp's settings
OPENAI_NAMES = {
    "repetition_penalty": ("repetition_penalty", "rep_pen"),
    "penalty_last_n": ("penalty_last_n", "repetition_penalty_range", "rep_pen_range"),
    "typical_p": ("typical_p", "typical"),
    "top_n_sigma": ("top_n_sigma", "nsigma"),
}
_OpenAISampling = create_model("_OpenAISampling", __base__=_OpenAIOnly, **_fields(OPENAI_NAMES, off=True))


class CompletionBody(_OpenAISampling):
    """OpenAI's `POST /v1/completions`, with the extra fields that vLLM has. Fields it does not know are ignored."""

    prompt: CompletionPrompt
    """A text, token ids, or a list of either."""
    max_tokens: int | None = Field(16, ge=0, le=100_000)
    """New tokens at most."""

    def prompts(self) -> list[str | list[int]]:
        """Every prompt of the request."""
        return prompt_list(self.prompt)

    def params(self, server: ServerFlags) -> GenerationParams:
        """The sampling settings within this server's limits; null means OpenAI's default."""
        defaults = {name: setting.off for name, setting in SETTINGS.items() if setting.off is not None}
        return self.settings({**defaults, "max_tokens": min(16, server.max_tokens), **self.given()}, server)


class _KoboldOnly(ClientBody):
    """What KoboldCpp's request has besides the sampling settings."""

    prompt: Text = ""
    """Text to continue."""
    memory: Text | None = ""
    """Text before the prompt, which stays in view when the prompt is too long for the context."""
    max_context_length: int | None = Field(None, ge=1)
    """Tokens of prompt and answer together; a longer prompt loses its beginning."""
    genkey: str | None = Field(None, max_length=200)
    """A name of this text for /api/extra/generate/check, /api/extra/abort and /api/extra/last_logprobs."""
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = False
    """Whether each token's probability is kept, with 5 alternatives; or with how many."""
    trim_stop: bool | None = True
    """Leave the stop string out of the text."""


KOBOLD_NAMES = {
    "max_tokens": ("max_length",),
    "repetition_penalty": ("rep_pen",),
    "penalty_last_n": ("rep_pen_range",),
    "typical_p": ("typical",),
    "top_n_sigma": ("nsigma",),
    "seed": ("sampler_seed",),
    "stop": ("stop_sequence",),
}
_KoboldSampling = create_model("_KoboldSampling", __base__=_KoboldOnly, **_fields(KOBOLD_NAMES, off=False))


class KoboldBody(_KoboldSampling):
    """KoboldAI's `POST /api/v1/generate` with KoboldCpp's fields. Fields it does not know are ignored."""

    def params(self, server: ServerFlags, defaults: Mapping[str, Any]) -> GenerationParams:
        """The sampling settings within this server's limits; what is left open is the server's default."""
        return self.settings(self.given_with(server, defaults), server)

    @property
    def alternatives(self) -> int | None:
        """Alternatives reported for each token; None: no probabilities."""
        return (5 if self.logprobs else None) if isinstance(self.logprobs, bool) else self.logprobs


class _LlamaOnly(ClientBody):
    """What llama.cpp's request has besides the sampling settings."""

    n_probs: int | None = Field(0, ge=0, le=50)
    """Most likely tokens reported for each token, with their probabilities."""
    post_sampling_probs: bool | None = False
    """Report the probabilities that the samplers leave, instead of the model's."""
    return_tokens: bool | None = False
    """Also answer the token ids."""
    samplers: list[str] | str | None = None
    """Names of the samplers in use: those that it leaves out are off. Their order is this server's own."""


LLAMA_NAMES = {
    "max_tokens": ("n_predict",),
    "repetition_penalty": ("repeat_penalty",),
    "penalty_last_n": ("repeat_last_n",),
    "keep": ("n_keep",),
    "n": ("n_cmpl",),
}
# what each of llama.cpp's samplers switches off when it is not named; all of its own names for one of them count
LLAMA_SAMPLERS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("penalties",): PENALTIES,
    ("dry",): ("dry_multiplier",),
    ("top_n_sigma", "top-n-sigma"): ("top_n_sigma",),
    ("top_k",): ("top_k",),
    ("typ_p", "typical_p"): ("typical_p",),
    ("top_p",): ("top_p",),
    ("min_p",): ("min_p",),
    ("xtc",): ("xtc_probability",),
    ("temperature", "temp"): ("temperature",),
}
_LlamaSampling = create_model(
    "_LlamaSampling",
    __base__=_LlamaOnly,
    **_fields(
        LLAMA_NAMES,
        off=False,
        max_tokens=Annotated[int, Field(ge=-1, le=100_000)],
        penalty_last_n=Annotated[int, Field(ge=-1, le=1_000_000)],  # here 0 is none, and -1 all
        keep=_wide(int, 1_000_000, ge=-1),
    ),
)


def llama_settings(params: GenerationParams) -> dict[str, Any]:
    """Sampling settings under llama.cpp's names."""
    return {LLAMA_NAMES.get(name, (name,))[0]: value for name, value in params.model_dump(mode="json").items()}


_ONE_PROMPT_JSON = {
    "anyOf": [
        part | ({"maxItems": 1} if part["items"]["type"] != "integer" else {}) for part in _PROMPT_JSON["anyOf"][1:]
    ]
    + [{"type": "string"}]
}


class LlamaBody(_LlamaSampling):
    """llama.cpp's `POST /completion`. Fields it does not know are ignored."""

    prompt: Annotated[CompletionPrompt, WithJsonSchema(_ONE_PROMPT_JSON)] = ""
    """A text or token ids."""

    def params(self, server: ServerFlags, defaults: Mapping[str, Any]) -> GenerationParams:
        """The sampling settings within this server's limits; what is left open is the server's default."""
        values = self.given_with(server, defaults)
        if values["max_tokens"] < 0:
            values["max_tokens"] = server.max_tokens
        values |= dict.fromkeys(self._switched_off(), None)
        values = {name: SETTINGS[name].off if value is None else value for name, value in values.items()}
        return self.settings(values, server)

    def _switched_off(self) -> Iterator[str]:
        """Settings that llama.cpp would not apply: a window of 0 tokens, samplers that are not named."""
        if self.given().get("penalty_last_n") == 0:
            yield from PENALTIES
        if self.dry_penalty_last_n == 0:
            yield "dry_multiplier"
        if isinstance(self.samplers, list):
            for names, settings in LLAMA_SAMPLERS.items():
                if not set(names) & set(self.samplers):
                    yield from settings

    def single_prompt(self) -> str | list[int]:
        """The prompt; ApiError for several."""
        prompts = prompt_list(self.prompt)
        if len(prompts) > 1:
            raise bad_value("prompt: one at a time; /v1/completions takes several", "prompt")
        return prompts[0]


class TokenizeBody(Body):
    """llama.cpp's `POST /tokenize`, and vLLM's, which says `prompt`."""

    model_config = ClientBody.model_config

    content: Text = Field(validation_alias=AliasChoices("content", "prompt"))
    """Text to cut into tokens."""
    parse_special: bool | None = True
    """Read names like `<|endoftext|>` in the text as their tokens."""
    with_pieces: bool | None = False
    """Answer `{"id", "piece"}` for each token; a piece that is no whole character is a list of bytes."""


class DetokenizeBody(Body):
    """llama.cpp's and vLLM's `POST /detokenize`, and KoboldCpp's, which says `ids`."""

    model_config = ClientBody.model_config

    tokens: list[Annotated[int, Field(ge=0), BeforeValidator(as_integer)]] = Field(
        validation_alias=AliasChoices("tokens", "ids")
    )
    """Token ids."""


class CountBody(Body):
    """KoboldCpp's `POST /api/extra/tokencount`."""

    model_config = ClientBody.model_config

    prompt: Text
    """Text to count."""


class GenkeyBody(Body):
    """The name of a text of KoboldCpp's API; without it, the client's only one."""

    model_config = ClientBody.model_config

    genkey: str | None = Field("", max_length=200)
    """As in the request that began the text."""
