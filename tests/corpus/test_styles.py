"""Styles: control ids before documents and in front of windows, read and never written, chosen and blended."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

import api
import evaluate
import train
from checkpoint import load_model, save_model
from config import ConfigError, GenerationParams, ModelConfig, build, style_blend, style_name
from corpus.documents import ReadOptions
from corpus.finder import inspect
from corpus.styles import StyleSource
from dataset import TokenData, WindowSampler, plain_windows, training_batches, validation_batches
from evaluation.held_out import prepared_texts
from evaluation.perplexity import sliding_windows
from evaluation.style_report import summary
from generate import main
from inference.compiled import CompiledStep
from inference.decoder import BatchDecoder, Sequence
from inference.engine import Engine
from inference.writing import generate
from model import GPT
from server.settings import read_settings
from storage.shards import Manifest
from support.helpers import TINY_FLAGS, nonsense
from support.samples import run, tokens, told
from support.tiny_models import GENERATION, random_model, save, shape, tiny_tokenizer
from tokenizer import StyleError, Tokenizer, TokenizerError, char_tokenizer, gpt2_tokenizer, load_tokenizer, with_styles

pytestmark = pytest.mark.usefixtures("one_thread")
WRITE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.3, "seed": 5}


def write(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine documents: four of Ash, of whom one names a control token, three of Birch, one each of Cedar and of nobody."""
    texts = {f"Ash_Tale{n}_18{n}1.txt": nonsense(900, seed=n) for n in range(3)}
    texts["Ash_Odd_1839.txt"] = "She wrote <|ash|> and <|birch|> upon the wall.\n" + nonsense(300, seed=8)
    texts |= {f"Birch_Tale{n}_18{n}2.txt": nonsense(700, seed=10 + n) for n in range(3)}
    texts |= {"Cedar_One_1855.txt": nonsense(400, seed=20), "anonymous.txt": nonsense(350, seed=21)}
    texts = {name: text.replace("\n", "\n\n") for name, text in texts.items()}  # paragraphs, where a text may be cut
    return write(tmp_path_factory.mktemp("library"), texts)


@pytest.fixture(scope="module")
def data(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    flags = ("--tokenizer", "bpe", "--vocab-size", 300, "--val-fraction", 0.34, "--control", "author")
    assert run("--input", library / "*.txt", *flags, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def styled() -> tuple[GPT, Tokenizer]:
    """A random model with three styles and a context of 24 tokens."""
    tokenizer = with_styles(tiny_tokenizer(), ["Ash", "Birch", "Charlotte Brontë"])
    return random_model(shape(tokenizer, padding=3), seed=3), tokenizer


def documents(out: Path, split: str, eot: int) -> list[list[int]]:
    """The ids of each document of a split, without end-of-text."""
    found: list[list[int]] = [[]]
    for token in tokens(out, split).tolist():
        if token == eot:
            found.append([])
        else:
            found[-1].append(token)
    return found[:-1]


# Names and blends


def test_names_and_blends_are_read_as_a_writer_types_them() -> None:
    assert [style_name(text) for text in ("Henry James", " Brontë, C. ", "1850s")] == [
        "henry-james",
        "bronte-c",
        "1850s",
    ]
    assert style_blend("") == {} and style_blend("Dickens") == {"dickens": 1.0}
    assert style_blend("dickens:3, austen:1,") == {"dickens": 0.75, "austen": 0.25}
    assert style_blend("a,b,a:2") == {"a": 0.75, "b": 0.25}
    for wrong in ("dickens:0", "dickens:-1", "dickens:x", "dickens:nan", "dickens:inf", ":1", "?!", "a,b,c,d,e"):
        with pytest.raises(ConfigError, match="style"):
            build(GenerationParams, {"style": wrong})


def test_a_part_of_a_name_is_enough_where_it_is_the_only_one(styled: tuple[GPT, Tokenizer]) -> None:
    tokenizer = styled[1]
    assert tokenizer.blend("bronte:1,ash:1") == [
        (tokenizer.styles["charlotte-bronte"], 0.5),
        (tokenizer.styles["ash"], 0.5),
    ]
    assert tokenizer.blend("bronte:1,charlotte:1") == [(tokenizer.styles["charlotte-bronte"], 1.0)]
    with pytest.raises(
        StyleError, match="style 'austen': this model has no such style; it has ash, birch, charlotte-bronte"
    ):
        tokenizer.blend("austen")
    with pytest.raises(StyleError, match="style 'bronte' fits several of this model's \\(anne-bronte, emily-bronte\\)"):
        with_styles(tiny_tokenizer(), ["Anne Brontë", "Emily Brontë"]).blend("bronte")
    with pytest.raises(StyleError, match="without --control"):
        tiny_tokenizer().blend("ash")


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char"])
def test_a_tokenizer_with_styles_survives_and_takes_their_names_in_a_text_for_text(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = {"gpt2": gpt2_tokenizer, "bpe": tiny_tokenizer, "char": lambda: char_tokenizer(["<|ash>"], 2)}[kind]()
    tokenizer = with_styles(base, ["Ash", "Henry James", "ash"])
    assert list(tokenizer.styles.values()) == [base.vocab_size, base.vocab_size + 1]
    assert tokenizer.encode("<|ash|>") == base.encode("<|ash|>") and tokenizer.decode([base.vocab_size]) == ""
    tokenizer.save(tmp_path)
    loaded, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.styles, loaded.fingerprint) == (tokenizer.styles, tokenizer.fingerprint)
    assert {"<|ash|>", "<|henry-james|>"} <= set(theirs.all_special_tokens) and len(theirs) == tokenizer.vocab_size
    assert theirs("<|ash|>hs")["input_ids"] == [base.vocab_size, *base.encode("hs")]
    assert theirs.decode([base.vocab_size, *base.encode("hs")], skip_special_tokens=True) == "hs"
    assert loaded.extends(base) and not base.extends(loaded) and not loaded.extends(with_styles(base, ["Birch"]))


def test_gpt2_has_room_for_47_styles() -> None:
    assert with_styles(gpt2_tokenizer(), [f"s{n}" for n in range(47)]).vocab_size == 50304
    with pytest.raises(TokenizerError, match="48 new styles, but there is room for 47"):
        with_styles(gpt2_tokenizer(), [f"s{n}" for n in range(48)])
    with pytest.raises(TokenizerError, match="rename the style"):
        with_styles(gpt2_tokenizer(), ["endoftext"])


# Preparing


def test_each_document_begins_with_the_control_id_of_its_author(library: Path, data: Path) -> None:
    tokenizer, manifest = load_tokenizer(data), Manifest.load(data)
    assert manifest.tokenizer.styles == tokenizer.styles
    names = {number: name for name, number in tokenizer.styles.items()}
    authors = {path.read_text(): path.name.split("_")[0].lower() for path in library.glob("*_*.txt")}
    seen = Counter()
    for split in ("train", "val"):
        for ids in documents(data, split, tokenizer.eot or 0):
            text = tokenizer.decode(ids)
            style = authors.get(text, "") if authors.get(text, "") in tokenizer.styles else ""
            assert names.get(ids[0], "") == style
            assert not any(token in names for token in ids[1:])
            seen[style] += 1
    assert sum(seen.values()) == 9 and seen["ash"] == 4 and seen["birch"] == 3
    assert set(told(data, "train") + told(data, "val")) == {path.read_text() for path in library.glob("*.txt")}


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ("folder", {"verse": 3, "prose": 3}),
        ("decade", {"1840s": 2, "1850s": 2}),  # the only text of the 1860s validates
        ("map.csv", {"gothic": 4, "comic": 1}),
        ("map.toml", {"gothic": 4, "comic": 1}),
    ],
)
def test_what_tells_a_style(control: str, expected: dict[str, int], tmp_path: Path) -> None:
    names = [
        "verse/A_1841.txt",
        "verse/B_1849.txt",
        "verse/C_1850.txt",
        "prose/D_1859.txt",
        "prose/E_1861.txt",
        "prose/F.txt",
    ]
    folder = write(tmp_path / "in", {name: nonsense(200, seed=at) for at, name in enumerate(names)})
    write(tmp_path, {
        "map.csv": "name,style\nverse/*,Gothic\nD_1859.txt,gothic\nF,Comic\n",
        "map.toml": 'gothic = ["verse/*", "D_*"]\nF = "Comic"\n',
    })  # fmt: skip
    control = str(tmp_path / control) if "." in control else control
    out = tmp_path / "out"
    assert (
        run("--input", folder, "--tokenizer", "char", "--control", control, "--val-fraction", 0.01, "--out", out) == 0
    )
    tokenizer, train = load_tokenizer(out), TokenData.open(out).train
    assert train.documents is not None
    names_of = {number: name for name, number in tokenizer.styles.items()}
    found = Counter(names_of.get(number, "") for number in train.documents.styles.tolist())
    found += Counter(names_of.get(int(tokens(out, "val")[0]), "") for _ in range(1))
    assert {name: count for name, count in found.items() if name} == expected


def test_rows_tell_their_style_by_a_field(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"text": nonsense(150, seed=n), "genre": ["Ghost", "Farce", None][n % 3], "publication_date": 1840 + n}
        for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        flags = ("--tokenizer", "char", "--control", "genre", "--out", tmp_path / name.replace(".", "-"))
        assert run("--input", tmp_path / name, *flags) == 0
        manifest, stream = Manifest.load(flags[-1]), TokenData.open(flags[-1])
        assert set(manifest.tokenizer.styles) == {"ghost", "farce"}
        found = [number for split in (stream.train, stream.val) for number in split.documents.styles.tolist()]
        assert sorted(Counter(found).values()) == [4, 4, 4] and -1 in found
    flags = (
        "--input",
        tmp_path / "rows.parquet",
        "--years",
        "1842-1851",
        "--tokenizer",
        "char",
        "--out",
        tmp_path / "y",
    )
    assert run(*flags, "--control", "decade") == 0
    assert Manifest.load(tmp_path / "y").tokenizer.styles.keys() == {"1840s", "1850s"}


def test_styles_do_not_depend_on_the_workers_nor_on_an_interruption(
    library: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corpus import encoding, preparation

    monkeypatch.setattr(encoding, "BATCH_BYTES", 600)  # several batches, some of them within a document
    monkeypatch.setattr("corpus.cleaning.CHUNK_BYTES", 500)
    flags = ("--input", library / "*.txt", "--tokenizer", "bpe", "--vocab-size", 300, "--val-fraction", 0.34)
    flags += ("--control", "author", "--out", tmp_path / "out")
    monkeypatch.setattr(preparation, "SAVE_SECONDS", -1.0)
    real, calls = preparation.encode, []

    def failing(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 6:
            raise OSError("disk full")
        return real(*given)

    monkeypatch.setattr(preparation, "encode", failing)
    assert run(*flags, "--workers", 1) == 1 and not (tmp_path / "out").exists()
    monkeypatch.setattr(preparation, "encode", real)
    assert run(*flags, "--workers", 2) == 0
    for split in ("train", "val"):
        assert np.array_equal(tokens(tmp_path / "out", split), tokens(data, split))
    cuts = [len(inspect(path, path.name, ReadOptions()).cuts) for path in library.glob("Ash_Tale*")]
    assert min(cuts) > 2  # each of these came in pieces


def test_more_styles_than_ids_keep_the_largest_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {f"A{n:02d}_Book{part}_1850.txt": nonsense(100 + 10 * n, seed=n) for n in range(50) for part in (1, 2)}
    folder, out = write(tmp_path / "in", texts), tmp_path / "out"
    assert run("--input", folder, "--control", "author", "--val-fraction", 0.01, "--out", out) == 0
    styles = Manifest.load(out).tokenizer.styles
    assert list(styles) == [f"a{n:02d}" for n in range(49, 2, -1)] and set(styles.values()) == set(range(50257, 50304))
    assert "50 styles, and room for 47" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("control", "told"),
    [
        ("genre", "plain text without fields: give author, folder, decade"),
        ("missing.csv", "missing.csv: No such file"),
        ("bad.csv", "line 2 is not NAME,STYLE: B_Two_1850.txt"),
        ("bad.toml", "bad.toml: A: write NAME = "),
        ("other.csv", "gives no document a style"),
    ],
)
def test_what_cannot_tell_styles_is_refused(
    control: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "in", {f"{name}_1850.txt": nonsense(200) for name in ("A_One", "B_Two")})
    write(tmp_path, {"bad.csv": "A_One,x\nB_Two_1850.txt\n", "bad.toml": "A = 3\n", "other.csv": "C_One,x\n"})
    control = str(tmp_path / control) if "." in control else control
    assert run("--input", folder, "--control", control, "--out", tmp_path / "out") == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_first_pattern_that_fits_counts() -> None:
    control = StyleSource("x.csv", (("deep/*", "one"), ("*_b", "two"), ("*", "rest")))
    assert [control.mapped(name) for name in ("deep/a_b.txt", "flat/a_b.txt", "c.txt")] == ["one", "two", "rest"]


# WindowSampler


def test_a_window_begins_with_its_documents_control_id(data: Path) -> None:
    held, tokenizer = TokenData.open(data), load_tokenizer(data)
    stream, T = held.train, 16
    whole = stream.read(0, len(stream)).astype(np.int64)
    style, styles = -1, []
    for token in whole:  # plainly: the last control id, none after an end-of-text until the next
        style = int(token) if token in tokenizer.styles.values() else style
        styles.append(style)
        style = -1 if token == tokenizer.eot else style
    starts = np.arange(0, len(stream) - T, 7)
    x, y = stream.batch(starts, T)
    for row, start in enumerate(starts):
        assert x[row, 0] == (styles[start] if styles[start] >= 0 else whole[start])
        assert torch.equal(x[row, 1:], torch.from_numpy(whole[start + 1 : start + T]))
        assert torch.equal(y[row], torch.from_numpy(whole[start + 1 : start + T + 1]))


def test_an_eighth_of_the_training_windows_knows_no_styles(data: Path) -> None:
    stream = TokenData.open(data).train
    lowest, T = stream.documents.lowest, 16
    windows = WindowSampler(len(stream), T, seed=1)
    starts = windows.starts(0, 20 * windows.per_epoch)
    plain = plain_windows(starts)
    assert 0.08 < plain.mean() < 0.17
    everywhere = np.arange(len(stream) - T)
    x, y = stream.batch(everywhere, T, np.ones(len(everywhere), dtype=bool))
    assert int(x.max()) < lowest and int(y.max()) < lowest and torch.equal(x[:, 1:], y[:, :-1])
    text = stream.read(0, len(stream))
    text = text[text < lowest].tobytes()
    assert all(row.astype(np.uint16).tobytes() in text for row in x.numpy())
    batches = training_batches(stream, windows, batch_size=len(starts), grad_accum_steps=1)
    x, _ = next(batches)
    assert np.array_equal((x >= lowest).any(dim=1).numpy()[plain], np.zeros(plain.sum(), dtype=bool))
    assert (x[:, 0] >= lowest).numpy()[~plain].mean() > 0.9  # the rest lies in the document of nobody


def test_validation_predicts_every_token_once_and_always_in_style(data: Path) -> None:
    stream = TokenData.open(data).val
    seen = torch.cat([y.flatten() for _, y in validation_batches(stream, 16, 4)])
    assert torch.equal(seen, torch.from_numpy(stream.read(1, len(stream)).astype(np.int64)))
    first = torch.cat([x[:, 0] for x, _ in validation_batches(stream, 16, 4)])
    assert (first >= stream.documents.lowest).float().mean() > 0.6


def test_a_model_gets_rows_for_the_styles_of_new_texts(library: Path, data: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert (
        run(
            "--input",
            library / "*.txt",
            "--tokenizer",
            "bpe",
            "--vocab-size",
            300,
            "--val-fraction",
            0.34,
            "--out",
            plain,
        )
        == 0
    )
    flags = [*TINY_FLAGS, "--train.max-steps", "2", "--preset", "starter"]
    assert train.main(["--data", str(plain), "--out", str(tmp_path / "one"), *flags]) == 0
    model, tokenizer = load_model(tmp_path / "one" / "best")
    flags = ["--init-from", str(tmp_path / "one" / "best"), "--train.max-steps", "1", "--train.lr", "1e-9"]
    flags += [
        "--train.weight-decay",
        "0",
        "--train.batch-size",
        "2",
        "--train.device",
        "cpu",
        "--train.eval-interval",
        "0",
    ]
    assert train.main(["--data", str(data), "--out", str(tmp_path / "two"), *flags, "--train.no-tensorboard"]) == 0
    grown, styled = load_model(tmp_path / "two" / "best")
    assert styled.extends(tokenizer) and grown.config.tokens == styled.vocab_size
    ids = torch.tensor([tokenizer.encode("The old house stood")])
    assert torch.allclose(grown(ids)[..., : tokenizer.vocab_size], model(ids), atol=1e-4)


# Writing


def reference(
    model: GPT, tokenizer: Tokenizer, prompt: list[int], fronts: list[tuple[list[int], float]], count: int
) -> list[int]:
    """Greedy writing inside the context, from whole forward passes: the weighted mean of each style's log-probabilities."""
    ids = list(prompt)
    for _ in range(count):
        logp = sum(weight * model(torch.tensor([front + ids]))[0, -1].log_softmax(-1) for front, weight in fronts)
        logp[list(tokenizer.controls.values())] = float("-inf")
        ids.append(int(logp.argmax()))
        if ids[-1] == tokenizer.eot:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("style", ["", "ash", "birch", "ash:0.6,birch:0.4", "ash:1,birch:2,charlotte-bronte:1"])
@pytest.mark.parametrize("prompt", ["", "It was"])
def test_a_style_is_its_control_id_in_front_and_a_blend_the_mean_of_log_probabilities(
    style: str, prompt: str, styled: tuple[GPT, Tokenizer]
) -> None:
    model, tokenizer = styled
    ids = tokenizer.encode(prompt) or ([] if style else [tokenizer.start])
    fronts = [([control], weight) for control, weight in tokenizer.blend(style)] or [([], 1.0)]
    params = GenerationParams(temperature=0, repetition_penalty=1, style=style, max_tokens=10)
    (result,) = generate(model, tokenizer, prompt, params)
    with torch.no_grad():
        expected = reference(model, tokenizer, ids, fronts, 10)
    assert result.ids == expected
    assert result.prompt_tokens == len(ids)


@pytest.mark.parametrize("style", ["", "birch", "ash:0.5,birch:0.5"])
def test_control_ids_are_never_written(style: str, styled: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = copy.deepcopy(styled)
    controls = set(tokenizer.styles.values())
    with torch.no_grad():
        model.ln_f.bias.copy_(5 * model.wte.weight[list(controls)].mean(dim=0))
        share = model(torch.tensor([[0, 1, 2]]))[0].softmax(-1)[:, list(controls)].sum(-1)
    assert share.mean() > 0.2  # it wants to
    params = GenerationParams(**WRITE | {"temperature": 2.0}, style=style, max_tokens=300, n=2)
    for result in generate(model, tokenizer, "It was", params):
        assert not controls & set(result.ids) and "<|" not in result.text
    folder = save(tmp_path / "model", model, tokenizer)
    theirs, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = words("<|birch|>It was" if style else "It was", return_tensors="pt")
    torch.manual_seed(0)
    out = theirs.generate(**ids, max_new_tokens=15, do_sample=True, num_return_sequences=20, top_k=0, temperature=2.0)
    assert not controls & set(out[:, ids["input_ids"].size(1) :].flatten().tolist())


def test_the_style_stays_in_front_when_the_window_rolls(
    styled: tuple[GPT, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = styled
    read: list[list[int]] = []
    prefill = BatchDecoder._prefill

    def watched(self: BatchDecoder, states: Any) -> None:
        read.append(list(states[0].pending))
        prefill(self, states)

    monkeypatch.setattr(BatchDecoder, "_prefill", watched)
    monkeypatch.setattr(tokenizer, "eot", None)
    params = GenerationParams(**WRITE, style="ash:0.5,birch:0.5", max_tokens=80, keep=3)
    (result,) = generate(model, tokenizer, "It was the best of times", params)
    prompt = tokenizer.encode("It was the best of times")
    whole = prompt + result.ids
    assert len(result.ids) == 80 and len(read) > 8
    ash, birch = tokenizer.styles["ash"], tokenizer.styles["birch"]
    assert [ids[0] for ids in read] == [ash, birch] * (len(read) // 2)
    for ids in read[2:]:
        assert len(ids) == 18 and ids[1:4] == prompt[:3]  # three quarters of 24
        assert any(whole[at : at + 14] == ids[4:] for at in range(len(whole)))


def test_one_seed_one_text_in_style_alone_beside_others_and_on_every_surface(
    styled: tuple[GPT, Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = styled
    styles = ["ash", "", "ash:0.7,birch:0.3", "birch", "birch:1,ash:1,charlotte-bronte:1"]
    each = [GenerationParams(**WRITE, style=style, max_tokens=60, n=2) for style in styles]
    alone = [[result.text for result in generate(model, tokenizer, "It was", params)] for params in each]
    assert len({text for texts in alone for text in texts}) == 10
    with Engine(model, tokenizer, name="tiny", slots=4) as engine:
        jobs = [engine.submit("It was", params) for params in each]
        assert [[result.text for result in job.result()] for job in jobs] == alone
        body = {"prompt": "It was", **each[2].model_dump(mode="json")}
        with TestClient(api.create_app(read_settings(), engine)) as client:
            for path in ("/generate", "/invocations"):
                samples = client.post(path, json=body).json()["samples"]
                assert [sample["text"] for sample in samples] == alone[2]
            answer = client.post("/v1/completions", json=body | {"model": "tiny", "keep": None})
            assert [choice["text"] for choice in answer.json()["choices"]] == alone[2]
            with client.websocket_connect("/ws") as socket:
                socket.send_json({"action": "generate", "request_id": "one", **body})
                found = ["", ""]
                while (message := socket.receive_json())["type"] != "complete":
                    assert message["type"] != "error", message
                    found[message.get("index", 0)] += message.get("text", "")
            assert found == alone[2]
            assert client.get("/health").json()["styles"] == list(tokenizer.styles)
            assert client.get("/v1/models").json()["data"][0]["styles"] == list(tokenizer.styles)
            for path in ("/generate", "/v1/completions"):
                answer = client.post(path, json={"prompt": "It was", "style": "austen"})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"], error["code"]) == (400, "style", "unknown_style")
                assert "it has ash, birch, charlotte-bronte" in error["message"]
                answer = client.post(path, json={"prompt": "It was", "style": "ash:x"})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "style")
    folder = save(tmp_path / "model", model, tokenizer)
    with Engine.load(folder, slots=1, dtype="float32") as engine, pytest.raises(StyleError, match="takes 2 slots"):
        engine.submit("It was", each[2])


def test_a_blend_is_the_weighted_mean_of_log_probabilities(styled: tuple[GPT, Tokenizer]) -> None:
    tokenizer = styled[1]
    sequence = Sequence(tokenizer, [], GenerationParams(style="ash:3,birch:1"), seed=0, index=0, context=24)
    given = [torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-3.0, 1.0, 4.0])]
    rest = torch.full((tokenizer.vocab_size - 3,), -30.0)
    for state, logits in zip(sequence.states, given, strict=True):
        state.logits = torch.cat((logits, rest)).numpy()
    expected = (0.75 * given[0].log_softmax(-1) + 0.25 * given[1].log_softmax(-1)).softmax(-1)
    assert torch.allclose(torch.from_numpy(sequence.take_logits())[:3].softmax(-1), expected, atol=1e-6)
    assert all(state.logits is None for state in sequence.states)


def test_a_blend_that_waits_for_slots_is_not_overtaken_for_ever(styled: tuple[GPT, Tokenizer]) -> None:
    model, tokenizer = styled
    with Engine(model, tokenizer, slots=2) as engine:
        single = GenerationParams(**WRITE, max_tokens=30)
        jobs = [engine.submit("It was", single) for _ in range(6)]
        jobs.insert(3, engine.submit("It was", single.model_copy(update={"style": "ash,birch"})))
        jobs += [engine.submit("It was", single) for _ in range(6)]
        results = [job.result()[0] for job in jobs]
    assert all(result.finish_reason in ("length", "stop") for result in results)


def test_a_failure_in_one_style_ends_its_text_alone(
    styled: tuple[GPT, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = styled
    with Engine(model, tokenizer, slots=4) as engine:
        alone = engine.submit("It was", GenerationParams(**WRITE, max_tokens=40)).result()[0].text
        step, birch = CompiledStep.__call__, tokenizer.styles["birch"]
        guilty: list[int] = []
        prefill = BatchDecoder._prefill

        def watched(self: BatchDecoder, states: Any) -> None:
            prefill(self, states)
            if self.prefix_cache[states[0].slot].ids[:1] == [birch]:
                guilty.append(states[0].slot)

        def failing(self: CompiledStep, cache: Any, ids: Any, slots: Any, last: int | None = None) -> Any:
            if any(slot in guilty and cache.length[slot] > 8 for slot in slots):
                raise RuntimeError("out of memory")
            return step(self, cache, ids, slots, last)

        monkeypatch.setattr(BatchDecoder, "_prefill", watched)
        monkeypatch.setattr(CompiledStep, "__call__", failing)
        blend = engine.submit("It was", GenerationParams(**WRITE, max_tokens=40, style="ash,birch"))
        other = engine.submit("It was", GenerationParams(**WRITE, max_tokens=40))
        events = list(blend)
        assert [event.kind for event in events].count("error") == 1 and "out of memory" in (events[-1].message or "")
        assert other.result()[0].text == alone


def test_the_terminal_chooses_and_lists_styles(
    styled: tuple[GPT, Tokenizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = styled
    folder = str(save(tmp_path / "model", model, tokenizer))
    flags = [
        "--model",
        folder,
        "--prompt",
        "It was",
        "--max-tokens",
        "20",
        "--seed",
        "3",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--finish-sentence",
        "0",
    ]
    assert main([*flags, "--style", "Charlotte Brontë:1,ash:3", "--no-echo"]) == 0
    params = GenerationParams(style="ash:3,bronte:1", max_tokens=20, seed=3)
    assert capsys.readouterr().out.rstrip("\n") == generate(model, tokenizer, "It was", params)[0].text.rstrip("\n")
    assert main([*flags, "--style", "austen"]) == 2
    assert (
        "style 'austen': this model has no such style; it has ash, birch, charlotte-bronte" in capsys.readouterr().err
    )
    card = (Path(folder) / "README.md").read_text()
    assert "ash, birch, charlotte-bronte" in card and "<|ash|>" in card
    assert json.loads((Path(folder) / "generation_config.json").read_text())["suppress_tokens"] == sorted(
        tokenizer.styles.values()
    )


# Do the styles work?


@pytest.fixture(scope="module")
def two_voices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Prepared texts of two authors with words of their own, and a model trained on them for seconds."""
    folder, rng = tmp_path_factory.mktemp("voices"), np.random.default_rng(0)
    stock = {"Ash": ["sea", "ship", "sail", "wind"], "Birch": ["tea", "cup", "cake", "milk"]}
    for author, words in stock.items():
        for number in range(6):
            text = " ".join(rng.choice([*words, "and"], 600))
            (folder / f"{author}_Tale{number}_1850.txt").write_text(text)
    flags = ("--tokenizer", "char", "--control", "author", "--val-fraction", 0.34)
    assert run("--input", folder, *flags, "--out", folder / "data") == 0
    flags = [
        *TINY_FLAGS,
        "--preset",
        "starter",
        "--model.block-size",
        "8",
        "--train.max-steps",
        "300",
        "--train.lr",
        "1e-2",
    ]
    flags += [
        "--train.batch-size",
        "32",
        "--train.log-interval",
        "100",
        "--train.eval-interval",
        "0",
        "--model.dropout",
        "0",
    ]
    assert train.main(["--data", str(folder / "data"), "--out", str(folder / "run"), *flags]) == 0
    return folder / "data", folder / "run" / "best"


def test_the_right_style_has_the_lower_loss_and_the_table_shows_it(
    two_voices: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model_folder = two_voices
    flags = [
        "--model",
        str(model_folder),
        "--data",
        str(data),
        "--samples",
        "0",
        "--device",
        "cpu",
        "--style-tokens",
        "500",
    ]
    assert evaluate.main([*flags, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["models"][0]["dial"]
    for style, losses in found["matrix"].items():
        wrong = next(name for name in found["styles"] if name != style)
        assert losses[style] < losses["none"] < losses[wrong]
    total = found["summary"]
    assert total["first"] == total["texts"] == len(found["texts"]) == 4 and total["chance"] == 2
    assert total["gain_over_wrong"]["mean"] == pytest.approx(total["wrong"] - total["right"])
    written = (tmp_path / "report.md").read_text()
    assert "## Do the styles work?" in written and f"**{found['matrix']['ash']['ash']:.3f}**" in written
    model, tokenizer = load_model(model_folder)
    row = found["texts"][0]
    held = next(text for text in prepared_texts(data) if text.name == row["name"])
    ids = tokenizer.encode_array(held.text).astype(np.int64)
    begin = (len(ids) - 501) // 2
    ids, control = ids[begin : begin + 501], tokenizer.styles[row["style"]]
    losses = []
    with torch.no_grad():
        for start, stop, first in sliding_windows(len(ids), 8, 4):
            x = torch.tensor([[control, *ids[start + 1 : stop].tolist()]])
            losses += torch.nn.functional.cross_entropy(
                model(x)[0, first:], torch.from_numpy(ids[start + 1 + first : stop + 1]), reduction="none"
            ).tolist()
    assert row["losses"][row["style"]] == pytest.approx(sum(losses) / 500, abs=1e-5)


def test_the_summary_counts_text_by_text() -> None:
    rows = [
        {"style": "a", "losses": {"none": 3.0, "a": 2.0, "b": 3.0, "c": 4.0}},
        {"style": "b", "losses": {"none": 5.0, "a": 4.0, "b": 4.5, "c": 6.0}},
    ]
    found = summary(rows)
    assert (found["right"], found["none"], found["wrong"]) == (3.25, 4.0, 4.25)
    assert found["gain_over_none"]["mean"] == 0.75 and found["gain_over_none"]["standard_error"] == pytest.approx(0.25)
    assert found["gain_over_wrong"]["mean"] == 1.0 and found["first"] == 1 and found["chance"] == 2 / 3
    alone = summary([{"style": "a", "losses": {"none": 3.0, "a": 2.0}}])
    assert alone["wrong"] is None and alone["gain_over_none"] == {"mean": 1.0, "standard_error": None}


def test_what_is_written_in_a_style_has_its_words(two_voices: tuple[Path, Path]) -> None:
    model, tokenizer = load_model(two_voices[1])
    counts = {}
    for style in ("ash", "birch"):
        params = GenerationParams(style=style, max_tokens=400, temperature=1, repetition_penalty=1, seed=1)
        words = generate(model, tokenizer, "", params)[0].text.split()
        counts[style] = sum(word in ("sea", "ship", "sail", "wind") for word in words) / len(words)
    assert counts["ash"] > 0.4 and counts["birch"] < 0.1


def test_a_model_without_styles_is_saved_as_before(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_model(tmp_path / "m", GPT(shape(tokenizer)), tokenizer, card={}, generation=GENERATION)
    assert "suppress_tokens" not in json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert "styles" not in json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert "styles" not in (tmp_path / "m" / "README.md").read_text()
    assert ModelConfig().vocab_size == 0
