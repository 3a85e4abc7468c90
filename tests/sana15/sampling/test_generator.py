"""Generators that pause: our pipeline's and diffusers', against runs that were never interrupted."""

import threading

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SanaPipeline,
)
from generator_cases import arguments, pixels
from generator_cases import parts as parts
from tiny_pipeline import make

from sana15.sampling.diffusers_pipeline import DiffusersGenerator, data_prediction
from sana15.sampling.pipeline import Pipeline, PipelineGenerator
from sana15.sampling.settings import Sampling, Seed

PROMPTS = ["a red circle", "two squares", "a blue ring above a heart", "a star"]
SEEDS = [Seed(5, p, c) for p, c in ((0, 0), (1, 3), (2, 1), (3, 0))]
STEPS = 6


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return Pipeline.from_pretrained(make(tmp_path_factory.mktemp("tiny")))


def settings_of(sampler="flow_dpm", **changes):
    return Sampling(seed=5, steps=STEPS, sampler=sampler, guidance=3.0, guidance_interval=(0.1, 0.9), **changes)


@pytest.mark.parametrize("sampler", ["flow_dpm", "flow_euler"])
def test_a_pause_changes_no_bit(pipe, sampler):
    generator = PipelineGenerator(pipe, settings_of(sampler))
    whole = pixels(generator.finish(generator.start(PROMPTS, SEEDS)))
    state = generator.start(PROMPTS, SEEDS)
    for step in (1, 1, 4):
        state = generator.advance(state, step)
        assert len(generator.preview(state)) == 4
    state = generator.select(state, [0, 1, 2, 3])
    assert np.array_equal(pixels(generator.finish(state)), whole)
    one = pipe(PROMPTS, seed=5, steps=STEPS, sampler=sampler, guidance=3.0, guidance_interval=(0.1, 0.9))
    assert np.abs(pixels([row[0] for row in one])[0] - whole[0]).max() <= 1


@pytest.mark.parametrize("sampler", ["flow_dpm", "flow_euler"])
@pytest.mark.parametrize("when", [0, 2, 5])
def test_what_is_kept_is_what_it_would_have_been(pipe, sampler, when):
    """Another batch differs by rounding; the same pauses give the same bits."""
    generator = PipelineGenerator(pipe, settings_of(sampler))
    whole = pixels(generator.finish(generator.start(PROMPTS, SEEDS)))

    def thinned():
        state = generator.advance(generator.start(PROMPTS, SEEDS), when)
        return pixels(generator.finish(generator.select(state, [3, 1])))

    kept = thinned()
    assert np.abs(kept - whole[[3, 1]]).max() <= 1
    assert (kept != whole[[3, 1]]).mean() < 1e-3
    assert np.array_equal(kept, thinned())
    assert np.abs(whole[3] - whole[1]).max() > 10


def test_the_last_preview_is_the_picture_and_earlier_ones_are_not(pipe):
    generator = PipelineGenerator(pipe, settings_of())
    state = generator.advance(generator.start(PROMPTS, SEEDS), STEPS)
    assert np.array_equal(pixels(generator.preview(state)), pixels(generator.finish(state)))
    early = generator.advance(generator.start(PROMPTS, SEEDS), 2)
    assert np.abs(pixels(generator.preview(early)) - pixels(generator.finish(early))).max() > 1


def test_evaluations_are_what_the_transformer_is_asked(pipe, monkeypatch):
    rows = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda x, *rest: rows.append(len(x)) or forward(x, *rest))
    generator = PipelineGenerator(pipe, settings_of())
    state = generator.advance(generator.start(PROMPTS, SEEDS), 2)
    assert sum(rows) == 4 * generator.evaluations(0, 2)
    rows.clear()
    generator.finish(generator.select(state, [1]))
    assert sum(rows) == generator.evaluations(2, STEPS)
    assert generator.evaluations(0, STEPS) in range(STEPS + 1, 2 * STEPS)  # guidance in an interval


def test_nothing_is_kept(pipe):
    generator = PipelineGenerator(pipe, settings_of())
    for when in (0, 2):
        assert generator.finish(generator.select(generator.advance(generator.start(PROMPTS, SEEDS), when), [])) == []


def test_mistakes(pipe):
    generator = PipelineGenerator(pipe, settings_of())
    state = generator.start(PROMPTS, SEEDS)
    with pytest.raises(ValueError, match="no preview before the first step"):
        generator.preview(state)
    with pytest.raises(ValueError, match="4 prompts need as many seeds"):
        generator.start(PROMPTS, SEEDS[:2])
    with pytest.raises(ValueError, match=r"indices must be from 0 to 3, got \[4\]"):
        generator.select(state, [4])
    with pytest.raises(ValueError, match=r"to_step must be from 2 to 6, got 1"):
        generator.advance(generator.advance(state, 2), 1)
    with pytest.raises(ValueError, match=r"to_step must be from 0 to 6, got 7"):
        generator.advance(state, 7)
    with pytest.raises(ValueError, match="does not know 'pentagon'"):
        generator.check(["a pentagon"])
    with pytest.raises(ValueError, match="does not know 'pentagon'"):
        PipelineGenerator(pipe, settings_of(negative_prompt="pentagon"))


SCHEDULERS = {
    "dpm": lambda: DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, algorithm_type="dpmsolver++"
    ),
    "sde": lambda: DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, algorithm_type="sde-dpmsolver++"
    ),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}  # fmt: skip


def foreign(parts, scheduler="dpm", **changes):
    tokenizer, text, vae, transformer = parts
    made = SanaPipeline(tokenizer, text, vae, transformer, SCHEDULERS[scheduler]())
    made.set_progress_bar_config(disable=True)
    return made, DiffusersGenerator(made, **arguments() | changes)


@pytest.mark.parametrize("scheduler", ["dpm", "sde", "euler"])
def test_diffusers_pause_and_keep_change_no_bit(parts, scheduler):
    made, generator = foreign(parts, scheduler)
    plain = [
        made(prompt, generator=torch.Generator().manual_seed(seed.number()), **arguments()).images[0]
        for prompt, seed in zip(PROMPTS, SEEDS)
    ]
    assert np.array_equal(pixels(generator.finish(generator.start(PROMPTS, SEEDS))), pixels(plain))
    before = threading.active_count()
    state = generator.advance(generator.start(PROMPTS, SEEDS), 1)
    assert threading.active_count() == before + 4
    assert len(generator.preview(state)) == 4
    state = generator.select(generator.advance(state, 3), [2, 0])
    assert threading.active_count() == before + 2
    assert np.array_equal(pixels(generator.finish(state)), pixels([plain[2], plain[0]]))
    assert threading.active_count() == before
    assert np.abs(pixels(plain)[0] - pixels(plain)[2]).max() > 1


@pytest.mark.parametrize("scheduler", ["dpm", "euler"])
def test_diffusers_previews_are_data_predictions(parts, scheduler):
    _, generator = foreign(parts, scheduler)
    state = generator.advance(generator.start(PROMPTS[:1], SEEDS[:1]), 4)
    preview = pixels(generator.preview(state))
    assert np.abs(preview - pixels(generator.finish(state))).max() <= (0 if scheduler == "dpm" else 1)
    _, custom = foreign(parts, scheduler, decode=lambda latents: [tuple(latents.shape)])
    assert custom.preview(custom.advance(custom.start(PROMPTS[:1], SEEDS[:1]), 2)) == [(1, 16, 2, 2)]


def test_schedulers_that_tell_and_that_do_not():
    sample, v = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    ddim = DDIMScheduler()
    ddim.set_timesteps(4)
    out = ddim.step(v, ddim.timesteps[0], sample)
    assert torch.equal(data_prediction(ddim, out, v, sample), out.pred_original_sample)
    heun = FlowMatchHeunDiscreteScheduler()
    heun.set_timesteps(4)
    assert data_prediction(heun, heun.step(v, heun.timesteps[0], sample), v, sample) is None


@pytest.mark.parametrize("settings", [{"shift": 3.0}, {"invert_sigmas": True}])
def test_an_euler_preview_is_one_step_to_the_end_of_its_own_schedule(settings):
    """Whichever way that runs; and settings that an earlier scheduler left in its configuration do not count."""
    before = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type="dpmsolver++"
    )
    euler = FlowMatchEulerDiscreteScheduler.from_config(before.config, **settings)
    assert euler.config.algorithm_type == "dpmsolver++"
    euler.set_timesteps(4)
    sample, v, levels = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), euler.sigmas
    out = euler.step(v, euler.timesteps[0], sample)
    torch.testing.assert_close(data_prediction(euler, out, v, sample), sample + (levels[-1] - levels[0]) * v)


class Closed(SanaPipeline):
    """A pipeline without a step callback."""

    def __call__(self, prompt, negative_prompt="", num_inference_steps=4, guidance_scale=3.0, generator=None):
        return super().__call__(prompt, negative_prompt, generator=generator, **arguments())


def test_a_pipeline_that_cannot_pause_still_makes_pictures(parts):
    made, pausing = foreign(parts)
    closed = DiffusersGenerator(Closed(**made.components))
    assert (closed.can_pause, closed.steps, closed.evaluations(0, 4)) == (False, 4, 8)
    (picture,) = closed.finish(closed.start(PROMPTS[:1], SEEDS[:1]))
    assert np.array_equal(pixels([picture]), pixels(pausing.finish(pausing.start(PROMPTS[:1], SEEDS[:1]))))
    with pytest.raises(ValueError, match="Closed cannot pause: it has no step callback with latents"):
        closed.advance(closed.start(PROMPTS[:1], SEEDS[:1]), 1)
    made._all_hooks = ["offload"]
    assert not DiffusersGenerator(made, **arguments()).can_pause


def test_diffusers_evaluations_are_counted(parts):
    _, generator = foreign(parts)
    assert generator.evaluations(1, 4) == 6
    _, announced_too_few = foreign(parts, evaluations=1)
    state = announced_too_few.advance(announced_too_few.start(PROMPTS[:2], SEEDS[:2]), 2)
    with pytest.raises(ValueError, match=r"took 8 evaluations .* announced were 4: give evaluations=2"):
        announced_too_few.finish(state)
    _, plain = foreign(parts, guidance_scale=1.0)
    assert plain.evaluations(0, 4) == 4
    assert len(plain.finish(plain.start(PROMPTS[:1], SEEDS[:1]))) == 1


def test_diffusers_mistakes(parts):
    with pytest.raises(ValueError, match="generator is set by the search"):
        foreign(parts, generator=None)
    with pytest.raises(ValueError, match="SanaPipeline takes no cfg"):
        foreign(parts, cfg=1)
    _, generator = foreign(parts, "euler")
    state = generator.advance(generator.start(PROMPTS[:2], SEEDS[:2]), 1)
    first = state[0]
    generator.select(state, [1])
    with pytest.raises(ValueError, match="given up by select"):
        generator.finish([first])
    _, failing = foreign(parts, height=63)
    with pytest.raises(ValueError, match="divisible by 32"):
        failing.advance(failing.start(PROMPTS[:1], SEEDS[:1]), 1)
    a, b = foreign(parts)[1].identity(), foreign(parts, num_inference_steps=5)[1].identity()
    assert a != b
    assert a == foreign(parts)[1].identity()
