"""Star Attention in one file: both phases on random tensors, from `attend` and `merge` alone.

`attend` computes attention over one run of keys and returns a state: each query row's output, and
the logarithm of the sum of its exponentiated scores. `merge` joins states over disjoint keys into
the state over their union, exactly. The method only chooses which keys each query sees; the last
lines compare both phases with that choice written out as one mask (docs/method.md).

    python examples/star_attention_in_one_file.py

Axes: B batch, Q queries, K keys, H query heads, G KV heads, D head size.
"""

import torch
from torch import Tensor

from star_attention.attention.attend import Rule, attend
from star_attention.attention.oracle import law_mask, masked_attention
from star_attention.attention.state import State, merge

CONTEXT, QUERY = 2000, 7
BLOCK, ANCHOR, RANKS = 512, 128, 3
H, G, D = 6, 2, 32
RULE = Rule(scale=D**-0.5)


def encode(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
    """Phase 1: each block attends to itself and to the anchor, the first tokens of the context."""
    outs = []
    for start in range(0, CONTEXT, BLOCK):
        own = slice(start, min(start + BLOCK, CONTEXT))
        state = attend(q_BQHD[:, own], k_BKGD[:, own], v_BKGD[:, own], rule=RULE, offset=0)
        # The first block contains the anchor; every later block sees all of it.
        if start > 0:
            keys, values = k_BKGD[:, :ANCHOR], v_BKGD[:, :ANCHOR]
            state = merge([state, attend(q_BQHD[:, own], keys, values, rule=RULE, offset=start)])
        outs.append(state.out_BQHD)
    return torch.cat(outs, dim=1)


def answer(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
    """Phase 2: the query attends to each rank's shard of the context and to its own tokens."""

    def attend_to(start: int, stop: int) -> State:
        keys, values = k_BKGD[:, start:stop], v_BKGD[:, start:stop]
        return attend(q_BQHD, keys, values, rule=RULE, offset=CONTEXT - start)

    cuts = [rank * CONTEXT // RANKS for rank in range(RANKS + 1)]
    # On several GPUs these states are all that the ranks exchange in a layer.
    shards = [attend_to(cuts[rank], cuts[rank + 1]) for rank in range(RANKS)]
    tail = attend_to(CONTEXT, CONTEXT + QUERY)
    return merge([*shards, tail]).out_BQHD


def main() -> None:
    torch.manual_seed(0)
    total = CONTEXT + QUERY
    q_BQHD = torch.randn(1, total, H, D)
    k_BKGD, v_BKGD = torch.randn(1, total, G, D), torch.randn(1, total, G, D)

    at = torch.arange(total)
    keep_QK = law_mask(at, at, context_tokens=CONTEXT, block_size=BLOCK, anchor_size=ANCHOR)
    law_BQHD = masked_attention(q_BQHD, k_BKGD, v_BKGD, keep_QK, scale=RULE.scale).out_BQHD
    pairs, dense_pairs = int(keep_QK.sum()), total * (total + 1) // 2
    print(f"score pairs: {pairs:,}, with dense attention {dense_pairs:,}")

    encoded_BQHD = encode(q_BQHD[:, :CONTEXT], k_BKGD[:, :CONTEXT], v_BKGD[:, :CONTEXT])
    difference = (encoded_BQHD - law_BQHD[:, :CONTEXT]).abs().max()
    print(f"phase 1, largest difference from the mask: {difference:.1e}")

    answer_BQHD = answer(q_BQHD[:, CONTEXT:], k_BKGD, v_BKGD)
    difference = (answer_BQHD - law_BQHD[:, CONTEXT:]).abs().max()
    print(f"phase 2, largest difference from the mask: {difference:.1e}")


if __name__ == "__main__":
    main()
