"""The Model page offers the model as a page and as a GGUF file; a page only of a model that a browser can carry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from storage import web_page
from support.helpers import ROOT
from support.tiny_models import random_model, save, shape, tiny_tokenizer
from ui import state


@pytest.mark.parametrize("most", [10**6, 100])
def test_both_exports_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    tokenizer = tiny_tokenizer()
    save(tmp_path / "runs" / "mine" / "best", random_model(shape(tokenizer)), tokenizer)
    flags = {"--runs": "runs", "--models": "models", "--history": "h.sqlite", "--data": "data"}
    monkeypatch.setattr(
        sys, "argv", ["app.py", *(word for flag, name in flags.items() for word in (flag, str(tmp_path / name)))]
    )
    monkeypatch.setattr(web_page, "MOST", most)
    st.cache_resource.clear()
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    app.run()
    app.switch_page("ui/pages/model.py")
    app.run()
    assert not app.exception
    offered: dict[str, Any] = {button.proto.label: button.proto for button in app.get("download_button")}
    assert {label: proto.disabled for label, proto in offered.items()} == {
        "A web page": most == 100,
        "A GGUF file": False,
    }
    state.history().close()
    st.cache_resource.clear()
