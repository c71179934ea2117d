"""Loading a transformers model, and saying whether it can run and which one it is."""
