"""On-disk formats: atomic writes, token shards, the catalogue of documents, Hugging Face's GPT-2 format, S3."""
