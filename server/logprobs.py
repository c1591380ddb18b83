"""OpenAI's logprobs object: names, log-probabilities, alternatives and text offsets of tokens.

>>> logprobs = Logprobs(tokenizer, alternatives=5, offset=len(prompt))
>>> logprobs.add(token_id, -0.3, [(token_id, " fog", -0.3), ...])
>>> logprobs.take()      # {"tokens": [...], "token_logprobs": [...], "top_logprobs": [...], "text_offset": [...]}
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
