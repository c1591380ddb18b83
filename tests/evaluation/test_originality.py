"""The originality index: what is copied is found with its source, and nothing else is claimed."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

import prepare_data
from api import create_app
from dataset import TokenData
from evaluation import originality
from evaluation.originality import FOLDER, Index, OriginalityError, build_index, data_of, outermost
from inference.engine import Engine
from server.settings import read_settings
from storage.catalogue import Catalogue, author_of
from support.helpers import nonsense
from support.tiny_models import random_model, shape, tiny_tokenizer
from ui.originality import STYLE, marked

SYLLABLES = ["ka", "lo", "mi", "ter", "an", "ush", "wel", "dor", "ine", "sta", "bri", "gol", "fen", "ry", "pal", "ox"]
SYLLABLES += [
    "thu",
    "zen",
    "cro",
    "vi",
    "que",
    "jab",
    "ild",
    "esk",
    "om",
    "urn",
    "ha",
    "ply",
    "dge",
    "ow",
    "nit",
    "sca",
]


def prose(words: int, seed: int) -> str:
    """Sentences of made-up words, hardly any of which two seeds share in the same order."""
    draw = random.Random(seed)
    made = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(words)]
    return " ".join(word + draw.choice(["", "", "", "", ",", ".", "!”", "é"]) for word in made)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six books, one of which stands in two files; shards so small that passages cross them."""
    folder = tmp_path_factory.mktemp("books")
    for number in range(6):
        (folder / f"Author{number} - Book {number}.txt").write_text(prose(1500, number) + "\n", encoding="utf-8")
    rows = [{"text": prose(200, 50 + number)} for number in range(5)] + [{"text": " "}, {"text": prose(1500, 2) + "\n"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["--input", str(folder), "--out", str(folder / "data"), "--vocab-size", "1500", "--workers", "1", "--index"]
    assert prepare_data.main([*words, "--shard-tokens", "2048"]) == 0
    return folder / "data"


def training_text(folder: Path) -> list[tuple[str, str]]:
    """Name and text of every training document, read without the index."""
    data, index = TokenData.open(folder), Index.open(folder)
    tokens = data.train.read(0, len(data.train))
    parts = np.split(tokens, np.flatnonzero(tokens == index.tokenizer.eot) + 1)
    catalogue = Catalogue.load(folder)
    assert catalogue is not None
    texts = [index.tokenizer.decode(part.tolist()) for part in parts if len(part)]
    return [(catalogue.name("train", number), text) for number, text in enumerate(texts)]


def test_the_catalogue_names_every_document_of_both_splits(books: Path) -> None:
    sources = {f"Author{number} - Book {number}.txt": prose(1500, number) for number in range(6)}
    sources |= {f"rows.jsonl, row {number + 1}": prose(200, 50 + number) for number in range(5)}
    sources["rows.jsonl, row 7"] = prose(1500, 2)
    held = dict(training_text(books))
    catalogue = Catalogue.load(books)
    assert catalogue is not None
    names = [*held, *(catalogue.name("val", number) for number in range(catalogue.count("val")))]
    assert sorted(names) == sorted(sources)
    assert all(text.strip() == sources[name] for name, text in held.items())


def test_a_planted_quotation_of_60_tokens_is_found_with_its_source(books: Path) -> None:
    index, texts = Index.open(books), training_text(books)
    draw = random.Random(1)
    for trial in range(30):
        name, text = draw.choice(texts)
        ids = index.tokenizer.encode(text)
        begin = draw.randrange(len(ids) - 61)
        quotation = index.tokenizer.decode(ids[begin : begin + 60])
        while "�" in quotation:
            begin += 1
            quotation = index.tokenizer.decode(ids[begin : begin + 60])
        before, after = prose(30, 900 + trial) + " ", " " + prose(30, 950 + trial)
        report = index.check(before + quotation + after)
        run = max(report.runs, key=lambda run: run.tokens)
        assert report.longest == run.tokens >= 55 and report.copied_tokens >= 55
        assert run.text.strip() in text and run.text == (before + quotation + after)[run.start : run.stop]
        words = quotation.split()
        assert " ".join(words[1:-1]) in run.text  # the first and the last may be parts of words
        assert name in [source.name for source in run.sources]
        source = next(source for source in run.sources if source.name == name)
        assert source.before[-60:] + run.text + source.after[:60] in text


def test_first_and_last_words_count_although_they_are_split_into_other_tokens(books: Path) -> None:
    index, (name, text) = Index.open(books), training_text(books)[0]
    words = text.split()[100:130]
    quotation = " ".join(words)
    report = index.check(quotation)
    assert [run.text for run in report.runs] == [quotation] and report.share == 1.0
    assert report.longest == report.tokens == len(index.tokenizer.encode(quotation))
    assert report.runs[0].sources[0].name == name
    marked = index.check("Zz“" + quotation + "”zz").runs
    assert [run.text for run in marked] == [quotation]


def test_every_run_of_at_least_shortest_tokens_is_found(books: Path) -> None:
    index = Index.open(books)
    data = TokenData.open(books).train
    draw = np.random.default_rng(0)
    for begin in draw.integers(0, len(data) - 40, 300).tolist():
        ids = data.read(begin, begin + index.shortest).astype(np.int64)
        if (ids == index.tokenizer.eot).any():
            continue
        starts, stops, places = index._matches(ids)
        assert begin in places[(starts == 0) & (stops == index.shortest)].tolist()


def test_one_changed_token_anywhere_ends_a_run(books: Path) -> None:
    index, data = Index.open(books), TokenData.open(books).train
    for changed in range(20, 32):
        ids = data.read(1000, 1050).astype(np.int64)
        assert not (ids == index.tokenizer.eot).any()
        ids[changed] = (ids[changed] + 1) % 256 + 1
        for start, stop, place in zip(*index._matches(ids), strict=True):
            assert not start <= changed < stop
            assert data.read(int(place), int(place + stop - start)).tolist() == ids[start:stop].tolist()
        spans = {(int(start), int(stop)) for start, stop, _ in zip(*index._matches(ids), strict=True)}
        assert {(0, changed), (changed + 1, 50)} <= spans


def test_a_hundred_random_texts_have_no_copied_runs(books: Path) -> None:
    index = Index.open(books)
    stock = " ".join(text for _, text in training_text(books)).split()
    for seed in range(50):
        for text in (prose(200, 1000 + seed), " ".join(random.Random(seed).choices(stock, k=200))):
            report = index.check(text)
            assert (report.copied_tokens, report.share, report.runs) == (0, 0.0, [])


def test_a_collision_of_hashes_is_not_reported(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.open(books)
    everywhere = np.arange(index.entries, dtype=np.uint32)
    monkeypatch.setattr(index, "offsets", np.array([0] + [index.entries] * 2**index.bits, dtype=np.uint32))
    monkeypatch.setattr(index, "positions", everywhere)
    monkeypatch.setattr(originality, "bucket_numbers", lambda columns, bits: np.zeros(len(columns[0]), dtype=np.int64))
    assert index.check(prose(60, 77)).longest == 0
    assert index.check(training_text(books)[3][1][400:700]).share > 0.9


def test_runs_end_with_their_document_and_count_their_occurrences(books: Path) -> None:
    index, texts = Index.open(books), training_text(books)
    joined = texts[0][1][-200:].strip() + texts[1][1][:200]
    assert all(run.text.strip() in texts[0][1] or run.text.strip() in texts[1][1] for run in index.check(joined).runs)
    twice = [name for name, text in texts if text.strip() == prose(1500, 2)]
    if len(twice) == 2:
        run = index.check(prose(1500, 2)[300:700]).runs[0]
        assert run.occurrences == 2 and {source.name for source in run.sources} == set(twice)


def test_short_and_empty_texts(books: Path) -> None:
    index = Index.open(books)
    for text in ("", " ", "ka", "ka lo mi"):
        assert index.check(text).runs == []
    with pytest.raises(OriginalityError, match="min_tokens 4"):
        index.check("ka lo", min_tokens=4)


def test_the_index_is_much_smaller_than_the_text_and_the_same_each_time(
    books: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads((books / FOLDER / "index.json").read_text())
    bytes_of_text = TokenData.open(books).manifest.splits.train.bytes
    assert sum(entry["bytes"] for entry in facts["files"].values()) < bytes_of_text / 2
    shutil.rmtree(books / FOLDER)
    monkeypatch.setattr(originality, "BLOCK", 100)
    monkeypatch.setattr(originality, "PARTITION", 64)
    build_index(books)
    again = json.loads((books / FOLDER / "index.json").read_text())
    assert again == facts


@pytest.mark.parametrize("name", ["index.json", "offsets.bin", "positions.bin", "documents.bin"])
def test_a_damaged_index_is_refused_by_name(books: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(books, tmp_path / "data"))
    path = copy / FOLDER / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(OriginalityError, match=rf"{name}.*--data"):
        Index.open(copy)
    path.write_bytes(data[:-4])
    with pytest.raises(OriginalityError, match=rf"{name}.*--data"):
        Index.open(copy)
    build_index(copy)
    assert Index.open(copy).check(training_text(books)[0][1][:400]).longest > 20


def test_an_index_of_another_text_is_refused(books: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(3000, 5), encoding="utf-8")
    words = ["--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "data"), "--vocab-size", "500"]
    assert prepare_data.main(words) == 0
    with pytest.raises(OriginalityError, match="there is no index"):
        Index.open(tmp_path / "data")
    shutil.copytree(books / FOLDER, tmp_path / "data" / FOLDER)
    with pytest.raises(OriginalityError, match="made from another text"):
        Index.open(tmp_path / "data")


def test_with_one_id_a_character_runs_must_be_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = nonsense(6000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    words = ["--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "data"), "--tokenizer", "char", "--index"]
    assert prepare_data.main(words) == 0
    report = Index.open(tmp_path / "data").check(text[1000:1090] + nonsense(100, seed=4))
    assert report.min_tokens == 50 and report.runs[0].tokens >= 90
    assert text[1000:1090] in report.runs[0].text and report.runs[0].text in text
    (tmp_path / "story.txt").write_text(text[1000:1090], encoding="utf-8")
    capsys.readouterr()
    story = ["--data", str(tmp_path / "data"), "--input", str(tmp_path / "story.txt")]
    assert originality.main(story) == 0
    assert "90 of 90 tokens (100.0%)" in capsys.readouterr().out
    assert originality.main([*story, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(tmp_path / "story.txt")]["share"] == 1.0


def test_bad_flags_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert originality.main([]) == 2 and "--data is missing" in capsys.readouterr().err
    assert originality.main(["--data", str(tmp_path)]) == 1 and "manifest.json" in capsys.readouterr().err


def test_spans_inside_others_are_dropped() -> None:
    assert outermost([(0, 5), (1, 4), (0, 5), (3, 9), (8, 9), (20, 21)]) == [(0, 5), (3, 9), (20, 21)]
    assert outermost([(0, 3), (0, 5)]) == [(0, 5)]


@pytest.mark.parametrize(
    ("name", "head", "author"),
    [
        ("Dickens_Bleak_1853.txt", "", "Dickens"),
        ("Jane Austen - Emma.txt", "", "Jane Austen"),
        ("poe/raven.txt", "", "poe"),
        ("x.txt", "Title: X\nAuthor: George Eliot\n", "George Eliot"),
        ("the_vicarage_ghost.txt", "", ""),
        ("rows.jsonl, row 7", "", ""),
    ],
)
def test_authors_are_read_from_the_text_or_the_name(name: str, head: str, author: str) -> None:
    assert author_of(name, head) == author


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    tokenizer = tiny_tokenizer()
    with Engine(random_model(shape(tokenizer)), tokenizer, name="tiny", slots=2, queue_size=8) as engine:
        yield engine


def test_the_api_reports_what_was_copied(books: Path, engine: Engine) -> None:
    name, text = training_text(books)[0]
    with TestClient(create_app(read_settings(index=books), engine)) as client:
        sent = "Zounds, " + text[300:600]
        answer = client.post("/v1/originality", json={"text": sent})
        assert answer.status_code == 200
        report = answer.json()
        assert report == json.loads(json.dumps(asdict(Index.open(books).check(sent))))
        run = report["runs"][0]
        assert sent[run["start"] : run["stop"]] == run["text"] and run["sources"][0]["name"] == name
        assert client.post("/v1/originality", json={"text": "Zounds, no."}).json()["runs"] == []
        for body, param in (({"text": ""}, "text"), ({}, "text"), ({"text": "x", "min_tokens": 3}, "min_tokens")):
            error = client.post("/v1/originality", json=body)
            assert (error.status_code, error.json()["error"]["param"]) == (400, param), error.text
        assert "/v1/originality" in client.get("/openapi.json").json()["paths"]


def test_a_server_without_an_index_says_how_to_get_one(tmp_path: Path, engine: Engine) -> None:
    for index in (None, tmp_path):
        with TestClient(create_app(read_settings(index=index), engine)) as client:
            answer = client.post("/v1/originality", json={"text": "The fog"})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "no_index") and "--index" in error["message"]
            assert str(tmp_path) not in error["message"]


def test_a_models_run_names_its_data(tmp_path: Path) -> None:
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    assert data_of(best) is None
    (tmp_path / "run" / "config.toml").write_text(f'data_folder = "{tmp_path}"\n', encoding="utf-8")
    assert data_of(best) == data_of(tmp_path / "run") == tmp_path


def test_marks_are_readable_without_colour_and_text_is_never_html() -> None:
    text = "A <b>bold</b> & copied passage, and another."
    runs = [{"start": 2, "stop": 20}, {"start": 13, "stop": 30}, {"start": 32, "stop": 35}]
    made = marked(text, runs)
    assert re.sub(r"</?mark[^>]*>|<sup>.*?</sup>", "", made) == html.escape(text, quote=True)
    assert [html.unescape(part) for part in re.findall(r"<mark[^>]*>(.*?)</mark>", made)] == [
        text[2:20],
        text[20:30],
        text[32:35],
    ]
    assert re.findall(r"<sup>(.*?)</sup>", made) == ["[1]", "[2]", "[3]"] and "⟦" in STYLE


def page_of_a_copied_story() -> None:
    from ui.backends import BackendError, BackendLocation
    from ui.originality import draw_originality

    class Reader:
        place, name = BackendLocation("local", "reader"), "reader"

        def originality(self, text: str) -> dict[str, object]:
            if "no index" in text:
                raise BackendError("there is no <i>index</i>")
            source = {"name": "A <b>.txt", "document": 0, "token": 5, "before": "Once ", "after": " away."}
            run = {"start": 4, "stop": 12, "tokens": 12, "text": text[4:12], "occurrences": 2, "sources": [source]}
            return {"share": 0.5, "min_tokens": 12, "longest": 12, "runs": [run]}

    import streamlit as st

    draw_originality(Reader(), st.session_state["text"])  # type: ignore[arg-type]


def test_the_page_marks_passages_when_asked() -> None:
    from streamlit.testing.v1 import AppTest

    page = AppTest.from_function(page_of_a_copied_story, default_timeout=30)
    page.session_state["text"] = "The old fog <script> came."
    page.run()
    assert not page.exception and not page.get("html")
    page.toggle(key="originality").set_value(True).run()
    shown = " ".join(element.proto.body for element in page.get("html"))
    assert not page.exception
    assert '<mark class="copied">old fog </mark><sup>[1]</sup>&lt;script&gt;' in shown
    assert "12 tokens from A &lt;b&gt;.txt, 2 times" in shown and "50%" in shown
    page.session_state["text"] = "no index"
    page.run()
    assert "there is no <i>index</i>" in page.text[0].value and not page.exception
