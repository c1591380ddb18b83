"""What `generate.py` prints and reads at the terminal: one text, several samples, a gallery, a story written together.

    >>> writer = TerminalWriter(model, tokenizer)
    >>> write_once(writer, "It was", params, folder=folder, echo=True, live=True, as_json=False)
    >>> InteractiveStory(writer, params).run()

Text goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import ConfigError, GenerationParams, build
from inference import writing
from inference.decoder import BatchDecoder, Event, Result
from inference.prompts import GALLERY
from model import GPT
from sampling import sentence_end
from tokenizer import Tokenizer

NARROWEST = 32  # characters of a column; where columns would be narrower, samples go below each other
HELP = """\
any text           goes to the end of the story, and the model continues it (\\n is a new line)
/continue          continue without adding text   /retry   write the last piece again
/undo              take the last piece back       /new     begin another story
/set NAME VALUE    e.g. /set temperature 0.9      /show    the settings
/save FILE         save the story                 /stats   speed of the last piece
/help              this list                      /quit    end (Ctrl-C stops a piece, then ends)"""


def print_status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_text(text: str) -> None:
    print(text, end="", flush=True)


@dataclass
class Timing:
    """Time to the first token and tokens a second after it."""

    begun: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def watch(self, events: Iterator[Event]) -> Iterator[Event]:
        """Yield the events unchanged and count their tokens."""
        for event in events:
            if event.token_id is not None:
                self.last = time.perf_counter()
                self.first = self.first or self.last
                self.tokens += 1
            yield event

    @property
    def first_s(self) -> float | None:
        """Seconds to the first token; None before it."""
        return None if self.first is None else self.first - self.begun

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first; None with too few tokens to measure."""
        spent = self.last - (self.first or self.last)
        return (self.tokens - 1) / spent if spent > 0 else None

    def __str__(self) -> str:
        words = f"{self.tokens} tokens"
        if self.first_s is not None:
            words += f", the first after {self.first_s:.2f} s"
        return words if self.tokens_per_s is None else f"{words}, then {self.tokens_per_s:.1f} tokens/s"


@dataclass
class TerminalWriter:
    """A loaded model that writes for the terminal. decoder: reused for each text, so that its prefix cache is kept."""

    model: GPT
    tokenizer: Tokenizer
    decoder: BatchDecoder | None = None

    def write(
        self, prompt: str, params: GenerationParams, timing: Timing, *, live: bool, trim: bool = False
    ) -> tuple[list[Result], bool]:
        """(results, completed) of all samples. live: print the first as it is written. Ctrl-C keeps what is written.

        trim: without what comes after the last finished sentence; a text without one stays as it is.
        """
        results = writing.empty_results(self.model, self.tokenizer, prompt, params)
        if results[0].truncated:
            print_status(
                f"the prompt is longer than this model's context of {self.model.config.block_size} tokens: "
                f"only {results[0].prompt_tokens} of them are read, the end"
                + (f" and the {params.keep} first" if params.keep else "")
            )
        events = writing.stream(self.model, self.tokenizer, prompt, params, decoder=self.decoder)
        completed, shown = True, 0
        with contextlib.closing(events):
            try:
                for event in timing.watch(events):
                    results[event.index].add(event)
                    if live and event.index == 0:
                        text = results[0].text
                        ready = shown + sentence_end(text[shown:]) if trim else len(text)
                        if not trim or ready < len(text):  # a mark that ends the text so far may be that of 3.5
                            print_text(text[shown:ready])
                            shown = ready
            except KeyboardInterrupt:
                completed = False
        if trim:
            for result in results:
                result.text = result.text[: sentence_end(result.text)] or result.text
        if live:
            print_text(results[0].text[shown:])
        return results, completed


def columns(texts: Sequence[str], width: int) -> str:
    """Texts side by side in `width` characters, each wrapped to its column; below each other where that is too narrow."""
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < NARROWEST:
        return "\n\n".join(f"--- {number} of {len(texts)} ---\n{text}" for number, text in enumerate(texts, 1))
    wrapped = [
        [row for line in text.split("\n") for row in textwrap.wrap(line, column, drop_whitespace=False) or [""]]
        for text in texts
    ]
    rows = max(map(len, wrapped))
    padded = [[row.strip().ljust(column) for row in lines + [""] * (rows - len(lines))] for lines in wrapped]
    return "\n".join(" | ".join(row).rstrip() for row in zip(*padded, strict=True))


def print_samples(texts: Sequence[str]) -> None:
    """Several samples: side by side on a terminal, otherwise as sections."""
    print(columns(texts, shutil.get_terminal_size().columns if sys.stdout.isatty() else 0), flush=True)


def write_once(
    writer: TerminalWriter,
    prompt: str,
    params: GenerationParams,
    *,
    folder: Path,
    echo: bool,
    live: bool,
    as_json: bool,
    trim: bool = False,
) -> int:
    """One prompt: text, samples or JSON. echo: print the prompt before the text. Returns 0, or 130 when interrupted."""
    timing = Timing()
    live = live and params.n == 1 and not as_json
    opening = prompt if echo else ""
    if live:
        print_text(opening)
    results, completed = writer.write(prompt, params, timing, live=live, trim=trim and not as_json)
    if as_json:
        print(json.dumps(json_report(results, prompt, params, folder, timing), ensure_ascii=False))
    elif live:
        print(flush=True)
    elif params.n == 1:
        print(opening + results[0].text, flush=True)
    else:
        print_samples([opening + result.text for result in results])
    print_status(f"{'' if completed else 'stopped: '}{timing}; --seed {params.seed}")
    return 0 if completed else 130


def json_report(
    results: list[Result], prompt: str, params: GenerationParams, folder: Path, timing: Timing
) -> dict[str, Any]:
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
        "first_token_s": timing.first_s,
        "tokens_per_s": timing.tokens_per_s,
    }


def write_gallery(writer: TerminalWriter, params: GenerationParams) -> int:
    """One text for each kind of opening. Returns 0, or 130 when interrupted."""
    for number, (kind, openings) in enumerate(GALLERY.items()):
        opening = openings[((params.seed or 0) + number) % len(openings)]
        try:
            writer.tokenizer.encode(opening)
        except ValueError as error:  # a small alphabet may lack a character
            print_status(f"{kind} is left out: {error}")
            continue
        print_text(f"{chr(10) if number else ''}--- {kind} ---\n{opening if params.n == 1 else ''}")
        results, completed = writer.write(opening, params, Timing(), live=params.n == 1)
        if params.n == 1:
            print(flush=True)
        else:
            print_samples([opening + result.text for result in results])
        if not completed:
            return 130
    print_status(f"--seed {params.seed}")
    return 0


class InteractiveStory:
    """A story written together: pieces of text, each by the person or by the model."""

    def __init__(self, writer: TerminalWriter, params: GenerationParams):
        self.writer, self.params = writer, params
        self.pieces: list[str] = []
        self.by_model: list[bool] = []  # which pieces the model wrote
        self.timing: Timing | None = None  # of the last piece
        self.seed: int | None = None  # of the last piece

    @property
    def story(self) -> str:
        return "".join(self.pieces)

    def run(self) -> int:
        """Read lines until the end."""
        terminal = sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (arrow keys and history; not on every system)
            print_status(HELP)
        while True:
            try:
                if not self.handle(input("> " if terminal else "")):
                    return 0
            except (EOFError, KeyboardInterrupt):
                print_status("")
                return 0
            except (RuntimeError, ValueError) as error:
                print_status(f"error: {error}")

    def handle(self, line: str) -> bool:
        """Handle one line of input, a command or text; False to end."""
        command, _, rest = line.strip().partition(" ")
        if not command.startswith("/"):
            if line.strip():
                self.add(line)
            return True
        actions = {
            "/help": lambda: print_status(HELP),
            "/continue": self.continue_generation,
            "/retry": self.retry,
            "/undo": self.undo,
            "/new": self.new,
            "/set": lambda: self.set(rest),
            "/show": lambda: print_status(
                "\n".join(f"{name} = {value}" for name, value in self.params.model_dump().items())
            ),
            "/save": lambda: self.save(rest.strip()),
            "/stats": self.show_stats,
        }
        if command in ("/quit", "/exit"):
            return False
        if command in actions:
            actions[command]()
        else:
            print_status(f"{command}: no such command; /help lists them")
        return True

    def add(self, text: str) -> None:
        """The person's words, then the model's."""
        text = text.replace("\\n", "\n")
        gap = "" if not self.pieces or self.story[-1:].isspace() or text[:1].isspace() else " "
        self.writer.tokenizer.encode(text)  # raises if a small alphabet lacks a character: nothing changes then
        self.pieces.append(gap + text)
        self.by_model.append(False)
        self.continue_generation()

    def continue_generation(self) -> None:
        """The next piece, by the model. Ctrl-C ends it and keeps what was written."""
        params = writing.with_seed(self.params.model_copy(update={"n": 1}))
        timing = Timing()
        results, _ = self.writer.write(self.story, params, timing, live=True)
        print(flush=True)
        self.pieces.append(results[0].text)
        self.by_model.append(True)
        self.timing, self.seed = timing, params.seed

    def retry(self) -> None:
        """The model's last piece again, with another seed."""
        if not self.by_model or not self.by_model[-1]:
            print_status("the model has not written the last piece: nothing to write again")
            return
        self.pieces.pop()
        self.by_model.pop()
        if self.params.seed is not None:
            self.params = self.params.model_copy(update={"seed": (self.params.seed + 1) % 2**63})
        self.continue_generation()

    def undo(self) -> None:
        """Remove the model's last piece and the person's words before it."""
        if not self.pieces:
            print_status("nothing to take back")
            return
        for by_model in (True, False):
            if self.by_model and self.by_model[-1] is by_model:
                self.pieces.pop()
                self.by_model.pop()
        print_status(f"… {self.story[-200:]}" if self.story else "the story is empty")

    def new(self) -> None:
        """Forget the story."""
        self.pieces, self.by_model = [], []

    def set(self, words: str) -> None:
        """Change one setting; an invalid value is reported and changes nothing."""
        name, _, value = words.strip().partition(" ")
        name = name.lstrip("-").replace("-", "_")
        if name not in GenerationParams.model_fields or not value:
            print_status(f"/set NAME VALUE, where NAME is one of {', '.join(GenerationParams.model_fields)}")
            return
        given: Any = value.strip()
        if given == "none":
            given = () if name == "stop" else None
        elif name == "stop":
            given = (given.replace("\\n", "\n"),)
        try:
            self.params = build(GenerationParams, self.params.model_dump() | {name: given})
        except ConfigError as error:
            print_status("\n".join(error.faults))

    def show_stats(self) -> None:
        """Speed and seed of the last piece."""
        print_status(f"{self.timing}; --seed {self.seed}" if self.timing else "nothing is written yet")

    def save(self, name: str) -> None:
        """Write the story into a new file."""
        if not name:
            print_status("/save FILE")
            return
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(self.story + "\n")
            print_status(f"{len(self.story):,} characters saved in {name}")
        except FileExistsError:
            print_status(f"{name} exists already: choose another name")
        except OSError as error:
            print_status(f"{name}: {error.strerror}")
