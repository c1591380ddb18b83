"""The HTTP server behind `api.py`: settings, schemas, errors, routes, streaming, WebSocket, the model's lifecycle."""
