"""Reasoning models in evaluations: arguments of the template, and reasoning that is not scored."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.evals.runs.predictions import Prediction
from star_attention.evals.runs.run_folder import MARKDOWN, read_run
from star_attention.evals.runs.settings import RunSettings
from tests.engines import bundled_tokenizer
from tests.evals_cli import error, ok, predictions, save_model
from tests.evals_runs import VARIANTS, lines, run, samples
from tests.jsonl import write_lines
from tests.talkers import CHATML, CHATML_TOKENS, byte_level, say, talker

TAGS = ("<think>", "</think>")
TEMPLATE = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)


@pytest.fixture
def thinker(monkeypatch: pytest.MonkeyPatch) -> StarLLM:
    """An engine that thinks of 7 before it answers 0."""
    star = talker(byte_level(CHATML_TOKENS, plain=TAGS, chat=TEMPLATE))
    generate: Any = StarLLM.generate
    spoken = "<think>it is 7</think>\n\n0<|im_end|>"

    def generate_spoken(self: StarLLM, *arguments: Any, **options: Any) -> Any:
        return generate(self, *arguments, **{**options, **say(star.tokenizer, spoken)})

    monkeypatch.setattr(StarLLM, "generate", generate_spoken)
    return star


def test_reasoning_is_recorded_and_not_scored(thinker: StarLLM, tmp_path: Path) -> None:
    """Forbids a right score for an answer that only the reasoning names."""
    several = [replace(sample, answer_prefix="") for sample in samples(8)]
    run(thinker, [several[0], several[7]], VARIANTS[:1], tmp_path, chat=True)
    zero, seven = lines(tmp_path)
    assert (zero["prediction"], zero["reasoning"], zero["score"]) == ("0", "it is 7", 1.0)
    assert (seven["answers"], seven["prediction"], seven["score"]) == (["7"], "0", 0.0)


def test_predictions_of_earlier_versions_are_read(thinker: StarLLM, tmp_path: Path) -> None:
    run(thinker, samples(1), VARIANTS[:1], tmp_path)
    (line,) = lines(tmp_path)
    del line["reasoning"]
    assert Prediction.from_json(json.dumps(line).encode()).reasoning is None


def test_arguments_reach_the_template(thinker: StarLLM, tmp_path: Path) -> None:
    several, off = samples(2), {"enable_thinking": False}
    for name, kwargs in (("on", {}), ("off", off)):
        run(thinker, several, VARIANTS, tmp_path / name, chat=True, chat_template_kwargs=kwargs)
    added = len(thinker.tokenizer("<think>\n\n</think>\n\n").input_ids)
    for thinking, silent in zip(lines(tmp_path / "on"), lines(tmp_path / "off"), strict=True):
        assert silent["query_tokens"] == thinking["query_tokens"] + added
        assert silent["context_tokens"] == thinking["context_tokens"]
    assert read_run(tmp_path / "off")["settings"]["chat_template_kwargs"] == off
    assert "chat_template_kwargs" not in read_run(tmp_path / "on")["settings"]
    with pytest.raises(InvalidInputError, match="another chat_template_kwargs"):
        run(thinker, several, VARIANTS, tmp_path / "off", chat=True)
    with pytest.raises(InvalidInputError, match="no effect without chat"):
        RunSettings(chat_template_kwargs=off)


def test_arguments_of_the_command_line(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    tokenizer = copy.deepcopy(bundled_tokenizer())
    tokenizer.chat_template += "{% if enable_thinking is defined %}<|a|>{% endif %}"
    tokenizer.save_pretrained(model)
    row = {"context": "It is 7.\n" * 30, "query": "What is it?", "answers": ["7"]}
    data = write_lines(tmp_path / "data.jsonl", [row])
    arguments = ("run", data, "--out", tmp_path / "out", "--max-new-tokens", "2", "--variants")
    kwargs = ("--chat-template-kwargs", '{"enable_thinking": false}')
    assert "no effect without chat" in error(model, *arguments, "dense", *kwargs)
    assert "is not JSON" in error(model, *arguments, "dense", "--chat", kwargs[0], "{thinking")
    assert not (tmp_path / "out").exists()
    misspelt = (kwargs[0], '{"enabel_thinking": false}')
    assert "does not read" in error(model, *arguments, "dense", "--chat", *misspelt)
    assert not (tmp_path / "out").exists()
    ok(model, *arguments, "dense", "--chat", *kwargs)
    assert len(predictions(tmp_path / "out")) == 1
    assert "enable_thinking" in (tmp_path / "out" / MARKDOWN).read_text()
