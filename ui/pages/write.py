"""Write: the story on its sheet, the model going on from it, versions to choose from."""

from __future__ import annotations

from functools import partial
from typing import Any

import streamlit as st

from config import ConfigError, GenerationParams
from inference.prompts import GALLERY
from ui import settings, state
from ui.backends import Backend, Seen
from ui.desk import Desk
from ui.editor import sheet
from ui.export import FORMATS, export
from ui.history import title_of
from ui.links import packed, unpacked
from ui.marks import draw_originality

POLL_S = 0.25
KEY = "sheet"


def take_edit() -> None:
    """Bring what the writer has typed into its story, once, also one that is not open any more."""
    edit = (st.session_state.get(KEY) or {}).get("edit")
    if not edit or edit == st.session_state.get("edit_taken"):
        return
    st.session_state["edit_taken"] = dict(edit)
    story_id, life, rev = str(edit["rev"]).rsplit(":", 2)
    if life == state.desks().life:  # revisions count from the start of the app
        state.desks().open(story_id).type(edit["text"], int(rev))


def take_title() -> None:
    title = (st.session_state.get(KEY) or {}).get("title")
    if title is not None:
        state.desk().rename(title)


def take_command() -> None:
    command = (st.session_state.get(KEY) or {}).get("command")
    if command:
        act(command)


def act(command: str, *values: Any) -> None:
    """One of the writer's commands, from the keyboard or a button."""
    take_edit()
    desk = state.desk()
    if command in ("continue", "retry"):
        backend = state.backend()
        if backend is None or desk.running:
            return
        try:
            params = settings.current()
        except ConfigError:
            return
        if command == "continue":
            desk.go_on(backend, params)
        else:
            desk.retry(backend, params)
    elif command == "stop":
        desk.stop()
    elif command == "undo":
        desk.undo()
    elif command == "redo":
        desk.redo()
    elif command == "choose":
        desk.choose(values[0])
    elif command == "new":
        state.put_on_desk()
        state.desk().put(values[0] if values else "")
    elif command == "opening":
        desk.put(values[0])
    st.rerun()  # the whole page: a command from the sheet would only run its fragment


def follow_link() -> None:
    """Lay out what a permalink describes: its prompt as a new story, its settings in the sidebar."""
    value = st.query_params.get("write")
    if not value or st.session_state.get("followed") == value:
        return
    st.session_state["followed"] = value
    del st.query_params["write"]
    try:
        recipe = unpacked(str(value))
    except ValueError as error:
        st.session_state["told"] = f"{error}: ask for it again."
        return
    state.put_on_desk().put(recipe["prompt"])
    settings.apply(recipe["params"].model_dump())
    place = state.place()
    told = "A link laid out this prompt with its settings and seed. Continue writes the same text again"
    backend = state.backend() if place else None
    if backend is not None and recipe["model"] not in ("", backend.name):
        told += f" with the model “{recipe['model']}”; you are writing with “{backend.name}”, which will differ"
    if recipe["index"]:
        told += f"; the linked text is version {recipe['index'] + 1}"
    st.session_state["told"] = told + "."


def draw_empty() -> None:
    """No model yet: say so, and offer to make one."""
    from ui import training

    with st.container(key="page_write"):
        st.title("A place to write")
        st.html('<p class="lead">Here a story is written by two: you begin, and a language model goes on.</p>')
        if state.fault():
            st.error("The model cannot be opened.", icon=":material/error:")
            st.text(state.fault())
            st.button("Try again", icon=":material/refresh:", key="try_again")
            st.page_link("ui/pages/model.py", label="Choose another model", icon=":material/deployed_code:")
            return
        given = state.flags()
        if any(run.running() for run in training.runs(given.runs)):
            st.info("A model is being trained. As soon as it has been saved once, it can write.")
            st.page_link("ui/pages/training.py", label="Watch it learn", icon=":material/model_training:")
            return
        st.write(
            "There is no model on this machine yet. A small one learns from the stories that come with the program."
        )
        if st.button("Train the sample model (about three minutes)", type="primary", icon=":material/model_training:"):
            run = training.start("sample", preset="sample", runs_folder=given.runs, data_folder=given.data)
            st.session_state["run_shown"] = run.name
            st.switch_page("ui/pages/training.py")
        st.caption("Or choose a model folder, a server or a gateway on the Model page.")


def shown(desk: Desk) -> tuple[bool, ...]:
    """What the toolbar looks like; when it changes the whole page is drawn again."""
    story = desk.story
    return (desk.running, bool(story.past), bool(story.future), bool(story.takes), bool(story.text.strip()))


def draw_desk(backend: Backend, desk: Desk, drawn: tuple[bool, ...]) -> None:
    """The sheet and what belongs to it; runs by itself several times a second while the model writes."""
    take_edit()
    live = desk.live()
    try:
        params = settings.current()
    except ConfigError:
        params = settings.DEFAULTS
    seen = seen_of(backend, live.text, params)
    sheet(
        live,
        rev=f"{desk.id}:{state.desks().life}:{live.rev}",
        key=KEY,
        title=desk.title,
        seen=seen.start if seen else 0,
        focus=desk.id,
        on_edit=take_edit,
        on_title=take_title,
        on_command=take_command,
    )
    draw_facts(desk, live.text, seen)
    draw_job(desk)
    draw_versions(desk, live.running)
    if drawn != shown(desk) and (desk.running or not live.running):
        st.rerun()


def seen_of(backend: Backend, text: str, params: GenerationParams) -> Seen | None:
    """What the model sees of `text`; counted anew only when one of the two has changed."""
    key = (id(backend), hash(text), params.max_tokens, params.keep)
    kept = st.session_state.get("seen")
    if kept is None or kept[0] != key:
        kept = st.session_state["seen"] = (key, backend.seen(text, params))
    found: Seen | None = kept[1]
    return found


def draw_job(desk: Desk) -> None:
    """What went wrong or needs saying about the passage being written."""
    job = desk.job
    if job is not None and job.status == "lost":
        st.warning(
            f"The server went away: {state.plain(job.message)}. Your text is safe; writing goes on when it is back.",
            icon=":material/cloud_off:",
        )
    elif desk.notice:
        st.warning(state.plain(desk.notice), icon=":material/info:")
    if job is not None and job.truncated and desk.running:
        st.caption("The text is longer than the model's memory: it read the end of it (the darker part).")


def draw_toolbar(desk: Desk, running: bool) -> None:
    story = desk.story
    if running:
        st.button(
            "Stop", key="stop", type="primary", icon=":material/stop:", shortcut="Esc", on_click=act, args=("stop",)
        )
    else:
        st.button(
            "Continue",
            key="continue",
            type="primary",
            icon=":material/edit_note:",
            shortcut="Mod+Enter",
            on_click=act,
            args=("continue",),
            help="Let the model go on from the end of the text",
        )
    st.button(
        "Retry",
        key="retry",
        icon=":material/autorenew:",
        disabled=running or not story.takes,
        on_click=act,
        args=("retry",),
        shortcut="Alt+Enter",
        help="Another version of the newest passage; the present one is kept (Alt+Enter)",
    )
    st.button(
        "Undo",
        key="undo",
        icon=":material/undo:",
        disabled=running or not story.past,
        on_click=act,
        args=("undo",),
        help="One step back (Ctrl+Z in the text)",
    )
    st.button(
        "Redo",
        key="redo",
        icon=":material/redo:",
        disabled=running or not story.future,
        on_click=act,
        args=("redo",),
        help="One step forward (Ctrl+Shift+Z in the text)",
    )
    if len(story.takes) > 1:
        with st.container(horizontal=True, width="content", vertical_alignment="center", gap=None, wrap=False):
            last = len(story.takes) - 1
            st.button(
                "Former version",
                icon=":material/chevron_left:",
                key="former",
                type="tertiary",
                disabled=running or story.at == 0,
                on_click=act,
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
                on_click=act,
                args=("choose", story.at + 1),
            )
    with st.popover("More", icon=":material/more_horiz:", key="more"):
        st.button("New story", icon=":material/note_add:", key="new", on_click=act, args=("new",), width="stretch")
        for suffix, (label, mime) in FORMATS.items():
            st.download_button(
                f"Save as {label}",
                data=partial(as_file, desk, suffix),
                file_name=f"{file_name(desk)}.{suffix}",
                mime=mime,
                key=f"save_{suffix}",
                on_click="ignore",
                icon=":material/download:",
                width="stretch",
                disabled=not story.text,
            )
        if story.passage is not None and story.passage.seed is not None:
            st.caption("A link that writes the newest passage again:")
            st.code(f"{(st.context.url or '').split('?')[0]}?write={packed(desk)}", language=None)


def file_name(desk: Desk) -> str:
    """A file name out of the story's title."""
    words = "".join(c if c.isalnum() else " " for c in title_of(desk.title, desk.story.text, 40)).split()
    return "_".join(words).lower() or "story"


def as_file(desk: Desk, suffix: str) -> bytes:
    """The story as it stands when the file is asked for."""
    return export([(desk.title, desk.story.text)], suffix)


def draw_facts(desk: Desk, text: str, seen: Seen | None) -> None:
    """Words, what the model sees, speed."""
    words = len(text.split())
    parts = [f"{words:,} word{'' if words == 1 else 's'}"]
    bar = ""
    if seen is not None:
        share = min(1.0, seen.tokens / seen.context)
        about = "" if seen.exact else "about "
        if seen.start:
            parts.append(f"the model sees the last {len(text[seen.start :].split()):,}")
        if seen.tokens > seen.context:
            parts.append(f"{about}{seen.tokens:,} tokens, {seen.context:,} fit")
        else:
            parts.append(f"{about}{seen.tokens:,} of {seen.context:,} tokens")
        bar = (
            f'<span class="bar{" full" if seen.start else ""}" role="img" '
            f'aria-label="{share:.0%} of the model\'s memory in use"><i style="width:{share:.0%}"></i></span>'
        )
    job = desk.job
    if job is not None and job.first_s is not None:
        if job.tokens_per_s:
            parts.append(f"{job.tokens_per_s:,.0f} tokens/s")
        parts.append(f"first word after {job.first_s:.2f} s")
        if job.seed is not None:
            parts.append(f"seed {job.seed}")
    st.html(f'<div class="meter quiet" data-testid="facts">{bar}<span>{state.note(parts)}</span></div>')


def draw_versions(desk: Desk, running: bool) -> None:
    """Versions side by side: while several are being written, and afterwards until one is gone on from."""
    job, story = desk.job, desk.story
    if running and job is not None and len(job.samples) > 1:
        texts = [sample.text for sample in job.samples]
    elif not running and len(story.takes) > 1:
        texts = [take.text for take in story.takes]
    else:
        return
    columns = st.columns(min(3, len(texts)))
    for at, text in enumerate(texts):
        chosen = at == story.at and not running
        with columns[at % len(columns)].container(border=True, key=f"take_{at}"):
            st.html(f'<div class="quiet">Version {at + 1}{" · in the text" if chosen else ""}</div>')
            st.html(f'<div class="prose take">{state.escaped(text.strip()) or "…"}</div>')
            if not running:
                st.button(
                    "Use this",
                    key=f"use_{at}",
                    on_click=act,
                    args=("choose", at),
                    disabled=chosen,
                    icon=":material/check:" if chosen else None,
                )


def draw_openings() -> None:
    """First words to begin with."""
    st.subheader("Or begin with", anchor=False)
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
                on_click=act,
                args=("opening", text),
                width="stretch",
                wrap=True,
            )


def draw() -> None:
    state.history()
    settings.start(state.place(), state.history())
    follow_link()
    with st.spinner(state.LOADING):
        backend = state.backend()
    if backend is None:
        draw_empty()
        return
    with st.sidebar:
        st.html(f'<div class="quiet">Writing with</div><div class="prose small">{state.escaped(backend.name)}</div>')
        settings.sidebar(state.place(), state.history(), backend.styles)
        for line in settings.problems():
            st.error(state.plain(line))
    desk = state.desk()
    if st.query_params.get("story") != desk.id:
        st.query_params["story"] = desk.id
    with st.container(key="page_write"):
        if told := st.session_state.pop("told", ""):
            st.info(state.plain(told), icon=":material/link:")
        drawn = shown(desk)
        st.fragment(draw_desk, run_every=POLL_S if desk.running else None, key="desk")(backend, desk, drawn)
        with st.container(horizontal=True, key="toolbar", vertical_alignment="center", gap="small"):
            draw_toolbar(desk, desk.running)
        if not desk.live().text.strip() and not desk.running:
            draw_openings()
        elif not desk.running:
            draw_originality(backend, desk.story.text)


draw()
