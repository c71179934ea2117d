"""Attention over parts of the keys, and exact merging of the parts, on torch alone."""
