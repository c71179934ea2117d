"""What a context holds back is the same on all ranks: the number of ranks is invisible."""

from __future__ import annotations

from typing import Any

import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from star_attention.hf.text.tokens import context_ids
from tests.dist.pool import Pool
from tests.engines import bundled_tokenizer, text_model

TEXT = "The hill is tall. " * 20 + "Rain"


def encode_extend_and_answer(comm: Any) -> tuple[list[list[int]], list[list[int]], Any]:
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)
    context = star.encode(TEXT)
    # The first extension is a space, which waits as a whole.
    spaced = star.extend(context, " ")
    longer = star.extend(spaced, "Stars come out.\n")
    contexts = (context, spaced, longer)
    replies = [star.generate(c, "A dog", max_new_tokens=3, ignore_eos=True) for c in contexts]
    logits = star.logits(longer, [7, 8])
    rows = [] if logits is None else logits.tolist()
    return [c.token_ids.tolist() for c in contexts], [r.token_ids for r in replies], rows


def test_ranks_hold_back_the_same(pool: Pool) -> None:
    ids, replies, rows = encode_extend_and_answer(SoloComm())
    assert ids[0] == ids[1] == context_ids(bundled_tokenizer(), TEXT)
    joined = TEXT + " Stars come out.\n"
    assert ids[2] == context_ids(bundled_tokenizer(), joined)
    for rank, answers in enumerate(pool.run(encode_extend_and_answer, 2)):
        assert answers[:2] == (ids, replies)
        if rank == 0:
            torch.testing.assert_close(torch.tensor(answers[2]), torch.tensor(rows))
