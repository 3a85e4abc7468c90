"""The mini model's commands on a GPU: pictures as on the CPU, a pruned model that is healed there."""

import numpy as np
import pytest
import torch
from helpers import needs_gpu

from sana15.cli import main
from sana15.importance import block_importance
from sana15.pipeline import Pipeline
from sana15.trajectory import calibration

pytestmark = needs_gpu
PROMPTS = ["a red circle", "a blue square left of a green star"]


def test_pictures_are_those_of_the_cpu():
    """Up to rounding: cuDNN's convolutions take fp32 operands as TF32."""
    here, there = (
        np.stack([np.asarray(p, dtype=int) for (p,) in Pipeline.from_pretrained("mini", device=place)(PROMPTS)])
        for place in ("cpu", "cuda")
    )
    assert (np.abs(here - there) > 4).mean() < 0.01


def test_importance_is_that_of_the_cpu():
    found = []
    for place in ("cpu", "cuda"):
        pipe = Pipeline.from_pretrained("mini", device=place)
        found.append(block_importance(pipe.transformer, calibration(pipe, PROMPTS, steps=4)))
    assert found[1].cosine == pytest.approx(found[0].cosine, rel=1e-2)
    assert found[1].loss_change == pytest.approx(found[0].loss_change, rel=5e-2, abs=1e-4)


@pytest.mark.parametrize("by", ["search", "learned"])
def test_pruned_and_healed_there(by, tmp_path):
    options = {"search": ["--candidates", "2", "--trial-steps", "1"], "learned": ["--learning-steps", "2"]}[by]
    calibration_options = ["--count", "2", "--steps", "2", "--device", "cuda"]
    command = ["prune", "mini", str(tmp_path / "out"), "--keep", "9", "--by", by, "--heal", "2"]
    assert main([*command, *options, *calibration_options]) == 0
    (picture,) = Pipeline.from_pretrained(tmp_path / "out", device="cuda")("a red circle", steps=2)[0]
    assert picture.size == (64, 64)
    assert torch.cuda.max_memory_allocated() > 0
