"""What programs that write code send, beside their messages: Codex and Claude Code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers import Server, events_of
from tests.unit.test_serve_tools import WEATHER, checked, server_saying

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
MARK = {"cache_control": {"type": "ephemeral"}}
CLOSE = {
    "name": "close",
    "parameters": {"type": "object", "properties": {"id": {"type": "string"}}},
}
TEAM = {"type": "namespace", "name": "team", "description": "Others.", "tools": []}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", **WEATHER},
    {**TEAM, "tools": [{"type": "function", **CLOSE}]},
    {"type": "web_search", "external_web_access": False},
]
CALL = {"name": "team__close", "arguments": {"id": "7"}}


@pytest.fixture(scope="module")
def caller() -> Iterator[Server]:
    """A server whose answers call a tool of a namespace."""
    with server_saying(f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>") as server:
        yield server


def test_tools_of_a_namespace(caller: Server) -> None:
    """Forbids a 400 for Codex's tools, and a call of one that Codex does not find."""
    body = {"input": "Close it.", "tools": TOOLS, "max_output_tokens": 300}
    before = caller.metric("ignored_fields_total", field="web_search")
    response = checked(caller.post(RESPONSES, body))
    assert response["tools"] == TOOLS
    (call,) = response["output"]
    assert (call["type"], call["namespace"], call["name"]) == ("function_call", "team", "close")
    assert json.loads(call["arguments"]) == {"id": "7"}
    *_, ended = events_of(caller.post(RESPONSES, body | {"stream": True}))
    (streamed,) = ended["response"]["output"]
    assert (streamed["namespace"], streamed["name"]) == ("team", "close")
    # Nobody searches, which a model need not.
    assert caller.metric("ignored_fields_total", field="web_search") == before + 2


def test_a_call_goes_back_under_the_name_that_the_model_wrote(caller: Server) -> None:
    call = {"type": "function_call", "call_id": "c1", "arguments": '{"id": "7"}'}
    output = {"type": "function_call_output", "call_id": "c1", "output": "Closed."}
    question = {"role": "user", "content": "Close it."}

    def tokens(**names: str) -> int:
        body = {"input": [question, call | names, output], "tools": TOOLS}
        counted = checked(caller.post(f"{RESPONSES}/input_tokens", body))
        return int(counted["input_tokens"])

    joined = tokens(name="team__close")
    assert tokens(namespace="team", name="close") == joined
    assert tokens(name="close") < joined


@pytest.mark.parametrize("inner", [["close"], [{"type": "function"}], "close"])
def test_a_namespace_without_names_is_refused(caller: Server, inner: Any) -> None:
    response = caller.post(RESPONSES, {"input": "Close it.", "tools": [{**TEAM, "tools": inner}]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"


def test_a_search_that_is_asked_for_is_refused(caller: Server) -> None:
    body = {"input": "Look.", "tools": TOOLS, "tool_choice": {"type": "web_search"}}
    response = caller.post(RESPONSES, body)
    assert response.status_code == 400
    assert "or one of the tools [" in response.json()["error"]["message"]


def test_each_turn_has_the_context_of_the_first(caller: Server) -> None:
    """Forbids that a second turn is encoded anew, or that tools are read with every question.

    Claude Code marks its instructions and its last message, and adds instructions behind that. The
    template of this model writes the tools behind the first instructions.
    """
    system = [{"type": "text", "text": "You write programs.", **MARK}]
    tools = [{"name": WEATHER["name"], "input_schema": WEATHER["parameters"]}]

    def ask(*messages: dict[str, Any]) -> tuple[str, int]:
        body = {"system": system, "tools": tools, "messages": list(messages), "max_tokens": 300}
        response = caller.post(MESSAGES, body)
        assert checked(response)
        assert response.headers["x-star-rule"] == "mark"
        return response.headers["x-star-cache"], int(response.headers["x-star-context-tokens"])

    def user(text: str, **mark: Any) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "text", "text": text, **mark}]}

    added = {"role": "system", "content": "Agents: none."}
    use = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "Rain.", **MARK}
    first, tokens = ask(user("Go on.", **MARK), added)
    second = ask(
        user("Go on."),
        added,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    )
    assert (first, second) == ("miss", ("hit", tokens))
    counted = {"messages": [user("Go on.")], "system": system}
    without_tools = caller.post(f"{MESSAGES}/count_tokens", counted).json()["input_tokens"]
    assert tokens > 2 * without_tools
