"""Imports that the ranks of the pool share: the server that forks them makes them once."""

import gc

import torch  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401

import star_attention.engine  # noqa: F401
import tests.engines
import tests.families
import tests.model_oracle
from tests.interpreter import quicken

__all__ = ["tests"]

quicken()
# Ranks leave all of this out of their collections, which take a quarter of a second with it.
gc.collect()
gc.freeze()
