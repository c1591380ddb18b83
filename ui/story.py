"""A story: its text, undo and redo, and the versions of the newest passage. No Streamlit, no model.

>>> story = Story(text="The fog")
>>> story.open_passage([Version(" rolled in.")])
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

PAUSE_S = 2.0  # a longer pause in typing starts a new undo step
UNDO_STEPS = 200
UNDO_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Version:
    """One version of a passage: the model's text, and the settings it was generated with."""

    text: str
    seed: int | None = None
    params: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    finish_reason: str = ""
    tokens: int = 0
    seconds: float = 0.0
    first_s: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """Everything that undo restores."""

    text: str = ""
    base: str = ""
    versions: tuple[Version, ...] = ()
    at: int = 0


class Story:
    """Text plus undo and redo.

    `rev` increases whenever the text changes by other means than the writer's typing: an editor then has to show the new
    text, and an edit of an older revision is recognised as late.
    """

    def __init__(
        self,
        text: str = "",
        *,
        base: str = "",
        versions: tuple[Version, ...] = (),
        at: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.current = Snapshot(text, base, versions, at)
        self.past: list[Snapshot] = []
        self.future: list[Snapshot] = []
        self.rev = 0
        self.clock = clock
        self.typed = float("-inf")  # time of the last typing step; minus infinity after any other step

    @property
    def text(self) -> str:
        return self.current.text

    @property
    def versions(self) -> tuple[Version, ...]:
        return self.current.versions

    @property
    def at(self) -> int:
        return self.current.at

    @property
    def base(self) -> str:
        """The text before the newest passage."""
        return self.current.base

    @property
    def passage(self) -> Version | None:
        """The version of the newest passage that is in the text; None where there is no passage."""
        return self.current.versions[self.current.at] if self.current.versions else None

    def _set(self, state: Snapshot, *, typing: bool = False) -> None:
        moment = self.clock()
        if not (typing and moment - self.typed < PAUSE_S):
            self.past.append(self.current)
            while len(self.past) > UNDO_STEPS or sum(len(old.text) for old in self.past) > UNDO_CHARACTERS:
                self.past.pop(0)
        self.future.clear()
        self.current, self.typed = state, moment if typing else float("-inf")
        if not typing:
            self.rev += 1

    def edit(self, text: str) -> bool:
        """The writer's edit; edits without a pause are one undo step. False where nothing changed."""
        if text == self.current.text:
            return False
        self._set(edited(self.current, text), typing=True)
        return True

    def atomic_write_text(self, text: str) -> None:
        """Replace the text; the newest passage ends."""
        self._set(Snapshot(text))

    def open_passage(self, versions: list[Version]) -> None:
        """Append a passage to the text: the first of its versions."""
        base = self.current.text
        self._set(Snapshot(base + versions[0].text, base, tuple(versions), 0))

    def add_versions(self, versions: list[Version]) -> None:
        """More versions of the same passage; the first of them replaces the one in the text."""
        state = self.current
        self._set(
            Snapshot(state.base + versions[0].text, state.base, state.versions + tuple(versions), len(state.versions))
        )

    def choose(self, at: int) -> None:
        """Put version `at` of the passage into the text. IndexError where there is no such version."""
        if not 0 <= at < len(self.current.versions):
            raise IndexError(f"version {at + 1} of {len(self.current.versions)}")
        if at != self.current.at:
            self._set(replace(self.current, text=self.current.base + self.current.versions[at].text, at=at))

    def undo(self) -> bool:
        """One step back; False where there is none."""
        return self._move(self.past, self.future)

    def redo(self) -> bool:
        """One step forward again; False where there is none."""
        return self._move(self.future, self.past)

    def _move(self, source: list[Snapshot], target: list[Snapshot]) -> bool:
        if not source:
            return False
        target.append(self.current)
        self.current = source.pop()
        self.typed = float("-inf")
        self.rev += 1
        return True

    def dump(self) -> dict[str, Any]:
        """What the history stores besides the text: versions, but no undo steps. The keys are the file's."""
        return {
            "base": self.current.base,
            "takes": [asdict(version) for version in self.current.versions],
            "at": self.current.at,
        }

    @classmethod
    def load(cls, text: str, kept: dict[str, Any]) -> Story:
        """From a text and what `dump` returned; versions that do not fit the text are left out."""
        versions = tuple(Version(**version) for version in kept.get("takes", ()))
        base, at = kept.get("base", ""), kept.get("at", 0)
        if 0 <= at < len(versions) and base + versions[at].text == text:
            return cls(text, base=base, versions=versions, at=at)
        return cls(text)


def edited(state: Snapshot, text: str) -> Snapshot:
    """`state` with its text replaced by an edited one.

    An edit inside the newest passage changes that version, an edit before it changes the text before; an edit across
    its start, or one that leaves nothing of it, ends the passage.
    """
    if not state.versions:
        return Snapshot(text)
    version = state.versions[state.at]
    if text.startswith(state.base) and len(text) > len(state.base):
        versions = list(state.versions)
        versions[state.at] = replace(version, text=text[len(state.base) :])
        return Snapshot(text, state.base, tuple(versions), state.at)
    if version.text and text.endswith(version.text):
        return Snapshot(text, text[: len(text) - len(version.text)], state.versions, state.at)
    return Snapshot(text)
