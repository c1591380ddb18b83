"""Writing with a model in this process: ids of a prompt, the window that fits, a stream of events, whole results.

    >>> results = generate(model, tokenizer, "The old house", GenerationParams(max_tokens=50, seed=1))
    >>> for event in stream(model, tokenizer, "The old house", params): print(event.text, end="")

This is the loop for one caller at a time: `generate.py`, samples during training, `evaluate.py`. For many callers at once
`engine.Engine` runs the same `BatchDecoder` in its own thread; one seed gives the same text either way. The path
of a prompt is described in `inference/decoder.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import torch

from config import GenerationParams
from inference.decoder import BatchDecoder, Event, Result, Sequence
from model import GPT
from sampling import random_seed
from tokenizer import Tokenizer

MAX_BATCH = 16  # samples of one prompt written at the same time


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside; the model's former mode comes back afterwards, also after an exception.

    Gradients are left as they are: use `torch.no_grad` beside it where the model is called directly.
    """
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[int], style: str = "") -> list[int]:
    """The ids of a prompt; an empty one becomes the tokenizer's start id, or nothing where a style begins the text.

    A text's line ends become those that models read in training, and a byte-order mark is left out: some editors and
    pipes add them, and a model has never seen them. Raises ValueError for ids that the tokenizer does not have and StyleError for such a style.
    """
    styled = bool(tokenizer.blend(style))
    if isinstance(prompt, str):
        prompt = prompt.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    size = tokenizer.vocab_size
    for id in ids:
        if not 0 <= id < size:
            raise ValueError(f"prompt: id {id} is not among the tokenizer's {size} (0 to {size - 1})")
    return ids if ids or styled else [tokenizer.start]


def prompt_window(ids: list[int], context: int, params: GenerationParams) -> tuple[list[int], bool]:
    """(the ids that the model reads, whether the prompt was cut): its end, behind its `keep` first ids.

    context: the model's, in tokens. A quarter of it, or max_tokens if that is less, stays free for writing, and one
    place for the style.
    """
    room = context - min(params.max_tokens, context // 4) - bool(params.style.strip(" ,"))
    if len(ids) <= room:
        return list(ids), False
    keep = min(params.keep, room // 2)
    return [*ids[:keep], *ids[len(ids) - room + keep :]], True


def with_seed(params: GenerationParams) -> GenerationParams:
    """`params` with a seed: its own, or a new one."""
    return params if params.seed is not None else params.model_copy(update={"seed": random_seed()})


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | list[int],
    params: GenerationParams,
    *,
    logprobs: int | None = None,
    decoder: BatchDecoder | None = None,
) -> Generator[Event]:
    """The events of all `params.n` samples as they are written, side by side; see `decoder.Event`.

    A prompt longer than the context is cut (`prompt_window`). logprobs: number of alternatives reported with each token.
    decoder: one of this model's, reused so that a prompt it has read before is not read twice.
    Raises what the model or the sampling raised; closing the generator ends the samples.
    """
    context = model.config.block_size
    seed = random_seed() if params.seed is None else params.seed
    ids, _ = prompt_window(encode_prompt(tokenizer, prompt, params.style), context, params)
    slots_per_sample = max(1, len(tokenizer.blend(params.style)))
    with eval_mode(model):
        if decoder is None or len(decoder.free_slots) < slots_per_sample:
            decoder = BatchDecoder(model, min(params.n, MAX_BATCH) * slots_per_sample)
        waiting = iter(range(params.n))
        seq = 0
        try:
            while True:
                # 1. Samples that wait take the slots that are free.
                while len(decoder.free_slots) >= slots_per_sample and (index := next(waiting, None)) is not None:
                    decoder.add(
                        Sequence(tokenizer, ids, params, seed=seed, index=index, context=context, logprobs=logprobs)
                    )
                if not decoder.sequences:
                    return
                # 2. One step of all of them; its events are numbered and handed on.
                for sequence, event in decoder.step():
                    if sequence.error is not None:
                        raise sequence.error
                    event.seq, seq = seq, seq + 1
                    yield event
        finally:
            for sequence in list(decoder.sequences):
                decoder.remove(sequence)


def empty_results(model: GPT, tokenizer: Tokenizer, prompt: str | list[int], params: GenerationParams) -> list[Result]:
    """A result for each sample, to which its events are then added; params.seed must be set."""
    ids = encode_prompt(tokenizer, prompt, params.style)
    ids, truncated = prompt_window(ids, model.config.block_size, params)
    return [Result("", "cancelled", 0, [], params.seed or 0, len(ids), truncated) for _ in range(params.n)]


def generate(model: GPT, tokenizer: Tokenizer, prompt: str | list[int], params: GenerationParams) -> list[Result]:
    """All samples of one prompt, completed. `seed` in a result with the same settings writes them again."""
    params = with_seed(params)
    results = empty_results(model, tokenizer, prompt, params)
    for event in stream(model, tokenizer, prompt, params):
        results[event.index].add(event)
    return results
