"""How good is a model, and is it its own? Measures over whole held-out texts and over what the model writes.

    python evaluate.py --model runs/novels/best --data data/novels
    python evaluate.py --model runs/novels/best --input unseen_book.txt --out reports/novels
    python evaluate.py --model runs/a/best --compare runs/b/best --data data/novels --json > a_and_b.json

Every token of a text is scored once, by a window that moves on by --stride: after the first window each token has at
least context - stride tokens before it. The same command gives the same figures.
"""

from __future__ import annotations

import json as jsonlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from cli import parse_flags, run_main
from config import ROOT, ConfigError, GenerationParams, Strict, style_name
from corpus.workers import Progress
from evaluation.metrics import Tally, bleu, distinct, repetition, self_bleu
from evaluation.style_report import dial
from storage.catalogue import Catalogue, author_of

if TYPE_CHECKING:
    from evaluation.originality import Index
    from model import GPT
    from tokenizer import Tokenizer

LOGITS = 1 << 26  # numbers of logits held at once
OPENING, GOING_ON = 400, 600  # characters of a held-out text to write on from, and to compare with
PLACES = 8  # held-out texts that are written on from
SOURCES = 20  # copied runs told of in a report


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", 'Field name "json"')  # pydantic's own method of that name is long deprecated

    class EvaluateFlags(Strict):
        """Measure a model, or two side by side, on held-out texts and on what it writes."""

        model: str = ""
        """Model folder, run folder, or a GPT-2 on the Hugging Face hub; none: the newest in runs/ or models/."""
        compare: str = ""
        """A second model, measured on the same texts."""
        data: Path | None = None
        """Prepared data whose validation split is scored; none and no --input: what the run was trained on."""
        input: tuple[str, ...] = ()
        """Texts to score instead: files, folders, globs (.txt, .jsonl and .parquet with a field `text`)."""
        stride: int = Field(0, ge=0)
        """Tokens the window moves on by; 0: half the context. Smaller is slower and gives each token more before it."""
        limit_tokens: int = Field(0, ge=0)
        """Score only so many tokens from the beginning of each text; 0: all."""
        samples: int = Field(2, ge=0, le=128)
        """Texts written for each fixed prompt; 0: none, and nothing about generated text."""
        max_tokens: int = Field(160, ge=1, le=100_000)
        """Tokens of a written text at most."""
        temperature: float = Field(1.0, ge=0.0, le=2.0)
        """Of the written texts."""
        top_p: float = Field(0.95, gt=0.0, le=1.0)
        """Of the written texts."""
        seed: int = Field(0, ge=0, lt=2**63)
        """Of the written texts."""
        index: Path | None = None
        """Prepared data whose originality index the written texts are held against; none: that of --data, if built."""
        min_tokens: int = Field(0, ge=0, le=100_000)
        """Length from which a passage counts as copied; 0: 12 tokens, 50 for one id a character."""
        device: str = "auto"
        """auto, cpu, cuda, cuda:N or mps."""
        style_tokens: int = Field(4096, ge=0)
        """Of a model with styles: tokens of each text scored under every style; 0: no table of styles."""
        dtype: Literal["float32", "bfloat16"] = "float32"
        """Number format of the weights."""
        json: bool = False  # type: ignore[assignment]
        """Print JSON instead of Markdown."""
        out: Path | None = None
        """Folder for report.json, report.md and report.png."""


@dataclass(frozen=True)
class Held:
    """A held-out text."""

    name: str
    author: str
    text: str
    style: str = ""
    """What prepare_data.py --control has marked it with."""


@dataclass(frozen=True)
class Texts:
    """The held-out texts of a report, read anew for each model."""

    data: Path | None
    input: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"validation split of {self.data}" if self.data else ", ".join(self.input)

    def __iter__(self) -> Iterator[Held]:
        return prepared_texts(self.data) if self.data else file_texts(self.input)


def prepared_texts(folder: Path) -> Iterator[Held]:
    """The validation documents of prepared data, one at a time."""
    from dataset import TokenData
    from tokenizer import load_tokenizer

    stream, tokenizer = TokenData.open(folder).val, load_tokenizer(folder)
    begins = [0]
    for first in range(0, len(stream), 1 << 20):
        part = stream.read(first, min(first + (1 << 20), len(stream)))
        if tokenizer.eot is not None:
            begins += (np.flatnonzero(part == tokenizer.eot) + first + 1).tolist()
    if begins[-1] < len(stream):
        begins.append(len(stream))
    names = {number: style for style, number in tokenizer.styles.items()}
    catalogue = Catalogue.load(folder)
    known = catalogue is not None and catalogue.count("val") == len(begins) - 1
    for number, (start, stop) in enumerate(pairwise(begins)):
        ids = stream.read(start, stop).tolist()
        text = tokenizer.decode(ids)
        name = catalogue.name("val", number) if catalogue is not None and known else f"document {number + 1}"
        yield Held(name, author_of(name, text), text, names.get(ids[0], ""))


def file_texts(inputs: Sequence[str]) -> Iterator[Held]:
    """The documents of files, cleaned as `prepare_data.py` cleans them. ConfigError for what cannot be read."""
    from corpus.documents import Options
    from corpus.finder import find, inspect

    for path, name in find(inputs):
        file = inspect(path, name, Options())
        if isinstance(file, str):
            raise ConfigError([f"--input {file}"])
        authors = [] if file.has_rows else [str(author) for author in file.style_values("author") or ()]
        for number, text in _whole(file.chunks(0), Options()):
            if text.strip():
                own = f"{name}, row {number + 1}" if file.has_rows else name
                author = authors[number] if authors else author_of(own, text)
                yield Held(own, author, text, style_name(author))


def _whole(chunks: Iterator[Any], options: Any) -> Iterator[tuple[int, str]]:
    """Number and text of each document, its pieces joined."""
    parts: list[str] = []
    for chunk in chunks:
        for piece in chunk.read(options):
            parts.append(piece.text)
            if piece.last:
                yield piece.document, "".join(parts)
                parts = []


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) of each window over `length` tokens; inputs are start..stop-1, targets one further.

    Targets from `first` (counted in the window) on are scored; over all windows that is each token but the first once.
    """
    start, scored = 0, 1
    while scored < length:
        stop = min(start + context, length - 1)
        yield start, stop, scored - start - 1
        scored, start = stop + 1, start + stride


def score(model: GPT, ids: np.ndarray, stride: int, control: int = -1) -> Tally:
    """Tokens 1.. of `ids` scored by a window that moves on by `stride`; counts tokens, not bytes or words.

    Each token has the context that fits: `start`..itself in the first window, at least block_size - stride later.
    control: an id to stand in the first place of every window; -1: none.
    """
    import torch

    device, tally = model.wte.weight.device, Tally()
    rows = max(1, LOGITS // (model.config.block_size * model.config.tokens))
    waiting: list[tuple[int, int, int]] = []

    def run() -> None:
        batch = np.stack([ids[start : stop + 1] for start, stop, _ in waiting]).astype(np.int64)
        if control >= 0:
            batch[:, 0] = control
        tokens = torch.from_numpy(batch).to(device)
        logits = model(tokens[:, :-1])  # [rows, T, N]
        for row, (_, _, first) in enumerate(waiting):
            for at in range(first, logits.size(1), 512):
                part, target = logits[row, at : at + 512], tokens[row, at + 1 : at + 513]
                logp = part.log_softmax(dim=-1)
                best = logp.topk(min(5, logp.size(-1)), dim=-1)
                hit = best.indices == target[:, None]
                found = (-logp.gather(1, target[:, None])[:, 0], best.values[:, 0].exp(), hit[:, 0], hit.any(dim=1))
                nats, confidence, right, five = (value.cpu().numpy() for value in found)
                tally.add(nats.astype(np.float64), confidence.astype(np.float64), right, five)
        waiting.clear()

    with torch.inference_mode():
        for window in windows(len(ids), model.config.block_size, stride):
            if waiting and (len(waiting) == rows or window[1] - window[0] != waiting[0][1] - waiting[0][0]):
                run()
            waiting.append(window)
        if waiting:
            run()
    return tally


def score_text(model: GPT, tokenizer: Tokenizer, text: str, stride: int, limit: int = 0) -> Tally:
    """All of a text scored, the first token after end-of-text; without such an id the first token is only read."""
    ids = tokenizer.encode_array(text).astype(np.int64)
    if limit and len(ids) > limit:
        ids = ids[:limit]
        text = tokenizer.decode(ids.tolist())
    skipped = 0
    if tokenizer.eot is not None:
        ids = np.concatenate(([tokenizer.eot], ids))
    elif len(ids):
        skipped = len(tokenizer.piece(int(ids[0])))
    tally = score(model, ids, stride)
    tally.documents, tally.bytes, tally.words = 1, len(text.encode()) - skipped, len(text.split())
    return tally


def written(
    model: GPT, tokenizer: Tokenizer, flags: EvaluateFlags, texts: Texts, index: Index | None
) -> dict[str, Any]:
    """What can be measured on texts the model writes: on fixed prompts, and on from held-out texts."""
    from inference.prompts import GALLERY
    from inference.writing import generate

    values = {name: getattr(flags, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    params = GenerationParams(n=flags.samples, top_k=0, repetition_penalty=1.0, **values)
    prompts, own = [], []
    for openings in GALLERY.values():
        try:
            results = generate(model, tokenizer, openings[0], params)
        except ValueError:  # a small alphabet may lack a character
            continue
        prompts += [openings[0]] * len(results)
        own += [result.text for result in results]
    gone_on, real = continuations(model, tokenizer, params.model_copy(update={"n": 1}), texts)
    report: dict[str, Any] = {
        "texts": len(own),
        "params": params.model_dump(mode="json"),
        "distinct_1": distinct(own, 1),
        "distinct_2": distinct(own, 2),
        "distinct_3": distinct(own, 3),
        "repetition_4": sum(map(repetition, own)) / max(len(own), 1),
        "self_bleu": self_bleu(own),
        "bleu": bleu(gone_on, real),
        "samples": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, own, strict=True)],
    }
    if index is not None:
        report["originality"] = originality(index, own + gone_on, flags.min_tokens)
    return report


def continuations(
    model: GPT, tokenizer: Tokenizer, params: GenerationParams, texts: Texts
) -> tuple[list[str], list[str]]:
    """What the model writes on from the middle of held-out texts, and what really follows, cut to the same length."""
    from inference.writing import generate

    ours, real = [], []
    for held in texts:
        at = len(held.text) // 2 if len(held.text) >= 2 * OPENING else len(held.text) // 3
        begin = held.text[max(0, at - OPENING) : at]
        begin, _, rest = begin.rpartition(" ")
        follows = (" " + rest + held.text[at : at + GOING_ON]) if begin else ""
        if not follows.strip():
            continue
        try:
            text = generate(model, tokenizer, begin, params)[0].text
        except ValueError:
            continue
        ours.append(text[: len(follows)])
        real.append(follows[: max(len(text), 1)])
        if len(ours) == PLACES:
            break
    return ours, real


def originality(index: Index, texts: Sequence[str], min_tokens: int) -> dict[str, Any]:
    """What of all `texts` together stands in the training text, and the longest runs."""
    reports = []
    for text in texts:
        try:
            reports.append(index.check(text, min_tokens))
        except ValueError as error:  # a character that the training text does not have
            raise ConfigError(
                [f"--index {index.folder}: its tokenizer cannot read what the model wrote: {error}"]
            ) from None
    tokens, copied = sum(report.tokens for report in reports), sum(report.copied_tokens for report in reports)
    runs = [asdict(run) | {"text_number": number} for number, report in enumerate(reports) for run in report.runs]
    return {
        "index": str(index.folder),
        "tokens": tokens,
        "copied_tokens": copied,
        "share": copied / max(tokens, 1),
        "longest": max((report.longest for report in reports), default=0),
        "min_tokens": min_tokens or index.min_tokens,
        "runs": sorted(runs, key=lambda run: -run["tokens"])[:SOURCES],
    }


def measure(folder: Path, flags: EvaluateFlags, texts: Texts, index: Index | None) -> dict[str, Any]:
    """One model's part of the report."""
    import torch

    from checkpoint import load_model
    from devices import pick_device

    dtype = getattr(torch, flags.dtype)
    model, tokenizer = load_model(folder, device=pick_device(flags.device), dtype=dtype)
    context = model.config.block_size
    stride = flags.stride or max(1, context // 2)
    if stride > context:
        raise ConfigError(
            [f"--stride {stride} is more than the context of {folder}, {context}: tokens would be left out"]
        )
    total, authors, rows = Tally(), dict[str, Tally](), []
    size = sum(len(held.text.encode()) for held in texts)
    with Progress(f"scoring {folder}", size) as progress:
        for held in texts:
            try:
                tally = score_text(model, tokenizer, held.text, stride, flags.limit_tokens)
            except ValueError as error:
                raise ConfigError([f"{held.name}: the tokenizer of {folder} cannot read it: {error}"]) from None
            progress.add(len(held.text.encode()))
            if not tally.tokens:
                continue
            rows.append({"name": held.name, "author": held.author} | tally.figures())
            authors.setdefault(held.author, Tally())
            authors[held.author] += tally
            total += tally
    if not total.tokens:
        raise ConfigError([f"{texts.name}: no text to score"])
    report = {
        "model": str(folder),
        "parameters": model.num_parameters(),
        "context": context,
        "stride": stride,
        "tokenizer": {"kind": tokenizer.kind, "ids": tokenizer.vocab_size},
        "total": total.figures(),
        "authors": [{"author": name} | tally.figures() for name, tally in sorted(authors.items())],
        "documents": rows,
        "calibration": total.calibration(),
    }
    if tokenizer.styles and flags.style_tokens:
        with Progress(f"styles of {folder}", size) as progress:
            report["dial"] = dial(
                lambda ids, control: score(model, ids, stride, control),
                tokenizer,
                texts,
                flags.style_tokens,
                progress.add,
            )
    if flags.samples:
        report["written"] = written(model, tokenizer, flags, texts, index)
    return report


def chosen_texts(flags: EvaluateFlags, folder: Path) -> Texts:
    """What the flags say to score, else the data of the model's run. ConfigError where nothing is said."""
    from evaluation.originality import data_of

    if flags.data and flags.input:
        raise ConfigError(["--data and --input exclude each other: choose one"])
    if flags.data or flags.input:
        return Texts(flags.data, flags.input)
    if data := data_of(folder):
        return Texts(data, ())
    raise ConfigError([f"nothing to score: give --data FOLDER or --input FILE… ({folder} does not name its data)"])


def evaluate(flags: EvaluateFlags) -> dict[str, Any]:
    """The whole report: settings, texts, and a part for each model. Raises ConfigError for flags that cannot work."""
    from checkpoint import fetch_model, find_model

    folders = [fetch_model(flags.model) if flags.model else find_model(None, ROOT)]
    if flags.compare:
        folders.append(fetch_model(flags.compare))
    texts = chosen_texts(flags, folders[0])
    index = opened_index(flags, texts) if flags.samples else None
    parts = [measure(folder, flags, texts, index) for folder in folders]
    settings = flags.model_dump(mode="json", exclude={"json", "out", "device"})
    return {"format": 1, "texts": texts.name, "settings": settings, "models": parts}


def opened_index(flags: EvaluateFlags, texts: Texts) -> Index | None:
    """The index to hold the written texts against: --index, or what was built beside the data."""
    from evaluation.originality import FOLDER, Index

    if flags.index is not None:
        return Index.open(flags.index)
    if texts.data is not None and (texts.data / FOLDER).is_dir():
        return Index.open(texts.data)
    print("no originality index: copied passages are not looked for (prepare_data.py --index)", file=sys.stderr)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; see the module's first lines. Returns the exit code."""

    def body() -> int:
        flags = parse_flags(EvaluateFlags, argv, description=__doc__)
        if flags.out is not None and flags.out.exists() and not flags.out.is_dir():
            raise ConfigError([f"--out {flags.out} is a file: give a folder"])
        report = evaluate(flags)
        from evaluation.report import markdown, plot

        text = jsonlib.dumps(report, ensure_ascii=False, indent=1) + "\n"
        if flags.out is not None:
            flags.out.mkdir(parents=True, exist_ok=True)
            (flags.out / "report.json").write_text(text, encoding="utf-8")
            (flags.out / "report.md").write_text(markdown(report), encoding="utf-8")
            plot(report, flags.out / "report.png")
            print(f"{flags.out}: report.json, report.md, report.png", file=sys.stderr)
        print(text if flags.json else markdown(report), end="")
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
