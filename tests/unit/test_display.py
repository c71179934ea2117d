"""How results show themselves: at Python's prompt, and in notebooks."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from star_attention import BlockPlan, EncodedContext, Generation, StarLLM
from star_attention.evals.reports.report import Report
from star_attention.generation.result import Timings
from tests.command_line import MODEL, ok
from tests.engines import bundled_tokenizer, engine, ids, text_model

SAMPLES = Path(__file__).parents[2] / "examples" / "samples.jsonl"
UNSAFE = "a < b & <script>alert(1)</script>\n  two  spaces"


class Seen(HTMLParser):
    """Collects the text and the tags of a page, and counts tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", set[str](), 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.open += tag != "meta"

    def handle_endtag(self, tag: str) -> None:
        self.open -= 1

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(thing: Any) -> Seen:
    page = Seen(thing._repr_html_())
    assert page.open == 0
    assert "script" not in page.tags
    return page


def reply(**fields: Any) -> Generation:
    values: dict[str, Any] = dict(
        text="It is 42.",
        token_ids=[7, 8, 9],
        finish_reason="stop",
        query_tokens=5,
        timings=Timings(encode_s=1.0, ttft_s=0.25, tokens_per_s=40.0),
    )
    return Generation(**values | fields)


def test_an_answer_at_the_prompt() -> None:
    """Forbids a page of token ids in place of the text."""
    assert repr(reply()) == "Generation('It is 42.', 3 tokens, stop)"
    assert repr(reply(token_ids=[1])) == "Generation('It is 42.', 1 token, stop)"
    long = repr(reply(text="x" * 5000))
    assert len(long) < 150
    assert "(5,000 characters)" in long
    assert str(reply()) == "It is 42."


def test_an_answer_in_a_notebook() -> None:
    page = seen(reply(text=UNSAFE))
    assert page.text == UNSAFE + "3 tokens, stop, first token 0.25 s, 40 tok/s"
    assert "tok/s" not in seen(reply(timings=Timings(encode_s=1, ttft_s=1, tokens_per_s=None))).text
    thoughts = seen(reply(reasoning="Six times seven."))
    assert thoughts.text.startswith("reasoningSix times seven.It is 42.")
    assert "details" in thoughts.tags


def test_a_context_in_a_notebook() -> None:
    star = StarLLM(text_model(), bundled_tokenizer(), block_size=16)
    context = star.encode("The secret number is 4910508. " * 8)
    page = seen(context)
    assert f"{len(context):,}" in page.text
    assert str(context.plan) in page.text
    assert "4910508" not in page.text
    assert "secret" not in repr(context)


@pytest.mark.parametrize("settings", [{"method": "streaming_llm"}, {"kv_dtype": "fp8"}])
def test_other_contexts_in_a_notebook(settings: dict[str, Any]) -> None:
    star = engine("llama", block_size=20, **settings)
    context: EncodedContext = star.encode(ids(50))
    assert settings.get("method", "fp8") in seen(context).text


def test_a_plan_in_a_notebook() -> None:
    plan = BlockPlan.resolve(5000, 1024, None, 2)
    assert seen(plan).text == str(plan)


def test_a_report_in_a_notebook(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ok(
        *("eval", "run", SAMPLES, *MODEL, "--chat", "--variants", "dense"),
        *("--max-new-tokens", "1", "--out", folder),
    )
    page = seen(Report.read(folder))
    assert {"h1", "table"} <= page.tags
    assert "style" not in page.tags, "a page's style would change the notebook"
    assert "facts" in page.text
