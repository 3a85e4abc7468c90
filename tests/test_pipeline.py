"""sana15.Pipeline on tiny random weights: what a seed fixes, guidance, errors, and diffusers' pipeline as the measure."""

import numpy as np
import pytest
import torch

from sana15 import SanaConfig, SanaTransformer
from sana15.autoencoder import MINI, Autoencoder
from sana15.pipeline import Pipeline, noise
from sana15.text import MiniTextEncoder

PROMPTS = ["a red circle", "two squares"]


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    config = SanaConfig(
        num_layers=2, num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=32, in_channels=16,
        out_channels=16, caption_channels=16, sample_size=4,
    )  # fmt: skip
    text = MiniTextEncoder(["a", "red", "circle", "two", "squares"], width=16, heads=2).eval()
    return Pipeline(text, SanaTransformer(config).eval(), Autoencoder.build(MINI).eval(), flow_shift=3.0)


def pixels(pictures):
    return np.stack([np.asarray(p) for row in pictures for p in row]).astype(int)


def test_shape_and_kind(pipe):
    made = pipe(PROMPTS, n=3, steps=2)
    assert [len(row) for row in made] == [3, 3]
    assert made[0][0].size == (32, 32)
    assert pipe("a red circle", steps=1, height=16, width=48)[0][0].size == (48, 16)


def test_a_picture_depends_on_seed_prompt_index_and_candidate_only(pipe):
    first = pixels(pipe(PROMPTS, n=3, steps=3, seed=7))
    assert np.array_equal(first, pixels(pipe(PROMPTS, n=3, steps=3, seed=7)))
    assert not np.array_equal(first, pixels(pipe(PROMPTS, n=3, steps=3, seed=8)))
    fewer = pixels(pipe(PROMPTS[:1], n=2, steps=3, seed=7))
    other_batch = pixels(pipe(PROMPTS, n=3, steps=3, seed=7, batch_size=2))
    for a, b in ((fewer, first[:2]), (other_batch, first)):
        difference = np.abs(a - b)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3
    assert torch.equal(noise(7, 1, 2, (4, 4)), noise(7, 1, 2, (4, 4)))
    assert not torch.equal(noise(7, 1, 2, (4, 4)), noise(7, 2, 1, (4, 4)))


def test_guidance_one_is_the_conditional_model(pipe):
    prompts = ["a red circle"]
    plain, guided = (pipe.guided_velocity(prompts, "", g) for g in (1.0, 3.0))
    x = noise(0, 0, 0, (16, 4, 4))[None]
    text, mask = pipe.text.encode(prompts)
    null, null_mask = pipe.text.encode([""])
    with torch.no_grad():
        conditional = pipe.transformer(x, text, torch.tensor([500.0]), mask)
        unconditional = pipe.transformer(x, null, torch.tensor([500.0]), null_mask)
        torch.testing.assert_close(plain(x, 500.0), conditional)
        expected = unconditional + 3.0 * (conditional - unconditional)
        torch.testing.assert_close(guided(x, 500.0), expected, rtol=1e-4, atol=1e-5)


def test_negative_prompt_takes_the_place_of_the_empty_one(pipe):
    arguments = {"steps": 2, "guidance": 8.0}
    plain = pixels(pipe("a red circle", **arguments))
    assert np.array_equal(plain, pixels(pipe("a red circle", negative_prompt="", **arguments)))
    assert not np.array_equal(plain, pixels(pipe("a red circle", negative_prompt="two squares", **arguments)))


def test_callback_counts_every_step(pipe):
    seen = []
    pipe(PROMPTS, n=2, steps=3, batch_size=3, callback=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n": 0}, "n must be a positive integer"),
        ({"height": 20}, "height must be a positive multiple of 8"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"sampler": "ddim"}, "unknown sampler"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_arguments(pipe, arguments, match):
    with pytest.raises(ValueError, match=match):
        pipe(PROMPTS, **arguments)


def test_bad_prompts_and_folders(pipe, tmp_path):
    with pytest.raises(ValueError, match="does not know 'pentagon'"):
        pipe("a red pentagon")
    with pytest.raises(FileNotFoundError, match="is not a pipeline folder"):
        Pipeline.from_pretrained(tmp_path)


def test_save_and_load(pipe, tmp_path):
    from sana15.checkpoint import save_transformer

    save_transformer(pipe.transformer, tmp_path / "transformer")
    pipe.text.save(tmp_path / "text_encoder")
    pipe.autoencoder.model.save_pretrained(tmp_path / "vae")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 1.5}')
    loaded = Pipeline.from_pretrained(tmp_path)
    assert loaded.flow_shift == 1.5
    loaded.flow_shift = 3.0
    difference = np.abs(pixels(loaded(PROMPTS, steps=2)) - pixels(pipe(PROMPTS, steps=2)))
    assert difference.max() <= 2  # the text encoder is stored in half precision
