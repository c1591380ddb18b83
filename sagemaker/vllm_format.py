"""This project's requests and answers on AWS's vLLM (LMI) image, so that callers need not know which engine writes.

The deployment puts this file into the model's archive as `model.py`, where the image looks for formatters:

    python sagemaker/sagemaker_endpoint_deployment.py --engine vllm --model runs/victorian/best …

It runs there without this repository. Beside it the deployment writes SETTINGS_FILE: vLLM's name of each sampling setting
that it has, and the values of those that a request leaves open.
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from djl_python.input_parser import input_formatter
from djl_python.output_formatter import output_formatter

SETTINGS_FILE = "sampling_settings.json"
KEPT = 1000  # requests whose stream may be under way

_streams: OrderedDict[str, dict[str, Any]] = OrderedDict()


def _read(name: str) -> dict[str, Any]:
    """A JSON file of the model folder, in which this file lies."""
    content: dict[str, Any] = json.loads((Path(__file__).resolve().parent / name).read_text(encoding="utf-8"))
    return content


def _context() -> int:
    return int(_read("config.json")["n_positions"])


def _styled(payload: dict[str, Any]) -> str:
    """The prompt behind the control token of its style. ValueError for a style that the model does not have."""
    prompt, style = str(payload["prompt"]), str(payload.get("style") or "").strip()
    if not style:
        return prompt
    styles = _read("tokenizer_config.json").get("styles", [])
    if style not in styles:
        raise ValueError(
            f"style {style!r}: vLLM writes in one style at a time, and this model has: {', '.join(styles)}"
        )
    return f"<|{style}|>{prompt}"


@input_formatter
def request(decoded_payload: dict[str, Any], tokenizer: Any = None, **_: Any) -> dict[str, Any]:
    """`/invocations` of this project -> vLLM's completion request."""
    if "max_length" in decoded_payload:
        decoded_payload.setdefault("max_tokens", decoded_payload["max_length"])
    settings = _read(SETTINGS_FILE)
    values = settings["defaults"] | {key: value for key, value in decoded_payload.items() if value is not None}
    made = {theirs: values[ours] for ours, theirs in settings["names"].items() if ours in values}
    made["prompt"] = _styled(decoded_payload)
    if controls := _read("generation_config.json").get("suppress_tokens"):  # which vLLM ignores
        made["logit_bias"] = made.get("logit_bias", {}) | {str(number): -100 for number in controls}
    context = _context()
    made["max_tokens"] = min(made["max_tokens"], context - context // 4)
    made["truncate_prompt_tokens"] = context - made["max_tokens"]
    if decoded_payload.get("return_full_text"):
        if decoded_payload.get("style"):
            raise ValueError("return_full_text: not together with a style, whose mark would be part of the text")
        made["echo"] = True
    if decoded_payload.get("request_id"):
        made["request_id"] = decoded_payload["request_id"]
    if decoded_payload.get("stream"):
        made |= {"stream": True, "stream_options": {"include_usage": True}}
    return made


@output_formatter
def answer(response_data: Any, **_: Any) -> Any:
    """vLLM's answer, or one chunk of its stream -> this project's."""
    return _line(response_data) if isinstance(response_data, str) else _whole(response_data)


def _whole(response: Any) -> dict[str, Any]:
    data = response.model_dump() if hasattr(response, "model_dump") else dict(response)
    if "choices" not in data:
        return {"error": _error(data)}
    usage = data.get("usage") or {}
    samples = [
        {"index": choice["index"], "text": choice["text"], "finish_reason": choice["finish_reason"]}
        for choice in data["choices"]
    ]
    return {
        "generated_text": samples[0]["text"],
        "finish_reason": samples[0]["finish_reason"],
        "usage": {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens", "total_tokens")},
        "seed": None,
        "samples": samples,
    }


def _error(data: dict[str, Any]) -> dict[str, Any]:
    inner: dict[str, Any] = data["error"] if isinstance(data.get("error"), dict) else data
    code = inner.get("code") or "engine_failed"
    return {
        "message": str(inner.get("message", "the engine refused the request"))[:500],
        "type": "invalid_request_error" if code == 400 else "server_error",
        "param": inner.get("param"),
        "code": str(code),
    }


def _line(chunk: str) -> str:
    chunk = chunk.strip()
    chunk = chunk[5:].strip() if chunk.startswith("data:") else chunk
    if not chunk or chunk == "[DONE]":
        return ""
    data = json.loads(chunk)
    if "choices" not in data:
        return json.dumps({"type": "error", "request_id": None, "error": _error(data)})
    identity = data["id"]
    same = {"request_id": identity.removeprefix("cmpl-")}
    made = []
    state = _streams.get(identity)
    if state is None:
        state = _streams[identity] = {"seq": 0, "reason": None}
        while len(_streams) > KEPT:
            _streams.popitem(last=False)
        made.append({"type": "started", **same})
    for choice in data["choices"]:
        if choice.get("text"):
            made.append(
                {"type": "token", **same, "seq": state["seq"], "index": choice["index"], "text": choice["text"]}
            )
            state["seq"] += 1
        if choice.get("finish_reason") and (state["reason"] is None or choice["index"] == 0):
            state["reason"] = choice["finish_reason"]
    if not data["choices"]:
        usage = data.get("usage") or {}
        counts = {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
        made.append({"type": "complete", **same, "finish_reason": state["reason"] or "stop", "usage": counts})
        _streams.pop(identity, None)
    return "\n".join(json.dumps(message, ensure_ascii=False) for message in made)
