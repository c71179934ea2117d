"""Contexts in host memory: layers travel to and from a device while it computes."""
