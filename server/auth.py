"""API keys: who may use the server (the web origins whose pages may are in origins.py).

>>> has_valid_key(settings.api_keys, request.headers)
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from pydantic import SecretStr
from starlette.datastructures import Headers

# paths that need no key
OPEN_PATHS = {"/", "/client.js", "/style.css", "/health", "/livez", "/readyz", "/ping", "/docs", "/redoc"}
OPEN_PATHS |= {"/openapi.json"}
DOCS_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png")  # of /docs and /redoc
OPEN_PATHS |= {f"/docs/{name}" for name in DOCS_FILES}


def has_valid_key(api_keys: Sequence[SecretStr], headers: Headers, token: str | None = None) -> bool:
    """Whether a request carries one of the keys (always true where there are none); compared in constant time.

    A key is sent as `Authorization: Bearer KEY` or `X-API-Key: KEY`, and as `?token=KEY` by a browser's WebSocket, which
    cannot set headers.
    """
    keys = [key.get_secret_value().encode() for key in api_keys]
    if not keys:
        return True
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = (bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key") or token or "").encode()
    return any([secrets.compare_digest(given, key) for key in keys])
