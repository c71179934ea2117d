"""All contact with transformers' models: loading, attention, caches, text."""
