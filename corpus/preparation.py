"""Texts -> token shards: what `prepare_data.py` does, as functions.

    >>> flags = build(PrepareFlags, {"input": ("novels/",)})
    >>> manifest = prepare(flags, Path("data/novels"))

The folder holds `train_000000.bin` …, `val_000000.bin` … (little-endian uint16, or uint32 beyond 65,536 ids), the
tokenizer and `manifest.json`. It appears whole or not at all; an interrupted preparation goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from config import ROOT, ConfigError, DataConfig, build, load_config
from corpus import documents, sources
from corpus.documents import SUFFIXES, Corpus, DocumentError, File, Options, find, inspect
from corpus.encoding import (
    DROP,
    TRAIN,
    VAL,
    Work,
    alphabet,
    batches,
    choose_validation,
    digests,
    encode,
    find_duplicates,
    measure,
)
from corpus.sources import Input
from corpus.styles import Control, describe, largest, styles_in
from corpus.workers import Pool, Progress
from storage.atomic import replace_text
from storage.catalogue import Catalogue
from storage.shards import SPLITS, Manifest, ShardWriter, Source, TokenizerIdentity, join
from tokenizer import Tokenizer, char_tokenizer, gpt2_tokenizer, load_tokenizer, style_room, train_bpe, with_styles

STATE = "state.json"
OURS = re.compile(
    r"(train|val)_\d{6}\.bin|manifest\.json|tokenizer\.json|tokenizer_config\.json|documents\.json|originality|state\.json(\.tmp)?"
)
SMALL = 4 << 20  # bytes of texts up to which further processes cost more than they save
RECIPE = 2  # raise it whenever the same texts and settings give other shards
SAVE_SECONDS = 10.0  # between two saves of the state


class PrepareFlags(DataConfig):
    """Turn texts into token shards."""

    input: tuple[str, ...] = ()
    """Files, folders, globs (.txt, .jsonl and .parquet with a field `text`) or - for standard input."""
    preset: str = ""
    """Take the data settings, and without --input the texts, of this preset."""
    hub: str = ""
    """Take the texts from this data set (OWNER/NAME) of the Hugging Face hub; the same as --source."""
    hub_config: str = ""
    """Its configuration, where it has several."""
    hub_revision: str = "main"
    """Its branch, tag or commit."""
    validate_on: sources.Part = "validation"
    """Its part that becomes the validation split; parts that are neither this nor `train` are left out."""
    text_field: str = documents.FIELD
    """Field of .jsonl rows, parquet tables and hub data sets that holds the text."""
    out: Path | None = None
    """Folder to write; none: data/ and the preset's or the first input's name."""
    tokenizer_from: Path | None = None
    """Folder of a model or of prepared data whose tokenizer to use instead of --tokenizer."""
    workers: int = Field(0, ge=0, le=1024)
    """Processes; 0: one a core. The shards do not depend on it."""
    part: str = Field("1/1", pattern=r"^[1-9]\d*/[1-9]\d*$")
    """Prepare only this part of the texts, like 3/8 for the third of eight machines; --join puts the parts together."""
    join: tuple[Path, ...] = ()
    """Instead of texts, put these prepared folders together into --out, which shares their files where it can."""
    skip_bad_files: bool = False
    """Leave out what cannot be read instead of stopping."""
    index: bool = False
    """Also index the training text, so that copied passages can be found (originality.py)."""
    s3_output: str = ""
    """Also copy the shards, tokenizer and manifest to this s3://bucket/prefix."""


def default_out(preset: str) -> Path:
    """Where a preset's texts are prepared: data/PRESET, or `tokens` inside it where that folder holds the texts."""
    folder = ROOT / "data" / Path(preset).stem
    return folder / "tokens" if any(folder.glob("*.txt")) else folder


def prepare_preset(preset: str, out: Path) -> Manifest:
    """Prepare a preset's own texts into `out`. Raises as `prepare` does."""
    settings = load_config(preset).data.model_dump()
    return prepare(build(PrepareFlags, settings | {"preset": preset}), out)


def prepare(flags: PrepareFlags, out: Path) -> Manifest:
    """Prepare the texts that `flags` name into `out` and return its manifest.

    A folder made of the same texts with the same settings is kept; any other is replaced at the very end. Raises
    ConfigError (what to change in the flags), DocumentError (what is wrong with the texts), OSError.
    """
    begun = time.monotonic()
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():
        old.rename(out)
    _refuse_foreign(out)
    with contextlib.ExitStack() as stack:
        files = _files(flags, out, stack)
        settings = _settings(flags)
        identity = _identity(settings, files)
        if (kept := _kept(out, identity)) is not None:
            print(f"{out}: already prepared from these texts with these settings", file=sys.stderr)
            return kept
        if flags.tokenizer == "gpt2" and not flags.tokenizer_from:
            gpt2_tokenizer()  # before the workers fork from this process, so that they have it
        small = sum(item.path.stat().st_size for item in files) < SMALL and not flags.workers
        pool = stack.enter_context(Pool(1 if small else flags.workers))
        options = _options(flags)
        corpus, counts = _inspected(pool, files, options, _name(flags))
        work = _planned(pool, corpus, options, flags)
        names = _styles(pool, corpus, flags)
        stack.enter_context(_unfinished(part, out))
        state = _state(part, identity)
        tokenizer = load_tokenizer(part) if state else _tokenizer_for(flags, work, pool, part, names)
        if names:
            ids = np.array([tokenizer.styles.get(name, -1) for name in names], dtype=np.int64)
            work = dataclasses.replace(work, styles=ids)
            print(describe(names, list(tokenizer.styles)), file=sys.stderr)
        if not state:
            state = _start(identity)
            replace_text(part / STATE, json.dumps(state))
        writers, cleaning = _write_shards(pool, work, flags, tokenizer, part, state)
        source = Source(name=corpus.name, documents=corpus.documents, settings=settings, identity=identity)
        manifest = Manifest.model_validate(
            {
                "tokenizer": TokenizerIdentity(
                    kind=tokenizer.kind,
                    vocab_size=tokenizer.vocab_size,
                    fingerprint=tokenizer.fingerprint,
                    styles=tokenizer.styles,
                ),
                "dtype": np.dtype(tokenizer.dtype).name,
                "splits": {name: writer.result() for name, writer in writers.items()},
                "source": source,
                "cleaning": dict(sorted((cleaning if _part(flags)[0] else counts + cleaning).items())),
                "max_id": max(writer.max_id for writer in writers.values()),
            }
        )
        manifest.save(part)
        (part / STATE).unlink()
        _exchange(part, out, old)
    _report(out, manifest, time.monotonic() - begun)
    return manifest


def _files(flags: PrepareFlags, out: Path, stack: contextlib.ExitStack) -> list[Input]:
    """The files to read; standard input is first copied to one that goes with `stack`, a hub's data set to its cache."""
    if flags.input:
        found = find(item for item in flags.input if item != "-")
        found += [_standard_input(out, stack)] if "-" in flags.input else []
    elif flags.source.endswith(SUFFIXES):
        found = [(path, path.name) for path in sorted(ROOT.glob(flags.source))]
        if not found:
            raise ConfigError([f"there is no {flags.source} in {ROOT}: put your texts there, or give --input PATH"])
    elif not flags.source:
        raise ConfigError(
            ["nothing to prepare: give --input PATH… (files, folders or - ), --preset NAME or --hub NAME"]
        )
    elif sources.is_corpus(flags.source):
        return sources.fetch(
            flags.source,
            sources.Place(config=flags.hub_config, revision=flags.hub_revision, validate_on=flags.validate_on),
        )
    else:
        raise ConfigError([f"--source {flags.source}: give {', '.join(sources.NAMED)} or OWNER/NAME, or --input PATH"])
    return sources.given(found, flags.validate_on)


def _options(flags: PrepareFlags) -> Options:
    first, _, last = flags.years.partition("-")
    return Options(
        **flags.model_dump(include=set(Options.__dataclass_fields__) - {"years"}),
        skip_bad=flags.skip_bad_files,
        field=flags.text_field,
        books=not flags.input and sources.is_books(flags.source),
        years=(int(first), int(last)) if flags.years else None,
    )


def _standard_input(out: Path, stack: contextlib.ExitStack) -> tuple[Path, str]:
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.{os.getpid()}.stdin")
    stack.callback(path.unlink, missing_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while data := sys.stdin.buffer.read(1 << 20):
            digest.update(data)
            file.write(data)
    os.utime(path, ns=(0, 0))
    return path, f"standard input {digest.hexdigest()}"


def _name(flags: PrepareFlags) -> str:
    return ", ".join(Path(item).name or item for item in flags.input) or flags.source


def _settings(flags: PrepareFlags) -> dict[str, Any]:
    """The settings that the shards depend on."""
    names = {"val_fraction", "shard_tokens", "drop_duplicates"}
    settings = flags.model_dump(include=names) | vars(_options(flags))
    settings |= {"recipe": RECIPE, "tokenizer": flags.tokenizer}
    if flags.tokenizer_from:
        settings["tokenizer"] = load_tokenizer(flags.tokenizer_from).fingerprint
    elif flags.tokenizer == "bpe":
        settings["vocab_size"] = flags.vocab_size
    if flags.control:
        settings["control"] = vars(Control.read(flags.control))
    return settings if _part(flags) == (0, 1) else settings | {"part": flags.part}


def _part(flags: PrepareFlags) -> tuple[int, int]:
    """Which part, from 0, of how many."""
    part, parts = map(int, flags.part.split("/"))
    if part > parts:
        raise ConfigError([f"--part {flags.part}: there are only {parts} parts: give 1/{parts} to {parts}/{parts}"])
    return part - 1, parts


def _identity(settings: dict[str, Any], files: Iterable[Input]) -> str:
    facts = [
        (item.name, item.split, item.path.stat().st_size, item.version or item.path.stat().st_mtime_ns)
        for item in files
    ]
    return hashlib.sha256(json.dumps([settings, facts], sort_keys=True).encode()).hexdigest()


def _refuse_foreign(out: Path) -> None:
    """Refuse to replace what this program did not write."""
    if out.exists() and not out.is_dir():
        raise ConfigError([f"--out {out} is a file: give a folder"])
    foreign = (
        [path.name for path in out.iterdir() if not OURS.fullmatch(path.name) and path.name[0] != "."]
        if out.exists()
        else []
    )
    if foreign:
        raise ConfigError(
            [f"--out {out} holds {foreign[0]}, which is no prepared data: give another --out, or move it away"]
        )


def _kept(out: Path, identity: str) -> Manifest | None:
    """The manifest in `out`, if it was made of the same texts with the same settings and its shards are there."""
    try:
        manifest = Manifest.load(out)
        width = np.dtype(manifest.dtype).itemsize
        for name in SPLITS:
            for shard in getattr(manifest.splits, name).shards:
                if (out / shard.file).stat().st_size != shard.tokens * width:
                    return None
        load_tokenizer(out)
    except (ValueError, OSError):
        return None
    return manifest if manifest.source.identity == identity else None


@contextlib.contextmanager
def _unfinished(part: Path, out: Path) -> Iterator[None]:
    """Make `part` and hold it, so that a second preparation is refused; it goes when the texts prove to be unfit."""
    part.mkdir(parents=True, exist_ok=True)
    number = -1
    try:
        with contextlib.suppress(ImportError):  # Windows has no flock
            import fcntl

            number = os.open(part, os.O_RDONLY)
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(
            [f"--out {out}: another prepare_data.py is writing it: wait for it, or give another --out"]
        ) from None
    except ValueError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        if number >= 0:
            os.close(number)


def _inspected(pool: Pool, files: Sequence[Input], options: Options, name: str) -> tuple[Corpus, Counter[str]]:
    """The documents in `files`, and what cleaning has counted so far. Raises DocumentError naming every bad file."""
    good: list[File] = []
    bad: list[str] = []
    counts: Counter[str] = Counter()
    arguments = ((item.path, item.name, options, item.split) for item in files)
    with Progress("checking", sum(item.path.stat().st_size for item in files)) as progress:
        for item, file in zip(files, pool.map(inspect, arguments), strict=True):
            progress.add(item.path.stat().st_size)
            if isinstance(file, str):
                bad.append(file)
            elif not file.documents:
                counts["empty_files"] += 1
            else:
                good.append(file)
                counts.update(file.counts)
    shown = "\n".join(bad[:20] + ([f"… and {len(bad) - 20} more"] if len(bad) > 20 else []))
    if bad and not options.skip_bad:
        raise DocumentError(
            f"{len(bad)} of {len(files)} files cannot be read:\n{shown}\nmend them, or leave them out with --skip-bad-files"
        )
    if bad:
        print(f"left out:\n{shown}", file=sys.stderr)
        counts["skipped_files"] = len(bad)
    if not good:
        raise DocumentError(
            f"{name}: no text in {'this file' if len(files) == 1 else f'any of these {len(files)} files'}"
        )
    return Corpus(name, good), counts


def _planned(pool: Pool, corpus: Corpus, options: Options, flags: PrepareFlags) -> Work:
    """What becomes of each document; first, where that is asked for, reads all of them to find duplicates."""
    dropped = np.zeros(corpus.documents, dtype=bool)
    if flags.drop_duplicates:
        numbers = []
        with Progress("looking for duplicates", corpus.size) as progress:
            for file, found in zip(corpus.files, pool.map(digests, ((f, options) for f in corpus.files)), strict=True):
                numbers.append(found)
                progress.add(file.size)
        dropped = find_duplicates(corpus, numbers)
    chosen = choose_validation(corpus, flags.val_fraction, dropped)
    roles = np.where(dropped, DROP, np.where(chosen, VAL, TRAIN)).astype(np.uint8)
    if corpus.documents > 1 or chosen.any():
        return Work(corpus, options, roles, ())
    if flags.part != "1/1":
        raise ConfigError([f"--part {flags.part}: one document is split by position, and only as a whole"])
    lengths = list(pool.map(measure, ((tasks, options) for tasks in batches(corpus.tasks()))))
    cut = int(sum(lengths) * (1 - flags.val_fraction))
    if not 0 < cut < sum(lengths):
        raise DocumentError(
            f"{corpus.name}: {sum(lengths)} characters are too little text to train on and to validate with"
        )
    before = np.cumsum([0, *lengths[:-1]])
    return Work(corpus, options, roles, [cut - int(start) for start in before])


def _styles(pool: Pool, corpus: Corpus, flags: PrepareFlags) -> list[str]:
    """The style of each document that --control tells, empty where it tells none; without --control no list at all."""
    if not flags.control:
        return []
    if corpus.documents < 2:
        raise ConfigError([f"--control {flags.control}: there is only one document: leave it out, or add texts"])
    control = Control.read(flags.control)
    names: list[str] = []
    for file, found in zip(corpus.files, pool.map(styles_in, ((file, control) for file in corpus.files)), strict=True):
        names += (found + [""] * file.documents)[: file.documents]
    if not any(names):
        raise ConfigError(
            [f"--control {flags.control}: tells no style of any document (the first is {corpus.files[0].name})"]
        )
    return names


def _state(part: Path, identity: str) -> dict[str, Any]:
    """Where an interrupted preparation of the same texts with the same settings stood; otherwise `part` is emptied."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state: dict[str, Any] = json.loads((part / STATE).read_text(encoding="utf-8"))
        load_tokenizer(part)
        if state["identity"] == identity:
            return state
    for path in part.iterdir():
        path.unlink()
    return {}


def _start(identity: str) -> dict[str, Any]:
    empty = {"shards": [], "bytes": 0, "documents": 0, "open_tokens": 0, "max_id": -1}
    return {"identity": identity, "batches": 0, "counts": {}, "dropped": [], "train": empty, "val": empty}


def _tokenizer_for(flags: PrepareFlags, work: Work, pool: Pool, part: Path, names: Sequence[str]) -> Tokenizer:
    """The tokenizer that `flags` ask for, saved in `part`. A new vocabulary is learned from the training text alone."""
    if flags.tokenizer_from:
        tokenizer = load_tokenizer(flags.tokenizer_from)
        if tokenizer.eot is None and work.corpus.documents > 1:
            print("this tokenizer has no end-of-text: the documents follow each other unmarked", file=sys.stderr)
    elif flags.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer()
    elif flags.tokenizer == "bpe":
        print(f"learning a vocabulary of {flags.vocab_size:,} ids", file=sys.stderr)
        tokenizer = train_bpe(work.training_texts(), flags.vocab_size)
        if tokenizer.vocab_size < flags.vocab_size:
            print(f"the text supports only {tokenizer.vocab_size:,} ids", file=sys.stderr)
    else:
        alphabets = pool.map(alphabet, ((tasks, work.options) for tasks, *_ in work.batches()))
        tokenizer = char_tokenizer(set().union(*alphabets), work.corpus.documents)
    if names:
        if tokenizer.eot is None:
            raise ConfigError([f"--control {flags.control}: this tokenizer has no end-of-text: give another"])
        known = list(tokenizer.styles)
        found = largest(names, work.corpus, work.roles == TRAIN, known, len(names))
        room = style_room(tokenizer)
        if len(found) > room:
            print(
                f"--control {flags.control}: {len(found):,} styles, and room for {room}: the largest get one, the documents "
                "of the others none",
                file=sys.stderr,
            )
        tokenizer = with_styles(tokenizer, found[:room])
    tokenizer.save(part)
    return tokenizer


def _write_shards(
    pool: Pool, work: Work, flags: PrepareFlags, tokenizer: Tokenizer, part: Path, state: dict[str, Any]
) -> tuple[dict[str, ShardWriter], Counter[str]]:
    """Encode everything after `state` into `part`. Raises DocumentError when a split is left without text."""
    writers: dict[str, ShardWriter] = {
        name: ShardWriter(part, name, flags.shard_tokens, tokenizer.dtype) for name in SPLITS
    }
    try:
        for name, writer in writers.items():
            writer.restore(state[name])
    except OSError as error:
        print(f"{part}: {error}: starting anew", file=sys.stderr)
        return _write_shards(pool, work, flags, tokenizer, part, _start(state["identity"]))
    counts, dropped = Counter(state["counts"]), list(state.get("dropped", []))
    where = "gpt2" if tokenizer.kind == "gpt2" and not tokenizer.controls else str(part), tokenizer.fingerprint
    remaining = work.batches(_part(flags))
    skipped = sum(task.size for tasks, *_ in islice(remaining, state["batches"]) for task in tasks)
    arguments = ((tasks, work.options, where, roles, cut, styles) for tasks, roles, cut, styles in remaining)
    saved = time.monotonic()

    def save() -> None:
        for writer in writers.values():
            writer.sync()
        replace_text(part / STATE, json.dumps(state))

    with Progress("encoding", work.corpus.size // _part(flags)[1], skipped) as progress:
        try:
            for number, made in enumerate(pool.map(encode, arguments), state["batches"] + 1):
                for name, writer in writers.items():
                    writer.append(made.tokens[name])
                    writer.bytes += made.bytes[name]
                    writer.documents += made.documents[name]
                counts.update(made.counts)
                dropped += made.dropped
                at = {name: writer.state() for name, writer in writers.items()}
                state = state | {"batches": number, "counts": dict(counts), "dropped": dropped} | at
                progress.add(made.size)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        except (KeyboardInterrupt, OSError):
            with contextlib.suppress(OSError):
                save()
            print("stopped: the same command goes on from here", file=sys.stderr)
            raise
    for name, writer in writers.items():
        writer.close()
        if writer.tokens < 2:
            raise DocumentError(
                f"{work.corpus.name}: too little text: the {'training' if name == 'train' else 'validation'} split got "
                f"{writer.tokens} tokens; add text, or change --val-fraction {flags.val_fraction} or --part {flags.part}"
            )
    if flags.part == "1/1":
        files = [(file.name, file.documents) for file in work.corpus.files]
        Catalogue(files, work.roles == VAL, dropped, shared=bool(work.cuts)).save(part)
    return writers, counts


def join_parts(folders: Sequence[Path], out: Path) -> Manifest:
    """Put prepared folders together into `out`, whole or not at all. Raises ManifestError, ConfigError, OSError."""
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    _refuse_foreign(out)
    with _unfinished(part, out):
        for path in part.iterdir():
            path.unlink()
        begun = time.monotonic()
        manifest = join(folders, part)
        load_tokenizer(folders[0]).save(part)
        _exchange(part, out, old)
    _report(out, manifest, time.monotonic() - begun)
    return manifest


def _exchange(part: Path, out: Path, old: Path) -> None:
    """Put `part` in the place of `out`; one of them is there or, after a crash, in `old`, where the next run finds it."""
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    try:
        part.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    if old.exists():
        shutil.rmtree(old)


def _report(out: Path, manifest: Manifest, seconds: float) -> None:
    train, val = manifest.splits.train, manifest.splits.val
    tokens, size = train.tokens + val.tokens, train.bytes + val.bytes
    print(
        f"{out}: {train.tokens:,} training tokens ({train.documents:,} documents), {val.tokens:,} validation tokens "
        f"({val.documents:,}); {manifest.tokenizer.kind} tokenizer of {manifest.tokenizer.vocab_size:,} ids\n"
        f"{size / 1e6:.1f} MB of text in {seconds:.1f} s: {size / 1e6 / seconds:.1f} MB/s, {tokens / seconds:,.0f} tokens/s",
        file=sys.stderr,
    )
    if manifest.cleaning:
        print(
            ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in manifest.cleaning.items()),
            file=sys.stderr,
        )
