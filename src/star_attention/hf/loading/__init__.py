"""Loading a transformers model: its files, its support, its identity."""
