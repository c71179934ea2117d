"""Calls of tools in what a model writes, in the form of its chat template."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from star_attention.hf.text.argument_calls import ArgumentForm
from star_attention.hf.text.call_forms import Form, call_form
from star_attention.hf.text.call_grammar import call_grammar
from star_attention.hf.text.calls import CallHolder, ToolCall
from tests.conversations import TEMPLATES, tokenizer_with
from tests.talkers import byte_level

TOOLS: dict[str, Any] = {"weather": None, "clock": None}
PARIS = ToolCall(name="weather", arguments={"city": "Paris, {1}", "days": 2})
NOW = ToolCall(name="clock", arguments={})
TEXT = json.dumps(PARIS.arguments)

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As newer Mistral's.
NAMED = (
    "{{ tools }}" + CHATML + "{% if m.tool_calls %}{% for c in m.tool_calls %}[TOOL_CALLS]"
    "{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}" + END
)
# As Kimi's, which counts its calls, and has a mark around all of them.
COUNTED = NAMED.replace(
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]",
    "{{ '<|all|>' if loop.first }}<|call_begin|>{{ c.function.name }}:{{ loop.index0 }}<|args|>",
)
# Each argument by itself, and nothing that ends them.
BY_ARGUMENT = NAMED.replace(
    "[ARGS]{{ c.function.arguments | tojson }}",
    "{% for k, v in c.function.arguments.items() %}<k>{{ k }}</k><v>{{ v }}</v>{% endfor %}",
)
# As MiniMax's, with a tag around all calls.
INVOKED = NAMED.replace(
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}",
    "{{ '<mini:calls>\n' if loop.first }}<invoke name=\"{{ c.function.name }}\">\n"
    '{% for k, v in c.function.arguments.items() %}<parameter name="{{ k }}">'
    "{{ v if v is string else v | tojson }}</parameter>\n{% endfor %}</invoke>\n"
    "{{ '</mini:calls>' if loop.last }}",
)
MARKS = ("[TOOL_CALLS]", "[ARGS]", "<|all|>", "<|call_begin|>", "<|args|>")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def form_of(template: str) -> Form:
    tokenizer = byte_level((*CHATML_TOKENS, *MARKS), plain=("<tool_call>",), chat=template)
    return known_form(tokenizer)


def known_form(tokenizer: Any) -> Form:
    form = call_form(tokenizer)
    assert form is not None
    return form


FORMS = {name: form_of(TEMPLATES[name]) for name in ("llama3", "mistral_v3", "qwen3")}
FORMS |= {"named": form_of(NAMED), "counted": form_of(COUNTED), "invoked": form_of(INVOKED)}
OF_FAMILIES = ("llama3", "mistral_v3", "qwen3", "harmony", "qwen3_coder", "glm45")
FORMS |= {name: known_form(tokenizer_with(TEMPLATES[name])) for name in OF_FAMILIES[3:]}


@pytest.mark.parametrize(
    ("form", "written", "calls"),
    [
        (
            "qwen3",
            f'<tool_call>\n{{"name": "weather", "arguments": {TEXT}}}\n</tool_call>',
            [PARIS],
        ),
        (
            "qwen3",
            f'Now.\n<tool_call>{{"name":"clock"}}</tool_call>\n<tool_call>{{"name": "weather",'
            f' "arguments": {TEXT}}}</tool_call><|im_end|>',
            [NOW, PARIS],
        ),
        # Another name is the model's word, where a mark says that it is a call.
        ("qwen3", '<tool_call>{"name": "other"}', [ToolCall(name="other", arguments={})]),
        ("qwen3", f'<think>A <tool_call>?</think>{{"name": "weather", "arguments": {TEXT}}}', []),
        ("qwen3", f'{{"name": "weather", "arguments": {TEXT}}}', []),
        ("qwen3", '<tool_call>{"name": "weather", "arguments": {"city": "Par', []),
        ("qwen3", '<tool_call>{"name": "weather", "arguments": "Paris"}', []),
        ("qwen3", "A plain answer.", []),
        ("llama3", f'{{"name": "weather", "parameters": {TEXT}}}<|eot_id|>', [PARIS]),
        ("llama3", f'\n {{"name": "weather", "arguments": {json.dumps(TEXT)}}}', [PARIS]),
        (
            "llama3",
            f'{{"name": "clock", "parameters": {{}}}}; {{"name": "weather", "parameters": {TEXT}}}',
            [NOW, PARIS],
        ),
        (
            "llama3",
            f'{{"type": "function", "function": {{"name": "weather", "parameters": {TEXT}}}}}',
            [PARIS],
        ),
        # Without a mark, the name has to be a tool's, and nothing stands before it.
        ("llama3", '{"name": "Anna", "age": 7}', []),
        ("llama3", f'See: {{"name": "weather", "parameters": {TEXT}}}', []),
        (
            "mistral_v3",
            f'[TOOL_CALLS][{{"name": "clock"}}, {{"name": "weather", "arguments": {TEXT}}}]</s>',
            [NOW, PARIS],
        ),
        ("mistral_v3", f'[{{"name": "weather", "arguments": {TEXT}}}]', [PARIS]),
        ("named", f"[TOOL_CALLS]weather[ARGS]{TEXT}[TOOL_CALLS]clock[ARGS]{{}}", [PARIS, NOW]),
        ("named", f"So: [TOOL_CALLS]weather[ARGS]{TEXT}", [PARIS]),
        ("named", f"weather[ARGS]{TEXT[:-1]}", []),
        (
            "counted",
            f"<|all|><|call_begin|>clock:0<|args|>{{}}<|call_begin|>weather:1<|args|>{TEXT}",
            [NOW, PARIS],
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
            f" to=functions.weather <|constrain|>json<|message|>{TEXT}<|call|>",
            [PARIS],
        ),
        (
            "harmony",
            "<|start|>assistant to=functions.clock<|channel|>commentary json<|message|><|call|>",
            [NOW],
        ),
        ("harmony", "<|channel|>final<|message|>to=functions.weather {}<|return|>", []),
        (
            "qwen3_coder",
            "Now.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis, {1}\n</parameter>\n"
            "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n"
            "<function=clock>\n</function>\n</tool_call><|im_end|>",
            [PARIS, NOW],
        ),
        # Without the tag around it, and with other white space.
        (
            "qwen3_coder",
            "<function=weather><parameter=city>Paris, {1}</parameter> <parameter=days> 2"
            " </parameter></function>",
            [PARIS],
        ),
        ("qwen3_coder", "<tool_call><function=weather><parameter=city>\nPar", []),
        ("qwen3_coder", "<tool_call><function=weather><parameter=city>\nParis</parameter>\n", []),
        ("qwen3_coder", "<think>\n<function=clock></function>\n</think>\nNo.", []),
        ("qwen3_coder", "<tool_call>weather</tool_call>", []),
        (
            "glm45",
            "\n<think>A <tool_call>?</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n"
            "<arg_value>Paris, {1}</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>"
            "\n</tool_call>\n<tool_call>clock\n</tool_call><|observation|>",
            [PARIS, NOW],
        ),
        # As later versions write it.
        (
            "glm45",
            "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris, {1}</arg_value>"
            "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>",
            [PARIS],
        ),
        (
            "invoked",
            '<mini:calls>\n<invoke name="clock">\n</invoke>\n<invoke name="weather">\n<parameter'
            ' name="city">Paris, {1}</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n'
            "</mini:calls>",
            [NOW, PARIS],
        ),
    ],
)
def test_calls_that_are_written(form: str, written: str, calls: list[ToolCall]) -> None:
    assert FORMS[form].calls_in(written, TOOLS) == calls


@pytest.mark.parametrize("name", ["chatml", "gemma", "phi3", "needle"])
def test_templates_without_tools(name: str) -> None:
    assert call_form(tokenizer_with(TEMPLATES[name])) is None


def test_a_form_that_is_not_known() -> None:
    tokenizer = byte_level((*CHATML_TOKENS, *MARKS), chat=BY_ARGUMENT)
    assert call_form(tokenizer) is None


@pytest.mark.parametrize(
    ("form", "text", "certain"),
    [
        ("qwen3", 'Let me see. \n<tool_call>\n{"name": "weather"}', "Let me see."),
        ("qwen3", "a <tool> < b <tool_cal", "a <tool> < b"),
        ("llama3", ' {\n "name" : "weather"', ""),
        ("llama3", '{"type": "function", "name": "weather"', ""),
        ("llama3", '{"age": 7}', '{"age": 7}'),
        ("llama3", 'See {"name": "weather"}', 'See {"name": "weather"}'),
        ("mistral_v3", 'Look: [{"name": "weather"}]', "Look:"),
        ("named", "Look: weather{}", "Look:"),
        ("named", "The weather is fine.", "The weather is fine."),
        ("harmony", "A plain answer.", "A plain answer."),
        ("qwen3_coder", "So.\n\n<tool_call>\n<function=weather>\n<par", "So."),
        ("qwen3_coder", "So.\n<function=weather>", "So."),
        ("qwen3_coder", "a <func> < b <function", "a <func> < b"),
        ("glm45", "So.\n<tool_call>weather\n<arg_key>", "So."),
        ("invoked", "So.\n<mini:calls>\n", "So."),
        ("invoked", '<invoke name="clock">', ""),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_may_be_a_call_is_held_back(form: str, text: str, certain: str, size: int) -> None:
    """Forbids that a stream shows a call, and that a plain answer is lost."""
    known = FORMS[form]

    def holder() -> CallHolder:
        return CallHolder(known.beginnings(list(TOOLS)), starts=not known.opening)

    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    growing = holder()
    shown = "".join(map(growing.push, pieces))
    assert shown == certain
    assert shown + growing.flush() == text


def said_by(name: str, calls: list[ToolCall]) -> tuple[Form, str]:
    """Return a form, and calls as the template writes them after the prompt."""
    tokenizer: Any = tokenizer_with(TEMPLATES[name])
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call.as_dict(), "id": "a1b2c3d4e"} for call in calls],
        },
    ]
    prompt = tokenizer.apply_chat_template(
        messages[:1], tools=[], add_generation_prompt=True, tokenize=False
    )
    whole = tokenizer.apply_chat_template(messages, tools=[], tokenize=False)
    return known_form(tokenizer), whole.removeprefix(prompt)


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_every_form_is_read_as_its_template_writes_it(name: str) -> None:
    """The call of a conversation, as it would be generated, is the call that is read."""
    form, said = said_by(name, [PARIS])
    assert form.calls_in(said, TOOLS) == [PARIS]


EVERYTHING: dict[str, tuple[Any, Any]] = {
    "text": ("42", {"type": "string"}),
    "code": ('if a < b:\n\n\tprint("</parameter> </arg_value>")\n', {"type": "string"}),
    "path": (" \n ", {"type": ["string"]}),
    "thought": ("<think>\n</think>", {"type": "string"}),
    "empty": ("", {"type": "string"}),
    "count": (-7, {"type": "integer"}),
    "share": (0.5, {"type": "number"}),
    "whole": (3, {"type": "number"}),
    "yes": (True, {"type": "boolean"}),
    "nothing": (None, {"type": ["string", "null"]}),
    "either": (2, {"anyOf": [{"type": "string"}, {"type": "integer"}]}),
    "place": ({"lat": 1.5, "name": "Zoë </x>"}, {"$ref": "#/$defs/place"}),
    "rows": ([[1, "a"], []], {"type": "array", "items": {"type": "array"}}),
    "mode": ("fast", {"enum": ["fast", "slow"]}),
    "level": (2, {"enum": [1, 2]}),
    "untyped": ({"a": [True]}, {}),
    "unknown": ([1], None),
}


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45"])
def test_arguments_come_back_as_they_were(name: str) -> None:
    """What the template makes of arguments is read as these arguments, by the tool's schema."""
    properties = {key: schema for key, (_, schema) in EVERYTHING.items() if schema is not None}
    schema = {
        "type": "object",
        "properties": properties,
        "$defs": {"place": {"type": "object", "properties": {"lat": {"type": "number"}}}},
    }
    call = ToolCall(name="do", arguments={key: value for key, (value, _) in EVERYTHING.items()})
    form, said = said_by(name, [call, NOW])
    found = form.calls_in(said, {"do": schema, "clock": None})
    assert found == [call, NOW]
    kinds = [type(value) for value in found[0].arguments.values()]
    assert kinds == [type(value) for value, _ in EVERYTHING.values()]


INVOCATION = """<mini:calls>
<invoke name="weather">
<parameter name="city">Paris, {1}</parameter>
<parameter name="days">2</parameter>
</invoke>
</mini:calls>"""


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "invoked"])
def test_the_grammar_of_a_call(name: str) -> None:
    """It takes what the template writes, also without what may be left out, and nothing else."""
    xgrammar = pytest.importorskip("xgrammar")
    form, said = FORMS[name], INVOCATION
    if name != "invoked":
        form, said = said_by(name, [PARIS])
        said = said.rpartition("</think>")[2].removesuffix("<|im_end|>\n").strip()
    assert isinstance(form, ArgumentForm)
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    }
    functions = [{"name": "weather", "parameters": schema}, {"name": "clock", "parameters": {}}]
    grammar = xgrammar.Grammar.from_structural_tag(call_grammar(form, functions))

    def takes(text: str) -> bool:
        taken: bool = xgrammar.testing._is_grammar_accept_string(grammar, text)
        return taken

    assert takes(said)
    assert takes(said.replace("Paris", "a </b> <c>\n"))
    assert not takes(said.replace("2", "two"))
    assert not takes(said.replace("weather", "clock"))
    assert not takes(said.replace("weather", "other"))
    assert not takes(said[:-1])
    assert not takes(f"{said}\n{said}")
    before, _, rest = said.partition(form.before_key + "days")
    assert takes(before + rest.partition(form.after_value)[2])
    named = form.opening + "clock" + form.name_end + form.end
    assert takes(named)
    assert form.calls_in(named, TOOLS) == [NOW]


def test_a_closing_tag_in_an_argument_is_no_reasoning() -> None:
    call = ToolCall(name="weather", arguments={"city": "</think>"})
    for name in ("qwen3", "qwen3_coder"):
        form, said = said_by(name, [call])
        assert form.calls_in(said, TOOLS) == [call]
        assert form.calls_in(f"Hm.</think>\n{said}", TOOLS, has_reasoning=True) == [call]
        assert form.calls_in(f"</think>\n{said}", TOOLS) == [call]
        # Reasoning that has not ended has no calls.
        plain = said_by(name, [NOW])[1].rpartition("</think>")[2]
        assert form.calls_in(f"<think>{plain}", TOOLS) == []
        assert form.calls_in(plain, TOOLS, has_reasoning=True) == []


def test_a_call_with_values_that_json_cannot_hold_is_text() -> None:
    """Forbids arguments that are no JSON, and an error for ten thousand brackets."""
    for value in ("NaN", "1e999", "[" * 100_000):
        said = f'<tool_call>{{"name": "weather", "arguments": {{"city": {value}}}}}</tool_call>'
        assert FORMS["qwen3"].calls_in(said, TOOLS) == []


@pytest.mark.parametrize("name", FORMS)
def test_white_space_and_marks_without_end_take_linear_time(name: str) -> None:
    """Forbids an answer that holds up the server for minutes: what repeats is searched once."""
    form, many = FORMS[name], 50_000
    marks = ["to=functions.weather", "weather", "{"]
    if isinstance(form, ArgumentForm):
        head = form.mark + "weather" + form.name_end
        marks += [head, head + form.before_key, head + form.before_key + "a" + form.after_key]
    else:
        marks += [form.opening + "weather", form.opening + "weather" + form.between]
    started = time.process_time()
    for mark in marks:
        for text in (mark + " " * many, mark * (many // len(mark))):
            assert form.calls_in(text, TOOLS) == []
    assert time.process_time() - started < 5


def test_arguments_one_by_one_that_are_quoted_are_no_known_form() -> None:
    """Their text would be read with its quotes."""
    quoted = INVOKED.replace("{{ v if v is string else v | tojson }}", "{{ v | tojson }}")
    tokenizer = byte_level((*CHATML_TOKENS, *MARKS), chat=quoted)
    assert call_form(tokenizer) is None
    assert isinstance(FORMS["invoked"], ArgumentForm)
