"""Fixtures of the server's tests: a tiny model, an engine, a client in this process, and an address on a socket."""

from support.api_support import client, engine, live, model, tokenizer

__all__ = ["client", "engine", "live", "model", "tokenizer"]
