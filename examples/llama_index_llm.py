"""A language model for LlamaIndex that answers from one text, which is encoded once.

Needs `pip install llama-index-core`.

    python examples/llama_index_llm.py
    python examples/llama_index_llm.py FILE QUESTION --model MODEL
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.llms import CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback

from star_attention import StarLLM


class DocumentLLM(CustomLLM):
    """Answers questions and conversations about a text.

    Attributes:
        star: the engine that encoded the text.
        context: the text, encoded as the beginning of a user message. A question, or the first
            message of a conversation, continues it.
        system: the system message before the text. Conversations may begin with the same one.
        max_new_tokens: most tokens of an answer.
    """

    # A `StarLLM` and an `EncodedContext`; pydantic cannot check the fields of these classes.
    star: Any
    context: Any
    system: str = ""
    max_new_tokens: int = 256

    @classmethod
    def about(cls, star: StarLLM, text: str, system: str = "", **fields: Any) -> "DocumentLLM":
        """Return a language model about a text."""
        messages = [{"role": "system", "content": system}] if system else []
        context = star.encode([*messages, {"role": "user", "content": text}])
        return cls(star=star, context=context, system=system, **fields)

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans prompts by: the text itself takes no room in them."""
        limit = self.star.runtime.handle.max_positions
        room = {} if limit is None else {"context_window": limit - len(self.context)}
        return LLMMetadata(
            num_output=self.max_new_tokens,
            is_chat_model=True,
            model_name=self.star.model.config.model_type,
            **room,
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **settings: Any) -> CompletionResponse:
        return self._answer(prompt, settings)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **settings: Any
    ) -> Iterator[CompletionResponse]:
        return self._pieces(prompt, settings)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **settings: Any) -> ChatResponse:
        return as_chat(self._answer(self._question(messages), settings))

    @llm_chat_callback()
    def stream_chat(
        self, messages: Sequence[ChatMessage], **settings: Any
    ) -> Iterator[ChatResponse]:
        return map(as_chat, self._pieces(self._question(messages), settings))

    def _question(self, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
        """Return a conversation without the system message that is encoded already."""
        query = as_dicts(messages)
        is_encoded = self.system and query[0] == {"role": "system", "content": self.system}
        return query[1:] if is_encoded else query

    def _answer(self, query: Any, settings: dict[str, Any]) -> CompletionResponse:
        settings = {"max_new_tokens": self.max_new_tokens} | settings
        reply = self.star.generate(self.context, query, **settings)
        return CompletionResponse(text=reply.text, raw=reply.as_dict())

    def _pieces(self, query: Any, settings: dict[str, Any]) -> Iterator[CompletionResponse]:
        settings = {"max_new_tokens": self.max_new_tokens} | settings
        text = ""
        with self.star.stream(self.context, query, **settings) as pieces:
            for piece in pieces:
                text += piece
                yield CompletionResponse(text=text, delta=piece)


def as_dicts(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages of LlamaIndex in the form that `StarLLM` takes."""
    return [{"role": message.role.value, "content": message.content} for message in messages]


def as_chat(response: CompletionResponse) -> ChatResponse:
    """Return an answer as the assistant's message."""
    message = ChatMessage(role="assistant", content=response.text)
    return ChatResponse(message=message, delta=response.delta, raw=response.raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("book", nargs="?", default="examples/book.txt", help="text file, UTF-8")
    parser.add_argument("question", nargs="?", default="What is the secret code for rusty-anchor?")
    parser.add_argument("--model", default="models/needle-17m", help="folder or hub id")
    parser.add_argument("--block-size", default="1k", help="tokens of a block: 1024, 4k, ...")
    args = parser.parse_args()

    star = StarLLM.from_pretrained(args.model, block_size=args.block_size)
    llm = DocumentLLM.about(star, Path(args.book).read_text(encoding="utf-8"), max_new_tokens=50)

    print(llm.complete(args.question).text)
    print(llm.chat([ChatMessage(role="user", content=args.question)]).message.content)
    for response in llm.stream_complete(args.question):
        print(response.delta, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
