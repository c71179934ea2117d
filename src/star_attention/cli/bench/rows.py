"""The options of `bench rows`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from star_attention.cli.bench.options import (
    PANEL,
    Block,
    Compile,
    Contexts,
    QueryTokens,
    Repeats,
    known_names,
    names_of,
)
from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.options import option
from star_attention.cli.sizes import token_count, token_counts
from star_attention.cli.torchrun import rank_and_size
from star_attention.config import KV_SETTINGS, StarConfig
from star_attention.errors import InvalidInputError, quote

if TYPE_CHECKING:
    from star_attention.bench.rows import Rows


@dataclass(frozen=True, kw_only=True)
class RowsOptions:
    context: Contexts = "16k"
    block: Block = "16k"
    texts: Annotated[
        int, option("Texts, which rows take in turn.", panel=PANEL, metavar="N", min=1)
    ] = 1
    rows: Annotated[
        str,
        option(
            "Rows at once, separated by commas. Cases other than lockstep take the largest.",
            panel=PANEL,
            metavar="NUMBERS",
        ),
    ] = "1,32"
    cases: Annotated[
        str,
        option(
            "What is measured, separated by commas: lockstep (rows begin and end together),"
            " turnover (they end at random, and each is followed by another), encode (a context is"
            " encoded beside them), turn (the first token of a conversation's second answer).",
            panel=PANEL,
            metavar="NAMES",
        ),
    ] = "lockstep"
    encode_tokens: Annotated[
        str | None,
        option(
            "Length of the context that is encoded beside rows.",
            panel=PANEL,
            metavar="SIZE",
            show_default="that of the texts",
        ),
    ] = None
    query_tokens: QueryTokens = 64
    answer_tokens: Annotated[
        int,
        option("Tokens of an answer; of turnover, on average.", panel=PANEL, metavar="N", min=4),
    ] = 128
    repeats: Repeats = 3
    settings: Annotated[dict[str, Any], ConfigOptions(*KV_SETTINGS)] = field(default_factory=dict)
    compile: Compile = None

    def benchmark(self) -> Rows:
        """Check the options."""
        from star_attention.bench.rows import CASES, Rows

        StarConfig.of(**self.settings)
        ranks = rank_and_size()[1]
        if ranks > 1:
            raise InvalidInputError(
                f"rows are measured in a single process, not on {ranks} ranks; start it without"
                " torchrun"
            )
        contexts = token_counts(self.context, "context")
        return Rows(
            contexts=contexts,
            block=token_count(self.block, "block_size"),
            texts=self.texts,
            rows=_numbers_of(self.rows),
            cases=known_names("case", self.cases, CASES),
            encode_tokens=max(contexts)
            if self.encode_tokens is None
            else token_count(self.encode_tokens, "encode-tokens"),
            query_tokens=self.query_tokens,
            answer_tokens=self.answer_tokens,
            repeats=self.repeats,
            compile=self.compile,
            **self.settings,
        )


def _numbers_of(text: str) -> list[int]:
    """Read numbers of rows that are separated by commas."""
    numbers = []
    for name in names_of(text):
        if not name.isdecimal() or int(name) < 1:
            raise InvalidInputError(f"rows {quote(name)} is not a number from 1; give e.g. 1,32")
        numbers.append(int(name))
    return numbers
