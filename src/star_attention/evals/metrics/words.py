"""Splitting predictions into words."""

from __future__ import annotations


def split_words(text: str, punctuation: str) -> list[str]:
    """Split a text at white space and at these characters."""
    return text.translate(dict.fromkeys(map(ord, punctuation), " ")).split()
