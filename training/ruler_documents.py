"""Documents of RULER's tasks, and of the demo's facts."""

from __future__ import annotations

import math
import string
from itertools import pairwise

from star_attention.evals.samples.building import NOISE, Draw, insert
from star_attention.evals.suites.ruler import lists
from star_attention.tools import needles
from training.documents import Document, Maker, Question


def needle_document(maker: Maker, room: int) -> Document:
    """Hide needles as in RULER, with several questions on the same text."""
    rng = maker.rng
    draw = Draw(rng, maker.words)
    haystack = rng.choice(("repeat", "needle", "essay"))
    keys = rng.choices(("words", "uuids"), (0.85, 0.15))[0]
    values = rng.choices(("numbers", "uuids"), (0.7, 0.3))[0]
    is_short = values == "numbers" and keys == "words"
    number = maker.num_questions(room if is_short else room // 3)
    is_multivalue = rng.random() < 0.3
    facts: dict[str, list[str]] = {}
    for _ in range(number):
        count = rng.choice((2, 3, 4)) if is_multivalue and rng.random() < 0.5 else 1
        facts[draw(keys)] = [draw(values) for _ in range(count)]
    pairs = [(key, value) for key, own in facts.items() for value in own]
    rng.shuffle(pairs)
    # Answers list the values of a key in the order of the text: no other order can be learned.
    facts = {key: [value for other, value in pairs if other == key] for key in facts}
    groups = [[key] for key in facts]
    single = [key for key, own in facts.items() if len(own) == 1]
    if len(single) >= 4 and rng.random() < 0.5:
        groups.append(rng.sample(single, rng.randint(2, 4)))
    rng.shuffle(groups)
    questions = [
        _needle_question(group, [value for key in group for value in facts[key]], values)
        for group in groups
    ]
    hidden = [needles.needle(key, value, values) for key, value in pairs]
    head = needles.head(values, single=len(questions) == 1 and len(pairs) == 1)
    joint = " " if haystack == "essay" else "\n"
    rest = room - maker.size(head + joint.join(hidden)) - maker.size_of(questions)
    while rest < 0 and len(questions) > 1:
        rest += maker.size_of([questions.pop()])
    if haystack == "essay":
        filler = maker.fill(maker.prose(), rest, joint)
    elif haystack == "repeat":
        filler = maker.fill(lambda: NOISE, rest, joint)
    else:
        filler = maker.fill(lambda: needles.needle(draw(keys), draw(values), values), rest, joint)
    text = joint.join(maker.scatter(hidden, filler))
    return Document(context=f"{head}{text}\n", questions=questions)


def _needle_question(keys: list[str], answers: list[str], values: str) -> Question:
    query, prefix = needles.question(keys, values, single=len(answers) == 1)
    task = "needles" if len(answers) == 1 else "multivalue" if len(keys) == 1 else "multiquery"
    return Question(task=task, text=query + prefix, answer=f" {', '.join(answers)}")


def secret_document(maker: Maker, room: int) -> Document:
    """State facts as in the demo, one per line; questions are between the chat template's marks."""
    rng = maker.rng
    draw = Draw(rng, maker.words)
    kind = rng.choice(("number", "number", "code"))

    def value() -> str:
        if kind == "number":
            return draw("numbers")
        code = f"{rng.getrandbits(32):08x}"
        return f"{code[:4]}-{code[4:]}"

    facts = {
        draw("words") if rng.random() < 0.8 else draw("words").partition("-")[2]: value()
        for _ in range(maker.num_questions(room))
    }
    questions = []
    for key, secret in facts.items():
        start = f"The secret {kind} for {key} is"
        has_prefix = rng.random() < 0.5
        questions.append(
            Question(
                task="secrets",
                text=f"<|q|>What is the secret {kind} for {key}?<|a|>{start if has_prefix else ''}",
                answer=f" {secret}" if has_prefix else f"{start} {secret}",
            )
        )
    hidden = [f"The secret {kind} for {key} is {secret}." for key, secret in facts.items()]
    rest = room - maker.size("\n".join(hidden)) - maker.size_of(questions)
    filler = maker.fill(maker.prose() if rng.random() < 0.7 else lambda: NOISE, rest, "\n")
    rng.shuffle(questions)
    return Document(context="\n".join(maker.scatter(hidden, filler)) + "\n", questions=questions)


def chain_document(maker: Maker, room: int) -> Document:
    """Track variables as in RULER: an example with its answer, then one to four chains."""
    rng = maker.rng
    example, hint = "", ""
    if room >= 1000 and rng.random() < 0.7:
        text, (question,) = _chain_text(
            maker, rng.randint(150, min(500, room // 2)), letters=3, chains=1
        )
        hint = f" {question.answer}"
        # The prefix ends in a space, and the hint begins with one.
        example = f"{text}{question.text.rstrip()}"
    text, questions = _chain_text(
        maker, room - maker.size(f"{example}{hint}\n\n"), letters=5, chains=rng.randint(1, 4)
    )
    if example:
        return Document(context=f"{example}{hint}\n\n{text}", questions=questions, hint=hint)
    return Document(context=text, questions=questions)


def _chain_text(
    maker: Maker, room: int, *, letters: int, chains: int
) -> tuple[str, list[Question]]:
    rng = maker.rng
    names = [
        *dict.fromkeys("".join(rng.choices(string.ascii_uppercase, k=letters)) for _ in range(40))
    ]
    values = rng.sample(range(10_000, 99_999), chains)
    lines: list[list[str]] = []
    questions = []
    for chain, value in enumerate(values):
        own = names[5 * chain : 5 * chain + 5]
        lines.append(
            [f"VAR {own[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(own))]
        )
        query, prefix = lists.chain_question(str(value), len(own))
        questions.append(Question(task="vt", text=query + prefix, answer=" ".join(own)))
    flat = "\n".join(line for own in lines for line in own)
    rest = room - maker.size(lists.CHAIN_HEAD + flat) - maker.size_of(questions)
    filler = maker.fill(lambda: NOISE, max(0, rest - 8), "\n")
    # The lines of a chain stay in order; the chains are interleaved at random.
    placed = sorted(
        (place, chain, line)
        for chain, own in enumerate(lines)
        for place, line in zip(sorted(rng.random() for _ in own), own, strict=True)
    )
    text = insert(
        [line for _, _, line in placed],
        filler,
        sorted(int(place * (len(filler) + 1)) for place, _, _ in placed),
    )
    rng.shuffle(questions)
    return f"{lists.CHAIN_HEAD}{chr(10).join(text)}\n", questions


def common_word_document(maker: Maker, room: int) -> Document:
    """List common words as in RULER: an example with its answer, then the list."""
    rng = maker.rng
    pool = maker.words.all
    short = room < 4096
    example_words, example_repeats = (20, (3, 1)) if short else (40, (10, 3))
    text, answers = lists.word_list(rng, rng.sample(pool, example_words), *example_repeats)
    hint = f" {lists.numbered(answers)}"
    question = lists.CWE_QUERY + lists.CWE_PREFIX
    before = f"{lists.CWE_HEAD}{text}\n{question}{hint}\n"
    common, uncommon = (6, 1) if short else (30, 3)
    rest = room - maker.size(before + lists.CWE_HEAD + question) - 60
    entry_size = 6.5  # tokens of an entry, about: its number, a full stop, a word
    count = max(11, int((rest / entry_size - 10 * common) / uncommon) + 10)
    while True:
        chosen = rng.sample(pool, min(count, len(pool)))
        text, answers = lists.word_list(rng, chosen, common, uncommon)
        excess = maker.size(text) - rest
        if excess <= 0 or count <= 11:
            break
        count = max(11, count - max(1, math.ceil(excess / entry_size / uncommon)))
    return Document(
        context=f"{before}{lists.CWE_HEAD}{text}\n",
        questions=[Question(task="cwe", text=question, answer=f" {lists.numbered(answers)}")],
        hint=hint,
    )


def frequent_word_document(maker: Maker, room: int) -> Document:
    """List coded words as in RULER."""
    query, prefix = lists.FWE_QUERY, lists.FWE_PREFIX
    rest = room - maker.size(lists.FWE_HEAD + query + prefix) - 40
    vocabulary = max(5, room // 50)
    count, state = max(60, rest // 3), maker.rng.getstate()
    while True:
        maker.rng.setstate(state)
        entries, answers = lists.coded_words(maker.rng, count, vocabulary)
        text = " ".join(entries)
        taken = maker.size(text)
        if taken <= rest or count <= 60:
            break
        count = max(60, min(count - 1, int(0.99 * count * rest / taken)))
    question = Question(task="fwe", text=query + prefix, answer=f" {', '.join(answers)}")
    return Document(context=f"{lists.FWE_HEAD}{text}\n", questions=[question])
