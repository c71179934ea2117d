"""RULER's tracking of variables (vt), common words (cwe) and frequent words (fwe).

By `compat` "star-attention" they are as the official Star Attention implementation has them (without a chat template), which its
published numbers may come from: in vt noise and the example are joined otherwise and a word of the answer's beginning misspelt, in
cwe words are ten times as frequent and the example's answer follows its colon at once, and in fwe answers are longer.
"""

from __future__ import annotations

import itertools
import math
import random
import string

from star_attention.errors import SizeError
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sources import Words, words
from star_attention.evals.suites.ruler.case import Case, depths
from star_attention.evals.suites.ruler.needles import NOISE, Draw, planted
from star_attention.hf.text.tokens import query_ids

_HOPS = 4
_EXAMPLE_TOKENS = 500
_COMMON = 10
_SHORT = 4096  # below it cwe's words are fewer


def vt(case: Case) -> Sample:
    """One chain of five variables in noise, behind an example of another."""
    rng = case.rng()
    value, other_value = (str(number) for number in rng.sample(range(10_000, 99_999), 2))
    names, other_names = _variables(rng, 5), _variables(rng, 3)
    tokens = min(_EXAMPLE_TOKENS, case.size.length // 2)

    def example(noises: int) -> str:
        shown = _chain(case, noises, other_names, other_value, part="example")
        return shown.context + shown.query + shown.answer_prefix

    noises = len(other_names)
    while len(query_ids(case.size.tokenizer, example(noises + 1))) <= tokens:
        noises += 1
    before = f"{example(noises)} {' '.join(other_names)}\n\n"
    if case.options.get("compat") is not None:
        before = f" {before}\n\n"
    return case.size.largest(
        lambda count: _chain(case, count, names, value, before=before), least=len(names)
    )[1]


def _variables(rng: random.Random, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < _HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def _chain(
    case: Case, noises: int, names: list[str], value: str, *, part: str = "chain", before: str = ""
) -> Sample:
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {source} " for source, name in itertools.pairwise(names)]
    places = sorted(case.rng(part).sample(range(noises), len(lines)))
    official = case.options.get("compat") is not None
    noise, joint, assigned = (
        (f"{NOISE}\n", " ", "assgined") if official else (NOISE, "\n", "assigned")
    )
    text = joint.join(planted([noise] * noises, lines, places))
    return case.sample(
        f"{before}{CHAIN_HEAD}{text}\n",
        *chain_question(value, len(names), assigned),
        names,
        max_new_tokens=30,
        category="multi-hop",
        haystack="repeat",
        depths=depths(text, lines),
    )


CHAIN_HEAD = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)


def chain_question(value: str, count: int, assigned: str = "assigned") -> tuple[str, str]:
    """The question for the variables that hold a value, and how its answer begins."""
    return (
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above,"
        f" {count} variables are {assigned} the value {value}, they are: ",
    )


def cwe(case: Case) -> Sample:
    """Ten words that appear more often than others in a numbered list, behind an example of another.

    Where the length takes more words than there are, pairs of an adjective and a noun go on (RULER goes on with another list, whose
    terms are unknown); `meta["pairs"]` says how many.

    Raises `SizeError` for a length that has no room for others beside the ten.
    """
    official = case.options.get("compat") is not None
    if case.size.length < _SHORT:
        shown, repeats, (common, uncommon) = 20, (3, 1), (6, 1)
    else:
        shown, repeats, (common, uncommon) = 40, (10, 3), (300, 30) if official else (30, 3)
    rng = case.rng("example")
    known = words(case.options.get("words"))
    example, answers = listed(rng, rng.sample(known.all, shown), *repeats)
    gap = "" if official else " "
    before = f"{CWE_HEAD}{example}\n{CWE_QUERY}{CWE_PREFIX}{gap}{numbered(answers)}\n"

    def build(count: int) -> Sample:
        rng = case.rng()
        pool = rng.sample(known.all, len(known.all))
        pairs = max(0, count - len(pool))
        text, answers = listed(rng, pool[:count] + _pairs(rng, pairs, known), common, uncommon)
        return case.sample(
            f"{before}{CWE_HEAD}{text}\n",
            CWE_QUERY,
            CWE_PREFIX,
            answers,
            max_new_tokens=120,
            category="aggregation",
            words=known.release,
            repeats=[common, uncommon],
            pairs=pairs,
        )

    try:
        return case.size.largest(build, least=_COMMON + 1)[1]
    except SizeError as error:
        if not official:
            raise
        raise SizeError(
            f"{error}, or leave out compat: the official variant repeats its {_COMMON} answers {common} times each, and where the"
            " length has no room for more, its list is empty or holds nothing else"
        ) from None


CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most"
    " often.\n"
)
CWE_QUERY = f"Question: What are the {_COMMON} most common words in the above list?"
CWE_PREFIX = f" Answer: The top {_COMMON} words that appear most often in the list are:"


def listed(
    rng: random.Random, chosen: list[str], common: int, uncommon: int
) -> tuple[str, list[str]]:
    """A numbered list in which the first ten words stand more often, and those."""
    answers = chosen[:_COMMON]
    entries = answers * common + chosen[_COMMON:] * uncommon
    rng.shuffle(entries)
    return numbered(entries), answers


def numbered(entries: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))


def _pairs(rng: random.Random, count: int, known: Words) -> list[str]:
    draw = Draw(rng, known)
    return [draw("words") for _ in range(count)]


def fwe(case: Case) -> Sample:
    """Coded words, the k-th of them k^-2 as often as the first, which is dots; asked for are the second to fourth."""
    vocabulary = max(5, (case.size.length - 50) // 50)

    def build(count: int) -> Sample:
        entries, answers = coded(case.rng(), count, vocabulary)
        return case.sample(
            f"{FWE_HEAD}{' '.join(entries)}\n",
            FWE_QUERY,
            FWE_PREFIX,
            answers,
            max_new_tokens=50 if case.options.get("compat") is None else 120,
            category="aggregation",
            alpha=2.0,
        )

    return case.size.largest(build, least=53)[
        1
    ]  # with fewer, the fourth word may be as frequent as the fifth


FWE_HEAD = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded"
    " words. "
)
FWE_QUERY = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in"
    " the above coded text?"
)
FWE_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)


def coded(rng: random.Random, count: int, vocabulary: int) -> tuple[list[str], list[str]]:
    """About `count` coded words in random order, and the three that are asked for."""
    known: dict[str, None] = {"...": None}
    while len(known) < vocabulary:
        known["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    shares = (count * 6 / math.pi**2 / rank**2 for rank in range(1, vocabulary + 1))
    entries = [word for word, share in zip(known, shares, strict=True) for _ in range(int(share))]
    rng.shuffle(entries)
    return entries, list(known)[1:4]
