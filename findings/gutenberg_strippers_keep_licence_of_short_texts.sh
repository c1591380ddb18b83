#!/usr/bin/env bash
# Expected: strip_headers of gutenbergpy and simple_cleaner of gutenberg-cleaner take Project Gutenberg's header and footer off any of its plain texts.
# Seen with gutenbergpy 0.4.0 and gutenberg-cleaner 0.1.6: they look for the end mark only after a hundred lines of text, so a poem or a short tale keeps the
# mark and the licence behind it, hundreds of lines of it in a real file. A set of short pieces then teaches a model the licence. No warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gutenbergpy==0.4.0 gutenberg-cleaner==0.1.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

from gutenberg_cleaner import simple_cleaner
from gutenbergpy.textget import strip_headers

print(f"gutenbergpy {version('gutenbergpy')}, gutenberg-cleaner {version('gutenberg-cleaner')}")
kept = {}
for lines in (40, 400):
    text = "\n".join(f"The {i}th line of the ballad." for i in range(4, 4 + lines))
    book = (
        "The Project Gutenberg eBook of A Ballad\n\nTitle: A Ballad\n\n"
        f"*** START OF THE PROJECT GUTENBERG EBOOK A BALLAD ***\n\n{text}\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK A BALLAD ***\n\nUpdated editions will replace the previous one.\n"
    )
    for name, found in (("gutenbergpy", strip_headers(book.encode()).decode()), ("gutenberg-cleaner", simple_cleaner(book))):
        assert text in found and "Title:" not in found
        kept[name, lines] = "Updated editions" in found
        print(f"{name}, {lines} lines: {'the footer is kept' if kept[name, lines] else 'the footer is gone'}")
assert list(kept.values()) == [True, True, False, False], "short texts are stripped otherwise now"
PY
