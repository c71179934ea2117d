"""How transformers processes the scores of rows, asked once for all rows of equal settings.

Its preparation takes milliseconds and waits for the device, and it reads the whole text, although
most rows have processors that look at scores alone. A row that joins would hold up the others.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from star_attention import phase2
from star_attention.generation.arguments import translate_generation_errors
from star_attention.generation.settings import ResolvedSettings
from star_attention.hf.execution.drawing import own_criteria, scores_key
from star_attention.hf.execution.request import Request

_MOST = 64
"""Different settings that are remembered for a model."""


@dataclass(frozen=True, kw_only=True)
class Processing:
    """What the rows of one request do with their scores.

    Attributes:
        processors: transformers' logits processors.
        criteria: its stopping criteria, without those of length and of end-of-sequence tokens.
        samples: True to sample, False to take the most likely token.
    """

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    samples: bool

    @property
    def reads_text(self) -> bool:
        """True if it looks at the tokens before the next one, and may remember them."""
        return bool(self.criteria) or scores_key(self.processors) is None


_known: WeakKeyDictionary[nn.Module, dict[Hashable, Processing]] = WeakKeyDictionary()


def of(request: Request, settings: ResolvedSettings) -> Processing:
    """Return the processing of a request; the same one for equal settings, where it may be shared.

    Raises:
        InvalidInputError: settings that transformers refuses.
    """
    key = _key(request, settings)
    known = _known.setdefault(request.handle.model, {})
    if key is not None and key in known:
        return known[key]
    with translate_generation_errors():
        # It only passes the cache on.
        _, processors, criteria, samples = phase2.prepare(request, request.cache(1))
    made = Processing(processors=processors, criteria=own_criteria(criteria), samples=samples)
    if key is not None and not made.reads_text:
        if len(known) >= _MOST:
            known.pop(next(iter(known)))
        known[key] = made
    return made


def _key(request: Request, settings: ResolvedSettings) -> Hashable | None:
    """Return what equal settings have in common; None where a request has objects of its own."""
    given = request.logits_processor or []
    if request.stopping_criteria or scores_key(given) is None:
        return None
    config = sorted(vars(settings.config).items())
    return repr(config), repr(sorted(request.generation_kwargs.items())), tuple(given)
