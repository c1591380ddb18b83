"""lm-eval's `local-completions` against its `hf` on the same folder: every number the same. Skipped where lm-eval is missing.

pip install "lm-eval[api]==0.4.13" && python -m pytest tests/server/test_lm_eval.py -s     # prints the table of docs/results.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import api
from inference.engine import Engine
from support.api_support import TEXT, ending_model, running, settings
from support.tiny_models import save
from tokenizer import Tokenizer, char_tokenizer, gpt2_tokenizer, train_bpe

lm_eval = pytest.importorskip("lm_eval")

CONTEXT = 64
LONG = TEXT * 6  # several windows
TOLERANCE = 1e-5


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "char":
        return char_tokenizer(TEXT + "H", 2)
    return gpt2_tokenizer() if kind == "gpt2" else train_bpe([TEXT * 20], 300)


@pytest.fixture(scope="module", params=["char", "bpe", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds the end of text likeliest after "He died."."""
    tokenizer = tokenizer_of(request.param)
    model = ending_model(tokenizer, "He died.")
    folder: Path = tmp_path_factory.mktemp("models") / request.param
    return save(folder, model, tokenizer)


def requests(kind: str, arguments: list[tuple[str, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=number)  # type: ignore[arg-type]
        for number, given in enumerate(arguments)
    ]


PAIRS = [
    ("He died.", " The"),
    ("The fog lay upon the", " river, and"),
    ("The fog lay upon the river", "."),
    ("The", " lamps of the quay burned low; £5 was paid for the café’s piano."),
    (TEXT * 2, " The fog"),
    ("“the lamps”", " é"),
]


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "remote"])
def test_lm_eval_finds_the_same_numbers(folder: Path, remote: bool, capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    reference = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1, max_length=CONTEXT)
    engine = Engine.load(folder, dtype="float32", device="cpu", name="tiny", slots=4)
    with running(api.create_app(settings(), engine)) as address:
        backend: dict[str, Any] = {"tokenizer_backend": "remote"} if remote else {"tokenizer": str(folder)}
        client = LocalCompletionsAPI(
            model="tiny", base_url=f"{address}/v1/completions", max_length=CONTEXT + 2, batch_size=1, **backend
        )
        pairs = [*PAIRS, *greedy_pairs(engine)]
        expected = reference.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        found = client.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        rolling = [reference, client]
        texts: list[tuple[str, ...]] = [(LONG,), ("The fog.",)]
        whole, ours = (
            lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True) for lm in rolling
        )
    engine.close(5)
    worst = max(difference(mine[0], theirs[0]) for mine, theirs in zip(found, expected, strict=True))
    worst_rolling = max(difference(mine, theirs) for mine, theirs in zip(ours, whole, strict=True))
    greedy = [bool(one[1]) for one in expected]
    with capsys.disabled():
        cells = [folder.name, "server" if remote else "folder", len(pairs), f"{worst:.1e}", f"{worst_rolling:.1e}"]
        print("\n|", " | ".join(map(str, cells)), "|", sum(greedy), "of", len(greedy), "|")
    assert worst < TOLERANCE and worst_rolling < TOLERANCE
    assert [bool(one[1]) for one in found] == greedy and 0 < sum(greedy) < len(greedy)


def difference(mine: float, theirs: float) -> float:
    """Relative: a sum of hundreds has no more digits in float32, in which transformers adds."""
    return abs(mine - theirs) / abs(theirs)


def greedy_pairs(engine: Engine) -> list[tuple[str, str]]:
    """Contexts with the model's own likeliest next token, where that is a whole character."""
    found = []
    for end in range(5, CONTEXT, 7):
        context = TEXT[:end]
        ids = engine.tokenizer.encode(context)
        text = engine.tokenizer.decode([int(engine.model(torch.tensor([ids]))[0, -1].argmax())])
        last = engine.tokenizer.encode(context + text)
        if text.strip() and "\ufffd" not in text and len(last) == len(ids) + 1:
            found.append((context, text))
    return found[:3]
