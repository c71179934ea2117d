"""Generation settings checked before anything runs: transformers checks some late, some with a foreign error, some never."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from star_attention.errors import InvalidInputError

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
_REFUSED = {
    "assistant_early_exit": "its drafts would leave layers of the cache behind",
    "use_mtp": "its drafts need a cache of their own",
}


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Numbers from `low` to `high` (None: no limit), whole ones only where `whole`; `low` itself only where `closed`."""

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
        low = (
            ""
            if self.low is None
            else f" of at least {self.low}"
            if self.closed
            else f" above {self.low}"
        )
        high = "" if self.high is None else f" and at most {self.high}"
        return ("a whole number" if self.whole else "a number") + low + high


_SHARE = _Range(low=0, high=1, closed=False)
_RANGES = {
    "temperature": _Range(low=0),  # 0 is greedy
    "top_k": _Range(low=0, whole=True),  # 0 turns it off
    "top_p": _SHARE,
    "typical_p": _SHARE,
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
_TOKENS = (
    "pad_token_id",
    "eos_token_id",
    "forced_eos_token_id",
    "forced_bos_token_id",
    "suppress_tokens",
)


def check(words: dict[str, Any], max_new_tokens: int, vocab_size: int) -> None:
    """Raises `InvalidInputError` with the value and what it may be; None means what the model's defaults say."""
    for word, value in words.items():
        if value is None:
            continue
        if word in _REFUSED:
            raise InvalidInputError(
                f"{word} does not work with an encoded context: {_REFUSED[word]}; leave it out"
            )
        if word in _RANGES and value not in _RANGES[word]:
            raise InvalidInputError(f"{word} {value!r} does not work; give {_RANGES[word]}")
        if word == "do_sample" and not isinstance(value, bool):
            raise InvalidInputError(f"do_sample {value!r} does not work; give True or False")
        if word == "min_new_tokens" and value not in _Range(low=0, high=max_new_tokens, whole=True):
            raise InvalidInputError(
                f"min_new_tokens {value!r} does not work; give a whole number up to max_new_tokens {max_new_tokens}"
            )
        if word in _TOKENS:
            for token in value if isinstance(value, (list, tuple)) else [value]:
                if token not in _Range(low=0, high=vocab_size - 1, whole=True):
                    raise InvalidInputError(
                        f"{word} {token!r} is outside the model's vocabulary; give token ids in 0..{vocab_size - 1}"
                    )


def check_mode(config: GenerationConfig) -> GenerationMode:
    """The way of decoding that the settings add up to.

    Raises `InvalidInputError` for those that transformers itself has given up.
    """
    mode = config.get_generation_mode()
    if mode not in _MODES:
        raise InvalidInputError(
            f"these settings ask for {mode.value.replace('_', ' ')}, which transformers no longer holds;"
            " use greedy search, sampling, beams or prompt_lookup_num_tokens"
        )
    return mode
