"""Write with a model: a prompt's window, a stream of events, whole results.

>>> results = generate(model, tokenizer, "The old house", GenerationParams(max_tokens=50, seed=1))
>>> for event in stream(model, tokenizer, "The old house", params): print(event.text, end="")
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from config import GenerationParams
from inference.decoder import Event, Result, Text, Writer, dropout_off
from sampling import fresh_seed

if TYPE_CHECKING:
    from model import GPT
    from tokenizer import Tokenizer

SIDE_BY_SIDE = 16  # samples of one prompt written at the same time


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int], style: str = "") -> list[int]:
    """The prompt's ids: of an empty one the tokenizer's start, or none where a style begins the text.

    ValueError for ids that the tokenizer does not have, and for such a style.
    """
    styled = bool(tokenizer.blend(style))
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    size = tokenizer.vocab_size
    for id in ids:
        if not 0 <= id < size:
            raise ValueError(f"prompt: id {id} is not among the tokenizer's {size} (0 to {size - 1})")
    return ids if ids or styled else [tokenizer.start]


def prompt_window(ids: Sequence[int], context: int, params: GenerationParams) -> tuple[list[int], bool]:
    """(what is read of a prompt, whether it was cut): its end, behind the `keep` first tokens of its opening.

    A quarter of the context, or max_tokens if that is less, stays free for writing, and a place for the style.
    """
    room = context - min(params.max_tokens, context // 4) - bool(params.style.strip(" ,"))
    if len(ids) <= room:
        return list(ids), False
    keep = min(params.keep, room // 2)
    return [*ids[:keep], *ids[len(ids) - room + keep :]], True


def seeded(params: GenerationParams) -> GenerationParams:
    """`params` with a seed: its own, or a new one."""
    return params if params.seed is not None else params.model_copy(update={"seed": fresh_seed()})


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    params: GenerationParams,
    *,
    logprobs: int | None = None,
    writer: Writer | None = None,
) -> Generator[Event]:
    """Events of all `params.n` samples, side by side, as they are written; see `sampling.Event`.

    A prompt longer than the context keeps its end (`prompt_window`). logprobs: so many alternatives with each token.
    writer: one of this model's, to be used again: what it has read of a prompt is not read twice.
    """
    context = model.config.block_size
    seed = fresh_seed() if params.seed is None else params.seed
    ids, _ = prompt_window(encode_prompt(tokenizer, prompt, params.style), context, params)
    width = max(1, len(tokenizer.blend(params.style)))  # slots a text
    with dropout_off(model):
        if writer is None or len(writer.free) < width:
            writer = Writer(model, min(params.n, SIDE_BY_SIDE) * width)
        waiting = iter(range(params.n))
        seq = 0
        try:
            while True:
                while len(writer.free) >= width and (index := next(waiting, None)) is not None:
                    writer.add(Text(tokenizer, ids, params, seed=seed, index=index, context=context, logprobs=logprobs))
                if not writer.texts:
                    return
                for text, event in writer.step():
                    if text.error is not None:
                        raise text.error
                    event.seq, seq = seq, seq + 1
                    yield event
        finally:
            for text in list(writer.texts):
                writer.remove(text)


def blank_results(
    model: GPT, tokenizer: Tokenizer, prompt: str | Sequence[int], params: GenerationParams
) -> list[Result]:
    """A result for each sample, of which nothing is written yet; params.seed must be set."""
    ids = encode_prompt(tokenizer, prompt, params.style)
    ids, truncated = prompt_window(ids, model.config.block_size, params)
    return [Result("", "cancelled", 0, [], params.seed or 0, len(ids), truncated) for _ in range(params.n)]


def generate(model: GPT, tokenizer: Tokenizer, prompt: str | Sequence[int], params: GenerationParams) -> list[Result]:
    """All samples of one prompt, completed. `seed` in a result with the same settings writes them again."""
    params = seeded(params)
    results = blank_results(model, tokenizer, prompt, params)
    for event in stream(model, tokenizer, prompt, params):
        results[event.index].add(event)
    return results
