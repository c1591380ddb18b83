"""llama.cpp's server in this process, to compare exported models with."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest


class Llama:
    """llama.cpp's own server, in this process, with one GGUF file."""

    def __init__(self, path: Path):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.verbosity, params.warmup, params.n_parallel = str(path), -1, False, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def ask(self, route: str, **body: Any) -> Any:
        """The answer to a POST, or to a GET where there is nothing to post."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(
            self.server.listening_address + route, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text: str) -> list[int]:
        return list(self.ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"])

    def greedy(self, prompt: str | list[int], count: int, probabilities: int = 0) -> Any:
        settings = {"temperature": 0, "repeat_penalty": 1.0, "n_probs": probabilities, "return_tokens": True}
        return self.ask("/completion", prompt=prompt, n_predict=count, **settings)
