"""Measurements beside their ceilings and what a user would otherwise run; behind `star-attention bench`."""
