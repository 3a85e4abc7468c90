"""What several test files share of pruning."""

import dataclasses

import pytest
import tiny_pipeline
from importance_cases import PROMPTS, pass_through

import sana15
from sana15 import Pipeline


def fitted(batch):
    """The batch with x0 and noise that the model's velocity fits exactly: without any block that acts the loss rises."""
    s, x, v = batch.sigma, batch.latents, batch.velocity
    return dataclasses.replace(batch, x0=x - s * v, noise=x + (1 - s) * v)


@pytest.fixture
def idle(tmp_path):
    """A model of six blocks, of which 1 and 4 do nothing, and batches that it fits."""
    pipe = Pipeline.from_pretrained(tiny_pipeline.make(tmp_path / "tiny", num_layers=6))
    for index in (1, 4):
        pass_through(pipe.transformer, index)
    batches = sana15.calibration(pipe, PROMPTS, steps=2, batch_size=1, guidance=1.0)
    return pipe.transformer, [fitted(b) for b in batches]
