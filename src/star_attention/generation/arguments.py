"""Arguments of transformers' `GenerationConfig`: their names, and values that a call leaves out."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from star_attention.config import StarSettings
from star_attention.errors import (
    OF_THE_ENGINE,
    InvalidInputError,
    StarAttentionError,
    UnknownOptionError,
    first_line,
    quote,
    unknown_option,
)
from star_attention.hf.text.checks import whole_characters
from star_attention.hf.text.tool_reader import is_forced

DEFAULT_SOURCES = 3
"""Sources of an answer, where no number is given."""

_INSTEAD = {
    "generation_config": "the model's own is in use already: give the arguments that differ"
    " (top_p=0.9), or set model.generation_config",
    "stop_strings": "use stop=",
    "output_logits": "use return_logits=True",
    "output_scores": "use return_logits=True, which gives the logits before any processing",
    "return_dict_in_generate": "the result holds everything",
    "use_cache": "the encoded context is the cache",
    "cache_implementation": "the encoded context is the cache",
    "past_key_values": "the encoded context is the cache",
    "assistant_model": "drafts come from the text itself here: use prompt_lookup_num_tokens=10",
    "stream": "use stream()",
    "streamer": "use stream()",
    "max_tokens": "use max_new_tokens=",
    "response_format": "use json_schema=",
    "guided_json": "use json_schema=",
    "n": "use num_return_sequences= with do_sample=True",
    "best_of": "use num_return_sequences= with do_sample=True",
    "stop_token_ids": "use eos_token_id=, or stop= with the tokens' texts",
    "logit_bias": "use sequence_bias={(token_id,): bias}",
    "presence_penalty": "use repetition_penalty=",
    "frequency_penalty": "use repetition_penalty=",
    **dict.fromkeys(
        ("enable_thinking", "thinking", "reasoning_effort", "documents"),
        "the chat template reads it: use chat_template_kwargs={name: value}",
    ),
    **{name: OF_THE_ENGINE.format(name) for name in StarSettings.__annotations__},
    "prefix_allowed_tokens_fn": "give transformers' PrefixConstrainedLogitsProcessor in"
    " logits_processor=",
}
_SET_BY_US = {
    "max_length",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "return_dict_in_generate",
    "stop_strings",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "prefill_chunk_size",
}
_REPETITIONS = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
}
"""Arguments that look at the tokens of the context too, and the values that turn them off."""
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_h",
)


def resolve_generation_kwargs(
    model: Any,
    generation_kwargs: dict[str, Any],
    max_new_tokens: int,
    ignore_eos: bool,
    turn_ends: Collection[int] = (),
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Fill arguments of `GenerationConfig` with what the engine sets itself.

    Args:
        model: a transformers model.
        generation_kwargs: a call's arguments of `GenerationConfig`.
        max_new_tokens: most tokens of an answer.
        ignore_eos: continue past end-of-sequence tokens.
        turn_ends: tokens that end an answer besides those of the model's own settings.

    Returns:
        The resolved settings, and the arguments for transformers' `generate`.
    """
    defaults = model.generation_config
    _check_names(generation_kwargs)
    kwargs = dict(generation_kwargs)
    if kwargs.get("temperature") == 0:
        kwargs |= {"do_sample": False} | {name: None for name in _SAMPLING if name in kwargs}
    elif "do_sample" not in kwargs and any(kwargs.get(name) is not None for name in _SAMPLING):
        kwargs["do_sample"] = True
    if not kwargs.get("do_sample", defaults.do_sample):
        # The model's sampling defaults have no effect here, and transformers warns about each.
        kwargs |= {
            name: None for name in _SAMPLING if name not in kwargs and hasattr(defaults, name)
        }
    kwargs["max_new_tokens"] = max_new_tokens
    # Defaults of the model that would change the result's type, or bring a cache of their own.
    kwargs |= {
        "use_cache": True,
        "return_dict_in_generate": False,
        "cache_implementation": None,
        "stop_strings": None,
    }
    if ignore_eos:
        kwargs["eos_token_id"] = None
    elif "eos_token_id" not in kwargs and (more := set(turn_ends) - as_set(defaults.eos_token_id)):
        kwargs["eos_token_id"] = sorted(as_set(defaults.eos_token_id) | more)
    if kwargs.get("pad_token_id", defaults.pad_token_id) is None:
        eos_ids = as_set(kwargs.get("eos_token_id", defaults.eos_token_id))
        kwargs["pad_token_id"] = min(eos_ids, default=0)
    config = copy.copy(defaults)
    with translate_generation_errors():
        config.update(**kwargs)
    return config, kwargs


def most_sources(value: Any) -> int:
    """Return how many sources `sources=value` asks for.

    Raises:
        InvalidInputError: neither a bool nor a number of them.
    """
    if isinstance(value, bool):
        return DEFAULT_SOURCES if value else 0
    if not isinstance(value, int):
        raise InvalidInputError(
            f"sources {quote(value)}: expected a bool or an int, got {type(value).__name__}; give"
            f" True for {DEFAULT_SOURCES} passages, or their number"
        )
    if value < 0:
        raise InvalidInputError(
            f"sources {value} is below 0; give the most passages to name, or 0 for none"
        )
    return value


def looking_back(config: GenerationConfig) -> dict[str, Any]:
    """Return the penalties and bans in effect that count the tokens of the context too."""
    values = {name: getattr(config, name, None) for name in _REPETITIONS}
    return {name: value for name, value in values.items() if value not in (None, 0, 1.0)}


def warn_of_penalties(model: Any, generation_kwargs: dict[str, Any]) -> None:
    """Warn of penalties on repeating the context that come from the model's own settings.

    A model that answers from a document has to repeat it.
    """
    for name, value in looking_back(model.generation_config).items():
        if name not in generation_kwargs:
            warnings.warn(
                f"the model's generation_config sets {name} {value}, which counts the tokens of the"
                " context too and can keep an answer from quoting it; give"
                f" {name}={_REPETITIONS[name]} to turn it off, or {name}={value} to keep it",
                stacklevel=2,
            )


def _check_names(generation_kwargs: dict[str, Any]) -> None:
    for name in generation_kwargs:
        known = _known_names()
        if name in ("max_length", "min_length"):
            raise UnknownOptionError(f"{name} counts the context too; use {name[:3]}_new_tokens")
        if name in _INSTEAD or name not in known:
            raise unknown_option(
                "generate()",
                name,
                known={
                    *known,
                    "stop",
                    "seed",
                    "answer_prefix",
                    "sources",
                    "ignore_eos",
                    "chat_template_kwargs",
                    "tools",
                    "tool_choice",
                },
                instead=_INSTEAD,
                otherwise="it takes those of transformers' GenerationConfig",
            )


@functools.cache
def _known_names() -> frozenset[str]:
    """Return the arguments of `GenerationConfig` that a call may give."""
    return frozenset(GenerationConfig().to_dict()) - _SET_BY_US


@contextmanager
def translate_generation_errors() -> Iterator[None]:
    """Raise `InvalidInputError` for an error that transformers raises about its settings."""
    try:
        yield
    except StarAttentionError:
        raise
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        NotImplementedError,
    ) as error:
        raise InvalidInputError(
            f"these generation settings do not work: {first_line(error)}"
        ) from error


def as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """Return checked stop strings.

    Raises:
        InvalidInputError: a value other than a str or a list of non-empty str.
    """
    if not isinstance(stop, (str, list, tuple, type(None))):
        raise InvalidInputError(
            f"stop {quote(stop)}: expected a str or a list of str, got {type(stop).__name__}"
        )
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    for string in stops:
        if not isinstance(string, str) or not string:
            raise InvalidInputError(
                f"stop string {quote(string)} is empty or not a str; give at least one character"
            )
    return [whole_characters(string, "the stop string") for string in stops]


def stops_of_model(model: Any, tokenizer: Any) -> list[str]:
    """Return the stop strings of a model's own settings.

    Raises:
        InvalidInputError: they cannot work.
    """
    try:
        stops = stop_strings(getattr(model.generation_config, "stop_strings", None))
    except InvalidInputError as error:
        raise InvalidInputError(
            f"the model's generation_config has stop_strings that cannot work ({error}); give"
            " stop=[] to do without, or set model.generation_config.stop_strings"
        ) from error
    if stops and tokenizer is None:
        warnings.warn(
            f"the model's generation_config sets stop_strings {stops}, which have no effect"
            " without a tokenizer; give one to StarLLM, or stop=[] to do without",
            stacklevel=2,
        )
        return []
    return stops


def check_choice(choice: Any, *, json_schema: Any, skip_special_tokens: bool) -> None:
    """Raise `InvalidInputError` for a `tool_choice` that cannot work with other arguments.

    Args:
        choice: the choice of tools.
        json_schema, skip_special_tokens: the other arguments.
    """
    if not isinstance(choice, (str, type(None))):
        raise InvalidInputError(
            f'tool_choice {quote(choice)}: expected "auto", "none", "required" or the name of a'
            f" tool, got {type(choice).__name__}"
        )
    if not is_forced(choice):
        return
    if json_schema is not None:
        raise InvalidInputError(
            f"tool_choice {quote(choice)} makes the answer the call of a tool, and json_schema"
            " something else; leave one of them out"
        )
    if not skip_special_tokens:
        raise InvalidInputError(
            f"tool_choice {quote(choice)} does not work with skip_special_tokens=False, which keeps"
            " reasoning in the text; leave it out"
        )
