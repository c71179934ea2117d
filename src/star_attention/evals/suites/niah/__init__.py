"""A needle in a haystack: one needle at several depths, the grid that heat maps show."""

from star_attention.evals.suites.options import ESSAYS, WORDS, SuiteOption
from star_attention.evals.suites.suite import Suite

DEPTHS = "0,10,20,30,40,50,60,70,80,90,100"

SUITE = Suite(
    name="niah",
    help="One needle at each depth and length, drawn as heat maps.",
    example="--length 1k,2k --samples 1 --out niah",
    tasks=("niah_grid",),
    options=(
        SuiteOption(
            name="depths",
            help="Depths of the needle, in percent of the text, separated by commas.",
            metavar="NUMBERS",
            default="0,10,...,100",
        ),
        ESSAYS,
        WORDS,
    ),
    generator="star_attention.evals.suites.niah.generate:generate",
    length="1k,2k,4k",
    samples=10,
    samples_help="Samples of each depth and length.",
)
