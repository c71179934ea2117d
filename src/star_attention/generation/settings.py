"""Settings of one answer: the arguments of `generate`, checked and resolved against the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from star_attention.config import MAX_NEW_TOKENS, check_max_new_tokens, unknown_option
from star_attention.errors import (
    InvalidInputError,
    StarAttentionError,
    UnknownOptionError,
    first_line,
    quote,
)
from star_attention.hf import generation_config
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.loading import tensor_parallel
from star_attention.phase2 import OWN_LOOP_MODES

_INSTEAD = {
    "generation_config": "the model's own is in use already: give the arguments that differ"
    " (top_p=0.9), or set model.generation_config",
    "stop_strings": "use stop=",
    "output_logits": "use return_logits=True",
    "output_scores": "use return_logits=True, which gives the logits before any processing",
    "return_dict_in_generate": "the result holds everything",
    "use_cache": "the encoded context is the cache",
    "cache_implementation": "the encoded context is the cache",
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
_READS_THE_CONTEXT = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
)
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


class GenerateOptions(TypedDict, total=False):
    """Keywords of `StarLLM.generate` and `StarLLM.stream`, for editors and type checkers.

    `generate` takes every argument of `GenerationConfig` about search and sampling; these are the
    common ones that leave one answer to a query.
    """

    max_new_tokens: int
    seed: int | None
    ignore_eos: bool
    stop: str | Sequence[str] | None
    return_logits: bool
    answer_prefix: str
    logits_processor: LogitsProcessorList | None
    stopping_criteria: StoppingCriteriaList | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | str | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    suppress_tokens: list[int] | None
    min_new_tokens: int | None
    prompt_lookup_num_tokens: int | None
    guidance_scale: float | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    max_time: float | None


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Keywords of one call of `generate` or `stream`, as given.

    Attributes:
        max_new_tokens: most tokens of an answer.
        seed: makes sampling repeatable, whatever runs at the same time (with beams: unless another
            thread draws from torch's global generator, which transformers' own loops use).
        ignore_eos: continue past end-of-sequence tokens.
        stop: strings that end an answer; they are not part of its text.
        return_logits: keep the unprocessed logits (greedy search and sampling).
        answer_prefix: text that the answer is made to begin with, after the chat template's start
            of the answer where there is one; not part of the result.
        logits_processor, stopping_criteria: transformers' lists.
        generation_kwargs: arguments of transformers' `GenerationConfig`.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int | None = None
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = None
    return_logits: bool = False
    answer_prefix: str = ""
    logits_processor: LogitsProcessorList | None = None
    stopping_criteria: StoppingCriteriaList | None = None
    generation_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **arguments: Any) -> GenerationSettings:
        """Sort the keywords of a call into our settings and arguments of `GenerationConfig`."""
        names = {f.name for f in fields(cls)} - {"generation_kwargs"}
        settings = {name: value for name, value in arguments.items() if name in names}
        others = {name: value for name, value in arguments.items() if name not in names}
        return cls(**settings, generation_kwargs=others)

    def __post_init__(self) -> None:
        check_max_new_tokens(self.max_new_tokens)
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise InvalidInputError(f"seed {quote(seed)} is not an integer")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise InvalidInputError(f"seed {seed} has more than 64 bits; give a smaller number")
        if not isinstance(self.answer_prefix, str):
            raise InvalidInputError(
                f"answer_prefix {quote(self.answer_prefix)}: expected a str,"
                f" got {type(self.answer_prefix).__name__}"
            )
        for name in ("logits_processor", "stopping_criteria"):
            value = getattr(self, name)
            if not isinstance(value, (list, type(None))):
                raise InvalidInputError(
                    f"{name}: expected a list of them, got {type(value).__name__}"
                )

    def resolve(self, handle: ModelHandle, tokenizer: Any) -> ResolvedSettings:
        """Check the settings against a model and fill in its defaults.

        Raises:
            InvalidInputError: a value that cannot work.
            UnknownOptionError: an argument that `GenerationConfig` does not have.
        """
        generation_config.check(self.generation_kwargs, self.max_new_tokens, handle.vocab_size)
        config, generation_kwargs = resolve_generation_kwargs(
            handle.model, self.generation_kwargs, self.max_new_tokens, self.ignore_eos
        )
        uses_own_loop = generation_config.check_mode(config) in OWN_LOOP_MODES
        self._check_combinations(handle, config, uses_own_loop)
        stops = stop_strings(self.stop)
        if stops and tokenizer is None:
            raise InvalidInputError("a stop string needs a tokenizer; give one to StarLLM")
        return ResolvedSettings(
            arguments=self,
            stops=stops,
            config=config,
            generation_kwargs=generation_kwargs,
            uses_own_loop=uses_own_loop,
        )

    def _check_combinations(
        self, handle: ModelHandle, config: GenerationConfig, uses_own_loop: bool
    ) -> None:
        blind = [
            name for name in _READS_THE_CONTEXT if getattr(config, name, None) not in (None, 0, 1.0)
        ]
        if blind and not uses_own_loop and handle.rotaries:
            raise InvalidInputError(
                f"{blind[0]} does not work with beams and prompt lookup for this model: its rotary"
                " frequencies depend on the length, so transformers' loops get the query alone and"
                " would not see the context; use greedy search or sampling"
            )
        is_sharded = tensor_parallel.model_shard(handle.model) is not None
        if is_sharded and getattr(config, "guidance_scale", None) not in (None, 1):
            raise InvalidInputError(
                "guidance_scale needs extra forwards, which the other tensor-parallel ranks do not"
                " follow; leave it out, or use tensor_parallel 1"
            )
        if self.return_logits and not uses_own_loop:
            raise InvalidInputError(
                "return_logits works with greedy search and sampling, not with beams; use"
                " StarLLM.logits instead"
            )


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings:
    """Settings of one call, checked against a model and with its defaults filled in.

    Attributes:
        arguments: the call's own arguments.
        stops: stop strings.
        config: transformers' settings.
        generation_kwargs: arguments for transformers' `generate`; they override the model's
            defaults.
        uses_own_loop: True if phase 2 runs our decoding loop, False if it runs transformers' own.
    """

    arguments: GenerationSettings
    stops: list[str]
    config: GenerationConfig
    generation_kwargs: dict[str, Any]
    uses_own_loop: bool

    @property
    def max_new_tokens(self) -> int:
        return self.arguments.max_new_tokens

    @property
    def answer_prefix(self) -> str:
        return self.arguments.answer_prefix

    @property
    def answers_per_query(self) -> int:
        return self.config.num_return_sequences or 1

    @property
    def eos_ids(self) -> set[int]:
        """Ids of end-of-sequence tokens."""
        return _as_set(self.config.eos_token_id)


def resolve_generation_kwargs(
    model: Any, generation_kwargs: dict[str, Any], max_new_tokens: int, ignore_eos: bool
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Fill arguments of `GenerationConfig` with what the engine sets itself.

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
    if kwargs.get("pad_token_id", defaults.pad_token_id) is None:
        eos_ids = _as_set(kwargs.get("eos_token_id", defaults.eos_token_id))
        kwargs["pad_token_id"] = min(eos_ids, default=0)
    config = copy.deepcopy(defaults)
    with translate_generation_errors():
        config.update(**kwargs)
    return config, kwargs


def _check_names(generation_kwargs: dict[str, Any]) -> None:
    known = set(GenerationConfig().to_dict()) - _SET_BY_US
    for name in generation_kwargs:
        if name in ("max_length", "min_length"):
            raise UnknownOptionError(f"{name} counts the context too; use {name[:3]}_new_tokens")
        if name in _INSTEAD or name not in known:
            raise unknown_option(
                "generate()",
                name,
                known={*known, "stop", "seed", "answer_prefix", "ignore_eos"},
                instead=_INSTEAD,
                otherwise="it takes those of transformers' GenerationConfig",
            )


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
    return stops


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
