"""What several test files share of generator."""

import numpy as np
import pytest
from diffusers import (
    AutoencoderDC,
    SanaTransformer2DModel,
)
from tiny_pipeline import make_published
from transformers import AutoTokenizer, Gemma2Model


def pixels(pictures):
    return np.stack([np.asarray(p) for p in pictures]).astype(int)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = make_published(tmp_path_factory.mktemp("published"))
    return (
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        Gemma2Model.from_pretrained(folder / "text_encoder"),
        AutoencoderDC.from_pretrained(folder / "vae"),
        SanaTransformer2DModel.from_pretrained(folder / "transformer"),
    )


def arguments():
    return {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64, "use_resolution_binning": False}
