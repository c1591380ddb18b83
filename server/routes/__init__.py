"""The HTTP routes, a file for each group; each file has `add_routes(app, service)`."""
