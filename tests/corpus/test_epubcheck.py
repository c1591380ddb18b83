"""What epubcheck (the Debian package of this name) says of the EPUB files that are built here and of those that the app exports."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support import shelf
from ui.export import export

JAVA, EPUBCHECK = (
    shutil.which("java"),
    shutil.which("epubcheck"),
)  # a program for Java, which not every kernel starts by itself
STORIES = [
    ("A fog & a <lamp>", "“The fog rolled in,” said O’Hara.\n\nIt was cold;\nand wet &c.\n\n* * *\n\nThe end… 漢字 \N{GRINNING FACE}"),
    ("", "No title.\x0c\x00 A control\ud800."),
    ("] ]> --", "<p>no markup</p> &nbsp; -- ]]>"),
]  # fmt: skip


def books() -> dict[str, bytes]:
    made = {f"shelf-{version}.epub": shelf.epub_book(version) for version in (2, 3)}
    made |= {"plain.epub": shelf.epub({"c1": "<p>one</p>", "c2": "<p>two</p>"})}
    return made | {"one.epub": export(STORIES[:1], "epub"), "all.epub": export(STORIES, "epub")}


@pytest.mark.slow
@pytest.mark.skipif(None in (JAVA, EPUBCHECK), reason="epubcheck is not installed")
def test_epubcheck_has_nothing_to_say(tmp_path: Path) -> None:
    for name, data in books().items():
        (tmp_path / name).write_bytes(data)
    broken = shelf.epub({"c1": "<p>one</p>"}, parts={"OEBPS/c1.xhtml": "<p>no page</p>"})
    (tmp_path / "broken.epub").write_bytes(broken)
    for path in sorted(tmp_path.iterdir()):
        done = subprocess.run(
            [str(JAVA), "-jar", str(EPUBCHECK), str(path)], capture_output=True, text=True, timeout=300
        )
        said = [
            line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("FATAL", "ERROR", "WARNING"))
        ]
        assert (done.returncode, said) == (0, []) if path.name != "broken.epub" else done.returncode, (
            f"{path.name}: {said}"
        )
