"""Calls of tools, by clients that put them together from streams and give them back."""

from __future__ import annotations

import json
import os
from typing import Any

# Or it looks for a newer list of models in the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import anthropic
import litellm
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from trial import KEY, MODEL, URL, run

QUESTION = "How is the weather in Paris?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
FUNCTION = {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]


def of_anthropic() -> Any:
    client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
    tool = {"name": "weather", "input_schema": SCHEMA}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 300, "tools": [tool]}
    with client.messages.stream(messages=messages, **options) as stream:
        first = stream.get_final_message()
    use = first.content[-1]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Rain."}
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    again = client.messages.create(messages=messages, **options)
    return [use.input, again.content[-1].input]


def of_langchain(**options: Any) -> Any:
    chat = ChatOpenAI(
        model=MODEL, base_url=f"{URL}/v1", api_key=KEY, max_retries=0, **options
    ).bind_tools(TOOLS)
    parts = list(chat.stream(QUESTION))
    first = parts[0]
    for part in parts[1:]:
        first += part
    (call,) = first.tool_calls
    question, result = HumanMessage(QUESTION), ToolMessage("Rain.", tool_call_id=call["id"])
    again = chat.invoke([question, first, result])
    return [call["args"], again.tool_calls[0]["args"]]


def of_litellm() -> Any:
    answer = litellm.completion(
        model=f"hosted_vllm/{MODEL}",
        api_base=f"{URL}/v1",
        api_key=KEY,
        messages=[{"role": "user", "content": QUESTION}],
        tools=TOOLS,
    )
    (call,) = answer.choices[0].message.tool_calls
    return [json.loads(call.function.arguments)]


run(
    anthropic=of_anthropic,
    langchain=of_langchain,
    responses=lambda: of_langchain(use_responses_api=True),
    litellm=of_litellm,
)
