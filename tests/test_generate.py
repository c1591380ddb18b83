"""`generate.py` as functions and at the terminal: texts, samples, JSON, pipes, Ctrl-C, a story written together."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import generate as command
import sampling
from config import FINISH_SENTENCE, ConfigError, GenerationParams
from generate import main
from inference import decoder, writing
from inference.decoder import Event
from inference.prompts import GALLERY
from inference.terminal import columns
from inference.writing import encode_prompt, generate, prompt_window, stream
from model import GPT
from storage.gpt2_format import folder_defaults
from support.forked import PYTHON
from support.tiny_models import random_model, save, shape, tiny_tokenizer
from tokenizer import char_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent.parent
PARAMS = GenerationParams(max_tokens=25, seed=11)


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(shape(tiny_tokenizer(), block_size=48, n_embd=64), seed=2)


@pytest.fixture(scope="module")
def folder(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny", model, tiny_tokenizer())


def run(folder: Path, *words: str, prompt: str | None = "It was") -> int:
    given = [] if prompt is None else ["--prompt", prompt]
    given += [] if "--dtype" in words else ["--dtype", "float32"]  # `auto` depends on the processor
    given += [] if "--finish-sentence" in words else ["--finish-sentence", "0"]  # as PARAMS
    return main(["--model", str(folder), "--max-tokens", "25", "--seed", "11", *given, *words])


def test_a_stream_joined_is_the_text(model: GPT) -> None:
    wanted = PARAMS.model_copy(update={"n": 3, "max_tokens": 80})
    results = generate(model, tiny_tokenizer(), "It was “the”", wanted)
    events = list(stream(model, tiny_tokenizer(), "It was “the”", wanted))
    assert [event.seq for event in events] == list(range(len(events)))
    for index, result in enumerate(results):
        mine = [event for event in events if event.index == index]
        assert [event.kind for event in (mine[0], mine[-1])] == ["started", "done"]
        assert "".join(event.text for event in mine) == result.text == tiny_tokenizer().decode(result.ids)
        assert [event.token_id for event in mine if event.token_id is not None] == result.ids
        assert result.tokens == len(result.ids) and result.seed == 11 and not result.truncated
        assert mine[-1].usage["completion_tokens"] == result.tokens
    assert len({result.text for result in results}) == 3


def test_the_seed_in_a_result_writes_it_again(model: GPT) -> None:
    first = generate(model, tiny_tokenizer(), "It", GenerationParams(max_tokens=20, n=2))
    assert first[0].seed != generate(model, tiny_tokenizer(), "It", GenerationParams(max_tokens=20))[0].seed
    again = generate(model, tiny_tokenizer(), "It", GenerationParams(max_tokens=20, n=2, seed=first[0].seed))
    assert again == first
    more = generate(model, tiny_tokenizer(), "It", GenerationParams(max_tokens=20, n=20, seed=first[0].seed))
    assert more[:2] == first and len({result.text for result in more}) == 20


def test_dropout_is_off_and_the_model_s_mode_is_restored() -> None:
    model = random_model(shape(tiny_tokenizer(), dropout=0.5), seed=2)
    expected = generate(model, tiny_tokenizer(), "It", PARAMS)
    model.train()
    assert generate(model, tiny_tokenizer(), "It", PARAMS) == expected
    assert model.training
    model.wte.weight.data.fill_(float("nan"))
    with pytest.raises(sampling.LogitsError):
        generate(model, tiny_tokenizer(), "It", PARAMS)
    assert model.training


def test_no_character_is_split_between_events() -> None:
    """Every character of several bytes is several tokens here; events hold whole characters all the same."""
    tokenizer = train_bpe(["plain words only, so that nothing else is merged"] * 3, 260)
    text = "“Pip” paid £5 for café 🦉 — done"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    size = tokenizer.vocab_size
    model = random_model(shape(tokenizer, block_size=96, vocab_used=size), seed=1)

    class Scripted:
        """Draws the text's own tokens."""

        def __init__(self) -> None:
            self.left = iter(ids)

        def __call__(self, *_: Any) -> int:
            return next(self.left)

    original, decoder.sample = decoder.sample, Scripted()
    try:
        events = list(stream(model, tokenizer, "a", GenerationParams(max_tokens=len(ids))))
    finally:
        decoder.sample = original
    assert "".join(event.text for event in events) == text
    assert "\ufffd" not in "".join(event.text for event in events)
    assert all(event.text == "" or event.text in text for event in events)


def test_a_text_that_ends_inside_a_character_ends_with_the_replacement_character(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = train_bpe(["plain"] * 3, 258)
    model = random_model(shape(tokenizer, vocab_used=tokenizer.vocab_size), seed=1)
    half = tokenizer.encode("é")[0]
    monkeypatch.setattr(decoder, "sample", lambda *_: half)
    (result,) = generate(model, tokenizer, "a", GenerationParams(max_tokens=1))
    assert result.text == "\ufffd" and result.finish_reason == "length"
    (result,) = generate(model, tokenizer, "a", GenerationParams(max_tokens=1, stop=("\ufffd",)))
    assert result.text == ""


def test_stop_strings_that_span_tokens(model: GPT) -> None:
    whole = generate(model, tiny_tokenizer(), "It was", PARAMS.model_copy(update={"max_tokens": 60}))[0]
    stop = whole.text[10:14]
    wanted = PARAMS.model_copy(update={"max_tokens": 60, "stop": (stop, "never to be found")})
    events = list(stream(model, tiny_tokenizer(), "It was", wanted))
    assert "".join(event.text for event in events) == whole.text[: whole.text.index(stop)]
    assert events[-1].finish_reason == "stop"
    held = whole.text[-3:] + "x"
    wanted = PARAMS.model_copy(update={"max_tokens": 60, "stop": (held,)})
    assert (
        generate(model, tiny_tokenizer(), "It was", wanted)[0].text == whole.text
    )  # held back, then released at the end


def test_zero_tokens_give_an_empty_text(model: GPT) -> None:
    results = generate(model, tiny_tokenizer(), "It was", GenerationParams(max_tokens=0, n=2))
    assert [(result.text, result.finish_reason, result.tokens) for result in results] == [("", "length", 0)] * 2


def test_an_empty_prompt_and_ids(model: GPT) -> None:
    tokenizer = tiny_tokenizer()
    assert encode_prompt(tokenizer, "") == [tokenizer.start]
    by_ids = generate(model, tokenizer, tokenizer.encode("It was"), PARAMS)
    assert by_ids == generate(model, tokenizer, "It was", PARAMS)
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {wrong} is not among"):
            generate(model, tokenizer, [1, wrong], PARAMS)


@pytest.mark.parametrize("given", ["It was\r\nthe end", "It was\rthe end", "\ufeffIt was\nthe end"], ids=ascii)
def test_line_ends_and_a_mark_of_other_programs_are_not_read(given: str) -> None:
    tokenizer = tiny_tokenizer()
    assert encode_prompt(tokenizer, given) == tokenizer.encode("It was\nthe end")


@pytest.mark.parametrize("length", [1, 35, 36, 37, 47, 48, 49, 144])
@pytest.mark.parametrize("keep", [0, 6, 400])
def test_a_prompt_beyond_the_context_keeps_its_end(model: GPT, length: int, keep: int) -> None:
    tokenizer, context = tiny_tokenizer(), model.config.block_size
    ids = [3 + (7 * at) % 250 for at in range(length)]
    wanted = PARAMS.model_copy(update={"keep": keep})
    window, cut = prompt_window(ids, context, wanted)
    assert cut == (length > 36)
    if cut:
        kept = min(keep, 18)
        assert len(window) == 36 and window == ids[:kept] + ids[length - 36 + kept :]
    else:
        assert window == ids
    (result,) = generate(model, tokenizer, ids, wanted)
    assert (result.truncated, result.prompt_tokens, result.tokens) == (cut, len(window), 25)
    short = wanted.model_copy(update={"max_tokens": 3})
    assert len(prompt_window(ids, context, short)[0]) == min(length, 45)


def test_settings_out_of_bounds_are_refused() -> None:
    for values in (
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("inf")},
        {"repetition_penalty": 0.0},
        {"min_p": 1.0},
        {"top_k": -1},
        {"max_tokens": -1},
        {"n": 0},
        {"stop": ("",)},
        {"seed": -1},
    ):
        with pytest.raises(ValueError):
            GenerationParams(**values)


def test_logprobs_come_with_the_tokens(model: GPT) -> None:
    tokenizer = tiny_tokenizer()
    plain = [event.token_id for event in stream(model, tokenizer, "It", PARAMS)]
    events = [event for event in stream(model, tokenizer, "It", PARAMS, logprobs=3)]
    assert [event.token_id for event in events] == plain
    for event in events:
        if event.kind == "token":
            assert event.logprob is not None and event.logprob <= event.top[0][2] <= 0
            assert len(event.top) == 3 and event.top[0][1] == tokenizer.decode([event.top[0][0]])


def test_text_goes_to_standard_output_and_all_else_to_standard_error(
    folder: Path, model: GPT, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder) == 0
    shown = capsys.readouterr()
    text = generate(model, tiny_tokenizer(), "It was", PARAMS)[0].text
    assert shown.out == f"It was{text}\n"
    assert "25 tokens" in shown.err and "tokens/s" in shown.err and "--seed 11" in shown.err
    for words in (["--no-stream"], ["--temperature", "1.3", "--device", "cpu", "--dtype", "float32"]):
        assert run(folder, *words) == 0
        assert capsys.readouterr().out == f"It was{text}\n"
    assert run(folder, "--no-echo") == 0
    assert capsys.readouterr().out == f"{text}\n"


def test_json(folder: Path, model: GPT, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--json", "--n", "2") == 0
    found = json.loads(capsys.readouterr().out)
    expected = generate(model, tiny_tokenizer(), "It was", PARAMS.model_copy(update={"n": 2}))
    assert [sample["text"] for sample in found["samples"]] == [result.text for result in expected]
    assert found["seed"] == 11 and found["prompt"] == "It was" and found["truncated"] is False
    assert found["params"]["n"] == 2 and found["tokens_per_s"] > 0 and found["first_token_s"] > 0
    assert [sample["tokens"] for sample in found["samples"]] == [result.tokens for result in expected]


def fragmentary(model: GPT) -> tuple[list[str], str, str, str]:
    """(flags, the text they give, the same without its fragment, the same with its sentence finished)"""
    marks = {tiny_tokenizer().encode(mark)[0]: 6.0 for mark in ". "}
    for seed in range(200):
        params = PARAMS.model_copy(update={"logit_bias": marks, "seed": seed})
        text = generate(model, tiny_tokenizer(), "It was", params)[0].text
        if not 0 < (end := sampling.sentence_end(text)) < len(text) - 2:
            continue
        params = params.model_copy(update={"finish_sentence": FINISH_SENTENCE})
        whole = generate(model, tiny_tokenizer(), "It was", params)[0].text
        if sampling.sentence_end(whole) == len(whole.rstrip()):
            pairs = [str(word) for pair in marks.items() for word in pair]
            return ["--seed", str(seed), "--logit-bias", *pairs], text, text[:end], whole
    raise AssertionError("no seed writes a fragment that is then finished")


@pytest.mark.parametrize("words", [[], ["--no-stream"]])
def test_a_fragment_is_trimmed_on_request(
    folder: Path, model: GPT, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given, text, trimmed, _ = fragmentary(model)
    assert run(folder, *given, *words) == 0
    assert capsys.readouterr().out == f"It was{text}\n"
    assert run(folder, *given, *words, "--trim") == 0
    assert capsys.readouterr().out == f"It was{trimmed}\n"


def test_trimmed_words_appear_sentence_by_sentence_and_not_in_the_middle_of_a_number(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = []

    def written(*given: Any, **more: Any) -> Iterator[Event]:
        for text in (" late.", " It cost 3.", "5 pounds", " and no more.", " He"):
            yield Event(0, "token", text)
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr(writing, "stream", written)
    assert run(folder, "--trim") == 0
    assert printed == ["It was", "", " late.", "", " It cost 3.5 pounds and no more."]
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize("words", [[], ["--no-stream"], ["--n", "2"], ["--creative"], ["--interactive"]])
def test_the_notice_of_compiling_never_stands_behind_the_prompt(
    folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, notice, screen = decoder.CompiledStep.of, "compiling the model's code ...", io.StringIO()

    def slow(model: GPT) -> Any:
        print(notice, file=sys.stderr)
        return original(model)

    monkeypatch.setattr(decoder.CompiledStep, "of", slow)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    assert run(folder, *words) == 0
    assert notice in screen.getvalue().split("\n")


def test_a_text_at_the_terminal_finishes_its_sentence(
    folder: Path, model: GPT, capsys: pytest.CaptureFixture[str]
) -> None:
    given, text, _, whole = fragmentary(model)
    words = ["--model", str(folder), "--max-tokens", "25", "--dtype", "float32", "--prompt", "It was", *given]
    assert main(words) == 0
    assert capsys.readouterr().out == f"It was{whole}\n"
    assert whole.startswith(text) and len(whole) > len(text)


def test_several_samples(folder: Path, model: GPT, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    expected = generate(model, tiny_tokenizer(), "It was", PARAMS.model_copy(update={"n": 3}))
    assert run(folder, "--n", "3") == 0
    assert capsys.readouterr().out == columns([f"It was{result.text}" for result in expected], 0) + "\n"
    side = columns(["a b\nc", "long " * 12, ""], 120)
    assert [line.split(" | ")[0].strip() for line in side.split("\n")][:2] == ["a b", "c"]
    assert side.count(" | ") >= 2 and "---" not in side and all(len(line) <= 120 for line in side.split("\n"))
    assert "--- 2 of 2 ---" in columns(["a", "b"], 60)


def test_a_prompt_from_a_pipe(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(folder) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"It was\n"), encoding="utf-8"))
    assert run(folder, prompt=None) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert run(folder, prompt=None) == 2
    assert "not UTF-8 (byte 3)" in capsys.readouterr().err


def test_a_prompt_that_is_cut_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--keep", "4", prompt="It was the best of times, " * 20) == 0
    assert "longer than this model's context of 48 tokens: only 36" in capsys.readouterr().err


def interrupted(after: int) -> Any:
    """`stream`, with a Ctrl-C after so many events."""
    original = writing.stream

    def broken(*given: Any, **more: Any) -> Iterator[Event]:
        events = original(*given, **more)
        for number, event in enumerate(events):
            if number == after:
                raise KeyboardInterrupt
            yield event

    return broken


@pytest.mark.parametrize("words", [[], ["--no-stream"], ["--n", "2"], ["--json"]])
def test_ctrl_c_keeps_what_was_written(
    folder: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(folder, *words, "--json") == 0
    whole = json.loads(capsys.readouterr().out)["samples"][0]["text"]
    monkeypatch.setattr(writing, "stream", interrupted(12))
    assert run(folder, *words) == 130
    shown = capsys.readouterr()
    assert "stopped: " in shown.err
    if words == ["--json"]:
        (sample,) = json.loads(shown.out)["samples"]
        assert sample["finish_reason"] == "cancelled" and 0 < sample["tokens"] < 25
        assert whole.startswith(sample["text"]) and sample["text"]
    elif not words or words == ["--no-stream"]:
        text = shown.out.removesuffix("\n").removeprefix("It was")
        assert text and whole.startswith(text) and text != whole
    else:
        assert "--- 2 of 2 ---" in shown.out


def test_bad_flags_end_with_2_and_missing_models_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(folder, "--temperature", "-1", "--top-p", "3") == 2
    assert {"--temperature", "--top-p"} <= {word for word in capsys.readouterr().err.split() if word.startswith("--")}
    assert run(folder, "--interactive", "--creative") == 2
    assert main(["--model", str(tmp_path / "runs" / "none"), "--prompt", "x"]) == 1
    assert "train one with" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run(folder, "--dtype", "float8")
    assert ended.value.code == 2


def test_the_folder_s_own_settings_are_the_defaults(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"max_new_tokens": 7, "temperature": 0.5, "top_k": 5_000_000, "top_p": 0.5, "do_sample": True})
    )
    finish = {"finish_sentence": FINISH_SENTENCE}
    assert folder_defaults(tmp_path) == {"temperature": 0.5, "top_p": 0.5, "max_tokens": 7} | finish
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "repetition_penalty": 1.1}')
    assert folder_defaults(tmp_path) == {"temperature": 0.0, "repetition_penalty": 1.1} | finish
    (tmp_path / "generation_config.json").write_text("{")
    assert folder_defaults(tmp_path) == folder_defaults(tmp_path / "none") == finish
    assert folder_defaults(folder)["max_tokens"] == 200


def test_defaults_of_the_folder_yield_to_flags(model: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from checkpoint import save_model

    save_model(
        tmp_path / "m", model, tiny_tokenizer(), card={}, generation=GenerationParams(max_tokens=5, temperature=0.5)
    )
    for flags, expected in (([], (5, 0.5)), (["--max-tokens", "3", "--temperature", "1.0"], (3, 1.0))):
        assert main(["--model", str(tmp_path / "m"), "--json", "--prompt", "It", *flags]) == 0
        found = json.loads(capsys.readouterr().out)["params"]
        assert (found["max_tokens"], found["temperature"]) == expected


def test_a_story_written_together(
    folder: Path, model: GPT, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "story.txt"
    lines = [
        "/undo",
        "/retry",
        "It was",
        "/stats",
        "/set temperature 9",
        "/set nonsense 1",
        "/set top-k 7",
        "/set stop qqq",
        "/show",
        "the worst",
        "/undo",
        "/retry",
        "/continue",
        f"/save {out}",
        f"/save {out}",
        "/save",
        "/frob",
        "",
        "/help",
        "/new",
        "I",
        "/quit",
        "never reached",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert run(folder, "--interactive", prompt=None) == 0
    shown = capsys.readouterr()
    tokenizer = tiny_tokenizer()
    narrow = PARAMS.model_copy(update={"top_k": 7, "stop": ("qqq",)})

    def piece(prompt: str, params: GenerationParams) -> str:
        return generate(model, tokenizer, prompt, params)[0].text

    first = "It was" + piece("It was", PARAMS)
    gap = "" if first[-1].isspace() else " "
    second = piece(f"{first}{gap}the worst", narrow)
    reseeded = narrow.model_copy(update={"seed": 12})
    again = piece("It was", reseeded)
    onward = piece(f"It was{again}", reseeded)
    fresh = piece("I", reseeded)
    assert shown.out == "".join(f"{text}\n" for text in (first[6:], second, again, onward, fresh))
    assert out.read_text(encoding="utf-8") == f"It was{again}{onward}\n"
    for message in (
        "nothing to take back",
        "nothing to write again",
        "--temperature '9'",
        "where NAME is one of",
        "top_k = 7",
        "exists already",
        "/save FILE",
        "/frob: no such command",
        "25 tokens",
    ):
        assert message in shown.err, message


def test_ctrl_c_in_a_story_stops_the_piece_and_then_the_program(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["It was", KeyboardInterrupt])

    def ask(prompt: str = "") -> str:
        answer = next(answers)
        if answer is KeyboardInterrupt:
            raise KeyboardInterrupt
        return str(answer)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(writing, "stream", interrupted(8))
    assert run(folder, "--interactive", prompt=None) == 0
    assert len(capsys.readouterr().out) > 2


def test_the_gallery(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = char_tokenizer("".join(chr(code) for code in range(32, 127)) + "\n", 1)
    model = random_model(shape(tokenizer, block_size=64, vocab_used=tokenizer.vocab_size), seed=2)
    save(tmp_path / "letters", model, tokenizer)
    assert run(tmp_path / "letters", "--creative", "--max-tokens", "4", prompt=None) == 0
    shown = capsys.readouterr().out
    for number, (kind, openings) in enumerate(GALLERY.items()):
        assert f"--- {kind} ---\n{openings[(11 + number) % len(openings)]}" in shown
    few = char_tokenizer("abcdefghijklmnopqrstuvwxyz ", 1)
    save(tmp_path / "few", random_model(shape(few, vocab_used=few.vocab_size)), few)
    assert run(tmp_path / "few", "--creative", "--max-tokens", "4", prompt=None) == 0
    assert "is left out" in capsys.readouterr().err


def test_the_gallery_suits_a_small_alphabet(shared_data: Path) -> None:
    letters = set((shared_data / "tinyshakespeare.txt").read_text(encoding="utf-8"))
    assert len(GALLERY) >= 8
    for openings in GALLERY.values():
        assert len(openings) >= 3
        assert set("".join(openings)) <= letters


def test_help_needs_no_torch_and_a_closed_pipe_no_message(folder: Path) -> None:
    code = (
        "import sys, generate\n"
        "try: generate.main(['--help'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert shown.stdout.splitlines()[-1] == "0 False"
    assert "--temperature" in shown.stdout and "[0 to 2]" in shown.stdout
    command = f"{shlex.join(PYTHON)} generate.py --model {folder} --prompt It --max-tokens 2000 | head -c 2"
    shown = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert shown.stdout == "It"
    assert "error" not in shown.stderr.lower(), shown.stderr
    for program in ("generate.py", "evaluate.py"):
        reader, writer = os.pipe()
        os.close(reader)
        shown = subprocess.run(
            [*PYTHON, program, "--help"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=120
        )
        os.close(writer)
        assert (shown.returncode, shown.stderr) == (0, b"")


def test_help_shows_the_defaults_of_the_model_that_would_write(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own" / "generation_config.json").write_text('{"temperature": 0.37}')
    for words, shown in (["--model", str(tmp_path / "own")], "0.37"), (["--model", str(tmp_path / "none")], "1.3"):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        assert f"[0 to 2] (default: {shown})" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_damaged_prompt_setting_is_a_fault_not_a_crash(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        command.parse_flags(command.GenerateFlags, ["--n", "0"])
    assert run(folder, prompt="\ud800") in (0, 1)
    assert "Traceback" not in capsys.readouterr().err
