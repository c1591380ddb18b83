"""From books to token shards: sources, documents, cleaning, encoding, styles, worker processes, preparation."""
