"""A desk: one story, the text being written for it, and the history it is kept in. Shared by all tabs that show it.

>>> desks = Desks(History(path))
>>> desk = desks.open()                          # an empty story; desks.open(id) for one that exists
>>> desk.type("The fog", desk.story.rev)
>>> desk.go_on(backend, GenerationParams())      # returns at once; desk.live() shows the text as it grows
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass

from config import GenerationParams
from ui.backends import Backend
from ui.history import History
from ui.jobs import Job
from ui.story import Story, Take

KEPT = 300  # desks in memory; stories beyond that are read from the history again


@dataclass(frozen=True)
class Live:
    """What an editor shows: the text, what of it is new, and whether it is being written just now."""

    text: str
    rev: int
    fresh: int  # characters at the end that the model wrote last
    running: bool


class Desk:
    """Every change is on disk before it is forgotten elsewhere; while the model writes, the text is only read."""

    def __init__(self, history: History, story_id: str):
        self.history, self.id = history, story_id
        self.lock = threading.RLock()
        self.job: Job | None = None
        self.notice = ""
        self._retrying = False
        self._base = ""
        self._kept = True  # whether the last job's words are in the story
        row = history.story(story_id)
        self.title = row.title if row else ""
        self.story = Story.load(row.text, row.extra) if row else Story()
        if row is not None and row.deleted is not None:
            history.restore(story_id)

    @property
    def running(self) -> bool:
        return self.job is not None and not self.job.over

    def save(self, text: str | None = None) -> None:
        """Put the story on disk, with `text` in place of its own while the model is writing."""
        body = self.story.text if text is None else text
        self.history.save_story(self.id, text=body, title=self.title, extra=self.story.dump())

    def type(self, text: str, rev: int) -> bool:
        """Take over the writer's edit of revision `rev`; False for a late edit of a text that is no longer there."""
        with self.lock:
            if rev != self.story.rev or self.running:
                return False
            if self.story.type(text):
                self.save()
            return True

    def rename(self, title: str) -> None:
        with self.lock:
            if title != self.title:
                self.title = title
                self.save()

    def put(self, text: str) -> None:
        """Replace the whole text; undo brings the former one back."""
        with self.lock:
            if not self.running:
                self.story.put(text)
                self.save()

    def undo(self) -> None:
        self._step(self.story.undo)

    def redo(self) -> None:
        self._step(self.story.redo)

    def choose(self, at: int) -> None:
        """Put another version of the newest passage into the text."""
        self._step(lambda: self.story.choose(at))

    def _step(self, step: object) -> None:
        with self.lock:
            if not self.running and callable(step):
                step()
                self.save()

    def go_on(self, backend: Backend, params: GenerationParams) -> Job | None:
        """Begin a passage at the end of the text; None while another is being written."""
        return self._begin(backend, self.story.text, params, retrying=False)

    def retry(self, backend: Backend, params: GenerationParams) -> Job | None:
        """Begin another version of the newest passage; with a fixed seed the next one is taken."""
        story = self.story
        if not story.takes:
            return None
        if params.seed is not None:
            params = params.model_copy(update={"seed": params.seed + len(story.takes)})
        return self._begin(backend, story.base, params, retrying=True)

    def _begin(self, backend: Backend, base: str, params: GenerationParams, *, retrying: bool) -> Job | None:
        with self.lock:
            if self.running:
                return None
            prompt = base.rstrip(" ")  # tokenizers put the space before a word, not after
            self.notice = ""
            self._retrying, self._base, self._kept = retrying, prompt, False
            self.job = Job(backend, prompt, params, on_note=self._note, on_end=self._end)
            return self.job.start()

    def stop(self) -> None:
        """End the passage; what came is kept."""
        job = self.job
        if job is not None:
            job.cancel()

    def _note(self, job: Job) -> None:
        self.save(self._base + job.samples[0].text)

    def _end(self, job: Job) -> None:
        with self.lock:
            self._kept = True
            self.notice = job.message
            written = [(index, sample) for index, sample in enumerate(job.samples) if sample.text]
            if not written:
                if all(sample.reason == "stop" for sample in job.samples):
                    self.notice = "The model ended the text here without a word. Try again, or change the last words."
                self.save()
                return
            takes = [
                Take(
                    sample.text,
                    None if sample.pieced else job.seed,
                    {**job.params.model_dump(mode="json"), "seed": job.seed, "index": index},
                    job.backend.name,
                    sample.reason,
                    sample.tokens,
                    job.seconds,
                    job.first_s,
                )
                for index, sample in written
            ]
            if self._retrying:
                self.story.add_takes(takes)
            else:
                if self.story.text != self._base:
                    self.story.type(self._base)
                self.story.open_passage(takes)
            self.save()
            for take in takes:
                self.history.add_passage(
                    story_id=self.id,
                    prompt=job.prompt,
                    text=take.text,
                    params=take.params,
                    seed=take.seed,
                    model=take.model,
                    tokens=take.tokens,
                    seconds=take.seconds,
                    first_s=take.first_s,
                    finish_reason=take.finish_reason,
                )

    def live(self) -> Live:
        """The text as it stands at this moment."""
        with self.lock:
            job = self.job
            if job is not None and not self._kept:
                text = job.samples[0].text
                return Live(self._base + text, self.story.rev, len(text), True)
            take = self.story.passage
            return Live(self.story.text, self.story.rev, len(take.text) if take else 0, self.running)


class Desks:
    """The desks of one history."""

    def __init__(self, history: History):
        self.history = history
        self.life = uuid.uuid4().hex[:8]  # tells edits of this process's stories from those of one before it
        self._lock = threading.Lock()
        self._desks: dict[str, Desk] = {}

    def open(self, story_id: str = "") -> Desk:
        """The desk of a story, the same for everybody who asks; without an id, of a new one."""
        story_id = story_id or uuid.uuid4().hex
        with self._lock:
            desk = self._desks.pop(story_id, None) or Desk(self.history, story_id)
            self._desks[story_id] = desk
            idle = [key for key, other in self._desks.items() if not other.running]
            for key in idle[: max(0, len(self._desks) - KEPT)]:
                del self._desks[key]
            return desk

    def forget(self, story_id: str) -> None:
        """After a change behind the desk's back (rename, erase): read the story again."""
        with self._lock:
            desk = self._desks.get(story_id)
            if desk is not None and not desk.running:
                del self._desks[story_id]
