"""`bench ranks`: several benchmarks on several ranks in one run, which load a model once a mesh."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from star_attention.cli.bench.driver import Run
from star_attention.cli.bench.options import (
    PANEL,
    Block,
    Blocks,
    Compile,
    Contexts,
    QueryTokens,
    Repeats,
    TargetOptions,
    known_names,
    names_of,
)
from star_attention.cli.options import option
from star_attention.cli.sizes import token_count, token_counts
from star_attention.cli.torchrun import rank_and_size
from star_attention.errors import InvalidInputError, quote

if TYPE_CHECKING:
    from star_attention.bench.benchmark import Benchmark
    from star_attention.tools.machine import Ceilings

PARTS = ("decode", "questions", "prefill")


@dataclass(frozen=True, kw_only=True)
class RanksOptions:
    """What `bench ranks` measures."""

    context: Contexts = "16k,128k"
    block: Block = "16k"
    prefill_context: Annotated[
        str | None,
        option(
            "Lengths at which phase 1 is compared.",
            "--prefill-context",
            panel=PANEL,
            metavar="SIZES",
            show_default="the longest of --context",
        ),
    ] = None
    prefill_block: Blocks = "16k,8k"
    ring_up_to: Annotated[
        str | None,
        option(
            "Longest context at which ring attention runs; beyond it its time is extrapolated from"
            " its two longest runs.",
            "--ring-up-to",
            panel=PANEL,
            metavar="SIZE",
        ),
    ] = None
    batch_context: Annotated[
        str,
        option(
            "Length at which a batch of questions is answered.",
            "--batch-context",
            panel=PANEL,
            metavar="SIZE",
        ),
    ] = "128k"
    batch: Annotated[
        int, option("Questions answered at once.", panel=PANEL, metavar="N", min=1)
    ] = 32
    meshes: Annotated[
        str | None,
        option(
            "Meshes of context x tensor parallel ranks, separated by commas.",
            "--meshes",
            panel=PANEL,
            metavar="MESHES",
            show_default="Nx1 and 1xN, of N ranks",
        ),
    ] = None
    parts: Annotated[
        str,
        option(f"What to measure: {', '.join(PARTS)}.", panel=PANEL, metavar="NAMES"),
    ] = ",".join(PARTS)
    query_tokens: QueryTokens = 64
    answer_tokens: Annotated[
        int, option("Tokens of an answer.", panel=PANEL, metavar="N", min=2)
    ] = 33
    repeats: Repeats = 2
    compile: Compile = None
    budget: Annotated[
        float | None,
        option(
            "Seconds after which no further row is begun; what is measured is saved.",
            "--budget",
            panel=PANEL,
            metavar="X",
        ),
    ] = None

    def tensor_parallels(self) -> list[int]:
        """Return the tensor-parallel ranks of each mesh, 1 first.

        Raises:
            InvalidInputError: a mesh that is not of this number of ranks.
        """
        ranks = rank_and_size()[1]
        if self.meshes is None:
            return sorted({1, ranks})
        return sorted({_tensor_parallel(mesh, ranks) for mesh in names_of(self.meshes)})

    def benchmarks(self, device: str, tensor_parallel: int) -> list[Benchmark[Any]]:
        """Return the benchmarks of a mesh. Those of tensor parallelism have no questions."""
        parts = known_names("part", self.parts, PARTS)
        whole = tensor_parallel == 1
        made: list[Benchmark[Any]] = []
        if "decode" in parts:
            made.append(self._decode())
        if "questions" in parts and whole:
            made.append(self._questions())
        if "prefill" in parts:
            made.append(self._prefill(device, None if whole else ["star"]))
        return made

    def _decode(self) -> Benchmark[Any]:
        from star_attention.bench.decode import Decode

        return Decode(
            contexts=token_counts(self.context, "context"),
            block=token_count(self.block, "block_size"),
            queries=1,
            query_tokens=self.query_tokens,
            answer_tokens=self.answer_tokens,
            repeats=self.repeats,
            compile=self.compile,
        )

    def _questions(self) -> Benchmark[Any]:
        from star_attention.bench.questions import Questions

        return Questions(
            contexts=[token_count(self.batch_context, "batch-context")],
            block=token_count(self.block, "block_size"),
            questions=self.batch,
            batch=self.batch,
            query_tokens=self.query_tokens,
            answer_tokens=self.answer_tokens,
            repeats=1,
            compile=self.compile,
        )

    def _prefill(self, device: str, methods: list[str] | None) -> Benchmark[Any]:
        from star_attention.bench.prefill.benchmark import Prefill
        from star_attention.bench.prefill.cases import Methods, plan_cases
        from star_attention.bench.prefill.contenders import EngineSettings
        from star_attention.hf.loading import load

        contexts = token_counts(self.prefill_context or self.context, "context")
        up_to = None if self.ring_up_to is None else token_count(self.ring_up_to, "ring-up-to")
        return Prefill(
            cases=plan_cases(
                contexts if self.prefill_context else [max(contexts)],
                names_of(self.prefill_block),
                Methods.of(methods, [] if methods else ["star"], rank_and_size()[1]),
                device=load.pick_device(device),
                dense_up_to=up_to,
            ),
            repeats=self.repeats - 1,
            engine=EngineSettings(compile=self.compile),
        )


def _tensor_parallel(mesh: str, ranks: int) -> int:
    context, _, tensor = mesh.partition("x")
    if not (context.isdecimal() and tensor.isdecimal() and int(context) * int(tensor) == ranks):
        raise InvalidInputError(
            f"mesh {quote(mesh)} is not one of {ranks} ranks; write {ranks}x1, or 1x{ranks}"
        )
    return int(tensor)


def measure_ranks(options: RanksOptions, target_options: TargetOptions, quiet: bool) -> None:
    """Measure every mesh, and print and save the rows of each benchmark together.

    Raises:
        InvalidInputError: a single rank, or a value that cannot work.
    """
    if rank_and_size()[1] == 1:
        raise InvalidInputError(
            "bench ranks needs several ranks; run it under torchrun, as in: torchrun"
            " --nproc-per-node 2 -m star_attention bench ranks --shapes llama-3.1-8b"
        )
    device = target_options.device
    meshes = {size: options.benchmarks(device, size) for size in options.tensor_parallels()}
    names = [benchmark.name for benchmark in meshes[min(meshes)]]
    run = Run.start(names, target_options, quiet, options.budget)
    rows: dict[str, list[Any]] = {name: [] for name in names}
    finished: dict[str, tuple[Benchmark[Any], dict[str, Any], Ceilings]] = {}
    for tensor_parallel, benchmarks in meshes.items():
        if run.out_of_time():
            break
        target = run.load(max(b.longest_input for b in benchmarks), tensor_parallel)
        for benchmark in benchmarks:
            name, record = benchmark.name, benchmark.record(target, [])
            finished.setdefault(name, (benchmark, record, target.ceilings))
            if not run.out_of_time():
                rows[name] = run.rows(benchmark, target, rows[name])
        # Its weights make room for those of the next mesh.
        del target
        gc.collect()
    for name, (benchmark, record, ceilings) in finished.items():
        record["rows"] = [asdict(row) for row in rows[name]]
        run.finish(benchmark, record, rows[name], ceilings)
