"""How long a writer waits for the first word: from the click on Continue to the first new character on the sheet.

python benchmarks/first_word.py --model runs/sample/best
python benchmarks/first_word.py --model runs/sample/best --rounds 20 --browser /usr/bin/chromium

The app and a headless browser run on this machine; the clock is the page's own, from the click event to the frame in
which the text has grown. Streamlit's run, the model's first token, the socket and the drawing are all inside.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "docs"):
    sys.path.insert(0, str(folder))

from cli import parse_flags, run_main  # noqa: E402
from config import ConfigError, FrozenSettings  # noqa: E402

WATCH = """mirror => {
  const root = mirror.getRootNode();
  const length = () => (root.querySelector(".mirror")?.textContent ?? "").trimEnd().length;
  const before = length();
  let begun = null;
  addEventListener("click", () => { begun ??= performance.now(); }, { capture: true, once: true });
  window.firstWord = new Promise((done) => {
    const look = () => {
      if (begun !== null && length() > before) done(performance.now() - begun);
      else requestAnimationFrame(look);
    };
    look();
  });
}"""
BEGINNINGS = ("The old house stood", "It was a raw November evening, and", "My dear Margaret,", "Nobody in the village")


class Args(FrozenSettings):
    """Milliseconds from Continue to the first word on the screen."""

    model: Path = ROOT / "models" / "victorian-mini"
    """Model folder to write with."""
    rounds: int = Field(8, ge=1, le=1000)
    """Passages to write; the first one meets a cold model."""
    browser: Path = Path("/usr/bin/chromium")
    """A Chromium to measure in."""


def measure(page: Any, url: str, rounds: int) -> list[float]:
    """Waiting times in milliseconds, one a passage."""
    page.set_default_timeout(60_000)
    page.goto(url)
    page.get_by_role("button", name="Continue").wait_for()
    page.get_by_role("slider", name="Length").press("Home")
    found = []
    for number in range(rounds):
        page.get_by_label("Story", exact=True).fill(BEGINNINGS[number % len(BEGINNINGS)])
        page.wait_for_timeout(1500)  # the text is handed on, nothing runs any more
        page.locator(".mirror").evaluate(WATCH)
        page.get_by_role("button", name="Continue").click()
        found.append(float(page.evaluate("window.firstWord")))
        page.get_by_role("button", name="Continue").wait_for()
    return found


def _main(argv: list[str] | None) -> int:
    args = parse_flags(Args, argv, examples=__doc__)
    if not (args.model / "model.safetensors").is_file():
        raise ConfigError([f"--model {args.model}: no model folder: train one with `python train.py`"])
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise ConfigError(["playwright is not installed: pip install -r requirements-dev.txt"]) from None
    from take_screenshots import BROWSER_FLAGS, running_app

    with (
        tempfile.TemporaryDirectory() as home,
        running_app(ROOT / "runs", Path(home), "--model", str(args.model.resolve())) as url,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=str(args.browser), args=BROWSER_FLAGS)
        times = measure(browser.new_page(viewport={"width": 1280, "height": 880}), url, args.rounds)
        browser.close()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    print("first word after, ms: " + ", ".join(f"{ms:.0f}" for ms in times))
    print(
        f"first passage {times[0]:.0f} ms, median {statistics.median(times):.0f} ms, worst {max(times):.0f} ms "
        f"({args.model}, commit {commit.strip() or 'unknown'})"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 when it failed, 2 for bad flags."""
    return run_main(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
