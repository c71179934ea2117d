"""Caches for transformers' models that store keys and values and compute attention over them."""
