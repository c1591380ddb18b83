"""A story that is open in the app: its text, the passage being generated, and saving. All tabs that show it share it.

>>> stories = OpenStories(History(path))
>>> opened = stories.get()                           # a new story; stories.get(id) for one that exists
>>> opened.edit("The fog", opened.story.rev)
>>> opened.continue_text(backend, GenerationParams())   # returns at once; opened.view() shows the text as it grows
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass

from config import GenerationParams
from ui.backends import Backend
from ui.background import BackgroundGeneration
from ui.history import History
from ui.story import Story, Version

MAX_OPEN = 300  # stories in memory; others are read from the history again


@dataclass(frozen=True)
class EditorView:
    """What the editor shows: the text, which part is new, and whether the model is writing."""

    text: str
    rev: int
    fresh: int  # characters at the end that the model wrote last
    running: bool


class OpenStory:
    """A story and its generation. Every change is saved at once; while the model writes, the text cannot be edited."""

    def __init__(self, history: History, story_id: str):
        self.history, self.id = history, story_id
        self.lock = threading.RLock()
        self.generation: BackgroundGeneration | None = None
        self.notice = ""
        self._retrying = False
        self._base = ""
        self._merged = True  # whether the last generation's text is part of the story
        row = history.story(story_id)
        self.title = row.title if row else ""
        self.story = Story.load(row.text, row.extra) if row else Story()
        if row is not None and row.deleted is not None:
            history.restore(story_id)

    @property
    def running(self) -> bool:
        return self.generation is not None and not self.generation.over

    def save(self, text: str | None = None) -> None:
        """Write the story to the history, with `text` in place of its own while the model is writing."""
        body = self.story.text if text is None else text
        self.history.save_story(self.id, text=body, title=self.title, extra=self.story.dump())

    def edit(self, text: str, rev: int) -> bool:
        """Apply the writer's edit of revision `rev`; False for a late edit of a text that has been replaced since."""
        with self.lock:
            if rev != self.story.rev or self.running:
                return False
            if self.story.edit(text):
                self.save()
            return True

    def rename(self, title: str) -> None:
        with self.lock:
            if title != self.title:
                self.title = title
                self.save()

    def atomic_write_text(self, text: str) -> None:
        """Replace the whole text; undo restores the previous one."""
        with self.lock:
            if not self.running:
                self.story.atomic_write_text(text)
                self.save()

    def undo(self) -> None:
        self._step(self.story.undo)

    def redo(self) -> None:
        self._step(self.story.redo)

    def choose(self, at: int) -> None:
        """Put version `at` of the newest passage into the text."""
        self._step(lambda: self.story.choose(at))

    def _step(self, step: object) -> None:
        with self.lock:
            if not self.running and callable(step):
                step()
                self.save()

    def continue_text(self, backend: Backend, params: GenerationParams) -> BackgroundGeneration | None:
        """Start generating a passage at the end of the text; None while another is being written."""
        return self._generate(backend, self.story.text, params, retrying=False)

    def retry(self, backend: Backend, params: GenerationParams) -> BackgroundGeneration | None:
        """Start generating another version of the newest passage; a fixed seed is increased for each version."""
        story = self.story
        if not story.versions:
            return None
        if params.seed is not None:
            params = params.model_copy(update={"seed": params.seed + len(story.versions)})
        return self._generate(backend, story.base, params, retrying=True)

    def _generate(
        self, backend: Backend, base: str, params: GenerationParams, *, retrying: bool
    ) -> BackgroundGeneration | None:
        with self.lock:
            if self.running:
                return None
            prompt = base.rstrip(" ")  # tokenizers put the space before a word, not after
            self.notice = ""
            self._retrying, self._base, self._merged = retrying, prompt, False
            self.generation = BackgroundGeneration(
                backend, prompt, params, on_progress=self._save_progress, on_end=self._finish
            )
            return self.generation.start()

    def stop(self) -> None:
        """Stop the generation; the text so far is kept."""
        generation = self.generation
        if generation is not None:
            generation.cancel()

    def _save_progress(self, generation: BackgroundGeneration) -> None:
        self.save(self._base + generation.samples[0].text)

    def _finish(self, generation: BackgroundGeneration) -> None:
        with self.lock:
            self._merged = True
            self.notice = generation.message
            written = [(index, sample) for index, sample in enumerate(generation.samples) if sample.text]
            if not written:
                if all(sample.reason == "stop" for sample in generation.samples):
                    self.notice = (
                        "The model ended the text here without writing anything. Try again, or change the last words."
                    )
                self.save()
                return
            versions = [
                Version(
                    sample.text,
                    None if sample.resumed else generation.seed,
                    {**generation.params.model_dump(mode="json"), "seed": generation.seed, "index": index},
                    generation.backend.name,
                    sample.reason,
                    sample.tokens,
                    generation.seconds,
                    generation.first_s,
                )
                for index, sample in written
            ]
            if self._retrying:
                self.story.add_versions(versions)
            else:
                if self.story.text != self._base:
                    self.story.edit(self._base)
                self.story.open_passage(versions)
            self.save()
            for version in versions:
                self.history.add_passage(
                    story_id=self.id,
                    prompt=generation.prompt,
                    text=version.text,
                    params=version.params,
                    seed=version.seed,
                    model=version.model,
                    tokens=version.tokens,
                    seconds=version.seconds,
                    first_s=version.first_s,
                    finish_reason=version.finish_reason,
                )

    def view(self) -> EditorView:
        """The text at this moment, the unfinished passage included."""
        with self.lock:
            generation = self.generation
            if generation is not None and not self._merged:
                text = generation.samples[0].text
                return EditorView(self._base + text, self.story.rev, len(text), True)
            version = self.story.passage
            return EditorView(self.story.text, self.story.rev, len(version.text) if version else 0, self.running)


class OpenStories:
    """The open stories of one history."""

    def __init__(self, history: History):
        self.history = history
        self.instance = uuid.uuid4().hex[:8]  # distinguishes this process's edits from those of an earlier one
        self._lock = threading.Lock()
        self._open_stories: dict[str, OpenStory] = {}

    def get(self, story_id: str = "") -> OpenStory:
        """The story with this id, the same object for every caller; without an id a new one."""
        story_id = story_id or uuid.uuid4().hex
        with self._lock:
            opened = self._open_stories.pop(story_id, None) or OpenStory(self.history, story_id)
            self._open_stories[story_id] = opened
            idle = [key for key, other in self._open_stories.items() if not other.running]
            for key in idle[: max(0, len(self._open_stories) - MAX_OPEN)]:
                del self._open_stories[key]
            return opened

    def forget(self, story_id: str) -> None:
        """Read the story again after the history was changed directly (renamed, erased)."""
        with self._lock:
            opened = self._open_stories.get(story_id)
            if opened is not None and not opened.running:
                del self._open_stories[story_id]
