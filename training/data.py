"""Training documents in the formats of the evaluations: many questions on one context, each with its answer.

A document is what a model sees in an evaluation, `<bos>{context}{query}{answer prefix}`, with the answer and `<eos>` behind
it, and more questions on the same context behind that. Pieces are tokenized by themselves where the tokenizer cuts anyway,
so that the joined ids are those of the joined text.

Held apart from the evaluations: the words of keys and lists (`sources.words("train")`), and the prose (docstrings of the standard
library here, its language reference there).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import multiprocessing
import random
import re
import string
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from star_attention.evals.samples import sources
from star_attention.evals.suites import babilong, infinitebench, shared
from star_attention.evals.suites.babilong import world
from star_attention.evals.suites.babilong.prompts import ASK, frame
from star_attention.evals.suites.ruler import lists, needles
from star_attention.evals.suites.ruler.needles import NOISE, Draw

TOKENIZER = Path(__file__).parents[1] / "models" / "needle-17m"

_PIECE = re.compile(r"\n| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s")
"""Where the bundled tokenizer cuts before it looks at anything else (`TOKENIZER`'s tokenizer.json)."""

_SPECIAL = re.compile(r"(<\|q\|>|<\|a\|>)")


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


class Encoder:
    """Text to ids, a piece at a time, each piece looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self.bos, self.eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            for piece in [part] if _SPECIAL.fullmatch(part) else _PIECE.findall(part):
                known = self._known.get(piece)
                if known is None:
                    known = tuple(self._tokenizer(piece, add_special_tokens=False).input_ids)
                    self._known[piece] = known
                ids += known
        return ids


@dataclass(frozen=True, kw_only=True)
class Question:
    task: str
    asked: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """`hint`: an answer that stands within the context itself (of an example) and counts as one, of `questions[0]`'s task."""

    context: str
    questions: list[Question]
    hint: str = ""


# --------------------------------------------------------------------------------------------- prose


@functools.cache
def prose() -> tuple[str, ...]:
    """Sentences of the standard library's docstrings, in the order of its files."""
    found: dict[str, None] = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
                text := ast.get_docstring(node)
            ):
                for paragraph in text.split("\n\n"):
                    found |= dict.fromkeys(filter(_is_prose, sources.split_sentences(paragraph)))
    return tuple(found)


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        30 <= len(sentence) <= 300
        and sentence.isascii()
        and sentence[0].isupper()
        and sentence[-1] in ".!?"
        and letters >= 0.9 * len(sentence)
    )


# --------------------------------------------------------------------------------------------- documents


BOS = ("document", "row")


@dataclass(kw_only=True)
class Maker:
    """Documents of about `room` tokens in all, for one random generator.

    bos: whether `<bos>` stands before each `document` of a row, or before the `row`'s first one.
    """

    rng: random.Random
    encode: Encoder
    part: str = "train"
    bos: str = "document"

    def document(self, room: int) -> Document:
        able = {kind: share for kind, (share, least, _) in _KINDS.items() if room >= least}
        kind = self.rng.choices(list(able), list(able.values()))[0]
        return _KINDS[kind][2](self, room)

    def size(self, text: str) -> int:
        return len(self.encode(text))

    def filled(self, sentences: Callable[[], str], room: int, joint: str) -> list[str]:
        """As many sentences as `room` tokens hold."""
        text: list[str] = []
        joined = self.size(joint) if joint.strip() else 0
        while (taken := self.size(joint + (one := sentences())) + joined) <= room:
            room -= taken
            text.append(one)
        return text

    def prose(self) -> Callable[[], str]:
        """Its sentences from a random one on."""
        lines = prose()
        at = self.rng.randrange(len(lines))

        def following() -> str:
            nonlocal at
            at = (at + 1) % len(lines)
            return lines[at]

        return following

    def scattered(self, hidden: list[str], sentences: list[str]) -> list[str]:
        """Hidden ones in their order at random places."""
        places = sorted(self.rng.randrange(len(sentences) + 1) for _ in hidden)
        return needles.planted(sentences, hidden, places)

    def size_of(self, questions: list[Question]) -> int:
        """With what ends each answer."""
        return sum(
            self.size(question.asked) + self.size(question.answer) + 1 for question in questions
        )

    def asked(self, room: int, each: int = 60) -> int:
        """How many questions a document has: up to one in `each` tokens, which half of the documents have."""
        most = max(1, min(32, room // each))
        return most if self.rng.random() < 0.5 else self.rng.randint(1, most)


def _needles(maker: Maker, room: int) -> Document:
    """RULER's needle tasks, several keys at once."""
    rng = maker.rng
    draw = Draw(rng, sources.words(maker.part))
    haystack = rng.choice(("repeat", "needle", "essay"))
    keys = rng.choices(("words", "uuids"), (0.85, 0.15))[0]
    values = rng.choices(("numbers", "uuids"), (0.7, 0.3))[0]
    number = maker.asked(room if values == "numbers" and keys == "words" else room // 3)
    several = rng.random() < 0.3
    facts: dict[str, list[str]] = {}
    for _ in range(number):
        count = rng.choice((2, 3, 4)) if several and rng.random() < 0.5 else 1
        facts[draw(keys)] = [draw(values) for _ in range(count)]
    hidden = [(key, value) for key, found in facts.items() for value in found]
    rng.shuffle(hidden)
    # All answers of one key in the order of the text, which is the only one that can be learned.
    facts = {key: [value for other, value in hidden if other == key] for key in facts}
    groups = [[key] for key in facts]
    single = [key for key, found in facts.items() if len(found) == 1]
    if len(single) >= 4 and rng.random() < 0.5:
        groups.append(rng.sample(single, rng.randint(2, 4)))
    rng.shuffle(groups)
    questions = [
        _needle_question(group, [value for key in group for value in facts[key]], values)
        for group in groups
    ]
    planted = [needles.sentence(key, value, values) for key, value in hidden]
    one = len(questions) == 1 and len(hidden) == 1
    head = needles.head(values, one=one)
    joint = " " if haystack == "essay" else "\n"
    rest = room - maker.size(head + joint.join(planted)) - maker.size_of(questions)
    while rest < 0 and len(questions) > 1:
        rest += maker.size_of([questions.pop()])
    if haystack == "essay":
        filler = maker.filled(maker.prose(), rest, joint)
    elif haystack == "repeat":
        filler = maker.filled(lambda: NOISE, rest, joint)
    else:
        filler = maker.filled(
            lambda: needles.sentence(draw(keys), draw(values), values), rest, joint
        )
    return Document(
        context=head + joint.join(maker.scattered(planted, filler)) + "\n", questions=questions
    )


def _needle_question(keys: list[str], answers: list[str], values: str) -> Question:
    query, prefix = needles.question(keys, values, one=len(answers) == 1)
    task = "needles" if len(answers) == 1 else "multivalue" if len(keys) == 1 else "multiquery"
    return Question(task=task, asked=query + prefix, answer=f" {', '.join(answers)}")


def _secrets(maker: Maker, room: int) -> Document:
    """The format of the demo and the chat template: one fact a line, the question between two marks."""
    rng = maker.rng
    draw = Draw(rng, sources.words(maker.part))
    kind = rng.choice(("number", "number", "code"))

    def value() -> str:
        if kind == "number":
            return draw("numbers")
        code = f"{rng.getrandbits(32):08x}"
        return f"{code[:4]}-{code[4:]}"

    facts = {
        draw("words") if rng.random() < 0.8 else draw("words").partition("-")[2]: value()
        for _ in range(maker.asked(room))
    }
    questions = []
    for key, found in facts.items():
        start = f"The secret {kind} for {key} is"
        given = rng.random() < 0.5  # whether the answer's beginning is given, or the model's own
        questions.append(
            Question(
                task="secrets",
                asked=f"<|q|>What is the secret {kind} for {key}?<|a|>{start if given else ''}",
                answer=f" {found}" if given else f"{start} {found}",
            )
        )
    hidden = [f"The secret {kind} for {key} is {found}." for key, found in facts.items()]
    rest = room - maker.size("\n".join(hidden)) - maker.size_of(questions)
    filler = maker.filled(maker.prose() if rng.random() < 0.7 else lambda: NOISE, rest, "\n")
    rng.shuffle(questions)
    return Document(context="\n".join(maker.scattered(hidden, filler)) + "\n", questions=questions)


def _chains(maker: Maker, room: int) -> Document:
    """RULER's variable tracking: an example with its answer, then one chain or several."""
    rng = maker.rng
    shown, hint = "", ""
    if room >= 1000 and rng.random() < 0.7:
        text, asked = _chain_text(maker, rng.randint(150, min(500, room // 2)), letters=3, chains=1)
        # (In a context, its beginning is no cut.)
        hint = f" {asked[0].answer}"
        shown = f"{text}{asked[0].asked.rstrip()}"
    text, questions = _chain_text(
        maker, room - maker.size(f"{shown}{hint}\n\n"), letters=5, chains=rng.randint(1, 4)
    )
    if shown:
        return Document(context=f"{shown}{hint}\n\n{text}", questions=questions, hint=hint)
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
        questions.append(Question(task="vt", asked=query + prefix, answer=" ".join(own)))
    flat = [line for own in lines for line in own]
    rest = room - maker.size(lists.CHAIN_HEAD + "\n".join(flat)) - maker.size_of(questions)
    text = maker.filled(lambda: NOISE, max(0, rest - 8), "\n")
    # Each chain in its order, the chains among one another at random.
    put = sorted(
        (place, one, line)
        for one, own in enumerate(lines)
        for place, line in zip(sorted(rng.random() for _ in own), own, strict=True)
    )
    placed = needles.planted(
        text,
        [line for _, _, line in put],
        sorted(int(place * (len(text) + 1)) for place, _, _ in put),
    )
    rng.shuffle(questions)
    return f"{lists.CHAIN_HEAD}{chr(10).join(placed)}\n", questions


def _common(maker: Maker, room: int) -> Document:
    """RULER's common words: an example with its answer, then the list."""
    rng = maker.rng
    pool = sources.words(maker.part).all
    short = room < 4096
    shown, repeats = (20, (3, 1)) if short else (40, (10, 3))
    text, answers = lists.listed(rng, rng.sample(pool, shown), *repeats)
    hint = f" {lists.numbered(answers)}"
    asked = lists.CWE_QUERY + lists.CWE_PREFIX
    before = f"{lists.CWE_HEAD}{text}\n{asked}{hint}\n"
    common, uncommon = (6, 1) if short else (30, 3)
    count = 10
    rest = room - maker.size(before + lists.CWE_HEAD + asked) - 60
    each = 6.5  # tokens of an entry, about: its number, a full stop, a word
    count = max(11, int((rest / each - 10 * common) / uncommon) + 10)
    while True:
        text, answers = lists.listed(rng, rng.sample(pool, min(count, len(pool))), common, uncommon)
        over = maker.size(text) - rest
        if over <= 0 or count <= 11:
            break
        count = max(11, count - max(1, math.ceil(over / each / uncommon)))
    return Document(
        context=f"{before}{lists.CWE_HEAD}{text}\n",
        questions=[Question(task="cwe", asked=asked, answer=f" {lists.numbered(answers)}")],
        hint=hint,
    )


def _frequent(maker: Maker, room: int) -> Document:
    """RULER's frequent words."""
    query, prefix = lists.FWE_QUERY, lists.FWE_PREFIX
    rest = room - maker.size(lists.FWE_HEAD + query + prefix) - 40
    vocabulary = max(5, room // 50)
    number, state = max(60, rest // 3), maker.rng.getstate()
    while True:
        maker.rng.setstate(state)
        entries, answers = lists.coded(maker.rng, number, vocabulary)
        text = " ".join(entries)
        taken = maker.size(text)
        if taken <= rest or number <= 60:
            break
        number = max(60, min(number - 1, int(0.99 * number * rest / taken)))
    question = Question(task="fwe", asked=query + prefix, answer=f" {', '.join(answers)}")
    return Document(context=f"{lists.FWE_HEAD}{text}\n", questions=[question])


_STORIES = {"qa1": 1, "qa2": 3, "qa3": 4, "qa4": 1, "qa5": 1}
"""Shares of the stories."""


def _stories(maker: Maker, room: int) -> Document:
    """BABILong's stories, with everything that can be asked of them, easier tasks' questions among it.

    Half of them go on behind the questions, a few facts and questions at a time: what changes from one fact to the next is what
    has to be learned.
    """
    rng = maker.rng
    task = rng.choices(list(_STORIES), list(_STORIES.values()))[0]
    least, most = world.FACTS[task]
    facts = rng.randint(least, max(least, min(most, room // 60)))
    goes_on = task != "qa4" and rng.random() < 0.5
    first, *others = world.chapters(
        task, [facts, *(rng.randint(1, 4) for _ in range(24 * goes_on))], rng
    )
    around = frame(task)
    questions = _story_questions(first, task, maker.asked(room, 30), rng)
    rest = (
        room
        - maker.size(around.before + around.after + " ".join(first.facts))
        - maker.size_of(questions)
    )
    most_of_rest = rng.random() * rest
    for chapter in others:
        more = _story_questions(chapter, task, rng.randint(1, 3), rng)
        told = f"{' '.join(chapter.facts)}\n"
        more[0] = dataclasses.replace(more[0], asked=f"{told}{more[0].asked}")
        taken = maker.size_of(more)
        if taken > most_of_rest:
            break
        rest, most_of_rest = rest - taken, most_of_rest - taken
        questions += more
    filler = maker.filled(maker.prose(), max(0, rest - 8), " ")
    text = babilong.scattered(first.facts, filler, rng)
    return Document(context=f"{around.before}{' '.join(text)}{around.after}", questions=questions)


def _story_questions(
    chapter: world.Chapter, task: str, count: int, rng: random.Random
) -> list[Question]:
    """Two of three, as far as they go, are of the task itself."""
    asked = {
        one: [(one, *pair) for kind in kinds for pair in kind]
        for one, kinds in chapter.asked.items()
    }
    own = asked.pop(task)
    others = [pair for pairs in asked.values() for pair in pairs]
    chosen = rng.sample(own, min(len(own), math.ceil(count * 2 / 3)))
    chosen += rng.sample(others, min(len(others), count - len(chosen)))
    rng.shuffle(chosen)
    return [
        Question(task=one, asked=f"{ASK}{asks}", answer=f" {answer}")
        for one, asks, answer in chosen
    ]


def _searches(maker: Maker, room: int) -> Document:
    """InfiniteBench's pass keys, strings of digits, and largest and smallest numbers."""
    rng = maker.rng
    task = rng.choice(("passkey", "number_string", "math_find"))
    seed = rng.random()

    def sized(units: int) -> tuple[int, Document]:
        sample = infinitebench.sample_of_units(task, units, random.Random(seed), id="", length=0)
        question = Question(
            task=task, asked=sample.query + sample.answer_prefix, answer=f" {sample.answers[0]}"
        )
        document = Document(context=sample.context, questions=[question])
        return maker.size(document.context) + maker.size_of(document.questions), document

    none, document = sized(0)
    each = (sized(50)[0] - none) / 50
    units = int((room - none) / each)
    while units > 0:
        taken, document = sized(units)
        if taken <= room:
            break
        units -= math.ceil((taken - room) / each)
    return document


def _pairs(maker: Maker, room: int) -> Document:
    """InfiniteBench's keys and values, several asked for."""
    each, asked = 75, 80  # tokens of a pair and of a question with its answer, about
    questions = max(1, min(12, maker.asked(room, 300)))
    pairs = max(questions, (room - 40 - questions * asked) // each)
    context, found = shared.key_values(pairs, questions, maker.rng)
    return Document(
        context=context,
        questions=[
            Question(task="kv_retrieval", asked=one.query + one.prefix, answer=f" {one.answer}")
            for one in found
        ],
    )


_KINDS: dict[str, tuple[float, int, Callable[[Maker, int], Document]]] = {
    "needles": (33, 0, _needles),
    "secrets": (6, 0, _secrets),
    "chains": (11, 0, _chains),
    "common": (8, 1000, _common),
    "frequent": (6, 256, _frequent),
    "stories": (30, 400, _stories),
    "searches": (3, 150, _searches),
    "pairs": (3, 400, _pairs),
}
"""Share of documents, fewest tokens that one takes, and what makes it."""

TASKS = (
    *("needles", "multivalue", "multiquery", "secrets", "vt", "cwe", "fwe"),
    *babilong.TASKS,
    *("passkey", "number_string", "math_find", "kv_retrieval"),
)
"""What an answer's mask says, from `ANSWER` on."""

ANSWER = 2
"""From here on a row's mask names the task whose answer a token belongs to; 1 is any other text, 0 filler and `<bos>`."""


# --------------------------------------------------------------------------------------------- rows


def encoded(document: Document, encode: Encoder) -> tuple[list[int], list[int]]:
    """A document's ids and its mask: 0 for `<bos>`, 1 for text, `ANSWER` and more for answers and the `<eos>` behind them."""
    before, hint, after = (
        document.context.partition(document.hint) if document.hint else (document.context, "", "")
    )
    ids, mask = [encode.bos], [0]

    def put(text: str, kind: int, *, end: bool = False) -> None:
        new = [*encode(text), *([encode.eos] if end else [])]
        ids.extend(new)
        mask.extend([kind] * len(new))

    first = TASKS.index(document.questions[0].task) + ANSWER
    for text, kind in ((before, 1), (hint, first), (after, 1)):
        put(text, kind)
    for question in document.questions:
        put(question.asked, 1)
        put(question.answer, TASKS.index(question.task) + ANSWER, end=True)
    return ids, mask


_TRIES = 8
"""Documents made for a place in a row before it is left empty: some kinds are now and then longer than they should be, and one that
is cut off would lose its questions."""


def row(length: int, maker: Maker) -> tuple[list[int], list[int]]:
    """Whole documents one behind another, `length` tokens in all with the filler; half of the rows are one document alone."""
    ids: list[int] = []
    mask: list[int] = []
    least = min(192, length)
    while length - len(ids) >= least:
        left = length - len(ids)
        room = (
            left if left < 2 * least or maker.rng.random() < 0.5 else maker.rng.randint(least, left)
        )
        tries = (
            encoded(maker.document(room - 1), maker.encode) for _ in range(_TRIES)
        )  # (less `<bos>`)
        some_ids, some_mask = next((made for made in tries if len(made[0]) <= left), ([], []))
        if not some_ids:
            break
        if ids and maker.bos == "row":
            some_ids, some_mask = some_ids[1:], some_mask[1:]
        ids += some_ids
        mask += some_mask
    filler = length - len(ids)
    return ids + [0] * filler, mask + [0] * filler


def batch(rows: int, length: int, maker: Maker) -> tuple[Tensor, Tensor]:
    """`[rows, length]` each: ids in int16, mask in uint8."""
    made = [row(length, maker) for _ in range(rows)]
    return (
        torch.tensor([ids for ids, _ in made], dtype=torch.int16),
        torch.tensor([mask for _, mask in made], dtype=torch.uint8),
    )


def held_out(rows: int, length: int, seed: int, tokenizer: Path, bos: str) -> tuple[Tensor, Tensor]:
    """Rows of the words that training does not see."""
    maker = Maker(
        rng=random.Random(f"held out {seed} {length}"),
        encode=Encoder(load_tokenizer(tokenizer)),
        part="eval",
        bos=bos,
    )
    return batch(rows, length, maker)


Shape = tuple[int, int, int]
"""Step, rows, length."""


class Feed:
    """Batches for the steps in their order, made by processes beside the training: the same ones, however many they are."""

    def __init__(
        self, shapes: list[Shape], seed: int, tokenizer: Path, *, workers: int, bos: str
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._queues = [context.Queue(maxsize=4) for _ in range(workers)]
        self._steps = len(shapes)
        self._processes = [
            context.Process(
                target=_work,
                args=(queue, shapes[number::workers], seed, tokenizer, bos),
                daemon=True,
            )
            for number, queue in enumerate(self._queues)
        ]

    def __enter__(self) -> Feed:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self._steps):
            ids, mask = self._queues[step % len(self._queues)].get(timeout=600)
            yield torch.from_numpy(ids), torch.from_numpy(mask)


def _work(queue: Any, shapes: list[Shape], seed: int, tokenizer: Path, bos: str) -> None:
    torch.set_num_threads(1)
    encode = Encoder(load_tokenizer(tokenizer))
    for step, rows, length in shapes:
        maker = Maker(rng=random.Random(f"train {seed} {step}"), encode=encode, bos=bos)
        ids, mask = batch(rows, length, maker)
        queue.put((ids.numpy(), mask.numpy()))
