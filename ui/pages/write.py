"""Write: the story editor, the toolbar, and the versions of the newest passage."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import streamlit as st

from config import ConfigError, GenerationParams
from inference.prompts import GALLERY
from ui import settings, state
from ui.backends import Backend, VisibleText
from ui.editor import story_editor
from ui.export import FORMATS, export
from ui.history import title_of
from ui.open_story import OpenStory
from ui.originality import draw_originality
from ui.permalinks import decode_link, encode_link
from ui.story import Story

POLL_S = 0.25
KEY = "editor"


def take_edit() -> None:
    """Apply what the writer has typed to its story, once, even if another story is shown by now."""
    edit = (st.session_state.get(KEY) or {}).get("edit")
    if not edit or edit == st.session_state.get("edit_taken"):
        return
    st.session_state["edit_taken"] = dict(edit)
    story_id, instance, rev = str(edit["rev"]).rsplit(":", 2)
    if instance == state.open_stories().instance:  # revisions count from the start of the app
        state.open_stories().get(story_id).edit(edit["text"], int(rev))


def take_title() -> None:
    title = (st.session_state.get(KEY) or {}).get("title")
    if title is not None:
        state.open_story().rename(title)


def take_command() -> None:
    command = (st.session_state.get(KEY) or {}).get("command")
    if command:
        editor_command(command)


def editor_command(command: str, *values: Any) -> None:
    """One of the writer's commands, from the keyboard or a button."""
    take_edit()
    opened = state.open_story()
    if command in ("continue", "retry"):
        backend = state.backend()
        if backend is None or opened.running:
            return
        try:
            params = settings.current()
        except ConfigError:
            return
        if command == "continue":
            opened.continue_text(backend, params)
        else:
            opened.retry(backend, params)
    elif command == "stop":
        opened.stop()
    elif command == "undo":
        opened.undo()
    elif command == "redo":
        opened.redo()
    elif command == "choose":
        opened.choose(values[0])
    elif command == "new":
        state.switch_story()
        state.open_story().atomic_write_text(values[0] if values else "")
    elif command == "opening":
        opened.atomic_write_text(values[0])
    st.rerun()  # the whole page: a command from the editor would only rerun its fragment


def follow_link() -> None:
    """Open what a permalink describes: its prompt as a new story, its settings in the sidebar."""
    value = st.query_params.get("write")
    if not value or st.session_state.get("followed") == value:
        return
    st.session_state["followed"] = value
    del st.query_params["write"]
    try:
        recipe = decode_link(str(value))
    except ValueError as error:
        st.session_state["told"] = f"{error}: ask for a new link."
        return
    state.switch_story().atomic_write_text(recipe["prompt"])
    settings.apply(recipe["params"].model_dump())
    place = state.place()
    told = "The link restored this prompt with its settings and seed. Continue writes the same text again"
    backend = state.backend() if place else None
    if backend is not None and recipe["model"] not in ("", backend.name):
        told += f" with the model “{recipe['model']}”; you are writing with “{backend.name}”, whose text will differ"
    if recipe["index"]:
        told += f"; the linked text is version {recipe['index'] + 1}"
    st.session_state["told"] = told + "."


def restore_settings() -> None:
    """Once a session, set the controls as the open story's newest passage was written; the seed is new each time."""
    if "settings_restored" in st.session_state:
        return
    st.session_state["settings_restored"] = True
    passage = state.open_story().story.passage
    if passage is not None:
        values = {name: value for name, value in passage.params.items() if name in settings.SETTINGS and name != "seed"}
        with suppress(ValueError):
            settings.apply(GenerationParams.model_validate(values).model_dump())


def draw_empty() -> None:
    """No model yet: offer to train one."""
    from ui import training_runs

    with st.container(key="page_write"):
        st.title("A place to write", anchor=False)
        st.html('<p class="lead">You begin a story, and a language model continues it.</p>')
        if state.model_error():
            st.error("The model cannot be opened.", icon=":material/error:")
            st.text(state.model_error())
            st.button("Try again", icon=":material/refresh:", key="try_again")
            st.page_link("ui/pages/model.py", label="Choose another model", icon=":material/deployed_code:")
            return
        given = state.flags()
        if any(run.running() for run in training_runs.runs(given.runs)):
            st.info("A model is being trained. You can write with it as soon as its first checkpoint is saved.")
            st.page_link("ui/pages/training.py", label="Watch it learn", icon=":material/model_training:")
            return
        st.write("There is no model on this machine yet. You can train a small one on the sample stories.")
        if st.button("Train the sample model (about three minutes)", type="primary", icon=":material/model_training:"):
            run = training_runs.start("sample", preset="sample", runs_folder=given.runs, data_folder=given.data)
            st.session_state["run_shown"] = run.name
            st.switch_page("ui/pages/training.py")
        st.caption("Or choose a model folder, a server or a gateway on the Model page.")


def shown(opened: OpenStory) -> tuple[bool, ...]:
    """The state of the toolbar's buttons; when it changes, the whole page is drawn again."""
    story = opened.story
    return (opened.running, bool(story.past), bool(story.future), bool(story.versions), bool(story.text.strip()))


def draw_editor(backend: Backend, opened: OpenStory, drawn: tuple[bool, ...]) -> None:
    """The editor with its facts and versions; a fragment that reruns several times a second while the model writes."""
    take_edit()
    view = opened.view()
    try:
        params = settings.current()
    except ConfigError:
        params = settings.DEFAULTS
    visible = visible_text(backend, view.text, params)
    story_editor(
        view,
        rev=f"{opened.id}:{state.open_stories().instance}:{view.rev}",
        key=KEY,
        title=opened.title,
        seen=visible.start if visible else 0,
        focus=opened.id,
        on_edit=take_edit,
        on_title=take_title,
        on_command=take_command,
    )
    draw_facts(opened, view.text, visible)
    draw_generation_notices(opened)
    draw_versions(opened, view.running)
    if drawn != shown(opened) and (opened.running or not view.running):
        st.rerun()


def visible_text(backend: Backend, text: str, params: GenerationParams) -> VisibleText | None:
    """What the model reads of `text`; computed again only when the text or the settings have changed."""
    key = (id(backend), hash(text), params.max_tokens, params.keep, params.style)
    kept = st.session_state.get("visible")
    if kept is None or kept[0] != key:
        kept = st.session_state["visible"] = (key, backend.visible_text(text, params))
    found: VisibleText | None = kept[1]
    return found


def draw_generation_notices(opened: OpenStory) -> None:
    """Warnings about the passage being written."""
    generation = opened.generation
    if generation is not None and generation.status == "lost":
        st.warning(
            f"Connection lost: {state.plain(generation.message)}. Your text is safe; writing continues when the server is back.",
            icon=":material/cloud_off:",
        )
    elif opened.notice:
        st.warning(state.plain(opened.notice), icon=":material/info:")
    if generation is not None and generation.truncated and opened.running:
        st.caption("The text is longer than what the model can read at once: it reads only the end.")


def draw_toolbar(opened: OpenStory, running: bool) -> None:
    story = opened.story
    draw_generate_buttons(story, running)
    draw_undo_buttons(story, running)
    if len(story.versions) > 1:
        draw_version_buttons(story, running)
    draw_menu(opened)


def draw_generate_buttons(story: Story, running: bool) -> None:
    """Continue or Stop, and Retry."""
    if running:
        st.button(
            "Stop",
            key="stop",
            type="primary",
            icon=":material/stop:",
            shortcut="Esc",
            on_click=editor_command,
            args=("stop",),
        )
    else:
        st.button(
            "Continue",
            key="continue",
            type="primary",
            icon=":material/edit_note:",
            shortcut="Mod+Enter",
            on_click=editor_command,
            args=("continue",),
            help="Let the model continue from the end of the text",
        )
    st.button(
        "Retry",
        key="retry",
        icon=":material/autorenew:",
        disabled=running or not story.versions,
        on_click=editor_command,
        args=("retry",),
        shortcut="Alt+Enter",
        help="Another version of the newest passage; the current one is kept (Alt+Enter)",
    )


def draw_undo_buttons(story: Story, running: bool) -> None:
    st.button(
        "Undo",
        key="undo",
        icon=":material/undo:",
        disabled=running or not story.past,
        on_click=editor_command,
        args=("undo",),
        help="One step back (Ctrl+Z in the text)",
    )
    st.button(
        "Redo",
        key="redo",
        icon=":material/redo:",
        disabled=running or not story.future,
        on_click=editor_command,
        args=("redo",),
        help="One step forward (Ctrl+Shift+Z in the text)",
    )


def draw_version_buttons(story: Story, running: bool) -> None:
    """Previous and next version of the newest passage."""
    with st.container(horizontal=True, width="content", vertical_alignment="center", gap=None, wrap=False):
        last = len(story.versions) - 1
        st.button(
            "Previous version",
            icon=":material/chevron_left:",
            key="previous",
            type="tertiary",
            disabled=running or story.at == 0,
            on_click=editor_command,
            args=("choose", story.at - 1),
        )
        st.html(
            f'<span class="quiet" aria-live="polite">version {story.at + 1} of {last + 1}</span>',
            width="content",
        )
        st.button(
            "Next version",
            icon=":material/chevron_right:",
            key="next",
            type="tertiary",
            disabled=running or story.at == last,
            on_click=editor_command,
            args=("choose", story.at + 1),
        )


def draw_menu(opened: OpenStory) -> None:
    """New story, export, permalink."""
    story = opened.story
    with st.popover("More", icon=":material/more_horiz:", key="more"):
        st.button(
            "New story", icon=":material/note_add:", key="new", on_click=editor_command, args=("new",), width="stretch"
        )
        for suffix, (label, mime) in FORMATS.items():
            st.download_button(
                f"Save as {label}",
                data=partial(as_file, opened, suffix),
                file_name=f"{file_name(opened)}.{suffix}",
                mime=mime,
                key=f"save_{suffix}",
                on_click="ignore",
                icon=":material/download:",
                width="stretch",
                disabled=not story.text,
            )
        if story.passage is not None and story.passage.seed is not None:
            st.caption("Link that writes the newest passage again:")
            st.code(f"{(st.context.url or '').split('?')[0]}?write={encode_link(opened)}", language=None)


def file_name(opened: OpenStory) -> str:
    """A file name made from the story's title."""
    words = "".join(c if c.isalnum() else " " for c in title_of(opened.title, opened.story.text, 40)).split()
    return "_".join(words).lower() or "story"


def as_file(opened: OpenStory, suffix: str) -> bytes:
    """The story as it is when the file is requested."""
    return export([(opened.title, opened.story.text)], suffix)


def draw_facts(opened: OpenStory, text: str, visible: VisibleText | None) -> None:
    """Word count, how much of the text the model reads, speed; what the colours of the text mean."""
    words = len(text.split())
    parts = [f"{words:,} word{'' if words == 1 else 's'}"]
    bar = legend = ""
    if visible is not None:
        share = min(1.0, visible.tokens / visible.context)
        about = "" if visible.exact else "about "
        if visible.start:
            parts.append(f"the model reads {about}the last {len(text[visible.start :].split()):,} of them")
            legend += '<span class="legend-unseen">no longer read by the model</span>'
        elif words:
            parts.append("the model reads them all")
        bar = (
            f'<span class="bar{" full" if visible.start else ""}" role="img" '
            f'aria-label="{share:.0%} of the model\'s context in use"><i style="width:{share:.0%}"></i></span>'
        )
    generation = opened.generation
    if generation is not None and generation.first_s is not None:
        if generation.tokens_per_s:
            parts.append(f"{generation.tokens_per_s:,.0f} tokens/s")
        parts.append(f"first word after {generation.first_s:.2f} s")
        if generation.seed is not None:
            parts.append(f"seed {generation.seed}")
    if opened.view().fresh:
        legend += '<span class="legend-fresh">written last</span>'
    st.html(f'<div class="meter quiet" data-testid="facts">{bar}<span>{state.note(parts)}</span>{legend}</div>')


def draw_versions(opened: OpenStory, running: bool) -> None:
    """Versions side by side, while they are written and until the story continues from one of them."""
    generation, story = opened.generation, opened.story
    if running and generation is not None and len(generation.samples) > 1:
        texts = [sample.text for sample in generation.samples]
    elif not running and len(story.versions) > 1:
        texts = [take.text for take in story.versions]
    else:
        return
    columns = st.columns(min(3, len(texts)))
    for at, text in enumerate(texts):
        chosen = at == story.at and not running
        with columns[at % len(columns)].container(border=True, key=f"version_{at}"):
            st.html(f'<div class="quiet">Version {at + 1}{" · in the text" if chosen else ""}</div>')
            st.html(f'<div class="prose version">{state.escaped(text.strip()) or "…"}</div>')
            if not running:
                st.button(
                    "Use this",
                    key=f"use_{at}",
                    on_click=editor_command,
                    args=("choose", at),
                    disabled=chosen,
                    icon=":material/check:" if chosen else None,
                )


def draw_openings() -> None:
    """Openings to begin with."""
    st.subheader("Or begin with an opening", anchor=False)
    kinds = list(GALLERY)
    kind = st.pills(
        "Kind of opening",
        kinds,
        default=kinds[0],
        key="kind",
        label_visibility="collapsed",
        required=True,
        format_func=str.capitalize,
    )
    with st.container(key="openings"), st.grid(2, gap="small"):
        for number, text in enumerate(GALLERY[kind or kinds[0]]):
            st.button(
                state.plain(text),
                key=f"opening_{number}",
                on_click=editor_command,
                args=("opening", text),
                width="stretch",
                wrap=True,
            )


def draw() -> None:
    state.history()
    settings.start(state.place(), state.history())
    restore_settings()
    follow_link()
    with st.spinner(state.LOADING):
        backend = state.backend()
    if backend is None:
        draw_empty()
        return
    with st.sidebar:
        settings.sidebar(state.place(), state.history(), backend.styles)
        for line in settings.problems():
            st.error(state.plain(line))
    opened = state.open_story()
    if st.query_params.get("story") != opened.id:
        st.query_params["story"] = opened.id
    with st.container(key="page_write"):
        if told := st.session_state.pop("told", ""):
            st.info(state.plain(told), icon=":material/link:")
        drawn = shown(opened)
        st.fragment(draw_editor, run_every=POLL_S if opened.running else None, key="story")(backend, opened, drawn)
        with st.container(horizontal=True, key="toolbar", vertical_alignment="center", gap="small"):
            draw_toolbar(opened, opened.running)
        if not opened.view().text.strip() and not opened.running:
            draw_openings()
        elif not opened.running:
            draw_originality(backend, opened.story.text)


draw()
