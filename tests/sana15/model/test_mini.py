"""The embedded mini model: whole, small, and as good as docs/mini.md says, within what few pictures can tell."""

import json

import numpy as np
import pytest
import torch

from sana15 import Pipeline
from sana15.model.folder import MINI
from sana15.scenes.checker import check
from sana15.scenes.testset import load as load_test_set


@pytest.fixture(scope="module")
def mini():
    return Pipeline.from_pretrained("mini")


def test_is_what_was_asked_for(mini):
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    config = mini.config
    assert config.num_layers >= 12
    assert config.attention_head_dim == 32
    assert config.qk_norm == "rms_norm_across_heads"
    assert config.sample_size >= 8
    settings = json.loads((MINI / "sana15.json").read_text())
    assert settings["guidance"] == mini.guidance
    for name, parameter in [*mini.transformer.named_parameters(), *mini.autoencoder.named_parameters()]:
        assert torch.isfinite(parameter).all(), name


def test_pictures_show_what_the_prompts_ask_for(mini):
    """Far below the measured score, far above what a damaged model or a wrong sampler reaches."""
    entries = [e for e in load_test_set() if e["tag"] in ("single_object", "colors", "two_object")][::6]
    pictures = mini([e["prompt"] for e in entries], seed=0, steps=12)
    right = [check(np.asarray(p[0]), e).correct for e, p in zip(entries, pictures)]
    assert len(right) >= 25
    assert sum(right) >= 0.75 * len(right)
