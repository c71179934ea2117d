"""Samples: what a question of an evaluation is, how long, and from which text."""
