"""Commands and options of the suites, from their declarations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from star_attention.cli.config_options import DeclaredOptions
from star_attention.cli.eval.options import VARIANTS, RunOptions, Seed, Variants
from star_attention.cli.eval.run import evaluate, parse_variants
from star_attention.cli.model_options import ModelOptions
from star_attention.cli.options import option
from star_attention.evals import suites
from star_attention.evals.suites.options import SuiteOption
from star_attention.evals.suites.suite import Suite

if TYPE_CHECKING:
    from star_attention.evals.runs.sources import SuiteSource

SWEPT_SUITE = "ruler"
RETRIEVAL = "niah_single_1,niah_multikey_1,niah_multiquery"
"""Single, multi-key and multi-query needles: the tasks of the paper's ablations."""

_SHARED_OPTIONS = ("essays", "words", "squad", "hotpot", "background", "prompts")
"""Options of suites that sweeps take as well."""


@dataclass(frozen=True, kw_only=True)
class SuiteData:
    """Samples of a suite, as given on the command line."""

    suite: str
    task: str | None
    length: str
    samples: int
    seed: int
    options: Mapping[str, str]

    def source(self) -> SuiteSource:
        """Parse and check all values; raises `InvalidInputError`, or `SizeError` for lengths."""
        from star_attention.evals.runs.sources import SuiteSource

        return SuiteSource.parse(
            self.suite,
            tasks=self.task,
            lengths=self.length,
            count=self.samples,
            seed=self.seed,
            options=self.options,
        )


class SuiteOptions(DeclaredOptions):
    """Marks the `SuiteData` of a suite's own command.

    Args:
        suite: Its declaration.
    """

    def __init__(self, suite: Suite) -> None:
        self.suite = suite

    def parameters(self) -> Iterator[inspect.Parameter]:
        suite = self.suite
        if len(suite.tasks) > 1:
            yield _parameter("task", _task("all of the suite"), None)
        yield _parameter("length", _length(), suite.length)
        yield _parameter("samples", _samples(suite.samples_help), suite.samples)
        yield _parameter("seed", Seed, 0)
        yield from map(_suite_option, suite.options)

    def settings(self, values: dict[str, Any]) -> SuiteData:
        return _suite_data(self.suite.name, values, [option.name for option in self.suite.options])


class AnySuiteOptions(DeclaredOptions):
    """Marks the `SuiteData` of a command for any suite, RULER's retrieval tasks by default."""

    def parameters(self) -> Iterator[inspect.Parameter]:
        names = ", ".join(suites.SUITES)
        suite = option(f"Suite of the tasks: {names}.", panel="Data", metavar="NAME")
        yield _parameter("suite", Annotated[str, suite], SWEPT_SUITE)
        yield _parameter("task", _task(f"{RETRIEVAL}; all of another suite"), None)
        yield _parameter("length", _length(), "16k")
        yield _parameter("samples", _samples("Samples of each task and length."), 50)
        yield _parameter("seed", Seed, 0)
        declared = {
            declaration.name: declaration
            for name in suites.SUITES
            for declaration in suites.get(name).options
        }
        yield from (_suite_option(declared[name]) for name in _SHARED_OPTIONS)

    def settings(self, values: dict[str, Any]) -> SuiteData:
        suite, task = values["suite"], values["task"]
        if task is None and suite == SWEPT_SUITE:
            task = RETRIEVAL
        return _suite_data(suite, {**values, "task": task}, _SHARED_OPTIONS)


def _suite_data(suite: str, values: Mapping[str, Any], names: Iterable[str]) -> SuiteData:
    return SuiteData(
        suite=suite,
        task=values.get("task"),
        length=values["length"],
        samples=values["samples"],
        seed=values["seed"],
        # As text, which is how run.json of earlier versions records them.
        options={name: str(values[name]) for name in names if values[name] is not None},
    )


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _task(default: str) -> Any:
    return Annotated[
        str | None,
        option(
            "Tasks, separated by commas.",
            "--task",
            panel="Data",
            metavar="NAMES",
            show_default=default,
        ),
    ]


def _length() -> Any:
    return Annotated[
        str,
        option(
            "Lengths in tokens, separated by commas.", "--length", panel="Data", metavar="SIZES"
        ),
    ]


def _samples(help: str) -> Any:
    return Annotated[int, option(help, "--samples", panel="Data", metavar="N", min=1)]


def _suite_option(declared: SuiteOption) -> inspect.Parameter:
    """Return the command-line option that a suite declares."""
    details: dict[str, Any] = {} if declared.min is None else {"min": declared.min}
    if declared.default is not None:
        details["show_default"] = declared.default
    flag = f"--{declared.name}"
    setting = option(declared.help, flag, panel="Data", metavar=declared.metavar, **details)
    kind: Any = declared.type
    return _parameter(declared.name, Annotated[kind | None, setting], None)


def suite_command(name: str) -> Callable[..., None]:
    """Return the command that evaluates the suite of this name."""
    suite = suites.get(name)

    def evaluate_suite(
        *,
        model: ModelOptions,
        options: RunOptions,
        variants: Variants = VARIANTS,
        data: SuiteData,
    ) -> None:
        evaluate(model, options, lambda: parse_variants(variants), data.source)

    evaluate_suite.__annotations__["data"] = Annotated[SuiteData, SuiteOptions(suite)]
    evaluate_suite.__name__ = suite.name
    evaluate_suite.__doc__ = (
        f"{suite.help}\n\n"
        f"Example: star-attention eval {suite.name} -m models/needle-17m {suite.example}"
    )
    return evaluate_suite
