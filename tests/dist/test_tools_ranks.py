"""Calls of tools on several ranks are those of one, on every rank."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from star_attention.distributed import SoloComm
from tests.conversations import TEMPLATES
from tests.dist.pool import Pool
from tests.talkers import byte_level, talker

CALL = "So.\n<tool_call>\n<function=clock>\n<parameter=zone>\nParis\n</parameter>\n</function>\n"
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]


def calls_on(comm: Any) -> list[Any]:
    """Return what each answer calls and says; the answers are made to begin with a call."""
    star = talker(byte_level(chat=TEMPLATES["qwen3_coder"]), comm=comm)
    document = [{"role": "user", "content": "the cat sat on the mat. " * 4}]
    context = star.encode(document, tools=TOOLS)
    asked: dict[str, Any] = dict(answer_prefix=CALL, max_new_tokens=1)
    with star.stream(context, "What time is it?", **asked) as stream:
        for _ in stream:
            pass
    replies = star.generate(context, ["Now?", "And now?"], tools=TOOLS, **asked)
    if find_spec("xgrammar"):
        asked = dict(tool_choice="clock", max_new_tokens=80, do_sample=False)
        replies.append(star.generate(context, "Now?", **asked))
    return [(reply.tool_calls, reply.content) for reply in (stream.result, *replies)]


def test_calls_reach_all_ranks(pool: Pool) -> None:
    right = calls_on(SoloComm())
    for number, (calls, content) in enumerate(right):
        (call,) = calls
        arguments = {"zone": "Paris"} if number < 3 else {}
        assert (call.name, call.arguments, call.id) == ("clock", arguments, "call00000")
        assert content == ""
    assert pool.run(calls_on, 2) == [right] * 2
