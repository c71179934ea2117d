"""Settings of one answer: the arguments of `generate`, checked and resolved against the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from star_attention.config import MAX_NEW_TOKENS, check_max_new_tokens
from star_attention.errors import InvalidInputError, quote
from star_attention.generation.arguments import (
    as_set,
    check_choice,
    looking_back,
    most_sources,
    resolve_generation_kwargs,
    stop_strings,
    stops_of_model,
    warn_of_penalties,
)
from star_attention.generation.json_answers import compile_schema
from star_attention.hf import generation_config
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.loading import tensor_parallel
from star_attention.hf.text.answer import TextSettings
from star_attention.hf.text.endings import turn_end_ids, warn_of_unseen_stops
from star_attention.hf.text.template import check_kwargs
from star_attention.hf.text.tool_reader import ToolReader, check_tools, is_forced
from star_attention.methods import Method, check_second_look
from star_attention.phase2 import OWN_LOOP_MODES
from star_attention.planning.second_look import check_keeps, check_share


class GenerateOptions(TypedDict, total=False):
    """Keywords of `StarLLM.generate` and `StarLLM.stream`, for editors and type checkers.

    `generate` takes every argument of `GenerationConfig` about search and sampling; these are the
    common ones that leave one answer to a query.
    """

    max_new_tokens: int
    seed: int | None
    ignore_eos: bool
    stop: str | Sequence[str] | None
    skip_special_tokens: bool
    json_schema: dict[str, Any] | type | None
    logprobs: int | None
    return_logits: bool
    answer_prefix: str
    second_look: float
    sources: bool | int
    keep: bool
    chat_template_kwargs: dict[str, Any] | None
    tools: Sequence[Any] | None
    tool_choice: str | None
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
        seed: makes sampling repeatable: an answer is the same whatever runs at the same time, and
            alone or in a batch, in which every query starts from the seed. (With beams unless
            another thread draws from torch's global generator, which transformers' own loops use;
            in 16 bits batches round differently.)
        ignore_eos: continue past end-of-sequence tokens.
        stop: strings that end an answer; they are not part of its text. They join those of the
            model's own settings (`stop_strings`), which `[]` turns off.
        skip_special_tokens: leave special tokens out of the text, and keep a model's reasoning
            apart (`Generation.reasoning`); False keeps all as the model writes it.
        json_schema: a JSON schema (dict) or a pydantic model, which the text of the answer follows
            unless `max_new_tokens` cuts it (greedy search and sampling; the extra `json`).
        logprobs: record the log probability of each token, and this number of most likely tokens
            in its place (greedy search and sampling).
        return_logits: keep the unprocessed logits (greedy search and sampling).
        answer_prefix: text that the answer is made to begin with, after the chat template's start
            of the answer where there is one; not part of the result.
        second_look: share of the context's tokens, 0 to 1, that are computed again before the query
            is answered: those that it attends to most, with everything before them in sight (in
            the layers that look back, if some do), for this answer alone. Queries are then answered
            one after another, each with a choice of its own. It takes the memory of one more copy
            of the context.
        sources: name the passages of the context that the answer attended to most: True for 3, or
            their number (`Generation.sources`). Query and answer are read once more for it.
        keep: keep the keys and values of query and answer in memory, for a next turn
            (`Generation.continue_with`). A turn of a conversation is kept unless it says False.
        chat_template_kwargs: what the chat template reads beside messages, where it differs from
            the context's.
        tools: in a chat, what the model may call: functions with types and docstrings, or dicts in
            OpenAI's form (`Generation.tool_calls`). Not needed where the context was encoded with
            tools, which its queries have. Others are refused, unless the chat template writes
            tools after the context.
        tool_choice: "auto" leaves it to the model; "required", or the name of a tool, makes the
            answer one call (the extra `json`; greedy search and sampling); "none" leaves `tools`
            out of the prompt, and looks for no calls.
        logits_processor, stopping_criteria: transformers' lists.
        generation_kwargs: arguments of transformers' `GenerationConfig`.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int | None = None
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = None
    skip_special_tokens: bool = True
    json_schema: dict[str, Any] | type | None = None
    logprobs: int | None = None
    return_logits: bool = False
    answer_prefix: str = ""
    second_look: float = 0.0
    sources: bool | int = False
    keep: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Sequence[Any] | None = None
    tool_choice: str | None = None
    logits_processor: LogitsProcessorList | None = None
    stopping_criteria: StoppingCriteriaList | None = None
    generation_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **arguments: Any) -> GenerationSettings:
        """Sort the keywords of a call into our settings and arguments of `GenerationConfig`."""
        settings = {name: value for name, value in arguments.items() if name in _OWN}
        others = {name: value for name, value in arguments.items() if name not in _OWN}
        return cls(**settings, generation_kwargs=others)

    def __post_init__(self) -> None:
        check_max_new_tokens(self.max_new_tokens)
        check_choice(
            self.tool_choice,
            json_schema=self.json_schema,
            skip_special_tokens=self.skip_special_tokens,
        )
        check_kwargs(self.chat_template_kwargs)
        check_share(self.second_look)
        most_sources(self.sources)
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise InvalidInputError(f"seed: expected an integer, got {quote(seed)}")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise InvalidInputError(f"seed {seed} has more than 64 bits; give a smaller number")
        if not isinstance(self.answer_prefix, str):
            raise InvalidInputError(
                f"answer_prefix {quote(self.answer_prefix)}: expected a str,"
                f" got {type(self.answer_prefix).__name__}"
            )
        for name in ("skip_special_tokens", "keep"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidInputError(f"{name}: expected True or False, got {quote(value)}")
        for name in ("logits_processor", "stopping_criteria"):
            value = getattr(self, name)
            if not isinstance(value, (list, type(None))):
                raise InvalidInputError(f"{name}: expected a list, got {type(value).__name__}")

    def resolve(
        self, handle: ModelHandle, tokenizer: Any, *, chat: bool = False
    ) -> ResolvedSettings:
        """Check the settings against a model and fill in its defaults.

        Args:
            handle: the model.
            tokenizer: its tokenizer, or None.
            chat: True for answers in a chat, which the end of the assistant's turn ends.

        Raises:
            InvalidInputError: a value that cannot work.
            UnknownOptionError: an argument that `GenerationConfig` does not have.
        """
        generation_config.check(self.generation_kwargs, self.max_new_tokens, handle.vocab_size)
        if self.tools is not None:
            check_tools(tokenizer, self.tools, self.chat_template_kwargs)
            # Raises for a call that cannot be made.
            ToolReader.of(tokenizer, self.tools, self.tool_choice)
        turn_ends = turn_end_ids(tokenizer) if chat else set()
        config, generation_kwargs = resolve_generation_kwargs(
            handle.model,
            self.generation_kwargs,
            self.max_new_tokens,
            self.ignore_eos,
            {token for token in turn_ends if token < handle.vocab_size},
        )
        warn_of_penalties(handle.model, self.generation_kwargs)
        uses_own_loop = generation_config.check_mode(config) in OWN_LOOP_MODES
        self._check_combinations(handle, config, uses_own_loop)
        stops = stop_strings(self.stop)
        if stops and tokenizer is None:
            raise InvalidInputError("a stop string needs a tokenizer; give one to StarLLM")
        if not self.ignore_eos and self.stop != []:
            stops += stops_of_model(handle.model, tokenizer)
        if stops and self.skip_special_tokens:
            warn_of_unseen_stops(tokenizer, stops)
        grammar = None
        if self.json_schema is not None:
            grammar = compile_schema(
                self.json_schema, tokenizer, handle.vocab_size, as_set(config.eos_token_id)
            )
        return ResolvedSettings(
            arguments=self,
            stops=stops,
            config=config,
            generation_kwargs=generation_kwargs,
            uses_own_loop=uses_own_loop,
            grammar=grammar,
        )

    def _check_combinations(
        self, handle: ModelHandle, config: GenerationConfig, uses_own_loop: bool
    ) -> None:
        blind = list(looking_back(config))
        if blind and not uses_own_loop and handle.rotaries:
            raise InvalidInputError(
                f"{blind[0]} does not work with beams and prompt lookup for this model: its rotary"
                " frequencies depend on the length, so transformers' loops get the query alone and"
                " would not see the context; use greedy search or sampling"
            )
        count = self.logprobs
        if count is not None and not (type(count) is int and 0 <= count <= handle.vocab_size):
            raise InvalidInputError(
                "logprobs: expected the number of most likely tokens to record,"
                f" 0..{handle.vocab_size}, got {quote(count)}"
            )
        is_sharded = tensor_parallel.model_shard(handle.model) is not None
        if is_sharded and getattr(config, "guidance_scale", None) not in (None, 1):
            raise InvalidInputError(
                "guidance_scale needs extra forwards, which the other tensor-parallel ranks do not"
                " follow; leave it out, or use tensor_parallel 1"
            )
        is_call = is_forced(self.tool_choice)
        has_grammar = is_call or self.json_schema is not None
        if has_grammar and (not uses_own_loop or config.min_new_tokens):
            name = f"tool_choice {quote(self.tool_choice)}" if is_call else "json_schema"
            raise InvalidInputError(
                f"{name} works with greedy search and sampling, and decides the length itself;"
                " leave out beams, prompt lookup and min_new_tokens"
            )
        for name, wanted in (
            ("return_logits", self.return_logits),
            ("logprobs", count is not None),
        ):
            if wanted and not uses_own_loop:
                raise InvalidInputError(
                    f"{name} works with greedy search and sampling, not with beams; use"
                    " StarLLM.logits instead"
                )


_OWN = frozenset(f.name for f in fields(GenerationSettings)) - {"generation_kwargs"}
"""Keywords of a call that are not transformers'."""


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
        grammar: the compiled `json_schema`, or the call that has to be made; None for neither.
        tool_reader: finds the calls of tools in answers; None where none are looked for.
    """

    arguments: GenerationSettings
    stops: list[str]
    config: GenerationConfig
    generation_kwargs: dict[str, Any]
    uses_own_loop: bool
    grammar: Any = None
    tool_reader: ToolReader | None = None

    def check_method(self, method: Method) -> None:
        """Raise `InvalidInputError` for settings that contexts of a method cannot have."""
        check_second_look(method.name, self.second_look)

    def check_windows(
        self, windows: list[int | None], context_tokens: int, kv_windows: str
    ) -> None:
        """Raise `InvalidInputError` for a second look at a context that lacks keys for it.

        Args:
            windows: sliding window of each layer in tokens, None for full attention.
            context_tokens: tokens of the context.
            kv_windows: what it keeps of layers with a window.
        """
        check_keeps(self.second_look, windows, context_tokens, kv_windows)

    @property
    def max_new_tokens(self) -> int:
        return self.arguments.max_new_tokens

    @property
    def second_look(self) -> float:
        return self.arguments.second_look

    @property
    def sources(self) -> int:
        """The most sources of an answer; 0 for none."""
        return most_sources(self.arguments.sources)

    @property
    def answer_prefix(self) -> str:
        return self.arguments.answer_prefix

    @property
    def chat_template_kwargs(self) -> dict[str, Any] | None:
        """What the chat template reads for a query, with its tools if they may be called."""
        kwargs, tools = self.arguments.chat_template_kwargs, self.arguments.tools
        if self.arguments.tool_choice == "none":
            return kwargs and {name: value for name, value in kwargs.items() if name != "tools"}
        return kwargs if tools is None else {**(kwargs or {}), "tools": list(tools)}

    @property
    def answers_per_query(self) -> int:
        return self.config.num_return_sequences or 1

    def for_one_answer(self) -> ResolvedSettings:
        """Return the settings of one of several answers to a query."""
        if self.answers_per_query == 1:
            return self
        config = copy.copy(self.config)
        config.num_return_sequences = 1
        kwargs = self.generation_kwargs | {"num_return_sequences": 1}
        return replace(self, config=config, generation_kwargs=kwargs)

    def reading_calls(
        self, chat: dict[str, Any] | None, tokenizer: Any, vocab_size: int
    ) -> ResolvedSettings:
        """Return settings that find the calls of tools in answers, and force one if it has to be.

        Args:
            chat: the chat of the context; None for raw text and token ids.
            tokenizer: the model's, or None.
            vocab_size: the model's number of token ids.

        Raises:
            InvalidInputError: a call has to be made, and cannot.
        """
        own = self.chat_template_kwargs if chat is not None else None
        tools = ((chat or {}).get("template_kwargs", {}) | (own or {})).get("tools")
        reader = ToolReader.of(tokenizer, tools, self.arguments.tool_choice)
        schema = None if reader is None else reader.grammar
        if schema is None:
            return replace(self, tool_reader=reader)
        grammar = compile_schema(schema, tokenizer, vocab_size, self.eos_ids)
        return replace(self, tool_reader=reader, grammar=grammar)

    @property
    def text(self) -> TextSettings:
        """How answers become text."""
        return TextSettings(
            stops=self.stops,
            answer_prefix=self.answer_prefix,
            skip_special_tokens=self.arguments.skip_special_tokens,
            eos_ids=self.eos_ids,
        )

    @property
    def eos_ids(self) -> set[int]:
        """Ids of end-of-sequence tokens."""
        return as_set(self.config.eos_token_id)
