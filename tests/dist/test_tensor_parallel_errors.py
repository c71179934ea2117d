"""Settings that `tensor_parallel` refuses, and faults of ranks that share heads and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.distributed import SoloComm, TorchComm
from star_attention.errors import InvalidInputError, SizeError, UnsupportedModelError
from tests.dist.pool import Pool
from tests.dist.tp_models import SIZES, model, on_disk, star_of
from tests.engines import CONTEXT, ids
from tests.families import build


def load(comm: TorchComm, path: Path, tensor_parallel: int, **settings: Any) -> tuple[str, str]:
    """Return type and message of the error, if there is one."""
    try:
        star_of(comm, path, tensor_parallel, **settings)
    except (InvalidInputError, UnsupportedModelError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(
    ("name", "tensor_parallel", "kind", "phrase"),
    [
        ("llama", 3, "InvalidInputError", "does not divide the number of ranks, 4"),
        ("llama", 0, "InvalidInputError", "not a number of ranks"),
        ("llama_mqa", 2, "UnsupportedModelError", "num_key_value_heads 1 does not divide"),
        ("gpt2", 2, "UnsupportedModelError", "no tensor-parallel plan for gpt2"),
        ("phi3", 2, "UnsupportedModelError", "does not shard the attention heads"),
        ("deepseek_v2", 2, "UnsupportedModelError", "mla_kv_a_proj"),
        ("cohere", 2, "UnsupportedModelError", "weights for each head"),
    ],
)
def test_what_cannot_be_sharded_is_refused_on_all_ranks(
    pool: Pool, models: Path, name: str, tensor_parallel: int, kind: str, phrase: str
) -> None:
    path = models / f"plain-{name}"
    if not path.exists():
        (build(name) if name == "llama_mqa" else model(name)).save_pretrained(path)
    for error, message in pool.run(load, 4, path=path, tensor_parallel=tensor_parallel):
        assert error == kind
        assert phrase in message


def test_settings_that_do_not_go_together(pool: Pool, models: Path) -> None:
    settings: dict[str, Any] = dict(tensor_parallel=2, model_kwargs=dict(device_map="auto"))
    for error, message in pool.run(load, 2, path=on_disk(models, "llama"), **settings):
        assert (error, "device_map" in message) == ("InvalidInputError", True)


def generate_with_guidance(comm: TorchComm, path: Path) -> list[int]:
    star = star_of(comm, path, 2)
    context = star.encode(ids(CONTEXT))
    with pytest.raises(InvalidInputError, match="guidance_scale needs extra forwards"):
        star.generate(context, [5, 6], max_new_tokens=3, guidance_scale=1.5)
    # The ranks have met again.
    return star.generate(context, [5, 6], max_new_tokens=3).token_ids


def test_guidance_is_refused_and_the_next_call_works(pool: Pool, models: Path) -> None:
    results = pool.run(generate_with_guidance, 4, path=on_disk(models, "llama"))
    assert results == [results[0]] * 4


def wrap_in_adapter(comm: TorchComm, path: Path) -> None:
    peft = pytest.importorskip("peft")
    star = star_of(comm, path, 2)
    with pytest.raises(UnsupportedModelError, match="adapters"):
        StarLLM(peft.get_peft_model(star.model, peft.LoraConfig(target_modules=["q_proj"])).eval())


def test_adapters_are_refused(pool: Pool, models: Path) -> None:
    pool.run(wrap_in_adapter, 2, path=on_disk(models, "llama"))


def save_as_model(comm: TorchComm, path: Path, target: Path) -> None:
    star = StarLLM.from_pretrained(path, comm=comm, device="cpu", tensor_parallel=2, **SIZES)
    with pytest.raises(InvalidInputError, match="this rank's weights only"):
        star.model.save_pretrained(target)


def test_a_shard_is_not_saved_as_a_model(pool: Pool, models: Path, tmp_path: Path) -> None:
    pool.run(save_as_model, 2, path=on_disk(models, "llama"), target=tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def refuse_on_rank_1(comm: TorchComm, path: Path) -> int:
    sharded: dict[str, Any] = SIZES | dict(tensor_parallel=2)
    for bad in (
        SIZES | dict(anchor_size=50),
        sharded | dict(model_kwargs=dict(device_map="auto")),
    ):
        settings = bad if comm.rank == 1 else sharded
        with pytest.raises((InvalidInputError, SizeError)):
            StarLLM.from_pretrained(path, comm=comm, device="cpu", **settings)
    star = star_of(comm, path, 1)
    star.model.train(comm.rank == 1)
    with pytest.raises(InvalidInputError, match="training"):
        StarLLM(star.model, comm=comm)
    return comm.rank


def test_what_one_rank_refuses_all_refuse(pool: Pool, models: Path) -> None:
    assert pool.run(refuse_on_rank_1, 2, path=on_disk(models, "llama")) == [0, 1]


# ------------------------------------------------------------------ several calls and engines


def fail_on_victim(
    comm: TorchComm, path: Path, tensor_parallel: int, victim: int, phase: int
) -> list[int]:
    """Return an answer after a call in which one rank raised an exception."""
    star = star_of(comm, path, tensor_parallel, block_size=40)  # 3 blocks
    real = star.runtime.handle.encode

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("planted")

    def answer(context: Any) -> list[int]:
        return star.generate(context, [5, 6], max_new_tokens=3).token_ids

    context = star.encode(ids(CONTEXT)) if phase == 2 else None
    if star.rank == victim:
        star.runtime.handle.encode = fail  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError, match="planted"):
        answer(context) if phase == 2 else star.encode(ids(CONTEXT))
    star.runtime.handle.encode = real  # type: ignore[method-assign]
    return answer(star.encode(ids(CONTEXT)))


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize(("tensor_parallel", "victim"), [(2, 3), (2, 1), (1, 2)])
def test_an_exception_is_raised_on_all_and_the_next_call_works(
    pool: Pool, models: Path, tensor_parallel: int, victim: int, phase: int
) -> None:
    """It is raised even before tp ranks, or cp ranks with the same heads, exchange anything."""
    path = on_disk(models, "llama")
    settings: dict[str, Any] = dict(tensor_parallel=tensor_parallel, victim=victim, phase=phase)
    results = pool.run(fail_on_victim, 4, path=path, **settings)
    star = star_of(SoloComm(), path, 1, block_size=40)
    tokens = star.generate(star.encode(ids(CONTEXT)), [5, 6], max_new_tokens=3).token_ids
    assert results == [tokens] * 4


def answer_with_two_engines(comm: TorchComm, path: Path) -> Any:
    plain, sharded = star_of(comm, path, 1), star_of(comm, path, 2)
    contexts = [star.encode(ids(CONTEXT)) for star in (plain, sharded)]
    answers = [
        star.generate(context, [5, 6], max_new_tokens=4).token_ids
        for star, context in zip((plain, sharded), contexts, strict=True)
    ]
    for star, context in ((plain, contexts[1]), (sharded, contexts[0])):
        with pytest.raises(InvalidInputError, match="lies on"):
            star.generate(context, [5, 6], max_new_tokens=4)
    # This one finds out by itself which ranks share the model.
    again = StarLLM(sharded.model, **SIZES)
    context = again.encode(ids(CONTEXT))
    answers.append(again.generate(context, [5, 6], max_new_tokens=4).token_ids)
    with pytest.raises(InvalidInputError, match="other ranks"):
        StarLLM(sharded.model, comm="solo", **SIZES)
    return answers


def test_engines_of_different_meshes_live_side_by_side(pool: Pool, models: Path) -> None:
    results = pool.run(answer_with_two_engines, 4, path=on_disk(models, "llama"))
    assert results == [[results[0][0]] * 3] * 4


def lay_out_ring(comm: TorchComm, path: Path, ring_layout: str) -> Any:
    star = StarLLM.from_pretrained(
        path, comm=comm, device="cpu", method="ring", ring_layout=ring_layout
    )
    return [len(segments) for segments in star.encode(ids(CONTEXT)).layout]


def test_from_pretrained_passes_all_settings_on(pool: Pool, models: Path) -> None:
    path = on_disk(models, "llama")
    for ring_layout, runs in (("zigzag", 2), ("contiguous", 1)):
        assert pool.run(lay_out_ring, 2, path=path, ring_layout=ring_layout) == [[runs, runs]] * 2
