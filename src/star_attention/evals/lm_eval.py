"""Star Attention as a model of lm-evaluation-harness (the extra `lm-eval`), for whatever tasks that has.

The harness gives a model whole prompts. Where one is cut into context (phase 1) and query (phase 2) is found out here, in order:

1. "column": behind the last place of the document's own context, a column of the data set (`context`).
2. "sentinel": where the task has written `SENTINEL` into its prompt; it is taken out.
3. "pattern": where the question of a known task begins (`PATTERNS`).
4. "last block": the last `block_size` tokens are the query; where one block holds all, the last token, and star is dense attention.

    python -m star_attention.evals.lm_eval run --model star --model_args pretrained=PATH,block_size=4k --tasks ruler_vt
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from star_attention._version import __version__
from star_attention.config import MAX_NEW_TOKENS
from star_attention.engine import StarLLM
from star_attention.errors import (
    ContextLengthError,
    InvalidInputError,
    StarAttentionError,
    TokenError,
)
from star_attention.evals.runs.settings import GREEDY
from star_attention.hf.text.chat import warn_about_cut
from star_attention.hf.text.tokens import context_ids, query_ids

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        'this needs lm-evaluation-harness, which is not installed; run: pip install "star-attention[lm-eval]"'
    ) from error

SENTINEL = "<|star-attention-query|>"
"""What a task writes into its prompt where the query begins."""

PATTERNS = (
    ("niah_", r"What (?:is|are all) the special magic"),
    ("ruler_vt", r"Question: Find all variables"),
    ("ruler_cwe", r"Question: What are the 10 most common"),
    ("ruler_fwe", r"Question: Do not provide any explanation"),
    ("ruler_qa", r"Answer the question based on the given documents"),
    ("babilong_", r"{question}"),
)
"""Beginnings of the harness's own task names, and what their query begins with: a regular expression, of which the last place
counts. `{question}` is the document's."""

_NAME = "star"
_DEVICE = "cuda:0"
"""What the harness gives where nobody named a device, whether there is one or not, and on every rank."""

# (Only below this name does the harness show what is logged.)
_logger = logging.getLogger("lm_eval.star_attention")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A prompt in two. how: "column", "sentinel", "pattern"; or "last block", where `context` is all of the prompt."""

    context: str
    query: str
    how: str


def cut(
    prompt: str, doc: Any, task: str, *, context_column: str = "context", sentinel: str = SENTINEL
) -> Cut:
    """Where a prompt's query begins. doc: the row that it was made from."""
    parts = prompt.split(sentinel) if sentinel else [prompt]
    prompt = "".join(parts)
    columns: Mapping[str, Any] = doc if isinstance(doc, Mapping) else {}

    def places() -> Iterator[tuple[str, int]]:
        text = columns.get(context_column)
        if isinstance(text, str):
            for one in (text, text.strip()):  # (templates may strip a message)
                at = prompt.rfind(one) if one else -1
                if at >= 0:
                    yield "column", at + len(one)
        if len(parts) > 1:
            yield "sentinel", len(prompt) - len(parts[-1])
        for name, pattern in PATTERNS:
            if task.startswith(name):
                question = str(columns.get("question", "")).strip()
                found = [
                    *re.finditer(
                        pattern.replace("{question}", re.escape(question) or "(?!)"), prompt
                    )
                ]
                if found:
                    yield "pattern", found[-1].start()

    for how, at in places():
        if at > 0:
            return Cut(context=prompt[:at], query=prompt[at:], how=how)
    return Cut(context=prompt, query="", how="last block")


@dataclass(frozen=True, kw_only=True)
class _Ask:
    """One request on an encoded context, as token ids. index: its place in the harness's list. continuation: what is scored."""

    index: int
    query: list[int]
    continuation: list[int]


class StarLM(LM):
    """The harness's model `star`.

    pretrained: a model folder or hub id, loaded with `settings` (those of `StarLLM.from_pretrained`: block_size, anchor_size,
    method, dtype, ...); or a `StarLLM`.
    context_column: the column that holds a document's context. sentinel: text of a prompt in whose place the query begins.
    device: as for `StarLLM.from_pretrained`; "cuda:0", the harness's default, is taken for "auto".
    batch_size, max_batch_size: the harness gives them; they change nothing, answers are computed one at a time.

    Under torchrun the ranks share each context, and every one of them runs the harness; rank 0's answers count.
    """

    def __init__(
        self,
        pretrained: str | StarLLM,
        *,
        context_column: str = "context",
        sentinel: str = SENTINEL,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, StarLLM):
            if settings:
                raise InvalidInputError(
                    f"a StarLLM brings its own settings; leave {', '.join(settings)} out"
                )
            self.star = pretrained
        else:
            device = "auto" if device in (None, _DEVICE) else device
            self.star = StarLLM.from_pretrained(pretrained, device=device, **settings)
        if self.star.tokenizer is None:
            raise InvalidInputError(
                "tasks are text, and this model has no tokenizer; give one to StarLLM"
            )
        self.splits: dict[str, list[str]] = {}
        """How each task's prompts were cut."""
        self._column, self._sentinel = context_column, sentinel
        self._template: str | None = None
        # (Requests on one context come one after another; its ids are needed with and without a continuation.)
        self._context_ids = functools.lru_cache(maxsize=2)(
            functools.partial(context_ids, self.star.tokenizer)
        )

    # ------------------------------------------------------------------ what the harness calls

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers' texts, in the requests' order. Greedy unless a task's `generation_kwargs` say otherwise.

        Raises `ContextLengthError` for a request beyond the model's positions, before the first answer.
        """
        settings = [_settings(_two(request)[1]) for request in requests]
        for words in settings:
            self.star.check_settings(**words)
        jobs = self._jobs(requests, room=[words["max_new_tokens"] for words in settings])

        def answer(context: Any, ask: _Ask) -> str:
            text: str = self.star.generate(context, ask.query, **settings[ask.index]).text
            return text

        return self._run("generate_until", requests, jobs, answer, quiet=disable_tqdm)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each request the continuation's log-probability in nats, and whether it is what greedy search gives.

        Logits of a whole query are held at once, fp32 `[tokens, vocabulary]`.

        Raises `ContextLengthError` as above, and `TokenError` for prompts of fewer than two tokens and empty continuations.
        """
        jobs = self._jobs(requests, room=[0] * len(requests), scored=True)

        def score(context: Any, ask: _Ask) -> tuple[float, bool]:
            logits_QV = self.star.logits(context, ask.query + ask.continuation[:-1])
            found: tuple[float, bool] | None = None
            if logits_QV is not None:
                logp_CV = logits_QV[len(ask.query) - 1 :].log_softmax(-1)
                targets_C = logp_CV.new_tensor(ask.continuation).long()
                picked_C = logp_CV.gather(1, targets_C[:, None])
                found = picked_C.sum().item(), bool((logp_CV.argmax(-1) == targets_C).all())
            result = self.star.from_rank_0(found)
            assert result is not None
            return result

        return self._run("loglikelihood", requests, jobs, score, quiet=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Raises `InvalidInputError`: phase 1 predicts nothing, so that a whole text has no likelihood."""
        raise InvalidInputError(
            "a whole text has no likelihood under Star Attention: its phase 1 predicts no tokens; measure the perplexity of texts'"
            " tails with `star-attention eval perplexity`, or leave tasks of output_type loglikelihood_rolling out"
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as a prompt; without a generation prompt the last message, a prefix of the answer, stays open.

        Raises `InvalidInputError` where there is no template, or it refuses the messages.
        """
        tokenizer = self.star.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidInputError(
                "this model has no chat template; leave --apply_chat_template out"
            )
        try:
            text: str = tokenizer.apply_chat_template(
                chat_history,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except (
            Exception
        ) as error:  # a template may raise anything for messages that it does not take
            raise InvalidInputError(f"the chat template refuses these messages: {error}") from error
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself, for the harness's records; a name chooses among a tokenizer's several."""
        if not chat_template or not getattr(self.star.tokenizer, "chat_template", None):
            return ""
        self._template = self.star.tokenizer.get_chat_template(
            chat_template if isinstance(chat_template, str) else None
        )
        return self._template

    @property
    def tokenizer_name(self) -> str:
        return str(self.star.tokenizer.name_or_path).replace("/", "__")

    @property
    def device(self) -> Any:
        return self.star.device

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        config = self.star.config
        return {
            "star_attention": __version__,
            "star_method": config.method,
            "star_block_size": config.block_size,
            "star_anchor_size": config.anchor_size,
            "star_splits": {task: " and ".join(found) for task, found in self.splits.items()},
        }

    # ------------------------------------------------------------------ requests by context

    def _run(
        self,
        kind: str,
        requests: list[Instance],
        jobs: list[tuple[list[int], list[_Ask]]],
        answer: Callable[[Any, _Ask], Any],
        *,
        quiet: bool,
    ) -> list[Any]:
        """Each context encoded once, with all that is asked on it; in the requests' order."""
        found: list[Any] = [None] * len(requests)
        with tqdm(
            total=len(requests), desc=f"star {kind}", disable=quiet or self.star.rank > 0
        ) as bar:
            for ids, asks in jobs:
                context = self.star.encode(ids)
                for ask in asks:
                    found[ask.index] = answer(context, ask)
                    self.cache_hook.add_partial(kind, requests[ask.index].args, found[ask.index])
                    bar.update()
                del context  # its keys and values, before those of the next
        return found

    def _jobs(
        self, requests: list[Instance], *, room: Sequence[int], scored: bool = False
    ) -> list[tuple[list[int], list[_Ask]]]:
        """Contexts as token ids, each with its requests; the same on all ranks. room: tokens for each request's answer."""
        groups: dict[tuple[int, ...], list[_Ask]] = {}
        for index, request in enumerate(requests):
            prompt, second = _two(request)
            context, query, continuation = self._ids(request, prompt, second if scored else None)
            self._check(request, len(context) + len(query) + len(continuation) + room[index])
            ask = _Ask(index=index, query=query, continuation=continuation)
            groups.setdefault(tuple(context), []).append(ask)
        jobs: list[tuple[list[int], list[_Ask]]] = self.star.from_rank_0(
            [(list(ids), asks) for ids, asks in groups.items()]
        )
        return jobs

    def _ids(
        self, request: Instance, prompt: str, continuation: str | None
    ) -> tuple[list[int], list[int], list[int]]:
        """Token ids of context, query and continuation. As everywhere in the harness, spaces at a prompt's end are the
        continuation's."""
        task = request.task_name or ""
        found = cut(prompt, request.doc, task, context_column=self._column, sentinel=self._sentinel)
        self._tell(task, found)
        if found.query:
            context = self._context_ids(found.context)
            query, more = _continued(
                functools.partial(query_ids, self.star.tokenizer), found.query, continuation
            )
        else:
            context, more = _continued(self._context_ids, found.context, continuation)
            query = []
        if continuation is not None and not more:
            raise TokenError(
                f"{_named(request)} has an empty continuation, {continuation!r}; give it at least 1 token"
            )
        moved = 0 if query else 1  # (the first token of an answer is predicted by a query's last)
        if found.how == "last block" and context:
            block = self.star.runtime.plan_for(len(context)).block_size
            moved = block if block < len(context) else 1
        at = max(0, len(context) - moved)
        context, query = context[:at], context[at:] + query
        if not context or not query:
            raise TokenError(
                f"{_named(request)} has a prompt of {len(context) + len(query)} tokens; Star Attention needs 1 of context and 1 of"
                " query (metrics that score answers without a prompt, as acc_mutual_info, are not possible)"
            )
        return context, query, more

    def _tell(self, task: str, found: Cut) -> None:
        """Say once for each task how its prompts are cut."""
        told = self.splits.setdefault(task, [])
        if found.how in told:
            return
        told.append(found.how)
        if self.star.rank > 0:
            return
        if found.how != "last block":
            _logger.info("%s: context and query are cut by %s", task, found.how)
            warn_about_cut(self.star.tokenizer, found.context, found.query)
            return
        _logger.warning(
            "%s: it is not known where the query begins, so it is the last block of each prompt; to say it, give documents a column"
            " %r, or write %s into doc_to_text",
            task,
            self._column,
            self._sentinel or "a sentinel",
        )

    def _check(self, request: Instance, tokens: int) -> None:
        limit = self.star.runtime.handle.max_positions
        if limit is not None and tokens > limit:
            raise ContextLengthError(
                f"{_named(request)} needs {tokens:,} tokens with its answer, more than the model's {limit:,} positions; leave it"
                " out (--samples), ask for shorter documents, or lower max_gen_toks"
            )


def _continued(
    ids_of: Callable[[str], list[int]], text: str, continuation: str | None
) -> tuple[list[int], list[int]]:
    """Token ids of a text and of its continuation, which are tokenized together."""
    if continuation is None:
        return ids_of(text), []
    kept = text.rstrip()
    ids = ids_of(kept) if kept else []
    return ids, ids_of(text + continuation)[len(ids) :]


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's generation words as those of `StarLLM.generate`."""
    words = dict(normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS))
    stop, tokens = [one for one in words.pop("until") if one], words.pop("max_gen_toks")
    return GREEDY | words | {"stop": stop, "max_new_tokens": tokens}


def _two(request: Instance) -> tuple[Any, Any]:
    """Raises `InvalidInputError` for requests with images or sound."""
    if len(request.args) != 2:
        raise InvalidInputError(
            f"{_named(request)} comes with more than text, which cannot be encoded; leave the task out"
        )
    prompt, second = request.args
    return prompt, second


def _named(request: Instance) -> str:
    return f"document {request.doc_id} of task {request.task_name}"


# A name and no class: run with `python -m`, this module is there twice.
model_registry.register(_NAME, target="star_attention.evals.lm_eval:StarLM")


def main() -> None:
    """The harness's own command line, which knows `--model star`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except StarAttentionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
