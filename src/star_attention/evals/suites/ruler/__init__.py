"""RULER (Hsieh et al., arXiv 2404.06654): 13 tasks with the published templates and metrics.

`generate` generates all of them, from `needles`, `lists` and `qa`.
"""

from star_attention.evals.suites.options import ESSAYS, WORDS, SuiteOption
from star_attention.evals.suites.suite import Suite

COMPAT = "star-attention"

SUITE = Suite(
    name="ruler",
    help="RULER: needles, variable tracking, word counts, and questions about documents.\n\n"
    "Without --task, runs the tasks that fit into the length and whose data is given: qa_1 needs"
    " --squad, qa_2 needs --hotpot.",
    example="--task niah_single_1,vt --length 1k,2k --samples 5 --out ruler",
    tasks=(
        "niah_single_1",
        "niah_single_2",
        "niah_single_3",
        "niah_multikey_1",
        "niah_multikey_2",
        "niah_multikey_3",
        "niah_multivalue",
        "niah_multiquery",
        "vt",
        "cwe",
        "fwe",
        "qa_1",
        "qa_2",
    ),
    options=(
        ESSAYS,
        SuiteOption(
            name="squad",
            help="SQuAD's dev-v2.0.json; qa_1 needs it.",
            metavar="PATH",
            is_path=True,
            tasks=("qa_1",),
        ),
        SuiteOption(
            name="hotpot",
            help="HotpotQA's hotpot_dev_distractor_v1.json; qa_2 needs it.",
            metavar="PATH",
            is_path=True,
            tasks=("qa_2",),
        ),
        WORDS,
        SuiteOption(
            name="compat",
            help=f"`{COMPAT}`: vt, cwe and fwe as in the official implementation.",
            metavar="NAME",
            choices=(COMPAT,),
        ),
    ),
    generator="star_attention.evals.suites.ruler.generate:generate",
)
