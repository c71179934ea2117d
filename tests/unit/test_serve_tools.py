"""Tools over HTTP: what the chat template gets, and the calls in answers of all protocols."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from star_attention import StarLLM
from star_attention.serve.service import Service
from tests.conversations import TEMPLATES
from tests.servers import NAME, Server, events_of, running, saying
from tests.talkers import CHATML_TOKENS, byte_level, talker

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
ARGUMENTS = {"city": "Paris", "days": 2}
TEXT = json.dumps(ARGUMENTS)
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {TEXT}}}\n</tool_call>'
CALLS = {
    "qwen3": CALL,
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
    "glm45": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
}
"""One call as several families write it."""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
WEATHER = {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
FUNCTIONS = (WEATHER, CLOCK)
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
ASK: list[dict[str, Any]] = [{"role": "user", "content": "How is the weather in Paris?"}]


def engine(family: str = "qwen3") -> StarLLM:
    plain = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    return talker(byte_level(CHATML_TOKENS, plain=plain, chat=TEMPLATES[family]))


def server_saying(said: str, family: str = "qwen3", **settings: Any) -> Any:
    # Not every family ends its turns with the first of these.
    said = f"{said}<|im_end|><|endoftext|>"
    return running(engine(family), before=saying(said), max_context_bytes=2**24, **settings)


@pytest.fixture(scope="module", params=CALLS)
def caller(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server whose answers think, say something, and call a tool, as a family writes it."""
    said = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALLS[request.param]}"
    with server_saying(said, request.param) as server:
        yield server


def body(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": ASK, "tools": TOOLS, "max_tokens": 300, **fields}


def checked(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code in (200, 201), response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_an_answer_calls_a_tool(caller: Server) -> None:
    with caller.client() as client:
        answer = client.chat.completions.create(**body())
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.reasoning_content == "Hm."  # type: ignore[attr-defined]
    (call,) = choice.message.tool_calls or ()
    assert (call.type, call.function.name) == ("function", "weather")  # type: ignore[union-attr]
    assert json.loads(call.function.arguments) == ARGUMENTS  # type: ignore[union-attr]
    # Templates of Mistral's take no other ids.
    assert len(call.id) == 9
    assert call.id.isalnum()


def test_a_stream_calls_a_tool(caller: Server) -> None:
    """Forbids that a stream shows the call as text; OpenAI's client puts it together."""
    with caller.client() as client, client.chat.completions.stream(**body()) as stream:
        deltas = [
            event.chunk.choices[0].delta.content or ""
            for event in stream
            if event.type == "chunk" and event.chunk.choices
        ]
        (choice,) = stream.get_final_completion().choices
    assert "".join(deltas) == "Let me see."
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)


def test_what_the_template_gets() -> None:
    """The prompt is that of `apply_chat_template` with the tools, calls and results included."""
    asked: list[list[int]] = []

    def before(service: Service) -> None:
        add = service.engine.batch.add

        def adding(context: Any, query: Any, **options: Any) -> Any:
            asked.append([*context.token_ids, *query])
            return add(context, query, **options)

        service.engine.batch.add = adding  # type: ignore[method-assign]

    function = {"name": "weather", "arguments": TEXT}
    call = {"id": "abc123def", "type": "function", "function": function}
    history = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc123def", "content": "Rain."},
    ]
    star = engine()
    with running(star, before=before, max_context_bytes=2**24) as server:
        for messages in (ASK, history):
            checked(server.post(CHAT, body(messages=messages, max_tokens=2)))
        checked(server.post(CHAT, body(tool_choice="none", max_tokens=2)))
        checked(server.post(CHAT, {"messages": ASK, "max_tokens": 2}))
        count = checked(server.post(f"{CHAT}/input_tokens", body()))
        responses = {
            "input": [
                {"role": "system", "content": "Be brief."},
                *ASK,
                {
                    "type": "function_call",
                    "call_id": "abc123def",
                    "name": "weather",
                    "arguments": TEXT,
                },
                {"type": "function_call_output", "call_id": "abc123def", "output": "Rain."},
            ],
            "tools": [{"type": "function", "strict": True, **each} for each in (WEATHER, CLOCK)],
            "max_output_tokens": 2,
        }
        checked(server.post("/v1/responses", responses))
        use = {"type": "tool_use", "id": "abc123def", "name": "weather", "input": ARGUMENTS}
        result = {"type": "tool_result", "tool_use_id": "abc123def", "content": "Rain."}
        anthropic = {
            "system": "Be brief.",
            "messages": [
                *ASK,
                {"role": "assistant", "content": [use]},
                {"role": "user", "content": [result]},
            ],
            "tools": anthropic_tools(),
            "max_tokens": 2,
        }
        checked(server.post(MESSAGES, anthropic))
    with_tools, with_history, *without = [
        star.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False
        )
        for messages, tools in ((ASK, TOOLS), (history, TOOLS), (ASK, None), (ASK, None))
    ]
    assert asked == [with_tools, with_history, *without, with_history, with_history]
    assert count["input_tokens"] == len(with_tools)


def anthropic_tools() -> list[dict[str, Any]]:
    return [
        {
            "name": function["name"],
            **({"description": d} if (d := function.get("description")) else {}),
            "input_schema": function["parameters"],
        }
        for function in (WEATHER, CLOCK)
    ]


def test_a_response_calls_a_tool_and_goes_on(caller: Server) -> None:
    tools: Any = [{"type": "function", **WEATHER}]
    options: dict[str, Any] = dict(model=NAME, tools=tools, max_output_tokens=300)
    with caller.client() as client:
        first = client.responses.create(input=ASK, **options)  # type: ignore[arg-type]
        thought, said, call = first.output
        assert (thought.type, said.type, call.type) == ("reasoning", "message", "function_call")
        assert first.output_text == "Let me see."
        assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)
        assert first.tools[0].name == "weather"  # type: ignore[union-attr]
        result: Any = {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": "Rain.",
        }
        again = client.responses.create(input=[result], previous_response_id=first.id, **options)
        whole: Any = [*ASK, *(item.model_dump() for item in first.output), result]
        other = client.responses.create(input=whole, **options)
        assert again.usage.input_tokens == other.usage.input_tokens  # type: ignore[union-attr]
        with client.responses.stream(input=ASK, **options) as stream:  # type: ignore[arg-type]
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
    assert final.output[2].type == "function_call"
    assert json.loads(final.output[2].arguments) == ARGUMENTS
    assert kinds[-5:] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_a_message_uses_a_tool(caller: Server) -> None:
    asked = {"messages": ASK, "tools": anthropic_tools(), "max_tokens": 300}
    answer = checked(caller.post(MESSAGES, asked))
    assert answer["stop_reason"] == "tool_use"
    thought, said, use = answer["content"]
    assert (thought["thinking"], said["text"]) == ("Hm.", "Let me see.")
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "weather", ARGUMENTS)
    events = events_of(caller.post(MESSAGES, asked | {"stream": True}))
    of_use = [event for event in events if event.get("index") == 2]
    start, delta, stop = of_use
    assert start["content_block"] | {"id": ""} == use | {"id": "", "input": {}}
    assert json.loads(delta["delta"]["partial_json"]) == ARGUMENTS
    assert stop["type"] == "content_block_stop"
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("said", "content", "calls", "reason"),
    [
        ("A plain answer.", "A plain answer.", [], "stop"),
        (CALL, None, ["weather"], "tool_calls"),
        (f'{CALL}\n<tool_call>\n{{"name": "clock"}}', None, ["weather", "clock"], "tool_calls"),
        # What is no call is not lost.
        ("<tool_call>\nnothing", "<tool_call>\nnothing", [], "stop"),
        ("a <tool", "a <tool", [], "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_with_and_without_calls(
    said: str, content: str | None, calls: list[str], reason: str, stream: bool
) -> None:
    with server_saying(said) as server:
        if stream:
            chunks = [
                json.loads(line[6:])["choices"][0]
                for line in server.post(CHAT, body(stream=True)).text.split("\n\n")
                if line.startswith("data: {")
            ]
            deltas = [chunk["delta"] for chunk in chunks]
            text = "".join(delta.get("content") or "" for delta in deltas)
            found = [call for delta in deltas for call in delta.get("tool_calls", ())]
            assert [call["index"] for call in found] == list(range(len(calls)))
            assert chunks[-1]["finish_reason"] == reason
        else:
            choice = checked(server.post(CHAT, body()))["choices"][0]
            assert choice["message"]["content"] == content
            text, found = content or "", choice["message"].get("tool_calls", [])
            assert choice["finish_reason"] == reason
        assert text == (content or "")
        assert [call["function"]["name"] for call in found] == calls
        if calls[1:]:
            single = checked(server.post(CHAT, body(parallel_tool_calls=False)))
            (call,) = single["choices"][0]["message"]["tool_calls"]
            assert call["function"]["name"] == calls[0]


@pytest.mark.parametrize("family", CALLS)
def test_a_call_that_is_cut_is_text(family: str) -> None:
    with server_saying(CALLS[family], family) as server:
        choice = checked(server.post(CHAT, body(max_tokens=20)))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("<tool_call>")
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
    ],
)
@pytest.mark.parametrize("family", CALLS)
def test_a_call_that_has_to_be_made(choice: Any, names: set[str], family: str) -> None:
    """The answer follows a schema of calls; a random model says whatever that allows."""
    pytest.importorskip("xgrammar")
    short: dict[str, Any] = {"type": "object", "required": ["x", "mode", "rows"]}
    short["properties"] = {
        "x": {"enum": [1]},
        "mode": {"type": "string", "enum": ["a </b>"]},
        "rows": {"type": "array", "items": {"$ref": "#/$defs/row"}, "minItems": 1, "maxItems": 1},
    }
    short |= {"additionalProperties": False, "$defs": {"row": {"const": True}}}
    made = {"x": 1, "mode": "a </b>", "rows": [True]}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": short}}
        for name in ("weather", "clock")
    ]
    with running(engine(family), max_context_bytes=2**24) as server:
        asked = body(tools=tools, tool_choice=choice, temperature=0)
        answer = checked(server.post(CHAT, asked))["choices"][0]
        (call,) = answer["message"]["tool_calls"]
        assert call["function"]["name"] in names
        assert json.loads(call["function"]["arguments"]) == made
        assert (answer["message"]["content"], answer["finish_reason"]) == (None, "tool_calls")
        named = choice if isinstance(choice, str) else choice["function"]["name"]
        wanted = {"type": "any"} if named == "required" else {"type": "tool", "name": named}
        asked = {
            "messages": ASK,
            "max_tokens": 300,
            "temperature": 0,
            "tools": [{"name": name, "input_schema": short} for name in ("weather", "clock")],
            "tool_choice": wanted,
        }
        (use,) = checked(server.post(MESSAGES, asked))["content"]
        assert (use["type"], use["name"]) == ("tool_use", call["function"]["name"])


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": "all"}, "tools", "expected a list of up to 128 tools"),
        ({"tools": [{"type": "web_search"}]}, "tools", "of type 'web_search' is not supported"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "whose function has no name"),
        ({"tools": [WEATHER]}, "tools", "put its name and parameters into an object `function`"),
        ({"tool_choice": "always"}, "tool_choice", "got 'always'"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "is not supported"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format",
            "of an answer that may call tools is not supported",
        ),
        ({"functions": [WEATHER]}, "functions", "is not supported; give tools"),
    ],
)
def test_tools_that_cannot_be_used(
    caller: Server, fields: dict[str, Any], param: str, message: str
) -> None:
    response = caller.post(CHAT, body(**fields))
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"].startswith(param)


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/responses"])
def test_a_model_without_tools_says_so(path: str) -> None:
    """Forbids an answer that has not seen the tools of its request."""
    with running() as server:
        asked = {
            CHAT: body(),
            MESSAGES: {"messages": ASK, "max_tokens": 4, "tools": anthropic_tools()},
            "/v1/responses": {"input": "Hi", "tools": [{"type": "function", **WEATHER}]},
        }[path]
        response = server.post(path, asked)
    assert response.status_code == 400
    assert "tools ['weather'" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "tools"


def test_tools_of_a_kept_context() -> None:
    """A context keeps the tools that it was made with; others would be another context."""
    with server_saying(CALL) as server:
        made = {"messages": [{"role": "system", "content": "Be brief."}, *ASK]}
        kwargs = {"chat_template_kwargs": {"tools": TOOLS}}
        # Fields without a value are those of no function, as in a request.
        nulls = [{"type": "function", "function": {**each, "strict": None}} for each in FUNCTIONS]
        by_kwargs, context = (
            checked(server.post("/v1/contexts?wait=true", made | more))
            for more in (kwargs, {"tools": nulls})
        )
        assert by_kwargs["tokens"] == context["tokens"]
        twice = server.post("/v1/contexts", made | kwargs | {"tools": TOOLS})
        assert (twice.status_code, twice.json()["error"]["param"]) == (400, "tools")
        unread = server.post("/v1/contexts", {"token_ids": [1, 2, 3], "tools": TOOLS})
        assert "no effect on token_ids" in unread.json()["error"]["message"]
        asked = body(messages=[{"role": "user", "content": " And then?"}], context=context["id"])
        answer = checked(server.post(CHAT, asked))["choices"][0]
        assert answer["finish_reason"] == "tool_calls"
        refusal = server.post(CHAT, asked | {"tools": TOOLS[:1]})
        assert refusal.status_code == 400
