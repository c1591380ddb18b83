"""Write with a model at the terminal.

    python generate.py --prompt "The old house stood"                 # the newest model
    python generate.py --model runs/novels/best --prompt "It was" --n 3 --seed 7
    python generate.py --prompt "It was" --style dickens:0.7,austen:0.3       # a model trained with styles
    echo "My dear Sister," | python generate.py --max-tokens 400 > letter.txt
    python generate.py --interactive

Text goes to standard output, everything else to standard error. One seed, one text: see `inference/decoder.py`.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cli import flag_value, parse_flags, run_main
from config import ROOT, ConfigError, GenerationParams, build

if TYPE_CHECKING:
    from inference.decoder import Event, Result, Writer
    from model import GPT
    from tokenizer import Tokenizer

NARROWEST = 32  # characters of a column below which samples go below each other
PARAMS = tuple(GenerationParams.model_fields)
HELP = """\
any text           goes to the end of the story, and the model writes on (\\n is a new line)
/continue          write on                       /retry   write the last piece anew
/undo              take the last piece back       /new     begin another story
/set NAME VALUE    e.g. /set temperature 0.9      /show    the settings
/save FILE         save the story                 /stats   speed of the last piece
/help              this list                      /quit    end (Ctrl-C stops a piece, then ends)"""


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", 'Field name "json"')  # pydantic's own method of that name is long deprecated

    class GenerateArgs(GenerationParams):
        """Write with a model. The prompt comes from --prompt or from a pipe; the text goes to standard output."""

        model: str = ""
        """Model folder, run folder, or a GPT-2 on the Hugging Face hub; none: the newest in runs/ or models/."""
        prompt: str | None = None
        """What the text begins with; none: what is piped in, else nothing."""
        dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
        """Number format of the weights; auto: what this processor reads fastest without visible loss (see quantize.py)."""
        device: str = "auto"
        """auto, cpu, cuda, cuda:N or mps."""
        echo: bool = True
        """Print the prompt before the text (plain text only)."""
        json: bool = False  # type: ignore[assignment]
        """Print one JSON object instead of text."""
        stream: bool = True
        """Print words as they are written."""
        interactive: bool = False
        """Write a story together, piece by piece."""
        creative: bool = False
        """Write on from a gallery of openings, one of each kind (--seed chooses which)."""


@dataclass
class Pace:
    """Time to the first token and tokens a second after it."""

    begun: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def watch(self, events: Iterator[Event]) -> Iterator[Event]:
        """Pass events on, counting them."""
        for event in events:
            if event.token_id is not None:
                self.last = time.perf_counter()
                self.first = self.first or self.last
                self.tokens += 1
            yield event

    @property
    def first_s(self) -> float | None:
        return None if self.first is None else self.first - self.begun

    @property
    def tokens_per_s(self) -> float | None:
        """None where there is too little to measure."""
        spent = self.last - (self.first or self.last)
        return (self.tokens - 1) / spent if spent > 0 else None

    def __str__(self) -> str:
        said = f"{self.tokens} tokens"
        if self.first_s is not None:
            said += f", the first after {self.first_s:.2f} s"
        return said if self.tokens_per_s is None else f"{said}, then {self.tokens_per_s:.1f} tokens/s"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    print(text, end="", flush=True)


@dataclass
class Pen:
    """A loaded model that writes for the terminal."""

    model: GPT
    tokenizer: Tokenizer
    writer: Writer | None = None

    def write(self, prompt: str, params: GenerationParams, pace: Pace, *, live: bool) -> tuple[list[Result], bool]:
        """(results, completed): all samples; the first is shown as it is written if `live`. Ctrl-C keeps what there is."""
        from inference.writing import blank_results, stream

        results = blank_results(self.model, self.tokenizer, prompt, params)
        if results[0].truncated:
            say(
                f"the prompt is longer than this model's context of {self.model.config.block_size} tokens: "
                f"only {results[0].prompt_tokens} of them are read, the end"
                + (f" and the {params.keep} first" if params.keep else "")
            )
        events = stream(self.model, self.tokenizer, prompt, params, writer=self.writer)
        with contextlib.closing(events):
            try:
                for event in pace.watch(events):
                    results[event.index].add(event)
                    if live and event.index == 0:
                        show(event.text)
            except KeyboardInterrupt:
                return results, False
        return results, True


def columns(texts: Sequence[str], width: int) -> str:
    """Texts side by side, each wrapped to its share of `width`; below each other where that would be too narrow."""
    share = (width - 3 * (len(texts) - 1)) // len(texts)
    if share < NARROWEST:
        return "\n\n".join(f"--- {number} of {len(texts)} ---\n{text}" for number, text in enumerate(texts, 1))
    wrapped = [
        [row for line in text.split("\n") for row in textwrap.wrap(line, share, drop_whitespace=False) or [""]]
        for text in texts
    ]
    rows = max(map(len, wrapped))
    padded = [[row.strip().ljust(share) for row in part + [""] * (rows - len(part))] for part in wrapped]
    return "\n".join(" | ".join(row).rstrip() for row in zip(*padded, strict=True))


def print_samples(texts: Sequence[str]) -> None:
    """Several samples: side by side on a terminal, else as sections."""
    print(columns(texts, shutil.get_terminal_size().columns if sys.stdout.isatty() else 0), flush=True)


def write_once(pen: Pen, args: GenerateArgs, prompt: str, params: GenerationParams, folder: Path) -> int:
    """One prompt: text, samples or JSON. 130 when it was interrupted."""
    pace = Pace()
    live = args.stream and params.n == 1 and not args.json
    opening = prompt if args.echo else ""
    if live:
        show(opening)
    results, completed = pen.write(prompt, params, pace, live=live)
    if args.json:
        print(jsonlib.dumps(report(results, prompt, params, folder, pace), ensure_ascii=False))
    elif live:
        print(flush=True)
    elif params.n == 1:
        print(opening + results[0].text, flush=True)
    else:
        print_samples([opening + result.text for result in results])
    say(f"{'' if completed else 'stopped: '}{pace}; --seed {params.seed}")
    return 0 if completed else 130


def report(results: list[Result], prompt: str, params: GenerationParams, folder: Path, pace: Pace) -> dict[str, Any]:
    """What --json prints."""
    samples = [
        {"index": index, "text": result.text, "finish_reason": result.finish_reason, "tokens": result.tokens}
        for index, result in enumerate(results)
    ]
    return {
        "model": str(folder),
        "prompt": prompt,
        "seed": params.seed,
        "params": params.model_dump(mode="json"),
        "prompt_tokens": results[0].prompt_tokens,
        "truncated": results[0].truncated,
        "samples": samples,
        "first_token_s": pace.first_s,
        "tokens_per_s": pace.tokens_per_s,
    }


def write_gallery(pen: Pen, params: GenerationParams) -> int:
    """One text for each kind of opening. 130 when interrupted."""
    from inference.prompts import GALLERY

    for number, (kind, openings) in enumerate(GALLERY.items()):
        opening = openings[((params.seed or 0) + number) % len(openings)]
        try:
            pen.tokenizer.encode(opening)
        except ValueError as error:  # a small alphabet may lack a character
            say(f"{kind} is left out: {error}")
            continue
        show(f"{chr(10) if number else ''}--- {kind} ---\n{opening if params.n == 1 else ''}")
        results, completed = pen.write(opening, params, Pace(), live=params.n == 1)
        if params.n == 1:
            print(flush=True)
        else:
            print_samples([opening + result.text for result in results])
        if not completed:
            return 130
    say(f"--seed {params.seed}")
    return 0


class Session:
    """A story written together: pieces of text, each by the writer or by the model."""

    def __init__(self, pen: Pen, params: GenerationParams):
        self.pen, self.params = pen, params
        self.pieces: list[str] = []
        self.ours: list[bool] = []  # which pieces the model wrote
        self.pace: Pace | None = None
        self.seed: int | None = None

    @property
    def story(self) -> str:
        return "".join(self.pieces)

    def line(self, line: str) -> bool:
        """Do what one line says; False to end."""
        command, _, rest = line.strip().partition(" ")
        if not command.startswith("/"):
            if line.strip():
                self.add(line)
            return True
        acts = {
            "/help": lambda: say(HELP),
            "/continue": self.write_on,
            "/retry": self.retry,
            "/undo": self.undo,
            "/new": self.new,
            "/set": lambda: self.set(rest),
            "/show": lambda: say("\n".join(f"{name} = {value}" for name, value in self.params.model_dump().items())),
            "/save": lambda: self.save(rest.strip()),
            "/stats": lambda: say(f"{self.pace}; --seed {self.seed}" if self.pace else "nothing is written yet"),
        }
        if command in ("/quit", "/exit"):
            return False
        if command in acts:
            acts[command]()
        else:
            say(f"{command}: no such command; /help lists them")
        return True

    def add(self, text: str) -> None:
        """The writer's words, then the model's."""
        text = text.replace("\\n", "\n")
        gap = "" if not self.pieces or self.story[-1:].isspace() or text[:1].isspace() else " "
        self.pen.tokenizer.encode(text)  # a small alphabet may lack a character: nothing changes then
        self.pieces.append(gap + text)
        self.ours.append(False)
        self.write_on()

    def write_on(self) -> None:
        """The next piece, by the model. Ctrl-C ends it and keeps what was written."""
        from inference.writing import seeded

        params = seeded(self.params.model_copy(update={"n": 1}))
        pace = Pace()
        results, _ = self.pen.write(self.story, params, pace, live=True)
        print(flush=True)
        self.pieces.append(results[0].text)
        self.ours.append(True)
        self.pace, self.seed = pace, params.seed

    def retry(self) -> None:
        """The model's last piece anew, with another seed."""
        if not self.ours or not self.ours[-1]:
            say("nothing to write anew")
            return
        self.pieces.pop()
        self.ours.pop()
        if self.params.seed is not None:
            self.params = self.params.model_copy(update={"seed": (self.params.seed + 1) % 2**63})
        self.write_on()

    def undo(self) -> None:
        """Take back the model's last piece, and the words before it that asked for it."""
        if not self.pieces:
            say("nothing to take back")
            return
        for mine in (True, False):
            if self.ours and self.ours[-1] is mine:
                self.pieces.pop()
                self.ours.pop()
        say(f"… {self.story[-200:]}" if self.story else "the story is empty")

    def new(self) -> None:
        """Forget the story."""
        self.pieces, self.ours = [], []

    def set(self, words: str) -> None:
        """Change one setting; a fault is named and changes nothing."""
        name, _, value = words.strip().partition(" ")
        name = name.lstrip("-").replace("-", "_")
        if name not in PARAMS or not value:
            say(f"/set NAME VALUE, where NAME is one of {', '.join(PARAMS)}")
            return
        given: Any = value.strip()
        if given == "none":
            given = () if name == "stop" else None
        elif name == "stop":
            given = (given.replace("\\n", "\n"),)
        try:
            self.params = build(GenerationParams, self.params.model_dump() | {name: given})
        except ConfigError as error:
            say("\n".join(error.faults))

    def save(self, name: str) -> None:
        """Write the story into a new file."""
        if not name:
            say("/save FILE")
            return
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(self.story + "\n")
            say(f"{len(self.story):,} characters saved in {name}")
        except FileExistsError:
            say(f"{name} exists already: choose another name")
        except OSError as error:
            say(f"{name}: {error.strerror}")

    def run(self) -> int:
        """Read lines until the end."""
        terminal = sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (arrow keys and history)
            say(HELP)
        while True:
            try:
                if not self.line(input("> " if terminal else "")):
                    return 0
            except (EOFError, KeyboardInterrupt):
                say("")
                return 0
            except (RuntimeError, ValueError) as error:
                say(f"error: {error}")


def read_prompt(args: GenerateArgs) -> str:
    """--prompt, or what is piped in without its last line break."""
    if args.prompt is not None or sys.stdin is None or sys.stdin.isatty():
        return args.prompt or ""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        fault = f"the piped prompt is not UTF-8 (byte {error.start}): convert it, or give --prompt"
        raise ConfigError([fault]) from None


def write(argv: list[str]) -> int:
    """Everything behind `main`: 0, or 130 after Ctrl-C."""
    from checkpoint import fetch_model, find_model
    from storage.gpt2_format import folder_defaults

    wanted = flag_value(argv, "model")
    folder = fetch_model(wanted) if wanted else find_model(None, ROOT)
    args = parse_flags(GenerateArgs, argv, defaults=folder_defaults(folder))
    if args.interactive and args.creative:
        raise ConfigError(["--interactive and --creative exclude each other: choose one"])
    params = GenerationParams(**{name: getattr(args, name) for name in PARAMS})
    prompt = "" if args.interactive or args.creative else read_prompt(args)
    from inference.quantize import load_for_writing
    from inference.writing import seeded
    from tokenizer import StyleError

    model, tokenizer, remark = load_for_writing(folder, device=args.device, dtype=args.dtype)
    if remark:
        say(remark)
    if not params.style and tokenizer.styles and sys.stderr.isatty():
        say(f"--style chooses the manner: {', '.join(tokenizer.styles)}")
    try:
        tokenizer.blend(params.style)
    except StyleError as error:
        raise ConfigError([f"--{error}"]) from None
    pen = Pen(model, tokenizer)
    if args.interactive:
        from inference.decoder import Writer

        pen.writer = Writer(model, 1)
        session = Session(pen, params)
        if args.prompt:
            show(args.prompt if args.echo else "")
            session.add(args.prompt)
        return session.run()
    params = seeded(params)
    if args.creative:
        return write_gallery(pen, params)
    return write_once(pen, args, prompt, params, folder)


def write_while_read(argv: list[str]) -> int:
    """`write`, ended without a complaint when whoever reads the text has had enough (`| head`)."""
    try:
        return write(argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 when something failed, 2 for bad flags, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--help" in words or "-h" in words:
        parse_flags(GenerateArgs, words)
    return run_main(lambda: write_while_read(words))


if __name__ == "__main__":
    sys.exit(main())
