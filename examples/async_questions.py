"""Answer questions inside an asyncio program: one streamed, others awaited in the background.

python examples/async_questions.py
python examples/async_questions.py FILE --model MODEL
"""

import argparse
import asyncio

from star_attention import EncodedContext, StarLLM, read_document

STREAMED = "What is the secret number for quiet-harbor?"
AWAITED = [
    "What is the secret number for amber-lantern?",
    "What is the secret code for rusty-anchor?",
]


async def answer(star: StarLLM, context: EncodedContext, question: str) -> str:
    """Await one answer. The event loop stays free; one thread per model does the work."""
    reply = await star.agenerate(context, question, max_new_tokens=200)
    return f"{question}  {reply}"


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("book", nargs="?", default="examples/book.txt", help="text or document")
    parser.add_argument("--model", default="models/needle-17m", help="folder or hub id")
    parser.add_argument("--block-size", default="1k", help="tokens of a block: 1024, 4k, ...")
    args = parser.parse_args()

    star = StarLLM.from_pretrained(args.model, block_size=args.block_size)
    book = read_document(args.book)
    context = await star.aencode([{"role": "user", "content": book}])

    # The stream takes turns with the other answers, piece by piece.
    waiting = [asyncio.create_task(answer(star, context, question)) for question in AWAITED]
    print(STREAMED, end="  ", flush=True)
    async for piece in star.astream(context, STREAMED, max_new_tokens=200):
        print(piece, end="", flush=True)
    print()
    for line in await asyncio.gather(*waiting):
        print(line)


if __name__ == "__main__":
    asyncio.run(main())
