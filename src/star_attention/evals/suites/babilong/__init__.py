"""BABILong (Kuratov et al., arXiv 2406.10149), qa1 to qa5: a short story's facts in a long text.

`stories` simulates the stories, `prompts` has the text around them, `generate` puts them together.
"""

from star_attention.evals.suites.options import SuiteOption
from star_attention.evals.suites.suite import Suite

SUITE = Suite(
    name="babilong",
    help="BABILong: facts of short stories, scattered in a long text (qa1 to qa5).",
    example="--task qa1 --length 4k --samples 5 --out babilong",
    tasks=("qa1", "qa2", "qa3", "qa4", "qa5"),
    options=(
        SuiteOption(
            name="background",
            help="Text that the facts are scattered in: a .json file with a `text` field, a folder"
            " of .txt files, or a text file.",
            metavar="PATH",
            default="the language reference of the running Python",
            is_path=True,
        ),
        SuiteOption(
            name="prompts",
            help="BABILong's published prompts: babilong/prompts.py of github.com/booydar/babilong"
            " (parsed, not executed), or its DEFAULT_PROMPTS as .json.",
            metavar="PATH",
            default="our own prompts, which the bundled model was trained on",
            is_path=True,
        ),
    ),
    generator="star_attention.evals.suites.babilong.generate:generate",
)
