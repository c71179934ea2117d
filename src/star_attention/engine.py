"""`StarLLM`: encode a context once, answer any number of queries on it."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sequence
from typing import Any, TypeVar, Unpack, overload

import torch
from torch import Tensor, nn

from star_attention import encoding, inputs, methods
from star_attention.config import StarConfig, StarSettings
from star_attention.distributed.comm import Comm
from star_attention.distributed.environment import from_environment
from star_attention.encoding import EncodeOptions
from star_attention.generation import editing
from star_attention.generation import start as starts
from star_attention.generation.asynchronous import AsyncCalls
from star_attention.generation.batching.batch import BatchCalls
from star_attention.generation.editing import EditCalls
from star_attention.generation.leading import FollowCalls
from star_attention.generation.result import Asked, Generation
from star_attention.generation.settings import GenerateOptions, GenerationSettings
from star_attention.generation.stream import Stream
from star_attention.generation.talking import ConversationCalls
from star_attention.hf.loading.keywords import PretrainedSettings, check_keywords, split_settings
from star_attention.hf.loading.pretrained import load_pretrained, source_of
from star_attention.hf.progress import Progress
from star_attention.hf.text.tool_reader import with_tools
from star_attention.inputs import Content, Contents, Prepared, TextOrIds
from star_attention.planning.calibration import Calibration
from star_attention.runtime import Runtime, RuntimeView, model_facts
from star_attention.storage.context import EncodedContext

_T = TypeVar("_T")


class StarLLM(RuntimeView, AsyncCalls, BatchCalls, ConversationCalls, EditCalls, FollowCalls):
    """A transformers decoder with two-phase Star Attention around it.

    On several ranks the context is sharded and every call is collective: all ranks make the same
    calls in the same order, or rank 0 makes them and the others `follow`. Rank 0's arguments count,
    and all ranks return the same answers.

    Args:
        model: a loaded transformers causal language model (or a PEFT model around one), in
            evaluation mode. It stays the plain model: nothing of ours is installed between calls.
            A model that `from_pretrained` sharded by `tensor_parallel` is the exception: it has
            this rank's weights only, and its every forward is collective.
        tokenizer: its tokenizer; not needed when only token ids go in and out.
        config: settings as one object. Keywords override its fields.
        compile: run layers through torch.compile and forwards of few tokens as CUDA graphs. None
            does so on a GPU with Triton, False never. Answers are the same, up to rounding.
        comm: None takes torchrun's ranks if there are several, "solo" runs a single process
            whatever the environment says; or a `TorchComm` of your own.
        settings: fields of `StarConfig`.

    Attributes:
        runtime: the model, settings and ranks, for programs that build on the engine.

    Raises:
        UnsupportedModelError: the model cannot run, with the reasons.
        SizeError: sizes that cannot work.
        UnknownOptionError: a keyword that is not a field of `StarConfig`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        config: StarConfig | None = None,
        compile: bool | None = None,
        comm: Comm | str | None = None,
        **settings: Unpack[StarSettings],
    ) -> None:
        self.runtime = Runtime.start(
            model,
            tokenizer,
            config=config,
            settings=dict(settings),
            compile=compile,
            comm=comm,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: StarConfig | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        comm: Comm | str | None = None,
        tensor_parallel: int = 1,
        model_kwargs: dict[str, Any] | None = None,
        compile: bool | None = None,
        **settings: Unpack[PretrainedSettings],
    ) -> StarLLM:
        """Load a model and its tokenizer from a folder, a GGUF file or a hub id.

        Args:
            path: model folder, GGUF file, folder with a single GGUF file, folder of a PEFT adapter
                (its base model is loaded, too), or hub id.
            config: settings as one object. Keywords override its fields.
            dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
            device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1". Under torchrun "auto"
                and "cuda" are each rank's own GPU.
            comm: as for `StarLLM`.
            tensor_parallel: ranks that share the heads and weights of a model that one device
                cannot hold; the context is sharded over the groups. It divides the number of ranks.
            model_kwargs: passed to `AutoModelForCausalLM.from_pretrained` (quantization_config,
                device_map, ...).
            compile: as for `StarLLM`.
            settings: fields of `StarConfig`, and what to load (`PretrainedSettings`): adapter,
                gguf_file, subfolder, revision, trust_remote_code, weights, calibration.

        Raises:
            ModelNotFoundError: no model or tokenizer at the path.
            MissingPackageError: a package that the files need is not installed.
            UnsupportedModelError, SizeError: before any weight is read.
            UnknownOptionError: an unknown keyword.
        """
        check_keywords(settings, known=[*inspect.signature(cls.from_pretrained).parameters][:-1])
        comm = from_environment(comm)
        files, config_settings = split_settings(dict(settings))
        names = ("calibration", "adapter", "weights")
        calibration, adapter, weights = (files.pop(name, None) for name in names)
        model_kwargs = (model_kwargs or {}) | files
        given = settled = StarConfig()
        calibrated: Calibration | None = None
        failure: Exception | None = None
        try:
            given = settled = StarConfig.of(config, **config_settings)
            if calibration is not None:
                calibrated = Calibration.read(calibration)
                settled = StarConfig.of(config, **calibrated.under(config_settings, given.lookback))
            methods.check_lookback(settled.method, settled.lookback)
        except Exception as error:
            failure = error
        with comm.collective("startup"):
            comm.raise_if_any_failed(failure)
        model, tokenizer = load_pretrained(
            path,
            comm,
            tensor_parallel=tensor_parallel,
            dtype=str(dtype),
            device=device,
            adapter=adapter,
            weights=weights,
            model_kwargs=model_kwargs,
        )
        engine = cls(model, tokenizer, config=given, compile=compile, comm=comm)
        engine.runtime.source = source_of(path, adapter, model_kwargs)
        if calibrated is not None:
            calibrated.check(model_facts(engine.runtime))
            engine = engine.with_config(**calibrated.under(config_settings, given.lookback))
        return engine

    def with_config(self, **changes: Unpack[StarSettings]) -> StarLLM:
        """Return an engine over the same model and ranks with other settings.

        Both share what was compiled and captured. A setting that is left out stays as it is.
        """
        engine = copy.copy(self)
        engine.runtime = self.runtime.with_config(**changes)
        return engine

    def from_rank_0(self, value: _T) -> _T:
        """Return rank 0's value on all ranks (on one: the value itself). Collective."""
        with self.runtime.collective("waiting for rank 0"):
            result: _T = self.runtime.comm.run_on_rank_0(lambda: value)
        return result

    # ---------------------------------------------------------------------------- phase 1

    def prepare(
        self, content: Content, query: Content | Contents | None = None, **settings: Any
    ) -> Prepared:
        """Check and tokenize a context with its queries, to hand both to `encode` and `generate`.

        Raises everything that `encode` or `generate` would refuse. Nothing is tokenized twice.

        Args:
            content: a context, as for `encode`.
            query: a query or a list of them, as for `generate`.
            settings: keywords of `generate`. `tools` and `chat_template_kwargs` are also the
                context's.
        """
        prepared: list[Prepared] = []
        with self.runtime.collective("prepare"):
            self.runtime.comm.run_on_rank_0(
                lambda: prepared.append(inputs.prepare(self.runtime, content, query, settings))
            )
        return prepared[0] if prepared else Prepared()

    @overload
    def encode(
        self, content: Content | Prepared, **options: Unpack[EncodeOptions]
    ) -> EncodedContext: ...

    @overload
    def encode(
        self, content: Contents, **options: Unpack[EncodeOptions]
    ) -> list[EncodedContext]: ...

    def encode(
        self,
        content: Any,
        *,
        progress: Progress | bool | None = None,
        query: Any = None,
        settings: dict[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        reuse: EncodedContext | None = None,
        **unknown: Any,
    ) -> EncodedContext | list[EncodedContext]:
        """Encode a context (phase 1, prefill): compute and keep the keys and values of its tokens.

        Args:
            content: text (its last tokens wait for the query where they depend on it), token ids,
                chat messages, or what `prepare` returned; or a list of contexts, of which those of
                equal length are encoded as one batch.
            progress: a function that is called after each forward with the `Span` that it encoded
                (`span.start`, `span.stop`: tokens of the context; on several ranks not always in
                their order) and the `BlockPlan` (`plan.context_tokens`, `plan.num_blocks`); True
                shows a bar, False none. None shows it on terminals and in notebooks after a second,
                unless transformers' progress bars are off.
            query: queries that will be asked of each context, if known: what `generate` would
                refuse (no positions left for an answer) is refused before anything is encoded.
            settings: keywords of `generate` for these queries.
            tools: in a chat, what the model may call: functions with types and docstrings, or dicts
                in OpenAI's form. The context and its file keep them (`Generation.tool_calls`).
            chat_template_kwargs: what else the chat template reads beside messages: documents,
                enable_thinking, ... The context keeps them for its queries.
            reuse: a context of which this is a new version: its method, sizes and KV format are
                taken, and blocks with the same tokens are copied (`edit` says which).

        Returns:
            An encoded context; for a list of contexts, a list.

        Raises:
            TokenError: no tokens, or ids outside the vocabulary.
            ContextLengthError: more tokens than the model has positions.
            SizeError: sizes that do not fit the context.
            OutOfMemoryError: with the size to lower.
            UnknownOptionError: an unknown keyword.
        """
        encoding.check_options(unknown)
        comm = self.runtime.comm
        with self.runtime.collective("encode"):
            (several, contexts), key = comm.run_on_rank_0(
                lambda: (
                    inputs.prepare_contexts(
                        self.runtime,
                        content,
                        query,
                        settings,
                        with_tools(self.tokenizer, chat_template_kwargs, tools),
                    ),
                    editing.reused_key(self.runtime, reuse),
                )
            )
            if key is None:
                encoded = encoding.encode(self.runtime, contexts, progress)
            else:
                old = encoding.local_context(self.runtime, reuse, key)
                encoded = editing.encode_again(self.runtime, contexts, old, progress)
        return encoded if several else encoded[0]

    def extend(
        self, context: EncodedContext, more: TextOrIds, *, progress: Progress | bool | None = None
    ) -> EncodedContext:
        """Return a new context that continues with `more`, at the context's own sizes.

        Equals encoding the joined text, or the joined ids where `more` continues a word (a warning
        says so), up to rounding. Only the new tokens pass through the model; the given context
        stays as it is.

        Args:
            context: the context to continue.
            more: text (tokenized together with the end of the context) or token ids.
            progress: as for `encode`.

        Raises:
            ContextLengthError: beyond the model's positions, or beyond the length that rotary
                frequencies are pinned to.
            InvalidInputError: a context that cannot be extended.
        """
        with self.runtime.collective("extend"):
            return encoding.extend(self.runtime, context, more, progress)

    def load_context(self, path: str | os.PathLike[str]) -> EncodedContext:
        """Map a saved context into memory, after checking that it fits the model.

        Each layer's tensors are verified when first read (`storage/reading.py`), and moved to their
        device. Sizes and the precision of keys and values come from the file.

        Raises:
            ContextMismatchError: model, tokenizer, method or look-back differ; names the field.
            CorruptContextError: a file that is damaged, or not a saved context.
            ContextNotFoundError: the file does not exist.
        """
        with self.runtime.collective("load_context"):
            return encoding.load(self.runtime, path)

    # ---------------------------------------------------------------------------- phase 2

    @overload
    def generate(
        self,
        context: Asked,
        query: Content | None = None,
        **settings: Unpack[GenerateOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self, context: Asked, query: Contents, **settings: Unpack[GenerateOptions]
    ) -> list[Generation]: ...

    # For a prepared query, several answers to each query, and further arguments.
    @overload
    def generate(self, context: Asked, query: Any = None, **settings: Any) -> Any: ...

    def generate(self, context: Asked, query: Any = None, **settings: Any) -> Any:
        """Answer a query on a context (phase 2, decode). The context does not change.

        Args:
            context: the context to ask; or an answer that was generated with keep=True, or its
                `conversation`, to ask the next query after it.
            query: text (tokenized together with the end of the context), token ids, chat messages,
                what `prepare` returned, or a list of queries, answered as one batch; each gets the
                answer that it would get alone, up to rounding (in bfloat16 a near tie may turn out
                differently). May be left out where chat messages came with their question.
            settings: those of `GenerationSettings` (max_new_tokens, seed, stop, ...), and every
                argument of transformers' `GenerationConfig` about search and sampling (do_sample,
                temperature, top_p, num_beams, ...). They override the model's own defaults. An
                argument about sampling alone (temperature=0.7, top_p, top_k, ...) switches sampling
                on, where transformers would ignore it without do_sample=True; `temperature=0` is
                greedy.

        Returns:
            An answer; for a list of queries, a list. With num_return_sequences above 1 each query
            gives a list.

        Raises:
            UnknownOptionError: an unknown keyword.
            TokenError: an empty query.
            ContextLengthError: context, query and answer exceed the positions.
            InvalidInputError: a setting that cannot work.
        """
        with self.runtime.collective("generate"):
            return starts.generate(self.runtime, context, query, settings)

    @overload
    def stream(
        self,
        context: Asked,
        query: Content | Prepared | None = None,
        **settings: Unpack[GenerateOptions],
    ) -> Stream: ...

    @overload
    def stream(self, context: Asked, query: Any = None, **settings: Any) -> Stream: ...

    def stream(self, context: Asked, query: Any = None, **settings: Any) -> Stream:
        """Answer one query piece by piece.

        Pieces are whole characters; text that may begin a stop string is held back. The stream's
        `result` is the `Generation`. A model that has changed since it encoded the context is
        refused in place of the first piece.

        Args:
            context, query, settings: as for `generate`.
        """
        with self.runtime.collective("a stream"):
            return starts.stream(self.runtime, context, query, settings)

    def check_settings(self, **settings: Any) -> None:
        """Raise what `generate` would raise for these settings, without a context."""
        resolved = GenerationSettings.of(**settings).resolve(self.runtime.handle, self.tokenizer)
        resolved.check_method(self.runtime.method)

    def logits(self, context: EncodedContext, continuation: TextOrIds) -> Tensor | None:
        """Return the logits of every token of a continuation.

        A text is tokenized together with the end of the context; tokens that hold text of both have
        rows, too.

        Returns:
            fp32 `[tokens, vocabulary]` on rank 0: row i is the distribution of token i + 1. None on
            other ranks.
        """
        with self.runtime.collective("logits"):
            return starts.logits(self.runtime, context, continuation)
