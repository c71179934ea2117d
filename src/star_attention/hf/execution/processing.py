"""How transformers processes the scores of answers, asked once for all answers of equal settings.

Its preparation takes milliseconds, waits for the device several times and reads the whole text,
although most answers have processors that look at scores alone. The first token of an answer, and
the rows under way beside one that joins, would wait for it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerationMixin,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from star_attention.hf.execution.drawing import scores_key
from star_attention.hf.execution.handle import cache_argument
from star_attention.hf.execution.request import Request

CACHE_ARGUMENT = cache_argument(GenerationMixin.prepare_inputs_for_generation)
"""The name of the cache in the arguments of transformers' `generate`."""

_READERS = (RepetitionPenaltyLogitsProcessor, NoRepeatNGramLogitsProcessor)
"""Processors of transformers that look at the text anew at each token."""

_MOST = 64
"""Different settings that are remembered for a model."""


@dataclass(frozen=True, kw_only=True)
class Processing:
    """What the answers of one request do with their scores.

    Attributes:
        processors: transformers' logits processors.
        ends: its criteria of end-of-sequence tokens, which look at the last token alone.
        criteria: its other stopping criteria, without that of the length.
        samples: True to sample, False to take the most likely token.
    """

    processors: LogitsProcessorList
    ends: StoppingCriteriaList
    criteria: StoppingCriteriaList
    samples: bool

    @property
    def reads_text(self) -> bool:
        """True if it looks at the tokens before the next one."""
        return bool(self.criteria) or scores_key(self.processors) is None

    @property
    def remembers(self) -> bool:
        """True if it may remember an answer, its length or the time, and serves that one alone."""
        return bool(self.criteria) or any(
            scores_key([each]) is None and not _only_reads(each) for each in self.processors
        )


def _only_reads(processor: Any) -> bool:
    return type(processor) in _READERS and all(
        isinstance(value, int | float | None) for value in vars(processor).values()
    )


_known: WeakKeyDictionary[nn.Module, dict[Hashable, Processing]] = WeakKeyDictionary()


def of(request: Request) -> Processing:
    """Return the processing of a request; the same one for equal settings, where it may be shared.

    Raises:
        ValueError, TypeError, ...: settings that transformers refuses.
    """
    key = _key(request)
    known = _known.setdefault(request.handle.model, {})
    if key is not None and key in known:
        return known[key]
    processors, criteria, samples = prepare(request)
    ends = [each for each in criteria if isinstance(each, EosTokenCriteria)]
    own = [each for each in criteria if not isinstance(each, (EosTokenCriteria, MaxLengthCriteria))]
    made = Processing(
        processors=processors,
        ends=StoppingCriteriaList(ends),
        criteria=StoppingCriteriaList(own),
        samples=samples,
    )
    if key is not None and not made.remembers:
        if len(known) >= _MOST:
            known.pop(next(iter(known)))
        known[key] = made
    return made


def _key(request: Request) -> Hashable | None:
    """Return what equal settings have in common; None where a request has objects of its own."""
    given = request.logits_processor or []
    if request.stopping_criteria or scores_key(given) is None:
        return None
    # The model's own settings may be edited.
    defaults = vars(request.handle.model.generation_config)
    return repr(defaults), repr(sorted(request.generation_kwargs.items())), tuple(given)


def prepare(request: Request) -> tuple[LogitsProcessorList, StoppingCriteriaList, bool]:
    """Let transformers prepare a request.

    Returns:
        Logits processors, stopping criteria, and True to sample.
    """

    def custom_generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        return logits_processor, stopping_criteria, bool(generation_config.do_sample)

    ids_BS = request.text()
    prepared: tuple[LogitsProcessorList, StoppingCriteriaList, bool]
    prepared = request.handle.model.generate(
        ids_BS,
        # Only transformers' preparation reads this mask; `Request.forwards` handles padding.
        attention_mask=torch.ones_like(ids_BS),
        logits_processor=request.logits_processor,
        stopping_criteria=request.stopping_criteria,
        custom_generate=custom_generate,
        # It only passes the cache on.
        **{CACHE_ARGUMENT: request.cache(request.query_tokens)},
        **request.generation_kwargs,
    )
    return prepared
