"""`star-attention eval`: the accuracy of methods on the same samples, with reports."""

from __future__ import annotations

from typing import ClassVar

from star_attention.cli.lazy import Entry, LazyGroup

_SUITE = "star_attention.cli.eval.suite_commands:suite_command"


class Group(LazyGroup):
    """The commands of `eval`. Those of suites come from evals/suites/NAME/__init__.py."""

    entries: ClassVar = {
        "run": Entry(
            "Answer the samples of data sets with several methods, and report.",
            "star_attention.cli.eval.run:run",
        ),
        "ruler": Entry(
            "RULER: needles, variable tracking, word counts, and questions about documents.",
            _SUITE,
            "ruler",
        ),
        "babilong": Entry(
            "BABILong: facts of short stories, scattered in a long text (qa1 to qa5).",
            _SUITE,
            "babilong",
        ),
        "infinitebench": Entry(
            "InfiniteBench: the tasks that can be generated; `eval run` reads its published files.",
            _SUITE,
            "infinitebench",
        ),
        "niah": Entry("One needle at each depth and length, drawn as heat maps.", _SUITE, "niah"),
        "shared": Entry(
            "Several questions on each context, which is encoded once.", _SUITE, "shared"
        ),
        "sweep": Entry(
            "Accuracy against block size or anchor size, with dense attention: the paper's figures"
            " 5a, 5b.",
            "star_attention.cli.eval.sweeps:sweep",
        ),
        "ablations": Entry(
            "Other tokens in place of the anchor, or other positions, with dense attention:"
            " table 4.",
            "star_attention.cli.eval.sweeps:ablations",
        ),
        "perplexity": Entry(
            "Perplexity of the tails of a text given their heads, compared with the first variant.",
            "star_attention.cli.eval.perplexity:perplexity",
        ),
        "report": Entry(
            "Write the reports of a run again, from its predictions; or join runs, and report.",
            "star_attention.cli.eval.run:report",
        ),
    }
