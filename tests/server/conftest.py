"""The tiny model behind the server, for all tests of this folder."""

from __future__ import annotations

from support.api_support import client, ending, engine, live, model, tokenizer

__all__ = ["client", "ending", "engine", "live", "model", "tokenizer"]
