"""Take the screenshots of the README again, from the app and an exported page in a real browser.

python train.py                                   # a model to write with, and a run to show
python docs/take_screenshots.py                   # -> docs/images/
python docs/take_screenshots.py --runs runs --browser /usr/bin/chromium
python docs/take_screenshots.py --only-page       # those of the exported page alone, by the shipped model
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from cli import parse_flags, run_main  # noqa: E402
from config import ConfigError, FrozenSettings  # noqa: E402

BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
]
OPENING = (
    "The house had stood empty for eleven years when I took the key from the agent's hand, and walked alone up the "
    "long drive in the rain."
)


class Args(FrozenSettings):
    """Take the screenshots of the README again."""

    runs: Path = ROOT / "runs"
    """Folder of training runs; the newest one is shown."""
    out: Path = HERE / "images"
    """Folder to write the pictures into."""
    browser: Path = Path("/usr/bin/chromium")
    """A Chromium to take them with."""
    seed: int = 4
    """Seed of the passage."""
    only_page: bool = False
    """Only the exported page; no run is needed."""


@contextmanager
def running_app(runs: Path, home: Path, *flags: str) -> Iterator[str]:
    """The app on a free port with a history of its own, and more `flags` of app.py; its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    words += ["--server.fileWatcherType=none", "--", "--runs", str(runs), "--history", str(home / "history.sqlite")]
    words += flags
    with (home / "app.log").open("wb") as log:
        child = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{url}/_stcore/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        child.terminate()
        child.wait(20)


def settle(page: Any, seconds: float = 1.5) -> None:
    """Until the page has stopped changing."""
    page.wait_for_timeout(int(seconds * 1000))
    page.locator("[data-testid=stStatusWidget]").wait_for(state="hidden")
    page.mouse.move(2, 400)


def write_story(page: Any, seed: int) -> None:
    """A title, an opening and two versions of what follows."""
    page.get_by_text("More settings").click()
    field = page.get_by_label("Seed", exact=True)
    field.fill(str(seed))
    field.press("Enter")
    length = page.get_by_role("slider", name="Length")
    length.press("Home")
    for _ in range(8):
        length.press("ArrowRight")
    settle(page)
    page.get_by_label("Title").fill("The Key")
    page.get_by_label("Title").press("Enter")
    story = page.get_by_label("Story", exact=True)
    story.fill(OPENING)
    for name in ("Continue", "Retry"):
        page.get_by_role("button", name=name).click()
        page.get_by_role("button", name="Stop").wait_for()
        page.get_by_role("button", name="Stop").wait_for(state="hidden", timeout=120_000)
        settle(page)
    page.get_by_text("More settings").click()
    page.evaluate(
        "document.activeElement.blur(); document.querySelector('[data-testid=stSidebarContent]').scrollTop = 0"
    )
    settle(page)


def shrink(picture: Path) -> None:
    """Save the picture with 256 colours, which is a third of the size and looks the same."""
    from PIL import Image

    with Image.open(picture) as full:
        small = full.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(picture, optimize=True)


def take(browser: Any, url: str, out: Path, seed: int) -> None:
    """All pictures into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(viewport={"width": 1280, "height": 880}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    page.get_by_role("button", name="Continue").wait_for()
    write_story(page, seed)
    page.screenshot(path=out / "write-light.png")
    story = page.url
    page.get_by_role("link", name="Look inside").first.click()
    page.locator(".token").filter(visible=True).nth(40).click()  # a line break has no size
    settle(page, 3)
    page.screenshot(path=out / "look-inside.png")
    page.get_by_role("link", name="Training").first.click()
    page.get_by_test_id("stVegaLiteChart").first.wait_for()
    settle(page, 4)
    page.screenshot(path=out / "training.png")
    context.close()
    for name, scheme, width, height in (("write-dark", "dark", 1280, 880), ("write-phone", "light", 390, 844)):
        context = sized_context(browser, scheme, width, height)
        page = context.new_page()
        page.goto(story)
        page.get_by_role("button", name="Continue").wait_for()
        settle(page, 3)
        page.screenshot(path=out / f"{name}.png")
        context.close()


def sized_context(browser: Any, scheme: str, width: int, height: int) -> Any:
    """A browser context of this size in CSS pixels; a narrow one is a phone, with two device pixels each."""
    phone = width < 500
    return browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        device_scale_factor=2 if phone else 1,
        is_mobile=phone,
    )


def take_page(browser: Any, place: Path, out: Path) -> None:
    """The pictures of the page that `export.py --to html` makes of the shipped model, into `out`."""
    import export

    out.mkdir(parents=True, exist_ok=True)
    made = place / "page.html"
    export.main(["--model", str(ROOT / "models" / "victorian-mini"), "--to", "html", "--out", str(made)])
    for name, scheme, width, height in (
        ("page-light", "light", 1280, 900),
        ("page-dark", "dark", 1280, 900),
        ("page-phone", "light", 390, 844),
    ):
        context = sized_context(browser, scheme, width, height)
        page = context.new_page()
        page.goto(f"{made.as_uri()}#prompt=The+old+house+stood&style=dickens&seed=7&max_tokens=60")
        page.locator("#status").filter(has_text="This link brings").wait_for()
        page.click("#continue")
        page.locator("#status").filter(has_text="from seed 7").wait_for()
        page.evaluate("document.activeElement.blur()")
        if width >= 500:
            word = page.locator("#mirror span").filter(has_text=re.compile("^I$")).first.bounding_box()
            page.mouse.move(word["x"] + word["width"] / 2, word["y"] + word["height"] / 2)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=out / f"{name}.png")
        context.close()


def _main(argv: list[str] | None) -> int:
    args = parse_flags(Args, argv)
    if not args.only_page and not list(args.runs.glob("*/best/model.safetensors")):
        raise ConfigError([f"--runs {args.runs}: no trained model there: run `python train.py` first"])
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise ConfigError(["playwright is not installed: pip install -r requirements-dev.txt"]) from None
    with tempfile.TemporaryDirectory() as home, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(args.browser), args=BROWSER_FLAGS)
        taken = Path(home) / "taken"
        take_page(browser, Path(home), taken)
        if not args.only_page:
            with running_app(args.runs.resolve(), Path(home)) as url:
                take(browser, url, taken, args.seed)
        browser.close()
        args.out.mkdir(parents=True, exist_ok=True)
        for picture in sorted(taken.iterdir()):
            shrink(picture)
            print(shutil.copyfile(picture, args.out / picture.name))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 when it failed, 2 for bad flags."""
    return run_main(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
