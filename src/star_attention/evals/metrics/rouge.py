"""ROUGE-Lsum (Lin 2004, section 3.2), without stemming."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from star_attention.evals.samples.sample import Sample


def rouge_lsum(prediction: str, sample: Sample) -> float:
    """Return the F-measure for the closest answer; each line of a text is a sentence."""
    return max(_f_measure(_lines(prediction), _lines(answer)) for answer in sample.answers)


def _lines(text: str) -> list[list[str]]:
    return [re.findall(r"[a-z0-9]+", line) for line in text.lower().split("\n")]


def _f_measure(predicted: list[list[str]], answer: list[list[str]]) -> float:
    """Return the F-measure of two texts, lists of lines of words.

    A word of a line of the answer is a hit if a longest common subsequence with any line of the
    prediction contains it. Each word of the prediction counts once.
    """
    unused = Counter(word for line in predicted for word in line)
    total = sum(unused.values()) + sum(map(len, answer))
    hits = 0
    for line in answer:
        places = {place for other in predicted for place in _common_subsequence(line, other)}
        for place in sorted(places):
            if unused[line[place]]:
                unused[line[place]] -= 1
                hits += 1
    return 2 * hits / total if hits else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[int]:
    """Return the indices into `a` of a longest common subsequence with `b`."""
    lengths = [[0] * (len(b) + 1)]
    for word in a:
        above, row = lengths[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    places = []
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif lengths[i][j - 1] > lengths[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places
