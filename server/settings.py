"""The server's settings: flags of `api.py` and environment variables.

VLG_MODEL=runs/sample/best VLG_API_KEYS=one,two python api.py
>>> settings = read_settings(port=9000)
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from config import ConfigError, FrozenSettings

PREFIX = "VLG_"  # of the environment variables


class ServerFlags(FrozenSettings):
    """The server's settings: each is a flag of `api.py` and an environment variable (VLG_HOST, VLG_PORT, ...)."""

    model: Path | None = None
    """Model folder; default: the newest finished run that is better than those in models/, else the newest of these."""
    name: str = Field("", max_length=200)
    """Name of the model in answers; empty: its folder's name."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in: set VLG_API_KEYS first."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0: any free one."""
    root_path: str = Field("", pattern=r"^(/[A-Za-z0-9.\-_~]+)*$")
    """Prefix under which a proxy serves it, like /writer, whether the proxy strips it or not."""
    trusted_proxies: str = "127.0.0.1,::1"
    """Addresses or networks of proxies, separated by commas, whose X-Forwarded- headers count; * for any."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Arithmetic of the weights; auto: what this processor does fast."""
    index: Path | None = None
    """Prepared data whose originality index answers /v1/originality; default: the training data of the model's run."""
    slots: int = Field(16, ge=1, le=4096)
    """Texts written at the same time."""
    queue_size: int = Field(64, ge=0, le=100_000)
    """Requests that may wait; beyond it the answer is 429."""
    max_tokens: int = Field(4096, ge=1, le=100_000)
    """New tokens a request may ask for."""
    max_n: int = Field(16, ge=1, le=128)
    """Samples a request may ask for."""
    max_prompts: int = Field(32, ge=1, le=1024)
    """Prompts in one batch."""
    max_prompt_chars: int = Field(100_000, ge=1)
    """Characters (or token ids) of one prompt."""
    max_body_bytes: int = Field(1 << 20, ge=1024)
    """Bytes of a request's body or a WebSocket message; beyond it the answer is 413."""
    deadline_s: float = Field(300.0, gt=0.0)
    """Seconds a request may take, waiting included; then its text ends where it is."""
    stall_s: float = Field(30.0, gt=0.0)
    """Seconds a client may leave its stream unread before the connection is dropped."""
    grace_s: float = Field(20.0, ge=0.0)
    """Seconds that running texts may continue after SIGTERM."""
    flush_ms: float = Field(0.0, ge=0.0, le=10_000.0)
    """Milliseconds of text sent as one streamed message; 0: one message per token."""
    ws_requests: int = Field(8, ge=1, le=1000)
    """Texts that one WebSocket may have under way."""
    ws_idle_s: float = Field(600.0, gt=0.0)
    """Seconds a WebSocket may stay silent before it is closed."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""


def client_addresses(address: str) -> str:
    """What to paste into other programs for a server at `address`, in one line."""
    return f"OpenAI {address}/v1, KoboldAI {address}/api, llama.cpp {address}"


def _comma_list(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class Settings(BaseSettings, ServerFlags):
    """`ServerFlags` read from the environment, and what does not belong on a command line."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_comma_list)] = ()
    """API keys, separated by commas; default: no key is needed."""
    origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_list)] = ()
    """Web origins, separated by commas, whose pages may use the server; `null` is a page opened from a file."""


def read_settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by `given`; ConfigError names the invalid variables."""
    try:
        return Settings(**given)
    except ValidationError as error:
        raise ConfigError(
            [f"{PREFIX}{str(fault['loc'][0]).upper()}: {fault['msg']}" for fault in error.errors(include_input=False)]
        ) from None
