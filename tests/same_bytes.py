"""Whether two revisions behave alike, byte for byte: the proof that a refactor changed nothing.

python tests/same_bytes.py HEAD~3 .                          # record both, compare; `.` is the working tree as it is
python tests/same_bytes.py record HEAD --out /tmp/before     # the slow half once, …
python tests/same_bytes.py record . --out /tmp/after
python tests/same_bytes.py compare /tmp/before /tmp/after    # … then as often as needed

Each job runs the commands of a revision (prepare_data.py, train.py, generate.py, api.py) in a temporary git worktree and
keeps their results as text files, one folder a job; `diff -r` shows two recordings in full. What no two runs share is
replaced by a word in angle brackets: clock values, temporary paths, and the ids and times of creation that the server
makes up. Recordings compare only when they come from one machine and one set of packages. Exit code 0: the same, 1:
something differs or a job failed, 2: bad arguments. Differences of the OpenAPI document are listed and count only with
--strict.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
RECORD = "recording.json"  # what was recorded, of which revision, with which packages
MODEL = "models/victorian-mini"
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "fastapi", "pydantic")
QUIET = ("--train.device", "cpu", "--train.no-tensorboard")
COMMAND_S = 300  # seconds a command may take
SERVER_S = 90  # seconds a server may take to load its model
CLOCK = re.compile(r'"(\w+_s|mfu|seconds_per_batch|gpu_memory_gb)": [-+.\de]+')  # what depends on the machine's pace
MADE_UP = (  # in the server's answers
    (re.compile(r'"id":"cmpl-[0-9a-f]{32}"'), '"id":"cmpl-<id>"'),
    (re.compile(r'"created":\d{10}\b'), '"created":<time>'),
    (re.compile(r'"uptime_s":\d+\.\d+'), '"uptime_s":<time>'),
)


class JobFailed(RuntimeError):
    """A command failed or took too long; the message says which, and how its output ended."""


class JobSkipped(RuntimeError):
    """A job's texts are not on this machine; the message names the flag that says where they are."""


@dataclass
class Place:
    """One revision being recorded: its source tree, a scratch folder, and the texts to work on."""

    tree: Path
    scratch: Path
    shakespeare: Path
    novels: Path

    def run(self, *words: str | Path) -> str:
        """Standard output of `python WORDS…` in the tree. Raises JobFailed."""
        with self.started(words, stdout=subprocess.PIPE) as (process, errors):
            try:
                output, _ = process.communicate(timeout=COMMAND_S)
            except subprocess.TimeoutExpired:
                raise JobFailed(f"{spoken(words)}: not done after {COMMAND_S} s") from None
            if process.returncode:
                raise JobFailed(f"{spoken(words)}: exit code {process.returncode}\n{tail(errors)}")
        return self.placeless(output.decode())

    @contextlib.contextmanager
    def started(self, words: Sequence[str | Path], **given: Any) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """(process, file with its standard error) of `python WORDS…`; all that it started is ended on the way out."""
        errors = self.scratch / "stderr.txt"
        with errors.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=self.tree,
                env=environment(self.scratch),
                stdin=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
                **given,
            )
        try:
            yield process, errors
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its processes, which are in sessions of their own
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def placeless(self, text: str) -> str:
        """`text` without the paths of this recording."""
        return text.replace(str(self.tree), "<tree>").replace(str(self.scratch), "<scratch>")

    @cached_property
    def sample_run(self) -> Path:
        """The run folder of 40 steps on the sample stories."""
        run = self.scratch / "runs" / "sample"
        self.run("train.py", "--preset", "sample", "--train.max-steps", "40", "--train.device", "cpu", "--out", run)
        return run


def environment(scratch: Path) -> dict[str, str]:
    """One thread, no network, and nothing of the caller's settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}
    return kept | fixed | {"TMPDIR": str(scratch)}


def spoken(words: Sequence[str | Path]) -> str:
    return " ".join(["python", *map(str, words)])


def tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def timeless(text: str) -> str:
    """JSON with `<clock>` for what depends on the machine's pace."""
    return CLOCK.sub(r'"\1": "<clock>"', text)


def run_results(run: Path) -> dict[str, str]:
    """What training left in its run folder."""
    weights = [f"{name}/model.safetensors" for name in ("best", "last")]
    samples = run / "samples.jsonl"
    return {
        "weights.txt": "".join(f"{sha256(run / name)}  {name}\n" for name in weights),
        "metrics.jsonl": timeless((run / "metrics.jsonl").read_text(encoding="utf-8")),
        "samples.jsonl": samples.read_text(encoding="utf-8") if samples.exists() else "",
    }


def train_sample(place: Place) -> dict[str, str]:
    """40 steps of preset `sample`."""
    return run_results(place.sample_run)


def train_shakespeare(place: Place) -> dict[str, str]:
    """40 steps of preset `shakespeare-char`, which writes every 20."""
    if not place.shakespeare.is_file():
        raise JobSkipped(f"there is no {place.shakespeare}: give --shakespeare FILE")
    preset = ("--preset", "shakespeare-char")
    data, run = place.scratch / "data" / "shakespeare", place.scratch / "runs" / "shakespeare"
    place.run("prepare_data.py", *preset, "--input", place.shakespeare, "--tokenizer", "char", "--out", data)
    steps = ("--train.max-steps", "40", "--train.sample-interval", "20", "--train.log-interval", "10")
    place.run("train.py", *preset, "--data", data, "--out", run, *steps, *QUIET)
    return run_results(run)


def train_two_processes(place: Place) -> dict[str, str]:
    """20 steps of a tiny model under two gloo processes, with dropout and gradient accumulation."""
    data, run = place.scratch / "data" / "two", place.scratch / "runs" / "two"
    story = "data/sample/the_fog_on_the_river.txt"
    place.run("prepare_data.py", "--input", story, "--tokenizer", "char", "--out", data)
    shape = {"n-layer": 2, "n-head": 2, "n-embd": 32, "block-size": 32, "dropout": 0.1, "vocab-size": 0}
    steps = {"batch-size": 4, "tokens-per-step": 512, "max-steps": 20, "warmup-steps": 2, "log-interval": 1}
    steps |= {"eval-interval": 5, "sample-interval": 0}
    flags = [f"--model.{name}={value}" for name, value in shape.items()]
    flags += [f"--train.{name}={value}" for name, value in steps.items()]
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    place.run(*launch, "train.py", "--data", data, "--out", run, *flags, *QUIET)
    return run_results(run)


def prepare_novels(place: Place) -> dict[str, str]:
    """The three smallest novels as shards, with GPT-2's tokenizer and with one trained on them."""
    novels = sorted(place.novels.glob("*.txt"), key=lambda path: (path.stat().st_size, path.name))[:3]
    if len(novels) < 3:
        raise JobSkipped(f"there are no three novels (*.txt) in {place.novels}: give --novels FOLDER")
    texts = place.scratch / "novels"
    texts.mkdir()
    for novel in novels:
        copy = shutil.copyfile(novel, texts / novel.name)
        os.utime(copy, (1_000_000_000, 1_000_000_000))  # the manifest's identity holds the time of change
    results = {}
    for name, flags in {"gpt2": ["--index"], "bpe": ["--tokenizer", "bpe", "--vocab-size", "1024"]}.items():
        out = place.scratch / "data" / name
        place.run("prepare_data.py", "--input", texts, "--out", out, *flags)
        files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json")
        results[f"{name}-files.txt"] = "".join(f"{sha256(path)}  {path.relative_to(out)}\n" for path in files)
        results[f"{name}-manifest.json"] = place.placeless((out / "manifest.json").read_text(encoding="utf-8"))
    return results


PROMPT = "The old house stood"
TEXTS: dict[str, tuple[str, ...]] = {
    "greedy": ("--temperature", "0", "--repetition-penalty", "1"),
    "top-k": ("--temperature", "1.2", "--top-k", "7", "--top-p", "1"),
    "top-p": ("--temperature", "1.5", "--top-k", "0", "--top-p", "0.7", "--dtype", "float32"),
    "min-p": ("--temperature", "1.3", "--top-k", "0", "--top-p", "1", "--min-p", "0.05"),
    "repetition-penalty": ("--temperature", "1", "--repetition-penalty", "1.9", "--dtype", "int8"),
    "three": ("--n", "3", "--temperature", "1"),
    "stop": ("--stop", " and", "--stop", ".", "--max-tokens", "200"),
    "style": ("--style", "dickens:0.7,eliot:0.3"),
    "past-the-context": ("--max-tokens", "300", "--keep", "16"),
    "json": ("--json", "--n", "2", "--temperature", "1.3"),
}
OWN_TEXTS: dict[str, tuple[str, ...]] = {
    "own-greedy": ("--temperature", "0"),
    "own-sampled": ("--temperature", "1.1", "--min-p", "0.02", "--n", "2"),
}


def write_texts(place: Place) -> dict[str, str]:
    """generate.py with the model in the repository, each text with other settings, and with the one just trained."""
    results = {}
    for model, texts in {MODEL: TEXTS, str(place.sample_run / "best"): OWN_TEXTS}.items():
        for name, flags in texts.items():
            length = () if "--max-tokens" in flags else ("--max-tokens", "60")
            words = ("--model", model, "--device", "cpu", "--prompt", PROMPT, "--seed", "7", *length, *flags)
            text = place.run("generate.py", *words)
            results[f"{name}.txt"] = timeless(text) if "--json" in flags else text
    return results


@contextlib.contextmanager
def server(place: Place) -> Iterator[httpx.Client]:
    """A client of an api.py that has loaded its model; the server ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ("api.py", "--model", MODEL, "--device", "cpu", "--port", str(port), "--log-level", "warning")
    address = f"http://127.0.0.1:{port}"
    with (
        place.started(words, stdout=subprocess.DEVNULL) as (process, errors),
        httpx.Client(base_url=address, timeout=60, trust_env=False, headers={"Accept-Encoding": "identity"}) as client,
    ):
        end = time.monotonic() + SERVER_S
        while not healthy(client):
            if process.poll() is not None or time.monotonic() > end:
                raise JobFailed(f"{spoken(words)}: no answer at {address}/health\n{tail(errors)}")
            time.sleep(0.1)
        yield client
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            raise JobFailed(f"{spoken(words)}: still there 30 s after SIGTERM\n{tail(errors)}") from None


def healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


SETTINGS = {"prompt": PROMPT, "max_tokens": 30, "temperature": 1.2, "seed": 11}
BATCH = {"prompts": [PROMPT, "My dear Sister,", ""], "max_tokens": 30, "temperature": 1.2, "seed": 11, "n": 2}
REQUESTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "health": ("/health", None),
    "models": ("/v1/models", None),
    "generate": ("/generate", {**SETTINGS, "n": 2}),
    "generate-style": ("/generate", {**SETTINGS, "style": "dickens:0.7,eliot:0.3"}),
    "generate-defaults": ("/generate", {"prompt": PROMPT, "seed": 3, "max_length": 20, "stop": "."}),
    "generate-stream": ("/generate", {**SETTINGS, "stream": True, "request_id": "stream"}),
    "generate-batch": ("/generate/batch", BATCH),
    "invocations-stream": ("/invocations", {**SETTINGS, "stream": True, "top_k": 5}),
    "completions": ("/v1/completions", {**SETTINGS, "logprobs": 3, "echo": True, "n": 2, "top_p": 0.9}),
    "completions-batch": ("/v1/completions", {**SETTINGS, "prompt": [PROMPT, "It was"], "min_p": 0.05}),
    "completions-stream": (
        "/v1/completions",
        {**SETTINGS, "stream": True, "logprobs": 2, "echo": True, "stream_options": {"include_usage": True}},
    ),
    "score": ("/v1/score", {"text": "The old house stood upon a hill.", "top": 3}),
    "bad-value": ("/generate", {**SETTINGS, "temperature": 9}),
    "bad-style": ("/generate", {**SETTINGS, "style": "nobody"}),
    "bad-model": ("/v1/completions", {**SETTINGS, "model": "another"}),
    "bad-path": ("/nowhere", None),
}
MESSAGES: list[dict[str, Any]] = [
    {"action": "ping"},
    {"action": "generate", "request_id": "one", **SETTINGS},
    {"action": "generate", "request_id": "two", **SETTINGS, "n": 2, "temperature": 0.7, "stop": [","]},
    {"action": "generate", "request_id": "three", **SETTINGS, "top_k": -1},
    {"action": "stop", "request_id": "nobody"},
]


def ask_server(place: Place) -> dict[str, str]:
    """Every kind of answer over HTTP, and a conversation over the WebSocket."""
    results = {}
    with server(place) as client:
        for name, (path, body) in REQUESTS.items():
            headers = {"X-Request-ID": name}
            answer = (
                client.get(path, headers=headers) if body is None else client.post(path, headers=headers, json=body)
            )
            results[f"{name}.txt"] = whole_answer(answer)
        lines = []
        with connect(f"ws://{client.base_url.netloc.decode()}/ws", proxy=None) as channel:
            for message in MESSAGES:
                channel.send(json.dumps(message))
                lines.append(f"> {json.dumps(message)}")
                while lines[-1].startswith(">") or json.loads(lines[-1][2:])["type"] in ("started", "token"):
                    lines.append(f"< {channel.recv(timeout=60)}")
        results["websocket.txt"] = "\n".join(lines) + "\n"
    return results


def whole_answer(answer: httpx.Response) -> str:
    """Status, headers and body as they came, but for what the server makes up."""
    body = answer.content.decode()
    for pattern, word in MADE_UP:
        body = pattern.sub(word, body)
    headers = {name: value for name, value in sorted(answer.headers.items()) if name != "date"}
    if body != answer.content.decode():
        headers.pop("content-length", None)  # of an uptime of 9.9 or 10.1 seconds
    lines = [str(answer.status_code), *(f"{name}: {value}" for name, value in headers.items()), "", body]
    return "\n".join(lines)


def openapi(place: Place) -> dict[str, str]:
    """The server's description of itself."""
    with server(place) as client:
        return {"openapi.json": pretty(client.get("/openapi.json").raise_for_status().json())}


JOBS: dict[str, Callable[[Place], dict[str, str]]] = {
    "sample": train_sample,
    "shakespeare": train_shakespeare,
    "two-processes": train_two_processes,
    "shards": prepare_novels,
    "texts": write_texts,
    "server": ask_server,
    "openapi": openapi,
}


@contextlib.contextmanager
def source_tree(revision: str, scratch: Path) -> Iterator[tuple[Path, str]]:
    """(folder, description) of a revision: a temporary worktree, or for `.` a copy of the working tree as it is now.

    The copy leaves out what git ignores: texts prepared by an older state would hide what has become of preparing.
    """
    tree = scratch / "tree"
    if revision == ".":
        for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
            if name and os.path.lexists(ROOT / name):  # not what was deleted
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
        yield tree, git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
        return
    git("worktree", "add", "--quiet", "--detach", str(tree), revision)
    try:
        yield tree, git("rev-parse", f"{revision}^{{commit}}")
    finally:
        git("worktree", "remove", "--force", str(tree))


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(words)}: {done.stderr.strip() or 'there is no such revision'}")
    return done.stdout.strip()


def record(revision: str, out: Path, args: argparse.Namespace) -> bool:
    """Run the jobs of a revision and write their results into `out`; whether all succeeded."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: not empty: give another folder, or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as name, contextlib.ExitStack() as stack:
        scratch = Path(name).resolve()
        tree, commit = stack.enter_context(source_tree(revision, scratch))
        place = Place(tree, scratch, args.shakespeare.resolve(), args.novels.resolve())
        say(f"recording {revision} ({commit[:12]}) into {out}")
        states = {job: run_job(job, place, out) for job in args.only}
    about: dict[str, Any] = {"revision": revision, "commit": commit, "python": sys.version.split()[0]}
    about["packages"] = {name: version(name) for name in PACKAGES}
    (out / RECORD).write_text(pretty(about | {"jobs": states}), encoding="utf-8")
    return "failed" not in states.values()


def run_job(name: str, place: Place, out: Path) -> str:
    """`done`, `skipped` or `failed`; the results of a job that is done are in `out`/NAME."""
    began = time.monotonic()
    try:
        results = JOBS[name](place)
    except JobSkipped as reason:
        say(f"  {name:<14} skipped: {reason}")
        return "skipped"
    except (JobFailed, OSError, httpx.HTTPError, WebSocketException, ValueError, KeyError) as error:
        say(f"  {name:<14} failed: {error if isinstance(error, JobFailed) else repr(error)}")
        return "failed"
    folder = out / name
    folder.mkdir(exist_ok=True)
    for file, text in results.items():
        (folder / file).write_bytes(text.encode())
    say(f"  {name:<14} {time.monotonic() - began:5.1f} s")
    return "done"


def compare(old: Path, new: Path, args: argparse.Namespace) -> bool:
    """Print one line a job; whether all that count are the same."""
    abouts = [read_about(folder) for folder in (old, new)]
    for key in ("python", "packages"):
        if abouts[0][key] != abouts[1][key]:
            say(f"note: recorded with different {key}: {abouts[0][key]} and {abouts[1][key]}")
    if not any(job in about["jobs"] for job in args.only for about in abouts):
        raise ValueError(f"{old} and {new} hold none of the jobs {', '.join(args.only)}")
    same = True
    for job in args.only:
        states = [about["jobs"].get(job, "not recorded") for about in abouts]
        if states == ["not recorded"] * 2:
            continue
        if states == ["skipped"] * 2:
            print(f"{job:<14} skipped in both")
        elif states != ["done"] * 2:
            same = False
            print(f"{job:<14} differs: {states[0]} in {old}, {states[1]} in {new}")
        elif job == "openapi":
            found = openapi_differences(*(json.loads((f / job / "openapi.json").read_bytes()) for f in (old, new)))
            print(f"{job:<14} {f'differs: {len(found)} places' if found else 'same'}")
            for line in found:
                print(f"    {line}")
            same = same and not (found and args.strict)
        else:
            found = folder_differences(old / job, new / job)
            more = f" (and {len(found) - 1} more of its files)" if len(found) > 1 else ""
            print(f"{job:<14} {f'differs: {found[0]}{more}' if found else 'same'}")
            same = same and not found
    return same


def read_about(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        return about
    except OSError as error:
        raise ValueError(f"{folder} is no complete recording: {error.strerror}: {RECORD}") from None


def folder_differences(old: Path, new: Path) -> list[str]:
    """For each file that differs its first differing place."""
    found = []
    for name in sorted({path.name for folder in (old, new) for path in folder.iterdir()}):
        holders = [folder for folder in (old, new) if (folder / name).exists()]
        texts = [(folder / name).read_bytes().decode() for folder in holders]
        if len(texts) == 1:
            found.append(f"{name}: only in {holders[0]}")
        elif texts[0] != texts[1]:
            found.append(f"{name}, {first_difference(texts[0], texts[1])}")
    return found


def first_difference(old: str, new: str) -> str:
    """Line and column where two texts part, and how each goes on from a little before it."""
    for number, (a, b) in enumerate(zip_longest(old.split("\n"), new.split("\n")), 1):
        if a == b:
            continue
        if a is None or b is None:
            return f"line {number}: {'ended' if a is None else excerpt(a)} | {'ended' if b is None else excerpt(b)}"
        column = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        begin = max(0, column - 20)
        return f"line {number}, column {column + 1}: {excerpt(a[begin:])} | {excerpt(b[begin:])}"
    raise ValueError("the texts do not differ")


def excerpt(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:59] + "…")


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:99] + "…"


def openapi_differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Every place where two JSON values differ, as a path and what became of it."""
    if type(old) is type(new) and isinstance(old, dict | list):
        pairs = [dict(enumerate(value)) if isinstance(value, list) else value for value in (old, new)]
        found = []
        for key in [*pairs[0], *(key for key in pairs[1] if key not in pairs[0])]:
            inner = f"{place} > {key}" if place else str(key)
            if key not in pairs[1]:
                found.append(f"{inner}: removed: {shown(pairs[0][key])}")
            elif key not in pairs[0]:
                found.append(f"{inner}: added: {shown(pairs[1][key])}")
            else:
                found += openapi_differences(pairs[0][key], pairs[1][key], inner)
        if not found and list(pairs[0]) != list(pairs[1]):
            found.append(f"{place}: another order: {shown(list(pairs[0]))} -> {shown(list(pairs[1]))}")
        return found
    same = type(old) is type(new) and old == new
    return [] if same else [f"{place}: {shown(old)} -> {shown(new)}"]


def record_and_compare(old: str, new: str, args: argparse.Namespace) -> bool:
    """Two revisions; the recordings are kept where --out says, and otherwise when they differ."""
    for revision in {old, new} - {"."}:
        git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")  # before minutes are spent on the other
    home = args.out or Path(tempfile.mkdtemp(prefix="same-bytes-recorded-"))
    folders = home / "a", home / "b"
    complete = [record(revision, folder, args) for revision, folder in zip((old, new), folders, strict=True)]
    same = compare(*folders, args) and all(complete)
    if same and not args.out:
        shutil.rmtree(home)
    else:
        say(f"the recordings: {folders[0]} and {folders[1]}")
    return same


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    usage = "same_bytes.py (REV_A REV_B | record REV --out FOLDER | compare FOLDER_A FOLDER_B) [flags]"
    form = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=form)
    flags.add_argument("words", nargs="+", help=argparse.SUPPRESS)
    flags.add_argument("--out", type=Path, help="folder for the recording (of two revisions: a/ and b/ in it)")
    flags.add_argument(
        "--only", nargs="+", metavar="NAME", choices=list(JOBS), default=list(JOBS), help=", ".join(JOBS)
    )
    flags.add_argument("--strict", action="store_true", help="differences of the OpenAPI document count, too")
    flags.add_argument("--shakespeare", type=Path, default=SHARED / "tinyshakespeare.txt", help="Tiny Shakespeare")
    flags.add_argument("--novels", type=Path, default=SHARED / "novels", help="folder of three or more novels (.txt)")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: the same, or recorded whole; 1 otherwise; 2 for bad arguments."""
    flags = parser()
    args = flags.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and worktrees are put away then, too
    try:
        match args.words:
            case ["record", revision]:
                if args.out is None:
                    flags.error("record needs --out FOLDER")
                return 0 if record(revision, args.out, args) else 1
            case ["compare", old, new]:
                return 0 if compare(Path(old), Path(new), args) else 1
            case [old, new]:
                return 0 if record_and_compare(old, new, args) else 1
            case words:
                flags.error(f"{' '.join(words)}: give two revisions, `record REV` or `compare FOLDER FOLDER`")
    except ValueError as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
