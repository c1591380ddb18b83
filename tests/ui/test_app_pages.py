"""Every page of the app, driven by Streamlit's AppTest on a backend that writes given words."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from config import ROOT
from support.app_support import NASTY, Scripted, wait
from ui import settings, state, training_runs
from ui.backends import BackendLocation
from ui.open_story import OpenStory


class Page:
    """The app on a scripted backend, in one session."""

    def __init__(self, at: AppTest):
        self.at = at

    def run(self) -> Page:
        self.at.run()
        assert not self.at.exception, [error.value for error in self.at.exception]
        return self

    def open_story(self) -> OpenStory:
        return state.open_stories().get(self.at.session_state["story_id"])

    def click(self, key: str) -> Page:
        self.at.button(key=key).click()
        return self.run()

    def settled(self) -> Page:
        wait(lambda: not self.open_story().running)
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
    assert page.open_story().story.text == f"{opening} alpha beta gamma delta"
    page.click("retry").settled()
    assert "version 2 of 2" in page.html()
    page.click("previous")
    assert page.open_story().story.at == 0
    page.click("use_1")
    assert page.open_story().story.at == 1
    page.click("undo").click("undo").click("undo").click("undo")
    assert page.open_story().story.text == opening
    page.click("redo")
    assert "alpha" in page.open_story().story.text
    assert "first word after" in page.html()


def test_stop_is_offered_while_writing_and_sliders_move_without_harm(page: Page, backend: Scripted) -> None:
    backend.gate.clear()
    page.run().click("opening_0").click("continue")
    assert "Stop" in [button.label for button in page.at.button]
    page.at.slider(key="set_temperature").set_value(0.5)
    page.run()
    assert page.open_story().running and page.at.slider(key="set_temperature").value == 0.5
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
    assert page.open_story().story.text.endswith("alpha2 beta2 gamma2 delta2")


def test_text_is_never_read_as_html_or_markdown(page: Page, backend: Scripted) -> None:
    backend.words = [NASTY]
    page.run()
    page.at.slider(key="set_n").set_value(2)
    page.run().click("opening_0").click("continue").settled()
    own = state.MENU.read_text("utf-8").strip()
    assert "<script>" not in page.html().replace(own, "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x$ *a* _b_ `c`\n# b" in page.html()
    assert all("alert" not in str(part.value) for part in page.at.markdown)


def test_presets_and_saved_presets(page: Page) -> None:
    page.run()
    assert page.at.selectbox(key="preset").value == "Balanced"
    page.at.selectbox(key="preset").select("Faithful")
    page.run()
    assert page.at.slider(key="set_temperature").value == 0.7
    page.at.slider(key="set_temperature").set_value(0.75)
    page.run()
    assert page.at.selectbox(key="preset").value == settings.ADJUSTED
    page.at.text_input(key="preset_name").set_value("Mine")
    next(button for button in page.at.button if button.label == "Save").click()
    page.run()
    assert page.at.selectbox(key="preset").value == "Mine"
    assert state.history().presets()["Mine"]["temperature"] == 0.75
    page.click("dice")
    assert page.at.number_input(key="set_seed").value is not None


def test_a_permalink_restores_the_same_request(page: Page, backend: Scripted) -> None:
    from ui.permalinks import decode_link, encode_link

    page.run()
    page.at.number_input(key="set_seed").set_value(11)
    page.at.slider(key="set_temperature").set_value(0.4)
    page.run().click("opening_0").click("continue").settled()
    link = encode_link(page.open_story())
    other = AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)
    other.query_params["write"] = link
    again = Page(other).run()
    assert again.open_story() is not page.open_story()
    again.click("continue").settled()
    assert backend.requests[1] == backend.requests[0]
    assert "The link restored this prompt" not in again.texts()
    for broken in ("nonsense", link[:-9], ""):
        with pytest.raises(ValueError, match="cannot be read"):
            decode_link(broken)


def test_a_style_is_chosen_only_where_the_model_has_some_and_goes_into_the_permalink(
    page: Page, backend: Scripted
) -> None:
    from ui.permalinks import decode_link, encode_link

    page.run()
    assert not [box for box in page.at.selectbox if box.key == "set_style"]
    backend.styles = ["ash", "birch"]
    page.run()
    assert page.at.selectbox(key="set_style").options == ["no one in particular", "ash", "birch"]
    page.at.selectbox(key="set_style").select("birch")
    page.run().click("opening_0").click("continue").settled()
    assert backend.requests[-1][1].style == "birch" and page.open_story().story.passage.params["style"] == "birch"
    page.open_story().story.passage.params["style"] = "ash:0.7,birch:0.3"  # a blend, which the box also versions
    other = AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)
    other.query_params["write"] = encode_link(page.open_story())
    again = Page(other).run().click("continue").settled()
    assert again.at.selectbox(key="set_style").value == backend.requests[-1][1].style == "ash:0.7,birch:0.3"
    assert backend.requests[-1][0] == backend.requests[-2][0]
    assert decode_link(encode_link(again.open_story()))["params"].style == "ash:0.7,birch:0.3"
    backend.styles = []
    page.run().click("continue").settled()
    assert backend.requests[-1][1].style == ""


def test_a_reload_brings_the_story_back(page: Page) -> None:
    page.run()
    page.at.slider(key="set_temperature").set_value(0.35)
    page.run().click("opening_0").click("continue").settled()
    again = AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)
    again.query_params["story"] = page.open_story().id
    assert Page(again).run().open_story() is page.open_story()
    assert again.slider(key="set_temperature").value == 0.35 and again.number_input(key="set_seed").value is None


def test_two_sessions_write_their_own_stories(page: Page, backend: Scripted) -> None:
    other = Page(AppTest.from_file(str(ROOT / "app.py"), default_timeout=30))
    page.run().click("opening_0")
    other.run().click("opening_1")
    page.click("continue")
    other.click("continue")
    assert page.settled().open_story().story.text != other.settled().open_story().story.text
    assert len(state.history().stories()) == 2


def test_the_meter_says_what_the_model_still_reads(page: Page) -> None:
    page.run()
    page.open_story().atomic_write_text(" ".join(["word"] * 60))
    page.run()
    assert "60 words" in page.html() and "the model reads the last 30 of them" in page.html()
    assert "no longer read by the model" in page.html()
    visit(page, "inside")
    assert "The model reads the last 30 of 60 words." in page.texts()


def test_no_model_yet_offers_to_train_one(bare: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Path] = []

    def start(name: str, *, preset: str, runs_folder: Path, data_folder: Path) -> training_runs.Run:
        begun.append(runs_folder / preset)
        begun[0].mkdir(parents=True)
        (begun[0] / training_runs.LOG).touch()
        return training_runs.Run(begun[0])

    monkeypatch.setattr(training_runs, "start", start)
    bare.run()
    [button] = [button for button in bare.at.button if button.label.startswith("Train the sample model")]
    button.click()
    bare.run()
    assert begun == [state.flags().runs / "sample"] and bare.at.title[0].value == "Training"
    monkeypatch.setattr(training_runs.Run, "running", lambda run: True)
    bare.at.switch_page("ui/pages/write.py")
    assert "A model is being trained" in bare.run().texts() and not bare.at.button  # no second one beside it


def test_the_training_page_refuses_a_name_that_leaves_the_folder(bare: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_runs, "_spawn", lambda run, words: pytest.fail(f"started {run.path}"))
    bare.run().at.switch_page("ui/pages/training.py")
    bare.run()
    next(field for field in bare.at.text_input if field.label == "Name").set_value("../evil")
    next(button for button in bare.at.button if button.label == "Start training").click()
    assert "letters, digits" in bare.run().texts().replace("\\", "")


def test_the_training_page_offers_minutes_and_presets(bare: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []

    def start(name: str, *, runs_folder: Path, data_folder: Path, **choice: Any) -> training_runs.Run:
        begun.append({"name": name, **choice})
        raise training_runs.TrainingError("not now")

    monkeypatch.setattr(training_runs, "start", start)
    bare.run().at.switch_page("ui/pages/training.py")
    bare.run()

    def press(**numbers: float) -> None:
        for field in bare.at.number_input:
            if (value := numbers.get(field.label.split()[0])) is not None:
                field.set_value(value)
        next(button for button in bare.at.button if button.label == "Start training").click()
        assert "not now" in bare.run().texts()

    press(Minutes=25.0)
    bare.at.segmented_control(key="by_new").set_value("Preset")
    bare.run().at.selectbox(key="preset_new").set_value("story-nano")
    bare.run()
    press(Steps=30)
    assert begun == [
        {"name": "mine", "texts": None, "minutes": 25.0},
        {"name": "story-nano", "texts": None, "preset": "story-nano", "flags": {"train.max-steps": 30}},
    ]


def test_a_model_that_cannot_be_opened_is_explained(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(place: BackendLocation) -> Any:
        raise ValueError("config.json: no n_layer: copy the whole folder")

    monkeypatch.setattr(state, "connect", fail)
    assert "copy the whole folder" in page.run().texts()
    page.at.switch_page("ui/pages/model.py")
    assert "copy the whole folder" in page.run().texts()


def test_history_page_searches_stars_deletes_and_opens(page: Page) -> None:
    page.run().click("opening_0").click("continue").settled()
    first = page.open_story().id
    page.click("new").click("opening_1")
    page.at.switch_page("ui/pages/history.py")
    page.run()
    assert "2 stories" in page.texts()
    page.at.text_input(key="search").set_value("gamma")
    page.run().click(f"star_{first}")
    assert state.history().stories(starred=True)[0].id == first
    page.click(f"delete_{first}")
    assert "No story contains these words" in page.texts()
    page.at.text_input(key="search").set_value("")
    page.at.segmented_control(key="shown").set_value("Bin")
    page.run().click(f"back_{first}")
    page.at.segmented_control(key="shown").set_value("All")
    page.run().click(f"open_{first}")
    assert page.open_story().id == first and page.open_story().story.text.endswith("delta")


def test_look_inside_shows_alternatives_and_continues_from_one(page: Page, backend: Scripted) -> None:
    page.run()
    page.open_story().atomic_write_text("The old house stood")
    page.at.switch_page("ui/pages/inside.py")
    page.run()
    assert "better" in page.html() and "double, below 1" in page.html()
    page.click("use_3_0").settled()
    assert backend.requests[0][0] == "The old house better"
    assert page.open_story().story.text.startswith("The old house better alpha")


def test_compare_writes_a_table(page: Page) -> None:
    page.run()
    page.at.switch_page("ui/pages/compare.py")
    page.run()
    page.at.text_area(key="compare_prompts").set_value("one\ntwo <b>")
    page.run().click("compare_start")
    wait(lambda: not page.at.session_state["comparison"].running)
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
    (run / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    page.at.switch_page("ui/pages/training.py")
    page.run()
    assert not charts(page)  # one row makes no line
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


def test_flags_that_cannot_be_read_are_shown_on_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "--nonsense"])
    st.cache_resource.clear()
    page = Page(AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)).run()
    assert "--nonsense" in page.texts()


def charts(page: Page) -> list[dict[str, Any]]:
    """The Vega-Lite specifications on the page."""
    return [json.loads(element.proto.spec) for element in page.at.get("vega_lite_chart")]


def visit(page: Page, name: str) -> Page:
    page.at.switch_page(f"ui/pages/{name}.py")
    return page.run()


def test_compare_reads_a_file_and_uses_each_preset_s_values(page: Page, backend: Scripted) -> None:
    visit(page.run(), "compare")
    page.at.text_area(key="compare_prompts").set_value("typed")
    page.at.file_uploader(key="compare_file").set_value(("p.csv", b"id,prompt\n1,read\n", "text/csv"))
    page.at.number_input(key="compare_tokens").set_value(2)
    page.at.number_input(key="compare_n").set_value(2)
    page.at.number_input(key="compare_seed").set_value(5)
    page.run().click("compare_start")
    wait(lambda: not page.at.session_state["comparison"].running)
    page.run()
    asked = sorted((prompt, params.temperature) for prompt, params in backend.requests)
    assert asked == [("read", 0.7), ("read", 1.6), ("typed", 0.7), ("typed", 1.6)]
    assert {(params.max_tokens, params.n, params.seed) for _, params in backend.requests} == {(2, 2, 5)}
    table = page.at.dataframe[0].value
    assert list(table["prompt"]) == ["typed"] * 4 + ["read"] * 4
    assert list(table["settings"])[:4] == ["Faithful", "Faithful", "Fanciful", "Fanciful"]
    assert {row.tokens for row in state.history().passages()} == {2}
    page.click("open_2_1_1")
    assert page.open_story().story.text == "read alpha1 beta1"


def test_compare_says_what_is_missing_or_wrong(page: Page, backend: Scripted) -> None:
    visit(page.run(), "compare").click("compare_start")
    assert "at least one opening" in page.texts()
    page.at.file_uploader(key="compare_file").set_value(("p.jsonl", b"nonsense", "application/jsonlines"))
    page.run().click("compare_start")
    assert "line 1" in page.texts() and not backend.requests
    page.at.file_uploader(key="compare_file").set_value(None)
    page.at.text_area(key="compare_prompts").set_value("refuse")
    page.run().click("compare_start")
    wait(lambda: not page.at.session_state["comparison"].running)
    assert "the queue is full" in page.run().texts()


def test_history_keeps_passages_that_were_not_chosen_and_the_bin_empties(page: Page) -> None:
    page.run().click("opening_0").click("continue").settled().click("retry").settled()
    opening, story = page.open_story().story.base, page.open_story().id
    page.open_story().atomic_write_text("Something else")
    visit(page, "history")
    first = state.history().passages(story)[0].id
    page.at.session_state[f"passages_{story}"] = True
    page.run().click(f"again_{first}")
    assert page.open_story().story.text == f"{opening} alpha beta gamma delta"
    visit(page, "history").click(f"delete_{story}")
    assert "Nothing is written yet" in page.texts()
    page.at.segmented_control(key="shown").set_value("Bin")
    page.run().click(f"erase_{story}")
    assert "The bin is empty" in page.texts() and state.history().story(story) is None


def test_a_long_history_has_pages_and_the_first_holds_the_newest(page: Page) -> None:
    page.run()
    for number in range(15):
        state.history().save_story(f"s{number:02d}", text=f"Story number {number}", extra={})
    visit(page, "history")
    opened = [button.key for button in page.at.button if str(button.key).startswith("open_")]
    assert opened == [f"open_s{number:02d}" for number in range(14, 2, -1)]
    page.at.pagination(key="history_page").set_value(2)
    page.run()
    assert [b.key for b in page.at.button if str(b.key).startswith("open_")] == ["open_s02", "open_s01", "open_s00"]
    page.at.text_input(key="search").set_value("NUMBER 13")
    page.run()
    assert "Story number 13" in page.html() and "1 story, saved" in page.texts()


def test_statistics_count_only_the_chosen_models(page: Page) -> None:
    page.run()
    common = {"story_id": None, "prompt": "p", "params": {"temperature": 1.0}, "seed": 1, "finish_reason": "length"}
    for model, text, tokens, seconds, first in (("one", "a b a b", 10, 2.0, 0.5), ("two", "c d e", 30, 1.0, 0.1)):
        state.history().add_passage(model=model, text=text, tokens=tokens, seconds=seconds, first_s=first, **common)
    visit(page, "statistics")
    assert [metric.value for metric in page.at.metric] == ["2", "7", "40", "18", "0.30 s", "83%", "0.0%"]
    assert not charts(page) and "once there are 5 passages" in page.texts()
    page.at.multiselect(key="stat_models").set_value(["one"])
    page.run()
    assert [metric.value for metric in page.at.metric] == ["1", "4", "10", "5", "0.50 s", "67%", "0.0%"]
    page.at.multiselect(key="stat_models").set_value([])
    assert not page.run().at.metric


def test_statistics_draw_charts_from_five_passages_on_with_axes_from_zero(page: Page) -> None:
    page.run()
    for number in range(5):
        state.history().add_passage(
            story_id=None,
            prompt="p",
            text="a b c d e " * (number + 3),
            params={"temperature": 0.8},
            seed=1,
            model="one",
            tokens=10 * number + 30,
            seconds=2.0,
            first_s=0.1 + number / 100,
            finish_reason="length",
        )
    visit(page, "statistics")
    drawn = {spec["title"]: spec["encoding"] for spec in charts(page)}
    assert len(drawn) == 6 and "passages on" not in page.texts()
    assert drawn["Length of passages"]["x"]["bin"]["extent"] == [0, 35]
    assert drawn["Length of passages"]["x"]["bin"]["minstep"] == 1
    assert drawn["Variety by temperature"]["x"]["scale"]["domain"] == [0, 2]
    assert drawn["Repetition by temperature"]["y"]["scale"]["domain"][0] == 0


def trained(folder: Path, name: str, steps: int = 20, total: int = 40) -> training_runs.Run:
    """A run folder as `train.py` leaves it after `steps` of `total` steps."""
    run = training_runs.Run(folder / "runs" / name)
    (run.path / "last").mkdir(parents=True)
    (run.path / "last" / "training_state.pt").touch()
    values = [
        {"step": s, "tokens": s * 9, "train_loss": 5 - s / 50, "lr": 1e-3, "elapsed_s": s * 3.0} for s in (10, 20)
    ]
    values[0]["val_loss"], values[1]["val_loss"] = 4.25, 4.5
    rows = [row for row in values if row["step"] <= steps]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.path / "config.toml").write_text(f'description = "of {name}"\n[train]\nmax_steps = {total}\n')
    (run.path / training_runs.LOG).write_text("its output\n")
    return run


def colour_of_the_loss(page: Page) -> str:
    return str(charts(page)[0]["layer"][0]["encoding"]["color"]["field"])


def test_the_training_page_compares_runs_and_resumes_a_stopped_one(
    bare: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, "finished", total=20)
    run = trained(tmp_path, "halfway")
    asked: list[tuple[str, str]] = []
    for action in ("stop", "resume"):
        monkeypatch.setattr(training_runs, action, lambda run, action=action: asked.append((action, run.name)))
    visit(bare.run(), "training")
    bare.at.selectbox(key="run_shown").set_value("halfway")
    bare.run()
    assert [metric.value for metric in bare.at.metric[:3]] == ["4.600", "4.250", "180"]
    assert "its output" in " ".join(code.value for code in bare.at.code)
    assert colour_of_the_loss(bare) == "kind"
    bare.at.multiselect(key="runs_beside").set_value(["finished"])
    bare.run()
    assert colour_of_the_loss(bare) == "run"
    bare.click("resume_run")
    monkeypatch.setattr(training_runs.Run, "running", lambda found: found.name == run.name)
    bare.run()
    progress = " ".join(str(element.proto.text) for element in bare.at.get("progress"))
    assert "step 20 of 40, about 1m00s left" in progress
    bare.click("stop_run")
    assert asked == [("resume", "halfway"), ("stop", "halfway")]
    bare.at.selectbox(key="run_shown").set_value("finished")
    bare.run()
    assert not any(button.key in ("resume_run", "stop_run") for button in bare.at.button)


def test_a_run_that_died_shows_its_output(bare: Page, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "dead"
    folder.mkdir(parents=True)
    (folder / training_runs.LOG).write_text("error: the texts are too short\n")
    visit(bare.run(), "training")
    assert "ended before its first step" in bare.texts()
    assert "the texts are too short" in bare.at.code[0].value


def test_texts_settings_and_limits_reach_the_training(
    bare: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []

    def spawn(run: training_runs.Run, words: list[str]) -> training_runs.Run:
        begun.append(words)
        return run

    monkeypatch.setattr(training_runs, "_spawn", spawn)
    visit(bare.run(), "training")
    bare.at.segmented_control(key="by_new").set_value("Preset")
    bare.run().at.selectbox(key="preset_new").set_value("story-nano")
    bare.run()
    bare.at.file_uploader[0].set_value([("../fog.txt", b"The fog.", "text/plain")])
    next(field for field in bare.at.text_input if field.label == "Name").set_value("foggy")
    next(field for field in bare.at.number_input if field.label.startswith("Steps")).set_value(30)
    next(button for button in bare.at.button if button.label == "Start training").click()
    bare.run()
    [words] = begun
    assert (tmp_path / "data" / "foggy" / "fog.txt").read_bytes() == b"The fog."
    train = words[words.index("--then-train") + 1 :]
    assert train[train.index("--out") + 1] == str(tmp_path / "runs" / "foggy")
    assert train[train.index("--train.max-steps") + 1] == "30" and "--train.max-minutes" not in train
    assert train[train.index("--data") + 1] == words[words.index("--then-train") - 1]
    assert words[words.index("--preset") + 1] == train[train.index("--preset") + 1] == "story-nano"


def test_the_model_page_begins_with_the_model_that_was_given_and_lists_best_before_last(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny/last", "other/best"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()
    os.utime(tmp_path / "runs" / "tiny" / "last" / "config.json", (2e9, 2e9))  # the newest of all
    os.utime(tmp_path / "runs" / "other" / "best" / "config.json", (1.9e9, 1.9e9))
    given = os.path.relpath(tmp_path / "runs" / "tiny" / "best")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--model", given])
    visit(page.run(), "model")
    box = page.at.selectbox(key="model_path")
    assert box.options == ["other · best", "tiny · best", "tiny · last"]
    assert box.value == given and page.at.button(key="use_model").disabled


def test_the_model_page_changes_folder_number_format_and_server(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[BackendLocation] = []
    made = state.connect(BackendLocation("local", ""))
    monkeypatch.setattr(state, "connect", lambda place: opened.append(place) or made)
    other = tmp_path / "models" / "novels"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").touch()
    (other / "README.md").write_text("---\nlicense: mit\n---\n\nTrained on *novels*.\n")
    visit(page.run(), "model")
    assert any(code.value.startswith("python api.py --model ") for code in page.at.code)
    page.at.selectbox(key="model_path").set_value(str(other))
    page.at.selectbox(key="model_dtype").set_value("int8")
    page.run().click("use_model")
    assert opened[-1] == BackendLocation("local", str(other), dtype="int8")
    assert "Trained on *novels*" in page.texts() and "license" not in page.texts()
    assert page.at.button(key="use_model").disabled
    for kind, address in (("A server", "http://127.0.0.1:8000"), ("A gateway", "wss://example.org/prod?token=t")):
        page.at.segmented_control(key="place_kind").set_value(kind)
        page.run()
        next(field for field in page.at.text_input if field.label == "Address").set_value(f" {address} ")
        next(field for field in page.at.text_input if field.label.startswith("API key")).set_value("secret")
        next(button for button in page.at.button if button.label == "Use it").click()
        page.run()
        assert opened[-1] == BackendLocation("gateway" if "wss" in address else "server", address, "secret")
        shown = page.texts().replace("\\", "")
        assert address.partition("?")[0] in shown and "token=" not in shown
        pasted = "".join(code.value for code in page.at.code)
        assert (f"OpenAI {address}/v1" in pasted) is ("wss" not in address) and "token=" not in pasted
