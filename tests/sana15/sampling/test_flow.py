"""sana15.sampling.flow against diffusers' schedulers configured for SANA, and its own properties."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from helpers import rand

from sana15.sampling import flow


def velocity(x, t):
    """Any smooth nonlinear field."""
    return torch.tanh(x * 0.7) - 0.3 * x + torch.sin(t / 300).view(-1, *[1] * (x.dim() - 1))


def diffusers_scheduler(sampler, steps):
    if sampler == "flow_dpm":
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 1.5, 2.0, 3.0, 6.0])
def test_every_number_of_steps_has_diffusers_timesteps(shift):
    """Timesteps are truncated: at shift 1 many levels lie on the edge of one, and rounding decides which it is."""
    for steps in range(1, 201):
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        scheduler.set_timesteps(steps)
        plan = flow.schedule(steps, flow_shift=shift)
        assert [*plan.timesteps] == scheduler.timesteps.tolist(), steps
        assert torch.equal(torch.tensor(plan.sigmas), scheduler.sigmas), steps


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 14, 20, 28])
def test_steps_equal_diffusers(sampler, steps):
    scheduler = diffusers_scheduler(sampler, steps)
    plan = flow.schedule(steps, sampler=sampler)
    torch.testing.assert_close(
        torch.tensor(plan.timesteps).double(), scheduler.timesteps.double(), rtol=1e-6, atol=1e-4
    )
    torch.testing.assert_close(torch.tensor(plan.sigmas).float(), scheduler.sigmas.float(), rtol=1e-6, atol=1e-6)
    state = flow.SamplerState(rand(0, 2, 4, 3, 3).float())
    theirs = state.latents.clone()
    for t_ours, t in zip(plan.timesteps, scheduler.timesteps):
        v = velocity(state.latents, torch.full((2,), t_ours))
        state = flow.advance(state, v, plan)
        theirs = scheduler.step(velocity(theirs, t.expand(2).float()), t, theirs, return_dict=False)[0]
        torch.testing.assert_close(state.latents, theirs, rtol=2e-5, atol=2e-5)
    assert state.step == plan.steps


def test_published_schedule():
    """The 20-step table of the release with shift 3."""
    sigmas = flow.schedule(20).sigmas
    for i, value in ((0, 0.99967), (1, 0.98242), (2, 0.96394), (17, 0.34589), (18, 0.24979), (19, 0.13624), (20, 0.0)):
        assert sigmas[i] == pytest.approx(value, abs=6e-5)


def gaussian_error(sampler, steps, level):
    """Error at `level` (a fraction of the schedule) on the exact flow from N(0, 1) noise to N(mean, deviation^2) data."""
    mean, deviation = 0.4, 0.3
    plan = flow.schedule(steps, sampler=sampler)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def exact(sigma):
        return (1 - sigma) * mean + math.sqrt((1 - sigma) ** 2 * deviation**2 + sigma**2) * noise

    state = flow.SamplerState(exact(plan.sigmas[0]))
    for sigma in plan.sigmas[: int(steps * level)]:
        variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
        x0 = mean + (1 - sigma) * deviation**2 / variance * (state.latents - (1 - sigma) * mean)
        state = flow.advance(state, (state.latents - x0) / sigma, plan)
    return (state.latents - exact(plan.sigmas[state.step])).abs().max().item()


def test_order_of_convergence():
    """Before the final first-order step, doubling the steps quarters DPM's error and halves Euler's."""
    assert gaussian_error("flow_dpm", 80, 0.75) / gaussian_error("flow_dpm", 160, 0.75) > 3.0
    assert gaussian_error("flow_euler", 80, 0.75) / gaussian_error("flow_euler", 160, 0.75) > 1.8
    assert gaussian_error("flow_dpm", 20, 0.75) < 0.3 * gaussian_error("flow_euler", 20, 0.75)


def test_pause_and_keep_equal_an_uninterrupted_run():
    plan = flow.schedule(8)
    noise = rand(1, 5, 2, 3, 3).float()

    def run(state, until):
        while state.step < until:
            t = torch.full((state.latents.shape[0],), plan.timesteps[state.step])
            state = flow.advance(state, velocity(state.latents, t), plan)
        return state

    kept = torch.tensor([4, 1])
    paused = run(run(flow.SamplerState(noise), 3).select(kept), 8)
    assert torch.equal(paused.latents, run(flow.SamplerState(noise), 8).latents[kept])


def test_training_noise_levels():
    sigma = flow.sample_sigmas(200_000, torch.Generator().manual_seed(0))
    assert sigma.dtype == torch.float32
    assert sigma.min() >= 0
    assert sigma.max() < 1
    # Logit-normal with median 1/2 before the shift: the median after it is shift(1/2) = 3/4.
    assert sigma.median().item() == pytest.approx(flow.shift(0.5, 3.0), abs=5e-3)
    assert torch.equal(sigma[:9], flow.sample_sigmas(200_000, torch.Generator().manual_seed(0))[:9])


def test_stratified_noise_levels_are_spread_evenly():
    """One in each of B equally likely parts, each distributed as without; 64 means vary far less."""
    draws = [
        torch.stack([flow.sample_sigmas(64, torch.Generator().manual_seed(i), stratified=s) for i in range(200)])
        for s in (True, False)
    ]
    assert draws[0].mean().item() == pytest.approx(draws[1].mean().item(), abs=0.01)
    assert draws[0].std().item() == pytest.approx(draws[1].std().item(), abs=0.01)
    assert draws[0].mean(1).std() < 0.2 * draws[1].mean(1).std()
    assert draws[0][:, 0].std().item() == pytest.approx(draws[1].std().item(), rel=0.2)  # in random order
    levels = draws[1].flatten().sort().values
    parts = (
        torch.bucketize(draws[0], levels[200::200].contiguous()).sort(1).values
    )  # 64 parts, as 12,800 free draws estimate them
    assert (parts - torch.arange(64)).abs().max() <= 3


def test_loss_is_zero_for_the_true_velocity_only():
    x0, noise = rand(2, 3, 4, 2, 2).float(), rand(3, 3, 4, 2, 2).float()
    sigma = torch.tensor([0.1, 0.5, 0.9996])
    assert flow.loss(lambda x, t: noise - x0, x0, noise, sigma).abs().max() == 0
    wrong = flow.loss(lambda x, t: x0 - noise, x0, noise, sigma)
    assert wrong.shape == (3,)
    assert (wrong > 0.5).all()
    seen = {}
    flow.loss(lambda x, t: seen.update(x=x, t=t) or x, x0, noise, sigma)
    torch.testing.assert_close(seen["x"][1], 0.5 * x0[1] + 0.5 * noise[1])
    assert seen["t"].tolist() == [100, 500, 999]  # truncated, as the release does


def test_guidance():
    c, u = rand(4, 2, 3).bfloat16(), rand(5, 2, 3).bfloat16()
    torch.testing.assert_close(flow.guided(c, u, 1.0), c.float())
    assert flow.guided(c, u, 4.5).dtype == torch.float32
    assert flow.guidance_is_on(0.5, 4.5)
    assert not flow.guidance_is_on(0.5, 1.0)
    assert not flow.guidance_is_on(0.95, 4.5, (0.1, 0.9))


@pytest.mark.parametrize(
    ("arguments", "match"), [({"steps": 0}, "steps"), ({"steps": 2, "sampler": "ddim"}, "sampler")]
)
def test_bad_schedule(arguments, match):
    with pytest.raises(ValueError, match=match):
        flow.schedule(**arguments)
