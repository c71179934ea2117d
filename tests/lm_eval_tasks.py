"""A task for lm-evaluation-harness, and engines that answer it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from star_attention import StarLLM
from tests.engines import bundled_model, bundled_tokenizer

GENERATE = """\
output_type: generate_until
gen_prefix: "{{answer_prefix}}"
doc_to_target: "{{answer}}"
generation_kwargs: {do_sample: false, max_gen_toks: 5, until: ["\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """\
output_type: multiple_choice
doc_to_choice: ["one hundred", "37", "38 or 39"]
doc_to_target: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLL = """\
output_type: loglikelihood_rolling
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}]
"""


def boxes(number: int) -> str:
    """A context; another number gives another one."""
    return "".join(f"The number of box {line} is {line * 37 + number}.\n" for line in range(30))


DOCS = [
    {
        "context": boxes(i % 2),
        "question": f"What is the number of box {i}?",
        "answer_prefix": "The special magic number for",
        "answer": str(i * 37 + i % 2),
    }
    for i in range(4)
]
"""Two contexts in turn."""


def star(**settings: Any) -> StarLLM:
    """The bundled model in blocks of 64 tokens."""
    return StarLLM(bundled_model(), bundled_tokenizer(), **({"block_size": 64} | settings))


def tasks(
    folder: Path, kind: str, *, prompt: str = "{{context}}{{question}}", docs: Any = None
) -> TaskManager:
    """The task `boxes`, and no other."""
    (folder / "boxes.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs or DOCS))
    (folder / "boxes.yaml").write_text(
        f'task: boxes\ndataset_path: json\ntest_split: test\ndoc_to_text: "{prompt}"\n{kind}'
        f"dataset_kwargs: {{data_files: {{test: {folder}/boxes.jsonl}},"
        f" cache_dir: {folder}/cache}}\n"
    )
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model: Any, manager: TaskManager, **settings: Any) -> tuple[list[Any], dict[str, Any]]:
    """The model's responses to each document, and all results."""
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=["boxes"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        **settings,
    )
    return [sample["filtered_resps"] for sample in results["samples"]["boxes"]], results


def count_encodings(engine: StarLLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each context that the engine encodes from now on."""
    tokens: list[int] = []
    encode = engine.encode

    def counting_encode(content: Any, **kwargs: Any) -> Any:
        tokens.append(len(content))
        return encode(content, **kwargs)

    monkeypatch.setattr(engine, "encode", counting_encode)
    return tokens


def request(prompt: str, second: Any, doc: Any = None, **more: Any) -> Instance:
    """A request of document 7 of the task `mine`; `second` is a continuation or settings."""
    kind = "loglikelihood" if isinstance(second, str) else "generate_until"
    return Instance(
        request_type=kind,
        doc=doc or {},
        arguments=(prompt, second, *more.values()),
        idx=0,
        metadata=("mine", 7, 1),
    )
