"""Several questions on each context, as in SCBench (Li et al., arXiv 2412.10319).

This is the use case for encoding a context once.
"""

from star_attention.evals.suites.options import ESSAYS, WORDS, SuiteOption
from star_attention.evals.suites.suite import Suite

QUESTIONS = 10

SUITE = Suite(
    name="shared",
    help="Several questions on each context, which is encoded once.",
    example="--length 4k --samples 5 --out shared",
    tasks=("shared_kv", "shared_niah"),
    options=(
        SuiteOption(
            name="questions",
            help="Questions on each context.",
            metavar="N",
            default=str(QUESTIONS),
            type=int,
            min=1,
        ),
        ESSAYS,
        WORDS,
    ),
    generator="star_attention.evals.suites.shared.generate:generate",
    samples_help="Questions of each task and length, over all contexts.",
)
