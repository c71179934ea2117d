"""Encoded contexts: keys and values in memory and in files."""
