"""Command-line flags from the settings' own fields, for every command.

>>> args = parse_flags(TrainArgs, ["--train.lr", "3e-4"])     # `--help` lists every field with default and bounds
>>> sys.exit(run_main(lambda: work(args)))                   # exit code 0, 1 (failed) or 2 (bad settings)
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, cast, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from config import ConfigError, build

M = TypeVar("M", bound=BaseModel)


def bounds(field: FieldInfo) -> str:
    """A field's limits as text, like `0 to 2`; empty where it has none."""
    limits = {
        name: getattr(part, name) for part in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(part, name)
    }
    low = f"{limits['ge']:g}" if "ge" in limits else f"above {limits['gt']:g}" if "gt" in limits else ""
    high = f"{limits['le']:g}" if "le" in limits else f"below {limits['lt']:g}" if "lt" in limits else ""
    if low and high:
        return f"{low} to {high}"
    return f"{low} or more" if "ge" in limits else low or (f"up to {high}" if high else "")


def _flags(kind: type[BaseModel]) -> type:
    """A dataclass with the fields of `kind` and none of its checks: flags are parsed first and checked all at once."""
    import tyro

    fields = []
    for name, field in kind.model_fields.items():
        annotation: Any = field.annotation
        default: Any = field.get_default(call_default_factory=True)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            nested = _flags(annotation)
            fields.append((name, nested, dataclasses.field(default_factory=nested)))
            continue
        limits = bounds(field)
        help_text = f"{field.description or ''}{f' [{limits}]' if limits else ''}"
        annotation = Annotated[annotation, tyro.conf.arg(help=help_text.replace("%", "%%"))]
        shared = isinstance(default, dict)  # a dataclass wants a new one for each instance
        made_default = dataclasses.field(default_factory=default.copy) if shared else dataclasses.field(default=default)
        fields.append((name, annotation, made_default))
    made = dataclasses.make_dataclass(kind.__name__, fields)
    made.__doc__ = kind.__doc__
    return made


def _filled(kind: type, values: dict[str, Any]) -> Any:
    """An instance of a class made by `_flags` whose defaults are `values`."""
    given = {}
    for field in dataclasses.fields(kind):
        if field.name in values:
            value = values[field.name]
            given[field.name] = _filled(field.type, value) if dataclasses.is_dataclass(field.type) else value  # type: ignore[arg-type]
    return kind(**given)


def parse_flags(
    kind: type[M],
    argv: Sequence[str] | None,
    *,
    defaults: dict[str, Any] | None = None,
    description: str | None = None,
    examples: str | None = None,
) -> M:
    """Command-line flags as `kind`, over `defaults` (nested tables as from TOML).

    description: text of `--help`, by default the docstring of `kind`. examples: a module's docstring, of which `--help` shows
    the indented commands, one a line.
    `--help` prints every flag with its default and bounds. A flag that does not exist or cannot be read ends the
    program with code 2; values out of bounds raise one ConfigError with all errors.
    """
    import tyro

    flags = _flags(kind)
    checked = build(kind, defaults or {}).model_dump()
    try:
        try:
            parsed = tyro.cli(
                flags,
                args=_gathered(kind, _with_bare_values(kind, sys.argv[1:] if argv is None else argv)),
                default=_filled(flags, checked),
                prog=program_name(),
                description="\n".join(filter(None, (description or kind.__doc__, example_lines(examples or "")))),
                config=(tyro.conf.AvoidSubcommands,),
            )
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # of --help, by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    return build(kind, dataclasses.asdict(parsed))


def example_lines(text: str) -> str:
    """The commands of a module's docstring, a paragraph of their own; empty where it has none."""
    found = re.findall(r"^ {4}(?!>>>).*\S$|^(?:[A-Z_]+=\S+ )*python .*$", text, re.MULTILINE)
    lines = [line if line.startswith(" ") else f"    {line}" for line in found]
    return "\n".join(["", *lines, ""]) if lines else ""


def program_name() -> str | None:
    """`python -m storage.s3` for a module that is run so; None: what argparse makes of the file's name."""
    import __main__

    spec = getattr(__main__, "__spec__", None)
    return None if spec is None or spec.name.endswith("__main__") else f"python -m {spec.name}"


def help_alone(text: str | None) -> None:
    """For programs that others start and that have no flags: `--help` prints `text` and ends the program."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(text)
        sys.exit(0)


def _with_bare_values(kind: type[BaseModel], argv: Sequence[str]) -> list[str]:
    """`argv`, in which a flag without a value gets the one that its field's `json_schema_extra` names as `bare`."""
    words = list(argv)
    for name, field in kind.model_fields.items():
        extra, flag = field.json_schema_extra, f"--{name.replace('_', '-')}"
        if isinstance(extra, dict) and "bare" in extra and flag in words:
            at = words.index(flag) + 1
            if at == len(words) or words[at].startswith("-"):
                words.insert(at, str(extra["bare"]))
    return words


def _gathered(kind: type[BaseModel], argv: Sequence[str]) -> list[str]:
    """`argv`, in which the values of a flag for several that is given several times (`--input A --input B`) stand together."""
    words = list(argv)
    for name, field in kind.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        spellings = (flag, f"--{name}")
        count = sum(word.split("=")[0] in spellings for word in words)
        if get_origin(field.annotation) is not tuple or count < 2:
            continue
        rest: list[str] = []
        values: list[str] = []
        taking = False
        for word in words:
            if word.split("=")[0] in spellings:
                taking, (_, equals, value) = "=" not in word, word.partition("=")
                values += [value] if equals else []
            elif taking and not (word.startswith("-") and len(word) > 1):
                values.append(word)
            else:
                taking = False
                rest.append(word)
        words = [*rest, flag, *values]
    return words


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name` in `argv`, read before the others, whose defaults depend on it; None if not given."""
    return cast("str | None", _one_flag(argv, name, nargs="?"))


def flag_given(argv: Sequence[str], name: str) -> bool:
    """Whether the switch `--name` is in `argv`, read before the others, whose defaults depend on it."""
    return cast(bool, _one_flag(argv, name, action="store_true"))


def _one_flag(argv: Sequence[str], name: str, **kind: Any) -> Any:
    """One flag of `argv` by itself, before the others can be read; `_` in its name is accepted for `-`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
    parser.add_argument(*spellings, dest="value", **kind)
    return parser.parse_known_args(argv)[0].value


def any_character_can_be_printed() -> None:
    """Let no text be lost to the code page of Windows or of a bare locale, which lack most characters.

    A file or pipe then gets UTF-8; a terminal shows what its code page has, and `?` for the rest. What the user asks for by
    PYTHONIOENCODING stays, with `?` too.
    """
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
        if encoding == "utf8" or not hasattr(stream, "reconfigure"):
            continue
        wanted = stream.isatty() or bool(os.environ.get("PYTHONIOENCODING"))
        stream.reconfigure(encoding=None if wanted else "utf-8", errors="replace")


def run_main(body: Callable[[], int]) -> int:
    """Run a script's body: 2 with the message on standard error for bad settings, 1 for a named failure."""
    any_character_can_be_printed()
    try:
        return body()
    except ConfigError as error:
        print(f"error: {error.faults[0]}" if len(error.faults) == 1 else f"errors:\n{error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
