"""Save an encoded text, load it in a later process, and extend it.

The first run encodes the text and saves it; later runs load the file. It holds the token ids of the
text: guard it like the text.

    python examples/saved_contexts.py
    python examples/saved_contexts.py FILE QUESTION --saved FILE.star --model MODEL
"""

import argparse
from pathlib import Path

from star_attention import StarLLM

POSTSCRIPT = "1 May.\nThe relief boat is here.\nThe secret number for paper-kite is 5301946.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("book", nargs="?", default="examples/book.txt", help="text file, UTF-8")
    parser.add_argument("question", nargs="?", default="What is the secret code for velvet-raven?")
    parser.add_argument("--saved", default="book.star", help="where the encoded text is kept")
    parser.add_argument("--model", default="models/needle-17m", help="folder or hub id")
    parser.add_argument("--block-size", default="1k", help="tokens of a block: 1024, 4k, ...")
    args = parser.parse_args()

    star = StarLLM.from_pretrained(args.model, block_size=args.block_size)
    saved = Path(args.saved)
    if saved.exists():
        # Mapped into memory: each layer is read and verified when it is first used.
        context = star.load_context(saved)
        print(f"loaded {len(context):,} tokens from {saved}")
    else:
        book = Path(args.book).read_text(encoding="utf-8")
        context = star.encode([{"role": "user", "content": book}])
        context.save(saved)
        print(f"encoded {len(context):,} tokens and saved them to {saved}")
    print(star.generate(context, args.question, max_new_tokens=50))

    # Only the new tokens go through the model, and `context` itself stays as it was.
    longer = star.extend(context, POSTSCRIPT)
    print(f"extended by {len(longer) - len(context)} tokens")
    print(star.generate(longer, "What is the secret number for paper-kite?", max_new_tokens=50))


if __name__ == "__main__":
    main()
