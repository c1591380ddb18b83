"""What all pages share: flags, history, the model in use, the open story, escaping of HTML and Markdown."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from checkpoint import default_model, described
from cli import parse_flags
from config import ROOT, ConfigError, FrozenSettings
from ui.backends import Backend, BackendError, BackendLocation, connect, description
from ui.history import History, default_path
from ui.open_story import OpenStories, OpenStory

LOADING = "Loading the model; the first time on a machine, this takes ten seconds longer …"
MENU = ROOT / "ui" / "menu.html"
SWITCH_S = 0.0005  # thread switch interval: the engine releases the interpreter lock at every matrix product, and would wait 5 ms each


class AppFlags(FrozenSettings):
    """The app's flags, given after `--`: `streamlit run app.py -- --model runs/sample/best`."""

    model: Path | None = None
    """Model folder at the start; default: the newest finished run that is better than those in models/, else the newest of these."""
    server: str = ""
    """Use a server (http://…) or a gateway (wss://…) instead. The API key is read from VLG_KEY."""
    dtype: str = "auto"
    """Number format of the weights: auto, float32, bfloat16 or int8."""
    history: Path | None = None
    """SQLite file of the history; default: one in the user's data folder."""
    runs: Path = ROOT / "runs"
    """Folder of training runs."""
    models: Path = ROOT / "models"
    """Folder of other models."""
    data: Path = ROOT / "data"
    """Folder that texts for training are put into."""
    without_password: bool = False
    """Ask for no password although the app listens beyond this machine: where something else keeps strangers away."""


@st.cache_resource(show_spinner=False)
def _flags(argv: tuple[str, ...]) -> AppFlags:
    try:
        return parse_flags(AppFlags, argv)
    except SystemExit:
        raise ConfigError([f"the flags after -- cannot be read: {' '.join(argv)}"]) from None


def flags() -> AppFlags:
    """The flags of this process. Raises ConfigError."""
    return _flags(tuple(sys.argv[1:]))


@st.cache_resource(show_spinner=False)
def _open_stories(path: Path) -> OpenStories:
    return OpenStories(History(path))


def open_stories() -> OpenStories:
    """The open stories of all sessions. Raises HistoryError where the file cannot be used."""
    return _open_stories(flags().history or default_path())


def history() -> History:
    return open_stories().history


@dataclass(frozen=True)
class FoundModel:
    """A model folder on this machine."""

    path: Path
    label: str
    modified: float


def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def found_models() -> list[FoundModel]:
    """The flags' model folder and those under runs/ and models/, newest first, unfinished ones (`last`) after all others."""
    given = flags()
    candidates: list[Path] = [given.model] if given.model else []
    for run in sorted(given.runs.glob("*/")):
        candidates += [run / "best", *sorted(run.glob("last*"))[:1]]
    candidates += sorted(given.models.glob("*/"))
    found: dict[Path, FoundModel] = {}
    for folder in candidates:
        if is_model(folder):
            inside = folder.resolve().parent.parent == given.runs.resolve()
            label = f"{folder.parent.name} · {folder.name}" if inside else folder.name
            modified = (folder / "config.json").stat().st_mtime
            found.setdefault(folder.resolve(), FoundModel(folder, label, modified))
    return sorted(found.values(), key=lambda model: (model.path.name.startswith("last"), -model.modified))


def default_place() -> BackendLocation | None:
    """The flags' model or server, otherwise that of `checkpoint.default_model`; None if there is none."""
    given = flags()
    if given.server:
        kind: Any = "gateway" if given.server.startswith(("ws://", "wss://")) else "server"
        return BackendLocation(kind, given.server, os.environ.get("VLG_KEY", ""))
    if given.model:
        return BackendLocation("local", str(given.model), dtype=given.dtype)
    found = default_model(given.runs, given.models)
    return BackendLocation("local", str(found), dtype=given.dtype) if found else None


def place() -> BackendLocation | None:
    """Where this session's model is."""
    chosen = st.session_state.get("place")
    if chosen is None:
        chosen = st.session_state["place"] = default_place()
    return chosen


def choose_place(chosen: BackendLocation) -> None:
    st.session_state["place"] = chosen
    st.session_state.pop("model_error", None)


def draw_model() -> None:
    """Which model writes, in the sidebar of every page."""
    chosen = place()
    if chosen is None:
        return
    local = chosen.kind == "local"
    shown = described(Path(chosen.where), ROOT) if local else f"{chosen.kind} {chosen.where.partition('?')[0]}"
    if not local and (model := description(chosen).get("model")):
        shown = f"{model}, {shown}"
    with st.sidebar:
        st.html(MENU, unsafe_allow_javascript=True)
        st.html(
            f'<div class="quiet">Model (another: see the Model page)</div><div class="prose small">{escaped(shown)}</div>'
        )


def last_modified(chosen: BackendLocation) -> float:
    """The time the model folder was last written; 0 for a server."""
    path = Path(chosen.where) / "model.safetensors"
    return path.stat().st_mtime if chosen.kind == "local" and path.is_file() else 0.0


def _release(backend: Backend) -> None:
    backend.close()


@st.cache_resource(show_spinner=False, max_entries=3, on_release=_release)
def _backend(chosen: BackendLocation, last_modified: float) -> Backend:
    sys.setswitchinterval(SWITCH_S)
    return connect(chosen)


def backend() -> Backend | None:
    """The model of this session, loaded; None where there is none, or where it cannot be used (see `model_error`)."""
    chosen = place()
    if chosen is None:
        return None
    try:
        opened = _backend(chosen, last_modified(chosen))
    except (BackendError, OSError, ValueError, RuntimeError, ImportError) as error:
        st.session_state["model_error"] = str(error)
        return None
    st.session_state.pop("model_error", None)
    return opened


def model_error() -> str:
    """Why the model of this session cannot be used; empty when it can."""
    return st.session_state.get("model_error", "")


def open_story() -> OpenStory:
    """The story this session works on; the page's address names it, so that a reload finds it again."""
    state = st.session_state
    if "story_id" not in state:
        state["story_id"] = open_stories().get(str(st.query_params.get("story", ""))[:64]).id
    return open_stories().get(state["story_id"])


def switch_story(story_id: str = "") -> OpenStory:
    """Switch this session to another story, or to a new one."""
    opened = open_stories().get(story_id)
    st.session_state["story_id"] = opened.id
    return opened


def escaped(text: str) -> str:
    """For HTML."""
    return html.escape(text, quote=True)


def plain(text: str) -> str:
    """For labels, where Streamlit reads Markdown: every special character is escaped."""
    return "".join("\\" + c if c in "\\`*_{}[]()#+-.!|<>$~:&^=" else c for c in " ".join(text.split()))


def prose(text: str, *, small: bool = False) -> None:
    """Text with its line breaks, in the book typeface."""
    st.html(f'<div class="prose{" small" if small else ""}">{escaped(text) or "&nbsp;"}</div>')


def note(parts: Sequence[str]) -> str:
    """Facts as one line of HTML."""
    return " · ".join(escaped(part) for part in parts if part)
