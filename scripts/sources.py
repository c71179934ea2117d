"""Measure how often the first source of an answer is the planted fact that was asked for.

python scripts/sources.py models/needle-17m --tokens 4096 --samples 100
python scripts/sources.py MODEL --chat               # the text as a user's message
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from star_attention import StarLLM
from star_attention.demo.haystack import Fact, build_haystack


def ask(star: StarLLM, text: str, facts: list[Fact], *, chat: bool) -> list[Any]:
    """Return the answers to the questions for some facts, with their sources."""
    options: dict[str, Any] = {"sources": True, "max_new_tokens": 40}
    if chat:
        context = star.encode([{"role": "user", "content": text}])
        queries = [f"\nWhat is the secret number for {fact.key}?" for fact in facts]
    else:
        context = star.encode(text)
        queries = [fact.query(star.tokenizer) for fact in facts]
        options["stop"] = "\n"
    return [star.generate(context, query, **options) for query in queries]


def main() -> None:
    """Run the samples, and print a line of JSON with the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--facts", type=int, default=10)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--chat", action="store_true")
    options = parser.parse_args()
    star = StarLLM.from_pretrained(options.model)
    first = listed = right = first_of_right = 0
    samples, sources_s, started = 0, 0.0, time.perf_counter()
    for seed in range(-(-options.samples // options.facts)):
        haystack = build_haystack(star.tokenizer, options.tokens, facts=options.facts, seed=seed)
        facts = list(haystack.facts)[: options.samples - samples]
        replies = ask(star, haystack.text, facts, chat=options.chat)
        for fact, reply in zip(facts, replies, strict=True):
            holds = [fact.line.strip() in source.text for source in reply.sources]
            is_right = fact.number in reply.text
            first += holds[:1] == [True]
            listed += any(holds)
            right += is_right
            first_of_right += is_right and holds[:1] == [True]
            sources_s += reply.timings.sources_s
        samples += len(facts)
    print(
        json.dumps(
            {
                "model": options.model,
                "tokens": options.tokens,
                "samples": samples,
                "first": first,
                "among_three": listed,
                "right_answers": right,
                "first_of_right_answers": first_of_right,
                "sources_s": sources_s / samples,
                "total_s": time.perf_counter() - started,
            }
        )
    )


if __name__ == "__main__":
    main()
