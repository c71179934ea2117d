"""Data sets in published formats."""
