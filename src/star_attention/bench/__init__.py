"""The benchmarks of `star-attention bench`.

Each measures a piece of work together with the machine's ceilings and the alternatives that a user
has today.
"""
