"""Arguments of GenerationConfig, checked before anything runs.

transformers checks some of them late, some with an error of another library, and some never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from star_attention.errors import InvalidInputError, quote

_SUPPORTED_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
_REFUSED = {
    "assistant_early_exit": "its drafts would leave some layers of the cache out of step",
    "use_mtp": "its drafts need a cache of their own",
}
"""Arguments that an encoded context excludes, with the reasons."""


@dataclass(frozen=True, kw_only=True)
class _Range:
    """A range of numbers.

    Attributes:
        low: lower limit, None for none.
        high: upper limit, included; None for none.
        whole: True for whole numbers only.
        closed: True if `low` itself is included.
    """

    low: float | None = None
    high: float | None = None
    whole: bool = False
    closed: bool = True

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        above = self.low is None or (value >= self.low if self.closed else value > self.low)
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        low = ""
        if self.low is not None:
            low = f" of at least {self.low}" if self.closed else f" above {self.low}"
        high = "" if self.high is None else f" and at most {self.high}"
        return ("an integer" if self.whole else "a number") + low + high


# Temperature 0 is greedy search, and top_k 0 turns top-k off.
_RANGES = {
    "temperature": _Range(low=0),
    "top_k": _Range(low=0, whole=True),
    "top_p": _Range(low=0, high=1, closed=False),
    "typical_p": _Range(low=0, high=1, closed=False),
    "min_p": _Range(low=0, high=1),
    "epsilon_cutoff": _Range(low=0, high=1),
    "eta_cutoff": _Range(low=0, high=1),
    "repetition_penalty": _Range(low=0, closed=False),
    "no_repeat_ngram_size": _Range(low=0, whole=True),
    "num_beams": _Range(low=1, whole=True),
    "num_return_sequences": _Range(low=1, whole=True),
    "length_penalty": _Range(),
    "max_time": _Range(low=0, closed=False),
}
_TOKEN_IDS = (
    "pad_token_id",
    "eos_token_id",
    "forced_eos_token_id",
    "forced_bos_token_id",
    "suppress_tokens",
)


def check(arguments: dict[str, Any], max_new_tokens: int, vocab_size: int) -> None:
    """Check the values of generation arguments; None stands for the model's default.

    Args:
        arguments: arguments of GenerationConfig, by name.
        max_new_tokens: most tokens of an answer.
        vocab_size: the model's number of token ids.

    Raises:
        InvalidInputError: gives the value and what it may be.
    """
    for name, value in arguments.items():
        if value is None:
            continue
        if name in _REFUSED:
            raise InvalidInputError(
                f"{name} does not work with an encoded context: {_REFUSED[name]}; leave it out"
            )
        if name in _RANGES and value not in _RANGES[name]:
            raise InvalidInputError(f"{name}: expected {_RANGES[name]}, got {quote(value)}")
        if name == "do_sample" and not isinstance(value, bool):
            raise InvalidInputError(f"do_sample: expected True or False, got {quote(value)}")
        if name == "min_new_tokens" and value not in _Range(low=0, high=max_new_tokens, whole=True):
            raise InvalidInputError(
                f"min_new_tokens: expected an integer up to max_new_tokens {max_new_tokens},"
                f" got {quote(value)}"
            )
        if name in _TOKEN_IDS:
            _check_token_ids(name, value, vocab_size)


def _check_token_ids(name: str, value: Any, vocab_size: int) -> None:
    for token in value if isinstance(value, (list, tuple)) else [value]:
        if token not in _Range(low=0, high=vocab_size - 1, whole=True):
            raise InvalidInputError(
                f"{name} {quote(token)} is outside the model's vocabulary; give token ids in"
                f" 0..{vocab_size - 1}"
            )


def check_mode(config: GenerationConfig) -> GenerationMode:
    """Return the decoding mode that the settings select.

    Raises:
        InvalidInputError: a mode that transformers itself has dropped.
    """
    mode = config.get_generation_mode()
    if mode not in _SUPPORTED_MODES:
        raise InvalidInputError(
            f"these settings select {mode.value.replace('_', ' ')}, which transformers no longer"
            " supports; use greedy search, sampling, beams or prompt_lookup_num_tokens"
        )
    return mode
