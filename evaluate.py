"""How good is a model, and is its text its own? Figures on whole held-out texts and on what the model writes.

    python evaluate.py --model runs/novels/best --data data/novels
    python evaluate.py --model runs/novels/best --input unseen_book.txt --out reports/novels
    python evaluate.py --model runs/a/best --compare runs/b/best --data data/novels --json > a_and_b.json

Every token of a text is scored once, by a window that moves on by --stride: after the first window each token has at
least context - stride tokens before it. The same command gives the same figures.
"""

from __future__ import annotations

import contextlib
import functools
import json as jsonlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from checkpoint import fetch_model, find_model
from cli import parse_flags, run_main
from config import ROOT, ConfigError, FrozenSettings, GenerationParams
from corpus.documents import DocumentError, ReadOptions, SourceFile
from corpus.finder import inspect, search
from corpus.styles import as_text
from corpus.workers import Progress
from storage.catalogue import author_of

if TYPE_CHECKING:
    from evaluation.yardstick import Counted
    from tokenizer import Tokenizer
    from training.ngram import NgramModel

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", 'Field name "json"')  # pydantic's own method of that name is long deprecated

    class EvaluateFlags(FrozenSettings):
        """Evaluate a model, or two side by side, on held-out texts and on what it writes."""

        model: str = ""
        """Model folder, run folder, or a GPT-2 on the Hugging Face hub; default: as for generate.py."""
        compare: str = ""
        """A second model, evaluated on the same texts."""
        data: Path | None = None
        """Prepared data whose validation split is scored; default without --input: what the run was trained on."""
        input: tuple[str, ...] = ()
        """Texts to score instead: files, folders, globs (.txt, .jsonl and .parquet with a field `text`)."""
        stride: int = Field(0, ge=0)
        """Tokens by which the window moves; default 0: half the context. Smaller is slower, with more context a token."""
        limit_tokens: int = Field(0, ge=0)
        """Score only so many tokens from the beginning of each text; default 0: all."""
        samples: int = Field(2, ge=0, le=128)
        """Texts written for each fixed prompt; 0: none, and nothing about generated text."""
        max_tokens: int = Field(160, ge=1, le=100_000)
        """Tokens of a written text at most."""
        temperature: float = Field(1.0, ge=0.0, le=2.0)
        """Temperature at which the texts are written."""
        top_p: float = Field(0.95, gt=0.0, le=1.0)
        """Top-p at which the texts are written."""
        seed: int = Field(0, ge=0, lt=2**63)
        """Seed with which the texts are written."""
        index: Path | None = None
        """Prepared data whose originality index is used for the written texts; default: that of --data, if built."""
        min_tokens: int = Field(0, ge=0, le=100_000)
        """Length from which a passage counts as copied; default 0: 12 tokens, 50 for one id a character."""
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


def read_files(inputs: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(name, author, text) of each document in files, cleaned as `prepare_data.py` cleans it.

    Raises ConfigError for a file that cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:  # for what is in archives
        for path, name in search(inputs, Path(folder)).files:
            file = inspect(path, name, ReadOptions())
            if isinstance(file, str):
                raise ConfigError([f"--input {file}"])
            authors = _authors(file)
            for number, text in _whole(file.chunks(0), ReadOptions()):
                if text.strip():
                    own = f"{name}, row {number + 1}" if file.has_rows else name
                    yield own, (authors[number] if authors else "") or author_of(own, text), text


def _authors(file: SourceFile) -> list[str]:
    """What `file` itself tells of each document's author, empty where it does not; an empty list where it has no such field."""
    try:
        return [as_text(value) for value in file.style_values("author") or ()]
    except DocumentError:
        return []


def _whole(chunks: Iterator[Any], options: Any) -> Iterator[tuple[int, str]]:
    """Number and text of each document, its pieces joined."""
    parts: list[str] = []
    for chunk in chunks:
        for piece in chunk.read(options):
            parts.append(piece.text)
            if piece.last:
                yield piece.document, "".join(parts)
                parts = []


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes; yields what is called with the bytes of each text."""
    with Progress(title, total) as progress:
        yield progress.add


def counting_in(data: Path | None) -> Callable[[Tokenizer], Counted | None]:
    """Gives, for a model's tokenizer, the probabilities by the n-grams counted in the training split of `data`.

    None where there is no such data, or where it has other ids than the tokenizer: the two could not be compared.
    """
    from storage.shards import MANIFEST

    @functools.cache
    def counted() -> tuple[str, NgramModel]:
        from dataset import TokenData
        from training.ngram import NgramModel

        opened = TokenData.open(data or Path())
        identity = opened.manifest.tokenizer
        return identity.fingerprint, NgramModel.counted(opened.train, identity.vocab_size)

    def find(tokenizer: Tokenizer) -> Counted | None:
        if data is None or not (data / MANIFEST).is_file():
            return None
        fingerprint, model = counted()
        return model.probabilities if fingerprint == tokenizer.fingerprint else None

    return find


def evaluate(flags: EvaluateFlags) -> dict[str, Any]:
    """The whole report: settings, texts, and a part for each model. Raises ConfigError for flags that cannot work."""
    # Imported here and not at the top: torch takes seconds, for which --help and errors need not wait.
    from evaluation.held_out import HeldOutTexts, file_texts, prepared_texts
    from evaluation.model_report import evaluate_model
    from evaluation.originality import FOLDER, Index, data_of

    # 1. The models.
    folders = [fetch_model(flags.model) if flags.model else find_model(None, ROOT)]
    if flags.compare:
        folders.append(fetch_model(flags.compare))

    # 2. The texts: those of the flags, otherwise the data of the first model's run.
    if flags.data and flags.input:
        raise ConfigError(["--data and --input exclude each other: choose one"])
    data = flags.data or (None if flags.input else data_of(folders[0]))
    if data:
        texts = HeldOutTexts(f"validation split of {data}", lambda: prepared_texts(data))
    elif flags.input:
        texts = HeldOutTexts(", ".join(flags.input), lambda: file_texts(read_files(flags.input)))
    else:
        raise ConfigError(
            [f"nothing to score: give --data FOLDER or --input FILE… ({folders[0]} does not name its data)"]
        )

    # 3. What is written, and the index of the training text that it is checked against.
    params, index = None, None
    if flags.samples:
        values = {name: getattr(flags, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
        params = GenerationParams(n=flags.samples, top_k=0, repetition_penalty=1.0, **values)
        if flags.index is not None:
            index = Index.open(flags.index)
        elif data is not None and (data / FOLDER).is_dir():
            index = Index.open(data)
        else:
            print("no originality index: copied passages are not looked for (prepare_data.py --index)", file=sys.stderr)

    # 4. A report for each model, beside what counting the same training text alone would reach.
    counted = counting_in(data or data_of(folders[0]))
    parts = [
        evaluate_model(
            folder,
            texts,
            device=flags.device,
            dtype=flags.dtype,
            stride=flags.stride,
            limit_tokens=flags.limit_tokens,
            style_tokens=flags.style_tokens,
            params=params,
            index=index,
            min_tokens=flags.min_tokens,
            counted=counted,
            progress=progress_bar,
        )
        for folder in folders
    ]
    settings = flags.model_dump(mode="json", exclude={"json", "out", "device"})
    return {"format": 1, "texts": texts.name, "settings": settings, "models": parts}


def run(argv: Sequence[str] | None) -> int:
    """The command without its error handling: flags, report, output."""
    flags = parse_flags(EvaluateFlags, argv, description=__doc__)
    if flags.out is not None and flags.out.exists() and not flags.out.is_dir():
        raise ConfigError([f"--out {flags.out} is a file: give a folder"])
    report = evaluate(flags)
    from evaluation.report import markdown, plot  # after the work, since it loads matplotlib

    text = jsonlib.dumps(report, ensure_ascii=False, indent=1) + "\n"
    if flags.out is not None:
        flags.out.mkdir(parents=True, exist_ok=True)
        (flags.out / "report.json").write_text(text, encoding="utf-8")
        (flags.out / "report.md").write_text(markdown(report), encoding="utf-8")
        plot(report, flags.out / "report.png")
        print(f"{flags.out}: report.json, report.md, report.png", file=sys.stderr)
    print(text if flags.json else markdown(report), end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; see the module's first lines. Returns the exit code."""
    return run_main(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
