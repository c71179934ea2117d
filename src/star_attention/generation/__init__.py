"""Answering: settings of a call, the run that produces its tokens, and the result.

Tokens are computed in `phase2`.
"""
