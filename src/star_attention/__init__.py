"""Star Attention: long-context inference for any transformers decoder (arXiv 2411.17116).

Importing this package imports neither torch nor transformers; names load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from star_attention._version import __version__

if TYPE_CHECKING:
    from star_attention import errors as errors
    from star_attention.config import StarConfig as StarConfig
    from star_attention.engine import StarLLM as StarLLM
    from star_attention.files.documents import read_document as read_document
    from star_attention.generation.batching.batch import Batch as Batch
    from star_attention.generation.batching.batch import Row as Row
    from star_attention.generation.conversation import Conversation as Conversation
    from star_attention.generation.result import Generation as Generation
    from star_attention.generation.stream import Stream as Stream
    from star_attention.hf.loading.pretrained import supported as supported
    from star_attention.planning.plan import BlockPlan as BlockPlan
    from star_attention.question_answering import pipeline as pipeline
    from star_attention.storage.context import EncodedContext as EncodedContext

_HOME = {
    "Batch": "generation.batching.batch",
    "BlockPlan": "planning.plan",
    "Conversation": "generation.conversation",
    "EncodedContext": "storage.context",
    "Generation": "generation.result",
    "Row": "generation.batching.batch",
    "StarConfig": "config",
    "StarLLM": "engine",
    "Stream": "generation.stream",
    "pipeline": "question_answering",
    "read_document": "files.documents",
    "supported": "hf.loading.pretrained",
}

__all__ = [
    "Batch",
    "BlockPlan",
    "Conversation",
    "EncodedContext",
    "Generation",
    "Row",
    "StarConfig",
    "StarLLM",
    "Stream",
    "__version__",
    "errors",
    "pipeline",
    "read_document",
    "supported",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("star_attention.errors")
    if name in _HOME:
        return getattr(importlib.import_module(f"star_attention.{_HOME[name]}"), name)
    raise AttributeError(f"module 'star_attention' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
