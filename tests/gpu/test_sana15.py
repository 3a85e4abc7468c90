"""The mini model's commands on a GPU: pictures as on the CPU, a pruned model that is healed there."""

import numpy as np
import pytest
import torch
from helpers import needs_gpu

pytest.importorskip("sana15")
pytest.importorskip("diffusers")
pytest.importorskip("yaml")
pytest.importorskip("tqdm")
from sana15.cli import main
from sana15.pruning.importance import block_importance
from sana15.pruning.trajectory import calibration
from sana15.sampling.pipeline import Pipeline

pytestmark = needs_gpu
PROMPTS = ["a red circle", "a blue square left of a green star"]


def test_pictures_are_those_of_the_cpu():
    """Up to rounding: cuDNN's convolutions take fp32 operands as TF32."""
    here, there = (
        np.stack([np.asarray(p, dtype=int) for (p,) in Pipeline.from_pretrained("mini", device=place)(PROMPTS)])
        for place in ("cpu", "cuda")
    )
    assert (np.abs(here - there) > 2).mean() < 0.01


def test_importance_is_that_of_the_cpu():
    found = []
    for place in ("cpu", "cuda"):
        pipe = Pipeline.from_pretrained("mini", device=place)
        found.append(block_importance(pipe.transformer, calibration(pipe, PROMPTS, steps=4)))
    assert found[1].cosine == pytest.approx(found[0].cosine, rel=1e-2)
    assert found[1].loss_change == pytest.approx(found[0].loss_change, rel=5e-2, abs=1e-4)


COMMANDS = {
    "sample": ["sample", "a red circle", "--out", "{out}", "--steps", "2"],
    "search": ["search", "--prompts", "{prompts}", "--out", "{out}", "--n", "2", "--pick", "1", "--steps", "2"],
    "demo": ["demo", "--out", "{out}", "--steps", "2", "--per-category", "1"],
    "importance": ["importance", "mini", "--out", "{out}", "--count", "2", "--steps", "2"],
    "loss": ["prune", "mini", "{out}", "--keep", "9", "--by", "loss", "--count", "2", "--steps", "2"],
    "search and heal": [
        "prune", "mini", "{out}", "--keep", "9", "--by", "search", "--candidates", "2", "--trial-steps", "1",
        "--count", "2", "--steps", "2", "--heal", "2", "--heal-batch", "2",
    ],
    "learn and heal": [
        "prune", "mini", "{out}", "--keep", "9", "--by", "learned", "--learning-steps", "2", "--count", "2", "--steps", "2",
        "--heal", "2", "--heal-on", "samples", "--heal-batch", "2",
    ],
    "heal": ["prune", "mini", "{out}", "--indices", "0,1,2", "--heal", "2", "--heal-batch", "2"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_there(command, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    names = {"out": tmp_path / "out", "prompts": tmp_path / "prompts.txt"}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert main([a.format(**names) for a in COMMANDS[command]]) == 0
    assert torch.cuda.max_memory_allocated() - before > 8e6  # the mini transformer in fp32 has 13 MB
