"""InfiniteBench (Zhang et al., arXiv 2402.13718): its 12 tasks, five of them with a generator.

`tasks` describes all 12, `generate` generates five; `evals/formats` reads the published files.
"""

from star_attention.evals.suites.suite import Suite

SUITE = Suite(
    name="infinitebench",
    help="InfiniteBench: the tasks that can be generated; `eval run` reads its published files.",
    example="--task passkey --length 4k --samples 5 --out infinitebench",
    tasks=("passkey", "number_string", "kv_retrieval", "math_find", "code_run"),
    generator="star_attention.evals.suites.infinitebench.generate:generate",
)
