"""One reader a file format; `registry.py` lists them and defines what a reader is."""
