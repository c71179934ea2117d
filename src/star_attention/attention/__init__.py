"""Attention over parts of the keys, and exact merging of the parts. Imports torch, nothing of transformers."""
