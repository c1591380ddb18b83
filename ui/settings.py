"""How the next words are chosen: sliders made from `GenerationParams`, named presets, one's own presets.

>>> params = sidebar(backend, history)      # draws the controls
>>> params = current()                      # the same values, read in a callback
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from config import FINISH_SENTENCE, SETTINGS, ConfigError, GenerationParams, build
from ui.backends import BackendLocation, description
from ui.history import History

DEFAULTS = GenerationParams()
OWN = "Recommended by the model"
# What a named preset holds, with the usual values.
SAMPLING_DEFAULTS: dict[str, Any] = {
    name: getattr(DEFAULTS, name) for name, setting in SETTINGS.items() if setting.in_presets
}
SLIDERS = tuple(name for name, setting in SETTINGS.items() if setting.slider)
FIRST = ("max_tokens", "temperature")  # sliders that are always in view
PRESETS: dict[str, dict[str, Any]] = {
    "Faithful": SAMPLING_DEFAULTS
    | {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1, "min_p": 0.0},
    "Balanced": SAMPLING_DEFAULTS,
    "Fanciful": SAMPLING_DEFAULTS
    | {"temperature": 1.6, "top_k": 100, "top_p": 0.98, "repetition_penalty": 1.25, "min_p": 0.02},
}
ADJUSTED = "Adjusted"
PREFIX = "set_"


def span(name: str) -> tuple[float, float]:
    """A slider's ends: the useful part of the field's bounds."""
    ends = SETTINGS[name].slider
    if ends is None:
        raise ValueError(f"{name} has no slider")
    return ends


def clipped(name: str, value: Any) -> Any:
    """`value` moved into the slider's span, as the slider's number type."""
    low, high = span(name)
    kind = int if isinstance(getattr(DEFAULTS, name), int) else float
    return kind(min(max(value, low), high))


def recommended_settings(place: BackendLocation) -> dict[str, Any]:
    """What a model recommends, in its folder or as its server describes it; empty where nothing of it is usable."""
    from storage.gpt2_format import folder_defaults

    try:
        if place.kind == "local":
            values = folder_defaults(Path(place.where))
        else:
            schemas = description(place).get("settings", {})
            values = {name: schema["default"] for name, schema in schemas.items() if "default" in schema}
        found = {name: value for name, value in values.items() if name in SAMPLING_DEFAULTS}
        build(GenerationParams, found)
    except (OSError, ValueError):
        return {}
    return SAMPLING_DEFAULTS | found if found else {}


def apply(values: Mapping[str, Any]) -> None:
    """Set the controls; only before they are drawn, or in a callback."""
    for name, value in values.items():
        if name == "stop":
            st.session_state[PREFIX + name] = "\n".join(text.replace("\n", "\\n") for text in value)
        elif name in SETTINGS:
            st.session_state[PREFIX + name] = clipped(name, value) if name in SLIDERS else value


def current() -> GenerationParams:
    """The values of the controls. Raises ConfigError where they cannot be used together."""
    state = st.session_state
    values = {name: state[PREFIX + name] for name in SETTINGS if name != "stop" and PREFIX + name in state}
    lines = (line.replace("\\n", "\n") for line in state.get(PREFIX + "stop", "").split("\n"))
    stops = tuple(line for line in lines if line)
    return build(GenerationParams, {**values, "stop": stops, "style": values.get("style") or ""})


def matching(params: GenerationParams, known: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of the preset that these values are, or `ADJUSTED`."""
    for name, values in known.items():
        if all(_equal(params, key, value) for key, value in values.items() if key in SAMPLING_DEFAULTS):
            return name
    return ADJUSTED


def _equal(params: GenerationParams, name: str, value: Any) -> bool:
    held = getattr(params, name)
    if name in SLIDERS:
        return abs(held - clipped(name, value)) < 1e-9
    return bool(held == (tuple(value) if isinstance(value, list) else value))


def known_presets(place: BackendLocation | None, history: History) -> dict[str, dict[str, Any]]:
    """Every preset there is for this model, in the order of the menu."""
    own = recommended_settings(place) if place else {}
    kept = {name: SAMPLING_DEFAULTS | values for name, values in history.presets().items()}
    return {**({OWN: own} if own else {}), **PRESETS, **kept}


def _choose() -> None:
    name = st.session_state.preset
    known = st.session_state.presets_known
    if name in known:
        apply(known[name])


def _roll() -> None:
    st.session_state[PREFIX + "seed"] = secrets.randbelow(1_000_000)


def _save(history: History) -> None:
    name = st.session_state.preset_name.strip()
    if name and name not in PRESETS and name not in (OWN, ADJUSTED):
        history.save_preset(name, current().model_dump(mode="json", include=set(SAMPLING_DEFAULTS)))
        st.session_state.preset_name = ""
    elif name:
        st.session_state.preset_fault = f"{name}: this name is taken. Choose another"


def start(place: BackendLocation | None, history: History) -> None:
    """Give every control its first value; another model's, as long as nobody has moved one."""
    state = st.session_state
    own = known_presets(place, history).get(OWN, SAMPLING_DEFAULTS)
    if PREFIX + "temperature" not in state:
        first = {name: getattr(DEFAULTS, name) for name in SETTINGS} | {"finish_sentence": FINISH_SENTENCE}
        apply({**first, **own, "seed": None})
    elif own != state.first_settings and not problems() and matching(current(), {OWN: state.first_settings}) == OWN:
        apply(own)
    state.first_settings = own


def number(name: str) -> None:
    """One slider."""
    low, high = span(name)
    whole = isinstance(getattr(DEFAULTS, name), int)
    kind: Any = int if whole else float
    st.slider(
        SETTINGS[name].label,
        kind(low),
        kind(high),
        step=kind(SETTINGS[name].step),
        key=PREFIX + name,
        help=GenerationParams.model_fields[name].description,
        persist_state="session",
        format="%d" if whole else "%.2f",
    )


def choose_style(styles: Sequence[str]) -> None:
    """The authors whose styles the model knows, or a blend of them typed in; nothing for a model without."""
    key = PREFIX + "style"
    if not styles:
        st.session_state[key] = ""
        return
    chosen = st.session_state.get(key) or ""
    st.selectbox(
        SETTINGS["style"].label,
        ["", *styles, *([chosen] if chosen and chosen not in styles else [])],
        key=key,
        format_func=lambda name: name or "no one in particular",
        accept_new_options=True,
        help="The style that the model is asked for. A blend can be typed in: dickens:0.7,austen:0.3",
        persist_state="session",
    )


def sidebar(place: BackendLocation | None, history: History, styles: Sequence[str] = ()) -> None:
    """Draw the controls in the sidebar; `start` must have run. styles: those of the model."""
    known = known_presets(place, history)
    st.session_state.presets_known = known
    found = matching(current(), known)
    options = [*known, ADJUSTED] if found == ADJUSTED else list(known)
    st.session_state.preset = found
    st.selectbox(
        "Settings",
        options,
        key="preset",
        on_change=_choose,
        help="How freely the model chooses its words. The sliders below hold the values.",
    )
    choose_style(styles)
    for name in FIRST:
        number(name)
    with st.expander("More settings", key="finer", on_change="rerun"):
        for name in SLIDERS:
            if name not in FIRST and not SETTINGS[name].rare:
                number(name)
        with st.container(horizontal=True, vertical_alignment="bottom", wrap=False, gap="small"):
            st.number_input(
                "Seed",
                min_value=0,
                max_value=2**53 - 1,
                step=1,
                key=PREFIX + "seed",
                placeholder="new each time",
                help="The same seed, text and settings give the same words again.",
                persist_state="session",
            )
            st.button("Roll a seed", icon=":material/casino:", on_click=_roll, key="dice", help="Roll a seed")
        st.text_area(
            SETTINGS["stop"].label,
            key=PREFIX + "stop",
            height=80,
            placeholder="one a line; \\n is a line break",
            help=GenerationParams.model_fields["stop"].description,
            persist_state="session",
        )
        own = history.presets()
        with st.form("preset_form", border=False):
            st.text_input("Save these settings as", key="preset_name", placeholder="a name of your own", max_chars=40)
            st.form_submit_button("Save", on_click=_save, args=(history,))
        if fault := st.session_state.pop("preset_fault", ""):
            st.warning(fault)
        if found in own:
            st.button(f"Delete “{found}”", on_click=history.delete_preset, args=(found,), key="forget")
    rare = [name for name in SLIDERS if SETTINGS[name].rare]
    if rare:
        with st.expander("Rarely used settings", key="rare", on_change="rerun"):
            for name in rare:
                number(name)


def problems() -> list[str]:
    """What is wrong with the values of the controls; empty when they can be used."""
    try:
        current()
    except ConfigError as error:
        return error.faults
    return []
