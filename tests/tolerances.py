"""The table of tolerances: the largest error that attention may have, by working dtype.

The largest error of a kernel may be `FACTOR` times that of a plain implementation in the same
dtype, both measured against the oracle in float64, plus `FLOOR` for cases in which the plain one
happens to be exact (a row with a single key).
"""

from __future__ import annotations

import torch

FACTOR = 2.0
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
EXACT = 1e-6
"""For float32 algebra on values of the order of one."""
