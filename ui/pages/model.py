"""Model: choose a model folder, a server or a gateway; the model's parameters and card."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import streamlit as st

from checkpoint import model_title
from ui import state
from ui.backends import Backend, BackendLocation, LocalBackend

DTYPES = ["auto", "float32", "bfloat16", "int8"]
LOCAL, SERVER, GATEWAY = "On this machine", "A server", "A gateway"
KINDS = {"local": LOCAL, "server": SERVER, "gateway": GATEWAY}


def choose(place: BackendLocation) -> None:
    state.choose_place(place)


def draw_choice(now: BackendLocation | None) -> None:
    """Choose where the model runs."""
    kind = st.segmented_control(
        "Where it runs",
        [LOCAL, SERVER, GATEWAY],
        default=KINDS[now.kind] if now else LOCAL,
        key="place_kind",
        required=True,
        label_visibility="collapsed",
    )
    if kind == LOCAL:
        draw_folders(now)
        return
    gateway = kind == GATEWAY
    with st.form("remote", border=False):
        same = now is not None and KINDS[now.kind] == kind
        url = st.text_input(
            "Address",
            value=now.where if now and same else ("" if gateway else "http://127.0.0.1:8000"),
            placeholder="wss://….execute-api.….amazonaws.com/prod" if gateway else "http://127.0.0.1:8000",
        )
        key = st.text_input("API key (if the server needs one)", value=now.key if now and same else "", type="password")
        if st.form_submit_button("Use it", type="primary"):
            choose(BackendLocation("gateway" if gateway else "server", url.strip(), key.strip()))
            st.rerun()


def draw_folders(now: BackendLocation | None) -> None:
    models = state.found_models()
    if not models:
        st.info("There is no model folder under runs/ or models/ yet.", icon=":material/deployed_code:")
        st.page_link("ui/pages/training.py", label="Train a model", icon=":material/model_training:")
        return
    paths = [str(model.path) for model in models]
    resolved = [Path(path).resolve() for path in paths]
    given = Path(now.where).resolve() if now and now.kind == "local" else None
    at = resolved.index(given) if given in resolved else 0
    with st.container(horizontal=True, vertical_alignment="bottom"):
        path = st.selectbox(
            "Model folder",
            paths,
            index=at,
            format_func=lambda value: models[paths.index(value)].label,
            key="model_path",
        )
        dtype = st.selectbox(
            "Number format",
            DTYPES,
            index=DTYPES.index(now.dtype if now else "auto"),
            key="model_dtype",
            help="auto: the fastest on this processor. int8 takes half the memory of bfloat16",
            width=180,
        )
        wanted = BackendLocation("local", str(path), dtype=str(dtype))
        st.button("Use it", type="primary", key="use_model", disabled=wanted == now, on_click=choose, args=(wanted,))


def draw_parts(backend: Backend) -> None:
    """Parameters by component; of a server, its context."""
    if not isinstance(backend, LocalBackend):
        if context := getattr(backend, "context", None):
            st.metric("Context", f"{context:,} tokens")
        return
    import pandas as pd

    model, tokenizer = backend.engine.model, backend.engine.tokenizer
    config = model.config
    first = next(model.parameters())
    cells = [
        ("Parameters", f"{model.num_parameters():,}"),
        ("Context", f"{config.block_size:,} tokens"),
        ("Vocabulary", f"{tokenizer.vocab_size:,} ({tokenizer.kind})"),
        ("Layers × heads", f"{config.n_layer} × {config.n_head}"),
        ("Channels", f"{config.n_embd:,}"),
        ("Device", f"{first.device}, {str(getattr(backend.engine, 'dtype', first.dtype)).removeprefix('torch.')}"),
    ]
    with st.grid(min_column_width=170, gap="small"):
        for label, value in cells:
            st.metric(label, value)
    rows = [(str(name), int(count), float(size) / 1e6) for name, count, size in model.report()]
    frame = pd.DataFrame(rows, columns=["Component", "Parameters", "MB"])
    st.dataframe(
        frame,
        hide_index=True,
        column_config={
            "Parameters": st.column_config.NumberColumn(format="localized"),
            "MB": st.column_config.NumberColumn(format="%.2f"),
        },
        alt="Parameters by component",
    )


def draw_addresses(place: BackendLocation) -> None:
    """What to paste into other programs: of a server its addresses, of a folder how to start one."""
    if place.kind == "gateway":
        return
    from server.settings import client_addresses

    st.subheader("Write in another program", anchor=False)
    if place.kind == "server":
        st.code(client_addresses(place.where.partition("?")[0].rstrip("/")).replace(", ", "\n"), language=None)
    else:
        st.code(f"python api.py --model {shlex.quote(place.where)}", language="sh")
        st.code(client_addresses("http://127.0.0.1:8000").replace(", ", "\n"), language=None)


def draw_exports(place: BackendLocation, backend: Backend) -> None:
    """Downloads of the model in other programs' formats, made on request."""
    if not isinstance(backend, LocalBackend):
        return
    from storage.web_page import MOST

    large = backend.engine.model.num_parameters() > MOST
    st.subheader("Take it elsewhere", anchor=False)
    with st.container(horizontal=True):
        for to, label, told in (
            ("html", "A web page", "One file that holds the model and writes in any browser, without a server"),
            ("gguf", "A GGUF file", "For llama.cpp and the programs built on it"),
        ):
            refused = large and to == "html"
            st.download_button(
                label,
                data=partial(exported, place.where, to),
                file_name=f"{model_title(Path(place.where))}.{to}",
                mime="text/html" if to == "html" else "application/octet-stream",
                key=f"export_{to}",
                on_click="ignore",
                icon=":material/download:",
                disabled=refused,
                help=f"Beyond {MOST // 1_000_000} million parameters a browser is too slow: take the GGUF file"
                if refused
                else told,
            )


def exported(folder: str, to: str) -> bytes:
    """The file, once the button is pressed."""
    from export import as_bytes

    return as_bytes(Path(folder), to)


def draw_card(place: BackendLocation) -> None:
    """The model card, without its YAML header."""
    card = Path(place.where) / "README.md"
    if place.kind != "local" or not card.is_file():
        return
    text = card.read_text("utf-8", "replace")
    if text.startswith("---\n"):
        text = text.split("\n---\n", 1)[-1]
    st.subheader("Model card", anchor=False)
    with st.container(border=True):
        st.markdown(text)


def draw() -> None:
    with st.container(key="page_read"):
        st.title("Model", anchor=False)
        now = state.place()
        draw_choice(now)
        if now is None:
            return
        st.divider()
        with st.spinner(state.LOADING):
            backend = state.backend()
        if backend is None:
            st.error("This model cannot be used.", icon=":material/error:")
            st.text(state.model_error())
            return
        st.subheader(state.plain(backend.name), anchor=False)
        st.caption(state.plain(now.where if now.kind == "local" else now.where.partition("?")[0]))
        draw_parts(backend)
        draw_addresses(now)
        draw_exports(now, backend)
        draw_card(now)


draw()
