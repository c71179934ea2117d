"""Sources of a run's samples: published data sets, or the generator of a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any, Protocol

from star_attention.errors import ContextLengthError, InvalidInputError, SizeError
from star_attention.evals import suites
from star_attention.evals.formats import files as formats
from star_attention.evals.runs.settings import FILES, RunSettings
from star_attention.evals.runs.variants import Variant
from star_attention.evals.samples.sample import Sample
from star_attention.planning.sizes import parse_size

_SHORT = 512
"""Most tokens by which a generated sample, with another number of answer tokens, may be shorter
than its length."""


class Source(Protocol):
    """Samples, and how run.json records them."""

    @property
    def suite(self) -> str:
        """Name of the suite; "files" for data sets."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the samples, by name."""

    @property
    def seed(self) -> int:
        """Seed of the samples, and of random anchors."""

    def read(self) -> None:
        """Read the files that need no model, so that what is wrong with them is known first."""

    def check(self, variants: Sequence[Variant], settings: RunSettings, positions: int) -> None:
        """Check what can be checked before the samples are made.

        Args:
            variants: Methods that answer the samples.
            settings: Settings of the run.
            positions: Positions of the model; 0 for no limit.

        Raises:
            ContextLengthError: No sample can fit into the model's positions, or some cannot, and
                they are not skipped.
            SizeError: A variant's sizes do not fit a length.
        """

    def load(
        self, tokenizer: Any, *, chat: bool, template_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[list[Sample], dict[str, str]]:
        """Read or generate all samples.

        Args:
            tokenizer: The model's; lengths are counted with it.
            chat: Leave room for the model's chat template.
            template_kwargs: What the template reads beside messages.

        Returns:
            The samples, and what is left out with the reasons.
        """


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Samples of data sets.

    Attributes:
        files: Paths.
        format: Name of their format; None detects it.
        prompts: File of BABILong's published prompts; None uses our own.
        seed: Seed of random anchors.
    """

    files: Sequence[str]
    format: str | None = None
    prompts: str | None = None
    seed: int = 0

    @property
    def suite(self) -> str:
        return FILES

    @property
    def options(self) -> Mapping[str, Any]:
        options = {"files": list(self.files), "format": self.format, "prompts": self.prompts}
        return {name: value for name, value in options.items() if value is not None}

    @cached_property
    def _samples(self) -> list[Sample]:
        return formats.read_all(self.files, format=self.format, prompts=self.prompts)

    def read(self) -> None:
        self._samples  # noqa: B018

    def check(self, variants: Sequence[Variant], settings: RunSettings, positions: int) -> None:
        """Lengths are counted in tokens later."""

    def load(
        self, tokenizer: Any, *, chat: bool, template_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[list[Sample], dict[str, str]]:
        return self._samples, {}


@dataclass(frozen=True, kw_only=True)
class SuiteSource:
    """Generated samples of a suite's tasks at each length.

    Attributes:
        suite: Name of the suite.
        tasks: Names of tasks; None takes all whose data is there, and leaves out those that do not
            fit into a length.
        lengths: Lengths in tokens.
        count: Samples of each task and length.
        seed: Seed of the samples, and of random anchors.
        options: Options of the suite, by name.

    Raises:
        InvalidInputError: For an unknown suite, task or option, and for one that is named twice.
    """

    suite: str
    tasks: Sequence[str] | None = None
    lengths: Sequence[int]
    count: int
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, suite: str, *, tasks: str | None, lengths: str, **values: Any) -> SuiteSource:
        """Parse lists separated by commas; raises `SizeError` if a length is not a size."""
        return cls(
            suite=suite,
            tasks=None if tasks is None else [task.strip() for task in tasks.split(",")],
            lengths=[parse_size(length, "length") for length in lengths.split(",")],
            **values,
        )

    def __post_init__(self) -> None:
        declaration = suites.get(self.suite)
        for task in self._task_names():
            declaration.check(task, self.options)
        for kind, values in (("task", self._task_names()), ("length", self.lengths)):
            if len(set(values)) < len(values):
                raise InvalidInputError(
                    f"a {kind} is named twice in {', '.join(map(str, values))}; name each once"
                )

    def _task_names(self) -> Sequence[str]:
        if self.tasks is not None:
            return self.tasks
        return suites.get(self.suite).available_tasks(self.options)

    def read(self) -> None:
        """The generators read their files."""

    def check(self, variants: Sequence[Variant], settings: RunSettings, positions: int) -> None:
        for variant, length in product(variants, self.lengths):
            variant.sizes(length)
        # Samples may fall short of their length by this much.
        longest = [length for length in self.lengths if positions and length - _SHORT > positions]
        if not longest or (settings.skip_too_long and len(longest) < len(self.lengths)):
            return
        remedy = "" if len(longest) == len(self.lengths) else ", skip them with --skip-too-long"
        raise ContextLengthError(
            f"samples of {longest[0]:,} tokens are too long for the model, which has"
            f" {positions:,} positions; use a smaller length{remedy}"
        )

    def load(
        self, tokenizer: Any, *, chat: bool, template_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[list[Sample], dict[str, str]]:
        """Generate all samples.

        Raises:
            SizeError: If a named task, or all tasks, do not fit into a length.
        """
        # They import torch, which a command line does not need to be checked.
        from star_attention.evals.runs.prompts import chat_tokens
        from star_attention.evals.suites.parallel import generate_cells

        tasks = self._task_names()
        cells = [(task, length) for length in self.lengths for task in tasks]
        generated = generate_cells(
            suites.get(self.suite),
            cells,
            tokenizer=tokenizer,
            reserve=chat_tokens(tokenizer, template_kwargs) if chat else 0,
            count=self.count,
            seed=self.seed,
            options=self.options,
        )
        samples: list[Sample] = []
        left_out: dict[str, str] = {}
        for (task, length), result in zip(cells, generated, strict=True):
            if not isinstance(result, SizeError):
                samples += result
            elif self.tasks is not None or len(tasks) == 1:
                raise result
            else:
                left_out[f"{task} at {length:,} tokens"] = str(result)
        if not samples:
            first = next(iter(left_out.values()))
            raise SizeError(f"no task of {self.suite} fits; the first: {first}")
        return samples, left_out
