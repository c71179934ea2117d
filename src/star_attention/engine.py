"""`StarLLM`: encode a context once, answer any number of queries on it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from star_attention import methods, phase1, phase2
from star_attention.answering import Run, Stream
from star_attention.clock import Clock
from star_attention.config import MAX_NEW_TOKENS, RESERVE_TOKENS, StarConfig
from star_attention.context import EncodedContext
from star_attention.errors import ContextLengthError, InvalidInputError, TokenError
from star_attention.hf import chat, identity, load, support, text
from star_attention.hf.handle import ModelHandle
from star_attention.plan import BlockPlan
from star_attention.saved import SavedContext
from star_attention.store import ContextKV, LayerKV, as_tensor_ids

TextOrIds = str | Sequence[int] | Tensor
Content = TextOrIds | Sequence[chat.Message]


@dataclass(frozen=True)
class Support:
    """The answer of `supported`: true or false as such, with the reasons against."""

    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        return "supported" if self else "not supported: " + "; ".join(self.reasons)


def supported(model_or_config: Any) -> Support:
    """Whether Star Attention can run a transformers model, or the model of a config; and if not, why.

    Accepts a model, a PEFT model, a config, or the path or hub id of one. Loads no weights.
    """
    if isinstance(model_or_config, (str, os.PathLike)):
        model_or_config = load.load_config(model_or_config)
    return Support(tuple(support.reasons(model_or_config)))


class StarLLM:
    """A transformers decoder with two-phase Star Attention around it.

    model: a loaded transformers causal language model (or a PEFT model around one), in evaluation mode. It stays the plain
        model: nothing of ours is installed between calls.
    tokenizer: its tokenizer; not needed when only token ids go in and out.
    block_size, anchor_size, method, tokens_per_forward, reserve_tokens: see `StarConfig`.
    comm: None, or "solo" for one process whatever the environment says.

    Raises `UnsupportedModelError` with the reasons for models that cannot run, `SizeError` for sizes that cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        block_size: int | str | None = None,
        anchor_size: int | str | None = None,
        method: str = "star",
        tokens_per_forward: int | str | None = None,
        reserve_tokens: int | str = RESERVE_TOKENS,
        comm: str | None = None,
    ) -> None:
        _check_comm(comm)
        self.config = StarConfig.of(
            block_size=block_size,
            anchor_size=anchor_size,
            method=method,
            tokens_per_forward=tokens_per_forward,
            reserve_tokens=reserve_tokens,
        )
        self._handle = ModelHandle(model)
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        block_size: int | str | None = None,
        anchor_size: int | str | None = None,
        method: str = "star",
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        comm: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        tokens_per_forward: int | str | None = None,
        reserve_tokens: int | str = RESERVE_TOKENS,
    ) -> StarLLM:
        """Load a model and its tokenizer from a folder or a hub id.

        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16". device: "auto" (a GPU if there is one), "cpu",
        "cuda", "cuda:1". model_kwargs: passed to `AutoModelForCausalLM.from_pretrained` (quantization_config, device_map, ...).

        Raises `ModelNotFoundError` and, before any weight is read, `UnsupportedModelError` and `SizeError`.
        """
        _check_comm(comm)
        sizes: dict[str, Any] = dict(block_size=block_size, anchor_size=anchor_size, method=method)
        sizes |= dict(tokens_per_forward=tokens_per_forward, reserve_tokens=reserve_tokens)
        StarConfig.of(**sizes)
        model, tokenizer = load.load(path, dtype=str(dtype), device=device, model_kwargs=model_kwargs or {})
        return cls(model, tokenizer, comm=comm, **sizes)

    @property
    def device(self) -> torch.device:
        return self._handle.device

    @property
    def tokens_per_forward(self) -> int:
        """Most context tokens in one forward."""
        return self.config.forward_size(self.device.type)

    # ------------------------------------------------------------------ phase 1

    def encode(self, content: Any, *, progress: phase1.Progress | None = None) -> Any:
        """Encode a context (phase 1): an `EncodedContext`, or for a list of contexts a list of them.

        content: text (tokenized with the tokenizer's defaults), token ids, or chat messages; or a list of these, of which
            those of equal length are encoded as one batch.
        progress: called after each forward with what it encoded.

        Raises `TokenError` (empty, or ids outside the vocabulary), `ContextLengthError` (beyond the model's positions),
        `SizeError` and `OutOfMemoryError`.
        """
        if _is_several(content):
            return self._encode_all([self._context_ids(one) for one in content], progress)
        return self._encode_all([self._context_ids(content)], progress)[0]

    def _context_ids(self, content: Content) -> tuple[Tensor, chat.ChatContext | None]:
        if chat.is_messages(content):
            opened = chat.open_context(self.tokenizer, list(content))  # type: ignore[arg-type]
            return self._ids(text.query_ids(self.tokenizer, opened.head), "context"), opened
        if isinstance(content, str):
            if not content:
                raise TokenError("the context is empty; Star Attention needs at least 1 token of context")
            return self._ids(text.context_ids(self._need_tokenizer("text"), content), "context"), None
        return self._ids(content, "context"), None

    def _encode_all(
        self, contexts: list[tuple[Tensor, chat.ChatContext | None]], progress: phase1.Progress | None
    ) -> list[EncodedContext]:
        plans = [methods.get(self.config.method).plan(self.config, len(ids)) for ids, _ in contexts]
        rope_lengths = [self._rope_length(len(ids)) for ids, _ in contexts]
        for ids, _ in contexts:
            self._check_positions(len(ids), "the context has", "cut the context, or use a model with more positions")
        done: dict[int, EncodedContext] = {}
        for indices in self._batches(plans):
            plan, rope_length = plans[indices[0]], rope_lengths[indices[0]]
            ids_BL = torch.stack([contexts[i][0] for i in indices])
            clock = Clock(self.device)
            stores = phase1.encode(
                self._handle,
                ids_BL,
                plan,
                tokens_per_forward=self.tokens_per_forward,
                rope_length=rope_length,
                progress=progress,
            )
            encode_s, peak_bytes = clock.stop()
            for i, store in zip(indices, stores, strict=True):
                ids, opened = contexts[i]
                done[i] = self._context(
                    ids, plan, store, rope_length, None if opened is None else opened.as_dict(), encode_s, peak_bytes
                )
        return [done[i] for i in range(len(contexts))]

    def _batches(self, plans: list[BlockPlan]) -> list[list[int]]:
        """Indices of contexts that are encoded together: equal plans, and whole blocks still fit in one forward."""
        groups: dict[BlockPlan, list[int]] = {}
        for index, plan in enumerate(plans):
            groups.setdefault(plan, []).append(index)
        batches = []
        for plan, indices in groups.items():
            most = max(1, self.tokens_per_forward // min(plan.block_size, plan.context_tokens))
            batches += [indices[at : at + most] for at in range(0, len(indices), most)]
        return batches

    def _context(
        self,
        ids: Tensor,
        plan: BlockPlan,
        kv: ContextKV,
        rope_length: int | None,
        chat_state: dict[str, Any] | None,
        encode_s: float,
        peak_bytes: int | None = None,
    ) -> EncodedContext:
        return EncodedContext(
            token_ids=ids,
            plan=plan,
            kv=kv,
            method=self.config.method,
            identity=self._identity(),
            rope_length=rope_length,
            chat=chat_state,
            encode_s=encode_s,
            peak_bytes=peak_bytes,
            model=weakref.ref(self._handle.model),
        )

    def extend(
        self, context: EncodedContext, more: TextOrIds, *, progress: phase1.Progress | None = None
    ) -> EncodedContext:
        """A new context that goes on with `more` (text, without special tokens, or token ids), at the context's own sizes.

        Equals encoding the joined ids, to rounding; only what is new goes through the model. The given context stays as it is.

        Raises `ContextLengthError` beyond the model's positions, or beyond the length that rotary frequencies are pinned to.
        """
        self._check_ours(context)
        if isinstance(more, str):
            more = text.query_ids(self._need_tokenizer("text"), more)
        new_ids = self._ids(more, "extension")
        ids = torch.cat([context.token_ids, new_ids])
        self._check_positions(
            len(ids), "the extended context has", "cut the extension, or use a model with more positions"
        )
        if context.rope_length is not None and len(ids) >= context.rope_length:
            raise ContextLengthError(
                f"the extended context has {len(ids):,} tokens, but its rotary frequencies are pinned to {context.rope_length:,};"
                " encode the joined text anew, or encode the first part with a larger reserve_tokens"
                f" (now {self.config.reserve_tokens:,})"
            )
        chat_state = context.chat
        if chat_state is not None:
            opened = chat.ChatContext(**chat_state)
            if not opened.open:
                raise InvalidInputError(
                    "this chat context ends in a closed turn; only an open user message can be extended"
                )
            chat_state = chat.extended(self.tokenizer, opened, text.decode(self.tokenizer, new_ids.tolist())).as_dict()
        old = context.plan
        # A dense context is one block, and stays one.
        block_size = max(old.block_size, len(ids)) if context.method == "dense" else old.block_size
        plan = BlockPlan(context_tokens=len(ids), block_size=block_size, anchor_size=old.anchor_size, ranks=old.ranks)
        clock = Clock(self.device)
        store = context.kv.grown(len(ids), keep=len(context.token_ids))
        phase1.encode(
            self._handle,
            ids[None],
            plan,
            tokens_per_forward=self.tokens_per_forward,
            rope_length=context.rope_length,
            stores=[store],
            start=len(context.token_ids),
            progress=progress,
        )
        encode_s, peak_bytes = clock.stop()
        return replace(
            context, token_ids=ids, plan=plan, kv=store, chat=chat_state, encode_s=encode_s, peak_bytes=peak_bytes
        )

    def load_context(self, path: str | os.PathLike[str]) -> EncodedContext:
        """A saved context, mapped into memory; each layer is verified, and moved to its device, when it is first used.

        Its sizes come from the file.

        Raises `ContextMismatchError` (naming the field) when model, tokenizer or settings differ, `CorruptContextError` for
        a file that is damaged or something else, `FileNotFoundError` where there is none.
        """
        file = SavedContext(path)
        header = file.header
        identity.check(
            str(path),
            header["identity"] | {"method": header["method"]},
            self._identity() | {"method": self.config.method},
        )

        def layer(index: int) -> LayerKV:
            tokens, expands = header["context_tokens"], header["expands"][index]
            if f"layers.{index}.k" not in header["tensors"]:
                return LayerKV(tokens, expands=expands)
            device = self._handle.layer_device(index)

            def source() -> tuple[Tensor, Tensor]:
                return file.tensor(f"layers.{index}.k").to(device), file.tensor(f"layers.{index}.v").to(device)

            return LayerKV(tokens, expands=expands, source=source)

        plan = BlockPlan(
            context_tokens=header["context_tokens"], block_size=header["block_size"], anchor_size=header["anchor_size"]
        )
        kv = ContextKV([layer(i) for i in range(len(header["expands"]))], plan.context_tokens)
        ids = file.tensor("token_ids").clone()
        return self._context(ids, plan, kv, header["rope_length"], header["chat"], header["encode_s"])

    # ------------------------------------------------------------------ phase 2

    def generate(
        self,
        context: EncodedContext,
        query: Any = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int | None = None,
        ignore_eos: bool = False,
        stop: str | Sequence[str] | None = None,
        return_logits: bool = False,
        answer_prefix: str = "",
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **generation: Any,
    ) -> Any:
        """Answer a query on a context (phase 2): a `Generation`; for a list of queries, a list of them.

        query: text (tokenized without special tokens), token ids, chat messages, or a list of these, answered as one batch.
            May be left out where chat messages came with their question.
        max_new_tokens: most tokens of an answer. seed: makes sampling repeatable, whatever runs beside it (in beams: unless
            another thread draws from torch's global generator, which transformers' own loops use).
        ignore_eos: go on past end-of-sequence tokens. stop: strings that end an answer; they are not part of its text.
        return_logits: keep the unprocessed logits (greedy search and sampling).
        answer_prefix: text that the answer is made to begin with, behind the chat template's start of the answer where there
            is one; it is not part of the result.
        logits_processor, stopping_criteria: transformers' lists.
        generation: any other word of `GenerationConfig` (do_sample, temperature, top_p, num_beams, num_return_sequences, ...), over
            the model's own defaults. With num_return_sequences above 1 each query gives a list. `temperature=0` is greedy.

        The context is left as it was. Raises `TypeError` for an unknown word, `TokenError` for an empty query,
        `ContextLengthError` where context, query and answer exceed the positions.
        """
        several = isinstance(query, (list, tuple, Tensor)) and _is_several(query)
        run = self._run(
            context,
            list(query) if several else [query],
            max_new_tokens=max_new_tokens,
            seed=seed,
            ignore_eos=ignore_eos,
            stop=stop,
            answer_prefix=answer_prefix,
            return_logits=return_logits,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            **generation,
        )
        for _ in run.pieces():
            pass
        answers = run.generations()
        if run.answers_per_query > 1:
            grouped = [answers[at : at + run.answers_per_query] for at in range(0, len(answers), run.answers_per_query)]
            return grouped if several else grouped[0]
        return answers if several else answers[0]

    def stream(self, context: EncodedContext, query: Any = None, **settings: Any) -> Stream:
        """Answer one query piece by piece; settings are the words of `generate`.

        Pieces are whole characters, and what may begin a stop string is held back. The stream's `result` is the `Generation`.
        """
        if isinstance(query, (list, tuple, Tensor)) and _is_several(query):
            raise InvalidInputError(f"a stream answers one query, not {len(query)}; use generate for several")
        self._need_tokenizer("a stream of text")
        run = self._run(context, [query], **settings)
        if not run.stepped or run.answers_per_query > 1:
            raise InvalidInputError(
                "a stream is one answer by greedy search or sampling; use generate for beams and several answers"
            )
        return Stream(run)

    def logits(self, context: EncodedContext, continuation: TextOrIds) -> Tensor:
        """Logits of every token of a continuation, fp32 `[tokens, vocabulary]`: row i is the distribution of token i + 1."""
        self._check_ours(context)
        request = self._request(context, [self._query_ids(context, continuation)], 0)
        return phase2.logits(request)

    def _run(
        self,
        context: EncodedContext,
        queries: list[Any],
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
    ) -> Run:
        self._check_ours(context)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens {max_new_tokens!r} is not a positive number of tokens")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise InvalidInputError(f"seed {seed!r} is not a whole number")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise InvalidInputError(f"seed {seed} has more than 64 bits; give a smaller number")
        if not isinstance(answer_prefix, str):
            raise InvalidInputError(f"answer_prefix {answer_prefix!r} is not a text")
        for name, value in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
            if not isinstance(value, (list, type(None))):
                raise InvalidInputError(f"{name} is a {type(value).__name__}; give a list of them")
        ids = [self._query_ids(context, query, answer_prefix) for query in queries]
        request = self._request(
            context,
            ids,
            max_new_tokens,
            seed=seed,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
        )
        return Run(
            request,
            self.tokenizer,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            stop=stop,
            return_logits=return_logits,
            words=words,
            encode_s=context.encode_s,
        )

    def _query_ids(self, context: EncodedContext, query: Any, answer_prefix: str = "") -> list[int]:
        if context.chat is not None and (query is None or isinstance(query, str) or chat.is_messages(query)):
            self._need_tokenizer("chat messages")
            opened = chat.ChatContext(**context.chat)
            tail = chat.continue_context(self.tokenizer, opened, query)
            chat.warn_about_cut(self.tokenizer, opened.head, tail)
            query = text.query_ids(self.tokenizer, tail + answer_prefix)
            answer_prefix = ""
        elif chat.is_messages(query):
            raise InvalidInputError(
                "a query of chat messages needs a context of chat messages; encode the context as messages"
            )
        elif isinstance(query, str):
            if not query:
                raise TokenError("the query is empty; give at least 1 token")
            query = text.query_ids(self._need_tokenizer("text"), query + answer_prefix)
            answer_prefix = ""
        elif query is None:
            raise TokenError("the query is empty; give at least 1 token")
        ids: list[int] = self._ids(query, "query").tolist()
        return ids + text.query_ids(self._need_tokenizer("an answer prefix"), answer_prefix) if answer_prefix else ids

    def _request(
        self,
        context: EncodedContext,
        queries: list[list[int]],
        max_new_tokens: int,
        **more: Any,
    ) -> phase2.Request:
        longest = len(context) + max(len(query) for query in queries) + max_new_tokens
        what = f"context ({len(context):,}), query and answer ({max_new_tokens:,}) need"
        self._check_positions(longest, what, "lower max_new_tokens, or shorten the query or the context")
        if context.rope_length is not None and longest > context.rope_length:
            raise ContextLengthError(
                f"{what} {longest:,} tokens, but the context's rotary frequencies are pinned to {context.rope_length:,};"
                f" lower max_new_tokens, or encode the context with a larger reserve_tokens (now {self.config.reserve_tokens:,})"
            )
        return phase2.Request(
            handle=self._handle,
            context_ids_L=context.token_ids,
            shard=context.kv,
            rope_length=context.rope_length,
            queries=queries,
            tokens_per_forward=self.tokens_per_forward,
            **more,
        )

    # ------------------------------------------------------------------ checks and helpers

    def _need_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise InvalidInputError(f"{what} needs a tokenizer; give one to StarLLM, or use token ids")
        return self.tokenizer

    def _ids(self, ids: Any, what: str) -> Tensor:
        """Checked token ids, int64 `[tokens]` on CPU."""
        if isinstance(ids, (bytes, bytearray, dict, set, frozenset)):
            raise TokenError(
                f"the {what} is neither text, nor token ids, nor chat messages, but of type {type(ids).__name__}"
            )
        try:
            tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TokenError(f"the {what} is neither text, nor token ids, nor chat messages ({error})") from None
        if tensor.dim() == 2 and tensor.shape[0] == 1:
            tensor = tensor[0]
        if tensor.dim() != 1:
            raise TokenError(f"the {what} has ids of shape {tuple(tensor.shape)}; give one row of token ids")
        if tensor.numel() == 0:
            raise TokenError(f"the {what} is empty (0 tokens); give at least 1 token")
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise TokenError(f"the {what} has {tensor.dtype} values; token ids are whole numbers")
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= self._handle.vocab_size:
            bad = low if low < 0 else high
            raise TokenError(
                f"the {what} has token id {bad}, outside the model's vocabulary 0..{self._handle.vocab_size - 1};"
                " is the tokenizer the model's own?"
            )
        return as_tensor_ids(tensor)

    def _rope_length(self, context_tokens: int) -> int | None:
        return context_tokens + self.config.reserve_tokens if self._handle.rotaries else None

    def _check_positions(self, tokens: int, what: str, remedy: str) -> None:
        limit = self._handle.max_positions
        if limit is not None and tokens > limit:
            raise ContextLengthError(f"{what} {tokens:,} tokens, more than the model's {limit:,} positions; {remedy}")

    def _check_ours(self, context: EncodedContext) -> None:
        """A context works with the model that encoded it, or an equal one, and with the adapters it was encoded with."""
        if not isinstance(context, EncodedContext):
            raise InvalidInputError(f"not an encoded context: {type(context).__name__}; call encode first")
        same_model = context.model is not None and context.model() is self._handle.model
        if same_model and context.identity["adapters"] == identity.adapters(self._handle.outer):
            return
        identity.check("the context", context.identity, self._identity())

    def _identity(self) -> dict[str, Any]:
        return identity.model_identity(self._handle.model, self._handle.outer) | {"tokenizer": self._tokenizer_identity}

    @cached_property
    def _tokenizer_identity(self) -> str | None:
        return identity.tokenizer_identity(self.tokenizer)


def _is_several(content: Any) -> bool:
    """Whether a value is a list of contexts or queries, and not one of token ids or of chat messages."""
    if isinstance(content, Tensor):
        return content.dim() == 2 and content.shape[0] > 1
    if not isinstance(content, (list, tuple)) or chat.is_messages(content):
        return False
    return any(one.dim() > 0 if isinstance(one, Tensor) else isinstance(one, Sized) for one in content)


def _check_comm(comm: str | None) -> None:
    if comm not in (None, "solo"):
        raise InvalidInputError(f"comm {comm!r} is unknown; use None, or 'solo' for one process")
    world = os.environ.get("WORLD_SIZE") or "1"
    if comm is None and world != "1":
        raise InvalidInputError(
            f"this process is one of {world} (WORLD_SIZE), but this version runs on one;"
            " start it without torchrun, or give comm='solo'"
        )
