"""Malformed variations of requests: wrong types, extremes, unknown fields, broken JSON, wrong headers."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

SETTINGS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.1,
    "seed": 3,
    "n": 1,
    "stream": False,
}
KOBOLD = {"prompt": "The fog", "max_length": 3, "rep_pen": 1.1, "rep_pen_range": 20, "typical": 0.9, "nsigma": 1.0}
KOBOLD |= {
    "sampler_seed": 3,
    "stop_sequence": ["e"],
    "memory": "The",
    "max_context_length": 30,
    "genkey": "K1",
    **SETTINGS,
}
KOBOLD |= {"logprobs": True, "trim_stop": True, "use_default_badwordsids": False, "logit_bias": {"3": 1.0}}
LLAMA = {"prompt": "The fog", "n_predict": 3, "repeat_penalty": 1.1, "repeat_last_n": 20, "typical_p": 0.9, **SETTINGS}
LLAMA |= {"n_probs": 3, "post_sampling_probs": True, "samplers": ["top_k"], "stop": ["e"], "logit_bias": [[3, 1.0]]}
LLAMA |= {"dry_multiplier": 0.5, "dry_sequence_breakers": ["\n"], "dry_penalty_last_n": 10, "ignore_eos": True}
ROUTES: dict[str, dict[str, Any]] = {
    "/api/v1/generate": KOBOLD,
    "/api/extra/generate/stream": KOBOLD,
    "/api/extra/generate/check": {"genkey": "K1"},
    "/api/extra/abort": {"genkey": "K1"},
    "/api/extra/last_logprobs": {"genkey": "K1"},
    "/api/extra/tokencount": {"prompt": "The fog", "special": False},
    "/api/extra/detokenize": {"ids": [1, 2, 3]},
    "/completion": LLAMA,
    "/tokenize": {"content": "The fog", "parse_special": True, "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    0.5,
    -0.0,
    1e308,
    1e-308,
    2.0,
)
VALUES += (
    "",
    "x",
    "\ud800",
    "\x00",
    "é" * 500,
    "[",
    "[" * 2000,
    "{}",
    [],
    [[]],
    [None],
    [1, "a"],
    {},
    {"": {}},
    [[1, 2, 3]],
)
VALUES += ([[10**12, 1.0]], [[3, None]], [1e300], {"99999999999": 1}, ["a"] * 40, float("nan"), float("inf"))


def variation(rng: Random, body: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """(the bytes of a body, its headers): `body` with one to three things wrong with it."""
    changed: Any = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.75:
            changed[rng.choice(list(body))] = rng.choice(VALUES)
        elif kind < 0.85:
            changed[rng.choice(("tfs", "mirostat", "grammar", "model", "\ud800", "", "x" * 300))] = rng.choice(VALUES)
        else:
            changed.pop(rng.choice(list(body)), None)
    data = json.dumps(changed).encode()
    kind = rng.random()
    if kind < 0.05:
        data = data[: rng.randrange(len(data))]
    elif kind < 0.08:
        data = bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
    elif kind < 0.1:
        data = json.dumps(rng.choice(VALUES)).encode()
    return data, {} if rng.random() < 0.03 else {"Content-Type": "application/json"}
