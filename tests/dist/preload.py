"""What the ranks of the pool have in common, imported once by the server that they are forked from."""

import torch  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401

import star_attention.engine  # noqa: F401
import tests.engines
import tests.families
import tests.model_oracle

__all__ = ["tests"]
