"""Tokenizers that are loaded do what their files say, and answers have a text."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LogitsProcessor, PreTrainedTokenizerFast

from star_attention import StarLLM
from star_attention.hf.loading.load import load_tokenizer
from star_attention.hf.text.tokens import context_ids
from tests.engines import bundled_tokenizer, text_model
from tests.tokenizers_by_family import tokenizer_of

LINE = "Der Käfer  sat on\n\nthe mat.\n"


def saved(folder: Path, tokenizer: Any, **config: Any) -> Path:
    """Save a tokenizer with other fields in its config, and the config of a model."""
    LlamaConfig().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_a_bos_that_the_config_asks_for_is_written_once(tmp_path: Path) -> None:
    """Forbids a context without the sink that the model was trained with."""
    tokenizer = load_tokenizer(saved(tmp_path, tokenizer_of("gpt2"), add_bos_token=True))
    assert context_ids(tokenizer, "The cat")[0] == tokenizer.bos_token_id
    assert context_ids(tokenizer, "<s>The cat") == context_ids(tokenizer, "The cat")
    assert tokenizer("The cat").input_ids == context_ids(tokenizer, "The cat")
    plain = load_tokenizer(saved(tmp_path, tokenizer_of("gpt2"), add_bos_token=False))
    assert context_ids(plain, "The cat") == context_ids(tokenizer, "The cat")[1:]


def test_a_class_that_replaces_the_files_rules(tmp_path: Path) -> None:
    """Forbids a tokenizer that drops the spaces of a file that was made for another class."""
    folder = saved(tmp_path, tokenizer_of("gpt2"), tokenizer_class="GemmaTokenizer")
    with pytest.warns(UserWarning, match="as a GemmaTokenizer.*PreTrainedTokenizerFast"):
        tokenizer = load_tokenizer(folder)
    ids = tokenizer(LINE).input_ids
    assert ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(LINE).ids
    assert tokenizer.decode(ids) == LINE
    # The remedy works.
    saved(tmp_path, tokenizer_of("gpt2"), tokenizer_class="PreTrainedTokenizerFast")
    assert load_tokenizer(folder)(LINE).input_ids == ids


def test_a_tokenizer_that_changes_texts_is_a_warning(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "mat": 2, ".": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = saved(tmp_path, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))
    with pytest.warns(UserWarning, match=r"changes texts: it makes 'the mat \.' of 'Der K"):
        load_tokenizer(folder)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "llama2-legacy", "llama2", "gemma"])
def test_tokenizers_of_known_families_load_without_a_word(tmp_path: Path, family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer(saved(tmp_path, tokenizer_of(family)))
    assert context_ids(tokenizer, LINE) == context_ids(tokenizer_of(family), LINE)


def test_prefixes_are_written_once() -> None:
    """Of two tokens, too, and where the text brings one of them."""
    tokenizer = load_tokenizer_with_two_prefix_tokens()
    prefix = [tokenizer.convert_tokens_to_ids(token) for token in ("<bos>", "<|q|>")]
    cat = tokenizer("cat", add_special_tokens=False).input_ids
    for text in ("cat", "<bos><|q|>cat", "<|q|>cat"):
        assert context_ids(tokenizer, text) == prefix + cat


def load_tokenizer_with_two_prefix_tokens() -> Any:
    from tokenizers import processors

    from tests.engines import BUNDLED

    tokenizer = load_tokenizer(BUNDLED)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<|q|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <|q|> $A", pair="<bos> <|q|> $A $B", special_tokens=ids
    )
    return tokenizer


def test_truncation_and_padding_in_the_file_do_not_count(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path / "a", tokenizer_of("gpt2")))
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer = load_tokenizer(saved(tmp_path / "b", tokenizer))
    text = "the cat sat on the mat " * 20
    assert context_ids(tokenizer, text) == context_ids(tokenizer_of("gpt2"), text)
    assert len(context_ids(tokenizer, text)) > 64
    assert len(context_ids(tokenizer, "the")) == 1


class Force(LogitsProcessor):
    """Prefers some token ids to all others."""

    def __init__(self, *ids: int) -> None:
        self._ids = list(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self._ids] = 1e9
        return scores


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "seed": 1}, {"num_beams": 2}])
def test_ids_without_a_text_are_never_answered(how: dict[str, Any]) -> None:
    """Forbids an empty answer of ids beyond the tokenizer, which padded vocabularies have."""
    import copy

    model, tokenizer = copy.deepcopy(text_model()), bundled_tokenizer()
    known = len(tokenizer)
    model.resize_token_embeddings(known + 64)
    star = StarLLM(model, tokenizer, block_size=16)
    reply = star.generate(
        star.encode("The cat sat on the mat."),
        "What",
        max_new_tokens=3,
        logits_processor=[Force(known + 3, 7)],
        return_logits="num_beams" not in how,
        **how,
    )
    assert reply.token_ids[0] < known
    if reply.logits is not None:
        assert reply.logits.shape[1] == known + 64
    by_ids = StarLLM(model, block_size=16)
    reply = by_ids.generate(
        by_ids.encode([5, 6, 7]), [8], max_new_tokens=1, logits_processor=[Force(known + 3)], **how
    )
    assert reply.token_ids == [known + 3]
