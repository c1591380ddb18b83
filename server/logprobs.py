"""Probabilities of tokens as clients read them: OpenAI's logprobs object, and the entries of llama.cpp and KoboldCpp.

>>> logprobs = Logprobs(tokenizer, alternatives=5, offset=len(prompt))
>>> logprobs.add(token_id, -0.3, [(token_id, " fog", -0.3), ...])
>>> logprobs.take()      # {"tokens": [...], "token_logprobs": [...], "top_logprobs": [...], "text_offset": [...]}
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.engine import Event
    from tokenizer import Tokenizer


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A name that no other token has: its text; bytes that are no whole characters as OpenAI writes them, `bytes:\\xe5`.

    The end of text is empty, a control token is called as in the tokenizer, like `<|dickens|>`.
    """
    piece = tokenizer.piece(token)
    if not piece and token != tokenizer.eot:
        return next((name for name, id in tokenizer.controls.items() if id == token), f"<|{token}|>")
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class Logprobs:
    """The logprobs of one text, token by token; `take` returns what was added since the last time."""

    def __init__(self, tokenizer: Tokenizer, alternatives: int, offset: int = 0):
        """alternatives: number of most likely tokens for each, 0 for none. offset: characters before the first token."""
        self.tokenizer, self.alternatives, self.length = tokenizer, alternatives, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._columns = self._empty()

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, logprob: float | None, top: Iterable[tuple[int, str, float]]) -> None:
        """Add a token. logprob: None for a first token. top: (id, text, log-probability), the most likely first."""
        name, others = token_name(self.tokenizer, token), None
        if self.alternatives and logprob is not None:
            others = {name: logprob, **{token_name(self.tokenizer, other): value for other, _, value in top}}
        row = (name, logprob, others, self._offset(token))
        for values, value in zip(self._columns.values(), row, strict=True):
            values.append(value)

    def _offset(self, token: int) -> int:
        """The character of the text at which the token's own text begins; of a part of a character, the character."""
        piece = self.tokenizer.piece(token)
        text = self._decoder.decode(piece)
        start = self.length
        self.length += len(text)
        own = piece.decode("utf-8", "replace")
        return self.length - len(own) if "\ufffd" not in own else start

    def take(self) -> dict[str, list[Any]]:
        """The object for the tokens added since the last call."""
        taken, self._columns = self._columns, self._empty()
        return taken


def token_entry(tokenizer: Tokenizer, event: Event, text: str) -> dict[str, Any]:
    """A written token with its alternatives, as llama.cpp and KoboldCpp (and OpenAI's chats) answer it.

    event: with a log-probability; a `done` is the end-of-text token. text: what the token shows of the text, which joined
    over all tokens is the whole text, where a part of a character shows nothing.
    """
    token = written_token(tokenizer, event)
    top = [_entry(tokenizer, other, token_name(tokenizer, other), value) for other, _, value in event.top]
    for entry in top:
        if entry["id"] == token:
            entry["token"] = text  # by which clients find the token among its alternatives
    return {**_entry(tokenizer, token, text, event.logprob), "top_logprobs": top}


def _entry(tokenizer: Tokenizer, token: int, text: str, logprob: float | None) -> dict[str, Any]:
    return {"id": token, "token": text, "bytes": list(tokenizer.piece(token)), "logprob": logprob}


def written_token(tokenizer: Tokenizer, event: Event) -> int:
    """The id of an event that has a log-probability."""
    token = tokenizer.eot if event.kind == "done" else event.token_id
    assert token is not None
    return token


def token_entries(tokenizer: Tokenizer, events: Iterable[Event], text: str) -> list[dict[str, Any]]:
    """The entries of a whole text's tokens; those that belong to a stop string, which is not in the text, are left out."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    written = [(event, tokenizer.piece(written_token(tokenizer, event))) for event in events]
    found, shown = [], 0
    for number, (event, piece) in enumerate(written, 1):
        characters = len(decoder.decode(piece, number == len(written)))
        own = text[shown : shown + characters]
        shown += characters
        if own or not characters:
            found.append(token_entry(tokenizer, event, own))
    return found
