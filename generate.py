"""Write with a model at the terminal.

    python generate.py --prompt "The old house stood"                 # your newest model, or the one that comes along
    python generate.py --model runs/novels/best --prompt "It was" --n 3 --seed 7
    python generate.py --prompt "It was" --style dickens:0.7,austen:0.3       # a model trained with styles
    echo "My dear Sister," | python generate.py --max-tokens 400 > letter.txt
    python generate.py --interactive

Text goes to standard output, everything else to standard error. One seed, one text: see `inference/decoder.py`.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, Literal

from checkpoint import CheckpointError, described, fetch_model, find_model
from cli import flag_value, parse_flags, run_main
from config import FINISH_SENTENCE, ROOT, ConfigError, GenerationParams
from storage.gpt2_format import folder_defaults

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", 'Field name "json"')  # pydantic's own method of that name is long deprecated

    class GenerateFlags(GenerationParams):
        """Write with a model. The prompt comes from --prompt or from a pipe; the text goes to standard output."""

        model: str = ""
        """Model folder, run folder, or a GPT-2 on the Hugging Face hub; default: the newest finished run in runs/ that has
        fewer bits a byte than the models in models/, otherwise the newest of those."""
        prompt: str | None = None
        """What the text begins with; default: standard input if it is piped, otherwise nothing."""
        dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
        """Number format of the weights; auto: what this processor reads fastest without visible loss (see inference/quantize.py)."""
        device: str = "auto"
        """auto, cpu, cuda, cuda:N or mps."""
        echo: bool = True
        """Print the prompt before the text (plain text only)."""
        json: bool = False  # type: ignore[assignment]
        """Print one JSON object instead of text."""
        trim: bool = False
        """Leave out what comes after the last finished sentence (plain text only)."""
        stream: bool = True
        """Print words as they are written."""
        interactive: bool = False
        """Write a story together, piece by piece."""
        creative: bool = False
        """Continue a gallery of openings, one of each kind (--seed chooses which)."""


def read_prompt(flags: GenerateFlags) -> str:
    """--prompt, or what is piped in without its last line break."""
    if flags.prompt is not None or sys.stdin is None or sys.stdin.isatty():
        return flags.prompt or ""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        message = f"the piped prompt is not UTF-8 (byte {error.start}): convert it, or give --prompt"
        raise ConfigError([message]) from None


def write(argv: list[str]) -> int:
    """The command without its error handling. Returns 0, or 130 after Ctrl-C."""
    # 1. Flags, with the model folder's own settings as their defaults.
    wanted = flag_value(argv, "model")
    folder = fetch_model(wanted) if wanted else find_model(None, ROOT)
    flags = parse_flags(GenerateFlags, argv, defaults=folder_defaults(folder), examples=__doc__)
    if flags.interactive and flags.creative:
        raise ConfigError(["--interactive and --creative exclude each other: choose one"])
    params = GenerationParams(**{name: getattr(flags, name) for name in GenerationParams.model_fields})
    prompt = "" if flags.interactive or flags.creative else read_prompt(flags)

    # 2. The model. Imported here and not at the top: torch takes seconds, for which --help and errors need not wait.
    from inference import terminal, writing
    from inference.decoder import BatchDecoder
    from inference.quantize import load_for_writing
    from tokenizer import StyleError

    model, tokenizer, remark = load_for_writing(folder, device=flags.device, dtype=flags.dtype)
    if remark:
        terminal.print_status(remark)
    if sys.stderr.isatty():
        named = "" if wanted else "; --model names another"
        styles = (
            f"; --style chooses one of {len(tokenizer.styles)} styles, see its README.md" if tokenizer.styles else ""
        )
        terminal.print_status(f"{described(folder, ROOT)}{named}{'' if params.style else styles}")
    try:
        tokenizer.blend(params.style)
    except StyleError as error:
        raise ConfigError([f"--{error}"]) from None

    # 3. Writing, in one of three ways.
    writer = terminal.TerminalWriter(model, tokenizer)
    if flags.interactive:
        writer.decoder = BatchDecoder(model, 1)
        story = terminal.InteractiveStory(writer, params)
        if flags.prompt:
            terminal.print_text(flags.prompt if flags.echo else "")
            story.add(flags.prompt)
        return story.run()
    params = writing.with_seed(params)
    if flags.creative:
        return terminal.write_gallery(writer, params)
    return terminal.write_once(
        writer, prompt, params, folder=folder, echo=flags.echo, live=flags.stream, as_json=flags.json, trim=flags.trim
    )


def write_until_closed(argv: list[str]) -> int:
    """`write`, ended without an error when the reader of the text closes the pipe (`| head`)."""
    try:
        return write(argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def help_defaults(argv: list[str]) -> dict[str, Any]:
    """The defaults that `--help` shows: of the model that would write; nothing is fetched for them."""
    try:
        return folder_defaults(find_model(flag_value(argv, "model"), ROOT))
    except CheckpointError:
        return {"finish_sentence": FINISH_SENTENCE}


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 when something failed, 2 for bad flags, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--help" in words or "-h" in words:
        parse_flags(GenerateFlags, words, defaults=help_defaults(words), examples=__doc__)
    return run_main(lambda: write_until_closed(words))


if __name__ == "__main__":
    sys.exit(main())
