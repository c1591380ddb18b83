"""Logging: one JSON object a line on standard error, without prompts, texts or keys.

>>> set_up_logs("info")
>>> LOG.info("ready", extra={"fields": {"model": "sample"}})
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

LOG = logging.getLogger("api")


class JsonLog(logging.Formatter):
    """One JSON object a line: time, level, event and the record's `fields`. Prompts and texts are never logged."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        row: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row)


class HideQuery(logging.Filter):
    """Drops the query string, which may hold a key, from the lines uvicorn logs about a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(arg.split("?")[0] if isinstance(arg, str) else arg for arg in record.args)
        return True


def set_up_logs(level: str) -> None:
    """JSON lines on standard error for this server and for uvicorn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLog())
    for name in ("api", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger("api").level))


def hide_queries() -> None:
    """Keep query strings out of uvicorn's log."""
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).addFilter(HideQuery())
