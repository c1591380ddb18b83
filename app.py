"""The app: write stories with the model in the browser, look inside it, compare settings, train.

streamlit run app.py                                            # the model as for generate.py
streamlit run app.py -- --model runs/sample/best
VLG_APP_PASSWORD=… streamlit run app.py --server.address 0.0.0.0     # for other machines too, with a password
streamlit run app.py -- --server http://127.0.0.1:8000          # or wss://… for a gateway; a key comes from VLG_KEY
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import streamlit as st
from streamlit import runtime

HERE = Path(__file__).resolve().parent
PAGES = (
    ("write", "Write", ":material/edit_note:"),
    ("inside", "Look inside", ":material/visibility:"),
    ("compare", "Compare", ":material/view_column_2:"),
    ("history", "History", ":material/auto_stories:"),
    ("statistics", "Statistics", ":material/bar_chart:"),
    ("training", "Training", ":material/model_training:"),
    ("model", "Model", ":material/deployed_code:"),
)


def main() -> None:
    """Draw the page that is open."""
    from config import ConfigError
    from ui import state
    from ui.history import HistoryError
    from ui.password import require_password

    st.set_page_config(page_title="Victorian Literature Generator", page_icon=HERE / "ui" / "icon.svg", layout="wide")
    st.html(HERE / "ui" / "style.css")
    try:
        require_password(state.flags().without_password)
        state.open_stories()
    except (ConfigError, HistoryError) as error:
        st.error("The app cannot start with these settings.")
        st.text(str(error))
        st.stop()
    pages = [
        st.Page(HERE / "ui" / "pages" / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "write")
        for name, title, icon in PAGES
    ]
    shown = st.navigation(pages, position="sidebar", expanded=True)
    state.draw_model()
    shown.run()


def started_without_streamlit(argv: list[str]) -> int:
    """Say how the app is started, with the flags in `argv`; returns the exit code. `--help` lists the flags."""
    if {"-h", "--help"} & set(argv):
        from cli import parse_flags
        from ui.state import AppFlags

        parse_flags(AppFlags, ["--help"])
    command = shlex.join(["streamlit", "run", "app.py", *(["--", *argv] if argv else [])])
    print(f"the app is started by Streamlit; type: {command}", file=sys.stderr)
    return 2


if runtime.exists():
    main()
elif __name__ == "__main__":
    sys.exit(started_without_streamlit(sys.argv[1:]))
