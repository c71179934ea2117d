"""Chat templates of well-known families, and random conversations that are cut at random.

The templates in `chat_templates/` were written from what the families' prompts look like.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from star_attention.hf.text.chat import continue_context, open_context

Message = dict[str, Any]

FOLDER = Path(__file__).parent / "chat_templates"
BUNDLED = Path(__file__).parents[1] / "models" / "needle-17m" / "tokenizer_config.json"
TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8").rstrip("\n") for path in FOLDER.glob("*.jinja")
}
TEMPLATES["needle"] = json.loads(BUNDLED.read_text(encoding="utf-8"))["chat_template"]

CONTROL_TOKENS = (FOLDER / "control_tokens.txt").read_text(encoding="utf-8").split()


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes that knows the control tokens of all families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(CONTROL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def user(*texts: str) -> Message:
    if len(texts) == 1:
        return {"role": "user", "content": texts[0]}
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def whole_prompt(tokenizer: Any, messages: list[Message], **kwargs: Any) -> str:
    """Return what the template makes of a conversation at once, a last answer left open."""
    is_prefilled = messages[-1]["role"] == "assistant"
    text: str = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=not is_prefilled,
        continue_final_message=is_prefilled,
        **kwargs,
    )
    return text


def cut_prompt(tokenizer: Any, context: list[Message], query: Any, **kwargs: Any) -> str:
    """Return the prompt of a context and a query that follows it."""
    opened = open_context(tokenizer, context, kwargs)
    return opened.head + continue_context(tokenizer, opened, query).text


@dataclass(frozen=True)
class Cut:
    """A conversation, cut in two.

    Attributes:
        whole: the messages.
        context: the encoded ones.
        query: what follows them.
    """

    whole: list[Message]
    context: list[Message]
    query: str | list[Message]


WORDS = st.sampled_from(["the cat", "Sat", "mat.", "été", "user", "42", "{{ x }}", "a\n\nb", "说"])
SPACES = st.sampled_from(["", "", " ", "\n", "\n\n", "  ", "\t", " \n"])
TEXTS = st.builds("{}{}{}".format, SPACES, WORDS, SPACES)


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Draw a conversation of up to four turns, with the cut inside or before a user's message."""
    turns = draw(st.integers(1, 3))
    whole: list[Message] = [system(draw(TEXTS))] if draw(st.booleans()) else []
    at = draw(st.integers(0, turns - 1))
    cut = 0
    for turn in range(turns):
        if turn == at:
            cut = len(whole)
        whole.append(user(draw(TEXTS)))
        if turn < turns - 1 or draw(st.integers(0, 3)) == 0:
            whole.append(assistant(draw(TEXTS)))
    question = whole[cut]["content"]
    rest = whole[cut + 1 :]
    if cut and draw(st.booleans()):
        # Before the message.
        return Cut(whole, whole[:cut], [*whole[cut:]] if rest or draw(st.booleans()) else question)
    document = draw(TEXTS)
    whole[cut] = user(document + question)
    context = [*whole[:cut], user(document)]
    as_text = not rest and draw(st.booleans())
    return Cut(whole, context, question if as_text else [user(question), *rest])
