"""`StarLLM`: encode a context once, answer any number of queries on it."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Never

import torch
import transformers
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from star_attention import methods, phase1, phase2
from star_attention._version import __version__
from star_attention.answering import AnswerSettings, FollowerRun, Run, Stream
from star_attention.clock import Clock
from star_attention.config import MAX_NEW_TOKENS, RESERVE_TOKENS, StarConfig
from star_attention.distributed import comm as ranks
from star_attention.distributed.environment import from_environment
from star_attention.distributed.messages import END
from star_attention.errors import (
    ContextLengthError,
    InvalidInputError,
    RankError,
    TokenError,
    UnknownOptionError,
    UnsupportedModelError,
)
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.loading import identity, load, support, tensor_parallel
from star_attention.hf.loading.tensor_parallel import load_share
from star_attention.hf.text import chat, tokens
from star_attention.planning.plan import ANCHOR_SOURCES, RING_LAYOUTS, BlockPlan
from star_attention.planning.segments import Segments
from star_attention.planning.traffic import Traffic
from star_attention.storage.context import EncodedContext, RankStats
from star_attention.storage.kv import ContextKV, KVFormat, LayerKV, StoredKV, as_tensor_ids
from star_attention.storage.saved import SavedContext

_INSTEAD = {
    "torch_dtype": "use dtype=",
    "tokenizer": "it is loaded with the model; to use another, set the engine's tokenizer",
    "device_map": "use device=, or to spread the layers model_kwargs={'device_map': 'auto'}",
}

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
        model: nothing of ours is installed between calls. (Except one that `from_pretrained` shared out by tensor_parallel: it has
        this rank's weights only, and its every forward is collective.)
    tokenizer: its tokenizer; not needed when only token ids go in and out.
    block_size, anchor_size, method, tokens_per_forward, reserve_tokens, anchor_source, ring_layout, kv_dtype, kv_device: see
        `StarConfig`.
    compile: layers through torch.compile and forwards of few tokens as CUDA graphs: None where there are a GPU and Triton and one
        process, False never. Answers are the same to rounding.
    comm: None takes torchrun's ranks where there are several, "solo" one process whatever the environment says; or a
        `TorchComm` of one's own.

    On several ranks the context is shared out, every call is collective (all ranks make the same calls in the same order), and
    rank 0's arguments count: all ranks return the same answers.

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
        anchor_source: str = ANCHOR_SOURCES[0],
        ring_layout: str = RING_LAYOUTS[0],
        kv_dtype: str | None = None,
        kv_device: str | None = None,
        compile: bool | None = None,
        comm: ranks.Comm | str | None = None,
    ) -> None:
        self._share = tensor_parallel.share(model)
        self._comm = from_environment(comm) if self._share is None else self._share.comm
        failure: Exception | None = None
        try:
            self.config = StarConfig.of(
                block_size=block_size,
                anchor_size=anchor_size,
                method=method,
                tokens_per_forward=tokens_per_forward,
                reserve_tokens=reserve_tokens,
                anchor_source=anchor_source,
                ring_layout=ring_layout,
                kv_dtype=kv_dtype,
                kv_device=kv_device,
            )
            self._handle = ModelHandle(model, compile=self._compiles(compile))
            self._check_share(comm)
        except Exception as error:
            failure = error
        self.model = model
        self.tokenizer = tokenizer
        with self._comm.collective("the start"):
            self._comm.raise_if_any_failed(failure)
            if self._comm.size > 1:
                self._shake_hands()

    def _compiles(self, compile: bool | None) -> bool | None:
        """None leaves it to the device. Compiling takes its time, which other ranks would take for hanging.

        Raises `InvalidInputError` where it cannot be.
        """
        if compile and self._share is not None:
            raise InvalidInputError(
                "compile=True does not go with tensor_parallel; leave one of them out"
            )
        return False if compile is None and self._comm.size > 1 else compile

    def _check_share(self, comm: ranks.Comm | str | None) -> None:
        """What goes with a model of which this rank has a share."""
        if self._share is None:
            return
        if comm is not None and not self._share.comm.has_same_ranks(comm):
            raise InvalidInputError(
                "this model was shared out to other ranks than comm names (tensor_parallel); leave comm out"
            )
        if self._handle.outer is not self._handle.model or identity.adapters(self._handle.outer):
            raise UnsupportedModelError(
                type(self._handle.outer).__name__,
                ["adapters do not work on a model shared out by tensor_parallel"],
            )

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
        comm: ranks.Comm | str | None = None,
        tensor_parallel: int = 1,
        model_kwargs: dict[str, Any] | None = None,
        tokens_per_forward: int | str | None = None,
        reserve_tokens: int | str = RESERVE_TOKENS,
        anchor_source: str = ANCHOR_SOURCES[0],
        ring_layout: str = RING_LAYOUTS[0],
        kv_dtype: str | None = None,
        kv_device: str | None = None,
        compile: bool | None = None,
        **unknown: Never,
    ) -> StarLLM:
        """Load a model and its tokenizer from a folder or a hub id.

        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16". device: "auto" (a GPU if there is one), "cpu",
        "cuda", "cuda:1"; under torchrun "auto" and "cuda" are each rank's own GPU.
        tensor_parallel: ranks that make up one host and share its heads and weights, for models that one device cannot hold;
            the context is shared out over the hosts. It divides the number of ranks.
        model_kwargs: passed to `AutoModelForCausalLM.from_pretrained` (quantization_config, device_map, ...).

        Raises `ModelNotFoundError` and, before any weight is read, `UnsupportedModelError` and `SizeError`; for words other than
        these `UnknownOptionError`.
        """
        for word in unknown:
            known = [
                name
                for name in inspect.signature(cls.from_pretrained).parameters
                if name != "unknown"
            ]
            near = difflib.get_close_matches(word, known, n=1)
            instead = (
                f"did you mean {near[0]!r}?"
                if near
                else f"words of transformers go into model_kwargs={{{word!r}: ...}}"
            )
            raise UnknownOptionError(
                f"from_pretrained() takes no {word!r} here; {_INSTEAD.get(word, instead)}"
            )
        sizes: dict[str, Any] = dict(block_size=block_size, anchor_size=anchor_size, method=method)
        sizes |= dict(tokens_per_forward=tokens_per_forward, reserve_tokens=reserve_tokens)
        sizes |= dict(
            anchor_source=anchor_source,
            ring_layout=ring_layout,
            kv_dtype=kv_dtype,
            kv_device=kv_device,
        )
        comm = from_environment(comm)
        failure: Exception | None = None
        try:
            StarConfig.of(**sizes)
        except Exception as error:
            failure = error
        with comm.collective("the start"):
            comm.raise_if_any_failed(failure)
            tensor_parallel = comm.run_on_rank_0(lambda: _divisor(tensor_parallel, comm.size))
        if comm.size > 1:
            device = load.own_device(device)
        if tensor_parallel > 1:
            share = load_share(
                path,
                comm,
                tensor_parallel,
                dtype=str(dtype),
                device=device,
                model_kwargs=model_kwargs or {},
            )
            return cls(*share, comm=comm, compile=compile, **sizes)
        loaded: list[Any] = []
        try:
            loaded += load.load(
                path, dtype=str(dtype), device=device, model_kwargs=model_kwargs or {}
            )
        except Exception as error:
            failure = error
        with comm.collective("loading the model"):
            comm.raise_if_any_failed(failure)
        return cls(*loaded, comm=comm, compile=compile, **sizes)

    def __repr__(self) -> str:
        """`StarLLM(llama, star, block_size=1024, cpu, float32)`: sizes that are left to the rule are left out."""
        config = self.config
        sizes = [
            f"{name}={size}"
            for name in ("block_size", "anchor_size")
            if (size := getattr(config, name)) is not None
        ]
        place = [str(self.device), str(self._handle.dtype).removeprefix("torch.")]
        ranks = [f"rank {self.rank} of {self.num_ranks}"] if self.num_ranks > 1 else []
        return f"StarLLM({', '.join([self._handle.config.model_type, config.method, *sizes, *place, *ranks])})"

    @property
    def device(self) -> torch.device:
        return self._handle.device

    @property
    def rank(self) -> int:
        """Which of the ranks this process is; rank 0 leads."""
        return self._comm.rank

    @property
    def num_ranks(self) -> int:
        return self._comm.size

    @property
    def tensor_parallel(self) -> int:
        """How many ranks make up one host and share its heads and weights."""
        return self._comm.tp_size

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value, on all ranks (on one: the value itself). Collective."""
        with self._comm.collective("waiting for rank 0"):
            return self._comm.run_on_rank_0(lambda: value)

    def rank_progress(self) -> list[tuple[int, int]]:
        """How much of its share of phase 1 each host has done, in tokens, and of how much; empty on one rank."""
        lines = self._comm.rank_status()[:: self._comm.tp_size]
        return [(line.get("done", 0), line.get("total", 0)) for line in lines]

    def _shake_hands(self) -> None:
        """Agree on what must be the same everywhere, and on how tensors travel.

        Raises `RankError`, on all ranks, naming what differs.
        """
        mine = {
            "star_attention": __version__,
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
            "settings": asdict(self.config),
        } | self._identity()
        first, *others = self._comm.gather(mine)
        for rank, theirs in enumerate(others, start=1):
            difference = identity.difference(theirs, first)
            if difference is not None:
                field, other, ours = difference
                message = f"its {field} is {other}, rank 0's is {ours}; all ranks need the same"
                raise self._comm.mark_collective(RankError(rank, "the start", message))
        if self._share is None:
            self._comm = self._comm.on(self.device)
        if self._comm.cp_size > 1:
            self._handle.kept  # (a forward of its own, outside of what is measured)  # noqa: B018

    @property
    def tokens_per_forward(self) -> int:
        """Most context tokens in one forward."""
        return self.config.forward_size(self.device.type)

    # ------------------------------------------------------------------ phase 1

    def encode(
        self,
        content: Any,
        *,
        progress: phase1.Progress | None = None,
        query: Any = None,
        settings: dict[str, Any] | None = None,
    ) -> Any:
        """Encode a context (phase 1): an `EncodedContext`, or for a list of contexts a list of them.

        content: text (tokenized with the tokenizer's defaults), token ids, or chat messages; or a list of these, of which
            those of equal length are encoded as one batch.
        progress: called after each forward with what it encoded.
        query, settings: what `generate` will be asked on each context, and its words, where they are known: what it would refuse
            (an answer for which there are no positions) is refused before anything is encoded.

        Raises `TokenError` (empty, or ids outside the vocabulary), `ContextLengthError` (beyond the model's positions),
        `SizeError` and `OutOfMemoryError`.
        """
        with self._comm.collective("encode"):
            several, prepared = self._comm.run_on_rank_0(
                lambda: self._prepare(content, query, settings)
            )
            contexts = self._encode_all(prepared, progress)
        return contexts if several else contexts[0]

    def _prepare(
        self, content: Any, query: Any = None, settings: dict[str, Any] | None = None
    ) -> tuple[bool, list[tuple[Tensor, dict[str, Any] | None]]]:
        """Whether these are several contexts, and their checked ids and how a chat goes on."""
        several = _is_several(content)
        queries = _queries(query)
        answer = None
        if query is not None or settings is not None:
            answer = AnswerSettings.of(self._handle, self.tokenizer, **(settings or {}))
        prepared = []
        for one in content if several else [content]:
            ids, opened = self._context_ids(one)
            self._check_positions(
                len(ids), "the context has", "cut the context, or use a model with more positions"
            )
            self._plan(len(ids))
            chat_state = None if opened is None else opened.as_dict()
            if answer is not None:
                asked = [
                    self._tail_ids(chat_state, one, answer.answer_prefix, warn=False)
                    for one in queries
                ]
                self._check_room(
                    len(ids), self._rope_length(len(ids)), asked, answer.max_new_tokens
                )
            prepared.append((ids, chat_state))
        return several, prepared

    def _plan(self, context_tokens: int) -> BlockPlan:
        return methods.get(self.config.method).plan(self.config, context_tokens, self._comm.cp_size)

    def _context_ids(self, content: Content) -> tuple[Tensor, chat.ChatContext | None]:
        if chat.is_messages(content):
            opened = chat.open_context(self.tokenizer, list(content))  # type: ignore[arg-type]
            return self._ids(tokens.query_ids(self.tokenizer, opened.head), "context"), opened
        if isinstance(content, str):
            if not content:
                raise TokenError(
                    "the context is empty; Star Attention needs at least 1 token of context"
                )
            return self._ids(
                tokens.context_ids(self._need_tokenizer("text"), content), "context"
            ), None
        return self._ids(content, "context"), None

    def _encode_all(
        self, contexts: list[tuple[Tensor, dict[str, Any] | None]], progress: phase1.Progress | None
    ) -> list[EncodedContext]:
        plans = [self._plan(len(ids)) for ids, _ in contexts]
        method = methods.get(self.config.method)
        done: dict[int, EncodedContext] = {}
        for indices in self._batches(plans):
            plan = plans[indices[0]]
            layout = method.layout(self.config, plan)
            idle = sum(not segments for segments in layout)
            if idle and self.rank == 0:
                warnings.warn(
                    f"{idle} of {plan.ranks} {_hosts(self._comm)} are idle: the context has {plan.num_blocks:,}"
                    f" {'block' if plan.num_blocks == 1 else 'blocks'}; a smaller block_size gives each one work",
                    stacklevel=4,
                )
            ids_BL = torch.stack([contexts[i][0] for i in indices])
            rope_length = self._rope_length(plan.context_tokens)
            with self._measured() as stats:
                stores = method.encode(
                    self._handle,
                    ids_BL,
                    plan,
                    self._comm,
                    self.config,
                    rope_length=rope_length,
                    progress=progress,
                )
            for i, store in zip(indices, stores, strict=True):
                ids, chat_state = contexts[i]
                done[i] = self._context(ids, plan, store, layout, rope_length, chat_state, stats)
        return [done[i] for i in range(len(contexts))]

    @contextmanager
    def _measured(self) -> Iterator[list[RankStats]]:
        """Fills in what each host spent; nobody goes on before all have."""
        comm = self._comm
        clock, before, before_within = (
            Clock(self.device),
            copy.copy(comm.traffic),
            copy.copy(comm.traffic_within),
        )
        stats: list[RankStats] = []
        yield stats
        spent = (
            *clock.stop(),
            comm.traffic.since(before),
            comm.traffic_within.since(before_within),
        )
        everyone = comm.gather(spent)
        wire = everyone[0][2]  # the first host takes part in every exchange, an idle one in none
        for first in range(0, comm.size, comm.tp_size):
            busy, peaks, _, within = zip(*everyone[first : first + comm.tp_size], strict=True)
            peak = None if None in peaks else max(peaks)
            stats.append(
                RankStats(busy_s=max(busy), peak_bytes=peak, wire=wire, wire_within=within[0])
            )

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
        layout: tuple[Segments, ...],
        rope_length: int | None,
        chat_state: dict[str, Any] | None,
        stats: list[RankStats],
        encode_s: float | None = None,
    ) -> EncodedContext:
        return EncodedContext(
            token_ids=ids,
            plan=plan,
            kv=kv,
            layout=layout,
            method=self.config.method,
            identity=self._identity(),
            rope_length=rope_length,
            chat=chat_state,
            encode_s=_slowest(stats) if encode_s is None else encode_s,
            peak_bytes=stats[self._comm.cp_rank].peak_bytes if stats else None,
            stats=tuple(stats),
            model=weakref.ref(self._handle.model),
            model_state=identity.state(self._handle.outer),
            comm=self._comm,
        )

    def extend(
        self, context: EncodedContext, more: TextOrIds, *, progress: phase1.Progress | None = None
    ) -> EncodedContext:
        """A new context that goes on with `more` (text, without special tokens, or token ids), at the context's own sizes.

        Equals encoding the joined ids, to rounding; only what is new goes through the model. The given context stays as it is.

        Raises `ContextLengthError` beyond the model's positions, or beyond the length that rotary frequencies are pinned to.
        """
        with self._comm.collective("extend"):
            key, ids, chat_state = self._comm.run_on_rank_0(
                lambda: self._prepare_extension(context, more)
            )
            context = self._mine(context, key)
            old = context.plan
            # A dense context is one block, and stays one.
            whole = context.plan.is_dense and context.method != "star"
            plan = BlockPlan(
                context_tokens=len(ids),
                block_size=max(old.block_size, len(ids)) if whole else old.block_size,
                anchor_size=old.anchor_size,
                ranks=old.ranks,
            )
            known = len(context.token_ids)
            owner = next(
                rank for rank, held in enumerate(context.layout) if held and held[-1][1] == known
            )
            with self._measured() as stats:
                store = phase1.extend(
                    self._handle,
                    ids,
                    plan,
                    self._comm,
                    context.kv,
                    start=known,
                    owner=owner,
                    tokens_per_forward=self.tokens_per_forward,
                    rope_length=context.rope_length,
                    progress=progress,
                )
            layout = [*context.layout]
            layout[owner] = layout[owner].grow_to(len(ids))
            return replace(
                context,
                token_ids=ids,
                plan=plan,
                kv=store,
                layout=tuple(layout),
                chat=chat_state,
                encode_s=_slowest(stats),
                peak_bytes=stats[self._comm.cp_rank].peak_bytes,
                stats=tuple(stats),
            )

    def _prepare_extension(
        self, context: EncodedContext, more: TextOrIds
    ) -> tuple[int, Tensor, dict[str, Any] | None]:
        """Which context, its ids with the new ones, and how a chat goes on."""
        self._check_ours(context)
        if context.method == "ring" and self._comm.cp_size > 1:
            raise InvalidInputError(
                "a ring context on several hosts cannot be extended: its tokens are dealt out by the length; encode the"
                " joined text anew"
            )
        if context.method == "streaming_llm":
            raise InvalidInputError(
                "a streaming_llm context cannot be extended: it holds its first and last tokens alone; encode the joined text"
                " anew"
            )
        if chat.is_messages(more):
            raise InvalidInputError(
                "extend takes text or token ids, not chat messages; give the text alone (a chat goes on with it in its open user"
                " message), or encode all messages anew"
            )
        if isinstance(more, str):
            more = tokens.query_ids(self._need_tokenizer("text"), more)
        new_ids = self._ids(more, "extension")
        ids = torch.cat([context.token_ids, new_ids])
        self._check_positions(
            len(ids),
            "the extended context has",
            "cut the extension, or use a model with more positions",
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
            chat_state = chat.extended(
                self.tokenizer, opened, tokens.decode(self.tokenizer, new_ids.tolist())
            ).as_dict()
        return context.key, ids, chat_state

    def _mine(self, context: Any, key: int) -> EncodedContext:
        """This rank's part of the context that rank 0 means."""
        if self._comm.size == 1:
            assert isinstance(context, EncodedContext)
            return context
        held: EncodedContext = self._comm.contexts.get(key)
        return held

    def load_context(self, path: str | os.PathLike[str]) -> EncodedContext:
        """A saved context, mapped into memory; each layer is verified, and moved to its device, when it is first used.

        Its sizes, and the precision of its keys and values, come from the file.

        Raises `ContextMismatchError` (naming the field) when model, tokenizer or settings differ, `CorruptContextError` for
        a file that is damaged or something else, `ContextNotFoundError` where there is none.
        """
        with self._comm.collective("load_context"):
            path = self._comm.run_on_rank_0(lambda: str(path))
            file = SavedContext(path)
            header = file.header
            identity.check(
                str(path),
                header["identity"] | {"method": header["method"]},
                self._identity() | {"method": self.config.method},
            )
            plan = BlockPlan(
                context_tokens=header["context_tokens"],
                block_size=header["block_size"],
                anchor_size=header["anchor_size"],
                ranks=self._comm.cp_size,
            )
            method = methods.get(self.config.method)
            layout = method.layout(self.config, plan)
            held = layout[self._comm.cp_rank]

            kv_format = KVFormat(dtype=header.get("kv_dtype"), device=self.config.kv_device)
            share, part = self._comm.tp_size, self._comm.tp_rank

            def layer(index: int) -> LayerKV:
                expands = header["expands"][index]
                if not held or not file.has_layer(index):
                    return LayerKV(held, expands=expands, kv_format=kv_format)
                device = self._handle.layer_device(index)
                stays = device if kv_format.device is None else torch.device(kv_format.device)

                def source() -> StoredKV:
                    return tuple(
                        tensor.chunk(share, 1)[part].to(stays) for tensor in file.layer(index, held)
                    )

                dtype = self._handle.dtype
                return LayerKV(
                    held,
                    expands=expands,
                    kv_format=kv_format,
                    source=source,
                    dtype=dtype,
                    device=device,
                )

            kv = ContextKV(
                [layer(i) for i in range(len(header["expands"]))], held, method.visible(plan)
            )
            ids = file.token_ids()
            self._comm.gather(None)  # all have found their part
            stats = [
                RankStats(busy_s=None, peak_bytes=None, wire=Traffic(), wire_within=Traffic())
                for _ in range(self._comm.cp_size)
            ]
            return self._context(
                ids,
                plan,
                kv,
                layout,
                header["rope_length"],
                header["chat"],
                stats,
                encode_s=header["encode_s"],
            )

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
        generation: other words of `GenerationConfig` about search and sampling (do_sample, temperature, top_p, num_beams,
            ...), over the model's own defaults. With num_return_sequences above 1 each query gives a list. A word about
            sampling alone (temperature=0.7, top_p, top_k, ...) switches sampling on, where transformers would ignore it without
            do_sample=True; `temperature=0` is greedy.

        The context is left as it was. Raises `UnknownOptionError` for an unknown word, `TokenError` for an empty query,
        `ContextLengthError` where context, query and answer exceed the positions.
        """
        with self._comm.collective("generate"):
            several, run = self._begin(
                context,
                _is_several(query),
                _queries(query),
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
            grouped = [
                answers[at : at + run.answers_per_query]
                for at in range(0, len(answers), run.answers_per_query)
            ]
            return grouped if several else grouped[0]
        return answers if several else answers[0]

    def stream(self, context: EncodedContext, query: Any = None, **settings: Any) -> Stream:
        """Answer one query piece by piece; settings are the words of `generate`.

        Pieces are whole characters, and what may begin a stop string is held back. The stream's `result` is the `Generation`.
        """
        with self._comm.collective("a stream"):
            _, run = self._begin(context, False, [query], streamed=True, **settings)
        return Stream(run, self._comm)

    def logits(self, context: EncodedContext, continuation: TextOrIds) -> Tensor | None:
        """Logits of every token of a continuation, fp32 `[tokens, vocabulary]`: row i is the distribution of token i + 1.

        On several ranks, rank 0 has them and the others get None.
        """
        with self._comm.collective("logits"):
            request: list[phase2.Request] = []

            def prepare() -> tuple[int, None]:
                self._check_ours(context)
                request.append(self._request(context, [self._query_ids(context, continuation)], 0))
                return context.key, None

            following, _ = self._led(prepare)
            if following is not None:
                for _ in following:
                    pass
                return None
            logits_QV = phase2.logits(request[0])
            self._comm.broadcast_object((END, None))
            return logits_QV

    def _led(
        self, prepare: Callable[[], tuple[int, Any]]
    ) -> tuple[Generator[str, None, Any] | None, Any]:
        """What this rank does where it follows, None where it leads; and what `prepare` found out on rank 0 beside the
        context's key."""
        key, more = self._comm.run_on_rank_0(prepare)
        if self.rank == 0:
            return None, more
        context: EncodedContext = self._comm.contexts.get(key)
        tokens = len(context.token_ids)
        return phase2.follow(
            self._handle, context.kv, tokens, context.rope_length, self._comm
        ), more

    def _begin(
        self,
        context: EncodedContext,
        several: bool,
        queries: list[Any],
        *,
        streamed: bool = False,
        **settings: Any,
    ) -> tuple[bool, Run | FollowerRun]:
        """One call of phase 2: whether it has several queries, and the run, which rank 0 leads."""
        started: list[Run] = []

        def prepare() -> tuple[int, tuple[bool, int]]:
            if streamed:
                self._check_streamed(queries[0])
            started.append(self._run(context, queries, streamed=streamed, **settings))
            if streamed and (not started[0].uses_own_loop or started[0].answers_per_query > 1):
                raise InvalidInputError(
                    "a stream is one answer by greedy search or sampling; use generate for beams and several answers"
                )
            return context.key, (several, started[0].answers_per_query)

        following, (several, answers_per_query) = self._led(prepare)
        return several, started[0] if following is None else FollowerRun(
            following, answers_per_query
        )

    def _check_streamed(self, query: Any) -> None:
        if _is_several(query):
            raise InvalidInputError(
                f"a stream answers one query, not {len(query)}; use generate for several"
            )
        self._need_tokenizer("a stream of text")

    def check_settings(self, **settings: Any) -> None:
        """Raise what `generate` would raise for these settings, without a context: before a long one is encoded."""
        AnswerSettings.of(self._handle, self.tokenizer, **settings)

    def _run(
        self, context: EncodedContext, queries: list[Any], *, streamed: bool = False, **words: Any
    ) -> Run:
        self._check_ours(context)
        settings = AnswerSettings.of(self._handle, self.tokenizer, **words)
        request = self._request(
            context,
            [self._query_ids(context, query, settings.answer_prefix) for query in queries],
            settings.max_new_tokens,
            words=settings.words,
            seed=settings.seed,
            logits_processor=settings.logits_processor,
            stopping_criteria=settings.stopping_criteria,
        )
        return Run(request, self.tokenizer, settings, encode_s=context.encode_s, streamed=streamed)

    def _query_ids(self, context: EncodedContext, query: Any, answer_prefix: str = "") -> list[int]:
        return self._tail_ids(context.chat, query, answer_prefix, warn=True)

    def _tail_ids(
        self, chat_state: dict[str, Any] | None, query: Any, answer_prefix: str, *, warn: bool
    ) -> list[int]:
        """What follows a context that goes on as `chat_state` says (None: as raw text)."""
        if chat_state is not None and (
            query is None or isinstance(query, str) or chat.is_messages(query)
        ):
            self._need_tokenizer("chat messages")
            opened = chat.ChatContext(**chat_state)
            tail = chat.continue_context(self.tokenizer, opened, query)
            if warn:
                chat.warn_about_cut(self.tokenizer, opened.head, tail)
            query = tokens.query_ids(self.tokenizer, tail + answer_prefix)
            answer_prefix = ""
        elif chat.is_messages(query):
            raise InvalidInputError(
                "a query of chat messages needs a context of chat messages; encode the context as messages"
            )
        elif isinstance(query, str):
            if not query:
                raise TokenError("the query is empty; give at least 1 token")
            query = tokens.query_ids(self._need_tokenizer("text"), query + answer_prefix)
            answer_prefix = ""
        elif query is None:
            raise TokenError("the query is empty; give at least 1 token")
        ids: list[int] = self._ids(query, "query").tolist()
        return (
            ids + tokens.query_ids(self._need_tokenizer("an answer prefix"), answer_prefix)
            if answer_prefix
            else ids
        )

    def _request(
        self,
        context: EncodedContext,
        queries: list[list[int]],
        max_new_tokens: int,
        **more: Any,
    ) -> phase2.Request:
        self._check_room(len(context), context.rope_length, queries, max_new_tokens)
        return phase2.Request(
            handle=self._handle,
            context_ids_L=context.token_ids,
            shard=context.kv,
            rope_length=context.rope_length,
            queries=queries,
            tokens_per_forward=self.tokens_per_forward,
            comm=self._comm,
            **more,
        )

    # ------------------------------------------------------------------ checks and helpers

    def _need_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise InvalidInputError(
                f"{what} needs a tokenizer; give one to StarLLM, or use token ids"
            )
        return self.tokenizer

    def _ids(self, ids: Any, what: str) -> Tensor:
        """Checked token ids, int64 `[tokens]` on CPU."""
        if isinstance(ids, (bytes, bytearray, dict, set, frozenset)):
            raise TokenError(
                f"the {what} is neither text, nor token ids, nor chat messages, but of type {type(ids).__name__}"
            )
        if not isinstance(ids, Tensor) and hasattr(ids, "input_ids"):
            raise TokenError(f"the {what} is a tokenizer's output; give its input_ids")
        try:
            tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TokenError(
                f"the {what} is neither text, nor token ids, nor chat messages ({error})"
            ) from None
        if tensor.dim() == 2 and tensor.shape[0] == 1:
            tensor = tensor[0]
        if tensor.dim() != 1:
            raise TokenError(
                f"the {what} has ids of shape {tuple(tensor.shape)}; give one row of token ids"
            )
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
            raise ContextLengthError(
                f"{what} {tokens:,} tokens, more than the model's {limit:,} positions; {remedy}"
            )

    def _check_room(
        self,
        context_tokens: int,
        rope_length: int | None,
        queries: list[list[int]],
        max_new_tokens: int,
    ) -> None:
        """Whether there are positions for query and answer behind a context."""
        longest = context_tokens + max(len(query) for query in queries) + max_new_tokens
        what = f"context ({context_tokens:,}), query and answer ({max_new_tokens:,}) need"
        self._check_positions(
            longest, what, "lower max_new_tokens, or shorten the query or the context"
        )
        if rope_length is not None and longest > rope_length:
            raise ContextLengthError(
                f"{what} {longest:,} tokens, but the context's rotary frequencies are pinned to {rope_length:,};"
                f" lower max_new_tokens, or encode the context with a larger reserve_tokens (now {self.config.reserve_tokens:,})"
            )

    def _check_ours(self, context: EncodedContext) -> None:
        """A context works with the model that encoded it, or an equal one, and with the adapters it was encoded with."""
        if not isinstance(context, EncodedContext):
            raise InvalidInputError(
                f"not an encoded context: {type(context).__name__}; call encode first"
            )
        theirs, ours = ((comm.cp_size, comm.tp_size) for comm in (context.comm, self._comm))
        if theirs != ours:
            raise InvalidInputError(
                f"the context lies on {theirs[0]} hosts of {theirs[1]} ranks, this engine runs on {ours[0]} of {ours[1]}; save it"
                " and load it with this engine"
            )
        same_model = context.model is not None and context.model() is self._handle.model
        if same_model and context.model_state == identity.state(self._handle.outer):
            return
        identity.check("the context", context.identity, self._identity())

    def _identity(self) -> dict[str, Any]:
        if self._share is not None:
            return self._share.identity | {"tokenizer": self._tokenizer_identity}
        return identity.model_identity(self._handle.model, self._handle.outer) | {
            "tokenizer": self._tokenizer_identity
        }

    @cached_property
    def _tokenizer_identity(self) -> str | None:
        return identity.tokenizer_identity(self.tokenizer)


def _is_several(content: Any) -> bool:
    """Whether a value is a list of contexts or queries, and not one of token ids or of chat messages."""
    if isinstance(content, Tensor):
        return content.dim() == 2 and content.shape[0] > 1
    if not isinstance(content, (list, tuple)) or chat.is_messages(content):
        return False
    return any(
        one.dim() > 0 if isinstance(one, Tensor) else isinstance(one, Sized) for one in content
    )


def _queries(query: Any) -> list[Any]:
    return list(query) if _is_several(query) else [query]


def _hosts(comm: ranks.Comm) -> str:
    return "ranks" if comm.tp_size == 1 else "hosts"


def _divisor(tensor_parallel: Any, size: int) -> int:
    if (
        not isinstance(tensor_parallel, int)
        or isinstance(tensor_parallel, bool)
        or tensor_parallel < 1
    ):
        raise InvalidInputError(
            f"tensor_parallel {tensor_parallel!r} is not a number of ranks; give 1, 2, 4, ..."
        )
    if size % tensor_parallel:
        raise InvalidInputError(
            f"tensor_parallel {tensor_parallel} does not divide the number of ranks, {size}; start a multiple of"
            f" {tensor_parallel} processes with torchrun"
        )
    return tensor_parallel


def _slowest(stats: list[RankStats]) -> float:
    return max(rank.busy_s or 0.0 for rank in stats)
