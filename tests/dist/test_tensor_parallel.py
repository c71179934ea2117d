"""Several ranks make up one host and share its heads and weights: nothing in the answers shows it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.planning import cost, traffic
from star_attention.distributed import SoloComm, TorchComm
from star_attention.errors import InvalidInputError, SizeError, UnsupportedModelError
from star_attention.hf.loading import tensor_parallel
from star_attention.hf.shape import model_shape
from star_attention.planning.plan import BlockPlan
from tests.dist.pool import Pool
from tests.dist.test_ranks_are_invisible import answer_of, check_model
from tests.engines import BUNDLED, CONTEXT, ids
from tests.families import build

SIZES = dict(block_size=24, anchor_size=10)
HEADS = dict(num_attention_heads=8, num_key_value_heads=4, intermediate_size=120)
PLAIN: dict[str, Any] = dict(block_size=None, anchor_size=None)
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gemma3_vlm", "starcoder2"]

OTHERS = ["olmo", "granite", "smollm3", "nemotron", "glm", "glm4", "ernie4_5", "apertus", "seed_oss", "arcee", "cohere2"]
OTHERS += ["exaone4", "ministral", "ministral3", "qwen2_sliding", "gemma3_dynamic_ntk", "llama_yarn", "llama_llama3scaling"]
OTHERS += ["gemma4", "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "ernie4_5_moe", "dots1", "exaone_moe"]

QUICK = ["gemma4", "mixtral", "qwen3_moe", "exaone4"]


@functools.cache
def model(name: str) -> Any:
    return build(name, **HEADS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def on_disk(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        model(name).save_pretrained(path)
    return path


def star_of(comm: Any, path: Path, tensor_parallel: int, **settings: Any) -> StarLLM:
    return StarLLM.from_pretrained(
        path, comm=comm, device="cpu", tensor_parallel=tensor_parallel, reserve_tokens=64, **(SIZES | settings)
    )


def answered(comm: TorchComm, path: Path, tensor_parallel: int, **settings: Any) -> dict[str, Any]:
    star = star_of(comm, path, tensor_parallel, tokens_per_forward=48, **settings)
    weights = sum(parameter.numel() for parameter in star.model.parameters())
    return answer_of(star) | dict(weights=weights)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("ranks", "tensor_parallel"),
    [(4, 2), (4, 4), *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in ((2, 2), (6, 2)))],
)
def test_every_family_against_the_oracle(
    pool: Pool, folder: Path, name: str, ranks: int, tensor_parallel: int
) -> None:
    results = pool.run(answered, ranks, path=on_disk(folder, name), tensor_parallel=tensor_parallel)
    check_model(results, model(name), **SIZES, tensor_parallel=tensor_parallel)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_other_families_against_the_oracle(pool: Pool, folder: Path, name: str) -> None:
    missing = tensor_parallel.reasons(model(name).config, 2)
    if missing:
        pytest.skip(f"in this release of transformers, {missing[0]}")
    results = pool.run(answered, 4, path=on_disk(folder, name), tensor_parallel=2)
    check_model(results, model(name), **SIZES, tensor_parallel=2)


@pytest.mark.parametrize("source", ["broadcast", "local"])
@pytest.mark.parametrize("how", ["gather", "reduce"])
def test_collectives_and_anchor_sources(pool: Pool, folder: Path, how: str, source: str) -> None:
    sizes = dict(block_size=40, anchor_size=40)  # 3 blocks
    words: dict[str, Any] = dict(path=on_disk(folder, "qwen3"), tensor_parallel=2, merge_collective=how)
    results = pool.run(answered, 6, **words, anchor_source=source, **sizes)
    check_model(results, model("qwen3"), **sizes, tensor_parallel=2)
    whole = sum(parameter.numel() for parameter in model("qwen3").parameters())
    cut = model_shape(model("qwen3").config, "float32").sharded_parameters
    assert [result["weights"] for result in results] == [whole - cut // 2] * 6
    assert cut > 0.8 * (whole - 2 * model("qwen3").get_input_embeddings().weight.numel())


def test_idle_hosts_take_part(pool: Pool, folder: Path) -> None:
    sizes = dict(block_size=128, anchor_size=128)
    results = pool.run(answered, 6, path=on_disk(folder, "llama"), tensor_parallel=2, **sizes)
    check_model(results, model("llama"), **sizes, tensor_parallel=2)


def half_logits(comm: Any, path: Path, tensor_parallel: int, dtype: str) -> Any:
    star = star_of(comm, path, tensor_parallel, dtype=dtype)
    return star.logits(star.encode(ids(CONTEXT)), [5, 6, 7])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(pool: Pool, folder: Path, dtype: str) -> None:
    words: dict[str, Any] = dict(path=on_disk(folder, "qwen3"), dtype=dtype)
    exact = half_logits(SoloComm(), tensor_parallel=1, **(words | dict(dtype="float32")))
    plain = half_logits(SoloComm(), tensor_parallel=1, **words)
    shared = pool.run(half_logits, 4, tensor_parallel=2, **words)[0]
    assert (shared - exact).norm() <= 2 * (plain - exact).norm()


# ------------------------------------------------------------------------------------------------- saved contexts


def saved(comm: Any, path: Path, tensor_parallel: int, book: Path) -> Any:
    star = star_of(comm, path, tensor_parallel)
    context = star.encode(ids(CONTEXT))
    context.save(book)
    return star.logits(context, [5, 6, 7])


def loaded(comm: Any, path: Path, tensor_parallel: int, book: Path) -> Any:
    star = star_of(comm, path, tensor_parallel)
    context = star.load_context(book)
    longer = star.extend(context, [9, 10, 11])
    return star.logits(context, [5, 6, 7]), star.generate(longer, [5, 6], max_new_tokens=3).token_ids


MESHES = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]


@pytest.mark.parametrize("readers", MESHES)
@pytest.mark.parametrize("writers", MESHES)
def test_any_mesh_reads_what_any_other_wrote(
    pool: Pool, folder: Path, tmp_path: Path, writers: tuple[int, int], readers: tuple[int, int]
) -> None:
    words: dict[str, Any] = dict(path=on_disk(folder, "qwen3"), book=tmp_path / "book.star")
    run = [
        pool.run(task, ranks, tensor_parallel=parallel, **words)[0] if ranks > 1 else task(SoloComm(), tensor_parallel=1, **words)
        for task, (ranks, parallel) in ((saved, writers), (loaded, readers))
    ]
    logits, tokens = run[1]
    torch.testing.assert_close(logits, run[0], atol=2e-4, rtol=1e-4)
    assert tokens == loaded(SoloComm(), tensor_parallel=1, **words)[1]


# ------------------------------------------------------------------------------------------------- every way to answer


def asked(comm: Any, path: Path, tensor_parallel: int, method: str) -> Any:
    star = star_of(comm, path, tensor_parallel, **(dict(method=method) if method == "star" else PLAIN | dict(method=method)))
    torch.manual_seed(star.rank)  # rank 0 alone draws
    queries = [[5, 6, 7], [8, 9]]
    contexts = star.encode([ids(40), ids(40, seed=2), ids(25)])
    context = contexts[0]
    words: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True)
    got = [
        star.generate(context, queries, **words),
        star.generate(context, queries[0], do_sample=True, seed=3, num_return_sequences=2, **words),
        star.generate(context, queries, num_beams=3, **words),
        star.generate(context, queries[0], prompt_lookup_num_tokens=3, **words),
        star.generate(contexts[1], queries[0], **words),
        star.generate(contexts[2], queries[0], **words),
    ]
    return [[reply.token_ids for reply in (one if isinstance(one, list) else [one])] for one in got]


@pytest.mark.parametrize("method", ["star", "dense", "ring"])
def test_every_way_to_answer(pool: Pool, folder: Path, method: str) -> None:
    words: dict[str, Any] = dict(path=on_disk(folder, "gemma3"), method=method)
    results = pool.run(asked, 4, tensor_parallel=2, **words)
    expected = asked(SoloComm(), tensor_parallel=1, **(words | dict(method="dense" if method == "ring" else method)))
    assert results == [expected] * 4


# ------------------------------------------------------------------------------------------------- the wire


def counted(comm: TorchComm, path: Path, tensor_parallel: int, anchor_source: str, tokens_per_forward: int) -> Any:
    star = star_of(comm, path, tensor_parallel, anchor_source=anchor_source, tokens_per_forward=tokens_per_forward)
    context = star.encode(ids(CONTEXT))
    reply = star.generate(context, ids(9), max_new_tokens=5, ignore_eos=True)
    return context.wire, context.wire_within, reply.wire, reply.wire_within


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("tokens_per_forward", [4, 48])
@pytest.mark.parametrize(
    ("ranks", "tensor_parallel", "how", "source"),
    [(2, 2, None, "broadcast"), (4, 2, "reduce", "local"), (6, 2, "gather", "broadcast"), (4, 1, None, "broadcast")],
)
def test_bytes_are_those_of_the_plan(
    pool: Pool, folder: Path, name: str, ranks: int, tensor_parallel: int, how: str, source: str, tokens_per_forward: int
) -> None:
    words: dict[str, Any] = dict(tokens_per_forward=tokens_per_forward, tensor_parallel=tensor_parallel)
    results = pool.run(counted, ranks, merge_collective=how, path=on_disk(folder, name), anchor_source=source, **words)
    shape, hosts = model_shape(model(name).config, "float32"), ranks // tensor_parallel
    plan = BlockPlan(context_tokens=CONTEXT, **SIZES, ranks=hosts)
    answer = dict(query_tokens=9, answer_tokens=5)
    predicted = (
        traffic.phase1_cp(shape, plan, anchor_source=source, **words),
        traffic.phase1_tp(shape, plan, anchor_source=source, **words),
        traffic.phase2_cp(shape, hosts, merge_collective=how, **answer, **words),
        traffic.phase2_tp(shape, hosts, **answer, **words),
    )
    assert results == [predicted] * ranks
    assert (predicted[1].bytes > 0) == (tensor_parallel > 1)


# ------------------------------------------------------------------------------------------------- refusals


def refused(comm: TorchComm, path: Path, tensor_parallel: int, **more: Any) -> tuple[str, str]:
    try:
        star_of(comm, path, tensor_parallel, **more)
    except (InvalidInputError, UnsupportedModelError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(
    ("name", "tensor_parallel", "kind", "words"),
    [
        ("llama", 3, "InvalidInputError", "does not divide the number of ranks, 4"),
        ("llama", 0, "InvalidInputError", "not a number of ranks"),
        ("llama_mqa", 2, "UnsupportedModelError", "num_key_value_heads 1 does not divide"),
        ("gpt2", 2, "UnsupportedModelError", "no tensor-parallel plan for gpt2"),
        ("phi3", 2, "UnsupportedModelError", "does not share out the attention heads"),
        ("deepseek_v2", 2, "UnsupportedModelError", "mla_kv_a_proj"),
        ("cohere", 2, "UnsupportedModelError", "weights for each head"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_on_all_ranks(
    pool: Pool, folder: Path, name: str, tensor_parallel: int, kind: str, words: str
) -> None:
    path = folder / f"plain-{name}"
    if not path.exists():
        (build(name) if name == "llama_mqa" else model(name)).save_pretrained(path)
    for error, message in pool.run(refused, 4, path=path, tensor_parallel=tensor_parallel):
        assert error == kind
        assert words in message


def test_settings_that_do_not_go_together(pool: Pool, folder: Path) -> None:
    more = dict(model_kwargs=dict(device_map="auto"))
    for error, message in pool.run(refused, 2, path=on_disk(folder, "llama"), tensor_parallel=2, **more):
        assert (error, "device_map" in message) == ("InvalidInputError", True)


def guided(comm: TorchComm, path: Path) -> list[Any]:
    star = star_of(comm, path, 2)
    context = star.encode(ids(CONTEXT))
    with pytest.raises(InvalidInputError, match="guidance_scale needs extra forwards"):
        star.generate(context, [5, 6], max_new_tokens=3, guidance_scale=1.5)
    return star.generate(context, [5, 6], max_new_tokens=3).token_ids  # the ranks have met again


def test_guidance_is_refused_and_the_ranks_go_on(pool: Pool, folder: Path) -> None:
    results = pool.run(guided, 4, path=on_disk(folder, "llama"))
    assert results == [results[0]] * 4


# ------------------------------------------------------------------------------------------------- several calls and engines


def one_rank_fails(comm: TorchComm, path: Path, tensor_parallel: int, victim: int, phase: int) -> Any:
    star = star_of(comm, path, tensor_parallel, block_size=40)  # 3 blocks
    real = star.runtime.handle.encode

    def failing(*arguments: Any, **words: Any) -> None:
        raise ZeroDivisionError("planted")

    context = star.encode(ids(CONTEXT)) if phase == 2 else None
    if star.rank == victim:
        star.runtime.handle.encode = failing  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError, match="planted"):
        star.generate(context, [5, 6], max_new_tokens=3) if phase == 2 else star.encode(ids(CONTEXT))
    star.runtime.handle.encode = real  # type: ignore[method-assign]
    context = star.encode(ids(CONTEXT))
    return star.generate(context, [5, 6], max_new_tokens=3).token_ids


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize(("tensor_parallel", "victim"), [(2, 3), (2, 1), (1, 2)])
def test_an_exception_is_raised_on_all_and_the_next_call_works(
    pool: Pool, folder: Path, tensor_parallel: int, victim: int, phase: int
) -> None:
    """Also before the ranks of a host, or those with the same heads, have first spoken to each other."""
    words: dict[str, Any] = dict(path=on_disk(folder, "llama"), tensor_parallel=tensor_parallel, victim=victim)
    results = pool.run(one_rank_fails, 4, phase=phase, **words)
    star = star_of(SoloComm(), words["path"], 1, block_size=40)
    tokens = star.generate(star.encode(ids(CONTEXT)), [5, 6], max_new_tokens=3).token_ids
    assert results == [tokens] * 4


def two_engines(comm: TorchComm, path: Path) -> Any:
    plain, cut = star_of(comm, path, 1), star_of(comm, path, 2)
    contexts = [star.encode(ids(CONTEXT)) for star in (plain, cut)]
    said = [star.generate(context, [5, 6], max_new_tokens=4).token_ids for star, context in zip((plain, cut), contexts)]
    for star, context in ((plain, contexts[1]), (cut, contexts[0])):
        with pytest.raises(InvalidInputError, match="lies on"):
            star.generate(context, [5, 6], max_new_tokens=4)
    again = StarLLM(cut.model, **SIZES)  # finds out by itself
    said.append(again.generate(again.encode(ids(CONTEXT)), [5, 6], max_new_tokens=4).token_ids)
    with pytest.raises(InvalidInputError, match="other ranks"):
        StarLLM(cut.model, comm="solo", **SIZES)
    return said


def test_engines_of_different_meshes_live_side_by_side(pool: Pool, folder: Path) -> None:
    results = pool.run(two_engines, 4, path=on_disk(folder, "llama"))
    assert results == [[results[0][0]] * 3] * 4


def adapted(comm: TorchComm, path: Path) -> None:
    peft = pytest.importorskip("peft")
    star = star_of(comm, path, 2)
    with pytest.raises(UnsupportedModelError, match="adapters"):
        StarLLM(peft.get_peft_model(star.model, peft.LoraConfig(target_modules=["q_proj"])).eval())


def test_adapters_are_refused(pool: Pool, folder: Path) -> None:
    pool.run(adapted, 2, path=on_disk(folder, "llama"))


def streamed(comm: TorchComm) -> Any:
    star = StarLLM.from_pretrained(
        BUNDLED, dtype="float32", device="cpu", comm=comm, block_size=64, tensor_parallel=min(2, comm.size)
    )
    context = star.encode([{"role": "user", "content": "The tea is hot and the cup is blue.\n" * 30}])
    words: dict[str, Any] = dict(max_new_tokens=8, ignore_eos=True)
    pieces = list(star.stream(context, [{"role": "user", "content": "What is hot?"}], **words))
    with star.stream(context, [{"role": "user", "content": "What is blue?"}], **words) as stream:
        first = [piece for piece, _ in zip(stream, range(2), strict=False)]
    return pieces, first, stream.result.finish_reason


def test_streams(pool: Pool) -> None:
    assert pool.run(streamed, 4) == [streamed(SoloComm())] * 4


def saved_as_a_model(comm: TorchComm, path: Path, to: Path) -> None:
    star = StarLLM.from_pretrained(path, comm=comm, device="cpu", tensor_parallel=2, **SIZES)
    with pytest.raises(InvalidInputError, match="this rank's weights only"):
        star.model.save_pretrained(to)


def test_a_share_is_not_saved_as_a_model(pool: Pool, folder: Path, tmp_path: Path) -> None:
    pool.run(saved_as_a_model, 2, path=on_disk(folder, "llama"), to=tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def compiled_share(comm: TorchComm, path: Path) -> None:
    with pytest.raises(InvalidInputError, match="compile=True does not work with tensor_parallel"):
        StarLLM.from_pretrained(path, comm=comm, device="cpu", tensor_parallel=2, compile=True, **SIZES)
    assert StarLLM.from_pretrained(path, comm=comm, device="cpu", **SIZES).runtime.handle.compiled is None


def test_a_share_is_not_compiled(pool: Pool, folder: Path) -> None:
    pool.run(compiled_share, 2, path=on_disk(folder, "llama"))


def laid_out(comm: TorchComm, path: Path, ring_layout: str) -> Any:
    star = StarLLM.from_pretrained(path, comm=comm, device="cpu", method="ring", ring_layout=ring_layout)
    return [len(segments) for segments in star.encode(ids(CONTEXT)).layout]


def test_from_pretrained_passes_all_settings_on(pool: Pool, folder: Path) -> None:
    for ring_layout, runs in (("zigzag", 2), ("contiguous", 1)):
        assert pool.run(laid_out, 2, path=on_disk(folder, "llama"), ring_layout=ring_layout) == [[runs, runs]] * 2


def refused_on_one_rank(comm: TorchComm, path: Path) -> int:
    for settings in (dict(anchor_size=50), dict(tensor_parallel=2, model_kwargs=dict(device_map="auto"))):
        with pytest.raises((InvalidInputError, SizeError)):
            StarLLM.from_pretrained(path, comm=comm, device="cpu", **(SIZES | settings if comm.rank == 1 else SIZES | dict(tensor_parallel=2)))
    star = star_of(comm, path, 1)
    star.model.train(comm.rank == 1)
    with pytest.raises(InvalidInputError, match="training"):
        StarLLM(star.model, comm=comm)
    return comm.rank


def test_what_one_rank_refuses_all_refuse(pool: Pool, folder: Path) -> None:
    assert pool.run(refused_on_one_rank, 2, path=on_disk(folder, "llama")) == [0, 1]
