"""Answer many questions on one text, which is encoded once and read by all of them together.

python examples/many_questions.py
python examples/many_questions.py FILE --questions questions.txt --model MODEL    # one per line
"""

import argparse
import time
from pathlib import Path

from star_attention import StarLLM

QUESTIONS = [
    "What is the secret number for amber-lantern?",
    "What is the secret code for rusty-anchor?",
    "What is the secret number for golden-comet?",
    "What is the secret number for clever-badger?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("book", nargs="?", default="examples/book.txt", help="text file, UTF-8")
    parser.add_argument("--questions", help="text file with a question on each line")
    parser.add_argument("--model", default="models/needle-17m", help="folder or hub id")
    parser.add_argument("--block-size", default="1k", help="tokens of a block: 1024, 4k, ...")
    args = parser.parse_args()

    book = Path(args.book).read_text(encoding="utf-8")
    questions = QUESTIONS
    if args.questions:
        questions = Path(args.questions).read_text(encoding="utf-8").splitlines()
    star = StarLLM.from_pretrained(args.model, block_size=args.block_size)

    # Given the questions, `encode` refuses what `generate` would refuse, before the work begins.
    context = star.encode([{"role": "user", "content": book}], query=questions)
    print(f"{len(context):,} tokens encoded in {context.encode_s:.1f} s")

    # A list is one batch: each step reads the context's keys and values once for all questions.
    start = time.perf_counter()
    answers = star.generate(context, questions, max_new_tokens=50)
    seconds = time.perf_counter() - start
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question}  {answer.text}")
    print(f"{len(answers)} answers in {seconds:.1f} s")


if __name__ == "__main__":
    main()
