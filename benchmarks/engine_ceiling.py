"""How many tokens a second the engine chooses and hands out when the model costs next to nothing.

python benchmarks/engine_ceiling.py
python benchmarks/engine_ceiling.py --texts 64 --tokens 400

The model has one layer of 16 channels and GPT-2's vocabulary, so that nearly all of the time goes into sampling on the
CPU (one text after the other, with the default settings), decoding to text, and handing events to the reader. No
accelerator can lift the engine above this figure; it bounds what one process serves.
"""

from __future__ import annotations

import sys
import time

from common import report
from pydantic import Field

from cli import parse_flags, run_main
from config import FrozenSettings, GenerationParams, ModelConfig


class Args(FrozenSettings):
    """Tokens a second with a model that costs nothing."""

    texts: int = Field(16, ge=1, le=1024)
    """Texts written side by side."""
    tokens: int = Field(200, ge=2, le=4096)
    """Tokens a text."""
    threads: int = Field(1, ge=1)
    """Threads of torch."""


def measure(texts: int, tokens: int) -> tuple[float, float]:
    """Tokens a second over all texts, from the first token to the last; seconds of processor time a token.

    The second figure is the same on a busy machine.
    """
    import torch

    from inference.engine import Engine
    from model import GPT
    from tokenizer import gpt2_tokenizer

    tokenizer = gpt2_tokenizer()
    size = tokenizer.vocab_size
    torch.manual_seed(1)
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=16, block_size=64, vocab_size=size, vocab_used=size))
    with Engine(model, tokenizer, slots=texts, event_buffer=10**9) as engine:
        job = engine.submit("It was", GenerationParams(max_tokens=tokens, n=texts, seed=1))
        count, begun, worked = 0, 0.0, 0.0
        for event in job:
            if event.token_id is not None:
                begun, worked = begun or time.perf_counter(), worked or time.process_time()
                count += 1
        return (count - 1) / (time.perf_counter() - begun), (time.process_time() - worked) / (count - 1)


def _main(argv: list[str] | None) -> int:
    import torch

    args = parse_flags(Args, argv, examples=__doc__)
    torch.set_num_threads(args.threads)
    speed, work = measure(args.texts, args.tokens)
    row = {"texts": args.texts, "tokens a text": args.tokens, "threads": args.threads, "tokens/s": speed}
    row |= {"processor ms a token": 1000 * work, "tokens/s at most": 1 / work}
    report("engine_ceiling", [row])
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 when it failed, 2 for bad flags."""
    return run_main(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
