"""sana15.Pipeline on tiny random weights: what a seed fixes, guidance, errors, and diffusers' pipeline as the measure."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from tiny_pipeline import make

from sana15 import SanaConfig, SanaTransformer
from sana15.model.autoencoder import MINI_SIZES, Autoencoder
from sana15.model.text import MiniTextEncoder
from sana15.sampling import flow
from sana15.sampling.pipeline import Pipeline
from sana15.sampling.settings import Item, Sampling, noise
from sana15.storage.files import DataError

PROMPTS = ["a red circle", "two squares"]


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    config = SanaConfig(
        num_layers=2, num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=32, in_channels=16,
        out_channels=16, caption_channels=16, sample_size=4,
    )  # fmt: skip
    text = MiniTextEncoder(["a", "red", "circle", "two", "squares"], width=16, heads=2).eval()
    return Pipeline(text, SanaTransformer(config).eval(), Autoencoder.build(MINI_SIZES).eval(), flow_shift=3.0)


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


def test_a_folder_brings_its_guidance(pipe, tmp_path):
    assert pipe.guidance == 4.5
    folder = make(tmp_path / "model")
    (folder / "sana15.json").write_text('{"guidance": 2}')
    own = Pipeline.from_pretrained(folder)
    given = {"steps": 2, "seed": 1}
    assert np.array_equal(pixels(own("a red circle", **given)), pixels(own("a red circle", guidance=2.0, **given)))
    assert not np.array_equal(pixels(own("a red circle", **given)), pixels(own("a red circle", guidance=8.0, **given)))
    for wrong in ("[0]", "[0.5, 0.2]", "[0, 2]", "0.5", '["0", 1]'):
        (folder / "sana15.json").write_text(f'{{"guidance_interval": {wrong}}}')
        with pytest.raises(DataError, match="guidance_interval must be two numbers"):
            Pipeline.from_pretrained(folder)
    (folder / "sana15.json").write_text('{"guidance": 8, "guidance_interval": [0, 0.5]}')
    own = Pipeline.from_pretrained(folder)
    expected = pixels(own("a red circle", guidance=8.0, guidance_interval=(0.0, 0.5), **given))
    assert np.array_equal(pixels(own("a red circle", **given)), expected)
    assert not np.array_equal(pixels(own("a red circle", guidance_interval=(0.0, 1.0), **given)), expected)
    for wrong in ('"2"', "true", "NaN", "null", "1" + 400 * "0"):
        (folder / "sana15.json").write_text(f'{{"guidance": {wrong}}}')
        with pytest.raises(DataError, match="guidance must be a finite number"):
            Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("wrong", ["2", True, float("nan"), 10**400])
def test_guidance_must_be_a_number(wrong):
    with pytest.raises(ValueError, match="guidance must be a finite number"):
        Sampling(guidance=wrong)


def test_negative_prompt_takes_the_place_of_the_empty_one(pipe):
    arguments = {"steps": 2, "guidance": 8.0}
    plain = pixels(pipe("a red circle", **arguments))
    assert np.array_equal(plain, pixels(pipe("a red circle", negative_prompt="", **arguments)))
    assert not np.array_equal(plain, pixels(pipe("a red circle", negative_prompt="two squares", **arguments)))


@torch.no_grad()
@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_guidance_interval_and_negative_prompt_equal_a_loop_written_out(pipe, sampler):
    """8 steps; guidance only where 0.3 <= sigma <= 0.9; the picture is decoded from the loop's latents."""
    low, high, scale, steps = 0.3, 0.9, 6.0, 8
    text, mask = pipe.text.encode(["a red circle"])
    negative, negative_mask = pipe.text.encode(["two squares"])
    plan = flow.schedule(steps, sampler=sampler, flow_shift=3.0)
    x = noise(5, 0, 0, (16, 4, 4))[None]
    x0 = None
    guided = []
    for i in range(steps):
        t = torch.tensor([plan.timesteps[i]])
        v = pipe.transformer(x, text, t, mask)
        guided.append(low <= plan.sigmas[i] <= high)
        if guided[-1]:
            u = pipe.transformer(x, negative, t, negative_mask)
            v = u + scale * (v - u)
        state = flow.advance(flow.SamplerState(x, i, x0), v, plan)
        x, x0 = state.latents, state.previous_x0
    assert True in guided
    assert not guided[0]
    assert not guided[-1]
    expected = np.asarray(pipe.decode(x)[0]).astype(int)
    arguments = {"seed": 5, "steps": steps, "guidance": scale, "negative_prompt": "two squares", "sampler": sampler}
    made = pixels(pipe("a red circle", guidance_interval=(low, high), **arguments))[0]
    assert np.abs(made - expected).max() <= 1
    assert np.abs(pixels(pipe("a red circle", **arguments))[0] - expected).max() > 1  # the interval matters


def test_outside_the_interval_the_model_is_asked_once(pipe, monkeypatch):
    rows = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda x, *rest: rows.append(len(x)) or forward(x, *rest))
    pipe("a red circle", steps=4, guidance_interval=(0.5, 0.9))
    sigmas = flow.schedule(4).sigmas[:-1]
    assert rows == [2 if 0.5 <= s <= 0.9 else 1 for s in sigmas]
    assert sorted(set(rows)) == [1, 2]


def test_the_text_is_projected_once(pipe, monkeypatch):
    """And the pictures are those of a projection at every step, to the last bit."""
    # Counted in the model: a hook on a layer of the text's way would be called at every step.
    calls, project = [], pipe.transformer._states

    def counted(text):
        calls.append(len(text))
        return project(text)

    monkeypatch.setattr(pipe.transformer, "_states", counted)
    arguments = {"steps": 5, "guidance": 6.0, "guidance_interval": (0.3, 0.9), "negative_prompt": "two squares"}
    once = pixels(pipe(PROMPTS, n=2, batch_size=2, **arguments))
    assert calls == [4, 4]  # two batches of two pictures with guidance
    monkeypatch.setattr("sana15.sampling.guidance.KEPT_TEXT", 0)
    assert np.array_equal(once, pixels(pipe(PROMPTS, n=2, batch_size=2, **arguments)))
    assert len(calls) == 2 + 2 * 5


def test_any_part_of_a_run_gives_the_pictures_of_the_run(pipe):
    settings = Sampling(seed=3, steps=2)
    whole = pixels(pipe(PROMPTS, n=3, seed=3, steps=2))
    made = list(pipe.sample([Item(PROMPTS[1], 1, 2), Item(PROMPTS[0], 0, 1)], settings, batch_size=1))
    assert [item.candidate for item, _ in made] == [2, 1]
    assert np.abs(pixels([[picture for _, picture in made]]) - whole[[5, 1]]).max() <= 1
    with pytest.raises(ValueError, match="does not know"):
        pipe.sample([Item("a red pentagon", 0, 0)], settings)  # before the first picture is asked for


def test_callback_counts_every_step(pipe):
    seen = []
    pipe(PROMPTS, n=2, steps=3, batch_size=3, callback=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n": 0}, "n must be a positive integer"),
        ({"height": 20}, "height must be a multiple of 8 from 8 to 128 pixels, got 20"),
        ({"width": 1024}, "width must be a multiple of 8 from 8 to 128 pixels, got 1024"),
        ({"seed": -1}, "seed must be an integer from 0 on"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval must be 0 <= low <= high <= 1"),
        ({"negative_prompt": "pentagon"}, "does not know 'pentagon'"),
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
    from sana15.model.checkpoint import save_transformer

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
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    assert loaded.identity() == {"name": tmp_path.name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert pipe.identity()["name"] == "unsaved"


def test_parts_that_do_not_belong_together(pipe, tmp_path):
    from sana15.model.checkpoint import save_transformer

    save_transformer(pipe.transformer, tmp_path / "transformer")
    MiniTextEncoder(["a"], width=32, heads=2).save(tmp_path / "text_encoder")
    pipe.autoencoder.model.save_pretrained(tmp_path / "vae")
    with pytest.raises(DataError, match=r"text encoder gives features \[32\], the transformer takes \[16\]"):
        Pipeline.from_pretrained(tmp_path)
    sprint = SanaTransformer(dataclasses.replace(pipe.config, guidance_embeds=True))
    with pytest.raises(ValueError, match="this is a Sprint model"):
        Pipeline(pipe.text, sprint, pipe.autoencoder)("a red circle")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("damage", ["config", "weights", "cut", "missing"])
def test_damaged_parts_are_named(pipe, tmp_path, part, damage):
    from sana15.model.checkpoint import save_transformer

    save_transformer(pipe.transformer, tmp_path / "transformer")
    pipe.text.save(tmp_path / "text_encoder")
    pipe.autoencoder.model.save_pretrained(tmp_path / "vae")
    folder = tmp_path / part
    weights = next(folder.glob("*.safetensors"))
    if damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "weights":
        weights.write_bytes(b"\xff" * 64)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-40])
    else:
        weights.unlink()
    with pytest.raises(FileNotFoundError if damage == "missing" else DataError) as error:
        Pipeline.from_pretrained(tmp_path)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
