"""Calls of tools in what a model writes, in the form of its chat template."""

from __future__ import annotations

import json
from typing import Any

import pytest

from star_attention.hf.text.calls import CallForm, CallHolder, ToolCall
from tests.conversations import TEMPLATES, tokenizer_with
from tests.talkers import byte_level

TOOLS = ["weather", "clock"]
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
# As GLM's: each argument by itself.
BY_ARGUMENT = NAMED.replace(
    "[ARGS]{{ c.function.arguments | tojson }}",
    "{% for k, v in c.function.arguments.items() %}<k>{{ k }}</k><v>{{ v }}</v>{% endfor %}",
)
MARKS = ("[TOOL_CALLS]", "[ARGS]", "<|all|>", "<|call_begin|>", "<|args|>")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def form_of(template: str) -> CallForm:
    tokenizer = byte_level((*CHATML_TOKENS, *MARKS), plain=("<tool_call>",), chat=template)
    form = CallForm.of(tokenizer)
    assert form is not None
    return form


FORMS = {name: form_of(TEMPLATES[name]) for name in ("llama3", "mistral_v3", "qwen3")}
FORMS |= {"named": form_of(NAMED), "counted": form_of(COUNTED)}
FORMS["harmony"] = CallForm.of(tokenizer_with(TEMPLATES["harmony"]))  # type: ignore[assignment]


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
    ],
)
def test_calls_that_are_written(form: str, written: str, calls: list[ToolCall]) -> None:
    assert FORMS[form].calls_in(written, TOOLS) == calls


@pytest.mark.parametrize("name", ["chatml", "gemma", "phi3", "needle"])
def test_templates_without_tools(name: str) -> None:
    assert CallForm.of(tokenizer_with(TEMPLATES[name])) is None


def test_a_form_that_is_not_known() -> None:
    tokenizer = byte_level((*CHATML_TOKENS, *MARKS), chat=BY_ARGUMENT)
    assert CallForm.of(tokenizer) is None


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
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_may_be_a_call_is_held_back(form: str, text: str, certain: str, size: int) -> None:
    """Forbids that a stream shows a call, and that a plain answer is lost."""
    known = FORMS[form]

    def holder() -> CallHolder:
        return CallHolder(known.beginnings(TOOLS), starts=not known.opening)

    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    growing = holder()
    shown = "".join(map(growing.push, pieces))
    assert shown == certain
    assert shown + growing.flush() == text


def test_every_form_is_read_as_its_template_writes_it() -> None:
    """The call of a conversation, as it would be generated, is the call that is read."""
    for name in ("llama3", "mistral_v3", "qwen3", "harmony"):
        tokenizer: Any = tokenizer_with(TEMPLATES[name])
        form = CallForm.of(tokenizer)
        assert form is not None, name
        function = {"name": "weather", "arguments": PARIS.arguments}
        call = {"id": "a1b2c3d4e", "type": "function", "function": function}
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        prompt = tokenizer.apply_chat_template(
            messages[:1], tools=[], add_generation_prompt=True, tokenize=False
        )
        whole = tokenizer.apply_chat_template(messages, tools=[], tokenize=False)
        said = whole.removeprefix(prompt)
        assert form.calls_in(said, TOOLS) == [PARIS], name
