"""Decisions in integers, before any tensor: blocks, operations, bytes and times."""
