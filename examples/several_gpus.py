"""Shard a text over several GPUs, and answer a question on all of it.

Every process runs the same program and holds the keys and values of its own blocks. Without
torchrun the program runs on one process; without GPUs the ranks are processes on the CPU.

    python examples/several_gpus.py
    torchrun --nproc-per-node 2 examples/several_gpus.py
    torchrun --nproc-per-node 8 examples/several_gpus.py FILE QUESTION --model MODEL
"""

import argparse
from pathlib import Path

from star_attention import StarLLM


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("book", nargs="?", default="examples/book.txt", help="text file, UTF-8")
    parser.add_argument(
        "question", nargs="?", default="What is the secret number for silver-otter?"
    )
    parser.add_argument("--model", default="models/needle-17m", help="folder or hub id")
    parser.add_argument("--block-size", default="1k", help="tokens of a block: 1024, 4k, ...")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="ranks that share the model's weights"
    )
    args = parser.parse_args()

    # Every rank loads the model; torchrun's environment says which ranks there are.
    star = StarLLM.from_pretrained(
        args.model, block_size=args.block_size, tensor_parallel=args.tensor_parallel
    )

    # Calls are collective: all ranks make them, and rank 0's arguments count.
    messages = None
    if star.rank == 0:
        messages = [{"role": "user", "content": Path(args.book).read_text(encoding="utf-8")}]
    context = star.encode(messages)
    answer = star.generate(context, args.question, max_new_tokens=50)

    # All ranks have the answer, and one prints it.
    if star.rank == 0:
        print(context.plan)
        mib = context.nbytes / 2**20
        print(f"rank 0 of {star.num_ranks} holds {mib:.1f} MiB of keys and values")
        print(answer.text)


if __name__ == "__main__":
    main()
