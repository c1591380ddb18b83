"""The history in one SQLite file: every story, and every passage that a model wrote for it.

>>> history = History(Path("history.sqlite"))
>>> history.save_story("a1", text="The fog rolled in.", title="", extra={})
>>> [row.title for row in history.stories(search="fog")]
['The fog rolled in.']
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, ForeignKey, create_engine, delete, event, func, or_, select, text, update
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

FORMAT = 1


class HistoryError(RuntimeError):
    """The file cannot be used; the message gives the reason and the fix."""


class Base(DeclarativeBase):
    pass


class StoryRow(Base):
    """One story."""

    __tablename__ = "stories"
    id: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(default="")
    text: Mapped[str] = mapped_column(default="")
    extra: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created: Mapped[float]
    updated: Mapped[float] = mapped_column(index=True)
    starred: Mapped[bool] = mapped_column(default=False)
    deleted: Mapped[float | None]


class PassageRow(Base):
    """One passage as the model wrote it, used or not."""

    __tablename__ = "passages"
    id: Mapped[int] = mapped_column(primary_key=True)
    story_id: Mapped[str | None] = mapped_column(ForeignKey("stories.id"), index=True)
    created: Mapped[float] = mapped_column(index=True)
    prompt: Mapped[str]
    text: Mapped[str]
    params: Mapped[dict[str, Any]] = mapped_column(JSON)
    seed: Mapped[int | None]
    model: Mapped[str]
    tokens: Mapped[int]
    seconds: Mapped[float]
    first_s: Mapped[float | None]
    finish_reason: Mapped[str]


class PresetRow(Base):
    """Sampling settings saved under a name."""

    __tablename__ = "presets"
    name: Mapped[str] = mapped_column(primary_key=True)
    params: Mapped[dict[str, Any]] = mapped_column(JSON)


@dataclass(frozen=True)
class StorySummary:
    """A line of the history; `opening` is the first 200 characters, times are seconds since 1970."""

    id: str
    title: str
    opening: str
    words: int
    passages: int
    created: float
    updated: float
    starred: bool
    deleted: bool

    @property
    def day(self) -> datetime:
        return datetime.fromtimestamp(self.updated, UTC)


def now() -> float:
    return datetime.now(UTC).timestamp()


def default_path() -> Path:
    """Path of the history unless --history gives another (Linux: ~/.local/share/victorian-literature-generator)."""
    from platformdirs import user_data_path

    return user_data_path("victorian-literature-generator", appauthor=False) / "history.sqlite"


def title_of(title: str, body: str, limit: int = 60) -> str:
    """The given title, or the story's first words."""
    if title.strip():
        return title.strip()
    line = " ".join(body.split())
    if not line:
        return "Untitled"
    return line if len(line) <= limit else line[:limit].rsplit(" ", 1)[0].rstrip(",;:—- ") + " …"


class History:
    """Stories, passages and presets on disk. Usable from several threads; every method is its own transaction."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 20})
            event.listen(self._engine, "connect", _pragmas)
            with self._engine.begin() as connection:
                found = connection.execute(text("PRAGMA user_version")).scalar_one()
                if found > FORMAT:
                    raise HistoryError(f"{path}: written by a newer version of this program: give another --history")
                Base.metadata.create_all(connection)
                connection.execute(text(f"PRAGMA user_version = {FORMAT}"))
        except (OSError, DatabaseError) as error:
            reason = error.orig if isinstance(error, DatabaseError) else error
            raise HistoryError(f"{path}: {reason}: give another file with --history") from None
        self._session = sessionmaker(self._engine)

    def close(self) -> None:
        """Close the file."""
        self._engine.dispose()

    def save_story(self, story_id: str, *, text: str, title: str | None = None, extra: dict[str, Any]) -> None:
        """Save a story; `title` None leaves the title alone. A new story without a word is not saved."""
        with self._session.begin() as session:
            row = session.get(StoryRow, story_id)
            if row is None:
                if not text.strip() and not (title or "").strip():
                    return
                row = StoryRow(id=story_id, created=now(), updated=now(), starred=False)
                session.add(row)
            if row.text != text:
                row.updated = now()
            row.text, row.extra = text, extra
            if title is not None:
                row.title = title

    def story(self, story_id: str) -> StoryRow | None:
        """A story by its id, deleted ones too."""
        with self._session() as session:
            row = session.get(StoryRow, story_id)
            if row is not None:
                session.expunge(row)
            return row

    def stories(
        self, *, search: str = "", starred: bool = False, deleted: bool = False, limit: int = 500
    ) -> list[StorySummary]:
        """Newest first; every word of `search` must occur in the title or the text."""
        count = (
            select(func.count(PassageRow.id)).where(PassageRow.story_id == StoryRow.id).correlate(StoryRow)
        ).scalar_subquery()
        query = select(StoryRow, count).order_by(StoryRow.updated.desc()).limit(limit)
        query = query.where(StoryRow.deleted.is_not(None) if deleted else StoryRow.deleted.is_(None))
        if starred:
            query = query.where(StoryRow.starred)
        for word in search.split():
            query = query.where(
                or_(StoryRow.text.icontains(word, autoescape=True), StoryRow.title.icontains(word, autoescape=True))
            )
        with self._session() as session:
            return [
                StorySummary(
                    row.id,
                    title_of(row.title, row.text),
                    row.text[:200],
                    len(row.text.split()),
                    passages,
                    row.created,
                    row.updated,
                    row.starred,
                    row.deleted is not None,
                )
                for row, passages in session.execute(query)
            ]

    def texts(self, ids: Sequence[str]) -> list[StoryRow]:
        """Whole stories in the order of `ids`; unknown ones are left out."""
        found = [self.story(story_id) for story_id in ids]
        return [row for row in found if row is not None]

    def star(self, story_id: str, starred: bool) -> None:
        self._change(story_id, starred=starred)

    def rename(self, story_id: str, title: str) -> None:
        self._change(story_id, title=title)

    def delete(self, story_id: str) -> None:
        """Move a story to the bin; `restore` undoes it."""
        self._change(story_id, deleted=now())

    def restore(self, story_id: str) -> None:
        self._change(story_id, deleted=None)

    def erase(self, story_id: str) -> None:
        """Delete a story and its passages permanently."""
        with self._session.begin() as session:
            session.execute(delete(PassageRow).where(PassageRow.story_id == story_id))
            session.execute(delete(StoryRow).where(StoryRow.id == story_id))

    def _change(self, story_id: str, **values: Any) -> None:
        with self._session.begin() as session:
            session.execute(update(StoryRow).where(StoryRow.id == story_id).values(**values))

    def add_passage(self, **values: Any) -> None:
        """Save one passage; the fields are those of `PassageRow`."""
        with self._session.begin() as session:
            session.add(PassageRow(created=now(), **values))

    def passages(self, story_id: str | None = None, limit: int = 5000) -> list[PassageRow]:
        """Passages, oldest first: of one story, or the newest `limit` of all."""
        query = select(PassageRow).order_by(PassageRow.id.desc()).limit(limit)
        if story_id is not None:
            query = query.where(PassageRow.story_id == story_id)
        with self._session() as session:
            rows = list(session.scalars(query))
            session.expunge_all()
        return rows[::-1]

    def presets(self) -> dict[str, dict[str, Any]]:
        """Saved sampling settings by name."""
        with self._session() as session:
            return {row.name: row.params for row in session.scalars(select(PresetRow).order_by(PresetRow.name))}

    def save_preset(self, name: str, params: dict[str, Any]) -> None:
        with self._session.begin() as session:
            session.merge(PresetRow(name=name, params=params))

    def delete_preset(self, name: str) -> None:
        with self._session.begin() as session:
            session.execute(delete(PresetRow).where(PresetRow.name == name))


def _pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
