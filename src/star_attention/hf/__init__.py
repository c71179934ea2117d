"""All contact with transformers: its cache interface, its attention interface, loading, and what it can and cannot run."""
