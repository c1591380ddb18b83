"""A story being written: its text, what was undone, and the versions of the newest passage. No Streamlit, no model.

>>> story = Story(text="The fog")
>>> story.open_passage([Take(" rolled in.")])
>>> story.text
'The fog rolled in.'
>>> story.undo(); story.text
'The fog'
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

PAUSE_S = 2.0  # a longer pause in typing begins a new step of undo
UNDO_STEPS = 200
UNDO_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Take:
    """One version of a passage: the model's words, and how they came about."""

    text: str
    seed: int | None = None
    params: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    finish_reason: str = ""
    tokens: int = 0
    seconds: float = 0.0
    first_s: float | None = None


@dataclass(frozen=True)
class State:
    """Everything that undo brings back."""

    text: str = ""
    base: str = ""
    takes: tuple[Take, ...] = ()
    at: int = 0


class Story:
    """Text plus undo and redo. `rev` grows whenever the text changes by other means than the writer's own typing,

    so that an editor knows when it has to take over the text, and a late edit of an older text can be told apart.
    """

    def __init__(
        self,
        text: str = "",
        *,
        base: str = "",
        takes: tuple[Take, ...] = (),
        at: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.state = State(text, base, takes, at)
        self.past: list[State] = []
        self.future: list[State] = []
        self.rev = 0
        self.clock = clock
        self.typed = float("-inf")  # when the last step by typing was taken; minus infinity after any other step

    @property
    def text(self) -> str:
        return self.state.text

    @property
    def takes(self) -> tuple[Take, ...]:
        return self.state.takes

    @property
    def at(self) -> int:
        return self.state.at

    @property
    def base(self) -> str:
        """What stands before the newest passage."""
        return self.state.base

    @property
    def passage(self) -> Take | None:
        """The version of the newest passage that stands in the text; None where there is none any more."""
        return self.state.takes[self.state.at] if self.state.takes else None

    def _go(self, state: State, *, typing: bool = False) -> None:
        moment = self.clock()
        if not (typing and moment - self.typed < PAUSE_S):
            self.past.append(self.state)
            while len(self.past) > UNDO_STEPS or sum(len(old.text) for old in self.past) > UNDO_CHARACTERS:
                self.past.pop(0)
        self.future.clear()
        self.state, self.typed = state, moment if typing else float("-inf")
        if not typing:
            self.rev += 1

    def type(self, text: str) -> bool:
        """The writer's own edit; edits without a pause are one step of undo. False where nothing changed."""
        if text == self.state.text:
            return False
        self._go(edited(self.state, text), typing=True)
        return True

    def put(self, text: str) -> None:
        """Another text altogether, or with a change that no passage belongs to."""
        self._go(State(text))

    def open_passage(self, takes: list[Take]) -> None:
        """New versions of the passage that follows the present text; the first one goes into the text."""
        base = self.state.text
        self._go(State(base + takes[0].text, base, tuple(takes), 0))

    def add_takes(self, takes: list[Take]) -> None:
        """More versions of the same passage; the first of them replaces the one in the text."""
        state = self.state
        self._go(State(state.base + takes[0].text, state.base, state.takes + tuple(takes), len(state.takes)))

    def choose(self, at: int) -> None:
        """Put version `at` of the passage into the text. IndexError where there is no such version."""
        if not 0 <= at < len(self.state.takes):
            raise IndexError(f"version {at + 1} of {len(self.state.takes)}")
        if at != self.state.at:
            self._go(replace(self.state, text=self.state.base + self.state.takes[at].text, at=at))

    def undo(self) -> bool:
        """One step back; False where there is none."""
        return self._move(self.past, self.future)

    def redo(self) -> bool:
        """One step forward again; False where there is none."""
        return self._move(self.future, self.past)

    def _move(self, source: list[State], target: list[State]) -> bool:
        if not source:
            return False
        target.append(self.state)
        self.state = source.pop()
        self.typed = float("-inf")
        self.rev += 1
        return True

    def dump(self) -> dict[str, Any]:
        """What is kept on disk besides the text (undo is not)."""
        return {"base": self.state.base, "takes": [asdict(take) for take in self.state.takes], "at": self.state.at}

    @classmethod
    def load(cls, text: str, kept: dict[str, Any]) -> Story:
        """From a text and what `dump` gave; what does not fit the text any more is left out."""
        takes = tuple(Take(**take) for take in kept.get("takes", ()))
        base, at = kept.get("base", ""), kept.get("at", 0)
        if 0 <= at < len(takes) and base + takes[at].text == text:
            return cls(text, base=base, takes=takes, at=at)
        return cls(text)


def edited(state: State, text: str) -> State:
    """`state` with its text replaced by an edited one; the newest passage lives on where the edit left it whole.

    An edit inside the passage belongs to that version; an edit before it belongs to the text before; an edit
    across the border, or after which nothing of the passage is left, ends the passage.
    """
    if not state.takes:
        return State(text)
    take = state.takes[state.at]
    if text.startswith(state.base) and len(text) > len(state.base):
        takes = list(state.takes)
        takes[state.at] = replace(take, text=text[len(state.base) :])
        return State(text, state.base, tuple(takes), state.at)
    if take.text and text.endswith(take.text):
        return State(text, text[: len(text) - len(take.text)], state.takes, state.at)
    return State(text)
