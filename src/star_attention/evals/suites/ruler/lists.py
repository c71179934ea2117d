"""RULER's variable tracking (vt), common words (cwe) and frequent words (fwe).

With the option `compat` they are as in the official Star Attention implementation (without a chat
template), which its published scores may come from: in vt, noise and example are joined in another
way and a word of the answer prefix is misspelled; in cwe, words are ten times as frequent and the
example's answer follows its colon without a space; in fwe, answers are longer.
"""

from __future__ import annotations

import itertools
import math
import random
import string

from star_attention.errors import SizeError
from star_attention.evals.samples.building import NOISE, Draw, depths, insert
from star_attention.evals.samples.case import Case
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sources import Words, words
from star_attention.hf.text.tokens import query_ids

_HOPS = 4
_EXAMPLE_TOKENS = 500
_NUM_COMMON = 10
_SHORT = 4096
"""Length below which cwe's word counts are smaller."""


def _is_compat(case: Case) -> bool:
    return case.options.get("compat") is not None


def variable_tracking(case: Case) -> Sample:
    """Generate a vt sample: one chain of five variables in noise, after an example of another."""
    rng = case.rng()
    value, example_value = (str(number) for number in rng.sample(range(10_000, 99_999), 2))
    names, example_names = _variables(rng, 5), _variables(rng, 3)
    tokens = min(_EXAMPLE_TOKENS, case.size.length // 2)

    def example(noise: int) -> str:
        sample = _chain(case, noise, example_names, example_value, part="example")
        return sample.context + sample.query + sample.answer_prefix

    noise = len(example_names)
    while len(query_ids(case.size.tokenizer, example(noise + 1))) <= tokens:
        noise += 1
    before = f"{example(noise)} {' '.join(example_names)}\n\n"
    if _is_compat(case):
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
    case: Case, noise: int, names: list[str], value: str, *, part: str = "chain", before: str = ""
) -> Sample:
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {source} " for source, name in itertools.pairwise(names)]
    places = sorted(case.rng(part).sample(range(noise), len(lines)))
    if _is_compat(case):
        filler, joint, assigned = f"{NOISE}\n", " ", "assgined"
    else:
        filler, joint, assigned = NOISE, "\n", "assigned"
    text = joint.join(insert(lines, [filler] * noise, places))
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
    """Return the question for the variables that hold a value, and the beginning of its answer."""
    return (
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above,"
        f" {count} variables are {assigned} the value {value}, they are: ",
    )


def common_words(case: Case) -> Sample:
    """Generate a cwe sample: ten words more frequent than others in a numbered list.

    An example of another list precedes it. If the length takes more words than there are, pairs of
    an adjective and a noun follow, and `meta["pairs"]` counts them. RULER continues with another
    list, whose license is unknown.

    Raises:
        SizeError: The length has no room for words other than the ten.
    """
    compat = _is_compat(case)
    if case.size.length < _SHORT:
        example_words, example_repeats, repeats = 20, (3, 1), (6, 1)
    else:
        example_words, example_repeats = 40, (10, 3)
        repeats = (300, 30) if compat else (30, 3)
    rng = case.rng("example")
    known = words(case.options.get("words"))
    example, answers = word_list(rng, rng.sample(known.all, example_words), *example_repeats)
    gap = "" if compat else " "
    before = f"{CWE_HEAD}{example}\n{CWE_QUERY}{CWE_PREFIX}{gap}{numbered(answers)}\n"

    def build(count: int) -> Sample:
        rng = case.rng()
        pool = rng.sample(known.all, len(known.all))
        pairs = max(0, count - len(pool))
        text, answers = word_list(rng, pool[:count] + _pairs(rng, pairs, known), *repeats)
        return case.sample(
            f"{before}{CWE_HEAD}{text}\n",
            CWE_QUERY,
            CWE_PREFIX,
            answers,
            max_new_tokens=120,
            category="aggregation",
            words=known.release,
            repeats=list(repeats),
            pairs=pairs,
        )

    try:
        return case.size.largest(build, least=_NUM_COMMON + 1)[1]
    except SizeError as error:
        if not compat:
            raise
        raise SizeError(
            f"{error}, or leave out compat: the official variant repeats its {_NUM_COMMON} answers"
            f" {repeats[0]} times each; at lengths without room for other words its list is empty"
            " or contains nothing else"
        ) from None


CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n"
)
CWE_QUERY = f"Question: What are the {_NUM_COMMON} most common words in the above list?"
CWE_PREFIX = f" Answer: The top {_NUM_COMMON} words that appear most often in the list are:"


def word_list(
    rng: random.Random, chosen: list[str], common: int, uncommon: int
) -> tuple[str, list[str]]:
    """Return a numbered list of words, and its ten most frequent ones.

    Args:
        rng: Source of randomness.
        chosen: The words; the first ten are the frequent ones.
        common: Occurrences of each of those.
        uncommon: Occurrences of each other word.
    """
    answers = chosen[:_NUM_COMMON]
    entries = answers * common + chosen[_NUM_COMMON:] * uncommon
    rng.shuffle(entries)
    return numbered(entries), answers


def numbered(entries: list[str]) -> str:
    """Return the entries on one line, numbered from 1."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))


def _pairs(rng: random.Random, count: int, known: Words) -> list[str]:
    draw = Draw(rng, known)
    return [draw("words") for _ in range(count)]


_FEWEST_CODED = 53
"""With fewer coded words, the fourth may be as frequent as the fifth."""


def frequent_words(case: Case) -> Sample:
    """Generate an fwe sample: coded words, whose second to fourth most frequent are asked for.

    The k-th word is k^-2 times as frequent as the first, which is dots.
    """
    vocabulary = max(5, (case.size.length - 50) // 50)

    def build(count: int) -> Sample:
        entries, answers = coded_words(case.rng(), count, vocabulary)
        return case.sample(
            f"{FWE_HEAD}{' '.join(entries)}\n",
            FWE_QUERY,
            FWE_PREFIX,
            answers,
            max_new_tokens=120 if _is_compat(case) else 50,
            category="aggregation",
            alpha=2.0,
        )

    return case.size.largest(build, least=_FEWEST_CODED)[1]


FWE_HEAD = (
    "Read the following coded text and track the frequency of each coded word. Find the three most"
    " frequently appeared coded words. "
)
FWE_QUERY = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three"
    " most frequently appeared words in the above coded text?"
)
FWE_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)


def coded_words(rng: random.Random, count: int, vocabulary: int) -> tuple[list[str], list[str]]:
    """Return about `count` coded words in random order, and the three answers."""
    known: dict[str, None] = {"...": None}
    while len(known) < vocabulary:
        known["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    shares = (count * 6 / math.pi**2 / rank**2 for rank in range(1, vocabulary + 1))
    entries = [word for word, share in zip(known, shares, strict=True) for _ in range(int(share))]
    rng.shuffle(entries)
    return entries, list(known)[1:4]
