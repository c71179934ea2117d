"""Requests of `/v1/messages`, as those of a chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from star_attention.errors import quote
from star_attention.serve.http.body import Body, wrong_type
from star_attention.serve.http.fields import read_messages, refuse_fields, template_arguments
from star_attention.serve.http.problems import bad_request

NAMES = {"stop": "stop_sequences", "response_format": "output_config.format"}
"""What the fields of a chat are called here."""

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}

_REFUSED = {
    "logprobs": "ask /v1/chat/completions",
    "max_completion_tokens": "give max_tokens",
    "n": "ask once for each answer",
    "reasoning_effort": "give output_config.effort",
    "response_format": "give output_config.format",
    "stop": "give stop_sequences",
    "top_logprobs": "ask /v1/chat/completions",
}
"""Fields of a chat that this protocol has not, and what to do instead."""


def read_chat(body: Body, reads: Callable[[str], bool]) -> tuple[list[Any], Body]:
    """Return the messages of a request, and its other fields as those of a chat.

    Args:
        body: the request.
        reads: tells whether the chat template reads an argument.
    """
    refuse_fields(body, _REFUSED)
    system = body.take("system")
    given = read_messages(body)
    if _wants_citations(given):
        body.fields.setdefault("sources", True)
    messages = [own for message in given for own in _messages(message)]
    if system:
        messages.insert(0, {"role": "system", "content": _content(system, {})})
    mark = body.take("cache_control")
    if mark:
        _mark_end(messages, mark)
    fields = body.fields
    if "stop_sequences" in fields:
        fields["stop"] = fields.pop("stop_sequences")
    _take_tools(fields)
    _take_thinking(body, reads)
    return messages, Body(fields, NAMES)


def _wants_citations(messages: list[Any]) -> bool:
    """True if the answer is to cite one of the documents."""
    contents = [each.get("content") for each in messages if isinstance(each, dict)]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    wanted = [block.get("citations") for block in blocks if isinstance(block, dict)]
    return any(isinstance(each, dict) and each.get("enabled") is True for each in wanted)


def _take_thinking(body: Body, reads: Callable[[str], bool]) -> None:
    """Have the template think as the request says, if it reads such arguments."""
    output, thinking = body.object("output_config"), body.object("thinking")
    if output.get("format") is not None:
        body.fields["response_format"] = _format(output["format"])
    wanted: dict[str, Any] = {}
    if thinking:
        wanted["enable_thinking"] = thinking.get("type") != "disabled"
    if output.get("effort") is not None:
        wanted["reasoning_effort"] = output["effort"]
    template_arguments(body, wanted, reads)


def _format(wanted: Any) -> Any:
    """Return a chat's form of the format of an answer."""
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return wanted
    return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}


def _take_tools(fields: dict[str, Any]) -> None:
    """Put tools and their choice into the form of a chat."""
    tools = fields.get("tools")
    if isinstance(tools, list):
        fields["tools"] = [_tool(tool) for tool in tools]
    choice = fields.get("tool_choice")
    if not isinstance(choice, dict):
        return
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    kind = choice.get("type")
    if kind in _CHOICES:
        fields["tool_choice"] = _CHOICES[kind]
    elif kind == "tool":
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}


def _tool(tool: Any) -> Any:
    """Return a client's tool in the form of a chat; those that a server runs stay as they are."""
    if not isinstance(tool, dict) or tool.get("type", "custom") != "custom":
        return tool
    about = {name: tool.get(name) for name in ("name", "description")}
    return {"type": "function", "function": {**about, "parameters": tool.get("input_schema")}}


def _messages(message: Any) -> list[Any]:
    """Return a message as those of a chat: each result of a tool is one of its own."""
    if not isinstance(message, dict):
        return [message]
    own = dict(message)
    blocks = message.get("content")
    results: list[Any] = []
    if isinstance(blocks, list):
        calls = [_call(block) for block in blocks if _is(block, "tool_use")]
        if calls:
            own["tool_calls"] = calls
        results = [_result(block) for block in blocks if _is(block, "tool_result")]
        blocks = [b for b in blocks if not (_is(b, "tool_use") or _is(b, "tool_result"))]
    content = _content(blocks, own)
    if content == [] and results:
        return results
    if content == []:
        # What an assistant only thought, or calls.
        del own["content"]
        return [own]
    return [*results, own | {"content": content}]


def _is(block: Any, kind: str) -> bool:
    return isinstance(block, dict) and block.get("type") == kind


def _call(block: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
    function = {"name": block.get("name"), "arguments": arguments}
    return {"id": block.get("id"), "type": "function", "function": function}


def _result(block: dict[str, Any]) -> dict[str, Any]:
    content = block.get("content")
    mark = {name: block[name] for name in ("cache_control",) if block.get(name)}
    return {
        "role": "tool",
        "tool_call_id": block.get("tool_use_id"),
        "content": _content(content, {}) if content else "",
        **mark,
    }


def _content(content: Any, message: dict[str, Any]) -> Any:
    """Return content with blocks in the form of a chat's parts; thoughts go to the message."""
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "document":
            parts += _document(block)
        elif kind == "thinking":
            message["reasoning_content"] = str(block.get("thinking", ""))
        elif kind == "text":
            parts.append({key: value for key, value in block.items() if key != "citations"})
        elif kind != "redacted_thinking":
            # Text is all that can be read: others are refused by their type.
            parts.append(block)
    return parts


def _document(block: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a document: what is said about it, and its text."""
    about = [block[name] for name in ("title", "context") if isinstance(block.get(name), str)]
    parts = [{"type": "text", "text": f"{text}\n"} for text in about if text]
    title = block.get("title")
    named = {"filename": title} if isinstance(title, str) and title else {}
    file = {"type": "file", "file": {**named, **_file(block.get("source"))}}
    if block.get("cache_control"):
        file["cache_control"] = block["cache_control"]
    return [*parts, file]


def _file(source: Any) -> dict[str, Any]:
    """Return the file of a document's source."""
    if not isinstance(source, dict):
        raise wrong_type("source", source, "an object with the type text, base64, content or file")
    kind = source.get("type")
    if kind == "text" and isinstance(source.get("data"), str):
        return {"text": source["data"]}
    if kind == "base64" and isinstance(source.get("data"), str):
        return {"file_data": source["data"]}
    if kind == "file" and isinstance(source.get("file_id"), str):
        return {"file_id": source["file_id"]}
    if kind == "content":
        blocks = source.get("content")
        texts = [blocks] if isinstance(blocks, str) else _texts(blocks)
        return {"text": "".join(texts)}
    raise bad_request(
        f"a document has a source of type {quote(kind)}; give its text in a source of type text"
        " (no URL is opened)",
        "messages",
        "unsupported_value",
    )


def _texts(blocks: Any) -> list[str]:
    texts = []
    for block in blocks if isinstance(blocks, list) else [blocks]:
        text = block.get("text") if isinstance(block, dict) else None
        if not isinstance(text, str):
            raise bad_request(
                "a document's content has blocks that are not text; give blocks of type text",
                "messages",
                "unsupported_value",
            )
        texts.append(text)
    return texts


def _mark_end(messages: list[Any], mark: Any) -> None:
    """Put a mark of the whole request where its last part begins."""
    last = messages[-1]
    content = last.get("content") if isinstance(last, dict) else None
    if isinstance(content, list) and len(content) > 1 and isinstance(content[-2], dict):
        content[-2] = {**content[-2], "cache_control": mark}
    elif len(messages) > 1 and isinstance(messages[-2], dict):
        messages[-2] = {**messages[-2], "cache_control": mark}
