"""InfiniteBench's generators, for five of its tasks.

The samples are made as the published ones are; the sentences are our own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from star_attention.evals.samples.building import NOISE, Draw, depths, scatter
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites.infinitebench.tasks import TASKS, Parts

_ORDINALS = ("", "second ", "third ")
_CHAIN = 3
"""Functions that code_run's question goes through."""


def generate(
    task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Sample]:
    """Generate samples of a task.

    - passkey, number_string: a number of 5 or 10 digits on a line among lines of noise, at a random
      depth.
    - kv_retrieval: a JSON object of UUIDs.
    - math_find: the largest, second or third largest, or smallest of a list of two-digit numbers,
      each of which is in the list once.
    - code_run: a function that calls a second one that calls a third, each adding or subtracting.

    The first three have `depths` in `meta`, in percent, as in RULER.

    Raises:
        SizeError: The length is too short.
    """
    least = {"kv_retrieval": 1, "code_run": _CHAIN}.get(task, 0)

    def sized(index: int) -> Sample:
        id = f"{task}-{size.length}-{seed}-{index}"

        def build(units: int) -> Sample:
            rng = random.Random(f"infinitebench {task} {size.length} {seed} {index}")
            return sample_of_units(task, units, rng, id=id, length=size.length)

        return size.largest(build, least=least)[1]

    return (sized(index) for index in range(count))


def sample_of_units(task: str, units: int, rng: random.Random, *, id: str, length: int) -> Sample:
    """Return a sample of this many units: lines, pairs, numbers or functions."""
    return _GENERATORS[task](units, rng).sample(id=id, task=task, length=length)


def _passkey(lines: int, rng: random.Random) -> Parts:
    digits = str(rng.randrange(10_000, 100_000))
    line = f"The pass key is {digits}. Do not forget it: {digits} is the pass key."
    return _hidden("passkey", line, digits, lines, rng)


def _number_string(lines: int, rng: random.Random) -> Parts:
    """Hide ten digits in runs, made from five digits by doubling one at a time."""
    runs = [str(rng.randrange(10)) for _ in range(5)]
    for _ in range(5):
        place = rng.randrange(len(runs))
        runs.insert(place, runs[place])
    digits = "".join(runs)
    line = f"The string of digits is {digits}. Do not forget it: {digits} is the string of digits."
    return _hidden("number_string", line, digits, lines, rng)


def _hidden(task: str, line: str, answer: str, lines: int, rng: random.Random) -> Parts:
    before = int(rng.random() * (lines + 1))
    context = "\n".join([NOISE] * before + [line] + [NOISE] * (lines - before))
    return Parts(
        context=context,
        question=TASKS[task].question,
        answers=(answer,),
        prefix=TASKS[task].prefix,
        meta={"depths": depths(context, [line])},
    )


def key_question(key: str) -> str:
    """Return kv_retrieval's question."""
    return f'What is the value of the key "{key}"?'


def _kv_retrieval(pairs: int, rng: random.Random) -> Parts:
    depth = rng.random()
    draw = Draw(rng, None)
    queried, *others = [(draw("uuids"), draw("uuids")) for _ in range(pairs)]
    key, value = queried
    others.insert(int(depth * pairs), queried)
    context = json.dumps(dict(others))
    return Parts(
        context=context,
        question=key_question(key),
        answers=(value,),
        prefix=TASKS["kv_retrieval"].prefix,
        meta={"depths": depths(context, [json.dumps({key: value})[1:-1]])},
    )


def _math_find(numbers: int, rng: random.Random) -> Parts:
    """Build a list of this many numbers, plus the three smallest and the three largest."""
    smallest = sorted(rng.sample(range(10, 30), 3))
    largest = sorted(rng.sample(range(70, 100), 3), reverse=True)
    rank, end = rng.randrange(3), rng.choice(("smallest", "largest"))
    extremes = [str(number) for number in rng.sample([*smallest, *largest], 6)]
    places = random.Random(rng.random())
    body = [str(rng.randrange(30, 70)) for _ in range(numbers)]
    which = f"{_ORDINALS[rank]}{end}"
    return Parts(
        context=f"[{', '.join(scatter(extremes, body, places))}]",
        question=f"What is the {which} number in the list?"
        " Answer with the number and nothing else.",
        answers=(str((smallest if end == "smallest" else largest)[rank]),),
        prefix=f"\nThe {which} number in the list is",
        meta={"which": which},
    )


def _code_run(functions: int, rng: random.Random) -> Parts:
    """Write functions in chains of three (the last may be shorter), in random order.

    The question is about the first function of a chain.
    """
    numbers = rng.sample(range(functions), functions)
    steps = [_step(rng) for _ in range(functions)]
    while True:
        argument = rng.randrange(1, 100)
        question = f"What does func_{numbers[0]}({argument}) return?"
        answer = str(argument + sum(steps[:_CHAIN]))
        if answer not in question:
            break
        # If the steps add up to 0, no argument works: draw new steps as well.
        steps[:_CHAIN] = [_step(rng) for _ in range(_CHAIN)]
    code = []
    for i, (number, step) in enumerate(zip(numbers, steps, strict=True)):
        is_last = i % _CHAIN == _CHAIN - 1 or i == functions - 1
        value = "x" if is_last else f"func_{numbers[i + 1]}(x)"
        code.append(
            f"def func_{number}(x):\n    return {value} {'+' if step > 0 else '-'} {abs(step)}"
        )
    rng.shuffle(code)
    return Parts(
        context="\n\n".join(code),
        question=question,
        answers=(answer,),
        prefix=TASKS["code_run"].prefix,
        meta={"chain": [f"func_{number}" for number in numbers[:_CHAIN]]},
    )


def _step(rng: random.Random) -> int:
    return rng.choice((-1, 1)) * rng.randrange(1, 50)


_GENERATORS: dict[str, Callable[[int, random.Random], Parts]] = {
    "passkey": _passkey,
    "number_string": _number_string,
    "kv_retrieval": _kv_retrieval,
    "math_find": _math_find,
    "code_run": _code_run,
}
