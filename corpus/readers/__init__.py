"""One reader a file format; `registry.py` lists them and says what a reader is."""
