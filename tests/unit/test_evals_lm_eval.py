"""The model for lm-evaluation-harness, with the real package and small tasks of our own."""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
import lm_eval.evaluator
from lm_eval.tasks import TaskManager

from star_attention import StarLLM
from star_attention.errors import ContextLengthError, InvalidInputError, TokenError
from star_attention.evals import lm_eval as adapter
from star_attention.evals.lm_eval import StarLM
from star_attention.evals.lm_eval_jobs import JobBuilder
from star_attention.evals.samples.sizing import Size
from star_attention.evals.splitting import SENTINEL
from star_attention.evals.suites import get
from star_attention.hf.text.tokens import context_ids, query_ids
from tests.engines import BUNDLED, bundled_model, bundled_tokenizer
from tests.lm_eval_tasks import (
    CHOOSE,
    DOCS,
    GENERATE,
    ROLL,
    boxes,
    count_encodings,
    evaluate,
    request,
    star,
    tasks,
)

# ------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("chat", "head", "tail"),
    [
        (False, "", " The special magic number for"),
        (True, "<bos><|q|>", "<|a|>The special magic number for"),
    ],
    ids=["plain", "chat"],
)
def test_answers_are_those_of_the_engine_on_the_same_split(
    chat: bool, head: str, tail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the chat template writes are special tokens.
    engine = star(allow_special_tokens=True)
    expected = []
    for doc in DOCS:
        context = engine.encode(head + doc["context"])
        reply = engine.generate(
            context, doc["question"] + tail, max_new_tokens=5, stop="\n", do_sample=False
        )
        expected.append([reply.text])
    assert len({text for (text,) in expected}) > 1
    encoded = count_encodings(engine, monkeypatch)
    answers, results = evaluate(StarLM(engine), tasks(tmp_path, GENERATE), apply_chat_template=chat)
    assert answers == expected
    assert len(encoded) == 2, "documents with the same context share its encoding"
    assert (
        results["samples"]["boxes"][0]["arguments"][0][0]
        == head + DOCS[0]["context"] + DOCS[0]["question"] + tail
    )


def test_the_task_of_the_docs_scores_right_answers(tmp_path: Path) -> None:
    """The YAML of docs/evaluation.md, on the bundled model."""
    docs = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (task,) = re.findall(r"```yaml\n(.*?)```", docs, re.DOTALL)
    (sample,) = get("ruler").generate(
        "niah_single_1",
        size=Size(tokenizer=bundled_tokenizer(), length=512),
        count=1,
        seed=0,
        options={},
    )
    (tmp_path / "mine.jsonl").write_text(json.dumps(sample.as_dict()) + "\n")
    (tmp_path / "mine.yaml").write_text(
        task.replace(
            "{test: mine.jsonl}", f"{{test: {tmp_path}/mine.jsonl}}, cache_dir: {tmp_path}/cache"
        )
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=StarLM(star(block_size=256)), tasks=["mine"], task_manager=manager, bootstrap_iters=0
    )
    assert results["results"]["mine"]["exact_match,stripped"] == 1.0


def test_a_chat_without_a_prefix_ends_in_the_start_of_the_answer(tmp_path: Path) -> None:
    kind = GENERATE.replace('gen_prefix: "{{answer_prefix}}"\n', "")
    _, results = evaluate(StarLM(star()), tasks(tmp_path, kind), apply_chat_template=True, limit=1)
    assert results["samples"]["boxes"][0]["arguments"][0][0].endswith("box 0?<|a|>")


def test_choices_are_scored_by_the_engines_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = star()
    expected = []
    for doc in DOCS:
        context = engine.encode(doc["context"])
        query = query_ids(engine.tokenizer, doc["question"])
        for choice in ("one hundred", "37", "38 or 39"):
            ids = query_ids(engine.tokenizer, f"{doc['question']} {choice}")
            assert ids[: len(query)] == query
            logp_QV = torch.log_softmax(engine.logits(context, ids), -1)
            targets = range(len(query), len(ids))
            greedy = all(int(logp_QV[i - 1].argmax()) == ids[i] for i in targets)
            expected.append((sum(float(logp_QV[i - 1, ids[i]]) for i in targets), greedy))
    encoded = count_encodings(engine, monkeypatch)
    answers, _ = evaluate(StarLM(engine), tasks(tmp_path, CHOOSE))
    scores = [score for doc in answers for score in doc]
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert [score for score, _ in scores] == pytest.approx(
        [score for score, _ in expected], abs=1e-4
    )
    assert len(encoded) == 2


@pytest.mark.parametrize(
    "prompt", ["{{context}}{{question}}", "{{context}}", "{{question}} {{answer_prefix}} "]
)
def test_dense_scores_are_the_stock_models(prompt: str, tmp_path: Path) -> None:
    """Forbids a score of the wrong tokens, wherever the prompt is split.

    With a query, with a context alone, and within one block.
    """
    answers, results = evaluate(
        StarLM(star(block_size=None, method="dense")),
        tasks(tmp_path, CHOOSE, prompt=prompt),
        limit=1,
    )
    tokenizer = bundled_tokenizer()
    for scores, sample in zip(answers, results["samples"]["boxes"], strict=True):
        for (score, _), (text, continuation) in zip(scores, sample["arguments"], strict=True):
            known = len(context_ids(tokenizer, text.rstrip()))
            ids = torch.tensor([context_ids(tokenizer, text + continuation)])
            with torch.no_grad():
                logp_QV = bundled_model()(ids).logits[0].float().log_softmax(-1)
            expected = sum(float(logp_QV[i - 1, ids[0, i]]) for i in range(known, ids.shape[1]))
            assert score == pytest.approx(expected, abs=2e-3)


def test_a_greedy_answer_is_recognized() -> None:
    engine = star()
    model, doc = StarLM(engine), DOCS[0]
    prompt = doc["context"] + "What is the number of box 3? It is"
    (text,) = model.generate_until([request(prompt, {"max_gen_toks": 2}, doc)], disable_tqdm=True)
    (_, greedy), (_, other) = model.loglikelihood(
        [request(prompt, text, doc), request(prompt, " never", doc)], disable_tqdm=True
    )
    assert greedy
    assert not other


def test_generation_arguments_and_the_harnesss_cache() -> None:
    model = StarLM(star())
    cached: list[Any] = []

    def add_partial(kind: str, args: Any, text: str) -> None:
        cached.append((kind, args, text))

    model.cache_hook.add_partial = add_partial  # type: ignore[method-assign]
    gen_kwargs = {"until": [" ", ""], "max_gen_toks": 6, "temperature": 0.0}
    where = request(DOCS[0]["context"] + "Where?", gen_kwargs, DOCS[0])
    (text,) = model.generate_until([where], disable_tqdm=True)
    assert " " not in text
    assert cached == [("generate_until", where.args, text)]
    with pytest.raises(TypeError, match="does not take 'no_such_word'"):
        model.generate_until([request(DOCS[0]["context"] + "Where?", {"no_such_word": 1}, DOCS[0])])


# ------------------------------------------------------------------ where a prompt is split


@pytest.mark.parametrize(("tokens", "query"), [(200, 64), (65, 64), (64, 1), (2, 1)])
def test_if_the_query_is_unknown_it_is_the_last_block(tokens: int, query: int) -> None:
    engine = star()
    ids = context_ids(engine.tokenizer, boxes(0))[:tokens]
    text = engine.tokenizer.decode(ids, skip_special_tokens=True)
    assert context_ids(engine.tokenizer, text) == ids
    reply = engine.generate(engine.encode(ids[:-query]), ids[-query:], max_new_tokens=3)
    model = StarLM(engine)
    builder = JobBuilder(engine, context_column="context", sentinel=SENTINEL)
    (job,) = builder.build([request(text, {})], answer_tokens=[0])
    assert job.context == ids[:-query]
    assert model.generate_until([request(text, {"max_gen_toks": 3})], disable_tqdm=True) == [
        reply.text
    ]


def test_each_task_logs_once_how_it_is_split(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    caplog.set_level(logging.INFO, logger="lm_eval.star_attention")
    model = StarLM(star())
    same = [request("Some words to go on.", {"max_gen_toks": 1}) for _ in range(2)]
    model.generate_until(
        [*same, request("Words. And?", {"max_gen_toks": 1}, {"context": "Words."})],
        disable_tqdm=True,
    )
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    warning, info = (record.message for record in caplog.records)
    assert "mine: the beginning of the query is unknown" in warning
    assert info == "mine: prompts are split into context and query by column"
    assert model.get_model_info()["star_splits"] == {"mine": "last block and column"}


# ------------------------------------------------------------------ refused


def test_a_whole_text_has_no_likelihood(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="eval perplexity"):
        evaluate(StarLM(star()), tasks(tmp_path, ROLL))


def test_a_prompt_that_is_too_long_stops_the_run_before_the_first_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = star()
    encoded = count_encodings(engine, monkeypatch)
    limit = engine.runtime.handle.max_positions
    assert limit is not None
    long = request("Some words.", {"max_gen_toks": limit})
    with pytest.raises(
        ContextLengthError,
        match=rf"document 7 of task mine needs .* the model's {limit:,} positions",
    ):
        StarLM(engine).generate_until([request("Some words.", {"max_gen_toks": 1}), long])
    assert encoded == []


@pytest.mark.parametrize("prompt", ["", " "])
def test_a_score_without_a_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(
        TokenError, match=r"has a prompt of [01] tokens, and Star Attention needs 1 of context"
    ):
        StarLM(star()).loglikelihood([request(prompt, "words")])


def test_an_empty_continuation_is_refused() -> None:
    with pytest.raises(TokenError, match="has an empty continuation, ''"):
        StarLM(star()).loglikelihood([request("Some words.", "")])


def test_images_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="document 7 of task mine contains more than text"):
        StarLM(star()).generate_until([request("Some words.", {}, images={"visual": []})])


def test_a_chat_without_a_template_is_refused() -> None:
    engine = star()
    engine.tokenizer = copy.deepcopy(engine.tokenizer)
    engine.tokenizer.chat_template = None
    with pytest.raises(
        InvalidInputError, match="no chat template; leave --apply_chat_template out"
    ):
        StarLM(engine).apply_chat_template([{"role": "user", "content": "Where?"}])


def test_an_engine_has_its_own_settings() -> None:
    with pytest.raises(InvalidInputError, match="leave block_size out"):
        StarLM(star(), block_size=3)
    with pytest.raises(InvalidInputError, match="has no tokenizer"):
        StarLM(StarLLM(bundled_model()))


# ------------------------------------------------------------------ by name


def test_the_harness_knows_the_model_by_name(tmp_path: Path) -> None:
    manager = tasks(tmp_path, GENERATE, prompt="{{context}}" + SENTINEL + "{{question}}")
    args = f"pretrained={BUNDLED},block_size=64,anchor_size=32,dtype=float32,context_column=none"
    answers, results = evaluate(
        "star", manager, model_args=args, limit=1, device="cuda:0", batch_size=1
    )
    expected, _ = evaluate(StarLM(star(anchor_size=32)), tasks(tmp_path, GENERATE), limit=1)
    assert answers == expected
    assert results["config"]["star_splits"] == {"boxes": "sentinel"}
    assert (results["config"]["star_block_size"], results["config"]["star_anchor_size"]) == (64, 32)


def test_ruler_as_the_harness_has_it(tmp_path: Path) -> None:
    """The harness makes its own samples, offline for this task, and does not mark their query."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    manager = TaskManager(
        include_path=str(folder),
        include_defaults=False,
        metadata={"pretrained": str(BUNDLED), "max_seq_lengths": [1024]},
    )
    model = StarLM(star(block_size=256))
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=["niah_single_1"],
        task_manager=manager,
        limit=1,
        gen_kwargs={"max_gen_toks": 8},
        log_samples=True,
        bootstrap_iters=0,
    )
    assert model.splits == {"niah_single_1": ["pattern"]}
    (sample,) = results["samples"]["niah_single_1"]
    prompt = sample["arguments"][0][0]
    start = prompt.index("What is the special magic number")
    engine = model.star
    reply = engine.generate(
        engine.encode(prompt[:start]), prompt[start:], max_new_tokens=8, do_sample=False
    )
    assert sample["filtered_resps"] == [reply.text]


def test_errors_of_the_command_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["star", "run", "--model", "star", "--tasks", "x", "--model_args", "pretrained=/none"],
    )
    monkeypatch.setattr(lm_eval.evaluator, "TaskManager", None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *a, **k: _NoTasks())
    with pytest.raises(SystemExit, match=r"^error: .*/none"):
        adapter.main()


class _NoTasks:
    """Stands for the harness's thousands of task files, which take seconds to list."""

    def match_tasks(self, names: list[str]) -> list[str]:
        return names
