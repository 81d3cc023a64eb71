"""The object store of the embedded service: a SQLite database with the rules of an API server."""
