"""What has changed of a model is looked at while the device reads the query, and refuses the answer
before anybody has a token of it. tests/unit/test_changed_models.py tests what is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from star_attention import EncodedContext, StarLLM
from star_attention.errors import ContextMismatchError, InvalidInputError
from star_attention.hf.execution import graphs as graphs_module
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.loading import identity
from tests.engines import CONTEXT, bundled_tokenizer, ids, text_model
from tests.families import build
from tests.recorders import CountingGraphs, few_runs, with_graphs

STORY = "The hill is tall and the tea is hot. " * 12
Ask = Callable[[StarLLM, EncodedContext], Any]


def weight_of(star: StarLLM) -> nn.Parameter:
    weight: nn.Parameter = star.model.get_decoder().layers[1].mlp.up_proj.weight
    return weight


def change(star: StarLLM) -> None:
    with torch.no_grad():
        weight_of(star)[2, 3].add_(1)


@pytest.fixture
def story() -> tuple[StarLLM, EncodedContext]:
    star = StarLLM(copy.deepcopy(text_model()), bundled_tokenizer(), block_size=64)
    return star, star.encode(STORY)


def first_of_a_batch(star: StarLLM, context: EncodedContext) -> Any:
    batch = star.batch()
    batch.add(context, "Why?")
    return batch.step()


ASKS: dict[str, Ask] = {
    "a query": lambda star, context: star.generate(context, "Why?", max_new_tokens=4),
    "queries as rows": lambda star, context: star.generate(
        context, ["Why?", "Who is tall?"], max_new_tokens=4
    ),
    "short answers": lambda star, context: star.generate(
        context, ["Why?", "Who?"], max_new_tokens=1
    ),
    "a second look": lambda star, context: star.generate(context, "Why?", second_look=0.2),
    "beams": lambda star, context: star.generate(context, "Why?", num_beams=2, max_new_tokens=4),
    "a stream": lambda star, context: next(star.stream(context, "Why?")),
    "a batch": first_of_a_batch,
}


@pytest.mark.parametrize("kind", ASKS)
def test_every_answer_of_a_changed_model_is_refused(
    kind: str, story: tuple[StarLLM, EncodedContext]
) -> None:
    ASKS[kind](*story)
    change(story[0])
    with pytest.raises(ContextMismatchError) as caught:
        ASKS[kind](*story)
    assert caught.value.field == "weights"


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_stream_of_a_changed_model_gives_no_piece(
    when: str, story: tuple[StarLLM, EncodedContext]
) -> None:
    """The stream begins with its first piece, so what changes before that counts, too."""
    star, context = story
    if when == "before":
        change(star)
    stream = star.stream(context, "Why?", max_new_tokens=4)
    if when == "between":
        change(star)
    with pytest.raises(ContextMismatchError, match="weights"):
        next(stream)
    with pytest.raises(InvalidInputError, match="this stream has failed"):
        next(stream)
    other = star.encode(STORY)
    assert list(star.stream(other, "Why?", max_new_tokens=4, ignore_eos=True))


@pytest.mark.parametrize("kind", ["a query", "queries as rows", "a stream"])
def test_weights_are_looked_at_once_the_forward_is_issued(
    kind: str, story: tuple[StarLLM, EncodedContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbids the milliseconds that a look takes before the device has anything to do."""
    seen: list[str] = []

    def noted(owner: Any, name: str, event: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(event)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    noted(ModelHandle, "logits", "forward")
    noted(identity, "state", "look")
    ASKS[kind](*story)
    assert seen[:2] == ["forward", "look"]
    assert seen.count("look") == 1


def half(star: StarLLM) -> None:
    star.model.to(torch.bfloat16)


def cut(star: StarLLM) -> None:
    star.model.get_decoder().layers[1].mlp.up_proj.weight = nn.Parameter(torch.ones(3, 5))


@pytest.mark.parametrize(("way", "field"), [(half, "dtype"), (cut, "weights")])
@pytest.mark.parametrize("kind", ["a query", "queries as rows", "a stream"])
def test_a_forward_that_fails_by_the_change_is_refused_for_it(
    way: Callable[[StarLLM], None], field: str, kind: str, story: tuple[StarLLM, EncodedContext]
) -> None:
    """Forbids an error of a product of matrices where the model is another one."""
    star, context = story
    way(star)
    with pytest.raises(ContextMismatchError) as caught:
        ASKS[kind](star, context)
    assert caught.value.field == field


def test_a_query_that_a_changed_tokenizer_spoils_is_refused_for_it() -> None:
    tokenizer = copy.deepcopy(bundled_tokenizer())
    star = StarLLM(text_model(), tokenizer, block_size=64)
    context = star.encode(STORY)
    tokenizer.add_tokens(["the cat"])
    assert tokenizer.convert_tokens_to_ids("the cat") >= star.runtime.handle.vocab_size
    with pytest.raises(ContextMismatchError) as caught:
        star.generate(context, "Is it the cat")
    assert caught.value.field == "tokenizer"


def test_a_context_of_another_model_is_refused_before_any_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its keys may have another shape than this model's kernels read."""
    star, other = (StarLLM(build(name), block_size=32) for name in ("llama", "qwen3"))
    context = other.encode(ids(CONTEXT))
    monkeypatch.setattr(ModelHandle, "logits", lambda *_, **__: pytest.fail("a forward"))
    with pytest.raises(ContextMismatchError):
        star.generate(context, [5])


# ------------------------------------------------------------------------------ CUDA graphs


@pytest.fixture
def by_graphs(monkeypatch: pytest.MonkeyPatch) -> tuple[StarLLM, EncodedContext, CountingGraphs]:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's kernels do not run in its interpreter here")
    few_runs(monkeypatch)
    star = StarLLM(build("llama"), block_size=32)
    counting = with_graphs(star)
    return star, star.encode(ids(CONTEXT)), counting


def test_graphs_run_before_the_look_and_the_answer_is_refused(
    by_graphs: tuple[StarLLM, EncodedContext, CountingGraphs],
) -> None:
    star, context, graphs = by_graphs
    star.generate(context, [5], max_new_tokens=1)
    replays, captures = graphs.recorder.replays, graphs.recorder.captures
    change(star)
    with pytest.raises(ContextMismatchError, match="weights"):
        star.generate(context, [5], max_new_tokens=1)
    assert (graphs.recorder.replays, graphs.recorder.captures) == (replays + 1, captures)


def test_no_graph_is_captured_of_a_model_that_has_changed(
    by_graphs: tuple[StarLLM, EncodedContext, CountingGraphs],
) -> None:
    """Kernels would run on layers of whatever shapes, and capturing takes seconds."""
    star, context, graphs = by_graphs
    star.generate(context, [5], max_new_tokens=1)
    captures = graphs.recorder.captures
    weight = weight_of(star)
    weight.data = weight.data * 2
    with pytest.raises(ContextMismatchError, match="weights"):
        star.generate(context, [5], max_new_tokens=1)
    assert graphs.recorder.captures == captures
    assert not graphs.captured
    weight.data = weight.data / 2
    assert star.generate(context, [5], max_new_tokens=1).token_ids
    assert graphs.recorder.captures > captures


def test_a_stream_runs_no_graph_of_weights_that_have_moved_since_it_was_made(
    by_graphs: tuple[StarLLM, EncodedContext, CountingGraphs],
) -> None:
    """Forbids kernels on memory that may have been freed between a stream and its first piece."""
    star, context, graphs = by_graphs
    star.runtime.tokenizer = bundled_tokenizer()
    context = star.encode(ids(CONTEXT))
    assert list(star.stream(context, [5], max_new_tokens=2, ignore_eos=True))
    stream = star.stream(context, [5], max_new_tokens=2, ignore_eos=True)
    weight = weight_of(star)
    weight.data = weight.data * 2
    before = graphs.recorder.replays, graphs.recorder.captures
    with pytest.raises(ContextMismatchError, match="weights"):
        next(stream)
    assert (graphs.recorder.replays, graphs.recorder.captures) == before


def test_a_context_is_asked_once_if_graphs_can_read_it(
    by_graphs: tuple[StarLLM, EncodedContext, CountingGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its layers would be asked before each first token."""
    star, context, _ = by_graphs
    asked: list[Any] = []
    real = graphs_module.can_read

    def noted(shard: Any, *rest: Any) -> bool:
        asked.append(shard)
        return real(shard, *rest)

    monkeypatch.setattr(graphs_module, "can_read", noted)
    other = star.encode(ids(CONTEXT, seed=2))
    for each in (context, other, context, other):
        star.generate(each, [5], max_new_tokens=1)
    assert [id(shard) for shard in asked] == [id(context.kv), id(other.kv)]
