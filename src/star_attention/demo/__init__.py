"""The demo: facts planted in a real text, and questions about them.

It compares dense attention with Star Attention, with an anchor of several sizes and without one.
"""
