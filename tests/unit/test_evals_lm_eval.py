"""The adapter for lm-evaluation-harness, with the real package on tasks of a line of YAML and a jsonl file."""

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
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from star_attention import StarLLM
from star_attention.errors import ContextLengthError, InvalidInputError, TokenError
from star_attention.evals import lm_eval as adapter
from star_attention.evals.lm_eval import SENTINEL, StarLM, cut
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites import get
from star_attention.hf.text.tokens import context_ids, query_ids
from tests.engines import BUNDLED, bundled_model, bundled_tokenizer

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
"""Two contexts by turns."""


def star(**settings: Any) -> StarLLM:
    return StarLLM(bundled_model(), bundled_tokenizer(), **({"block_size": 64} | settings))


def tasks(
    folder: Path, kind: str, *, prompt: str = "{{context}}{{question}}", docs: Any = None
) -> TaskManager:
    """A task `boxes`, and no other."""
    (folder / "boxes.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs or DOCS))
    (folder / "boxes.yaml").write_text(
        f'task: boxes\ndataset_path: json\ntest_split: test\ndoc_to_text: "{prompt}"\n{kind}'
        f"dataset_kwargs: {{data_files: {{test: {folder}/boxes.jsonl}}, cache_dir: {folder}/cache}}\n"
    )
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model: Any, manager: TaskManager, **settings: Any) -> tuple[list[Any], dict[str, Any]]:
    """The model's responses for each document, and all of the results."""
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=["boxes"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        **settings,
    )
    return [sample["filtered_resps"] for sample in found["samples"]["boxes"]], found


def counted(engine: StarLLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each context that the engine encodes from now on."""
    seen: list[int] = []
    encode = engine.encode

    def counting(content: Any, **words: Any) -> Any:
        seen.append(len(content))
        return encode(content, **words)

    monkeypatch.setattr(engine, "encode", counting)
    return seen


def request(prompt: str, second: Any, doc: Any = None, **more: Any) -> Instance:
    kind = "loglikelihood" if isinstance(second, str) else "generate_until"
    return Instance(
        request_type=kind,
        doc=doc or {},
        arguments=(prompt, second, *more.values()),
        idx=0,
        metadata=("mine", 7, 1),
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
    engine = star()
    expected = []
    for doc in DOCS:
        context = engine.encode(head + doc["context"])
        reply = engine.generate(
            context, doc["question"] + tail, max_new_tokens=5, stop="\n", do_sample=False
        )
        expected.append([reply.text])
    assert len({text for (text,) in expected}) > 1
    encoded = counted(engine, monkeypatch)
    answers, found = evaluate(StarLM(engine), tasks(tmp_path, GENERATE), apply_chat_template=chat)
    assert answers == expected
    assert len(encoded) == 2, "documents on one context share its encoding"
    assert (
        found["samples"]["boxes"][0]["arguments"][0][0]
        == head + DOCS[0]["context"] + DOCS[0]["question"] + tail
    )


def test_the_task_of_the_docs_scores_right_answers(tmp_path: Path) -> None:
    """As docs/evaluation.md has it, on the bundled model."""
    docs = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (written,) = re.findall(r"```yaml\n(.*?)```", docs, re.DOTALL)
    (sample,) = get("ruler").generate(
        "niah_single_1",
        size=Size(tokenizer=bundled_tokenizer(), length=512),
        count=1,
        seed=0,
        options={},
    )
    (tmp_path / "mine.jsonl").write_text(json.dumps(sample.as_dict()) + "\n")
    (tmp_path / "mine.yaml").write_text(
        written.replace(
            "{test: mine.jsonl}", f"{{test: {tmp_path}/mine.jsonl}}, cache_dir: {tmp_path}/cache"
        )
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=StarLM(star(block_size=256)), tasks=["mine"], task_manager=manager, bootstrap_iters=0
    )
    assert found["results"]["mine"]["exact_match,stripped"] == 1.0


def test_a_chat_without_a_prefix_ends_in_the_start_of_the_answer(tmp_path: Path) -> None:
    kind = GENERATE.replace('gen_prefix: "{{answer_prefix}}"\n', "")
    _, found = evaluate(StarLM(star()), tasks(tmp_path, kind), apply_chat_template=True, limit=1)
    assert found["samples"]["boxes"][0]["arguments"][0][0].endswith("box 0?<|a|>")


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
            greedy = all(int(logp_QV[at - 1].argmax()) == ids[at] for at in targets)
            expected.append((sum(float(logp_QV[at - 1, ids[at]]) for at in targets), greedy))
    encoded = counted(engine, monkeypatch)
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
    """Forbids a score of the wrong tokens, whatever the cut: behind a query, behind a bare context, behind one block."""
    answers, found = evaluate(
        StarLM(star(block_size=None, method="dense")),
        tasks(tmp_path, CHOOSE, prompt=prompt),
        limit=1,
    )
    tokenizer = bundled_tokenizer()
    for scores, sample in zip(answers, found["samples"]["boxes"], strict=True):
        for (score, _), (text, continuation) in zip(scores, sample["arguments"], strict=True):
            known = len(context_ids(tokenizer, text.rstrip()))
            ids = torch.tensor([context_ids(tokenizer, text + continuation)])
            with torch.no_grad():
                logp_QV = bundled_model()(ids).logits[0].float().log_softmax(-1)
            expected = sum(float(logp_QV[at - 1, ids[0, at]]) for at in range(known, ids.shape[1]))
            assert score == pytest.approx(expected, abs=2e-3)


def test_a_greedy_answer_is_known_as_such() -> None:
    engine = star()
    model, doc = StarLM(engine), DOCS[0]
    prompt = doc["context"] + "What is the number of box 3? It is"
    (text,) = model.generate_until([request(prompt, {"max_gen_toks": 2}, doc)], disable_tqdm=True)
    (_, greedy), (_, other) = model.loglikelihood(
        [request(prompt, text, doc), request(prompt, " never", doc)], disable_tqdm=True
    )
    assert greedy
    assert not other


def test_generation_words_and_results_kept_by_the_harness() -> None:
    model = StarLM(star())
    kept: list[Any] = []
    model.cache_hook.add_partial = lambda kind, args, found: kept.append((kind, args, found))  # type: ignore[method-assign]
    words = {"until": [" ", ""], "max_gen_toks": 6, "temperature": 0.0}
    asked = request(DOCS[0]["context"] + "Where?", words, DOCS[0])
    (text,) = model.generate_until([asked], disable_tqdm=True)
    assert " " not in text
    assert kept == [("generate_until", asked.args, text)]
    with pytest.raises(TypeError, match="unknown word 'no_such_word'"):
        model.generate_until([request(DOCS[0]["context"] + "Where?", {"no_such_word": 1}, DOCS[0])])


# ------------------------------------------------------------------ where a prompt is cut

RULER = {
    "niah_single_1": "What is the special magic number for a in the text?",
    "niah_multikey_2": "What are all the special magic numbers for a?",
    "ruler_vt": "Question: Find all variables that are",
    "ruler_cwe": "Question: What are the 10 most common words?",
    "ruler_fwe": "Question: Do not provide any explanation.",
    "ruler_qa_squad": "Answer the question based on the given documents. Who?",
}


@pytest.mark.parametrize("name", RULER)
def test_the_harness_own_tasks_are_cut_before_their_question(name: str) -> None:
    example = f"An example.\n{RULER[name]} It is 3.\n"
    found = cut(example + f"Text.\n{RULER[name]} It is", {"input": "..."}, name)
    assert (found.context, found.query, found.how) == (
        f"{example}Text.\n",
        f"{RULER[name]} It is",
        "pattern",
    )
    assert cut(f"Text.\n{RULER[name]}", {}, "another_task").how == "last block"


@pytest.mark.parametrize(
    ("prompt", "doc", "task", "expected"),
    [
        ("CTX a? CTX b?", {"context": "CTX"}, "mine", ("CTX a? CTX", " b?", "column")),
        ("<u>CTX b?", {"context": " CTX\n"}, "mine", ("<u>CTX", " b?", "column")),
        ("CTX", {"context": "CTX"}, "mine", ("CTX", "", "column")),
        (f"CTX{SENTINEL}?{SENTINEL}!", {"context": "CTX"}, "mine", ("CTX", "?!", "column")),
        (f"CTX{SENTINEL}? CTX{SENTINEL}!", {}, "mine", ("CTX? CTX", "!", "sentinel")),
        (f"Text.{SENTINEL} Question: Find all variables", {}, "ruler_vt", ("Text.", " Question: Find all variables", "sentinel")),
        ("Where? Facts. Where?", {"question": " Where? "}, "babilong_qa1", ("Where? Facts. ", "Where?", "pattern")),
        ("Facts.", {}, "babilong_qa1", ("Facts.", "", "last block")),
        ("Where is he?", {"question": "Where"}, "babilong_qa1", ("Where is he?", "", "last block")),
        ("Text. b?", {"context": ["Text."]}, "mine", ("Text. b?", "", "last block")),
        ("Text. b?", {"context": ""}, "mine", ("Text. b?", "", "last block")),
        (f"{SENTINEL}b?", {}, "mine", ("b?", "", "last block")),
        ("Text. b?", "no columns", "mine", ("Text. b?", "", "last block")),
    ],
)  # fmt: skip
def test_where_a_prompt_is_cut(
    prompt: str, doc: Any, task: str, expected: tuple[str, str, str]
) -> None:
    found = cut(prompt, doc, task)
    assert (found.context, found.query, found.how) == expected


def test_column_and_sentinel_have_names_of_ones_own() -> None:
    doc = {"passage": "CTX", "context": "b"}
    assert cut("CTX a b?", doc, "mine", context_column="passage").query == " a b?"
    assert cut("CTX @ b?", {}, "mine", sentinel="@").query == " b?"


@pytest.mark.parametrize(("tokens", "query"), [(200, 64), (65, 64), (64, 1), (2, 1)])
def test_without_a_known_place_the_last_block_is_the_query(tokens: int, query: int) -> None:
    engine = star()
    ids = context_ids(engine.tokenizer, boxes(0))[:tokens]
    text = engine.tokenizer.decode(ids, skip_special_tokens=True)
    assert context_ids(engine.tokenizer, text) == ids
    reply = engine.generate(engine.encode(ids[:-query]), ids[-query:], max_new_tokens=3)
    model = StarLM(engine)
    assert model._jobs([request(text, {})], room=[0])[0][0] == ids[:-query]
    assert model.generate_until([request(text, {"max_gen_toks": 3})], disable_tqdm=True) == [
        reply.text
    ]


def test_each_task_says_once_how_it_is_cut(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    caplog.set_level(logging.INFO, logger="lm_eval.star_attention")
    model = StarLM(star())
    some = [request("Some words to go on.", {"max_gen_toks": 1}) for _ in range(2)]
    model.generate_until(
        [*some, request("Words. And?", {"max_gen_toks": 1}, {"context": "Words."})],
        disable_tqdm=True,
    )
    told = [(record.levelname, record.message) for record in caplog.records]
    assert [level for level, _ in told] == ["WARNING", "INFO"]
    assert "mine: it is not known where the query begins" in told[0][1]
    assert told[1][1] == "mine: context and query are cut by column"
    assert model.get_model_info()["star_splits"] == {"mine": "last block and column"}


# ------------------------------------------------------------------ what cannot be


def test_a_whole_text_has_no_likelihood(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="eval perplexity"):
        evaluate(StarLM(star()), tasks(tmp_path, ROLL))


def test_a_prompt_that_is_too_long_stops_the_run_before_the_first_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = star()
    encoded = counted(engine, monkeypatch)
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
        TokenError, match=r"has a prompt of [01] tokens; Star Attention needs 1 of context"
    ):
        StarLM(star()).loglikelihood([request(prompt, "words")])


def test_an_empty_continuation_is_refused() -> None:
    with pytest.raises(TokenError, match="has an empty continuation, ''"):
        StarLM(star()).loglikelihood([request("Some words.", "")])


def test_images_are_refused() -> None:
    with pytest.raises(
        InvalidInputError, match="document 7 of task mine comes with more than text"
    ):
        StarLM(star()).generate_until([request("Some words.", {}, images={"visual": []})])


def test_a_chat_without_a_template_is_refused() -> None:
    engine = star()
    engine.tokenizer = copy.deepcopy(engine.tokenizer)
    engine.tokenizer.chat_template = None
    with pytest.raises(
        InvalidInputError, match="no chat template; leave --apply_chat_template out"
    ):
        StarLM(engine).apply_chat_template([{"role": "user", "content": "Where?"}])


def test_an_engine_brings_its_settings() -> None:
    with pytest.raises(InvalidInputError, match="leave block_size out"):
        StarLM(star(), block_size=3)
    with pytest.raises(InvalidInputError, match="has no tokenizer"):
        StarLM(StarLLM(bundled_model()))


# ------------------------------------------------------------------ by name


def test_the_harness_knows_the_model_by_name(tmp_path: Path) -> None:
    manager = tasks(tmp_path, GENERATE, prompt="{{context}}" + SENTINEL + "{{question}}")
    args = f"pretrained={BUNDLED},block_size=64,anchor_size=32,dtype=float32,context_column=none"
    answers, found = evaluate(
        "star", manager, model_args=args, limit=1, device="cuda:0", batch_size=1
    )
    expected, _ = evaluate(StarLM(star(anchor_size=32)), tasks(tmp_path, GENERATE), limit=1)
    assert answers == expected
    assert found["config"]["star_splits"] == {"boxes": "sentinel"}
    assert (found["config"]["star_block_size"], found["config"]["star_anchor_size"]) == (64, 32)


def test_ruler_as_the_harness_has_it(tmp_path: Path) -> None:
    """The harness makes its own samples, offline for this task, and cuts them nowhere."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    manager = TaskManager(
        include_path=str(folder),
        include_defaults=False,
        metadata={"pretrained": str(BUNDLED), "max_seq_lengths": [1024]},
    )
    model = StarLM(star(block_size=256))
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=["niah_single_1"],
        task_manager=manager,
        limit=1,
        gen_kwargs={"max_gen_toks": 8},
        log_samples=True,
        bootstrap_iters=0,
    )
    assert model.splits == {"niah_single_1": ["pattern"]}
    (sample,) = found["samples"]["niah_single_1"]
    prompt = sample["arguments"][0][0]
    at = prompt.index("What is the special magic number")
    engine = model.star
    reply = engine.generate(
        engine.encode(prompt[:at]), prompt[at:], max_new_tokens=8, do_sample=False
    )
    assert sample["filtered_resps"] == [reply.text]


def test_errors_of_the_command_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["star", "run", "--model", "star", "--tasks", "x", "--model_args", "pretrained=/none"],
    )
    monkeypatch.setattr(lm_eval.evaluator, "TaskManager", None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *a, **k: _Nothing())
    with pytest.raises(SystemExit, match=r"^error: .*/none"):
        adapter.main()


class _Nothing:
    """Stands for the harness's thousands of task files, which take seconds to list."""

    def match_tasks(self, names: list[str]) -> list[str]:
        return names
