"""Write with a model: at the terminal, or as functions.

    python generate.py --prompt "The old house stood"                        # the newest model
    python generate.py --model runs/novels/best --prompt "It was" --n 3 --seed 7
    python generate.py --interactive

    >>> results = generate(model, tokenizer, "The old house", GenerationParams(max_tokens=50, seed=1))

One seed, one text: sample `i` of seed `s` has a generator of its own, and rows are computed so that a row never depends
on its neighbours (quantize.row_counts). The engine uses the same Writer, so its texts are these.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from config import ROOT, GenerationParams, build, parse_flags, run_main

if TYPE_CHECKING:
    import torch

    from model import GPT
    from tokenizer import Tokenizer


@dataclass
class Piece:
    """A token of one sample, or (finish_reason set) its end. `text` holds complete characters only.

    logprob and top (id, text, logprob) are of the model's own distribution, before any filter.
    """

    index: int
    text: str = ""
    token_id: int | None = None
    finish_reason: str | None = None
    logprob: float | None = None
    top: list[tuple[int, str, float]] = field(default_factory=list)
    message: str | None = None


@dataclass
class Result:
    """One finished sample."""

    text: str
    finish_reason: str
    tokens: int
    seed: int
    prompt_tokens: int
    truncated: bool


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index`: a fixed 63-bit mix (splitmix64), so that neighbouring seeds share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) & (2**64 - 1)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


def filter_logits(logits: torch.Tensor, params: GenerationParams, seen: torch.Tensor | None = None) -> torch.Tensor:
    """logits [N] float32 -> [N] with what may not be sampled at -inf.

    Order: repetition penalty on the distinct ids in `seen`, temperature (0: untouched), top-k, top-p, min-p. Ties at the
    k-th place all stay, as in transformers. The likeliest token always stays. Raises ValueError on NaN.
    """
    import torch

    logits = logits.float()
    if bool(torch.isnan(logits).any()):
        raise ValueError("the model's logits are not numbers (NaN): its weights are damaged, train it again")
    if params.repetition_penalty != 1.0 and seen is not None and len(seen):
        chosen = logits[seen]
        penalty = params.repetition_penalty
        logits = logits.clone()
        logits[seen] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    if params.temperature > 0:
        logits = logits / params.temperature
    if 0 < params.top_k < len(logits):
        floor = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if params.top_p < 1.0:
        order = logits.sort(stable=True)
        before = order.values.softmax(-1).cumsum(-1)
        drop = before <= 1.0 - params.top_p
        drop[-1] = False
        logits = logits.index_fill(0, order.indices[drop], float("-inf"))
    if params.min_p > 0.0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), float("-inf"))
    return logits


def sample(
    logits: torch.Tensor, params: GenerationParams, generator: torch.Generator, seen: torch.Tensor | None = None
) -> int:
    """Draw one id from logits [N]; temperature 0 takes the likeliest."""
    import torch

    kept = filter_logits(logits, params, seen)
    if params.temperature == 0:
        return int(kept.argmax())
    return int(torch.multinomial(kept.softmax(-1), 1, generator=generator))


class StopFilter:
    """Holds back text that may be the beginning of a stop string; nothing of a stop string is ever let out."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held = tuple(stops), ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that is safe, whether a stop string was reached)."""
        self.held += text
        at = min((place for place in (self.held.find(stop) for stop in self.stops) if place >= 0), default=-1)
        if at >= 0:
            out, self.held = self.held[:at], ""
            return out, True
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out, False


@dataclass
class Row:
    """One sample being written: its tokens (prompt first), generator, slot and what it holds back."""

    index: int
    ids: list[int]
    params: GenerationParams
    generator: torch.Generator
    slot: int
    text: Any
    stops: StopFilter
    logits: torch.Tensor
    seen: dict[int, None]
    logprobs: int | None = None
    written: int = 0
    finished: str = ""


def window(ids: Sequence[int], block_size: int, keep: int) -> list[int]:
    """What the model sees of a text that outgrew its context: the first `keep` tokens and the newest, 3/4 of it in all."""
    size = block_size * 3 // 4
    first = list(ids[: min(keep, size - 1)])
    return first + list(ids[len(ids) - (size - len(first)) :])


def prompt_window(ids: Sequence[int], block_size: int, params: GenerationParams) -> tuple[list[int], bool]:
    """(the prompt as the model reads it, whether its beginning was left out): room stays for up to a quarter of new text."""
    room = block_size - min(params.max_tokens, block_size // 4)
    if len(ids) <= room:
        return list(ids), False
    first = list(ids[: min(params.keep, room - 1)])
    return first + list(ids[len(ids) - (room - len(first)) :]), True


class Writer:
    """The decode core: slots of one cache, rows that join and leave between steps."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, slots: int):
        from quantize import row_counts

        model.eval()
        self.model, self.tokenizer = model, tokenizer
        self.cache = model.new_cache(slots)
        self.counts = row_counts(model)
        self.free = list(range(slots))[::-1]

    def begin(
        self,
        ids: Sequence[int],
        params: GenerationParams,
        seed: int,
        indexes: Sequence[int],
        logprobs: int | None = None,
    ) -> list[Row]:
        """Rows for the samples `indexes` of one prompt, read once. Needs that many free slots.

        logprobs: how many alternatives each piece carries; None: not even its own log-probability.
        """
        import torch

        slots = [self.free.pop() for _ in indexes]
        try:
            self.cache.reset(slots[0])
            logits = self.model.prefill(list(ids), self.cache, slots[0]).cpu()
            for slot in slots[1:]:
                self.cache.copy(slots[0], slot)
        except BaseException:
            self.free += slots
            raise
        rows = []
        for index, slot in zip(indexes, slots, strict=True):
            generator = torch.Generator().manual_seed(sample_seed(seed, index))
            seen = dict.fromkeys(ids)
            text, stops = self.tokenizer.stream(), StopFilter(params.stop)
            rows.append(Row(index, list(ids), params, generator, slot, text, stops, logits, seen, logprobs))
        return rows

    def end(self, row: Row) -> None:
        """Give the row's slot back."""
        self.cache.reset(row.slot)
        self.free.append(row.slot)
        row.slot = -1

    def step(self, rows: Sequence[Row]) -> list[tuple[Row, Piece]]:
        """One token for every row; finished rows' slots are free afterwards."""
        import torch

        pieces: list[tuple[Row, Piece]] = []
        going = []
        for row in rows:
            if row.params.max_tokens == 0:
                pieces.append((row, self._finish(row, "length")))
                continue
            try:
                token = sample(row.logits, row.params, row.generator, torch.tensor(list(row.seen)))
            except (ValueError, RuntimeError) as error:
                piece = self._finish(row, "error", flush=False)
                piece.message = str(error)
                pieces.append((row, piece))
                continue
            if token == self.tokenizer.eot:
                pieces.append((row, self._finish(row, "stop")))
                continue
            row.ids.append(token)
            row.seen[token] = None
            row.written += 1
            text, stopped = row.stops.feed(row.text.feed(token))
            logprob, top = self._likely(row, token)
            pieces.append((row, Piece(row.index, text, token, logprob=logprob, top=top)))
            if stopped:
                pieces.append((row, self._finish(row, "stop", flush=False)))
            elif row.written >= row.params.max_tokens:
                pieces.append((row, self._finish(row, "length")))
            else:
                going.append(row)
        self._advance(going)
        return pieces

    def _likely(self, row: Row, token: int) -> tuple[float | None, list[tuple[int, str, float]]]:
        """(log-probability of the token, the likeliest alternatives), where the row asks for them."""
        if row.logprobs is None:
            return None, []
        line = row.logits.log_softmax(-1)
        best = line.topk(min(row.logprobs, len(line)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return float(line[token]), [(number, self.tokenizer.decode([number]), value) for number, value in found]

    def _finish(self, row: Row, reason: str, flush: bool = True) -> Piece:
        text = ""
        if flush:
            text, stopped = row.stops.feed(row.text.flush())
            reason = "stop" if stopped else reason
            text += "" if stopped else row.stops.held
        row.finished = reason
        self.end(row)
        return Piece(row.index, text, finish_reason=reason)

    def _advance(self, rows: Sequence[Row]) -> None:
        ready = []
        for row in rows:
            if self.cache.length[row.slot] >= self.model.config.block_size:
                self.cache.reset(row.slot)
                seen = window(row.ids, self.model.config.block_size, row.params.keep)
                row.logits = self.model.prefill(seen, self.cache, row.slot).cpu()
            else:
                ready.append(row)
        most = self.counts[-1]
        for start in range(0, len(ready), most):
            part = ready[start : start + most]
            count = next(count for count in self.counts if count >= len(part))
            logits = self.model.decode(
                [row.ids[-1] for row in part], self.cache, [row.slot for row in part], count
            ).cpu()
            for row, line in zip(part, logits, strict=True):
                row.logits = line


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The prompt's ids; an empty prompt begins with the tokenizer's start."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    return ids or [tokenizer.start]


def fresh_seed() -> int:
    """A new seed, small enough to be typed again."""
    return secrets.randbelow(2**31)


def stream(
    model: GPT, tokenizer: Tokenizer, prompt: str | Sequence[int], params: GenerationParams, seed: int | None = None
) -> Iterator[Piece]:
    """Pieces of all `params.n` samples as they are written, up to eight side by side."""
    seed = seed if seed is not None else params.seed if params.seed is not None else fresh_seed()
    ids, _ = prompt_window(encode_prompt(tokenizer, prompt), model.config.block_size, params)
    writer = Writer(model, tokenizer, min(params.n, 8))
    for first in range(0, params.n, 8):
        rows = writer.begin(ids, params, seed, range(first, min(first + 8, params.n)))
        while rows:
            yield from (piece for _, piece in writer.step(rows))
            rows = [row for row in rows if not row.finished]


def generate(model: GPT, tokenizer: Tokenizer, prompt: str | Sequence[int], params: GenerationParams) -> list[Result]:
    """All samples of one prompt, finished. Reproducible from the seed in each Result."""
    seed = params.seed if params.seed is not None else fresh_seed()
    whole = encode_prompt(tokenizer, prompt)
    ids, truncated = prompt_window(whole, model.config.block_size, params)
    results = [Result("", "length", 0, seed, len(ids), truncated) for _ in range(params.n)]
    for piece in stream(model, tokenizer, prompt, params, seed):
        result = results[piece.index]
        result.text += piece.text
        result.tokens += piece.token_id is not None
        result.finish_reason = piece.finish_reason or result.finish_reason
    return results


warnings.filterwarnings("ignore", message='Field name "json"')  # a flag, not pydantic's old method of that name


class GenerateArgs(GenerationParams):
    """Write with a model. The prompt comes from --prompt or from a pipe; text goes to standard output."""

    model: str = ""
    """Model folder, run folder or hub id; none: the newest in runs/, else in models/."""
    prompt: str = ""
    """What the text begins with."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Number format of the weights; auto: what this processor multiplies fast."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    json: bool = False  # type: ignore[assignment]
    """Print one JSON object instead of text."""
    stream: bool = True
    """Print words as they are written."""
    interactive: bool = False
    """Write a story together, turn by turn."""
    creative: bool = False
    """Write from a gallery of openings."""


PARAMS = tuple(GenerationParams.model_fields)
HELP = """\
(text)             add it to the story and let the model go on; an empty line just goes on
/retry             write the last piece anew        /undo    take the last piece back
/set NAME VALUE    e.g. /set temperature 0.9        /show    settings and seed
/save FILE         write the story into a file      /stats   speed of the last piece
/new               begin another story              /quit    end (Ctrl-C stops a piece, Ctrl-D ends)"""


@dataclass
class Speed:
    """Seconds to the first token, and tokens a second after it."""

    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    tokens: int = 0

    def count(self, piece: Piece) -> None:
        if piece.token_id is not None:
            self.first = self.first or time.perf_counter()
            self.tokens += 1

    def __str__(self) -> str:
        spent = time.perf_counter() - (self.first or self.started)
        rate = (self.tokens - 1) / spent if self.tokens > 1 and spent else 0.0
        return (
            f"{self.tokens} tokens, first after {max(0.0, self.first - self.started):.2f} s, then {rate:.1f} tokens/s"
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_out(model: GPT, tokenizer: Tokenizer, prompt: str, params: GenerationParams, speed: Speed) -> str:
    """Stream one sample to standard output; Ctrl-C ends it and keeps what was written."""
    text = ""
    try:
        for piece in stream(model, tokenizer, prompt, params.model_copy(update={"n": 1})):
            speed.count(piece)
            text += piece.text
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        say("\n(stopped)")
    return text


def write_all(model: GPT, tokenizer: Tokenizer, prompt: str, params: GenerationParams, speed: Speed) -> list[Result]:
    """All samples, finished; after Ctrl-C what there is of each."""
    ids, truncated = prompt_window(encode_prompt(tokenizer, prompt), model.config.block_size, params)
    results = [Result("", "stopped", 0, params.seed or 0, len(ids), truncated) for _ in range(params.n)]
    try:
        for piece in stream(model, tokenizer, prompt, params):
            speed.count(piece)
            result = results[piece.index]
            result.text += piece.text
            result.tokens += piece.token_id is not None
            result.finish_reason = piece.finish_reason or result.finish_reason
    except KeyboardInterrupt:
        say("\n(stopped)")
    return results


def interact(model: GPT, tokenizer: Tokenizer, params: GenerationParams) -> int:
    """The turn-by-turn program."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    story: list[str] = []
    turn, last = 0, ""
    say(HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            say("")
            return 0
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return 0
        if word == "/help":
            say(HELP)
        elif word == "/new":
            story, turn = [], 0
        elif word == "/undo":
            if story:
                story.pop()
            print("".join(story), flush=True)
        elif word == "/set":
            params = changed(params, rest)
        elif word == "/show":
            say(str(params.model_dump()))
        elif word == "/stats":
            say(last or "nothing written yet")
        elif word == "/save":
            save(rest.strip(), "".join(story))
        elif word.startswith("/") and word not in ("/retry", "/continue"):
            say(f"{word}: unknown; /help lists the commands")
        else:
            if word == "/retry":
                story = story[:-1]
            elif word != "/continue" and line:
                story.append(line if not story else f" {line}")
            turn += 1
            base = params.seed if params.seed is not None else fresh_seed()
            speed = Speed()
            print("".join(story), end="", flush=True)
            story.append(
                write_out(model, tokenizer, "".join(story), params.model_copy(update={"seed": base + turn}), speed)
            )
            print(flush=True)
            last = f"{speed} (seed {base + turn})"


def changed(params: GenerationParams, words: str) -> GenerationParams:
    """`params` with one `NAME VALUE` set; a fault is said and nothing changes."""
    name, _, value = words.strip().partition(" ")
    name = name.replace("-", "_")
    if name not in PARAMS or not value:
        say(f"/set NAME VALUE, NAME one of {', '.join(PARAMS)}")
        return params
    given: Any = [value] if name == "stop" else None if value == "none" else value
    try:
        return build(GenerationParams, params.model_dump() | {name: given})
    except ValueError as error:
        say(str(error))
        return params


def save(name: str, text: str) -> None:
    """Write the story; an existing file is not overwritten."""
    if not name:
        return say("/save FILE")
    try:
        with Path(name).expanduser().open("x", encoding="utf-8") as file:
            file.write(text + "\n")
        say(f"saved {len(text):,} characters in {name}")
    except OSError as error:
        say(f"{name}: {error.strerror}")


def folder_defaults(folder: Path) -> dict[str, Any]:
    """The sampling defaults a model folder carries in generation_config.json."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    values = jsonlib.loads(path.read_text(encoding="utf-8"))
    names = {"max_new_tokens": "max_tokens"} | {
        n: n for n in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    return {ours: values[theirs] for theirs, ours in names.items() if values.get(theirs) is not None}


def read_args(argv: list[str]) -> tuple[GenerateArgs, Path]:
    """Flags over the model folder's own sampling defaults."""
    from checkpoint import fetch_model, find_model
    from config import flag_value

    wanted = flag_value(argv, "model")
    folder = find_model(None, ROOT) if wanted is None else find_model(fetch_model(wanted))
    return parse_flags(GenerateArgs, argv, defaults=folder_defaults(folder)), folder


def main(argv: list[str] | None = None) -> int:
    """Write; exit code 0, 1 when it failed, 2 for bad flags."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--help" in words or "-h" in words:
        parse_flags(GenerateArgs, words)
    return run_main(lambda: _main(words))


def _main(words: list[str]) -> int:
    args, folder = read_args(words)
    prompt = args.prompt
    if not prompt and not (args.interactive or args.creative) and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    from quantize import load_for_writing

    began = time.perf_counter()
    model, tokenizer, remark = load_for_writing(folder, device=args.device, dtype=args.dtype)
    if remark:
        say(f"note: {remark}")
    params = GenerationParams(**{name: getattr(args, name) for name in PARAMS})
    if args.interactive:
        return interact(model, tokenizer, params)
    seed = params.seed if params.seed is not None else fresh_seed()
    params = params.model_copy(update={"seed": seed})
    say(f"{folder}: loaded in {time.perf_counter() - began:.2f} s; --seed {seed}")
    if args.creative:
        return gallery(model, tokenizer, params)
    ids, truncated = prompt_window(encode_prompt(tokenizer, prompt), model.config.block_size, params)
    if truncated:
        say(
            f"note: the prompt is longer than the context of {model.config.block_size}: only its end is read ({len(ids)} tokens)"
        )
    speed = Speed()
    if args.stream and params.n == 1 and not args.json:
        print(prompt, end="", flush=True)
        write_out(model, tokenizer, prompt, params, speed)
        print(flush=True)
    else:
        results = write_all(model, tokenizer, prompt, params, speed)
        if args.json:
            print(
                jsonlib.dumps(
                    {"prompt": prompt, "model": str(folder), "samples": [vars(r) for r in results]}, ensure_ascii=False
                )
            )
        else:
            for number, result in enumerate(results, 1):
                print(
                    f"--- {number} of {params.n} ---\n{prompt}{result.text}\n"
                    if params.n > 1
                    else f"{prompt}{result.text}"
                )
    say(str(speed))
    return 0


def gallery(model: GPT, tokenizer: Tokenizer, params: GenerationParams) -> int:
    """One text for each opening of the gallery."""
    from prompts import GALLERY

    for kind, openings in GALLERY.items():
        print(f"--- {kind} ---\n{openings[0]}", end="", flush=True)
        write_out(model, tokenizer, openings[0], params, Speed())
        print("\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
