"""The options of `bench serve`."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from star_attention.cli.bench.driver import measure, measure_elsewhere
from star_attention.cli.bench.options import (
    PANEL,
    Block,
    Compile,
    QueryTokens,
    TargetOptions,
    known_names,
)
from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.options import option
from star_attention.cli.serving import check_packages
from star_attention.cli.sizes import token_count
from star_attention.cli.torchrun import rank_and_size
from star_attention.config import KV_SETTINGS, StarConfig
from star_attention.errors import InvalidInputError, quote

if TYPE_CHECKING:
    from star_attention.bench.serve.benchmark import Serve

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key of a server at --url."""


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions:
    url: Annotated[
        str | None,
        option(
            "Measure a server that runs there, instead of one of its own. Its key, if it has keys,"
            f" is taken from {KEY_VARIABLE}.",
            "--url",
            panel=PANEL,
            metavar="URL",
        ),
    ] = None
    cases: Annotated[
        str,
        option(
            "What is measured, separated by commas: single (a client of the long context), shared"
            " (--streams of them at once),"
            " again (a further question on it, alone), spread (--clients on --texts contexts),"
            " encode (a long context is encoded beside them), leave (half of them leave their"
            " answers).",
            panel=PANEL,
            metavar="NAMES",
        ),
    ] = "single,shared,again,spread,encode,leave"
    context: Annotated[
        str, option("Length of the long context in tokens.", panel=PANEL, metavar="SIZE")
    ] = "128k"
    streams: Annotated[
        int, option("Clients of the long context at once.", panel=PANEL, metavar="N", min=1)
    ] = 32
    short: Annotated[
        str, option("Length of each of the other contexts.", panel=PANEL, metavar="SIZE")
    ] = "16k"
    texts: Annotated[int, option("Other contexts.", panel=PANEL, metavar="N", min=2)] = 16
    clients: Annotated[
        int, option("Clients of the other contexts at once.", panel=PANEL, metavar="N", min=1)
    ] = 64
    block: Block = "16k"
    query_tokens: QueryTokens = 64
    answer_tokens: Annotated[
        int, option("Tokens of an answer.", panel=PANEL, metavar="N", min=2)
    ] = 256
    rounds: Annotated[int, option("Questions of each client.", panel=PANEL, metavar="N", min=1)] = 2
    questions: Annotated[
        int,
        option("Further questions that are asked alone.", panel=PANEL, metavar="N", min=1),
    ] = 20
    processes: Annotated[
        int,
        option("Most processes that clients are spread over.", panel=PANEL, metavar="N", min=1),
    ] = 4
    budget: Annotated[
        float | None,
        option(
            "Seconds after which no further case is begun, half of them for the work in Python.",
            "--budget",
            panel=PANEL,
            metavar="X",
            show_default="no limit",
        ),
    ] = None
    settings: Annotated[dict[str, Any], ConfigOptions(*KV_SETTINGS)] = field(default_factory=dict)
    compile: Compile = None

    def benchmark(self, target: TargetOptions) -> Serve:
        """Check the options."""
        from star_attention.bench.serve.benchmark import Serve
        from star_attention.bench.serve.rows import CASES

        StarConfig.of(**self.settings)
        ranks = rank_and_size()[1]
        if ranks > 1:
            raise InvalidInputError(
                f"a server is measured from a single process, not from {ranks} ranks; start it"
                " without torchrun"
            )
        own = ("cases", "context", "short", "block", "url", "settings")
        rest = {name: value for name, value in asdict(self).items() if name not in own}
        return Serve(
            options=self._options(target),
            cases=known_names("case", self.cases, CASES),
            context=token_count(self.context, "context"),
            short=token_count(self.short, "short"),
            block=token_count(self.block, "block_size"),
            **rest,
            **self.settings,
        )

    def _options(self, target: TargetOptions) -> list[str]:
        """Return the options of the server that is started."""
        options = ["--dtype", target.dtype, "--device", target.device]
        for name, value in (
            ("--model", target.model),
            ("--shapes", target.shapes),
            ("--weights", target.weights),
        ):
            options += [] if value is None else [name, value]
        for name, value in self.settings.items():
            options += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        if self.compile is not None:
            options.append("--compile" if self.compile else "--no-compile")
        return options


def measure_server(options: ServeBenchOptions, target: TargetOptions, quiet: bool) -> None:
    """Measure a server that is started for it, or one that runs already."""
    benchmark = options.benchmark(target)
    if options.url is None:
        # The same work in Python comes first, and takes minutes.
        check_packages()
        measure(benchmark, target, quiet, options.budget)
        return
    if target.model is not None or target.shapes is not None:
        raise InvalidInputError(
            f"the server at {quote(options.url)} has a model already; leave out --model and"
            " --shapes"
        )
    from star_attention.bench.serve import plots
    from star_attention.bench.serve.server import Server
    from star_attention.bench.serve.wire import Address

    server = Server(Address.of(options.url, os.environ.get(KEY_VARIABLE, "")))
    head = {"model": server.model, "url": server.address.url}
    rows = measure_elsewhere(
        benchmark,
        lambda progress: benchmark.run_at(server, progress),
        head,
        target,
        quiet=quiet,
        budget_s=options.budget,
    )
    if target.out is not None:
        plots.draw(rows, Path(target.out))
