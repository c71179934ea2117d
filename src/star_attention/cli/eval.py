"""`star-attention eval`: accuracy of attention methods side by side on the same samples, with reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star_attention.cli import session
from star_attention.cli.formatting import table
from star_attention.cli.inputs import read_text
from star_attention.cli.options import ModelOptions, Quiet, option
from star_attention.cli.paths import check_output_folder
from star_attention.cli.progress import Status
from star_attention.cli.torchrun import is_rank_0
from star_attention.errors import InvalidInputError, SizeError
from star_attention.planning.plan import counted, parse_size

if TYPE_CHECKING:
    from star_attention.evals.runs.variants import Variant
    from star_attention.evals.samples.sample import Sample

VARIANTS = "dense,star:/4"

_PANEL = "Evaluation"

Variants = Annotated[
    str,
    option(
        "Methods side by side, with commas between: METHOD[:BLOCK[:ANCHOR]], as dense, star:/4 (blocks of a quarter of the length),"
        " star:4k:1k, star:/4:kv=fp8, ring, streaming_llm:2k:64 (window and sinks).",
        "--variants",
        panel=_PANEL,
        metavar="LIST",
    ),
]
Seed = Annotated[int, option("Which samples are made.", panel=_PANEL, metavar="N")]
Task = Annotated[
    str | None,
    option(
        "Tasks, with commas between.",
        "--task",
        panel="Data",
        metavar="NAMES",
        show_default="all of the suite",
    ),
]
Length = Annotated[
    str,
    option("Lengths in tokens, with commas between.", "--length", panel="Data", metavar="SIZES"),
]
Samples = Annotated[
    int, option("Samples of each task and length.", "--samples", panel="Data", metavar="N", min=1)
]
Essays = Annotated[
    str | None,
    option(
        "Prose for the haystacks: a .json with a field text, a folder of .txt, or a text file.",
        "--essays",
        panel="Data",
        metavar="PATH",
        show_default="prose found in the running Python, named as such",
    ),
]

Words = Annotated[
    str | None,
    option(
        "train or eval: the words that the bundled model was trained on, or the others.",
        "--words",
        panel="Data",
        metavar="PART",
        show_default="all",
    ),
]
Squad = Annotated[
    str | None,
    option("SQuAD's dev-v2.0.json, which qa_1 needs.", "--squad", panel="Data", metavar="PATH"),
]
Hotpot = Annotated[
    str | None,
    option(
        "HotpotQA's hotpot_dev_distractor_v1.json, which qa_2 needs.",
        "--hotpot",
        panel="Data",
        metavar="PATH",
    ),
]
Background = Annotated[
    str | None,
    option(
        "The text that facts are scattered in: .json, a folder of .txt, or a text file.",
        "--background",
        panel="Data",
        metavar="PATH",
        show_default="prose found in the running Python",
    ),
]


Prompts = Annotated[
    str | None,
    option(
        "BABILong's published prompts: babilong/prompts.py of github.com/booydar/babilong (read, not run), or .json of its"
        " DEFAULT_PROMPTS.",
        "--prompts",
        panel="Data",
        metavar="PATH",
        show_default="prompts of our own, which the bundled model was trained on",
    ),
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What all runs take: where results go, and how answers are made."""

    out: Annotated[
        str,
        option(
            "Folder of the run. One that a run was begun in goes on where it was.",
            "--out",
            "-o",
            panel="Output",
            metavar="FOLDER",
        ),
    ]
    limit: Annotated[
        int | None,
        option(
            "Only the first so many samples of each task, length and depth.",
            "--limit",
            panel=_PANEL,
            metavar="N",
            min=1,
        ),
    ] = None
    chat: Annotated[
        bool,
        option(
            "Context and query as one user message of the model's chat template.",
            "--chat",
            panel=_PANEL,
        ),
    ] = False
    max_new_tokens: Annotated[
        str | None,
        option(
            "Most tokens of an answer.",
            "--max-new-tokens",
            panel=_PANEL,
            metavar="SIZE",
            show_default="each sample's own",
        ),
    ] = None
    skip_too_long: Annotated[
        bool,
        option(
            "Leave out, and list, samples that the model has no positions for.",
            "--skip-too-long",
            panel=_PANEL,
        ),
    ] = False
    quiet: Quiet = False


def run(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES",
            help="Data sets: our own jsonl, or those of Star Attention, RULER, kvpress, BABILong, InfiniteBench, SCBench.",
        ),
    ],
    model: ModelOptions,
    options: RunOptions,
    format: Annotated[
        str | None,
        option(
            "What the files are.",
            "--format",
            panel="Data",
            metavar="NAME",
            show_default="told by their fields",
        ),
    ] = None,
    prompts: Prompts = None,
    variants: Variants = VARIANTS,
    seed: Seed = 0,
) -> None:
    """Answer the samples of data sets with several methods, and report.

    Example: star-attention eval run my.jsonl -m models/needle-17m --variants dense,star:/4 --out results
    """

    def make(tokenizer: Any) -> tuple[list[Sample], dict[str, str]]:
        from star_attention.evals.formats import files as readers

        return readers.read_all(files, format=format, prompts=prompts), {}

    given = {"files": files} | _given(format=format, prompts=prompts)
    data = _Data(make=make, suite="files", options=given, seed=seed)
    _evaluate(model, options, lambda: _parsed(variants), lambda: data)


def ruler(
    model: ModelOptions,
    options: RunOptions,
    task: Task = None,
    length: Length = "4k",
    samples: Samples = 50,
    variants: Variants = VARIANTS,
    seed: Seed = 0,
    essays: Essays = None,
    words: Words = None,
    squad: Squad = None,
    hotpot: Hotpot = None,
    compat: Annotated[
        str | None,
        option(
            "star-attention: vt, cwe and fwe as in the official implementation.",
            "--compat",
            panel="Data",
            metavar="NAME",
        ),
    ] = None,
) -> None:
    """RULER: needles, variable tracking, word counts and, with their data sets, questions on documents.

    Without --task, the tasks that fit into the length and whose data is there: qa_1 needs --squad, qa_2 --hotpot.

    Example: star-attention eval ruler -m models/needle-17m --task niah_single_1,vt --length 1k,2k --samples 10 --out ruler
    """
    given = _given(essays=essays, words=words, squad=squad, hotpot=hotpot, compat=compat)
    _evaluate(
        model,
        options,
        lambda: _parsed(variants),
        lambda: _suite("ruler", task, length, samples, seed, given, chat=options.chat),
    )


def babilong(
    model: ModelOptions,
    options: RunOptions,
    task: Task = None,
    length: Length = "4k",
    samples: Samples = 50,
    variants: Variants = VARIANTS,
    seed: Seed = 0,
    background: Background = None,
    prompts: Prompts = None,
) -> None:
    """BABILong: facts of small stories scattered in a long text (qa1 to qa5).

    Example: star-attention eval babilong -m models/needle-17m --task qa1 --length 4k --out babilong
    """
    given = _given(background=background, prompts=prompts)
    _evaluate(
        model,
        options,
        lambda: _parsed(variants),
        lambda: _suite("babilong", task, length, samples, seed, given, chat=options.chat),
    )


def infinitebench(
    model: ModelOptions,
    options: RunOptions,
    task: Task = None,
    length: Length = "4k",
    samples: Samples = 50,
    variants: Variants = VARIANTS,
    seed: Seed = 0,
) -> None:
    """InfiniteBench's tasks that can be generated; its published files go through `eval run`.

    Example: star-attention eval infinitebench -m models/needle-17m --task passkey --length 4k --out infinitebench
    """
    _evaluate(
        model,
        options,
        lambda: _parsed(variants),
        lambda: _suite("infinitebench", task, length, samples, seed, {}, chat=options.chat),
    )


def niah(
    model: ModelOptions,
    options: RunOptions,
    length: Length = "1k,2k,4k",
    samples: Annotated[
        int,
        option("Samples of each depth and length.", "--samples", panel="Data", metavar="N", min=1),
    ] = 10,
    depths: Annotated[
        str | None,
        option(
            "Where the needle stands, in percent of the text, with commas between.",
            "--depths",
            panel="Data",
            metavar="NUMBERS",
            show_default="0,10,...,100",
        ),
    ] = None,
    variants: Variants = VARIANTS,
    seed: Seed = 0,
    essays: Essays = None,
    words: Words = None,
) -> None:
    """One needle at each depth and length, shown as heat maps.

    Example: star-attention eval niah -m models/needle-17m --length 1k,2k --samples 5 --out niah
    """
    given = _given(depths=depths, essays=essays, words=words)
    _evaluate(
        model,
        options,
        lambda: _parsed(variants),
        lambda: _suite("niah", None, length, samples, seed, given, chat=options.chat),
    )


def shared(
    model: ModelOptions,
    options: RunOptions,
    task: Task = None,
    length: Length = "4k",
    samples: Annotated[
        int,
        option(
            "Questions of each task and length, all together.",
            "--samples",
            panel="Data",
            metavar="N",
            min=1,
        ),
    ] = 50,
    questions: Annotated[
        int | None,
        option(
            "Questions on each context.",
            "--questions",
            panel="Data",
            metavar="N",
            min=1,
            show_default="10",
        ),
    ] = None,
    variants: Variants = VARIANTS,
    seed: Seed = 0,
    essays: Essays = None,
    words: Words = None,
) -> None:
    """Many questions on each context, which is encoded once.

    Example: star-attention eval shared -m models/needle-17m --length 4k --samples 5 --out shared
    """
    given = _given(
        questions=None if questions is None else str(questions), essays=essays, words=words
    )
    _evaluate(
        model,
        options,
        lambda: _parsed(variants),
        lambda: _suite("shared", task, length, samples, seed, given, chat=options.chat),
    )


Suite = Annotated[
    str,
    option(
        "Suite of the tasks: ruler, babilong, infinitebench, niah, shared.",
        panel="Data",
        metavar="NAME",
    ),
]
RETRIEVAL = "niah_single_1,niah_multikey_1,niah_multiquery"
"""Of the kinds that the paper's ablations are measured on: single, multi-key, multi-query."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Samples of any suite."""

    suite: Suite = "ruler"
    task: Annotated[
        str | None,
        option(
            "Tasks, with commas between.",
            "--task",
            panel="Data",
            metavar="NAMES",
            show_default=f"{RETRIEVAL}; all of another suite",
        ),
    ] = None
    length: Length = "16k"
    samples: Samples = 50
    seed: Seed = 0
    essays: Essays = None
    words: Words = None
    squad: Squad = None
    hotpot: Hotpot = None
    background: Background = None
    prompts: Prompts = None

    def make(self, *, chat: bool) -> _Data:
        """Raises `InvalidInputError` for an unknown suite or task, and for options that the suite does not take."""
        given = _given(
            essays=self.essays,
            words=self.words,
            squad=self.squad,
            hotpot=self.hotpot,
            background=self.background,
            prompts=self.prompts,
        )
        task = RETRIEVAL if self.task is None and self.suite == "ruler" else self.task
        return _suite(self.suite, task, self.length, self.samples, self.seed, given, chat=chat)


def sweep(
    model: ModelOptions,
    options: RunOptions,
    data: DataOptions,
    blocks: Annotated[
        str,
        option(
            "Block sizes, with commas between, /4 for a quarter of the length; the anchor is as large.",
            "--blocks",
            panel=_PANEL,
            metavar="SIZES",
        ),
    ] = "/32,/16,/8,/4,/2",
    anchors: Annotated[
        str | None,
        option(
            "Sweep over these anchor sizes instead (0 for none, = for the block size), behind the one size of --blocks.",
            "--anchors",
            panel=_PANEL,
            metavar="SIZES",
        ),
    ] = None,
) -> None:
    """Accuracy against block size or anchor size at a fixed length, beside dense attention: the paper's figures 5a and 5b.

    Example: star-attention eval sweep -m models/needle-17m --length 8k --blocks /4 --anchors 0,64,256,1k,= --out anchors
    """
    from star_attention.evals.runs.sweeps import anchor_sweep, block_sweep

    if anchors is not None and "," in blocks:
        raise typer.BadParameter(
            "--anchors need one block size; give --blocks /4", param_hint="--blocks"
        )
    _evaluate(
        model,
        options,
        lambda: block_sweep(blocks) if anchors is None else anchor_sweep(blocks, anchors),
        lambda: data.make(chat=options.chat),
    )


def ablations(
    model: ModelOptions,
    options: RunOptions,
    data: DataOptions,
    block: Annotated[str, option("Block size.", "--block", panel=_PANEL, metavar="SIZE")] = "/4",
) -> None:
    """What the anchor is for: other tokens in its place, or at other positions, beside dense attention: the paper's table 4.

    Example: star-attention eval ablations -m models/needle-17m --length 4k --samples 20 --out ablations
    """
    from star_attention.evals.runs.sweeps import ablation_table

    _evaluate(model, options, lambda: ablation_table(block), lambda: data.make(chat=options.chat))


def perplexity(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A text file in UTF-8.")],
    model: ModelOptions,
    length: Annotated[
        str, option("Tokens of a window.", "--length", panel="Data", metavar="SIZE")
    ] = "4k",
    tail: Annotated[
        str,
        option(
            "Tokens at a window's end that are predicted.", "--tail", panel="Data", metavar="SIZE"
        ),
    ] = "512",
    windows: Annotated[
        int | None,
        option(
            "Windows of the text, from its start.",
            "--windows",
            panel="Data",
            metavar="N",
            min=1,
            show_default="all",
        ),
    ] = None,
    batch: Annotated[
        int, option("Windows encoded at once.", "--batch", panel=_PANEL, metavar="N", min=1)
    ] = 4,
    variants: Variants = VARIANTS,
    seed: Annotated[int, option("Of anchors that are random.", panel=_PANEL, metavar="N")] = 0,
    out: Annotated[
        str | None,
        option(
            "A folder for perplexity.json, which has none yet.",
            "--out",
            "-o",
            panel="Output",
            metavar="FOLDER",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Perplexity of a text's tails given their heads; differences are against the first variant, paired by window.

    Example: star-attention eval perplexity book.txt -m models/needle-17m --length 2k --tail 256 --variants dense,star:/4
    """
    variant_list, text, tokens, tail_tokens = [], "", 0, 0
    if is_rank_0():
        variant_list, text = _parsed(variants), read_text(file)
        tokens, tail_tokens = parse_size(length, "length"), parse_size(tail, "tail")
        if out is not None:
            from star_attention.evals.runs.perplexity import check_output

            check_output_folder(out)
            check_output(Path(out))
    notes = Status(quiet=quiet)
    star = session.load(model, notes)
    from star_attention.evals.runs import perplexity as measurement

    ids: list[list[int]] = []
    if is_rank_0():
        ids = measurement.windows_of(star.tokenizer, text, length=tokens, count=windows)
    ids, variant_list, tail_tokens = star.from_rank_0((ids, variant_list, tail_tokens))
    rows = measurement.run(
        star, ids, variant_list, tail=tail_tokens, batch=batch, seed=seed, progress=notes.say
    )
    if not is_rank_0():
        return
    print(
        f"{counted(len(ids), 'window')} of {tokens:,} tokens, the last {tail_tokens:,} predicted\n"
    )
    print(table(measurement.table(rows)))
    if out is not None:
        measurement.write(
            Path(out), star, rows, text=text, file=file, length=tokens, tail=tail_tokens, seed=seed
        )


def report(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER",
            help="A folder that a run was written to, or several, joined in --out.",
        ),
    ],
    out: Annotated[
        str | None,
        option(
            "New folder for runs that are joined.", "--out", "-o", panel="Output", metavar="FOLDER"
        ),
    ] = None,
) -> None:
    """Write the reports of a run again, from its predictions; or join runs that differ in samples or variants alone, and report.

    Examples: star-attention eval report results

    star-attention eval report gpu0 gpu1 gpu2 --out results
    """
    if out is None and len(folders) > 1:
        raise InvalidInputError(
            f"{len(folders)} folders cannot be joined without a new folder; give one with --out"
        )
    if out is not None:
        from star_attention.evals.runs.merge import join

        join(folders, out)
    _report(Path(out or folders[0]))


COMMANDS: tuple[Callable[..., None], ...] = (
    *(run, ruler, babilong, infinitebench, niah, shared),
    *(sweep, ablations, perplexity, report),
)


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Where samples come from.

    make: from the tokenizer, all samples and what is left out, with the reasons. The rest is for the record.
    """

    make: Callable[[Any], tuple[list[Sample], dict[str, str]]]
    suite: str
    options: dict[str, Any]
    seed: int


_NONE = _Data(make=lambda tokenizer: ([], {}), suite="", options={}, seed=0)
"""What other ranks know."""


def _given(**options: str | None) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _parsed(variants: str) -> list[Variant]:
    from star_attention.evals.runs.variants import parse_all

    return parse_all(variants)


def _suite(
    name: str,
    task: str | None,
    length: str,
    samples: int,
    seed: int,
    options: dict[str, Any],
    *,
    chat: bool,
) -> _Data:
    """Samples of a suite's tasks at each length; without a task, of all whose data is there and that fit.

    Raises `InvalidInputError` for an unknown suite or task, `SizeError` for a length that is none.
    """
    lengths = [parse_size(one, "length") for one in length.split(",")]
    from star_attention.evals import suites

    suite = suites.get(name)
    named = None if task is None else [part.strip() for part in task.split(",")]
    tasks = named or list(suite.available_tasks(options))
    for one in tasks:
        suite.check(one, options)
    for what, given in (("task", tasks), ("length", lengths)):
        if len(set(given)) < len(given):
            raise InvalidInputError(
                f"a {what} is named twice in {', '.join(map(str, given))}; give each once"
            )

    def make(tokenizer: Any) -> tuple[list[Sample], dict[str, str]]:
        from star_attention.evals.runs.prompts import chat_tokens
        from star_attention.evals.suites.parallel import generate_cells

        reserve = chat_tokens(tokenizer) if chat else 0
        cells = [(one, tokens) for tokens in lengths for one in tasks]
        made: list[Sample] = []
        left_out: dict[str, str] = {}
        for (one, tokens), some in zip(
            cells,
            generate_cells(
                suite,
                cells,
                tokenizer=tokenizer,
                reserve=reserve,
                count=samples,
                seed=seed,
                options=options,
            ),
            strict=True,
        ):
            if not isinstance(some, SizeError):
                made += some
            elif task is not None or len(tasks) == 1:
                raise some
            else:
                left_out[f"{one} at {tokens:,} tokens"] = str(some)
        if not made:
            raise SizeError(
                f"no task of {name} fits; of the first: {next(iter(left_out.values()))}"
            )
        return made, left_out

    return _Data(make=make, suite=name, options=options, seed=seed)


def _evaluate(
    model: ModelOptions,
    options: RunOptions,
    variants: Callable[[], list[Variant]],
    of: Callable[[], _Data],
) -> None:
    """Samples first, then the model, the answers and the reports.

    (Rank 0 alone reads what was asked for: were all to find the same mistake, one could end before rank 0 has told it.)
    """
    notes = Status(quiet=options.quiet)
    data, tried = _NONE, []
    samples: list[Sample] = []
    left_out: dict[str, str] = {}
    if is_rank_0():
        from star_attention.evals.runs import run_folder
        from star_attention.hf.loading.load import load_tokenizer

        data, tried = of(), variants()
        check_output_folder(options.out)
        run_folder.check_output(Path(options.out))
        with notes.waiting(f"making samples of {data.suite}"):
            samples, left_out = data.make(load_tokenizer(model.model))
        for what, why in left_out.items():
            notes.say(f"{what} is left out: {why}")
        notes.say(f"{counted(len(samples), 'sample')}, {counted(len(tried), 'variant')}")
    star = session.load(model, notes)
    if not options.chat and getattr(star.tokenizer, "chat_template", None):
        notes.say("texts go in as they are; this model has a chat template, which --chat uses")
    from star_attention.evals.runs import runner
    from star_attention.evals.runs.settings import RunSettings

    max_new_tokens = options.max_new_tokens
    summary = runner.run(
        star,
        samples,
        tried,
        options.out,
        RunSettings(
            suite=data.suite,
            options=data.options,
            seed=data.seed,
            chat=options.chat,
            max_new_tokens=None
            if max_new_tokens is None
            else parse_size(max_new_tokens, "max_new_tokens"),
            limit=options.limit,
            skip_too_long=options.skip_too_long,
        ),
        left_out=left_out,
        progress=notes.say,
    )
    if not is_rank_0():
        return
    if summary.earlier:
        notes.say(f"{summary.earlier:,} answers were already there")
    if summary.skipped:
        notes.say(
            f"{summary.skipped:,} samples are too long for the model and were skipped; the report"
            " lists them"
        )
    _report(summary.folder)


def _report(folder: Path) -> None:
    from star_attention.evals.reports import report as reports
    from star_attention.evals.reports.remarks import in_short
    from star_attention.evals.reports.results import Results

    files = reports.write(folder)
    print("\n".join(in_short(Results.read(folder))))
    print("\n" + ", ".join(str(file) for file in files if file.suffix != ".png"))
