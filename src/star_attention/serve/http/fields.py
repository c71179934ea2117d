"""The fields of a request for answers: which are read, which are ignored, which are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from star_attention.errors import quote
from star_attention.serve.http.body import Body, missing, wrong_type
from star_attention.serve.http.problems import bad_request, not_supported
from star_attention.serve.http.tools import Tools, read_tools
from star_attention.serve.settings import ServeSettings

MOST_SEED = 2**63 - 1
MOST_LOGPROBS = 20
MOST_STOP_CHARACTERS = 500
MOST_SOURCES = 20
MOST_SCHEMA_CHARACTERS = 2**16
MOST_TTL_S = 10**9
"""Seconds, about 32 years: the end of a longer time is no date any more."""

IGNORED = frozenset(
    (
        "audio",
        "client_metadata",
        "context_management",
        "inference_geo",
        "max_tool_calls",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "priority",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "user",
        "web_search",
    )
)
"""Fields that change no answer. Others that nobody knows are ignored, too, and counted as other."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "container": (),
    "logit_bias": ({},),
    "mcp_servers": ([],),
    "modalities": (["text"], []),
    "presence_penalty": (0,),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that would change the answer and are not served, with the values that ask for nothing."""

_REMEDIES = {
    "best_of": "ask for n answers",
    "chat_template": "templates of requests are not run; set the model's own",
    "function_call": "give tool_choice",
    "functions": "give tools",
    "echo": "put the prompt before the answer yourself",
    "guided_json": "use response_format",
    "truncate_prompt_tokens": "prompts are never cut; shorten it",
}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a request asks for, besides its prompt.

    Attributes:
        model: the model's name; None for the one that is served.
        options: keywords of `StarLLM.generate`, without a limit.
        max_tokens: most tokens of an answer; None for the server's default.
        limited_by: the field that says so.
        answers: number of answers to each prompt.
        stream: True for server-sent events.
        include_usage: True for a last chunk with the usage.
        include_progress: True for chunks that say how far the context is.
        sources: True or a number for the passages of the context that the answer came from.
        context: id of the context that the prompt is about.
        salt: separates contexts of one key.
        template_kwargs: what the chat template reads beside messages.
        explicit: True to keep only what is marked.
        tools: the tools that the answer may call; None for none.
        ignored: names of fields that were ignored.
        names: what the client calls fields that have another name in a chat.
    """

    model: str | None
    options: dict[str, Any]
    max_tokens: int | None
    limited_by: str
    answers: int
    stream: bool
    include_usage: bool
    include_progress: bool
    sources: bool | int
    context: str | None
    salt: str
    template_kwargs: dict[str, Any]
    explicit: bool
    tools: Tools | None
    ignored: tuple[str, ...]
    names: dict[str, str] = field(default_factory=dict)

    def name(self, name: str) -> str:
        """Return what the client calls a field."""
        return self.names.get(name, name)


def read_ask(body: Body, settings: ServeSettings, *, chat: bool) -> Ask:
    """Take all fields but the prompt.

    Args:
        body: the request's.
        settings: the server's limits.
        chat: True for a chat, whose `logprobs` is a flag.

    Raises:
        Problem: a value that cannot work, or a field that would change the answer and is not
            supported.
    """
    stream_options = body.object("stream_options")
    cache = body.object("prompt_cache_options")
    template_kwargs = read_template_kwargs(body) if chat else {}
    effort = body.text("reasoning_effort") if chat else None
    if effort is not None:
        template_kwargs = {"reasoning_effort": effort, **template_kwargs}
    tools = read_tools(body) if chat else None
    if tools is not None:
        template_kwargs = {**template_kwargs, "tools": tools.given}
    options = _sampling(body) | _stopping(body, settings)
    logprobs = _chat_logprobs(body) if chat else body.integer("logprobs", least=0, most=5)
    if logprobs is not None:
        options["logprobs"] = logprobs
    schema = _schema(body.object("response_format"), body.name("response_format"))
    if schema is not None and tools is not None:
        raise not_supported(
            body.name("response_format"),
            "of an answer that may call tools",
            "leave one of them out",
        )
    if schema is not None:
        options["json_schema"] = schema
    ask: dict[str, Any] = dict(
        model=body.text("model"),
        options=options,
        limited_by=_limit_name(body),
        max_tokens=_limit(body, settings),
        answers=body.integer("n", 1, least=1, most=settings.max_answers),
        stream=body.flag("stream"),
        include_usage=bool(stream_options.get("include_usage")),
        include_progress=bool(stream_options.get("include_progress")),
        sources=_sources(body),
        context=body.text("context", most=100),
        salt=body.text("cache_salt", "", most=1024),
        template_kwargs=template_kwargs,
        explicit=cache.get("mode") == "explicit",
        tools=tools,
    )
    return Ask(**ask, ignored=_rest(body), names=body.names)


def read_template_kwargs(body: Body) -> dict[str, Any]:
    """Return what the chat template reads beside messages.

    Raises:
        Problem: a template of the client's is among it.
    """
    name = "chat_template"
    kwargs = body.object("chat_template_kwargs")
    if name in kwargs:
        raise not_supported(f"chat_template_kwargs.{name}", quote(kwargs[name]), _REMEDIES[name])
    return kwargs


def read_messages(body: Body) -> list[Any]:
    """Return the messages of a chat.

    Raises:
        Problem: there are none.
    """
    messages, expected = body.take("messages"), "a list of messages that is not empty"
    if messages is None:
        others = {"prompt": "/v1/completions", "input": "/v1/responses"}
        raise missing("messages", expected, body, others)
    if not isinstance(messages, list) or not messages:
        raise wrong_type("messages", messages, expected)
    return messages


def refuse_fields(body: Body, remedies: dict[str, str]) -> None:
    """Refuse fields of a chat that another protocol has not.

    Args:
        body: a request.
        remedies: what to do instead, by the field.

    Raises:
        Problem: one of them is there.
    """
    for name, remedy in remedies.items():
        if name in body.fields:
            raise not_supported(name, quote(body.fields[name]), remedy)


def template_arguments(body: Body, wanted: dict[str, Any], reads: Callable[[str], bool]) -> None:
    """Add arguments of the chat template that it reads; others have no effect on this model.

    Args:
        body: a request, whose own `chat_template_kwargs` come first.
        wanted: the arguments.
        reads: tells whether the template reads one.
    """
    read = {name: value for name, value in wanted.items() if reads(name)}
    if read:
        body.fields["chat_template_kwargs"] = read | body.object("chat_template_kwargs")


def _limit_name(body: Body) -> str:
    newer = "max_completion_tokens"
    return newer if newer in body.fields else body.name("max_tokens")


def _limit(body: Body, settings: ServeSettings) -> int | None:
    name = _limit_name(body)
    older = body.integer("max_tokens", least=1)
    newer = body.integer("max_completion_tokens", least=1)
    limit = older if newer is None else newer
    if limit is not None and settings.max_tokens is not None and limit > settings.max_tokens:
        raise bad_request(
            f"{name} {limit:,} is more than this server allows, {settings.max_tokens:,}; ask for"
            " fewer",
            name,
        )
    return limit


def _sources(body: Body) -> bool | int:
    value = body.take("sources", False)
    if isinstance(value, bool):
        return value
    body.fields["sources"] = value
    return body.integer("sources", least=0, most=MOST_SOURCES) or 0


def _sampling(body: Body) -> dict[str, Any]:
    options = {
        "temperature": body.number("temperature", least=0, most=100),
        "top_p": body.number("top_p", least=0, most=1),
        "top_k": body.integer("top_k", least=-1),
        "min_p": body.number("min_p", least=0, most=1),
        "repetition_penalty": body.number("repetition_penalty", least=0.01, most=100),
        "seed": body.integer("seed", least=-MOST_SEED, most=MOST_SEED),
        "min_new_tokens": body.integer("min_tokens", 0, least=0),
    }
    # Values that ask for nothing would switch sampling on.
    nothing = {
        "top_p": (1,),
        "top_k": (-1, 0),
        "min_p": (0,),
        "repetition_penalty": (1,),
        "min_new_tokens": (0,),
    }
    return {
        name: value
        for name, value in options.items()
        if value is not None and value not in nothing.get(name, ())
    }


def _stopping(body: Body, settings: ServeSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"ignore_eos": True} if body.flag("ignore_eos") else {}
    stop = body.take("stop")
    stops = [stop] if isinstance(stop, str) else stop
    if not stops:
        return options
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        expected = "a string, or a list of strings that are not empty"
        raise wrong_type(body.name("stop"), stop, expected)
    longest = max(map(len, stops))
    if len(stops) > settings.max_stops or longest > MOST_STOP_CHARACTERS:
        raise bad_request(
            f"{body.name('stop')} has {len(stops)} strings of up to {longest} characters; give at"
            f" most {settings.max_stops} of {MOST_STOP_CHARACTERS}",
            body.name("stop"),
        )
    return options | {"stop": stops}


def _chat_logprobs(body: Body) -> int | None:
    wanted = body.flag("logprobs")
    top = body.integer("top_logprobs", 0, least=0, most=MOST_LOGPROBS)
    if top and not wanted:
        raise bad_request(f"top_logprobs {top} needs logprobs true; set it", "top_logprobs")
    return top if wanted else None


def _schema(wanted: dict[str, Any], name: str) -> Any:
    """Return the JSON schema that an answer is to follow; None for any text."""
    kind = wanted.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise not_supported(name, quote(kind), "give type text, json_object or json_schema")
    described = wanted.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise bad_request(
            f"{name} of type json_schema has no schema; give it in json_schema.schema",
            name,
        )
    size = len(json.dumps(schema, ensure_ascii=False))
    if size > MOST_SCHEMA_CHARACTERS:
        raise bad_request(
            f"{name} has a schema of {size:,} characters, more than {MOST_SCHEMA_CHARACTERS:,};"
            " shorten it",
            name,
        )
    return schema


def _rest(body: Body) -> tuple[str, ...]:
    """Refuse what would change the answer, and return the names of what does not."""
    ignored = []
    for name, value in body.fields.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                remedy = _REMEDIES.get(name, "leave it out")
                raise not_supported(body.name(name), quote(value), remedy)
        else:
            ignored.append(name if name in IGNORED else "other")
    return tuple(ignored)
