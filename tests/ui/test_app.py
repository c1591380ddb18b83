"""The app without a browser and without Streamlit: stories, jobs, history, exports, settings, runs."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from config import GenerationParams
from support.app_support import NASTY, Scripted, wait
from ui import settings, training
from ui.backends import BackendError, BackendLost, Place, RemoteBackend, Update, connect
from ui.batch import Batch, read_prompts, table
from ui.desk import Desk, Desks
from ui.export import export
from ui.figures import distinct, passage_frame, repetition
from ui.history import History, HistoryError, title_of
from ui.jobs import Job
from ui.story import Story, Take


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    kept = History(tmp_path / "deep" / "history.sqlite")
    yield kept
    kept.close()


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


def test_the_patience_with_a_server_that_answers_and_fails_again_and_again_has_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ui.jobs.RETRY_S", 0.01)
    monkeypatch.setattr("ui.jobs.PATIENCE_S", 0.1)
    backend = Scripted(fail_after=1)
    write, broken = backend.write, BackendLost("still gone")

    def fail_after_the_first(prompt: str, params: GenerationParams) -> Any:
        if backend.requests:
            raise broken
        return write(prompt, params)

    monkeypatch.setattr(backend, "write", fail_after_the_first)
    job = Job(backend, "The fog", GenerationParams(max_tokens=5)).start()
    job.join(10)
    assert (job.status, job.message, job.samples[0].text) == ("failed", "still gone", " one")


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


def test_markdown_shows_every_line_as_it_is() -> None:
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


# Settings, batches, figures


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
        updates = list(connect(Place("gateway", url)).write("x", GenerationParams()))
    assert "".join(update.text for update in updates) == "abcef"
    assert updates[-1] == Update("ended", 0, reason="length")


def test_a_server_that_falls_silent_is_lost_and_a_silent_one_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.backends.LISTEN_S", 0.02)
    with telling([{"type": "started"}, token(0, "a")]) as url:
        monkeypatch.setattr("ui.backends.SILENCE_S", 0.1)
        with pytest.raises(BackendLost, match="silent"):
            list(connect(Place("gateway", url)).write("x", GenerationParams()))
        monkeypatch.setattr("ui.backends.SILENCE_S", 60.0)
        monkeypatch.setattr("ui.backends.FAREWELL_S", 0.1)
        job = Job(connect(Place("gateway", url)), "x", GenerationParams()).start()
        wait(lambda: job.tokens)
        job.cancel()
        job.join(10)
        assert (job.status, job.samples[0].text) == ("stopped", "a")


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
    with pytest.raises(training.TrainingError, match="no texts"):
        training.keep_texts(tmp_path / "t", {"a.txt": b"  "})
    training.keep_texts(tmp_path / "t", {"../../x y.txt": b"one", "x y.txt": b"two"})
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["x_y-2.txt", "x_y.txt"]


@pytest.mark.parametrize(
    ("limits", "share", "left"),
    [
        ("max_steps = 40", 0.5, 20.0),
        ("max_steps = 0\nmax_minutes = 1.0", 20 / 60, 40.0),
        ("max_steps = 800\nmax_minutes = 0.5", 20 / 30, 10.0),
        ("max_steps = 0", 0.0, None),
    ],
)
def test_how_far_a_run_is(tmp_path: Path, limits: str, share: float, left: float | None) -> None:
    (tmp_path / "config.toml").write_text(f"[train]\n{limits}\n")
    run = training.Run(tmp_path)
    assert run.progress({"step": 20, "elapsed_s": 20.0}) == (pytest.approx(share), left)
    assert run.progress({}) == (0.0, None)


def test_a_run_is_started_by_a_preset_or_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(training, "_spawn", lambda run, words: started.append([run.name, *words[1:]]))
    folders = {"runs_folder": tmp_path / "runs", "data_folder": tmp_path / "data"}
    texts, out = {"emma.txt": b"words"}, str(tmp_path / "runs" / "mine")
    training.start("mine", preset="sample", flags={"train.max-steps": 5}, **folders)
    training.start("mine", minutes=7.5, **folders)
    training.start("mine", minutes=10.0, texts=texts, **folders)
    kept = tmp_path / "data" / "mine"
    assert started == [
        ["mine", "--preset", "sample", "--out", out, "--train.max-steps", "5"],
        ["mine", "--minutes", "7.5", "--out", out],
        ["mine", "--minutes", "10", "--out", out, "--input", str(kept), "--data", str(kept / "tokens")],
    ]
    assert (kept / "emma.txt").read_bytes() == b"words"
    for wrong in ({}, {"preset": "sample", "minutes": 3.0}):
        with pytest.raises(training.TrainingError, match="a preset, or the minutes"):
            training.start("mine", **wrong, **folders)


@pytest.mark.parametrize(
    "name",
    ["../evil", "..", ".", "", "/evil", "a/b", "a\\b", "a/../../evil", ".hidden", "-flag", "a b", "a\n", "x" * 62],
)
def test_a_run_never_lies_outside_its_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_spawn", lambda run, words: pytest.fail(f"started {run.path}"))
    (tmp_path / "runs").mkdir()
    folders = {"runs_folder": tmp_path / "runs", "data_folder": tmp_path / "data"}
    for texts in (None, {"a.txt": b"words"}):
        with pytest.raises(training.TrainingError, match="letters, digits"):
            training.start(name, preset="sample", texts=texts, **folders)
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]
