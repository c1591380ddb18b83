"""Evaluation: figures equal transformers' and sacrebleu's, every token counts once, reports say what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

import evaluate
import prepare_data
from checkpoint import load_model, save_model
from config import GenerationParams
from dataset import TokenData
from evaluate import read_files
from evaluation import perplexity
from evaluation.generated import continuations, copied_passages
from evaluation.held_out import HeldOutTexts, file_texts, prepared_texts
from evaluation.metrics import BINS, MetricSums, bleu, distinct, repetition, self_bleu
from evaluation.originality import Index
from evaluation.perplexity import score, score_text, sliding_windows
from evaluation.report import markdown
from evaluation.yardstick import YardstickSums, yardstick_line
from support.helpers import nonsense, prepare_text
from support.tiny_models import TEXT, random_model, save, shape, tiny_tokenizer
from tokenizer import load_tokenizer
from training.ngram import NgramModel

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ["--samples", "1", "--max-tokens", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a context of 24 tokens; its logits are scaled down so that its loss is not extreme."""
    tokenizer = tiny_tokenizer()
    model = random_model(shape(tokenizer, padding=7))
    with torch.no_grad():
        model.wte.weight.mul_(0.3)
    return save(tmp_path_factory.mktemp("models") / "small-logits", model, tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight texts by three authors and an index; about half of them validate."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(8):
        name = f"{('Ash', 'Birch', 'Cedar')[number % 3]}_Tale{number}_18{number}0.txt"
        (folder / name).write_text(nonsense(700 + 90 * number, seed=number), encoding="utf-8")
    words = ["--input", str(folder), "--out", str(folder / "data"), "--vocab-size", "300", "--workers", "1", "--index"]
    assert prepare_data.main([*words, "--val-fraction", "0.5"]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def data_model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the data's own tokenizer."""
    tokenizer = load_tokenizer(data)
    return save(tmp_path_factory.mktemp("models") / "calm", random_model(shape(tokenizer), seed=2), tokenizer)


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_the_loss_of_a_text_within_the_context_is_transformers_own(model_folder: Path) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = load_model(model_folder)
    text = TEXT[:40]
    ids = [tokenizer.eot, *AutoTokenizer.from_pretrained(model_folder)(text)["input_ids"]]
    assert 10 < len(ids) <= 24
    batch = torch.tensor([ids])
    with torch.no_grad():
        loss = float(theirs(model_folder)(input_ids=batch, labels=batch).loss)
    found = score_text(model, tokenizer, text, stride=12).figures()
    assert found["loss"] == pytest.approx(loss, abs=1e-4) and found["tokens"] == len(ids) - 1
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("stride", [5, 12, 24])
def test_the_strided_loss_of_a_long_text_is_that_of_transformers_token_by_token(
    model_folder: Path, stride: int
) -> None:
    model, tokenizer = load_model(model_folder)
    draw, ids = np.random.default_rng(0), [0]
    while len(ids) < 90:  # the model's own choice now and then, so that some guesses are right
        with torch.no_grad():
            order = model(torch.tensor([ids[-24:]]))[0, -1].argsort(descending=True).tolist()
        ids.append(draw.choice([order[0], order[3], int(draw.integers(tokenizer.vocab_size))]))
    reference, nats, first, five = theirs(model_folder), [], 0, 0
    for at in range(1, len(ids)):
        begin = max(0, math.ceil((at - 24) / stride)) * stride
        with torch.no_grad():
            logp = reference(torch.tensor([ids[begin:at]])).logits[0, -1, : tokenizer.vocab_size].log_softmax(-1)
        nats.append(-float(logp[ids[at]]))
        order = logp.argsort(descending=True).tolist()
        first, five = first + (order[0] == ids[at]), five + (ids[at] in order[:5])
    found = score(model, np.array(ids), stride)
    assert found.figures()["loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-4)
    assert (found.top1, found.top5) == (first, five) and 0 < first < five


def test_bits_and_words_of_a_text(model_folder: Path) -> None:
    model, tokenizer = load_model(model_folder)
    ids = np.array([tokenizer.eot, *tokenizer.encode(TEXT)])
    nats = score(model, ids, 12).nats
    figures = score_text(model, tokenizer, TEXT, 12).figures()
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()))
    assert figures["word_perplexity"] == pytest.approx(math.exp(nats / len(TEXT.split())))
    assert (figures["words"], figures["bytes"]) == (len(TEXT.split()), len(TEXT.encode()))


def test_the_loss_does_not_depend_on_the_batch_of_windows(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(model_folder)
    ids = np.array(tokenizer.encode(TEXT * 5))
    together = score(model, ids, 8)
    monkeypatch.setattr(perplexity, "MAX_LOGITS", 1)
    alone = score(model, ids, 8)
    assert together.nats == pytest.approx(alone.nats, rel=1e-6) and together.tokens == alone.tokens == len(ids) - 1


@pytest.mark.parametrize(("length", "context", "stride"), [(2, 8, 4), (9, 8, 4), (10, 8, 4), (57, 8, 3), (40, 8, 8)])
def test_windows_score_every_token_once_with_enough_before_it(length: int, context: int, stride: int) -> None:
    scored = []
    for start, stop, first in sliding_windows(length, context, stride):
        assert 0 < stop - start <= context
        targets = range(start + 1 + first, stop + 1)
        assert start == 0 or all(target - start > context - stride for target in targets)
        scored += targets
    assert scored == list(range(1, length))


def test_without_an_end_of_text_the_first_token_is_only_read(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(prepare_text(tmp_path, nonsense(900)))
    assert tokenizer.eot is None
    model = random_model(shape(tokenizer))
    found = score_text(model, tokenizer, "the old house", stride=8)
    assert (found.tokens, found.bytes, found.words) == (12, 12, 3)
    limited = score_text(model, tokenizer, nonsense(500), stride=8, limit=50)
    assert limited.tokens == 49


def test_metrics_of_generated_texts_by_hand() -> None:
    texts = ["The cat and the hat.", "the cat"]
    assert distinct(texts, 1) == pytest.approx(5 / 8)  # the cat and hat .
    assert distinct(texts, 2) == pytest.approx(5 / 6)
    assert repetition("a b c d a b c d a b c d") == pytest.approx(1 - 4 / 9)
    assert (repetition("a b c"), distinct([], 2), self_bleu(["one"]), bleu([], [])) == (0.0, 0.0, None, None)


def test_bleu_is_sacrebleus() -> None:
    import sacrebleu

    texts = [nonsense(200, seed) for seed in range(4)]
    real = [nonsense(200, seed + 2) for seed in range(4)]
    expected = sacrebleu.corpus_bleu(texts, [real])
    found = bleu(texts, real)
    assert found is not None and found["score"] == pytest.approx(expected.score) and expected.score > 1
    assert "tok:13a" in found["signature"] and found["texts"] == 4
    each = [sacrebleu.sentence_bleu(text, [other for other in texts if other is not text]).score for text in texts]
    assert self_bleu(texts) == pytest.approx(sum(each) / 4)
    assert self_bleu(["a b c d e", "a b c d e"]) == pytest.approx(100.0)


def test_calibration_by_hand() -> None:
    tally = MetricSums()
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.5, 0.5, 1.0])
    right = np.array([True, True, True, False, False, True, True])
    tally.add(np.ones(7), confidence, right, right)
    found = tally.calibration()
    assert found["error"] == pytest.approx((abs(5 * 0.96 - 4) + abs(2 * 0.5 - 1)) / 7)
    assert [row["tokens"] for row in found["bins"] if row["tokens"]] == [2, 5] and len(found["bins"]) == BINS
    assert found["bins"][7]["accuracy"] == 0.5 and found["bins"][0]["confidence"] is None
    double = MetricSums()
    double += tally
    double += tally
    assert double.tokens == 14 and double.calibration()["error"] == pytest.approx(found["error"])


def test_held_out_texts_of_prepared_data_are_the_files_with_their_authors(data: Path) -> None:
    texts = list(prepared_texts(data))
    assert len(texts) == 4
    for one in texts:
        assert one.text.strip() == (data.parent / one.name).read_text(encoding="utf-8").strip()
        assert one.author == one.name.split("_")[0]


def test_texts_of_files_are_cleaned_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Title: A\nAuthor: George Eliot\n\nIt rained.\n", encoding="utf-8")
    rows = [{"text": "One row."}, {"text": " "}, {"text": "Another row."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts = list(file_texts(read_files([str(tmp_path)])))
    assert [(one.name, one.author) for one in texts] == [
        ("a.txt", "George Eliot"),
        ("rows.jsonl, row 1", ""),
        ("rows.jsonl, row 3", ""),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_have_the_authors_of_their_field(kind: str, tmp_path: Path) -> None:
    rows = [
        {"text": f"{author or 'Nobody'} wrote it.", "author": author} for author in ("Jane Austen", None, "H. James")
    ]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = [(one.author, one.style) for one in file_texts(read_files([str(path)]))]
    assert found == [("Jane Austen", "jane-austen"), ("", ""), ("H. James", "h-james")]


@pytest.mark.parametrize(("control", "expected"), [("author", {"ann", "ben", "cat"}), ("genre", {""})])
def test_prepared_rows_have_the_authors_that_are_their_styles(control: str, expected: set[str], tmp_path: Path) -> None:
    rows = [
        {"text": nonsense(300, number), "author": ("Ann", "Ben", "Cat")[number % 3], "genre": "novel"}
        for number in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["--input", str(tmp_path / "rows.jsonl"), "--control", control, "--out", str(tmp_path / "data")]
    assert prepare_data.main([*words, "--val-fraction", "0.5"]) == 0
    texts = list(prepared_texts(tmp_path / "data"))
    assert {one.author for one in texts} == expected
    assert {one.style for one in texts} == (expected if control == "author" else {"novel"})


def test_two_models_side_by_side(data: Path, data_model: Path, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["--model", str(data_model), "--compare", str(model_folder), "--data", str(data), *FAST]
    assert evaluate.main([*words, "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.md").read_text(encoding="utf-8")
    assert page == markdown(report)
    first, second = report["models"]
    for part in report["models"]:
        rows, authors = part["documents"], part["authors"]
        assert len(rows) == 4 and {row["author"] for row in rows} == {row["author"] for row in authors}
        for key in ("tokens", "bytes", "words"):
            assert part["total"][key] == sum(row[key] for row in rows) == sum(row[key] for row in authors)
        nats = [sum(row["loss"] * row["tokens"] for row in kind) for kind in (rows, authors)]
        assert nats == pytest.approx([part["total"]["loss"] * part["total"]["tokens"]] * 2)
        assert part["written"]["texts"] == 9 and part["written"]["originality"]["runs"] == []
        assert f"{part['total']['loss']:.4f}" in page and "Ash" in page
    assert first["total"]["bytes"] == second["total"]["bytes"]
    assert evaluate.main([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["models"] == report["models"]


def test_a_run_names_its_own_data_and_the_loss_is_that_of_its_texts(
    data: Path, data_model: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    model, tokenizer = load_model(data_model)
    save_model(run / "best", model, tokenizer, card={}, generation=GenerationParams())
    (run / "config.toml").write_text(f'data_folder = "{data}"\n', encoding="utf-8")
    assert evaluate.main(["--model", str(run), "--samples", "0", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"][0]
    assert "written" not in found
    expected = sum((score_text(model, tokenizer, one.text, 12).nats for one in prepared_texts(data)), 0.0)
    assert found["total"]["loss"] * found["total"]["tokens"] == pytest.approx(expected)


def test_copied_passages_are_reported_with_their_source(data: Path) -> None:
    from storage.catalogue import Catalogue

    index, catalogue = Index.open(data), Catalogue.load(data)
    assert catalogue is not None
    name = catalogue.name("train", 0)
    text = (data.parent / name).read_text(encoding="utf-8")
    found = copied_passages(index, ["Quite other words, mostly.", "Zounds! " + text[200:500]], 0)
    assert found["runs"][0]["text_number"] == 1 and found["longest"] == found["runs"][0]["tokens"] > 60
    assert name in [source["name"] for source in found["runs"][0]["sources"]]
    assert found["share"] == pytest.approx(found["copied_tokens"] / found["tokens"])


def test_held_out_texts_are_continued_from_the_middle(data: Path, data_model: Path) -> None:
    model, tokenizer = load_model(data_model)
    params = GenerationParams(max_tokens=20, seed=1, top_k=0)
    ours, real = continuations(model, tokenizer, params, HeldOutTexts("", lambda: prepared_texts(data)))
    texts = [one.text for one in prepared_texts(data)]
    assert len(ours) == len(real) == 4
    for own, other, text in zip(ours, real, texts, strict=True):
        assert other in text and len(own) <= max(len(other), 1)
        assert 0.2 < text.index(other) / len(text) < 0.8


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--data", "DATA", "--input", "x.txt"], 2, "exclude each other"),
        ([], 2, "--data FOLDER or --input"),
        (["--data", "DATA", "--stride", "999"], 2, "--stride 999"),
        (["--data", "nowhere"], 1, "manifest.json"),
        (["--input", "nowhere.txt"], 2, "nowhere.txt"),
        (["--data", "DATA", "--model", "nowhere"], 1, "nowhere"),
        (["--data", "DATA", "--index", "nowhere"], 1, "there is no index"),
        (["--data", "DATA", "--out", "FILE"], 2, "is a file"),
        (["--data", "DATA", "--stride", "-1"], 2, "--stride"),
    ],
)
def test_bad_flags_are_named(
    data: Path, data_model: Path, tmp_path: Path, capsys: Any, words: list[str], code: int, message: str
) -> None:
    (tmp_path / "FILE").write_text("x")
    places = {"DATA": str(data), "FILE": str(tmp_path / "FILE"), "nowhere": str(tmp_path / "nowhere")}
    given = ["--model", str(data_model), *FAST, *(places.get(word, word) for word in words)]
    assert evaluate.main(given) == code
    assert message in capsys.readouterr().err


def test_a_tokenizer_that_cannot_read_a_text_is_named(tmp_path: Path, capsys: Any) -> None:
    tokenizer = load_tokenizer(prepare_text(tmp_path, nonsense(900)))
    folder = save(tmp_path / "chars", random_model(shape(tokenizer)), tokenizer)
    (tmp_path / "odd.txt").write_text("the old house №\n", encoding="utf-8")
    assert evaluate.main(["--model", str(folder), "--input", str(tmp_path / "odd.txt"), *FAST]) == 2
    assert "odd.txt" in (message := capsys.readouterr().err) and "№" in message


def test_a_model_stands_beside_counting(data: Path, data_model: Path, model_folder: Path, tmp_path: Path) -> None:
    """Bits a byte of counting, of the model, and of the better mixture, over all validation tokens."""
    assert evaluate.main(["--model", str(data_model), "--data", str(data), "--out", str(tmp_path), *FAST]) == 0
    report = json.loads((tmp_path / "report.json").read_text())["models"][0]
    found, tokenizer = report["yardstick"], load_tokenizer(data)
    counts = NgramModel.counted(TokenData.open(data).train, tokenizer.vocab_size)
    texts = [tokenizer.encode_array(one.text) for one in prepared_texts(data)]
    nats = sum(-np.log(counts.probabilities(np.append(tokenizer.eot, ids))).sum() for ids in texts)
    size = report["total"]["bytes"]
    assert found["counted"] == pytest.approx(nats / math.log(2) / size)
    assert found["model"] == pytest.approx(report["total"]["bits_per_byte"])
    assert found["together"] <= min(found["counted"], found["model"]) + 1e-9 and 0 <= found["share"] <= 1
    assert (
        f"counting alone: {found['counted']:.3f}; this model: {found['model']:.3f}"
        in (tmp_path / "report.md").read_text()
    )
    # the data's ids are not this model's: there is nothing to compare
    assert evaluate.main(["--model", str(model_folder), "--data", str(data), "--out", str(tmp_path), *FAST]) == 0
    assert "yardstick" not in json.loads((tmp_path / "report.json").read_text())["models"][0]


def test_the_best_mixture_is_found() -> None:
    """Of 1,000 tokens one half is known to counting alone, the other to the model alone: they belong half and half."""
    sums, other = YardstickSums(), YardstickSums()
    sums.add(np.full(500, 0.5), np.full(500, 1e-6))
    other.add(np.full(500, 1e-6), np.full(500, 0.5))
    sums += other
    found = sums.figures(size=1000)
    assert found["share"] == 0.5 and found["together"] == pytest.approx(-math.log2(0.25), abs=1e-4)
    assert [found["counted"], found["model"]] == pytest.approx([(1 + math.log2(1e6)) / 2] * 2)
    assert "share 50%" in yardstick_line(found)
