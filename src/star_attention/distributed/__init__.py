"""Processes that share a context: their mesh, messages, collectives and failures."""
