"""The declaration of a suite: everything except the code that generates its samples."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.suites.options import SuiteOption

if TYPE_CHECKING:
    from star_attention.evals.samples.sample import Sample
    from star_attention.evals.samples.sizing import Size


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A family of tasks with generated samples.

    Reading a declaration imports no generator and no samples, so that `--help` stays quick.

    Attributes:
        name: Key in `SUITES`, name of the command `star-attention eval NAME`.
        help: Description of the command, in Markdown; its first paragraph is the summary.
        example: Arguments of an example command line, after `star-attention eval NAME`.
        tasks: Names of the tasks.
        options: Options of the generator, in addition to size, count and seed.
        generator: "module:function" of the generator, called like `generate` with checked
            arguments.
        length: Default of `--length`.
        samples: Default of `--samples`.
        samples_help: Help of `--samples`.
    """

    name: str
    help: str
    example: str
    tasks: tuple[str, ...]
    options: tuple[SuiteOption, ...] = ()
    generator: str
    length: str = "4k"
    samples: int = 50
    samples_help: str = "Samples of each task and length."

    def generate(
        self, task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
    ) -> Iterator[Sample]:
        """Generate samples of a task.

        Sample n is determined by the arguments other than `count`.

        Args:
            task: One of `tasks`.
            size: Length in tokens that each sample fills as far as its units allow.
            count: Number of samples; for niah, at each depth.
            seed: Any integer; different seeds give different samples.
            options: Values of `options` by name.

        Raises:
            InvalidInputError: The task, an option or its value is unknown, or a file is unusable.
            SizeError: The task does not fit into the size, or cannot fill it; raised by the
                iterator.
        """
        self.check(task, options)
        module, _, name = self.generator.partition(":")
        generator: Callable[..., Iterator[Sample]] = getattr(importlib.import_module(module), name)
        return generator(task, size=size, count=count, seed=seed, options=options)

    def check(self, task: str, options: Mapping[str, Any]) -> None:
        """Check a task and all options, including those that the task does not use.

        Raises:
            InvalidInputError: The task, an option or its value is unknown, or a path does not
                exist.
        """
        if task not in self.tasks:
            raise InvalidInputError(
                f"task {quote(task)} of {self.name} is unknown; choose from {', '.join(self.tasks)}"
            )
        known = [option.name for option in self.options]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise InvalidInputError(
                f"option {quote(unknown[0])} of {self.name} is unknown;"
                f" it takes {', '.join(known) or 'none'}"
            )
        for option in self.options:
            option.check(options)

    def available_tasks(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the tasks that can be generated with these options."""
        missing = {
            task
            for option in self.options
            if options.get(option.name) is None
            for task in option.tasks
        }
        return tuple(task for task in self.tasks if task not in missing)
