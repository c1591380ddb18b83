"""Texts -> token shards: what `prepare_data.py` does, as functions.

    >>> flags = build(PrepareFlags, {"input": ("novels/",)})
    >>> manifest = prepare(flags, Path("data/novels"))

The folder holds `train_000000.bin` …, `val_000000.bin` … (little-endian uint16, or uint32 beyond 65,536 ids), the
tokenizer and `manifest.json`. It appears atomically: everything is written into a draft folder beside it, where
an interrupted preparation continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from config import ROOT, ConfigError, DataConfig, build, load_config
from corpus import sources
from corpus.documents import TEXT_FIELD, DocumentError, ReadOptions, SourceFile, Unreadable
from corpus.encoding import (
    CUT,
    SKIP,
    TRAIN,
    VAL,
    VOCABULARY_BYTES,
    EncodingPlan,
    distinct_characters,
    encode,
)
from corpus.finder import Corpus, inspect, readable, search, skipped_line
from corpus.out_folder import draft_folder, refuse_foreign, replace_out, restore_old, up_to_date
from corpus.readers.registry import READERS, SUFFIXES
from corpus.sources import InputFile
from corpus.splitting import fitted, split_plan
from corpus.styles import StyleSource, document_styles, largest_styles, style_counts
from corpus.workers import Pool, Progress, run_in_child
from storage.atomic import atomic_write_text
from storage.catalogue import Catalogue
from storage.shards import SPLITS, Manifest, ShardWriter, Source, TokenizerIdentity, join
from tokenizer import Tokenizer, char_tokenizer, gpt2_tokenizer, load_tokenizer, style_room, train_bpe, with_styles

STATE = "state.json"
SMALL_BYTES = 4 << 20  # texts smaller than this are prepared in this process: starting others costs more than it saves
CHILD_BYTES = 1 << 20  # a vocabulary is learned from longer texts in a process that can be left
SLOWEST = 1.2e6  # bytes a second that are read for a vocabulary, at the least
RECIPE = 7  # raise it whenever the same texts and settings give other shards
SAVE_SECONDS = 10.0  # between two saves of the state


class PrepareFlags(DataConfig):
    """Turn texts into token shards."""

    input: tuple[str, ...] = Field(
        (),
        description=f"Files, folders, globs ({', '.join(SUFFIXES)}; the rows of "
        f"{' and '.join(suffix for reader in READERS if reader.has_rows for suffix in reader.suffixes)} by their field "
        f"`text`), or - for standard input.",
    )
    preset: str = ""
    """Take the data settings, and without --input the texts, of this preset."""
    hub: str = ""
    """Take the texts from this data set (OWNER/NAME) on the Hugging Face hub; the same as --source."""
    hub_config: str = ""
    """Its configuration, where it has several."""
    hub_revision: str = "main"
    """Its branch, tag or commit."""
    validate_on: sources.SplitName = "validation"
    """Its split that becomes the validation split; splits that are neither this nor `train` are left out."""
    text_field: str = TEXT_FIELD
    """Field of .jsonl rows, parquet tables and hub data sets that holds the text."""
    out: Path | None = None
    """Folder to write; default: data/ and the preset's or the first input's name."""
    tokenizer_from: Path | None = None
    """Folder of a model or of prepared data whose tokenizer to use instead of --tokenizer."""
    workers: int = Field(0, ge=0, le=1024)
    """Processes; default 0: one a core. The shards do not depend on it."""
    part: str = Field("1/1", pattern=r"^[1-9]\d*/[1-9]\d*$")
    """Prepare only this part of the texts, like 3/8 for the third of eight machines; --join puts the parts together."""
    every: int = Field(1, ge=1)
    """Prepare only every so many-th document, as a sample of texts that are too many."""
    max_bytes: int = Field(0, ge=0)
    """Prepare about this much of the texts: every so many-th document, or the beginning of the longest. 0: all."""
    join: tuple[Path, ...] = ()
    """Instead of texts, put these prepared folders together into --out, which shares their files where it can."""
    footnotes: bool = True
    """Keep footnotes and endnotes, at the end of the text, of formats that tell them from it."""
    skip_bad_files: bool = False
    """Leave out what cannot be read instead of stopping."""
    index: bool = False
    """Also index the training text, so that copied passages can be found (python -m evaluation.originality)."""
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


def prepare(flags: PrepareFlags, out: Path, learning_s: float = 0.0) -> Manifest:
    """Prepare the texts that `flags` name into `out` and return its manifest.

    A folder made from the same texts with the same settings is kept; any other is replaced at the very end. learning_s: seconds
    for reading what a new vocabulary is learned from, 0: no limit. Raises
    ConfigError (what to change in the flags), DocumentError (what is wrong with the texts), OSError.
    """
    begun = time.monotonic()
    restore_old(out)
    refuse_foreign(out)
    with contextlib.ExitStack() as stack:
        # 1 files: which they are, and whether `out` already holds what they give
        files, skipped = _input_files(flags, out, stack)
        settings = _settings(flags)
        identity = _identity(settings, files)
        whole = {name: value for name, value in settings.items() if name != "max_bytes"}
        if (kept := up_to_date(out, identity) or up_to_date(out, _identity(whole, files))) is not None:
            print(f"{out}: already prepared from these texts with these settings", file=sys.stderr)
            return kept
        if flags.tokenizer == "gpt2" and not flags.tokenizer_from:
            gpt2_tokenizer()  # loaded before the workers are forked, so that they have it
        small = sum(item.path.stat().st_size for item in files) < SMALL_BYTES and not flags.workers
        pool = stack.enter_context(Pool(1 if small else flags.workers))

        # 2 documents: every file is checked before any is encoded
        options = _options(flags)
        named = frozenset(Path(item).expanduser().resolve() for item in flags.input)
        corpus, counts = _inspect_files(pool, files, options, _name(flags), skipped, named)
        size = corpus.size

        corpus, every = fitted(corpus, flags.max_bytes)
        if every == 1 and corpus.size == size:
            settings, identity = whole, _identity(whole, files)

        # 3 plan: which documents train, validate or are dropped, and the style of each
        plan = split_plan(
            pool,
            corpus,
            options,
            flags.val_fraction,
            every=max(flags.every, every),
            part=flags.part,
            duplicates=flags.drop_duplicates,
        )
        styles = _document_styles(pool, corpus, flags)

        # 4 tokenizer: the one that the flags request; in a resumed preparation, the one it began with
        draft = stack.enter_context(draft_folder(out))
        state = _saved_state(draft, identity)
        tokenizer = load_tokenizer(draft) if state else _make_tokenizer(flags, plan, pool, draft, styles, learning_s)
        if styles:
            ids = np.array([tokenizer.styles.get(name, -1) for name in styles], dtype=np.int64)
            plan = dataclasses.replace(plan, styles=ids)
            print(style_counts(styles, list(tokenizer.styles)), file=sys.stderr)
        if not state:
            state = _initial_state(identity)
            atomic_write_text(draft / STATE, json.dumps(state))

        # 5 shards
        writers, cleaning = _write_shards(pool, plan, flags, tokenizer, draft, state)
        if _part(flags)[0] == 0:
            cleaning = counts + cleaning  # what was counted file by file counts once, whatever the parts

        # 6 manifest; then the draft takes the place of `out`
        source = Source(name=corpus.name, documents=corpus.documents, settings=settings, identity=identity)
        manifest = _manifest(tokenizer, writers, source, cleaning)
        manifest.save(draft)
        (draft / STATE).unlink()
        replace_out(draft, out)
    _print_summary(out, manifest, time.monotonic() - begun)
    return manifest


def join_parts(folders: Sequence[Path], out: Path) -> Manifest:
    """Put prepared folders together into `out`, atomically. Raises ManifestError, ConfigError, OSError."""
    refuse_foreign(out)
    with draft_folder(out) as draft:
        for path in draft.iterdir():
            path.unlink()
        begun = time.monotonic()
        manifest = join(folders, draft)
        load_tokenizer(folders[0]).save(draft)
        replace_out(draft, out)
    _print_summary(out, manifest, time.monotonic() - begun)
    return manifest


# The files and settings of a preparation


def _input_files(
    flags: PrepareFlags, out: Path, stack: contextlib.ExitStack
) -> tuple[list[InputFile], list[tuple[str, str]]]:
    """The files to read, and those that are skipped, each with its kind.

    Standard input is copied to a file, and archives are unpacked into a folder, that `stack` removes; a hub's data set is
    fetched to its cache.
    """
    skipped: list[tuple[str, str]] = []
    if flags.input:
        unpacked = out.with_name(f".{out.name}.{os.getpid()}.unpacked")
        stack.callback(shutil.rmtree, unpacked, ignore_errors=True)
        found, skipped = search((item for item in flags.input if item != "-"), unpacked, flags.skip_bad_files)
        found += [_save_standard_input(out, stack)] if "-" in flags.input else []
    elif flags.source.endswith(SUFFIXES):
        found = [(path, path.name) for path in sorted(ROOT.glob(flags.source))]
        if not found:
            raise ConfigError([f"there is no {flags.source} in {ROOT}: put your texts there, or give --input PATH"])
    elif not flags.source:
        raise ConfigError(
            ["nothing to prepare: give --input PATH… (files, folders or - ), --preset NAME or --hub NAME"]
        )
    elif sources.is_corpus(flags.source):
        selection = sources.HubSelection(
            config=flags.hub_config, revision=flags.hub_revision, validate_on=flags.validate_on
        )
        try:
            return sources.fetch(flags.source, selection), skipped
        except sources.Unreachable as error:
            raise sources.Unreachable(f"{error}; with files of your own: `{own_texts_command(flags, out)}`") from None
    else:
        raise ConfigError([f"--source {flags.source}: give {', '.join(sources.NAMED)} or OWNER/NAME, or --input PATH"])
    return sources.label_splits(found, flags.validate_on), skipped


def own_texts_command(flags: PrepareFlags, out: Path) -> str:
    """The command that goes on with the user's files where the texts of `flags` cannot be had."""
    words = ["python", "prepare_data.py", *(("--preset", flags.preset) if flags.preset else ())]
    words += ["--input", "my_books/", *(() if flags.preset else ("--tokenizer", flags.tokenizer))]
    if not flags.preset or out != default_out(flags.preset):
        words += ["--out", str(out)]
    return shlex.join(words)


def _save_standard_input(out: Path, stack: contextlib.ExitStack) -> tuple[Path, str]:
    """(a file beside `out` with all of standard input, the name it is known by); `stack` removes the file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.{os.getpid()}.stdin")
    stack.callback(path.unlink, missing_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while data := sys.stdin.buffer.read(1 << 20):
            digest.update(data)
            file.write(data)
    os.utime(path, ns=(0, 0))  # the same text is the same file, whenever it came
    return path, f"standard input {digest.hexdigest()}"


def _name(flags: PrepareFlags) -> str:
    return ", ".join(readable(Path(item).name or item) for item in flags.input) or flags.source


def _options(flags: PrepareFlags) -> ReadOptions:
    first, _, last = flags.years.partition("-")
    return ReadOptions(
        **flags.model_dump(include=set(ReadOptions.__dataclass_fields__) - {"years"}),
        skip_bad=flags.skip_bad_files,
        field=flags.text_field,
        books=not flags.input and sources.is_books(flags.source),
        years=(int(first), int(last)) if flags.years else None,
    )


def _settings(flags: PrepareFlags) -> dict[str, Any]:
    """The settings that the shards depend on, as the manifest keeps them."""
    names = {"val_fraction", "shard_tokens", "drop_duplicates"}
    settings = flags.model_dump(include=names) | vars(_options(flags))
    settings |= {"recipe": RECIPE, "tokenizer": flags.tokenizer}
    if flags.tokenizer_from:
        settings["tokenizer"] = load_tokenizer(flags.tokenizer_from).fingerprint
    elif flags.tokenizer == "bpe":
        settings["vocab_size"] = flags.vocab_size
    if flags.control:
        settings["control"] = vars(StyleSource.read(flags.control))
    settings |= {"every": flags.every} if flags.every > 1 else {}
    settings |= {"max_bytes": flags.max_bytes} if flags.max_bytes else {}
    return settings if _part(flags) == (0, 1) else settings | {"part": flags.part}


def _part(flags: PrepareFlags) -> tuple[int, int]:
    """`--part` as (which part, from 0, of how many)."""
    part, parts = map(int, flags.part.split("/"))
    if part > parts:
        raise ConfigError([f"--part {flags.part}: there are only {parts} parts: give 1/{parts} to {parts}/{parts}"])
    return part - 1, parts


def _identity(settings: dict[str, Any], files: Iterable[InputFile]) -> str:
    """sha256 (hex) of the settings and of each file's name, split, size and version."""
    facts = [
        (item.name, item.split, item.path.stat().st_size, item.version or item.path.stat().st_mtime_ns)
        for item in files
    ]
    return hashlib.sha256(json.dumps([settings, facts], sort_keys=True).encode()).hexdigest()


# The documents in the files, and what becomes of each


def _inspect_files(
    pool: Pool,
    files: Sequence[InputFile],
    options: ReadOptions,
    name: str,
    skipped: Sequence[tuple[str, str]] = (),
    named: Collection[Path] = (),
) -> tuple[Corpus, Counter[str]]:
    """The documents in `files`, and what cleaning has counted so far. Raises DocumentError naming every bad file.

    skipped: files that are no texts, with their kind, which are named beside those that cannot be read.
    named: files that the user asked for by name, and that are not skipped.
    """
    left_out = list(skipped)
    good: list[SourceFile] = []
    bad: list[str] = []
    counts: Counter[str] = Counter()
    arguments = ((item.path, item.name, options, item.split) for item in files)
    with Progress("checking", sum(item.path.stat().st_size for item in files)) as progress:
        for item, file in zip(files, pool.map(inspect, arguments), strict=True):
            progress.add(item.path.stat().st_size)
            if isinstance(file, Unreadable) and file.kind and len(files) > 1 and item.path.resolve() not in named:
                left_out.append((item.name, file.kind))
                counts["skipped_files"] += 1
                print(file, file=sys.stderr)
            elif isinstance(file, str):
                bad.append(file)
            elif not file.documents:
                counts["empty_files"] += 1
                left_out.append((item.name, "empty"))
            else:
                good.append(file)
                counts.update(file.counts)
                _tell_books(file)
    shown = "\n".join(bad[:20] + ([f"… and {len(bad) - 20} more"] if len(bad) > 20 else []))
    if bad and not options.skip_bad:
        raise DocumentError(
            f"{len(bad)} of {len(files)} files cannot be read:\n{shown}\nfix them, or leave them out with --skip-bad-files"
        )
    if bad:
        print(f"left out:\n{shown}", file=sys.stderr)
        counts["skipped_files"] += len(bad)
    if left_out:
        print(skipped_line(len(good), left_out), file=sys.stderr)
    if not good:
        raise DocumentError(
            f"{name}: no text in {'this file' if len(files) == 1 else f'any of these {len(files)} files'}"
        )
    return Corpus(name, good), counts


def _tell_books(file: SourceFile) -> None:
    """Say of a file what its licences did to it, where that is not usual."""
    if file.counts.get("licences_kept"):
        print(f"{file.name}: left whole: cutting at its licence marks would leave nearly nothing", file=sys.stderr)
    elif (books := file.counts.get("books_in_shared_files", 0)) and not file.has_rows:
        print(f"{file.name}: {books} books", file=sys.stderr)


def _document_styles(pool: Pool, corpus: Corpus, flags: PrepareFlags) -> list[str]:
    """The style of each document by --control, empty where unknown; an empty list without --control."""
    if not flags.control:
        return []
    if corpus.documents < 2:
        raise ConfigError([f"--control {flags.control}: there is only one document: leave it out, or add texts"])
    control = StyleSource.read(flags.control)
    names: list[str] = []
    arguments = ((file, control) for file in corpus.files)
    for file, found in zip(corpus.files, pool.map(document_styles, arguments), strict=True):
        names += (found + [""] * file.documents)[: file.documents]
    if not any(names):
        raise ConfigError(
            [f"--control {flags.control}: gives no document a style (the first document is {corpus.files[0].name})"]
        )
    return names


# The tokenizer


def _make_tokenizer(
    flags: PrepareFlags, plan: EncodingPlan, pool: Pool, draft: Path, styles: Sequence[str], learning_s: float
) -> Tokenizer:
    """The tokenizer that `flags` request, saved in `draft`. A new vocabulary is learned from the training text alone."""
    if flags.tokenizer_from:
        tokenizer = load_tokenizer(flags.tokenizer_from)
        if tokenizer.eot is None and plan.corpus.documents > 1:
            print("this tokenizer has no end-of-text: the documents follow each other unmarked", file=sys.stderr)
    elif flags.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer()
    elif flags.tokenizer == "bpe":
        print(f"learning a vocabulary of {flags.vocab_size:,} ids", file=sys.stderr)
        if plan.corpus.size > CHILD_BYTES:
            run_in_child("learning a vocabulary", learn_vocabulary, plan, flags.vocab_size, draft, learning_s)
        else:
            learn_vocabulary(plan, flags.vocab_size, draft, learning_s)
        tokenizer = load_tokenizer(draft)
        if tokenizer.vocab_size < flags.vocab_size:
            print(
                f"the text is too short for that many: the vocabulary has {tokenizer.vocab_size:,} ids", file=sys.stderr
            )
    else:
        alphabets = pool.map(distinct_characters, ((chunks, plan.options) for chunks, *_ in plan.batches()))
        tokenizer = char_tokenizer(set().union(*alphabets), plan.corpus.documents)
    if styles:
        tokenizer = _with_style_ids(tokenizer, flags, plan, styles)
    tokenizer.save(draft)
    return tokenizer


def learn_vocabulary(plan: EncodingPlan, vocab_size: int, folder: Path, seconds: float = 0.0) -> None:
    """Learn a vocabulary from the training text, or from what is read of it in so many seconds, and save it in `folder`."""
    # taken evenly, as much as a slow machine reads; the clock would cut off the last texts
    most = min(VOCABULARY_BYTES, SLOWEST * seconds) if seconds else VOCABULARY_BYTES
    train_bpe(_in_time(plan.training_texts(most), seconds), vocab_size).save(folder)


def _in_time(texts: Iterable[str], seconds: float) -> Iterator[str]:
    """`texts`, until `seconds` are over where they are not 0."""
    begun, read = time.monotonic(), 0
    for text in texts:
        yield text
        read += len(text)
        if 0 < seconds < time.monotonic() - begun:
            print(f"its time is over: learned from {read / 1e6:,.1f} million characters", file=sys.stderr)
            return


def _with_style_ids(tokenizer: Tokenizer, flags: PrepareFlags, plan: EncodingPlan, styles: Sequence[str]) -> Tokenizer:
    """`tokenizer` with control ids for the styles of the training documents, as many as it has room for."""
    if tokenizer.eot is None:
        raise ConfigError([f"--control {flags.control}: this tokenizer has no end-of-text: give another"])
    found = largest_styles(styles, plan.corpus, np.isin(plan.roles, (TRAIN, CUT)), list(tokenizer.styles), len(styles))
    room = style_room(tokenizer)
    if len(found) > room:
        print(
            f"--control {flags.control}: {len(found):,} styles, and room for {room}: the largest get one, the documents "
            "of the others none",
            file=sys.stderr,
        )
    return with_styles(tokenizer, found[:room])


# The shards, with a state from which an interrupted preparation continues


def _saved_state(draft: Path, identity: str) -> dict[str, Any]:
    """The state of an interrupted preparation of the same texts and settings; otherwise {}, and `draft` is emptied."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state: dict[str, Any] = json.loads((draft / STATE).read_text(encoding="utf-8"))
        load_tokenizer(draft)
        if state["identity"] == identity:
            return state
    for path in draft.iterdir():
        path.unlink()
    return {}


def _initial_state(identity: str) -> dict[str, Any]:
    empty = {"shards": [], "bytes": 0, "documents": 0, "open_tokens": 0, "max_id": -1}
    return {"identity": identity, "batches": 0, "counts": {}, "dropped": [], "train": empty, "val": empty}


def _write_shards(
    pool: Pool, plan: EncodingPlan, flags: PrepareFlags, tokenizer: Tokenizer, draft: Path, state: dict[str, Any]
) -> tuple[dict[str, ShardWriter], Counter[str]]:
    """Encode everything after `state` into `draft`. Raises DocumentError when a split is left without text."""
    writers: dict[str, ShardWriter] = {
        name: ShardWriter(draft, name, flags.shard_tokens, tokenizer.dtype) for name in SPLITS
    }
    try:
        for name, writer in writers.items():
            writer.restore(state[name])
    except OSError as error:
        print(f"{draft}: {error}: starting again", file=sys.stderr)
        return _write_shards(pool, plan, flags, tokenizer, draft, _initial_state(state["identity"]))

    # the batches after those that are already written
    where = "gpt2" if tokenizer.kind == "gpt2" and not tokenizer.controls else str(draft), tokenizer.fingerprint
    remaining = plan.batches(_part(flags))
    done = sum(chunk.size for chunks, *_ in islice(remaining, state["batches"]) for chunk in chunks)
    arguments = ((chunks, plan.options, where, roles, cut, styles) for chunks, roles, cut, styles in remaining)

    def save() -> None:
        for writer in writers.values():
            writer.sync()
        atomic_write_text(draft / STATE, json.dumps(state))

    # encoded by the workers, written here in order
    counts, dropped = Counter(state["counts"]), list(state.get("dropped", []))
    saved = time.monotonic()
    with Progress("encoding", plan.corpus.size // _part(flags)[1], done) as progress:
        try:
            for number, encoded in enumerate(pool.map(encode, arguments), state["batches"] + 1):
                for name, writer in writers.items():
                    writer.append(encoded.tokens[name])
                    writer.bytes += encoded.bytes[name]
                    writer.documents += encoded.documents[name]
                counts.update(encoded.counts)
                dropped += encoded.dropped
                at = {name: writer.state() for name, writer in writers.items()}
                state = state | {"batches": number, "counts": dict(counts), "dropped": dropped} | at
                progress.add(encoded.size)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        except (KeyboardInterrupt, OSError):
            with contextlib.suppress(OSError):
                save()
            print("stopped: run the same command to resume", file=sys.stderr)
            raise

    for name, writer in writers.items():
        writer.close()
        if writer.tokens < 2:
            raise DocumentError(
                f"{plan.corpus.name}: too little text: the {'training' if name == 'train' else 'validation'} split got "
                f"{writer.tokens} tokens; add text, or change --val-fraction {flags.val_fraction} or --part {flags.part}"
            )
    if flags.part == "1/1":
        files = [(file.name, file.documents) for file in plan.corpus.files]
        facts = {file.name: file.facts for file in plan.corpus.files if file.facts}
        dropped = sorted({*dropped, *np.flatnonzero(plan.roles == SKIP).tolist()})
        Catalogue(
            files, plan.roles == VAL, dropped, shared=np.flatnonzero(plan.roles == CUT).tolist(), facts=facts
        ).save(draft)
    return writers, counts


def _manifest(
    tokenizer: Tokenizer, writers: dict[str, ShardWriter], source: Source, cleaning: Counter[str]
) -> Manifest:
    identity = TokenizerIdentity(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        styles=tokenizer.styles,
    )
    return Manifest.model_validate(
        {
            "tokenizer": identity,
            "dtype": np.dtype(tokenizer.dtype).name,
            "splits": {name: writer.result() for name, writer in writers.items()},
            "source": source,
            "cleaning": dict(sorted(cleaning.items())),
            "max_id": max(writer.max_id for writer in writers.values()),
        }
    )


def _print_summary(out: Path, manifest: Manifest, seconds: float) -> None:
    train, val = manifest.splits.train, manifest.splits.val
    tokens, size = train.tokens + val.tokens, train.bytes + val.bytes
    print(
        f"{out}: {train.tokens:,} training tokens ({train.documents:,} documents), {val.tokens:,} validation tokens "
        f"({val.documents:,}, {val.bytes / max(1, size):.0%} of the text); {manifest.tokenizer.kind} tokenizer of {manifest.tokenizer.vocab_size:,} ids\n"
        f"{size / 1e6:.1f} MB of text in {seconds:.1f} s: {size / 1e6 / seconds:.1f} MB/s, {tokens / seconds:,.0f} tokens/s",
        file=sys.stderr,
    )
    if manifest.cleaning:
        print(
            ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in manifest.cleaning.items()),
            file=sys.stderr,
        )
