"""A chat model for LangChain that answers from one text, which is encoded once.

Needs `pip install langchain-core`.

    python examples/langchain_chat.py
    python examples/langchain_chat.py FILE QUESTION --model MODEL
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_openai_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate

from star_attention import StarLLM


class DocumentChat(BaseChatModel):
    """Answers conversations about a text; LangChain calls the methods with an underscore.

    Attributes:
        star: the engine that encoded the text.
        context: the text, encoded as the beginning of a user message. The first message of every
            conversation continues it.
        system: the system message before the text. Conversations may begin with the same one.
        max_new_tokens: most tokens of an answer.
    """

    star: StarLLM
    # An `EncodedContext`; pydantic cannot check the fields of this class.
    context: Any
    system: str = ""
    max_new_tokens: int = 256

    @classmethod
    def about(cls, star: StarLLM, text: str, system: str = "", **fields: Any) -> "DocumentChat":
        """Return a chat model about a text."""
        messages = [{"role": "system", "content": system}] if system else []
        context = star.encode([*messages, {"role": "user", "content": text}])
        return cls(star=star, context=context, system=system, **fields)

    @property
    def _llm_type(self) -> str:
        return "star-attention"

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **settings: Any
    ) -> ChatResult:
        query, settings = self._arguments(messages, stop, settings)
        reply = self.star.generate(self.context, query, **settings)
        read, written = len(self.context) + reply.query_tokens, len(reply.token_ids)
        message = AIMessage(
            reply.text,
            response_metadata={"finish_reason": reply.finish_reason},
            usage_metadata={
                "input_tokens": read,
                "output_tokens": written,
                "total_tokens": read + written,
            },
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **settings: Any
    ) -> Iterator[ChatGenerationChunk]:
        query, settings = self._arguments(messages, stop, settings)
        with self.star.stream(self.context, query, **settings) as pieces:
            for piece in pieces:
                yield ChatGenerationChunk(message=AIMessageChunk(piece))

    def _arguments(self, messages: Any, stop: Any, settings: Any) -> tuple[Any, dict[str, Any]]:
        """Return query and settings of `generate` for a call of LangChain's."""
        defaults = {"stop": stop, "max_new_tokens": self.max_new_tokens}
        query = convert_to_openai_messages(messages)
        if self.system and query[0] == {"role": "system", "content": self.system}:
            # It is encoded already.
            query = query[1:]
        return query, defaults | settings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("book", nargs="?", default="examples/book.txt", help="text file, UTF-8")
    parser.add_argument("question", nargs="?", default="What is the secret code for rusty-anchor?")
    parser.add_argument("--model", default="models/needle-17m", help="folder or hub id")
    parser.add_argument("--block-size", default="1k", help="tokens of a block: 1024, 4k, ...")
    args = parser.parse_args()

    star = StarLLM.from_pretrained(args.model, block_size=args.block_size)
    chat = DocumentChat.about(star, Path(args.book).read_text(encoding="utf-8"), max_new_tokens=50)

    # An answer with its metadata, then the same in pieces, then as a step of a chain.
    answer = chat.invoke(args.question)
    print(answer.content, answer.usage_metadata)
    for chunk in chat.stream(args.question):
        print(chunk.content, end="", flush=True)
    print()
    prompt = ChatPromptTemplate.from_messages([("user", "{question}")])
    chain = prompt | chat | StrOutputParser()
    print(*chain.batch([{"question": args.question}, {"question": args.question}]), sep="\n")


if __name__ == "__main__":
    main()
