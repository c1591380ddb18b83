"""The app without a browser: stories, jobs, history, exports, settings, and every page driven by Streamlit's AppTest."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from config import ROOT, GenerationParams
from ui import settings, state, training
from ui.backends import Alternative, BackendError, BackendLost, Place, RemoteBackend, Scored, Seen, Update, connect
from ui.batch import Batch, read_prompts, table
from ui.desk import Desk, Desks
from ui.export import export
from ui.figures import distinct, passage_frame, repetition
from ui.history import History, HistoryError, title_of
from ui.jobs import Job
from ui.story import Story, Take

NASTY = "<script>alert(1)</script> $x$ *a* _b_ `c`\n# b\n\n1. “é” & ~d~"


class Scripted:
    """A backend that writes given words. `fail_after`: the connection breaks after so many words, `deaf` times."""

    def __init__(self, words: str = " one two three four", *, pause: float = 0.0, fail_after: int = -1, deaf: int = 0):
        self.place, self.name = Place("local", "scripted"), "scripted"
        self.words = [f" {word}" for word in words.split(" ") if word]
        self.pause, self.fail_after, self.deaf = pause, fail_after, deaf
        self.requests: list[tuple[str, GenerationParams]] = []
        self.gate = threading.Event()
        self.gate.set()

    def write(self, prompt: str, params: GenerationParams) -> Any:
        if prompt == "refuse":
            raise BackendError("the queue is full: try again in 3 seconds")
        self.requests.append((prompt, params))
        return ScriptedWriting(self, params)

    def score(self, text: str, top: int = 10) -> list[Scored]:
        words = text.split(" ")
        starts = [len(" ".join(words[:at])) for at in range(len(words))]
        return [
            Scored(
                word if at == 0 else f" {word}",
                start,
                None if at == 0 else 0.5 / at,
                None if at == 0 else at,
                (Alternative(" better", 0.6), Alternative(f" {word}", 0.5 / max(1, at))),
            )
            for at, (word, start) in enumerate(zip(words, starts, strict=True))
        ]

    def seen(self, text: str, params: GenerationParams) -> Seen:
        words = text.split(" ")
        start = len(text) - len(" ".join(words[-30:])) if len(words) > 30 else 0
        return Seen(len(words), 40, start)

    def alive(self) -> bool:
        self.deaf -= 1
        return self.deaf < 0

    def close(self) -> None:
        return


class ScriptedWriting:
    def __init__(self, backend: Scripted, params: GenerationParams):
        self.backend, self.params, self.cancelled = backend, params, False

    def cancel(self) -> None:
        self.cancelled = True

    def __iter__(self) -> Iterator[Update]:
        backend, params = self.backend, self.params
        seed = 7 if params.seed is None else params.seed
        yield Update("started", seed=seed, prompt_tokens=3)
        for number, word in enumerate(backend.words[: params.max_tokens]):
            if number == backend.fail_after:
                backend.fail_after = -1
                raise BackendLost("gone")
            backend.gate.wait(10)
            time.sleep(backend.pause)
            if self.cancelled:
                break
            for index in range(params.n):
                yield Update("text", index, word if not index else f"{word}{index}", tokens=1)
        for index in range(params.n):
            yield Update("ended", index, reason="cancelled" if self.cancelled else "length")


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    kept = History(tmp_path / "deep" / "history.sqlite")
    yield kept
    kept.close()


def wait(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# Stories


def test_a_run_of_typing_is_one_step_of_undo_and_a_pause_begins_another() -> None:
    moment = [0.0]
    story = Story("The", clock=lambda: moment[0])
    for text in ("The f", "The fo", "The fog"):
        moment[0] += 0.5
        story.type(text)
    moment[0] += 10
    story.type("The fog came")
    assert story.rev == 0  # the editor has the text already
    story.undo()
    assert (story.text, story.rev) == ("The fog", 1)
    story.undo()
    assert story.text == "The"
    assert not story.undo()
    story.redo()
    story.redo()
    assert story.text == "The fog came"
    assert not story.redo()


def test_versions_of_a_passage_are_kept_chosen_and_undone() -> None:
    story = Story("The fog")
    story.open_passage([Take(" rolled."), Take(" fell.")])
    story.add_takes([Take(" rose.")])
    assert (story.text, story.at, len(story.takes)) == ("The fog rose.", 2, 3)
    story.choose(1)
    assert story.text == "The fog fell."
    with pytest.raises(IndexError, match="version 4 of 3"):
        story.choose(3)
    story.undo()
    assert story.text == "The fog rose."
    story.undo()
    story.undo()
    assert story.text == "The fog" and not story.takes


def test_an_edit_inside_or_before_a_passage_keeps_its_versions_and_one_across_ends_it() -> None:
    story = Story("The fog")
    story.open_passage([Take(" rolled."), Take(" fell.")])
    story.type("The fog rolled in.")
    assert [take.text for take in story.takes] == [" rolled in.", " fell."]
    story.type("A fog rolled in.")
    assert story.base == "A fog"
    story.choose(1)
    assert story.text == "A fog fell."
    story.type("Something else")
    assert story.takes == ()


def test_a_story_comes_back_from_disk_with_its_versions_unless_the_text_is_another() -> None:
    story = Story("The fog")
    story.open_passage([Take(" rolled.", 7, {"n": 1}), Take(" fell.")])
    kept = json.loads(json.dumps(story.dump()))
    again = Story.load(story.text, kept)
    assert (again.text, again.base, again.takes) == (story.text, "The fog", story.takes)
    assert Story.load("Other", kept).takes == ()


# Jobs and desks


def test_a_job_writes_all_samples_and_says_how_fast(history: History) -> None:
    job = Job(Scripted(), "The fog", GenerationParams(n=2, max_tokens=3)).start()
    job.join(10)
    assert [sample.text for sample in job.samples] == [" one two three", " one1 two1 three1"]
    assert job.status == "done" and job.seed == 7 and job.first_s is not None and job.tokens == 6


def test_stopping_keeps_what_came(history: History) -> None:
    backend = Scripted("word " * 500, pause=0.005)
    desk = Desks(history).open()
    desk.type("The fog", desk.story.rev)
    desk.go_on(backend, GenerationParams(max_tokens=500))
    wait(lambda: "word" in desk.live().text)
    assert desk.live().running
    desk.stop()
    wait(lambda: not desk.running)
    text = desk.story.text
    assert text.startswith("The fog word") and 1 < len(text.split()) < 400
    assert history.story(desk.id).text == text
    assert desk.job.status == "stopped"
    desk.undo()
    assert desk.story.text == "The fog"


def test_the_text_in_progress_is_on_disk_and_no_reader_ever_sees_it_step_back(history: History) -> None:
    backend = Scripted("word " * 60, pause=0.003)
    desk = Desks(history).open()
    desk.type("The fog", desk.story.rev)
    job = desk.go_on(backend, GenerationParams(max_tokens=60))
    longest = 0
    while not job.over:
        length = len(desk.live().text)
        assert length >= longest
        longest = length
    assert len(desk.live().text) >= longest
    assert not desk.type("too late", 0)  # an edit of the text before the passage


def test_the_words_stay_on_the_sheet_until_they_are_in_the_story(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    between: list[str] = []
    end = Desk._end

    def spy(desk: Desk, job: Job) -> None:
        between.append(desk.live().text)
        end(desk, job)

    monkeypatch.setattr(Desk, "_end", spy)
    desk = Desks(history).open()
    desk.type("The fog", 0)
    desk.go_on(Scripted(), GenerationParams(max_tokens=2))
    wait(lambda: not desk.running)
    assert between == ["The fog one two"] == [desk.live().text]


def test_a_tab_that_closes_loses_nothing(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.jobs.NOTE_S", 0.0)
    backend = Scripted("word " * 1000, pause=0.002)
    desks = Desks(history)
    desk = desks.open()
    desk.type("The fog", 0)
    desk.go_on(backend, GenerationParams(max_tokens=1000))
    wait(lambda: "word word" in (history.story(desk.id).text or ""))
    assert desk.running
    assert desks.open(desk.id) is desk  # a reload finds the same desk, still writing
    desk.stop()
    wait(lambda: not desk.running)


def test_a_server_that_dies_in_mid_story_is_waited_for_and_the_text_goes_on(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ui.jobs.RETRY_S", 0.01)
    backend = Scripted("one two three four five", fail_after=2, deaf=3)
    seen: list[tuple[str, str]] = []
    job = Job(
        backend,
        "The fog",
        GenerationParams(max_tokens=5, seed=3),
        on_note=lambda job: seen.append((job.status, job.message)),
    ).start()
    job.join(10)
    assert seen[0] == ("lost", "gone")
    assert job.status == "done" and job.message == ""
    assert [prompt for prompt, _ in backend.requests] == ["The fog", "The fog one two"]
    assert backend.requests[1][1].max_tokens == 3 and backend.requests[1][1].seed != 3
    assert job.samples[0].text == " one two one two three" and job.samples[0].pieced


def test_waiting_for_a_dead_server_can_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.jobs.RETRY_S", 0.01)
    job = Job(Scripted(fail_after=1, deaf=10**9), "The fog", GenerationParams(max_tokens=5)).start()
    wait(lambda: job.status == "lost")
    job.cancel()
    job.join(10)
    assert job.status == "stopped" and job.samples[0].text == " one"


def test_what_cannot_begin_fails_at_once_and_says_why(history: History) -> None:
    desk = Desks(history).open()
    desk.type("refuse", 0)
    desk.go_on(Scripted(), GenerationParams())
    wait(lambda: not desk.running)
    assert "the queue is full" in desk.notice and desk.story.text == "refuse"
    lost = Job(Scripted(fail_after=0), "x", GenerationParams()).start()
    lost.join(10)
    assert lost.status == "failed" and lost.message == "gone"


def test_retry_adds_a_version_with_the_next_seed_and_the_space_before_a_word_is_the_models(history: History) -> None:
    backend = Scripted()
    desk = Desks(history).open()
    desk.type("The fog ", 0)
    for _ in range(2):
        (desk.retry if desk.story.takes else desk.go_on)(backend, GenerationParams(max_tokens=1, seed=5))
        wait(lambda: not desk.running)
    assert [prompt for prompt, _ in backend.requests] == ["The fog", "The fog"]
    assert [params.seed for _, params in backend.requests] == [5, 6]
    assert desk.story.text == "The fog one" and len(desk.story.takes) == 2
    assert [row.seed for row in history.passages(desk.id)] == [5, 6]


# History and exports


def test_history_survives_a_restart_and_finds_stars_deletes_and_restores(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    first = History(path)
    first.save_story("a", text=NASTY, title="", extra={"at": 0})
    first.save_story("b", text="100% of it_all", title="A Title", extra={})
    first.save_story("nothing", text="  ", extra={})
    first.star("a", True)
    first.close()
    again = History(path)
    assert {row.id for row in again.stories()} == {"a", "b"}
    assert [row.id for row in again.stories(starred=True)] == ["a"]
    assert [row.id for row in again.stories(search="IT title")] == ["b"]
    assert [row.id for row in again.stories(search="100%")] == ["b"]
    assert again.stories(search="f_i") == []  # an underscore is no wildcard
    assert again.story("a").text == NASTY
    again.delete("a")
    assert [row.id for row in again.stories()] == ["b"]
    assert [row.id for row in again.stories(deleted=True)] == ["a"]
    again.restore("a")
    assert len(again.stories()) == 2
    again.add_passage(
        story_id="a",
        prompt="p",
        text="t",
        params={},
        seed=None,
        model="m",
        tokens=1,
        seconds=1.0,
        first_s=None,
        finish_reason="",
    )
    again.erase("a")
    assert again.story("a") is None and again.passages() == []
    again.close()


def test_a_history_that_cannot_be_used_names_the_file_and_the_flag(tmp_path: Path) -> None:
    bad = tmp_path / "bad.sqlite"
    bad.write_bytes(b"this is no database" * 100)
    with pytest.raises(HistoryError, match=r"bad\.sqlite.*--history"):
        History(bad)
    import sqlite3

    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(HistoryError, match="newer version"):
        History(newer)


def test_history_takes_writers_from_many_threads(history: History) -> None:
    def work(name: str) -> None:
        for number in range(15):
            history.save_story(name, text=f"{name} {number}", extra={})

    threads = [threading.Thread(target=work, args=(f"s{at}",)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row.opening for row in history.stories()) == [f"s{at} 14" for at in range(6)]


@pytest.mark.parametrize("suffix", ["txt", "md", "json", "csv", "epub"])
def test_exports_hold_the_text_as_it_is(suffix: str) -> None:
    data = export([("", NASTY), ("=Two", "=1+1")], suffix)
    if suffix == "json":
        assert [row["text"] for row in json.loads(data)] == [NASTY, "=1+1"]
    elif suffix == "csv":
        import csv

        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
        assert rows[0]["text"] == NASTY and rows[1]["text"] == "'=1+1"  # no formula
    elif suffix == "txt":
        assert NASTY in data.decode()
    elif suffix == "md":
        from markdown_it import MarkdownIt

        shown = MarkdownIt().render(data.decode())
        assert "&lt;script&gt;alert(1)&lt;/script&gt; $x$ *a* _b_ `c`" in shown and "<em>" not in shown
        assert "# b" in shown and shown.count("<h1>") == 2 and "<ol>" not in shown
    else:
        with zipfile.ZipFile(io.BytesIO(data)) as book:
            assert book.testzip() is None and book.namelist()[0] == "mimetype"
            page = next(book.read(name).decode() for name in book.namelist() if name.endswith("story_1.xhtml"))
        from lxml import html

        assert (
            html.fromstring(page.encode()).text_content().count("<script>alert(1)</script> $x$ *a* _b_ `c`\n# b") == 1
        )


def test_titles_come_from_the_first_words() -> None:
    assert title_of("", "") == "Untitled"
    assert title_of(" Mine ", "x") == "Mine"
    long = title_of("", "word " * 40)
    assert len(long) <= 62 and long.endswith("…")


# Settings, batches, figures


def test_sliders_lie_within_the_bounds_of_generation_params_and_hold_its_defaults() -> None:
    for name in settings.LABELS:
        if name in ("seed", "stop"):
            continue
        low, high = settings.span(name)
        for value in (low, high):
            GenerationParams.model_validate({name: settings.clipped(name, value)})
        assert settings.clipped(name, getattr(settings.DEFAULTS, name)) == getattr(settings.DEFAULTS, name)
    assert settings.span("temperature") == (0.0, 2.0) and settings.span("top_k") == (0, 100)
    assert settings.PRESETS["Balanced"]["temperature"] == 1.3
    for values in settings.PRESETS.values():
        GenerationParams.model_validate(values)


def test_a_models_own_values_are_read_and_nonsense_is_not(tmp_path: Path) -> None:
    place = Place("local", str(tmp_path))
    assert settings.own_of(place) == {}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.8, "top_k": 50, "max_new_tokens": 9}')
    assert settings.own_of(place)["temperature"] == 0.8
    (tmp_path / "generation_config.json").write_text('{"temperature": 80}')
    assert settings.own_of(place) == {}


def test_a_batch_writes_every_prompt_in_every_manner_and_can_be_stopped() -> None:
    backend = Scripted()
    wanted = {"a": GenerationParams(max_tokens=2), "b": GenerationParams(max_tokens=1, n=2)}
    batch = Batch(backend, ["x", "y"], wanted).start()
    wait(lambda: not batch.running)
    rows = batch.rows()
    assert [(row["prompt"], row["settings"], row["text"]) for row in rows] == [
        ("x", "a", " one two"), ("x", "b", " one"), ("x", "b", " one1"),
        ("y", "a", " one two"), ("y", "b", " one"), ("y", "b", " one1"),
    ]  # fmt: skip
    assert len(table(rows, "jsonl").splitlines()) == 6 and table(rows, "csv").count(b"\n") == 7
    slow = Batch(Scripted("w " * 300, pause=0.01), ["p"] * 30, {"a": GenerationParams(max_tokens=300)}).start()
    wait(lambda: slow.rows())
    slow.cancel()
    wait(lambda: not slow.running)
    assert slow.done < 30


def test_prompts_are_read_from_text_csv_and_jsonl() -> None:
    assert read_prompts("a.txt", "\ufeffone\r\n\ntwo".encode()) == ["one", "two"]
    assert read_prompts("a.csv", b'id,prompt\n1,"one, two"\n2,three\n') == ["one, two", "three"]
    assert read_prompts("a.jsonl", b'{"prompt": "one"}\n"two"\n{"text": "three"}\n') == ["one", "two", "three"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        read_prompts("a.jsonl", b'{"prompt": "one"}\nnonsense\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts("a.txt", b"\xff\xfe\x00")


def test_figures_of_passages(history: History) -> None:
    assert distinct("a b a b", 1) == 0.5 and distinct("a b a b", 2) == pytest.approx(2 / 3)
    assert repetition("a b c d a b c d") == pytest.approx(0.2) and repetition("a b") is None
    history.add_passage(
        story_id=None, prompt="p", text="a b a b", params={"temperature": 1.0, "n": 2}, seed=1, model="m",
        tokens=10, seconds=2.0, first_s=0.1, finish_reason="length",
    )  # fmt: skip
    frame = passage_frame(history.passages())
    assert frame.loc[0, "tokens_per_s"] == 10.0 and frame.loc[0, "words"] == 4


def test_places_that_cannot_be_are_refused_with_a_remedy() -> None:
    with pytest.raises(BackendError, match="http://"):
        connect(Place("server", "localhost:8000"))
    with pytest.raises(BackendError, match="wss://"):
        connect(Place("gateway", "https://x"))
    with pytest.raises(BackendLost, match="cannot be reached"):
        connect(Place("server", "http://127.0.0.1:9"))
    gateway = connect(Place("gateway", "ws://127.0.0.1:9"))
    assert isinstance(gateway, RemoteBackend) and gateway.seen("x", GenerationParams()) is None
    with pytest.raises(BackendLost, match="cannot be reached"):
        gateway.write("x", GenerationParams())


# Training


def test_runs_are_read_while_they_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "novels"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("[train]\nmax_steps = 40\n")
    (folder / "metrics.jsonl").write_text('{"step": 10, "train_loss": 3.0}\n{"step": 20, "train')
    [run] = training.runs(tmp_path / "runs")
    assert run.rows() == [{"step": 10, "train_loss": 3.0}] and run.total_steps() == 40
    assert not run.running() and not run.resumable()
    (folder / "last").mkdir()
    (folder / "last" / "training_state.pt").touch()
    assert run.resumable()
    with pytest.raises(training.TrainingError, match="not started from the app"):
        training.stop(run)
    with pytest.raises(training.TrainingError, match="letters, digits"):
        training.start("../evil", preset="sample")
    with pytest.raises(training.TrainingError, match="no texts"):
        training.keep_texts(tmp_path / "t", {"a.txt": b"  "})
    training.keep_texts(tmp_path / "t", {"../../x y.txt": b"one", "x y.txt": b"two"})
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["x_y-2.txt", "x_y.txt"]


# Pages


class Page:
    """The app on a scripted backend, in one session."""

    def __init__(self, at: AppTest):
        self.at = at

    def run(self) -> Page:
        self.at.run()
        assert not self.at.exception, [error.value for error in self.at.exception]
        return self

    def desk(self) -> Desk:
        return state.desks().open(self.at.session_state["story_id"])

    def click(self, key: str) -> Page:
        self.at.button(key=key).click()
        return self.run()

    def settled(self) -> Page:
        wait(lambda: not self.desk().running)
        return self.run()

    def html(self) -> str:
        return " ".join(str(element.proto.body) for element in self.at.get("html"))

    def texts(self) -> str:
        kinds = (
            self.at.info,
            self.at.warning,
            self.at.error,
            self.at.markdown,
            self.at.caption,
            self.at.text,
            self.at.title,
        )
        return " ".join(str(element.value) for kind in kinds for element in kind)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    made = Scripted("alpha beta gamma delta")
    monkeypatch.setattr(state, "connect", lambda place: made)
    return made


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Scripted) -> Iterator[Page]:
    model = tmp_path / "runs" / "tiny" / "best"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").touch()
    yield from session(tmp_path, monkeypatch)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Scripted) -> Iterator[Page]:
    """The app on a machine without any model."""
    yield from session(tmp_path, monkeypatch)


def session(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    flags = {"--runs": "runs", "--models": "models", "--history": "h.sqlite", "--data": "data"}
    words = [word for flag, name in flags.items() for word in (flag, str(folder / name))]
    monkeypatch.setattr(sys, "argv", ["app.py", *words])
    st.cache_resource.clear()
    yield Page(AppTest.from_file(str(ROOT / "app.py"), default_timeout=30))
    state.history().close()
    st.cache_resource.clear()


def test_write_continue_retry_undo_and_versions(page: Page, backend: Scripted) -> None:
    page.run()
    assert [button.disabled for button in page.at.button if button.label in ("Retry", "Undo", "Redo")] == [True] * 3
    page.click("opening_0").click("continue").settled()
    opening = backend.requests[0][0]
    assert page.desk().story.text == f"{opening} alpha beta gamma delta"
    page.click("retry").settled()
    assert "version 2 of 2" in page.html()
    page.click("former")
    assert page.desk().story.at == 0
    page.click("use_1")
    assert page.desk().story.at == 1
    page.click("undo").click("undo").click("undo").click("undo")
    assert page.desk().story.text == opening
    page.click("redo")
    assert "alpha" in page.desk().story.text
    assert "first word after" in page.html()


def test_stop_is_offered_while_writing_and_sliders_move_without_harm(page: Page, backend: Scripted) -> None:
    backend.gate.clear()
    page.run().click("opening_0").click("continue")
    assert "Stop" in [button.label for button in page.at.button]
    page.at.slider(key="set_temperature").set_value(0.5)
    page.run()
    assert page.desk().running and page.at.slider(key="set_temperature").value == 0.5
    page.click("stop")
    backend.gate.set()
    page.settled()
    assert "Continue" in [button.label for button in page.at.button]


def test_several_versions_stand_side_by_side(page: Page) -> None:
    page.run()
    page.at.slider(key="set_n").set_value(3)
    page.run().click("opening_0").click("continue").settled()
    assert page.html().count("Version ") == 3 and "alpha2 beta2" in page.html()
    page.click("use_2")
    assert page.desk().story.text.endswith("alpha2 beta2 gamma2 delta2")


def test_text_is_never_read_as_html_or_markdown(page: Page, backend: Scripted) -> None:
    backend.words = [NASTY]
    page.run()
    page.at.slider(key="set_n").set_value(2)
    page.run().click("opening_0").click("continue").settled()
    assert "<script>" not in page.html().replace("&lt;script&gt;", "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x$ *a* _b_ `c`\n# b" in page.html()
    assert all("alert" not in str(part.value) for part in page.at.markdown)


def test_presets_and_presets_of_ones_own(page: Page) -> None:
    page.run()
    assert page.at.selectbox(key="preset").value == "Balanced"
    page.at.selectbox(key="preset").select("Faithful")
    page.run()
    assert page.at.slider(key="set_temperature").value == 0.7
    page.at.slider(key="set_temperature").set_value(0.75)
    page.run()
    assert page.at.selectbox(key="preset").value == settings.ADJUSTED
    page.at.text_input(key="preset_name").set_value("Mine")
    next(button for button in page.at.button if button.label == "Save the manner").click()
    page.run()
    assert page.at.selectbox(key="preset").value == "Mine"
    assert state.history().presets()["Mine"]["temperature"] == 0.75
    page.click("dice")
    assert page.at.number_input(key="set_seed").value is not None


def test_a_permalink_lays_out_the_same_request_again(page: Page, backend: Scripted) -> None:
    from ui.links import packed, unpacked

    page.run()
    page.at.number_input(key="set_seed").set_value(11)
    page.at.slider(key="set_temperature").set_value(0.4)
    page.run().click("opening_0").click("continue").settled()
    link = packed(page.desk())
    other = AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)
    other.query_params["write"] = link
    again = Page(other).run()
    assert again.desk() is not page.desk()
    again.click("continue").settled()
    assert backend.requests[1] == backend.requests[0]
    assert "A link laid out this prompt" not in again.texts()
    for broken in ("nonsense", link[:-9], ""):
        with pytest.raises(ValueError, match="cannot be read"):
            unpacked(broken)


def test_a_reload_brings_the_story_back(page: Page) -> None:
    page.run().click("opening_0").click("continue").settled()
    again = AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)
    again.query_params["story"] = page.desk().id
    assert Page(again).run().desk() is page.desk()


def test_two_sessions_write_their_own_stories(page: Page, backend: Scripted) -> None:
    other = Page(AppTest.from_file(str(ROOT / "app.py"), default_timeout=30))
    page.run().click("opening_0")
    other.run().click("opening_1")
    page.click("continue")
    other.click("continue")
    assert page.settled().desk().story.text != other.settled().desk().story.text
    assert len(state.history().stories()) == 2


def test_the_meter_says_what_the_model_still_sees(page: Page) -> None:
    page.run()
    page.desk().put("word " * 60)
    page.run()
    assert "the model sees the last" in page.html()


def test_no_model_yet_offers_to_train_one(bare: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(training, "start", lambda name, **values: begun.append(values["preset"]))
    bare.run()
    [button] = [button for button in bare.at.button if button.label.startswith("Train the sample model")]
    button.click()
    bare.run()
    assert begun == ["sample"] and bare.at.title[0].value == "Training"


def test_a_model_that_cannot_be_opened_is_explained(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(place: Place) -> Any:
        raise ValueError("config.json: no n_layer: copy the whole folder")

    monkeypatch.setattr(state, "connect", fail)
    assert "copy the whole folder" in page.run().texts()
    page.at.switch_page("ui/pages/model.py")
    assert "copy the whole folder" in page.run().texts()


def test_history_page_searches_stars_deletes_and_opens(page: Page) -> None:
    page.run().click("opening_0").click("continue").settled()
    first = page.desk().id
    page.click("new").click("opening_1")
    page.at.switch_page("ui/pages/history.py")
    page.run()
    assert "2 stories" in page.texts()
    page.at.text_input(key="search").set_value("gamma")
    page.run().click(f"star_{first}")
    assert state.history().stories(starred=True)[0].id == first
    page.click(f"delete_{first}")
    assert "No story holds these words" in page.texts()
    page.at.text_input(key="search").set_value("")
    page.at.segmented_control(key="shown").set_value("Bin")
    page.run().click(f"back_{first}")
    page.at.segmented_control(key="shown").set_value("All")
    page.run().click(f"open_{first}")
    assert page.desk().id == first and page.desk().story.text.endswith("delta")


def test_look_inside_shows_alternatives_and_goes_on_from_one(page: Page, backend: Scripted) -> None:
    page.run()
    page.desk().put("The old house stood")
    page.at.switch_page("ui/pages/inside.py")
    page.run()
    assert "better" in page.html() and "double, below 1" in page.html()
    page.click("take_3_0").settled()
    assert backend.requests[0][0] == "The old house better"
    assert page.desk().story.text.startswith("The old house better alpha")


def test_compare_writes_a_table(page: Page) -> None:
    page.run()
    page.at.switch_page("ui/pages/compare.py")
    page.run()
    page.at.text_area(key="compare_prompts").set_value("one\ntwo <b>")
    page.run().click("compare_start")
    wait(lambda: not page.at.session_state["batch"].running)
    page.run()
    assert len(page.at.dataframe[0].value) == 4 and "two &lt;b&gt;" in page.html()
    assert len(state.history().passages()) == 4


def test_statistics_training_and_model_pages_draw(page: Page, tmp_path: Path) -> None:
    page.run().click("opening_0").click("continue").settled()
    page.at.switch_page("ui/pages/statistics.py")
    page.run()
    assert [metric.value for metric in page.at.metric[:2]] == ["1", "4"]
    run = tmp_path / "runs" / "tiny"
    rows = [
        {"step": s, "tokens": s * 9, "train_loss": 5 - s / 50, "val_loss": 5.0, "lr": 1e-3, "elapsed_s": s}
        for s in (10, 20)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "samples.jsonl").write_text(
        '{"step": 0, "prompt": "P", "text": " <i>x</i>", "seed": 1}\n{"step": 20, "prompt": "P", "text": " y"}\n'
    )
    (run / "config.toml").write_text("[train]\nmax_steps = 40\n")
    page.at.switch_page("ui/pages/training.py")
    page.run()
    assert len(page.at.get("vega_lite_chart")) == 2
    assert page.at.metric[0].value == "4.600"
    page.at.select_slider[0].set_value(0)
    assert "&lt;i&gt;x&lt;/i&gt;" in page.run().html()


def test_flags_that_cannot_be_read_are_said_on_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "--nonsense"])
    st.cache_resource.clear()
    page = Page(AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)).run()
    assert "--nonsense" in page.texts()
