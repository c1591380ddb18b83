"""History: every saved story; search, star, open, delete, restore, export."""

from __future__ import annotations

from datetime import datetime
from functools import partial

import streamlit as st

from ui import state
from ui.export import FORMATS, export
from ui.history import StorySummary

PAGE = 12
WRITE = "ui/pages/write.py"


def change(action: str, story_id: str, *values: bool) -> None:
    """Change one story in the history, and read it again if it is open."""
    getattr(state.history(), action)(story_id, *values)
    state.open_stories().forget(story_id)
    if action in ("delete", "erase") and st.session_state.get("story_id") == story_id:
        del st.session_state["story_id"]


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%-d %B %Y, %H:%M")


def whole(ids: list[str], suffix: str) -> bytes:
    """Stories as one file; read only when the file is requested."""
    return export([(row.title, row.text) for row in state.history().texts(ids)], suffix)


def draw_story(story: StorySummary) -> None:
    with st.container(border=True, key=f"story_{story.id}"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.html(f'<div class="story-title">{state.escaped(story.title)}</div>', width="stretch")
            if story.deleted:
                st.button("Restore", key=f"back_{story.id}", on_click=change, args=("restore", story.id))
                st.button("Delete permanently", key=f"erase_{story.id}", on_click=change, args=("erase", story.id))
                opened = False
            else:
                st.button(
                    "Unstar" if story.starred else "Star",
                    icon=":material/star:" if not story.starred else ":material/kid_star:",
                    key=f"star_{story.id}",
                    type="secondary" if story.starred else "tertiary",
                    on_click=change,
                    args=("star", story.id, not story.starred),
                )
                st.button(
                    "Delete",
                    icon=":material/delete:",
                    key=f"delete_{story.id}",
                    type="tertiary",
                    on_click=change,
                    args=("delete", story.id),
                    help="Moves it to the bin, from which it can be restored",
                )
                opened = st.button("Open", icon=":material/edit_note:", key=f"open_{story.id}")
        ending = " …" if len(story.opening) == 200 else ""
        state.prose(" ".join(story.opening.split()) + ending, small=True)
        facts = [
            when(story.updated),
            f"{story.words:,} words",
            f"{story.passages} {'passage' if story.passages == 1 else 'passages'} by a model",
        ]
        st.html(f'<div class="quiet">{state.note(facts)}</div>')
        passages = st.expander("Passages", key=f"passages_{story.id}", on_change="rerun", type="compact")
        if passages.open:
            with passages:
                draw_passages(story.id)
    if opened:
        state.switch_story(story.id)
        st.switch_page(WRITE)


def draw_passages(story_id: str) -> None:
    """Every passage that was generated for a story, used or not."""
    for row in reversed(state.history().passages(story_id)):
        facts = [
            when(row.created),
            row.model,
            f"temperature {row.params.get('temperature')}",
            f"seed {row.seed}" if row.seed is not None else "",
        ]
        st.html(f'<div class="quiet">{state.note(facts)}</div>')
        state.prose(row.text.strip(), small=True)
        if st.button(
            "Use this passage",
            key=f"again_{row.id}",
            help="Sets the story to the text up to here and this passage; undo restores it",
        ):
            state.switch_story(story_id).atomic_write_text(row.prompt + row.text)
            st.switch_page(WRITE)


def draw() -> None:
    st.html("<style>.story-title { font: 600 1.15rem/1.35 var(--book); }</style>")
    with st.container(key="page_read"):
        st.title("History", anchor=False)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            search = st.text_input("Search", placeholder="title or text", key="search")
            kind = st.segmented_control(
                "Show",
                ["All", "Starred", "Bin"],
                default="All",
                key="shown",
                required=True,
                label_visibility="collapsed",
            )
        history = state.history()
        stories = history.stories(search=search, starred=kind == "Starred", deleted=kind == "Bin")
        if not stories:
            draw_empty(search, str(kind))
            return
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            st.caption(f"{len(stories)} {'story' if len(stories) == 1 else 'stories'}, saved in {history.path}")
            with st.popover("Save all of these", icon=":material/download:"):
                for suffix, (label, mime) in FORMATS.items():
                    st.download_button(
                        f"as {label}",
                        data=partial(whole, [story.id for story in stories], suffix),
                        file_name=f"stories.{suffix}",
                        mime=mime,
                        key=f"all_{suffix}",
                        on_click="ignore",
                        width="stretch",
                    )
        pages = -(-len(stories) // PAGE)
        page = min(st.session_state.get("history_page", 1), pages)
        for story in stories[(page - 1) * PAGE : page * PAGE]:
            draw_story(story)
        if pages > 1:
            st.pagination(pages, key="history_page")


def draw_empty(search: str, kind: str) -> None:
    if search:
        st.info("No story contains these words.", icon=":material/search_off:")
    elif kind == "Bin":
        st.info("The bin is empty.", icon=":material/delete:")
    elif kind == "Starred":
        st.info("No story is starred yet.", icon=":material/star:")
    else:
        st.info("Nothing is written yet. Everything you write is saved automatically.", icon=":material/auto_stories:")
        st.page_link(WRITE, label="Begin a story", icon=":material/edit_note:")


draw()
