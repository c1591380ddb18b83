"""/docs and /redoc: scripts and styles come from this server, also without a key and behind a prefix, and from nowhere else."""

from __future__ import annotations

import re
import shutil
from urllib.parse import urljoin

import pytest
from starlette.testclient import TestClient

import api
from inference.engine import Engine
from server.auth import DOCS_FILES
from support.api_support import running, settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PREFIXES = {"none": ("", {}), "kept": ("/writer", {}), "stripped": ("", {"X-Forwarded-Prefix": "/writer"})}


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_everything_a_page_names_is_served_without_a_key(engine: Engine, path: str, prefix: str) -> None:
    kept, headers = PREFIXES[prefix]
    shown = kept or headers.get("X-Forwarded-Prefix", "")
    app = api.create_app(settings(api_keys="secret", root_path=kept, trusted_proxies="*"), engine)
    with TestClient(app, client=("10.1.2.3", 5000)) as client:
        page = client.get(kept + path, headers=headers)
        named = re.findall(r"(?:src|href|spec-url)=\"([^\"]+)\"|url: '([^']+)'", page.text)
        addresses = [one or other for one, other in named]
        assert len(addresses) >= 3
        for address in addresses:
            assert address.startswith(f"{shown}/"), address
            inside = address if kept else address.removeprefix(shown)
            assert client.get(urljoin("http://testserver/", inside), headers=headers).status_code == 200, address
        assert "default-src 'none'" in page.headers["content-security-policy"]


def test_the_files_that_need_no_key_are_those_of_the_package(engine: Engine) -> None:
    with TestClient(api.create_app(settings(api_keys="secret"), engine)) as client:
        for name in DOCS_FILES:
            answer = client.get(f"/docs/{name}")
            assert answer.status_code == 200 and len(answer.content) > 1000, name
        assert client.get("/docs/other.js").status_code == 401


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_both_and_asks_nothing_outside(engine: Engine) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with running(api.create_app(settings(), engine)) as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        faults: list[str] = []
        blocked: list[str] = []  # by the page's own policy, before anything is sent
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: blocked.append(request.url) if request.failure == "csp" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        for path, sign in (("/docs", "#operations-tag-default, .opblock"), ("/redoc", ".menu-content")):
            page.goto(address + path)
            page.locator(sign).first.wait_for(timeout=60_000)
            page.wait_for_timeout(300)
            assert not faults
        browser.close()
    outside = [url for url in asked if url not in blocked and not url.startswith((address, "data:", "blob:"))]
    assert outside == []
