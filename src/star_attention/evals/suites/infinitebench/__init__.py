"""InfiniteBench (Zhang et al., arXiv 2402.13718): its 12 tasks' files and scores, and generators for five of them.

A published line has `context, input, answer, options`. Here a short instruction stands in front of the context, and everything
that says what is asked stands behind the cut, in the query: also for math_find and code_run, whose published prompts name the
number or the function in front of the context, where Star Attention's first phase would read the question. The instructions and
the generators' sentences are our own, so that scores come near published ones without being the same measurement. Answers are
scored as published (`compute_scores.py`), after white space around them is removed; deviations are told at the metrics.
"""

from __future__ import annotations

import json
import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals import suites
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites.babilong import scattered
from star_attention.evals.suites.ruler.case import depths
from star_attention.evals.suites.ruler.needles import NOISE, Draw

TASKS = ("passkey", "number_string", "kv_retrieval", "math_find", "code_run")
"""Those with a generator."""
OPTIONS: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a task is asked and scored.

    instruction: in front of the context. question: where a line has no `input`. prefix: of the answer, where `input` does not
    itself end with one, that is with a colon. max_new_tokens: as published.
    """

    metric: str
    max_new_tokens: int
    instruction: str
    question: str = ""
    prefix: str = ""


KINDS = {
    "passkey": Kind(
        metric="first_integer",
        max_new_tokens=6,
        instruction="Somewhere in the text below stands a pass key, among sentences that do not matter. You will be asked for it.",
        question="What is the pass key?",
        prefix="\nThe pass key is",
    ),
    "number_string": Kind(
        metric="first_integer",
        max_new_tokens=12,
        instruction="Somewhere in the text below stands a string of digits, among sentences that do not matter. You will be asked"
        " for it.",
        question="What is the string of digits?",
        prefix="\nThe string of digits is",
    ),
    "kv_retrieval": Kind(
        metric="whole_word",
        max_new_tokens=50,
        instruction="Below is a JSON object. You will be asked for the value of one of its keys.",
        prefix="\nThe value of this key is",
    ),
    "longbook_sum_eng": Kind(
        metric="rouge_lsum",
        max_new_tokens=1200,
        instruction="Read the book below. You will be asked to summarize it.",
        question="Summarize the book.",
        prefix="\nSummary:",
    ),
    "longbook_qa_eng": Kind(
        metric="token_f1",
        max_new_tokens=40,
        instruction="Read the book below. You will be asked a question about it; answer in as few words as you can.",
        prefix="\nAnswer:",
    ),
    "longbook_qa_chn": Kind(
        metric="character_f1",
        max_new_tokens=40,
        instruction="请阅读下面的书，然后用尽量少的字回答一个问题。",  # noqa: RUF001
        prefix="\n回答：",  # noqa: RUF001
    ),
    "longbook_choice_eng": Kind(
        metric="option_letter",
        max_new_tokens=40,
        instruction="Read the book below. You will be asked a question about it, with four options of which one is right; answer"
        " with its letter.",
        prefix="\nThe letter of the right option is",
    ),
    "longdialogue_qa_eng": Kind(
        metric="name_word",
        max_new_tokens=40,
        instruction='Below is the script of a dialogue in which the name of one character is replaced by "$$MASK$$" in one place.',
        question='Which character is "$$MASK$$"? Answer with the name as it stands in the script and nothing else.',
        prefix="\nThe name is",
    ),
    "code_debug": Kind(
        metric="option_function",
        max_new_tokens=5,
        instruction="Below is the code of a project in which one function was given an error on purpose.",
        question="Which of these functions has the error? Answer with the letter of the option.",
        prefix="\nThe letter of the right option is",
    ),
    "code_run": Kind(
        metric="last_integer",
        max_new_tokens=5,
        instruction="Below are functions in Python that call each other. You will be asked what one of them returns.",
        prefix="\nThe value that it returns is",
    ),
    "math_find": Kind(
        metric="first_number",
        max_new_tokens=3,
        instruction="Below is a list of numbers. You will be asked to find one of them.",
    ),
    "math_calc": Kind(
        metric="leading_integers",
        max_new_tokens=30000,
        instruction="Below is a long sum. You will be asked for its value after each of its steps.",
        question="Give the values after each step as a list, beginning with the first number.",
        prefix="\nValues:",
    ),
}
"""All 12 tasks."""

_ORDINALS = ("", "second ", "third ")
_CHAIN = 3
"""Functions that code_run's question goes through."""


def generate(
    task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Sample]:
    """Samples as the published ones are made, with sentences of our own.

    passkey, number_string: a number of 5 or 10 digits in a line among lines of noise, at a random depth. kv_retrieval: a JSON
    object of UUIDs. (meta of these three: `depths`, in percent, as RULER's.) math_find: the largest, second, third largest or
    smallest of a list of two-digit numbers, each of which stands in it once. code_run: a function that calls a second that calls
    a third, each adding or subtracting.

    Raises `SizeError` for a length that is too short, `InvalidInputError` for an unknown task or option.
    """
    suites.check(suites.get("infinitebench"), "infinitebench", task, options)
    least = {
        "passkey": 0,
        "number_string": 0,
        "kv_retrieval": 1,
        "math_find": 0,
        "code_run": _CHAIN,
    }[task]

    def generated(index: int) -> Sample:
        name = f"infinitebench {task} {size.length} {seed} {index}"

        def sample(units: int) -> Sample:
            id = f"{task}-{size.length}-{seed}-{index}"
            return sample_of_units(task, units, random.Random(name), id=id, length=size.length)

        return size.largest(sample, least=least)[1]

    return (generated(index) for index in range(count))


@dataclass(frozen=True, kw_only=True)
class _Made:
    """The parts of a sample that its task does not settle."""

    context: str
    question: str
    answers: tuple[str, ...]
    prefix: str
    meta: Mapping[str, Any]


def _sample(*, id: str, task: str, length: int, made: _Made) -> Sample:
    kind = KINDS[task]
    return Sample(
        id=id,
        task=task,
        length=length,
        context=f"{kind.instruction}\n\n{made.context}\n\n",
        query=made.question,
        answer_prefix=made.prefix,
        answers=made.answers,
        max_new_tokens=kind.max_new_tokens,
        metric=kind.metric,
        meta=made.meta,
    )


# ------------------------------------------------------------------ generators


def sample_of_units(task: str, units: int, rng: random.Random, *, id: str, length: int) -> Sample:
    """A sample whose text has so many lines, pairs, numbers or functions."""
    build = {
        "passkey": _passkey,
        "number_string": _number_string,
        "kv_retrieval": _kv_retrieval,
        "math_find": _math_find,
        "code_run": _code_run,
    }[task]
    return _sample(id=id, task=task, length=length, made=build(units, rng))


def _passkey(lines: int, rng: random.Random) -> _Made:
    digits = str(rng.randrange(10_000, 100_000))
    return _hidden(
        "passkey",
        f"The pass key is {digits}. Do not forget it: {digits} is the pass key.",
        digits,
        lines,
        rng,
    )


def _number_string(lines: int, rng: random.Random) -> _Made:
    """Ten digits in runs: of five digits, one at a time is doubled."""
    runs = [str(rng.randrange(10)) for _ in range(5)]
    for _ in range(5):
        place = rng.randrange(len(runs))
        runs.insert(place, runs[place])
    digits = "".join(runs)
    line = f"The string of digits is {digits}. Do not forget it: {digits} is the string of digits."
    return _hidden("number_string", line, digits, lines, rng)


def _hidden(task: str, line: str, answer: str, lines: int, rng: random.Random) -> _Made:
    before = int(rng.random() * (lines + 1))
    context = "\n".join([NOISE] * before + [line] + [NOISE] * (lines - before))
    return _Made(
        context=context,
        question=KINDS[task].question,
        answers=(answer,),
        prefix=KINDS[task].prefix,
        meta={"depths": depths(context, [line])},
    )


def asked_for_key(key: str) -> str:
    """kv_retrieval's question."""
    return f'What is the value of the key "{key}"?'


def _kv_retrieval(pairs: int, rng: random.Random) -> _Made:
    depth = rng.random()
    draw = Draw(rng, None)
    asked, *others = [(draw("uuids"), draw("uuids")) for _ in range(pairs)]
    others.insert(int(depth * pairs), asked)
    context = json.dumps(dict(others))
    return _Made(
        context=context,
        question=asked_for_key(asked[0]),
        answers=(asked[1],),
        prefix=KINDS["kv_retrieval"].prefix,
        meta={"depths": depths(context, [json.dumps(dict([asked]))[1:-1]])},
    )


def _math_find(numbers: int, rng: random.Random) -> _Made:
    """A list of so many numbers, besides the three smallest and the three largest."""
    smallest = sorted(rng.sample(range(10, 30), 3))
    largest = sorted(rng.sample(range(70, 100), 3), reverse=True)
    rank, end = rng.randrange(3), rng.choice(("smallest", "largest"))
    extremes = [str(number) for number in rng.sample([*smallest, *largest], 6)]
    places = random.Random(rng.random())
    body = [str(rng.randrange(30, 70)) for _ in range(numbers)]
    which = f"{_ORDINALS[rank]}{end}"
    return _Made(
        context=f"[{', '.join(scattered(extremes, body, places))}]",
        question=f"What is the {which} number in the list? Answer with the number and nothing else.",
        answers=(str((smallest if end == "smallest" else largest)[rank]),),
        prefix=f"\nThe {which} number in the list is",
        meta={"which": which},
    )


def _code_run(functions: int, rng: random.Random) -> _Made:
    """So many functions in chains of three (the last may be shorter), in random order; the question asks for the head of one."""
    numbers = rng.sample(range(functions), functions)
    steps = [_step(rng) for _ in range(functions)]
    while True:
        given = rng.randrange(1, 100)
        question = f"What does func_{numbers[0]}({given}) return?"
        answer = str(given + sum(steps[:_CHAIN]))
        if answer not in question:
            break
        steps[:_CHAIN] = [
            _step(rng) for _ in range(_CHAIN)
        ]  # (no number will do where their sum is 0)
    code = []
    for i, (number, step) in enumerate(zip(numbers, steps, strict=True)):
        ends = i % _CHAIN == _CHAIN - 1 or i == functions - 1
        value = "x" if ends else f"func_{numbers[i + 1]}(x)"
        code.append(
            f"def func_{number}(x):\n    return {value} {'+' if step > 0 else '-'} {abs(step)}"
        )
    rng.shuffle(code)
    return _Made(
        context="\n\n".join(code),
        question=question,
        answers=(answer,),
        prefix=KINDS["code_run"].prefix,
        meta={"chain": [f"func_{number}" for number in numbers[:_CHAIN]]},
    )


def _step(rng: random.Random) -> int:
    return rng.choice((-1, 1)) * rng.randrange(1, 50)


# ------------------------------------------------------------------ published files


def sample_of_row(row: Mapping[str, Any], *, task: str, id: str) -> Sample:
    """Of a line of the published files: `context, input, answer, options`, of any of the 12 tasks.

    The query is `input`, or the task's own question where that is empty, with the options below it. `length` is 0.

    Raises `InvalidInputError` for an unknown task, and for fields that are missing or of the wrong kind.
    """
    if task not in KINDS:
        raise InvalidInputError(
            f"task {task!r} is none of InfiniteBench's; choose from {', '.join(KINDS)}"
        )
    kind = KINDS[task]
    context, question, options = row.get("context"), row.get("input", ""), row.get("options") or []
    if not isinstance(context, str) or not isinstance(question, str):
        raise InvalidInputError(f"context and input of {task} are no texts")
    asked = question.strip() or kind.question
    if not asked:
        raise InvalidInputError(f"input of {task} is empty, so that nothing is asked")
    prefix = "" if leads_in(asked) else kind.prefix
    asked += listed(options)
    answers = _answers(task, row.get("answer"), options)
    made = _Made(context=context, question=asked, answers=answers, prefix=prefix, meta={})
    return _sample(id=id, task=task, length=0, made=made)


def leads_in(question: str) -> bool:
    """Whether a question ends with the beginning of its answer, so that none is to be put behind it."""
    return question.rstrip().endswith((":", "\N{FULLWIDTH COLON}"))


def listed(options: Any) -> str:
    """The lines of four options, A to D; nothing for none.

    Raises `InvalidInputError` for anything else.
    """
    if (
        not isinstance(options, list)
        or len(options) not in (0, 4)
        or not all(isinstance(one, str) for one in options)
    ):
        raise InvalidInputError(f"options {options!r} are no list of 4 texts")
    return "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=False))


def _answers(task: str, answer: Any, options: Sequence[str]) -> tuple[str, ...]:
    """As texts. With options: the letter, then the text of the right one. For math_calc: all numbers in their order."""
    answers = [
        str(one) for one in (answer if isinstance(answer, list) else [answer]) if one is not None
    ]
    if task == "math_calc":
        answers = [number for one in answers for number in re.findall(r"-?\d+", one)]
    if not answers or not all(answers):
        raise InvalidInputError(f"answer {answer!r} of {task} is empty")
    if KINDS[task].metric not in ("option_letter", "option_function"):
        return tuple(answers)
    right = [one for one in answers if one in options]
    if len(right) != 1:
        raise InvalidInputError(f"answer {answer!r} of {task} is none of its options {options!r}")
    return "ABCD"[options.index(right[0])], right[0]


# ------------------------------------------------------------------ metrics


def first_integer(prediction: str, sample: Sample) -> float:
    """Whether the first run of digits is an answer, digit for digit."""
    found = re.search(r"[0-9]+", prediction)
    return float(found is not None and found[0] in sample.answers)


def last_integer(prediction: str, sample: Sample) -> float:
    """Whether the last word is the whole number of an answer."""
    right = _values(sample, int)
    words = _words(prediction, "\n.`'\":")
    return float(
        bool(words)
        and re.fullmatch(r"[+-]?[0-9]+", words[-1]) is not None
        and int(words[-1]) in right
    )


def _values(sample: Sample, kind: Callable[[str], float]) -> list[float]:
    """The answers as numbers. Raises `InvalidInputError` for those that are none."""
    try:
        return [kind(answer) for answer in sample.answers]
    except ValueError:
        raise InvalidInputError(
            f"metric {sample.metric} of sample {sample.id} needs numbers, not {', '.join(sample.answers)}"
        ) from None


def first_number(prediction: str, sample: Sample) -> float:
    """Whether the first number, decimals included and signs not, has the value of an answer."""
    right = _values(sample, float)
    found = re.search(r"[0-9]+(\.[0-9]+)?", prediction)
    return float(found is not None and float(found[0]) in right)


def leading_integers(prediction: str, sample: Sample) -> float:
    """The share of the answers, in their order, before the first that differs from the prediction's numbers (signs left out, as in
    the published score; the answers' too, so that a right prediction scores 1).
    """
    given = [int(number) for number in re.findall(r"[0-9]+", prediction)]
    right = [abs(value) for value in _values(sample, int)]
    pairs = zip(given, right, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / len(right)


def whole_word(prediction: str, sample: Sample) -> float:
    """Whether an answer is one of the words."""
    return float(any(answer in _words(prediction, _MARKS) for answer in sample.answers))


def name_word(prediction: str, sample: Sample) -> float:
    """Whether a name is one of the words, in whatever case."""
    words = [word.upper() for word in _words(prediction, _MARKS)]
    return float(any(answer.upper() in words for answer in sample.answers))


_MARKS = "\n:\"'.,?!{}"


def _words(text: str, marks: str) -> list[str]:
    return text.translate(dict.fromkeys(map(ord, marks), " ")).split()


def option_letter(prediction: str, sample: Sample) -> float:
    """Of a choice among A to D: the letter that the prediction begins with; else what follows "answer is" or the like, letter or
    text; else the first word that is such a letter.
    """
    given = prediction.strip()
    if given[:1] in set("ABCD"):
        return float(given[0] in sample.answers)
    given = " ".join(_words(given, "\n\"'.,?!{}"))
    after = _behind(given, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return float(after.startswith(sample.answers))
    letters = [word for word in given.split() if word in set("ABCD")]
    return float(bool(letters) and letters[0] in sample.answers)


def option_function(prediction: str, sample: Sample) -> float:
    """Of a choice among functions: the letter with "." or ":" in front, or letter or name behind "answer:" or the like. Here the
    letter alone counts as well, which the published score takes for wrong.
    """
    given, letter = prediction.strip(), sample.answers[0]
    if given == letter or given[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    given = re.sub(r"[\n`'\"*-]|[Oo]ption", " ", given)
    after = _behind(" ".join(given.split()), ("answer is:", "is:", "answer:"))
    return float(after is not None and after.startswith(sample.answers))


def _behind(text: str, leads: tuple[str, ...]) -> str | None:
    """What stands behind the first of the leads that is in a text at all, less the character behind it."""
    for lead in leads:
        if lead in text:
            return text.partition(lead)[2][1:]
    return None


def token_f1(prediction: str, sample: Sample) -> float:
    """F1 of words, in lower case, without ASCII punctuation and articles; of the answer that it is highest for."""
    return max(_f1(_plain_words(prediction), _plain_words(answer)) for answer in sample.answers)


def _plain_words(text: str) -> list[str]:
    bare = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def character_f1(prediction: str, sample: Sample) -> float:
    """F1 of characters, in lower case, without white space, ASCII and Chinese punctuation; of the answer that it is highest for."""
    return max(
        _f1(_plain_characters(prediction), _plain_characters(answer)) for answer in sample.answers
    )


def _plain_characters(text: str) -> list[str]:
    return [one for one in text.lower() if not one.isspace() and not _is_mark(one)]


def _is_mark(one: str) -> bool:
    """Punctuation of ASCII, in full width as well, of Chinese, and quotation marks and dashes."""
    if unicodedata.normalize("NFKC", one) in string.punctuation:
        return True
    return unicodedata.category(one)[0] == "P" and (
        "\u2010" <= one <= "\u2027" or "\u3000" <= one <= "\uffef"
    )


def _f1(given: Sequence[str], right: Sequence[str]) -> float:
    same = sum((Counter(given) & Counter(right)).values())
    return 2 * same / (len(given) + len(right)) if same else 0.0


def rouge_lsum(prediction: str, sample: Sample) -> float:
    """ROUGE-Lsum (Lin 2004, section 3.2), F-measure without stemming, a line a sentence; of the answer that it is highest for."""
    return max(_rouge_lsum(_lines(prediction), _lines(answer)) for answer in sample.answers)


def _lines(text: str) -> list[list[str]]:
    return [re.findall(r"[a-z0-9]+", line) for line in text.lower().split("\n")]


def _rouge_lsum(given: list[list[str]], right: list[list[str]]) -> float:
    """For each line of the answer, its words in a longest common subsequence with any line of the prediction; each word of the
    prediction serves once.
    """
    left = Counter(word for line in given for word in line)
    total = sum(left.values()) + sum(map(len, right))
    hits = 0
    for line in right:
        for place in sorted({place for other in given for place in _common(line, other)}):
            if left[line[place]]:
                left[line[place]] -= 1
                hits += 1
    return 2 * hits / total if hits else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> list[int]:
    """Places in `a` of a longest common subsequence with `b`."""
    lengths = [[0] * (len(b) + 1)]
    for one in a:
        above, row = lengths[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if one == other else max(above[j + 1], row[j]))
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
