"""The app without a browser and without Streamlit: stories, generations, history, exports, settings, runs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from config import GenerationParams
from support.app_support import NASTY, Scripted, wait
from support.helpers import ROOT
from ui import settings, training_runs
from ui.backends import BackendError, BackendLocation, BackendLost, RemoteBackend, Update, connect
from ui.background import BackgroundGeneration
from ui.comparison import Comparison, read_prompts, table
from ui.export import export
from ui.history import History, HistoryError, title_of
from ui.open_story import OpenStories, OpenStory
from ui.passage_statistics import distinct, passage_frame, repetition
from ui.story import Story, Version


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    kept = History(tmp_path / "deep" / "history.sqlite")
    yield kept
    kept.close()


# Stories


def test_typing_without_a_pause_is_one_undo_step() -> None:
    moment = [0.0]
    story = Story("The", clock=lambda: moment[0])
    for text in ("The f", "The fo", "The fog"):
        moment[0] += 0.5
        story.edit(text)
    moment[0] += 10
    story.edit("The fog came")
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


def test_versions_of_a_passage_can_be_added_chosen_and_undone() -> None:
    story = Story("The fog")
    story.open_passage([Version(" rolled."), Version(" fell.")])
    story.add_versions([Version(" rose.")])
    assert (story.text, story.at, len(story.versions)) == ("The fog rose.", 2, 3)
    story.choose(1)
    assert story.text == "The fog fell."
    with pytest.raises(IndexError, match="version 4 of 3"):
        story.choose(3)
    story.undo()
    assert story.text == "The fog rose."
    story.undo()
    story.undo()
    assert story.text == "The fog" and not story.versions


def test_an_edit_across_the_start_of_a_passage_drops_its_versions_and_no_other_edit_does() -> None:
    story = Story("The fog")
    story.open_passage([Version(" rolled."), Version(" fell.")])
    story.edit("The fog rolled in.")
    assert [take.text for take in story.versions] == [" rolled in.", " fell."]
    story.edit("A fog rolled in.")
    assert story.base == "A fog"
    story.choose(1)
    assert story.text == "A fog fell."
    story.edit("Something else")
    assert story.versions == ()


def test_a_story_is_loaded_with_its_versions_only_if_they_fit_its_text() -> None:
    story = Story("The fog")
    story.open_passage([Version(" rolled.", 7, {"n": 1}), Version(" fell.")])
    kept = json.loads(json.dumps(story.dump()))
    again = Story.load(story.text, kept)
    assert (again.text, again.base, again.versions) == (story.text, "The fog", story.versions)
    assert Story.load("Other", kept).versions == ()


# Generations and open stories


def test_a_generation_has_all_samples_seed_and_timing(history: History) -> None:
    generation = BackgroundGeneration(Scripted(), "The fog", GenerationParams(n=2, max_tokens=3)).start()
    generation.join(10)
    assert [sample.text for sample in generation.samples] == [" one two three", " one1 two1 three1"]
    assert (
        generation.status == "done"
        and generation.seed == 7
        and generation.first_s is not None
        and generation.tokens == 6
    )


def test_stopping_keeps_the_text_so_far(history: History) -> None:
    backend = Scripted("word " * 500, pause=0.005)
    opened = OpenStories(history).get()
    opened.edit("The fog", opened.story.rev)
    opened.continue_text(backend, GenerationParams(max_tokens=500))
    wait(lambda: "word" in opened.view().text)
    assert opened.view().running
    opened.stop()
    wait(lambda: not opened.running)
    text = opened.story.text
    assert text.startswith("The fog word") and 1 < len(text.split()) < 400
    assert history.story(opened.id).text == text
    assert opened.generation.status == "stopped"
    opened.undo()
    assert opened.story.text == "The fog"


def test_the_shown_text_only_grows_while_it_is_written(history: History) -> None:
    backend = Scripted("word " * 60, pause=0.003)
    opened = OpenStories(history).get()
    opened.edit("The fog", opened.story.rev)
    generation = opened.continue_text(backend, GenerationParams(max_tokens=60))
    longest = 0
    while not generation.over:
        length = len(opened.view().text)
        assert length >= longest
        longest = length
    assert len(opened.view().text) >= longest
    assert not opened.edit("too late", 0)  # an edit of the text before the passage


def test_the_text_stays_in_the_view_until_it_is_in_the_story(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    between: list[str] = []
    end = OpenStory._finish

    def spy(opened: OpenStory, generation: BackgroundGeneration) -> None:
        between.append(opened.view().text)
        end(opened, generation)

    monkeypatch.setattr(OpenStory, "_finish", spy)
    opened = OpenStories(history).get()
    opened.edit("The fog", 0)
    opened.continue_text(Scripted(), GenerationParams(max_tokens=2))
    wait(lambda: not opened.running)
    assert between == ["The fog one two"] == [opened.view().text]


def test_a_text_in_progress_is_saved_and_a_reload_finds_it_still_being_written(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ui.background.SAVE_S", 0.0)
    backend = Scripted("word " * 1000, pause=0.002)
    stories = OpenStories(history)
    opened = stories.get()
    opened.edit("The fog", 0)
    opened.continue_text(backend, GenerationParams(max_tokens=1000))
    wait(lambda: "word word" in (history.story(opened.id).text or ""))
    assert opened.running
    assert stories.get(opened.id) is opened  # a reload finds the same opened, still writing
    opened.stop()
    wait(lambda: not opened.running)


def test_a_text_continues_after_the_connection_broke_midway(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.background.RETRY_S", 0.01)
    backend = Scripted("one two three four five", fail_after=2, deaf=3)
    seen: list[tuple[str, str]] = []
    generation = BackgroundGeneration(
        backend,
        "The fog",
        GenerationParams(max_tokens=5, seed=3),
        on_progress=lambda generation: seen.append((generation.status, generation.message)),
    ).start()
    generation.join(10)
    assert seen[0] == ("lost", "gone")
    assert generation.status == "done" and generation.message == ""
    assert [prompt for prompt, _ in backend.requests] == ["The fog", "The fog one two"]
    assert backend.requests[1][1].max_tokens == 3 and backend.requests[1][1].seed != 3
    assert generation.samples[0].text == " one two one two three" and generation.samples[0].resumed


def test_reconnecting_is_given_up_when_no_text_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ui.background.RETRY_S", 0.01)
    monkeypatch.setattr("ui.background.GIVE_UP_S", 0.1)
    backend = Scripted(fail_after=1)
    write, broken = backend.write, BackendLost("still gone")

    def fail_after_the_first(prompt: str, params: GenerationParams) -> Any:
        if backend.requests:
            raise broken
        return write(prompt, params)

    monkeypatch.setattr(backend, "write", fail_after_the_first)
    generation = BackgroundGeneration(backend, "The fog", GenerationParams(max_tokens=5)).start()
    generation.join(10)
    assert (generation.status, generation.message, generation.samples[0].text) == ("failed", "still gone", " one")


def test_reconnecting_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.background.RETRY_S", 0.01)
    generation = BackgroundGeneration(
        Scripted(fail_after=1, deaf=10**9), "The fog", GenerationParams(max_tokens=5)
    ).start()
    wait(lambda: generation.status == "lost")
    generation.cancel()
    generation.join(10)
    assert generation.status == "stopped" and generation.samples[0].text == " one"


def test_a_refused_request_fails_at_once_with_its_reason(history: History) -> None:
    opened = OpenStories(history).get()
    opened.edit("refuse", 0)
    opened.continue_text(Scripted(), GenerationParams())
    wait(lambda: not opened.running)
    assert "the queue is full" in opened.notice and opened.story.text == "refuse"
    lost = BackgroundGeneration(Scripted(fail_after=0), "x", GenerationParams()).start()
    lost.join(10)
    assert lost.status == "failed" and lost.message == "gone"


def test_retry_adds_a_version_with_the_next_seed_and_prompts_end_without_a_space(history: History) -> None:
    backend = Scripted()
    opened = OpenStories(history).get()
    opened.edit("The fog ", 0)
    for _ in range(2):
        (opened.retry if opened.story.versions else opened.continue_text)(
            backend, GenerationParams(max_tokens=1, seed=5)
        )
        wait(lambda: not opened.running)
    assert [prompt for prompt, _ in backend.requests] == ["The fog", "The fog"]
    assert [params.seed for _, params in backend.requests] == [5, 6]
    assert opened.story.text == "The fog one" and len(opened.story.versions) == 2
    assert [row.seed for row in history.passages(opened.id)] == [5, 6]


# History and exports


def test_history_survives_a_restart_searches_stars_deletes_and_restores(tmp_path: Path) -> None:
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


def test_history_can_be_written_from_many_threads(history: History) -> None:
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
def test_exports_keep_the_text_unchanged(suffix: str) -> None:
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


def test_markdown_export_escapes_every_line() -> None:
    from markdown_it import MarkdownIt

    lines = ["1. Chapter", "10) said", "- no list", "  + nor this", "* nor this", "=====", "-----", "~~~", "    deep"]
    lines += ["> he said", "| a | b |", "[x](y) ![z](w)", "a & b &amp; c", "4.5 miles", "\\ back"]
    body = "\n".join(lines) + "\n\n1. alone\n\n- alone\n\n    deep"
    shown = MarkdownIt().render(export([("", body)], "md").decode()).split("</h1>")[1]
    from lxml import html

    found = html.fromstring(shown)
    assert {part.tag for part in found.iter()} <= {"div", "p", "br"}
    text = found.text_content().replace("\xa0", " ")
    assert [line for line in text.split("\n") if line] == [line for line in body.split("\n") if line]


def test_titles_come_from_the_first_words() -> None:
    assert title_of("", "") == "Untitled"
    assert title_of(" Mine ", "x") == "Mine"
    long = title_of("", "word " * 40)
    assert len(long) <= 62 and long.endswith("…")


def test_the_app_listens_on_this_machine_only() -> None:
    words = [sys.executable, "-m", "streamlit", "config", "show"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 'address = "127.0.0.1"' in shown.replace("\x1b[0m", "").replace("\x1b[1m", "")


# Settings, comparisons, statistics


def test_sliders_lie_within_the_bounds_of_generation_params_and_hold_its_defaults() -> None:
    assert {"temperature", "max_tokens", "n"} <= set(settings.SLIDERS)
    for name in settings.SLIDERS:
        low, high = settings.span(name)
        for value in (low, high):
            GenerationParams.model_validate({name: settings.clipped(name, value)})
        assert settings.clipped(name, getattr(settings.DEFAULTS, name)) == getattr(settings.DEFAULTS, name)
    assert settings.span("temperature") == (0.0, 2.0) and settings.span("top_k") == (0, 100)
    assert settings.PRESETS["Balanced"]["temperature"] == 1.3
    for values in settings.PRESETS.values():
        GenerationParams.model_validate(values)


def test_a_models_recommended_values_are_read_and_invalid_ones_ignored(tmp_path: Path) -> None:
    place = BackendLocation("local", str(tmp_path))
    assert settings.recommended_settings(place) == {}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.8, "top_k": 50, "max_new_tokens": 9}')
    assert settings.recommended_settings(place)["temperature"] == 0.8
    (tmp_path / "generation_config.json").write_text('{"temperature": 80}')
    assert settings.recommended_settings(place) == {}


def test_another_models_recommendation_is_taken_over_until_somebody_moves_a_slider(tmp_path: Path) -> None:
    def script() -> None:
        import streamlit as st

        from ui import settings
        from ui.backends import BackendLocation

        class NoPresets:
            def presets(self) -> dict[str, dict[str, object]]:
                return {}

        settings.start(BackendLocation("local", st.session_state.folder), NoPresets())  # type: ignore[arg-type]
        settings.number("temperature")

    for name, temperature in (("one", 0.8), ("two", 0.6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "generation_config.json").write_text(f'{{"temperature": {temperature}}}')

    def shown(folder: str) -> float:
        app.session_state.folder = str(tmp_path / folder)
        return float(app.run().slider(key="set_temperature").value)

    app = AppTest.from_function(script)
    assert (shown("one"), shown("two"), shown("none"), shown("one")) == (0.8, 0.6, 1.3, 0.8)
    app.slider(key="set_temperature").set_value(1.1)
    assert (shown("one"), shown("two")) == (1.1, 1.1)


def test_a_comparison_writes_every_prompt_with_every_setting_and_can_be_stopped() -> None:
    backend = Scripted()
    wanted = {"a": GenerationParams(max_tokens=2), "b": GenerationParams(max_tokens=1, n=2)}
    comparison = Comparison(backend, ["x", "y"], wanted).start()
    wait(lambda: not comparison.running)
    rows = comparison.rows()
    assert [(row["prompt"], row["settings"], row["text"]) for row in rows] == [
        ("x", "a", " one two"), ("x", "b", " one"), ("x", "b", " one1"),
        ("y", "a", " one two"), ("y", "b", " one"), ("y", "b", " one1"),
    ]  # fmt: skip
    assert len(table(rows, "jsonl").splitlines()) == 6 and table(rows, "csv").count(b"\n") == 7
    slow = Comparison(Scripted("w " * 300, pause=0.01), ["p"] * 30, {"a": GenerationParams(max_tokens=300)}).start()
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


def test_statistics_of_passages(history: History) -> None:
    assert distinct("a b a b", 1) == 0.5 and distinct("a b a b", 2) == pytest.approx(2 / 3)
    assert repetition("a b c d a b c d") == pytest.approx(0.2) and repetition("a b") is None
    history.add_passage(
        story_id=None, prompt="p", text="a b a b", params={"temperature": 1.0, "n": 2}, seed=1, model="m",
        tokens=10, seconds=2.0, first_s=0.1, finish_reason="length",
    )  # fmt: skip
    frame = passage_frame(history.passages())
    assert frame.loc[0, "tokens_per_s"] == 10.0 and frame.loc[0, "words"] == 4


def test_addresses_that_cannot_be_used_are_refused_with_a_remedy() -> None:
    with pytest.raises(BackendError, match="http://"):
        connect(BackendLocation("server", "localhost:8000"))
    with pytest.raises(BackendError, match="wss://"):
        connect(BackendLocation("gateway", "https://x"))
    with pytest.raises(BackendLost, match="cannot be reached"):
        connect(BackendLocation("server", "http://127.0.0.1:9"))
    gateway = connect(BackendLocation("gateway", "ws://127.0.0.1:9"))
    assert isinstance(gateway, RemoteBackend) and gateway.visible_text("x", GenerationParams()) is None
    with pytest.raises(BackendLost, match="cannot be reached"):
        gateway.write("x", GenerationParams())


@contextmanager
def telling(messages: list[dict[str, Any]]) -> Iterator[str]:
    """A server that answers every request with `messages` and then says nothing more; its address."""
    from websockets.sync.server import serve

    def answer(socket: Any) -> None:
        request = json.loads(socket.recv())
        for message in messages:
            socket.send(json.dumps({"request_id": request["request_id"], **message}))
        for _ in socket:
            pass

    with serve(answer, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def token(seq: int, text: str) -> dict[str, Any]:
    return {"type": "token", "seq": seq, "index": 0, "text": text}


def test_messages_out_of_order_or_twice_make_the_same_text() -> None:
    told = [{"type": "started"}, token(1, "b"), token(0, "a"), token(1, "b"), token(2, "c"), token(2, "c")]
    other = {"type": "token", "request_id": "another", "seq": 3, "index": 0, "text": "x"}
    told += [other, token(5, "f"), token(4, "e"), {"type": "complete", "finish_reason": "length"}]
    with telling(told) as url:
        updates = list(connect(BackendLocation("gateway", url)).write("x", GenerationParams()))
    assert "".join(update.text for update in updates) == "abcef"
    assert updates[-1] == Update("ended", 0, reason="length")


def test_a_silent_server_is_a_lost_connection_and_cancelling_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ui.backends.RECEIVE_S", 0.02)
    with telling([{"type": "started"}, token(0, "a")]) as url:
        monkeypatch.setattr("ui.backends.SILENCE_S", 0.1)
        with pytest.raises(BackendLost, match="sent nothing for 0.1 s"):
            list(connect(BackendLocation("gateway", url)).write("x", GenerationParams()))
        monkeypatch.setattr("ui.backends.SILENCE_S", 60.0)
        monkeypatch.setattr("ui.backends.STOP_WAIT_S", 0.1)
        generation = BackgroundGeneration(connect(BackendLocation("gateway", url)), "x", GenerationParams()).start()
        wait(lambda: generation.tokens)
        generation.cancel()
        generation.join(10)
        assert (generation.status, generation.samples[0].text) == ("stopped", "a")


# Training


def test_runs_are_read_while_they_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "novels"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("[train]\nmax_steps = 40\n")
    (folder / "metrics.jsonl").write_text('{"step": 10, "train_loss": 3.0}\n{"step": 20, "train')
    [run] = training_runs.runs(tmp_path / "runs")
    assert run.rows() == [{"step": 10, "train_loss": 3.0}] and run.total_steps() == 40
    assert not run.running() and not run.resumable()
    (folder / "last").mkdir()
    (folder / "last" / "training_state.pt").touch()
    assert run.resumable()
    with pytest.raises(training_runs.TrainingError, match="not started from the app"):
        training_runs.stop(run)
    with pytest.raises(training_runs.TrainingError, match="no texts"):
        training_runs.save_texts(tmp_path / "t", {"a.txt": b"  "})
    given = {
        "../../x y.txt": b"one",
        "x y.txt": b"two",
        "Emma.EPUB": b"three",
        "a/Emma.epub": b"four",
        "run.sh": b"five",
    }
    training_runs.save_texts(tmp_path / "t", given)
    names = ["Emma-2.epub", "Emma.epub", "run.txt", "x_y-2.txt", "x_y.txt"]
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == names


def test_every_kind_of_book_can_be_uploaded() -> None:
    from corpus.readers.registry import SUFFIXES

    rows = {".jsonl", ".parquet", ".markdown"}  # tables of many texts are prepared at the terminal
    assert set(training_runs.BOOKS) == set(SUFFIXES) - rows


@pytest.mark.parametrize(
    ("limits", "share", "left", "words"),
    [
        ("max_steps = 40", 0.5, 20.0, "step 20 of 40"),
        ("max_steps = 0\nmax_minutes = 1.0", 20 / 60, 40.0, "step 20, 20s of 1m00s"),
        ("max_steps = 800\nmax_minutes = 0.5", 20 / 30, 10.0, "step 20, 20s of 30s"),
        ("max_steps = 40\nmax_minutes = 10", 0.5, 20.0, "step 20 of 40"),
        ("max_steps = 0", 0.0, None, "step 20"),
    ],
)
def test_progress_and_time_left_of_a_run(
    tmp_path: Path, limits: str, share: float, left: float | None, words: str
) -> None:
    (tmp_path / "config.toml").write_text(f"[train]\n{limits}\n")
    run = training_runs.Run(tmp_path)
    assert run.progress({"step": 20, "elapsed_s": 20.0}) == (pytest.approx(share), left)
    assert run.progress({}) == (0.0, None)
    assert run.position({"step": 20, "elapsed_s": 20.0}) == words


def test_a_run_is_started_by_a_preset_or_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(training_runs, "_spawn", lambda run, words: started.append([run.name, *words[1:]]))
    folders = {"runs_folder": tmp_path / "runs", "data_folder": tmp_path / "data"}
    texts, out = {"emma.txt": b"words"}, str(tmp_path / "runs" / "mine")
    training_runs.start("mine", preset="sample", flags={"train.max-steps": 5}, **folders)
    training_runs.start("mine", minutes=7.5, **folders)
    training_runs.start("mine", minutes=10.0, texts=texts, **folders)
    kept = tmp_path / "data" / "mine"
    assert started == [
        ["mine", "--preset", "sample", "--out", out, "--train.max-steps", "5"],
        ["mine", "--minutes", "7.5", "--out", out],
        ["mine", "--minutes", "10", "--out", out, "--input", str(kept), "--data", str(kept / "tokens")],
    ]
    assert (kept / "emma.txt").read_bytes() == b"words"
    for wrong in ({}, {"preset": "sample", "minutes": 3.0}):
        with pytest.raises(training_runs.TrainingError, match="a preset, or the minutes"):
            training_runs.start("mine", **wrong, **folders)


@pytest.mark.parametrize(
    "name",
    ["../evil", "..", ".", "", "/evil", "a/b", "a\\b", "a/../../evil", ".hidden", "-flag", "a b", "a\n", "x" * 62],
)
def test_a_run_name_cannot_leave_the_runs_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_runs, "_spawn", lambda run, words: pytest.fail(f"started {run.path}"))
    (tmp_path / "runs").mkdir()
    folders = {"runs_folder": tmp_path / "runs", "data_folder": tmp_path / "data"}
    for texts in (None, {"a.txt": b"words"}):
        with pytest.raises(training_runs.TrainingError, match="letters, digits"):
            training_runs.start(name, preset="sample", texts=texts, **folders)
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]
