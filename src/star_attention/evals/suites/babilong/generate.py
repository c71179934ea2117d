"""BABILong's generator: the facts of a short story, scattered in a long text.

Our own simulation writes the stories (`stories`), so they are not the published samples; those are
read by `evals/formats/babilong.py`. The prompt is an instruction, worked examples, the form of the
answer, the text between `<context>` and `</context>`, and `Question: ...`. Without the published
file of prompts its sentences are our own, which the bundled model was trained on: scores come close
to published ones without being the same measurement. Answers are scored as published.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals.samples.building import scatter
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.samples.sources import prose
from star_attention.evals.suites.babilong.prompts import Frame, read_frame
from star_attention.evals.suites.babilong.stories import ACTORS, FACTS, Story, story

MAX_NEW_TOKENS = 20
FACTS_SHARE = 8
"""Facts take at most 1 / FACTS_SHARE of a sample's tokens."""


def generate(
    task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Sample]:
    """Generate samples whose facts, in order, are scattered among sentences of `background`.

    The background starts at a random sentence and starts over after its last. Sentences that name a
    person of the stories are left out, so that only the facts mention them. A story has fewer
    facts than drawn if they would take more than an eighth of the length.

    `meta` has `facts`, their number; `evidence`, the facts themselves; name and hash of the
    background; and the hash of published prompts.

    Raises:
        InvalidInputError: Background or prompts cannot be read.
        SizeError: The length is too short.
    """
    filler = _background(options.get("background"))
    meta = prose(options.get("background")).meta
    frame = read_frame(task, options.get("prompts"))
    return (
        _generate(task, size, f"{task} {size.length} {seed} {index}", filler, frame, meta)
        for index in range(count)
    )


def _generate(
    task: str, size: Size, name: str, filler: Sequence[str], frame: Frame, meta: Mapping[str, str]
) -> Sample:
    tale = _fitting_story(task, size, name)
    start = random.Random(f"babilong {name} start").randrange(len(filler))

    def build(sentences: int) -> Sample:
        text = [filler[(start + i) % len(filler)] for i in range(sentences)]
        text = scatter(tale.facts, text, random.Random(f"babilong {name} places"))
        return framed_sample(
            frame,
            id=name.replace(" ", "-"),
            task=task,
            length=size.length,
            text=" ".join(text),
            question=tale.question,
            answer=tale.answer,
            meta={"facts": len(tale.facts), "evidence": list(tale.facts), **meta},
        )

    return size.largest(build, least=0)[1]


def _fitting_story(task: str, size: Size, name: str) -> Story:
    least, most = FACTS[task]
    # Imports torch, which reading data sets does not need.
    from star_attention.hf.text.tokens import query_ids

    room = size.length // FACTS_SHARE
    for facts in range(random.Random(f"babilong {name}").randint(least, most), least - 1, -1):
        tale = story(task, facts, random.Random(f"babilong {name} {facts}"))
        taken = len(query_ids(size.tokenizer, " ".join(tale.facts)))
        if taken <= room:
            return tale
    raise SizeError(
        f"length {size.length:,} is too short for {task}: its facts take {taken} tokens, and may"
        f" take an eighth of the length, {room}; give at least {taken * FACTS_SHARE:,}"
    )


@functools.cache
def _background(path: str | None) -> tuple[str, ...]:
    people = sorted({name for names in ACTORS.values() for name in names})
    names = re.compile(rf"\b({'|'.join(people)})\b")
    sentences = tuple(line for line in prose(path).sentences if not names.search(line))
    if not sentences:
        raise InvalidInputError(
            f"{path} has no sentence without the people of the stories; give another background"
        )
    return sentences


def framed_sample(
    frame: Frame,
    *,
    id: str,
    task: str,
    length: int,
    text: str,
    question: str,
    answer: str,
    meta: Mapping[str, Any],
) -> Sample:
    """Return the sample of a text and a question in the prompt `frame`."""
    return Sample(
        id=id,
        task=task,
        length=length,
        context=f"{frame.before}{text}{frame.after}",
        # Published questions end in a space, published prompts do not.
        query=f"{frame.question_lead}{question}".rstrip(),
        answer_prefix="",
        answers=(answer,),
        max_new_tokens=MAX_NEW_TOKENS,
        metric="babilong",
        meta=dict(meta) | ({"prompts_sha256": frame.sha256} if frame.sha256 else {}),
    )
