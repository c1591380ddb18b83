"""What several test files share: where things are, tiny texts, flags of a tiny run."""

from __future__ import annotations

import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def nonsense(characters: int, seed: int = 0) -> str:
    """Deterministic text of that length that looks like prose to a model: words from a small stock, in sentences."""
    words = [
        "the",
        "old",
        "house",
        "stood",
        "upon",
        "a",
        "hill",
        "and",
        "its",
        "door",
        "was",
        "shut",
        "when",
        "she",
        "came",
        "with",
        "lamp",
        "letter",
        "of",
        "his",
        "in",
        "rain",
    ]
    rng = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += " ".join(rng.choice(words) for _ in range(rng.randint(3, 9))).capitalize() + rng.choice(
            [". ", "! ", ".\n"]
        )
    return text[:characters]


def prepare_text(folder: Path, text: str, *flags: str) -> Path:
    """Prepare one text, by characters unless `flags` say otherwise; returns the prepared folder."""
    import prepare_data

    (folder / "text.txt").write_text(text, encoding="utf-8")
    words = ["--input", str(folder / "text.txt"), "--out", str(folder / "data"), "--workers", "1"]
    assert prepare_data.main(words + (list(flags) or ["--tokenizer", "char"])) == 0
    return folder / "data"


TINY_FLAGS = [
    "--model.n-layer",
    "2",
    "--model.n-head",
    "2",
    "--model.n-embd",
    "16",
    "--model.block-size",
    "16",
    "--model.dropout",
    "0.1",
    "--model.vocab-size",
    "0",
    "--train.batch-size",
    "4",
    "--train.warmup-steps",
    "2",
    "--train.log-interval",
    "1",
    "--train.eval-interval",
    "5",
    "--train.sample-interval",
    "0",
    "--train.checkpoint-minutes",
    "0",
    "--train.device",
    "cpu",
    "--train.no-tensorboard",
    "--train.compile",
    "off",
    "--train.precision",
    "fp32",  # `auto` is bf16 on some processors
]
