"""Phase 1 of versions of a context: what is new of an extended or an edited one is encoded.

Layers with a sliding window keep of the old version what later tokens see. That is all that an
extension takes; an edit encodes more blocks again, or all, where it takes what is not kept
(`planning.edits`).

Axes: B contexts, G KV heads, S tokens, D head size.
"""

from __future__ import annotations

from star_attention.hf.cache.encode import EncodeCache, Recent
from star_attention.hf.cache.exchange import begin, keep_anchor
from star_attention.phase1 import EncodeJob, Forwards, Steps, empty
from star_attention.planning.edits import Share, copied_runs
from star_attention.planning.exchange import to_extend
from star_attention.planning.segments import Segments
from star_attention.planning.windows import dropping, first_kept
from star_attention.storage.kv import ContextKV


def extend(job: EncodeJob, kv: ContextKV, *, start: int, owner: int) -> ContextKV:
    """Encode the tokens from `start` on, after a context whose keys and values `kv` holds.

    Args:
        job: one context, with all of its ids, old and new.
        kv: this rank's share of the old context.
        start: first new token.
        owner: the context-parallel rank that holds the last old token; it encodes the new ones.

    Returns:
        The share with the new tokens on the owner, `kv` itself on the other ranks, where layers
        with a window may keep more than is seen from now on.
    """
    plan, comm, windows = job.plan, job.comm, job.handle.windows
    recents = [Recent() for _ in windows]
    anchors = None
    if plan.anchor_size and not job.layout[owner].holds(0):
        anchors = [empty(job.handle, Segments.prefix(plan.anchor_size), comm)]
    if comm.cp_size > 1:
        _send_to(owner, job, kv, start, recents, anchors or [])
    if comm.cp_rank != owner:
        return kv
    store = kv.copied(job.segments, kv.segments, job.kept(kv.kv_format))
    dropped = dropping(windows, plan.context_tokens, kv.kv_format.windows)
    for layer, window, recent in zip(kv.layers, dropped, recents, strict=True):
        if window is not None and not layer.is_empty:
            for run in layer.segments:
                recent.add(run[0], *layer.slice(*run))
    cache = EncodeCache(
        plan, [store], windows, comm, anchors=anchors, recents=recents, keeps_own=False
    )
    spans = plan.between(start, plan.context_tokens, job.tokens_per_forward)
    Forwards(job).run(cache, spans)
    return store


def encode_again(job: EncodeJob, old: ContextKV, rounds: list[list[Share]]) -> Steps[ContextKV]:
    """Encode the changed blocks of a context, and copy the others.

    Args:
        job: one context, with its new ids.
        old: this rank's share of the old context.
        rounds: which rank encodes which tokens (`planning.edits.rounds`).

    Returns:
        This rank's share of the new context.
    """
    plan, rank = job.plan, job.comm.cp_rank
    own = [
        run for shares in rounds for share in shares if share.owner == rank for run in share.runs
    ]
    runs = copied_runs(plan, job.segments, old.segments, own)
    store = old.copied(job.segments, runs, job.kept(old.kv_format))
    for shares in rounds:
        yield from _encode_round(job, store, shares)
    return store


def _encode_round(job: EncodeJob, store: ContextKV, shares: list[Share]) -> Steps[None]:
    """Encode this rank's share of a round, after all ranks sent each other what it takes."""
    plan, comm, windows = job.plan, job.comm, job.handle.windows
    recents = [Recent() for _ in windows]
    anchors = None
    if plan.anchor_size and not job.segments.holds(0):
        anchors = [empty(job.handle, Segments.prefix(plan.anchor_size), comm)]
    if comm.cp_size > 1:
        for share in shares:
            _send_to(share.owner, job, store, share.runs[0][0], recents, anchors or [])
    spans = [
        span
        for share in shares
        if share.owner == comm.cp_rank
        for run in share.runs
        for span in plan.between(*run, job.tokens_per_forward)
    ]
    if spans:
        cache = EncodeCache(
            plan, [store], windows, comm, anchors=anchors, recents=recents, keeps_own=False
        )
        yield from Forwards(job).steps(cache, spans)


def _send_to(
    owner: int,
    job: EncodeJob,
    kv: ContextKV,
    start: int,
    recents: list[Recent],
    anchors: list[ContextKV],
) -> None:
    """Send what `owner` needs of other ranks to encode tokens from `start` on. Collective."""
    plan, lookbacks = job.plan, job.plan.lookbacks(len(recents))
    dropped = dropping(job.handle.windows, plan.context_tokens, kv.kv_format.windows)
    for layer, place in job.places.items():
        window = job.handle.windows[layer]
        transfers = to_extend(
            plan,
            job.layout,
            lookbacks[layer],
            window,
            start=start,
            owner=owner,
            first_kept=first_kept(start, dropped[layer]),
        )
        if not transfers:
            continue
        arriving = begin(job.comm, transfers, kv.layers[layer].slice, layer=layer, place=place)
        for piece in arriving.pieces():
            recents[layer].add(*piece)
            keep_anchor(piece, anchors, layer, plan.anchor_size)
