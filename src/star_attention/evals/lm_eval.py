"""Star Attention as a model of lm-evaluation-harness (the extra `lm-eval`).

The harness gives a model whole prompts; `splitting` finds where the query begins. If that is
unknown, the last `block_size` tokens are the query. If one block holds the whole prompt, the last
token is, and Star Attention is dense attention.

    python -m star_attention.evals.lm_eval run --model star \\
        --model_args pretrained=PATH,block_size=4k --tasks ruler_vt
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from star_attention._version import __version__
from star_attention.config import MAX_NEW_TOKENS
from star_attention.engine import StarLLM
from star_attention.errors import (
    InvalidInputError,
    StarAttentionError,
    first_line,
    quote,
)
from star_attention.evals.lm_eval_jobs import Job, JobBuilder, Question, arguments
from star_attention.evals.runs.settings import GREEDY
from star_attention.evals.splitting import COLUMN, SENTINEL
from star_attention.storage.context import EncodedContext

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        'lm-evaluation-harness is not installed; run: pip install "star-attention[lm-eval]"'
    ) from error

_NAME = "star"
_DEFAULT_DEVICE = "cuda:0"
"""The harness's default, whether there is such a device or not, and on every rank."""

_T = TypeVar("_T")


class StarLM(LM):
    """The harness's model `star`.

    Under torchrun every rank runs the harness; the ranks share each context, and rank 0's answers
    count.

    Args:
        pretrained: A model folder or hub id, or a `StarLLM`.
        context_column: The column that holds a document's context.
        sentinel: Text of a prompt in whose place the query begins.
        batch_size: Ignored: answers are computed one at a time.
        max_batch_size: Ignored.
        device: As for `StarLLM.from_pretrained`, except that "cuda:0", the harness's default, means
            "auto".
        settings: Arguments of `StarLLM.from_pretrained` (block_size, anchor_size, method, dtype,
            ...).

    Raises:
        InvalidInputError: For settings next to a `StarLLM`, and for a model without a tokenizer.
    """

    def __init__(
        self,
        pretrained: str | StarLLM,
        *,
        context_column: str = COLUMN,
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
                    f"a StarLLM has its own settings; leave {', '.join(settings)} out"
                )
            self.star = pretrained
        else:
            device = "auto" if device in (None, _DEFAULT_DEVICE) else device
            self.star = StarLLM.from_pretrained(pretrained, device=device, **settings)
        if self.star.tokenizer is None:
            raise InvalidInputError(
                "tasks are text, and this model has no tokenizer; give one to StarLLM"
            )
        self._chat_template: str | None = None
        self._jobs = JobBuilder(self.star, context_column=context_column, sentinel=sentinel)

    @property
    def splits(self) -> dict[str, list[str]]:
        """The ways in which the prompts of each task were split."""
        return self._jobs.splits

    # ------------------------------------------------------------------ called by the harness

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer requests: greedily, unless a task's `generation_kwargs` say otherwise.

        Returns:
            The texts of the answers, in the requests' order.

        Raises:
            ContextLengthError: For a request beyond the model's positions, before the first answer.
        """
        settings = [_generation_settings(arguments(request)[1]) for request in requests]
        for kwargs in settings:
            self.star.check_settings(**kwargs)
        jobs = self._jobs.build(
            requests, answer_tokens=[kwargs["max_new_tokens"] for kwargs in settings]
        )

        def answer(context: EncodedContext, question: Question) -> str:
            generation = self.star.generate(context, question.query, **settings[question.index])
            text: str = generation.text
            return text

        return self._run("generate_until", requests, jobs, answer, quiet=disable_tqdm)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations.

        The logits of a whole query are in memory at once, fp32 `[tokens, vocabulary]`.

        Returns:
            For each request the log-probability of the continuation in nats, and True if greedy
            search generates it.

        Raises:
            ContextLengthError: For a request beyond the model's positions, before the first score.
            TokenError: For prompts of fewer than two tokens, and for empty continuations.
        """
        jobs = self._jobs.build(requests, answer_tokens=[0] * len(requests), scored=True)
        return self._run("loglikelihood", requests, jobs, self._score, quiet=disable_tqdm)

    def _score(self, context: EncodedContext, question: Question) -> tuple[float, bool]:
        logits_QV = self.star.logits(context, question.query + question.continuation[:-1])
        score: tuple[float, bool] | None = None
        if logits_QV is not None:
            logp_CV = logits_QV[len(question.query) - 1 :].log_softmax(-1)
            targets_C = logp_CV.new_tensor(question.continuation).long()
            picked_C = logp_CV.gather(1, targets_C[:, None])
            score = picked_C.sum().item(), bool((logp_CV.argmax(-1) == targets_C).all())
        shared = self.star.from_rank_0(score)
        assert shared is not None
        return shared

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Raises `InvalidInputError`: phase 1 has no logits, so a whole text has no likelihood."""
        raise InvalidInputError(
            "a whole text has no likelihood under Star Attention, whose phase 1 has no logits;"
            " measure tails of texts with `star-attention eval perplexity`, or leave tasks of"
            " output_type loglikelihood_rolling out"
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages as a prompt.

        Args:
            chat_history: The messages.
            add_generation_prompt: End with the start of an answer. Otherwise the last message, a
                prefix of the answer, stays open.

        Raises:
            InvalidInputError: If there is no template, or it rejects the messages.
        """
        tokenizer = self.star.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidInputError(
                "this model has no chat template; leave --apply_chat_template out"
            )
        # A template may raise anything for messages that it does not take.
        try:
            text: str = tokenizer.apply_chat_template(
                chat_history,
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:
            # Not chained: the error may hold whole messages.
            raise InvalidInputError(
                f"the chat template rejects these messages: {quote(first_line(error))}; leave"
                " --apply_chat_template out"
            ) from None
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template, for the harness's records; a name chooses one of several."""
        if not chat_template or not getattr(self.star.tokenizer, "chat_template", None):
            return ""
        self._chat_template = self.star.tokenizer.get_chat_template(
            chat_template if isinstance(chat_template, str) else None
        )
        return self._chat_template

    @property
    def tokenizer_name(self) -> str:
        return str(self.star.tokenizer.name_or_path).replace("/", "__")

    @property
    def device(self) -> Any:
        return self.star.device

    def get_model_info(self) -> dict[str, Any]:
        """Return the model's entry in the harness's results."""
        config = self.star.config
        return {
            "star_attention": __version__,
            "star_method": config.method,
            "star_block_size": config.block_size,
            "star_anchor_size": config.anchor_size,
            "star_splits": {task: " and ".join(splits) for task, splits in self.splits.items()},
        }

    # ------------------------------------------------------------------ requests by context

    def _run(
        self,
        kind: str,
        requests: list[Instance],
        jobs: list[Job],
        answer: Callable[[EncodedContext, Question], _T],
        *,
        quiet: bool,
    ) -> list[_T]:
        """Encode each context once and answer all questions on it; in the requests' order."""
        answers: dict[int, _T] = {}
        with tqdm(
            total=len(requests), desc=f"star {kind}", disable=quiet or self.star.rank > 0
        ) as bar:
            for job in jobs:
                longest = job.longest
                # Rotary frequencies may depend on the length of the whole.
                context = self.star.encode(
                    job.context,
                    progress=False,
                    query=longest.query + longest.continuation[:-1],
                    settings=GREEDY | {"max_new_tokens": max(1, longest.answer_tokens)},
                )
                for question in job.questions:
                    result = answers[question.index] = answer(context, question)
                    self.cache_hook.add_partial(kind, requests[question.index].args, result)
                    bar.update()
                # Frees the KV before the next context is encoded.
                del context
        return [answers[index] for index in range(len(requests))]


def _generation_settings(gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the harness's generation arguments as those of `StarLLM.generate`."""
    kwargs = dict(normalize_gen_kwargs(dict(gen_kwargs), MAX_NEW_TOKENS))
    stop = [text for text in kwargs.pop("until") if text]
    max_new_tokens = kwargs.pop("max_gen_toks")
    return GREEDY | kwargs | {"stop": stop or None, "max_new_tokens": max_new_tokens}


# By name: under `python -m` this module exists twice, and the harness imports it again.
model_registry.register(_NAME, target="star_attention.evals.lm_eval:StarLM")


def main() -> None:
    """Run the harness's own command line, with `--model star`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except StarAttentionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
