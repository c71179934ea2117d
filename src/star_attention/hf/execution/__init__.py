"""Forwards of a transformers model with our attention: hooks, compiled layers, CUDA graphs."""
