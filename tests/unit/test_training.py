"""Training the bundled model: its documents are what evaluations ask, and pieces make the model that one run makes."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from star_attention import StarLLM
from star_attention.evals.samples import sources
from star_attention.evals.suites.babilong.prompts import ASK
from star_attention.evals.suites.ruler import lists
from star_attention.hf.text.tokens import context_ids, query_ids
from tests.engines import bundled_tokenizer
from tests.unit.test_evals_babilong import answers
from training import data, train


@pytest.fixture(autouse=True)
def few_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all docstrings takes seconds."""
    monkeypatch.setattr(data, "prose", lambda: sources.prose().sentences[:200])


def maker(seed: int = 0, part: str = "train") -> data.Maker:
    return data.Maker(rng=random.Random(seed), encode=data.Encoder(bundled_tokenizer()), part=part)


@pytest.mark.parametrize("room", [600, 3000])
@pytest.mark.parametrize("kind", list(data._KINDS))
def test_documents_are_what_a_model_sees(kind: str, room: int) -> None:
    """Ids of context and of each question as the engine has them; answers masked, with the end; about as long as asked."""
    tokenizer, one = bundled_tokenizer(), maker()
    _, least, make = data._KINDS[kind]
    for _ in range(3):
        document = make(one, max(room, least))
        ids, mask = data.encoded(document, one.encode)
        expected = context_ids(tokenizer, document.context)
        for question in document.questions:
            expected += (
                query_ids(tokenizer, question.asked)
                + query_ids(tokenizer, question.answer)
                + [one.encode.eos]
            )
        assert ids == expected
        assert len(mask) == len(ids) <= 1.1 * max(room, least) + 120
        answers = [data.TASKS[kind - 2] for kind in mask if kind >= train.ANSWER]
        counted = sum(
            len(query_ids(tokenizer, question.answer)) + 1 for question in document.questions
        )
        hint = len(query_ids(tokenizer, document.hint)) if document.hint else 0
        assert len(answers) == counted + hint
        assert {question.task for question in document.questions} == set(answers)


def test_answers_are_right() -> None:
    """By reading the text again: needles and chains."""
    one = maker(3)
    for _ in range(20):
        document = data._needles(one, 1500)
        facts: dict[str, list[str]] = {}
        for key, value in re.findall(
            r"One of the special magic \w+ for (.+?) is: ([\w-]+)\.", document.context
        ):
            facts.setdefault(key, []).append(value)
        for question in document.questions:
            named = re.search(r" for (.+) mentioned in the provided text\?", question.asked)
            assert named is not None
            keys = re.split(r", and |, ", named[1])
            assert question.answer == " " + ", ".join(value for key in keys for value in facts[key])
    for _ in range(10):
        document = data._chains(one, 1500)
        for question in document.questions:
            value = re.search(r"the value (\d+) in", question.asked)
            assert value is not None
            names = re.findall(rf"VAR (\w+) = {value[1]}\n", document.context.split("\n\n", 1)[-1])
            for _hop in range(4):
                names += re.findall(rf"VAR (\w+) = VAR {names[-1]} \n", document.context)
            assert question.answer == " ".join(names)


def test_counted_words_are_the_most_common() -> None:
    one = maker(8)
    for _ in range(10):
        document = data._frequent(one, 700)
        counts = Counter(re.findall(r"\b[a-z]{6}\b", document.context.removeprefix(lists.FWE_HEAD)))
        named = document.questions[0].answer.strip().split(", ")
        most = sorted(counts.values(), reverse=True)[:3]
        assert [counts[name] for name in named] == most, document.context[:300]
        document = data._common(one, 2500)
        listed = Counter(
            re.findall(r"\d+\. ([\w-]+)", document.context.rpartition(lists.CWE_HEAD)[2])
        )
        named = re.findall(r"\d+\. ([\w-]+)", document.questions[0].answer)
        assert len(named) == 10
        assert set(named) == {word for word, _ in listed.most_common(10)}


def test_stories_that_go_on_are_answered_from_what_was_told_so_far() -> None:
    one, going_on, asked = maker(5), 0, 0
    for _ in range(60):
        document = data._stories(one, 1200)
        text = document.context.split("<context>")[-1]
        for place, question in enumerate(document.questions):
            more, _, rest = question.asked.rpartition(ASK)
            going_on += bool(more) and place > 0
            text += more
            assert answers(text, rest.split("\n")[0]) == {question.answer.strip()}, rest
            asked += 1
    assert going_on > 20
    assert asked > 300


def test_searches_have_their_answers_in_the_text() -> None:
    one = maker(6)
    for _ in range(20):
        document = data._searches(one, 800)
        (question,) = document.questions
        if question.task == "math_find":
            numbers = sorted(map(int, re.findall(r"\b\d\d\b", document.context)))
            rank = next(
                (
                    n
                    for n, word in enumerate(("second", "third"), start=1)
                    if word in question.asked
                ),
                0,
            )
            assert int(question.answer) == (
                numbers[rank] if "smallest" in question.asked else numbers[-1 - rank]
            )
        else:
            assert document.context.count(question.answer) == 2
        document = data._pairs(one, 1500)
        pairs = json.loads(document.context[document.context.index("{") :])
        for question in document.questions:
            key = re.search(r'"(.+?)"', question.asked)
            assert key is not None
            assert question.answer == f" {pairs[key[1]]}"


def test_a_model_begins_with_a_sink() -> None:
    """Every query of the first layer finds `<bos>`, at any distance; without, none does."""
    ids = torch.randint(5, 4000, (1, 600), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = bundled_tokenizer().bos_token_id
    shares = {}
    for sink in (0.0, 10.0):
        model = train.built(train.Settings(layers=2, sink=sink), bundled_tokenizer()).eval()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            (first, _) = model(ids, output_attentions=True).attentions
        shares[sink] = first[0, :, 100:, 0].mean(1)  # of each head
    assert shares[0.0].max() < 0.05
    assert shares[10.0].min() > 0.8


def test_words_are_held_apart() -> None:
    found: list[set[str]] = []
    for part in sources.PARTS:
        one = maker(7, part)
        texts = [data._needles(one, 2000).context for _ in range(10)]
        found.append(
            {key for text in texts for key in re.findall(r" for ([a-z]+-[a-z]+) is: ", text)}
        )
    train_keys, eval_keys = found
    assert train_keys
    assert eval_keys
    held = sources.words("eval")
    assert eval_keys <= {
        f"{adjective}-{noun}" for adjective in held.adjectives for noun in held.nouns
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


def run(out: Path, **more: Any) -> None:
    arguments = ["--out", str(out), "--workers", "1", "--device", "cpu", "--every", "0"]
    for name, value in (SETTINGS | more).items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    train.main(arguments)


def test_pieces_make_the_model_that_one_run_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "whole")
    assert "done: " in capsys.readouterr().out
    for _ in range(3):
        run(tmp_path / "pieces", steps=2)
    whole, pieces = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "pieces")
    )
    assert whole.keys() == pieces.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(weight, pieces[name], atol=2e-2, rtol=2e-2)  # (bf16)
    lines = [
        json.loads(line) for line in (tmp_path / "pieces" / "log.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["length"] for line in lines] == [256] * 4 + [512] * 2
    star = StarLLM.from_pretrained(tmp_path / "whole" / "model", block_size=64)
    assert star.generate(
        star.encode("The grass is green. " * 40), "What?", max_new_tokens=3
    ).token_ids
    with pytest.raises(ValueError, match=r"was begun with hidden 32, not 64"):
        run(tmp_path / "whole", hidden=64)


def test_a_model_learns() -> None:
    """A few steps on one batch: its loss falls, and answers are counted by task."""
    settings = train.Settings(**(SETTINGS | dict(lr=1e-2, matrix_lr=1e-2)))
    trainer = train.Trainer(
        settings, bundled_tokenizer(), device=torch.device("cpu"), compile=False
    )
    ids, mask = (part.long() for part in data.batch(2, 256, maker()))
    losses = [float(trainer.train(ids, mask, 1.0).total.detach()) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    counted = trainer.accuracy(ids, mask)
    assert set(counted) <= set(data.TASKS)
    assert sum(number for _, number in counted.values()) > 0


def test_stages() -> None:
    settings = train.Settings(tokens=1024, stages="256:10k,1024:0.5m")
    assert [(stage.length, stage.steps) for stage in train.stages_of(settings)] == [
        (256, 10),
        (1024, 488),
    ]
    factors = [
        train.factor_of(step, 1000, train.Settings(warmup=10, decay_from=0.5))
        for step in (0, 9, 499, 750, 999)
    ]
    assert factors == pytest.approx([0.1, 1, 1, 0.5, 0.002])
    with pytest.raises(ValueError, match="a step of 1,024 tokens holds no whole rows of 300"):
        train.stages_of(train.Settings(tokens=1024, stages="300:1k"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(optimizer="sgd"), "optimizer 'sgd' is unknown; choose muon or adamw"),
        (dict(bos="nowhere"), "bos 'nowhere' is unknown; choose document or row"),
        (dict(weights="qa9:2"), "no task is named qa9"),
        (dict(common=0.0), "sink 10.0 needs a common component of embeddings"),
    ],
)
def test_unknown_settings_are_refused(
    setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **setting)


@pytest.mark.parametrize("length", [256, 512, 1024, 3000])
def test_rows_hold_whole_documents(length: int) -> None:
    """A document that is cut off would lose its questions, and with them what it is for."""
    one = maker(length)
    asked, filled = 0, 0
    for _ in range(40):
        ids, mask = data.row(length, one)
        assert len(ids) == len(mask) == length
        end = max(place for place, token in enumerate(ids) if token) + 1
        assert ids[end - 1] == one.encode.eos
        assert mask[end - 1] >= data.ANSWER
        assert not any(mask[end:])
        filled += end
        asked += sum(token == one.encode.eos for token in ids)
    assert filled > 0.75 * 40 * length
    assert asked >= 40


def test_a_row_may_have_one_beginning() -> None:
    one = maker(2)
    one.bos = "row"
    rows = [data.row(2000, one)[0] for _ in range(8)]
    assert all(row[0] == one.encode.bos and one.encode.bos not in row[1:] for row in rows)
    one.bos = "document"
    assert any(one.encode.bos in data.row(2000, one)[0][1:] for _ in range(8))


def test_training_begins_with_given_weights(tmp_path: Path) -> None:
    run(tmp_path / "first", steps=1)
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
    with pytest.raises(ValueError, match="goes on without --init"):
        run(
            tmp_path / "second",
            init=tmp_path / "first" / "model",
            lr=0,
            matrix_lr=0,
            weight_decay=0,
        )
