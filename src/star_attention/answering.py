"""One call of `generate` or `stream`: settings resolved, tokens on demand, and what comes of it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from star_attention import phase2
from star_attention.clock import Clock
from star_attention.config import MAX_NEW_TOKENS, check_max_new_tokens
from star_attention.distributed.comm import Comm
from star_attention.distributed.messages import END
from star_attention.errors import InvalidInputError, StarAttentionError, UnknownOptionError
from star_attention.hf import generation_config
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.loading import tensor_parallel
from star_attention.hf.text import tokens
from star_attention.planning.traffic import Traffic
from star_attention.storage.oom import translate_oom

_INSTEAD = {
    "generation_config": "the model's own is used already: give what is to differ as words (top_p=0.9), or set"
    " model.generation_config",
    "stop_strings": "use stop=",
    "output_logits": "use return_logits=True",
    "output_scores": "use return_logits=True, which are the logits before any processing",
    "return_dict_in_generate": "the result holds everything",
    "use_cache": "the encoded context is the cache",
    "cache_implementation": "the encoded context is the cache",
}
_OURS = {
    "max_length",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "return_dict_in_generate",
    "stop_strings",
}
_OURS |= {
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "prefill_chunk_size",
}
_LOOKS_AT_THE_TEXT = (
    *(
        "repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "encoder_no_repeat_ngram_size",
    ),
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


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds and rates of one answer: phase 1, time to first token, and tokens a second after the first."""

    encode_s: float
    ttft_s: float
    tokens_per_s: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """One answer; `str(answer)` is its text.

    text: the answer without special tokens, cut before a stop string ("" without a tokenizer).
    token_ids: every generated id, the one that ended the answer included.
    finish_reason: "stop" (end-of-sequence token, stop string or stopping criterion) or "length" (`max_new_tokens`).
    logits: fp32 `[tokens, vocabulary]` on CPU before any processing, when asked for.
    query_tokens: length of the query; peak_bytes: peak device memory of the call, None where it is not measured (CPU).
    wire: what the hosts exchanged meanwhile, all together; wire_within: what the ranks within hosts did (tensor parallelism).
    Every rank has the same answer, but only rank 0 logits.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    query_tokens: int
    timings: Timings
    logits: Tensor | None = None
    peak_bytes: int | None = None
    wire: Traffic = field(default_factory=Traffic)
    wire_within: Traffic = field(default_factory=Traffic)

    def __str__(self) -> str:
        return self.text


class Stream(Iterator[str]):
    """The text of one answer as it is generated; `result` is the whole `Generation` once it has ended.

    Nothing runs between two pieces, so a stream may be suspended for any time, and other calls on the same model may run
    meanwhile. `close()`, or the end of a `with` block, ends it early; the result is then what was generated so far. On several
    ranks rank 0's stream counts: where it is closed, or left for another call, it ends on all ranks.
    """

    def __init__(self, run: Run | FollowerRun, comm: Comm) -> None:
        self._run = run
        self._comm = comm
        self._pieces = run.pieces()
        self._failed = False

    def __next__(self) -> str:
        with self._guarded():
            piece = next(self._pieces, None)
        if piece is None:
            raise StopIteration
        return piece

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """One collective call; after an exception nobody listens to this stream any more."""
        if self._failed:
            raise InvalidInputError("this stream has failed; ask again")
        try:
            with self._comm.collective("a stream", check_in=False):
                yield
        except BaseException:
            self._failed = True
            raise

    @property
    def result(self) -> Generation:
        if not self._run.ended:
            raise InvalidInputError("the stream has not ended; exhaust it or call close() first")
        return self._run.generations()[0]

    def close(self) -> None:
        if self._failed:
            return
        with self._guarded():
            self._pieces.close()
            self._run.finish()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """The settings of one call, checked and resolved; see `StarLLM.generate` for their meaning.

    config: transformers' settings; words: what to hand to its `generate`, over the model's defaults.
    """

    max_new_tokens: int
    seed: int | None
    stops: list[str]
    return_logits: bool
    answer_prefix: str
    logits_processor: LogitsProcessorList | None
    stopping_criteria: StoppingCriteriaList | None
    config: GenerationConfig
    words: dict[str, Any]
    uses_own_loop: bool

    @property
    def answers_per_query(self) -> int:
        return self.config.num_return_sequences or 1

    @classmethod
    def of(
        cls,
        handle: ModelHandle,
        tokenizer: Any,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int | None = None,
        ignore_eos: bool = False,
        stop: str | Sequence[str] | None = None,
        return_logits: bool = False,
        answer_prefix: str = "",
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **words: Any,
    ) -> AnswerSettings:
        """Raises `InvalidInputError` for values that cannot work, `UnknownOptionError` for unknown words."""
        check_max_new_tokens(max_new_tokens)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise InvalidInputError(f"seed {seed!r} is not a whole number")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise InvalidInputError(f"seed {seed} has more than 64 bits; give a smaller number")
        if not isinstance(answer_prefix, str):
            raise InvalidInputError(f"answer_prefix {answer_prefix!r} is not a text")
        for name, value in (
            ("logits_processor", logits_processor),
            ("stopping_criteria", stopping_criteria),
        ):
            if not isinstance(value, (list, type(None))):
                raise InvalidInputError(f"{name} is a {type(value).__name__}; give a list of them")
        generation_config.check(words, max_new_tokens, handle.vocab_size)
        config, words = generation_kwargs(handle.model, words, max_new_tokens, ignore_eos)
        uses_own_loop = generation_config.check_mode(config) in phase2.OWN_LOOP_MODES
        blind = [
            word for word in _LOOKS_AT_THE_TEXT if getattr(config, word, None) not in (None, 0, 1.0)
        ]
        if blind and not uses_own_loop and handle.rotaries:
            raise InvalidInputError(
                f"{blind[0]} does not work with beams and prompt lookup for this model: its rotary frequencies depend on the"
                " length, so transformers' loops are given the query alone and would not see the context; use greedy search"
                " or sampling"
            )
        if tensor_parallel.share(handle.model) is not None and getattr(
            config, "guidance_scale", None
        ) not in (None, 1):
            raise InvalidInputError(
                "guidance_scale needs forwards beside the answer, which the other ranks of a host do not follow; leave it"
                " out, or use tensor_parallel 1"
            )
        if return_logits and not uses_own_loop:
            raise InvalidInputError(
                "return_logits works with greedy search and sampling, not with beams; use StarLLM.logits instead"
            )
        stops = stop_strings(stop)
        if stops and tokenizer is None:
            raise InvalidInputError("a stop string needs a tokenizer; give one to StarLLM")
        return cls(
            max_new_tokens=max_new_tokens,
            seed=seed,
            stops=stops,
            return_logits=return_logits,
            answer_prefix=answer_prefix,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            config=config,
            words=words,
            uses_own_loop=uses_own_loop,
        )


class Run:
    """One call: `pieces` yields the first answer's text and completes all of them; `generations` are the results."""

    def __init__(
        self,
        request: phase2.Request,
        tokenizer: Any,
        settings: AnswerSettings,
        *,
        encode_s: float,
        streamed: bool = False,
    ) -> None:
        self._clock = Clock(request.handle.device)
        self._comm, self._streamed = request.comm, streamed
        self._wire_before = copy.copy(request.comm.traffic)
        self._within_before = copy.copy(request.comm.traffic_within)
        self._encode_s = encode_s
        self._max_new_tokens = settings.max_new_tokens
        self.uses_own_loop, self.answers_per_query = (
            settings.uses_own_loop,
            settings.answers_per_query,
        )
        if settings.stops and not self.uses_own_loop:
            request.stop_after = lambda prompt_tokens: tokens.StopStrings(
                tokenizer, settings.stops, prompt_tokens
            )
        self._request = request
        rows = len(request.queries) * self.answers_per_query
        eos_ids = _ids(settings.config.eos_token_id) | tokens.stop_tokens(tokenizer, settings.stops)
        self._answers = [tokens.Answer(tokenizer, settings.stops, eos_ids) for _ in range(rows)]
        self._logits: list[list[Tensor]] | None = (
            [[] for _ in range(rows)] if settings.return_logits else None
        )
        self._first_s = self._end_s = 0.0
        self._peak_bytes: int | None = None
        self._wire, self._wire_within = Traffic(), Traffic()
        self.ended = self._end_told = False

    def pieces(self) -> Generator[str, None, None]:
        """Text of the first answer as it becomes certain; running it to its end completes all answers."""
        with translate_oom(self._out_of_memory):
            for piece in self._steps() if self.uses_own_loop else self._stock():
                if piece:
                    self._tell_piece(piece)
                    yield piece
        tail = self._close()
        if tail:
            self._tell_piece(tail)
        self._tell_end()
        if tail:
            yield tail

    def _out_of_memory(self) -> str:
        return (
            f"out of memory in phase 2 with {len(self._answers):,} answers at once over"
            f" {len(self._request.context_ids_L):,} context tokens: ask fewer queries at once, or lower num_beams,"
            f" num_return_sequences or tokens_per_forward (now {self._request.tokens_per_forward:,})"
        )

    def _tell_piece(self, piece: str) -> None:
        if self._streamed and self._comm.size > 1:
            self._comm.broadcast_object(("piece", piece))

    def _tell_end(self) -> None:
        if self._comm.size > 1 and not self._end_told:
            self._end_told = True
            self._comm.broadcast_object(
                (END, [replace(answer, logits=None) for answer in self.generations()])
            )

    def _steps(self) -> Iterator[str]:
        with _workable():  # transformers makes its logits processors here
            steps = phase2.steps(self._request)
        for step in steps:
            self._first_s = self._first_s or self._clock.elapsed()
            piece = ""
            for row, answer in enumerate(self._answers):
                if answer.finish_reason is not None:
                    continue
                new = answer.push(step.tokens[row])
                if self._logits is not None:
                    self._logits[row].append(step.logits_RV[row].cpu())
                if step.ended[row] and answer.finish_reason is None:
                    new += answer.end(
                        "length" if len(answer.token_ids) >= self._max_new_tokens else "stop"
                    )
                if row == 0:
                    piece = new
            yield piece
            if all(answer.finish_reason is not None for answer in self._answers):
                return

    def _stock(self) -> Iterator[str]:
        with _workable():
            rows = phase2.stock(self._request)
        for answer, row in zip(self._answers, rows, strict=True):
            for token in row:
                if answer.finish_reason is None:
                    answer.push(token)
            if answer.finish_reason is None:
                answer.end("length" if len(row) >= self._max_new_tokens else "stop")
        self._first_s = self._clock.elapsed()
        yield ""

    def finish(self) -> None:
        """Close all answers early, which counts as "length"; tells the other ranks."""
        self._close()
        self._tell_end()

    def _close(self) -> str:
        """The first answer's text that was held back."""
        if self.ended:
            return ""
        self.ended = True
        self._end_s, self._peak_bytes = self._clock.stop()
        comm = self._comm
        self._wire = comm.traffic.since(self._wire_before)
        # Every host sends the same tokens through.
        within = comm.traffic_within.since(self._within_before)
        self._wire_within = Traffic(within.calls * comm.cp_size, within.bytes * comm.cp_size)
        tails = [
            answer.end("length") if answer.finish_reason is None else "" for answer in self._answers
        ]
        return tails[0]

    def generations(self) -> list[Generation]:
        """The answers, those to one query next to each other."""
        return [self._generation(row, answer) for row, answer in enumerate(self._answers)]

    def _generation(self, row: int, answer: tokens.Answer) -> Generation:
        assert answer.finish_reason is not None, "the run has ended"
        more, after_first_s = len(answer.token_ids) - 1, self._end_s - self._first_s
        return Generation(
            text=answer.text,
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
            query_tokens=len(self._request.queries[row // self.answers_per_query]),
            timings=Timings(
                encode_s=self._encode_s,
                ttft_s=self._first_s,
                tokens_per_s=more / after_first_s
                if self.uses_own_loop and more > 0 and after_first_s > 0
                else None,
            ),
            logits=None if self._logits is None else self._stacked(self._logits[row]),
            peak_bytes=self._peak_bytes,
            wire=self._wire,
            wire_within=self._wire_within,
        )

    def _stacked(self, rows: list[Tensor]) -> Tensor:
        return torch.stack(rows) if rows else torch.empty(0, self._request.handle.vocab_size)


class FollowerRun:
    """The same call on a rank that follows: it computes what rank 0 tells, and has rank 0's results."""

    def __init__(self, following: Generator[str, None, Any], answers_per_query: int) -> None:
        self._following = following
        self._generations: list[Generation] = []
        self.answers_per_query = answers_per_query
        self.uses_own_loop = self.ended = False

    def pieces(self) -> Generator[str, None, None]:
        while (piece := self._next()) is not None:
            yield piece

    def _next(self) -> str | None:
        try:
            with translate_oom(
                lambda: (
                    "out of memory in phase 2: ask fewer queries at once, or encode over more ranks"
                )
            ):
                return next(self._following)
        except StopIteration as end:
            self._generations, self.ended = end.value or [], True
            return None

    def finish(self) -> None:
        """Whatever this rank's reader wants, rank 0 decides when an answer ends."""
        while not self.ended:
            self._next()

    def generations(self) -> list[Generation]:
        if not self._generations:
            raise InvalidInputError(
                "rank 0 left this stream before its end; close it there with close() or a with block"
            )
        return self._generations


def generation_kwargs(
    model: Any, words: dict[str, Any], max_new_tokens: int, ignore_eos: bool
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The resolved settings, and the words to hand to transformers' `generate` (which outrank the model's defaults)."""
    defaults = model.generation_config
    known = set(GenerationConfig().to_dict()) - _OURS
    for word in words:
        if word in ("max_length", "min_length"):
            raise UnknownOptionError(f"{word} counts the context too; use {word[:3]}_new_tokens")
        if word in _INSTEAD:
            raise UnknownOptionError(f"generate() takes no {word!r} here; {_INSTEAD[word]}")
        if word not in known:
            near = difflib.get_close_matches(
                word, [*known, "stop", "seed", "answer_prefix", "ignore_eos"], n=1
            )
            meant = f"did you mean {near[0]!r}? It" if near else "it"
            raise UnknownOptionError(
                f"generate() got an unknown word {word!r}; {meant} takes those of transformers' GenerationConfig"
            )
    words = dict(words)
    if words.get("temperature") == 0:
        words |= {"do_sample": False} | {word: None for word in _SAMPLING if word in words}
    elif "do_sample" not in words and any(words.get(word) is not None for word in _SAMPLING):
        words["do_sample"] = True
    sampled = words.get("do_sample", defaults.do_sample)
    if not sampled:
        # The model's sampling defaults mean nothing without sampling; transformers would warn about each.
        words |= {word: None for word in _SAMPLING if word not in words and hasattr(defaults, word)}
    words["max_new_tokens"] = max_new_tokens
    # Defaults of the model that would change what comes back, or bring a cache of their own.
    words |= dict(
        use_cache=True, return_dict_in_generate=False, cache_implementation=None, stop_strings=None
    )
    if ignore_eos:
        words["eos_token_id"] = None
    if words.get("pad_token_id", defaults.pad_token_id) is None:
        words["pad_token_id"] = min(
            _ids(words.get("eos_token_id", defaults.eos_token_id)), default=0
        )
    config = copy.deepcopy(defaults)
    try:
        config.update(**words)
    except (ValueError, TypeError) as error:
        raise _unworkable(error) from error
    return config, words


@contextmanager
def _workable() -> Iterator[None]:
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
        raise _unworkable(error) from error


def _unworkable(error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"these generation settings do not work: {str(error).strip().splitlines()[0]}"
    )


def stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """Checked stop strings."""
    if not isinstance(stop, (str, list, tuple, type(None))):
        raise InvalidInputError(f"stop {stop!r} is neither a text nor a list of texts")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    for one in stops:
        if not isinstance(one, str) or not one:
            raise InvalidInputError(f"stop string {one!r} is not a text of at least one character")
    return stops


def _ids(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
