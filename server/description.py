"""What a server says of itself to clients that show settings: its model, and the schema of each sampling setting.

>>> described(service)["settings"]["temperature"]["default"]
0.8
"""

from __future__ import annotations

from typing import Any

from checkpoint import with_facts
from config import GenerationParams
from server import schemas
from server.openapi import write_defaults, write_limits
from server.service import Service


def described(service: Service) -> dict[str, Any]:
    """`schemas.SettingsReply`; ApiError 503 while there is no model.

    Each default is what a request gets that leaves the setting open: the model folder's own value, within the limits.
    """
    engine = service.ready()
    properties = schemas.GenerateBody.model_json_schema()["properties"]
    write_defaults(properties, service)
    write_limits(properties, service)
    return {
        "model": with_facts(service.name, service.folder) if service.folder else service.name,
        "context": engine.context,
        "settings": {name: properties[name] for name in GenerationParams.model_fields},
    }
