"""Tools of `/v1/contexts`: read from bodies and forms, or refused where nothing would see them."""

from __future__ import annotations

import json
from typing import Any

import httpx

from star_attention import StarLLM
from tests.conversations import TEMPLATES
from tests.servers import running
from tests.talkers import CHATML_TOKENS, byte_level, talker

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": CITY}}
    for name in ("weather", "clock")
]


def engine() -> StarLLM:
    plain = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    return talker(byte_level(CHATML_TOKENS, plain=plain, chat=TEMPLATES["qwen3"]))


def checked(response: httpx.Response) -> dict[str, Any]:
    assert response.is_success, response.text
    answer: dict[str, Any] = response.json()
    return answer


def upload(url: str, text: str, fields: dict[str, str]) -> httpx.Response:
    file = {"file": ("a.txt", text.encode())}
    return httpx.post(url, files=file, data=fields, timeout=60)


def test_tools_of_a_form() -> None:
    """A file with tools is the context of its text with them."""
    with running(engine()) as server:
        path, text = "/v1/contexts?wait=true", "the cat sat on the mat. " * 30
        kwargs = {"enable_thinking": False}
        given = {"tools": TOOLS, "chat_template_kwargs": kwargs}
        (plain, *told) = [
            checked(response)
            for response in (
                server.post(path, {"text": text}),
                server.post(path, {"text": text, **given}),
                upload(
                    server.url + path,
                    text,
                    {name: json.dumps(value) for name, value in given.items()},
                ),
            )
        ]
        assert told[0]["tokens"] == told[1]["tokens"] > plain["tokens"] + 100
        assert told[0]["id"] == told[1]["id"] != plain["id"]
        for field, message in (
            ({"tools": "weather"}, "tools cannot be read as JSON: "),
            ({"tools": "{}"}, "tools {}: expected a list of up to 128 tools"),
            ({"tools": "[" * 120 + "]" * 120}, "more than 100 lists or objects in each other"),
            ({"chat_template_kwargs": "[]"}, "chat_template_kwargs []: expected an object"),
            ({"text": "a"}, "the body has text, file; give exactly one of"),
        ):
            refusal = upload(server.url + path, text, field)
            assert refusal.status_code == 400
            assert message in refusal.json()["error"]["message"]


def test_what_a_context_does_not_take() -> None:
    """Forbids a context that was to have tools and has none."""
    with running(engine()) as server:
        for choice in ({"tool_choice": "none"}, {"parallel_tool_calls": False}):
            refusal = server.post("/v1/contexts", {"text": "a b c", "tools": TOOLS, **choice})
            error = refusal.json()["error"]
            assert (refusal.status_code, error["param"]) == (400, *choice)
            assert "requests on the context say what they call" in error["message"]
        context = checked(server.post("/v1/contexts?wait=true", {"text": "a b c " * 99}))
        kept = {"tools": TOOLS, "chat_template_kwargs": {"tools": TOOLS}, "tool_choice": "auto"}
        for name, value in kept.items():
            more = {"text": "More.", name: value}
            refusal = server.post(f"/v1/contexts/{context['id']}/extend", more)
            assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, name)


def test_a_model_without_a_template_refuses_its_arguments() -> None:
    with running(talker(byte_level())) as server:
        files = {"file": ("a.txt", b"the cat sat on the mat")}
        id = checked(httpx.post(f"{server.url}/v1/files", files=files))["id"]
        for source in ({"text": "the cat sat"}, {"file_id": id}, {"token_ids": [1, 2, 3]}):
            body = {**source, "chat_template_kwargs": {"enable_thinking": False}}
            refusal = server.post("/v1/contexts", body)
            assert refusal.status_code == 400
            message = f"['enable_thinking'] have no effect on {next(iter(source))}: "
            assert message in refusal.json()["error"]["message"]
            assert checked(server.post("/v1/contexts?wait=true", source))["status"] == "ready"
