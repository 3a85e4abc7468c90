"""Pipelines whose calls put something on shared models: paused, failing, interrupted and cached, against calls of their own."""

import functools
import signal
import threading

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaPAGPipeline, SanaPipeline, SanaTransformer2DModel
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from generator_cases import parts as parts  # the fixture
from generator_cases import pixels
from search_fakes import Meter

from sana15.sampling.diffusers_pipeline import DiffusersGenerator
from sana15.sampling.settings import Seed
from sana15.scaling.run import search

PROMPTS, SEEDS = ["a red circle", "two squares"], [Seed(0, 0, 0), Seed(0, 1, 0)]
ARGUMENTS = {"num_inference_steps": 4, "height": 64, "width": 64, "use_resolution_binning": False}
PAG = ARGUMENTS | {"evaluations": 3, "pag_scale": 3.0}


class Hooking(SanaPipeline):
    """Registers a hook and replaces a forward for the length of a call, and leaves both behind."""

    @functools.wraps(SanaPipeline.__call__)
    def __call__(self, *args, **kwargs):
        block = self.transformer.transformer_blocks[0]
        block.attn1.register_forward_hook(lambda module, args, out: 0.5 * out)
        plain = block.ff.forward
        block.ff.forward = lambda x: 2 * plain(x)
        return super().__call__(*args, **kwargs)


@pytest.fixture
def made(parts):
    tokenizer, text, vae, transformer = parts
    fresh = SanaTransformer2DModel.from_config(transformer.config)  # of its own: these tests leave things on models
    fresh.load_state_dict(transformer.state_dict())
    torch.manual_seed(1)
    for block in fresh.transformer_blocks:
        torch.nn.init.normal_(block.scale_shift_table)

    def of(kind, **options):
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, algorithm_type="dpmsolver++"
        )
        pipe = kind(tokenizer, text, vae, fresh.eval(), scheduler, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return of


def pag(made):
    return made(SanaPAGPipeline, pag_applied_layers=["transformer_blocks.1"])


def state_of(pipe):
    """What a call might leave on the pipeline's models."""
    return [
        (
            name,
            id(getattr(m, "processor", None)),
            m.__dict__.get("forward"),
            *map(len, (m._forward_hooks, m._forward_pre_hooks)),
        )
        for name, m in pipe.transformer.named_modules()
    ]


def alone(pipe, arguments, prompts=PROMPTS, seeds=SEEDS):
    """Each picture by a generator that makes nothing else."""
    arguments = {k: v for k, v in arguments.items() if k != "evaluations"}
    return pixels(
        pipe(p, generator=torch.Generator().manual_seed(s.number()), **arguments).images[0]
        for p, s in zip(prompts, seeds)
    )


def test_paused_calls_keep_their_processors_to_themselves(made):
    pipe = pag(made)
    expected, before = alone(pipe, PAG), state_of(pipe)
    plain = alone(made(SanaPipeline), ARGUMENTS)
    assert (expected != plain).mean() > 0.1  # PAG does something
    generator = DiffusersGenerator(pipe, **PAG)
    state = generator.start(PROMPTS, SEEDS)
    for step in (1, 3):
        state = generator.advance(state, step)
        assert state_of(pipe) == before
        assert np.array_equal(alone(made(SanaPipeline), ARGUMENTS), plain)  # another pipeline on the same transformer
    assert np.array_equal(pixels(generator.finish(state)), expected)
    assert state_of(pipe) == before


def test_hooks_and_forwards_of_a_call_wait_with_it(made):
    pipe = made(Hooking)
    before = state_of(pipe)
    plain = alone(made(SanaPipeline), ARGUMENTS)
    generator = DiffusersGenerator(pipe, **ARGUMENTS)
    whole = pixels(generator.finish(generator.start([p], [s]))[0] for p, s in zip(PROMPTS, SEEDS))
    assert state_of(pipe) == before
    assert (whole != plain).any(axis=(1, 2, 3)).all()
    state = generator.advance(generator.start(PROMPTS, SEEDS), 2)
    assert state_of(pipe) == before
    assert np.array_equal(pixels(generator.finish(state)), whole)
    assert state_of(pipe) == before


@pytest.mark.parametrize("policy", ["best_of_n", "halving"])
def test_every_policy_makes_the_pictures_of_uninterrupted_calls(made, policy, tmp_path):
    pipe = pag(made)
    before = state_of(pipe)
    options = {"n": 4, "pick": 2, "judge": Meter(), "policy": policy, "batch_size": 4}
    result = search(DiffusersGenerator(pipe, **PAG), ["a star"], out=tmp_path / "run", **options)
    assert state_of(pipe) == before
    (found,) = result.found
    seeds = [Seed(0, 0, c) for c in found.picked]
    assert np.array_equal(pixels(result.images[0]), alone(pipe, PAG, ["a star"] * 2, seeds))


@pytest.mark.parametrize("pause", [False, True])
def test_a_failing_call_leaves_nothing_behind(made, pause, monkeypatch):
    pipe = pag(made)
    expected, before = alone(pipe, PAG), state_of(pipe)
    generator = DiffusersGenerator(pipe, **PAG)
    state = generator.start(PROMPTS, SEEDS)
    if pause:
        state = generator.advance(state, 1)
    with monkeypatch.context() as patched:
        patched.setattr(SanaPAGPipeline, "_apply_perturbed_attention_guidance", None)
        with pytest.raises(TypeError):
            generator.finish(state)
    assert state_of(pipe) == before
    generator.select(state, [])
    assert state_of(pipe) == before
    assert np.array_equal(pixels(generator.finish(generator.start(PROMPTS, SEEDS))), expected)


@pytest.fixture
def interruptible():
    """Ctrl-C is a KeyboardInterrupt, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("policy", ["best_of_n", "halving"])
def test_an_interrupted_search_leaves_nothing_behind(made, policy, tmp_path, interruptible):
    pipe = pag(made)
    calls = []

    def interrupt(module, args, output):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)

    pipe.transformer.proj_out.register_forward_hook(interrupt)
    before, threads = state_of(pipe), threading.active_count()
    options = {"n": 4, "pick": 2, "judge": Meter(), "policy": policy, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        search(DiffusersGenerator(pipe, **PAG), ["a star"], out=tmp_path / "run", **options)
    assert state_of(pipe) == before
    assert threading.active_count() == threads


def test_caches_of_a_call_are_refused_where_it_would_pause_and_start_empty_elsewhere(made, tmp_path, monkeypatch):
    pipe = made(SanaPipeline)
    plain = alone(pipe, ARGUMENTS)
    told = []
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001), cross_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",), cross_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: told.append(pipe._guidance_scale) or 500,  # of this very pipeline
    )  # fmt: skip
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    del pipe._guidance_scale
    generator = DiffusersGenerator(pipe, **ARGUMENTS)
    assert not generator.can_pause
    with pytest.raises(
        ValueError, match=r"halving needs previews.*caches whose state is one call's \(PyramidAttention"
    ):
        search(generator, PROMPTS, out=tmp_path / "run", judge=Meter(), policy="halving")
    with pytest.raises(ValueError, match="SanaPipeline cannot pause: it has caches"):
        generator.advance(generator.start(PROMPTS, SEEDS), 1)
    assert not (tmp_path / "run").exists()

    def one(k):
        return pixels(generator.finish(generator.start(PROMPTS[k : k + 1], SEEDS[k : k + 1])))[0]

    scheduler = pipe.scheduler
    first = one(0)
    assert (first != plain[0]).any()
    assert set(told) == {4.5}
    assert not hasattr(pipe, "_guidance_scale")  # the pipeline is as it was
    assert pipe.scheduler is scheduler
    one(1)
    assert np.array_equal(one(0), first)  # nothing of the picture before
    with monkeypatch.context() as patched:
        patched.setattr(SanaPipeline, "maybe_free_model_hooks", None)
        with pytest.raises(TypeError):
            one(1)
    assert np.array_equal(one(0), first)


def test_a_scheduler_or_guider_of_another_name_is_each_calls_own(made):
    class Guider:
        def __init__(self):
            self.steps = 0

        def set_state(self, step):
            self.steps = step

    class Guided(SanaPipeline):
        @functools.wraps(SanaPipeline.__call__)
        def __call__(self, *args, **kwargs):
            self.guider.set_state(self.guider.steps + 1)
            return super().__call__(*args, **kwargs)

    pipe = made(Guided)
    pipe.guider = Guider()
    generator = DiffusersGenerator(pipe, **ARGUMENTS)
    generator.finish(generator.advance(generator.start(PROMPTS, SEEDS), 2))
    assert pipe.guider.steps == 0
