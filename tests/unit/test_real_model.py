"""Look-back on a published model: its law holds for all, its worth shows on a real one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.calibration.settings import CalibrationSettings
from star_attention.calibration.texts import prose, samples
from tests.real_model import packaged_file


@pytest.mark.slow
def test_look_back_wins_back_what_the_paper_s_method_loses() -> None:
    """Likelihood of planted facts and lists, in eight blocks, at the paper's price."""
    star = StarLLM.from_pretrained(packaged_file(), dtype="float32")
    contexts = samples(star.tokenizer, prose(), CalibrationSettings(length=1024, samples=4))

    def loss(**settings: Any) -> float:
        """Mean negative log-likelihood of an answer's token, in nats."""
        engine = star.with_config(block_size=128, **settings)
        losses = []
        for sample in contexts:
            context = engine.encode(sample.context)
            for probe in sample.facts:
                logits_TV = engine.logits(context, probe.ids)
                assert logits_TV is not None
                answer_T = torch.tensor(probe.ids[-probe.measured :])
                scores_TV = logits_TV[-probe.measured - 1 : -1].log_softmax(-1)
                losses.append(-scores_TV.gather(-1, answer_T[:, None]).mean().item())
        return sum(losses) / len(losses)

    dense, paper, balanced = loss(method="dense"), loss(), loss(quality="balanced")
    assert dense < balanced < paper
    assert (paper - balanced) / (paper - dense) > 0.5


@pytest.mark.slow
def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    file, folder = packaged_file(), tmp_path / "smollm2"
    script = Path(__file__).parents[2] / "scripts" / "real_model.py"
    subprocess.run([sys.executable, script, folder, "--gguf", file], check=True)
    written, read = StarLLM.from_pretrained(folder), StarLLM.from_pretrained(file)
    weights = read.model.state_dict()
    assert all(
        torch.equal(tensor, weights[name].bfloat16())
        for name, tensor in written.model.state_dict().items()
    )
    text = "The dog is called Rex.\nWhat is the dog's name?"
    assert written.tokenizer(text).input_ids == read.tokenizer(text).input_ids
