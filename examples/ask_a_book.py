"""Ask a book: encode a text once, then stream the answer to a question.

From the root of the repository, with the bundled model and a small text, or with your own:

    python examples/ask_a_book.py
    python examples/ask_a_book.py FILE "Who wrote it?" --model meta-llama/Llama-3.1-8B-Instruct
"""

import argparse

from star_attention import StarLLM, read_document


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("book", nargs="?", default="examples/book.txt", help="text, PDF, ...")
    parser.add_argument(
        "question", nargs="?", default="What is the secret number for quiet-harbor?"
    )
    parser.add_argument("--model", default="models/needle-17m", help="folder or hub id")
    parser.add_argument("--block-size", default="1k", help="tokens of a block: 1024, 4k, ...")
    args = parser.parse_args()

    # Text as it is; the text of a PDF, Word, EPUB or HTML file with the extra `documents`.
    book = read_document(args.book)
    star = StarLLM.from_pretrained(args.model, block_size=args.block_size)

    # Phase 1. The user message stays open: the question becomes its end.
    context = star.encode([{"role": "user", "content": book}])
    blocks = context.plan.num_blocks
    print(f"{len(context):,} tokens in {blocks} blocks, encoded in {context.encode_s:.1f} s")

    # Phase 2. The question and each token of the answer attend to the whole book.
    print(args.question)
    with star.stream(context, args.question, max_new_tokens=200) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
    print()
    answer = stream.result
    print(f"{len(answer.token_ids)} tokens, the first after {answer.timings.ttft_s:.2f} s")


if __name__ == "__main__":
    main()
