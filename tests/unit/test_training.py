"""Training the bundled model: documents in the evaluations' formats, and resumed trainings."""

from __future__ import annotations

import json
import queue
import random
import re
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from star_attention import StarLLM
from star_attention.evals.samples import sources
from star_attention.evals.suites.babilong.prompts import QUESTION_LEAD
from star_attention.evals.suites.ruler import lists
from star_attention.hf.text.tokens import context_ids, query_ids
from tests.babilong import answers
from tests.engines import bundled_tokenizer
from training import data, documents, train
from training.babilong_documents import story_document
from training.documents import Maker
from training.infinitebench_documents import pair_document, search_document
from training.model import build_model
from training.ruler_documents import (
    chain_document,
    common_word_document,
    frequent_word_document,
    needle_document,
)
from training.settings import Settings, lr_factor, stages_of
from training.text import Encoder
from training.trainer import Trainer


@pytest.fixture(autouse=True)
def few_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few sentences: reading all docstrings takes seconds."""
    sentences = sources.prose().sentences[:200]
    monkeypatch.setattr(documents, "docstring_sentences", lambda: sentences)


def new_maker(seed: int = 0, part: str = "train") -> Maker:
    return Maker(rng=random.Random(seed), encode=Encoder(bundled_tokenizer()), part=part)


@pytest.mark.parametrize("room", [600, 3000])
@pytest.mark.parametrize("kind", list(data.KINDS))
def test_documents_are_what_a_model_sees(kind: str, room: int) -> None:
    """Ids are those of the engine; answers and their ends are masked; lengths are about right."""
    tokenizer, maker = bundled_tokenizer(), new_maker()
    least, make = data.KINDS[kind].least, data.KINDS[kind].make
    for _ in range(3):
        document = make(maker, max(room, least))
        ids, mask = data.encode_document(document, maker.encode)
        expected = context_ids(tokenizer, document.context)
        for question in document.questions:
            expected += (
                query_ids(tokenizer, question.text)
                + query_ids(tokenizer, question.answer)
                + [maker.encode.eos]
            )
        assert ids == expected
        assert len(mask) == len(ids) <= 1.1 * max(room, least) + 120
        answers = [data.TASKS[value - 2] for value in mask if value >= data.ANSWER]
        counted = sum(
            len(query_ids(tokenizer, question.answer)) + 1 for question in document.questions
        )
        hint = len(query_ids(tokenizer, document.hint)) if document.hint else 0
        assert len(answers) == counted + hint
        assert {question.task for question in document.questions} == set(answers)


def test_answers_are_right() -> None:
    """The answers are derived again from the text, for needles and chains."""
    maker = new_maker(3)
    for _ in range(20):
        document = needle_document(maker, 1500)
        facts: dict[str, list[str]] = {}
        for key, value in re.findall(
            r"One of the special magic \w+ for (.+?) is: ([\w-]+)\.", document.context
        ):
            facts.setdefault(key, []).append(value)
        for question in document.questions:
            named = re.search(r" for (.+) mentioned in the provided text\?", question.text)
            assert named is not None
            keys = re.split(r", and |, ", named[1])
            assert question.answer == " " + ", ".join(value for key in keys for value in facts[key])
    for _ in range(10):
        document = chain_document(maker, 1500)
        for question in document.questions:
            value = re.search(r"the value (\d+) in", question.text)
            assert value is not None
            names = re.findall(rf"VAR (\w+) = {value[1]}\n", document.context.split("\n\n", 1)[-1])
            for _hop in range(4):
                names += re.findall(rf"VAR (\w+) = VAR {names[-1]} \n", document.context)
            assert question.answer == " ".join(names)


def test_counted_words_are_the_most_common() -> None:
    maker = new_maker(8)
    for _ in range(10):
        document = frequent_word_document(maker, 700)
        counts = Counter(re.findall(r"\b[a-z]{6}\b", document.context.removeprefix(lists.FWE_HEAD)))
        named = document.questions[0].answer.strip().split(", ")
        most = sorted(counts.values(), reverse=True)[:3]
        assert [counts[name] for name in named] == most, document.context[:300]
        document = common_word_document(maker, 2500)
        listed = Counter(
            re.findall(r"\d+\. ([\w-]+)", document.context.rpartition(lists.CWE_HEAD)[2])
        )
        named = re.findall(r"\d+\. ([\w-]+)", document.questions[0].answer)
        assert len(named) == 10
        assert set(named) == {word for word, _ in listed.most_common(10)}


def test_continued_stories_are_answered_from_the_facts_so_far() -> None:
    maker, continued, checked = new_maker(5), 0, 0
    for _ in range(60):
        document = story_document(maker, 1200)
        text = document.context.split("<context>")[-1]
        for place, question in enumerate(document.questions):
            more, _, rest = question.text.rpartition(QUESTION_LEAD)
            continued += bool(more) and place > 0
            text += more
            assert answers(text, rest.split("\n")[0]) == {question.answer.strip()}, rest
            checked += 1
    assert continued > 20
    assert checked > 300


def test_searches_have_their_answers_in_the_text() -> None:
    maker = new_maker(6)
    for _ in range(20):
        document = search_document(maker, 800)
        (question,) = document.questions
        if question.task == "math_find":
            numbers = sorted(map(int, re.findall(r"\b\d\d\b", document.context)))
            rank = next(
                (n for n, word in enumerate(("second", "third"), start=1) if word in question.text),
                0,
            )
            assert int(question.answer) == (
                numbers[rank] if "smallest" in question.text else numbers[-1 - rank]
            )
        else:
            assert document.context.count(question.answer) == 2
        document = pair_document(maker, 1500)
        pairs = json.loads(document.context[document.context.index("{") :])
        for question in document.questions:
            key = re.search(r'"(.+?)"', question.text)
            assert key is not None
            assert question.answer == f" {pairs[key[1]]}"


def test_a_model_starts_with_a_sink() -> None:
    """With a sink, every query of the first layer attends to `<bos>`; without one, none does."""
    ids = torch.randint(5, 4000, (1, 600), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = bundled_tokenizer().bos_token_id
    shares = {}
    for sink in (0.0, 10.0):
        model = build_model(Settings(layers=2, sink=sink), bundled_tokenizer()).eval()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            (first, _) = model(ids, output_attentions=True).attentions
        # The mean share of each head.
        shares[sink] = first[0, :, 100:, 0].mean(1)
    assert shares[0.0].max() < 0.05
    assert shares[10.0].min() > 0.8


def test_words_of_training_and_evaluation_are_disjoint() -> None:
    keys: list[set[str]] = []
    for part in sources.PARTS:
        maker = new_maker(7, part)
        texts = [needle_document(maker, 2000).context for _ in range(10)]
        keys.append(
            {key for text in texts for key in re.findall(r" for ([a-z]+-[a-z]+) is: ", text)}
        )
    train_keys, eval_keys = keys
    assert train_keys
    assert eval_keys
    held_out = sources.words("eval")
    assert eval_keys <= {
        f"{adjective}-{noun}" for adjective in held_out.adjectives for noun in held_out.nouns
    }
    assert not train_keys & eval_keys


SETTINGS: dict[str, Any] = dict(
    hidden=32,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate=48,
    tokens=512,
    stages="256:2k,512:1k",
    warmup=2,
)


class ThreadWorker(threading.Thread):
    """A worker of `data.Feed` that needs no seconds to import all modules again."""

    def terminate(self) -> None:
        """Do nothing: a daemon ends with its process."""


def use_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads make the batches of trainings that follow."""
    context = SimpleNamespace(Queue=queue.Queue, Process=ThreadWorker)
    contexts = SimpleNamespace(get_context=lambda _: context)
    monkeypatch.setattr(data, "multiprocessing", contexts)


def run(out: Path, **more: Any) -> None:
    arguments = ["--out", str(out), "--workers", "1", "--device", "cpu", "--every", "0"]
    for name, value in (SETTINGS | more).items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    train.main(arguments)


def test_a_resumed_training_makes_the_model_of_an_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch)
    run(tmp_path / "whole")
    assert "done: " in capsys.readouterr().out
    for _ in range(3):
        run(tmp_path / "pieces", steps=2)
    whole, pieces = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "pieces")
    )
    assert whole.keys() == pieces.keys()
    for name, weight in whole.items():
        # The exported weights are bf16.
        torch.testing.assert_close(weight, pieces[name], atol=2e-2, rtol=2e-2)
    lines = [
        json.loads(line) for line in (tmp_path / "pieces" / "log.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["length"] for line in lines] == [256] * 4 + [512] * 2
    star = StarLLM.from_pretrained(tmp_path / "whole" / "model", block_size=64)
    assert star.generate(
        star.encode("The grass is green. " * 40), "What?", max_new_tokens=3
    ).token_ids
    with pytest.raises(ValueError, match=r"was trained with hidden 32, not 64"):
        run(tmp_path / "whole", hidden=64)


def test_a_model_learns() -> None:
    """The loss of a batch falls in a few steps, and answers are counted by task."""
    settings = Settings(**(SETTINGS | dict(lr=1e-2, matrix_lr=1e-2)))
    trainer = Trainer(settings, bundled_tokenizer(), device=torch.device("cpu"), compile=False)
    ids, mask = (part.long() for part in data.batch(2, 256, new_maker()))
    losses = [float(trainer.train(ids, mask, 1.0).total.detach()) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    counted = trainer.accuracy(ids, mask)
    assert set(counted) <= set(data.TASKS)
    assert sum(number for _, number in counted.values()) > 0


def test_stages() -> None:
    settings = Settings(tokens=1024, stages="256:10k,1024:0.5m")
    assert [(stage.length, stage.steps) for stage in stages_of(settings)] == [
        (256, 10),
        (1024, 488),
    ]
    factors = [
        lr_factor(step, 1000, Settings(warmup=10, decay_from=0.5)) for step in (0, 9, 499, 750, 999)
    ]
    assert factors == pytest.approx([0.1, 1, 1, 0.5, 0.002])
    with pytest.raises(
        ValueError, match="a step of 1,024 tokens cannot be divided into rows of 300"
    ):
        stages_of(Settings(tokens=1024, stages="300:1k"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(optimizer="sgd"), "optimizer 'sgd' is unknown; choose muon or adamw"),
        (dict(bos="nowhere"), "bos 'nowhere' is unknown; choose document or row"),
        (dict(weights="qa9:2"), "tasks qa9 in weights are unknown; choose from needles"),
        (dict(common=0.0), "sink 10.0 needs a common component of the embeddings"),
    ],
)
def test_unknown_settings_are_refused(
    setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **setting)


@pytest.mark.parametrize("length", [256, 512, 1024, 3000])
def test_rows_hold_whole_documents(length: int) -> None:
    """A document that is cut off would lose its questions, and with them its purpose."""
    maker = new_maker(length)
    questions, filled = 0, 0
    for _ in range(40):
        ids, mask = data.row(length, maker)
        assert len(ids) == len(mask) == length
        end = max(place for place, token in enumerate(ids) if token) + 1
        assert ids[end - 1] == maker.encode.eos
        assert mask[end - 1] >= data.ANSWER
        assert not any(mask[end:])
        filled += end
        questions += sum(token == maker.encode.eos for token in ids)
    assert filled > 0.75 * 40 * length
    assert questions >= 40


def test_a_row_may_have_a_single_bos() -> None:
    maker = new_maker(2)
    maker.bos = "row"
    rows = [data.row(2000, maker)[0] for _ in range(8)]
    assert all(row[0] == maker.encode.bos and maker.encode.bos not in row[1:] for row in rows)
    maker.bos = "document"
    assert any(maker.encode.bos in data.row(2000, maker)[0][1:] for _ in range(8))


def test_training_starts_from_the_weights_of_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "first", steps=1)
    use_threads(monkeypatch)
    first = load_file(tmp_path / "first" / "model" / "model.safetensors")
    run(
        tmp_path / "second",
        steps=1,
        init=tmp_path / "first" / "model",
        lr=0,
        matrix_lr=0,
        weight_decay=0,
    )
    second = load_file(tmp_path / "second" / "model" / "model.safetensors")
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    with pytest.raises(ValueError, match="exists and resumes without --init"):
        run(
            tmp_path / "second",
            init=tmp_path / "first" / "model",
            lr=0,
            matrix_lr=0,
            weight_decay=0,
        )
