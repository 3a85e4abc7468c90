"""The strategies that learn or search: exact choices on hand-made cases, what they spend, healing in memory."""

import dataclasses
import math

import pytest
import torch
from grown_folders import run_python
from pruned_folders import idle  # noqa: F401, a fixture

import sana15
from sana15.model.depth import chosen_blocks
from sana15.pruning import learned as pruning_learned
from sana15.pruning.choice import split
from sana15.pruning.healing import flow_steps
from sana15.pruning.learned import groups_of
from sana15.pruning.removal import choose
from sana15.pruning.search import greedy, search
from sana15.sampling import flow
from sana15.training.distillation import Distillation


def test_greedy_takes_what_is_best_after_healing_and_not_before():
    """Quickly judged, 1 should go; judged slowly, 2. Then the best pair of what is left."""
    quick = {(0, 2, 3): 1.0, (0, 1, 3): 1.1, (0, 1, 2): 1.2, (1, 2, 3): 9.0, (1, 3): 1, (0, 3): 2, (0, 1): 3}
    slow = {(0, 2, 3): 5.0, (0, 1, 3): 4.0, (0, 1): 1, (0, 3): 3, (1, 3): 2}
    asked = []

    def ask(table, name):
        return lambda kept: (asked.append((name, tuple(kept))), table[tuple(kept)])[1]

    assert greedy(4, 2, 2, ask(quick, "quick"), ask(slow, "slow")) == ([1, 3], [2, 0])
    assert [kept for name, kept in asked if name == "slow"] == [(0, 2, 3), (0, 1, 3), (1, 3), (0, 3)]
    assert greedy(4, 2, 3, ask(quick, "quick"), ask(slow | {(0, 1, 2): 6}, "slow")) == ([0, 1], [2, 3])
    asked.clear()
    assert greedy(4, 2, 1, ask(quick | {(2, 3): 0, (0, 2): 1}, "quick"), ask(slow, "slow")) == ([2, 3], [1, 0])
    assert {name for name, _ in asked} == {"quick"}  # one candidate needs no second judgement
    assert greedy(4, 4, 2, ask(quick, "quick"), ask(slow, "slow")) == ([0, 1, 2, 3], [])


def test_of_equal_removals_the_later_block_goes():
    assert greedy(4, 2, 1, lambda kept: 0.0, lambda kept: 0.0) == ([0, 1], [3, 2])


@pytest.mark.parametrize(
    ("layers", "keep", "size", "expected"),
    [
        (12, 8, 4, [(0, 3, 2), (3, 6, 2), (6, 9, 2), (9, 12, 2)]),
        (12, 6, 4, [(0, 4, 2), (4, 8, 2), (8, 12, 2)]),
        (12, 6, 2, [(i, i + 2, 1) for i in range(0, 12, 2)]),
        (12, 4, 4, [(0, 3, 1), (3, 6, 1), (6, 9, 1), (9, 12, 1)]),
        (12, 7, 4, [(0, 4, 2), (4, 8, 2), (8, 12, 3)]),
        (6, 4, 4, [(0, 3, 2), (3, 6, 2)]),
        (5, 1, 4, [(0, 5, 1)]),
        (60, 20, 4, [(i, i + 3, 1) for i in range(0, 60, 3)]),
    ],
)
def test_groups(layers, keep, size, expected):
    assert groups_of(layers, keep, size) == expected


def test_groups_always_cover_all_blocks_and_keep_as_many_as_asked():
    for layers in range(1, 25):
        for keep in range(1, layers + 1):
            for size in (1, 2, 4):
                groups = groups_of(layers, keep, size)
                assert [a for a, _, _ in groups] == [0, *(b for _, b, _ in groups[:-1])]
                assert groups[-1][1] == layers
                assert sum(n for _, _, n in groups) == keep
                assert all(0 <= n <= b - a <= 1.5 * size + 1 for a, b, n in groups)


def test_losses_that_are_not_finite_lose():
    quick = {(0, 1, 2): 3.0, (0, 1, 3): math.nan, (0, 2, 3): 1.0, (1, 2, 3): math.inf}
    assert greedy(4, 3, 1, lambda k: quick[tuple(k)], lambda k: 0.0) == ([0, 2, 3], [1])
    assert greedy(4, 3, 4, lambda k: quick[tuple(k)], lambda k: math.nan if k == [0, 2, 3] else 0)[0] == [0, 1, 2]
    with pytest.raises(ValueError, match="the loss is not finite"):
        greedy(4, 3, 2, lambda k: math.nan, lambda k: 0.0)


# On the model of six blocks of which 1 and 4 do nothing


def test_search_finds_the_idle_blocks_and_says_what_it_spent(idle):  # noqa: F811
    model, batches = idle
    before = {n: t.clone() for n, t in model.state_dict().items()}
    choice = search(model, batches, 4, candidates=2, trial_steps=2, lr=1e-5)
    assert choice.kept == [0, 2, 3, 5]
    # Two depths, of 6 and 5 removals judged unhealed and two of each healed.
    assert choice.spent == {"healing steps": 8, "losses": 6 + 5 + 4}
    assert sorted(choice.removed) == [1, 4]
    shorter = search(model, batches, 5, candidates=2, trial_steps=2, lr=1e-5)
    assert shorter.removed == choice.removed[:1]  # the longer search begins with the shorter
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    again = sana15.prune(model, 4, "search", batches=iter(batches), candidates=2, trial_steps=2, lr=1e-5)
    assert again.kept_blocks == choice.kept
    assert again.config.num_layers == 4


def test_learned_finds_the_idle_blocks(idle):  # noqa: F811
    model, batches = idle
    before = {n: t.clone() for n, t in model.state_dict().items()}
    choices = [
        choose(model, 6, 4, "learned", batches=batches, learning_steps=60, lr=1e-5, rank=2, odds_lr=0.3, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert [c.kept for c in choices] == [[0, 2, 3, 5]] * 3
    assert choices[0] == choices[1]
    assert choices[0].spent == {"learning steps": 60}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", ["search", "learned"])
def test_frozen_and_half_precision_models_are_searched_too(idle, by, dtype):  # noqa: F811
    model, batches = idle
    model = model.requires_grad_(False).to(dtype)
    batches = [dataclasses.replace(b, text=b.text.to(dtype)) for b in batches]
    options = {"search": {"trial_steps": 2, "lr": 1e-5}, "learned": {"learning_steps": 60, "lr": 1e-5, "odds_lr": 0.3}}
    with torch.no_grad():
        assert choose(model, 6, 4, by, batches=batches, **options[by]).kept == [0, 2, 3, 5]
    assert model.proj_out.weight.dtype == dtype


@pytest.mark.parametrize("flow_shift", [1.0, 5.0])
def test_flow_steps_take_the_models_noise_levels_and_timesteps(idle, flow_shift):  # noqa: F811
    model, batches = idle
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    groups = [{"params": list(model.parameters()), "lr": 0.0}]
    flow_steps(model, groups, batches, 2, seed=3, flow_shift=flow_shift, timestep_scale=0.5)
    for step, timesteps in enumerate(seen):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + step)
        torch.randn(batches[0].x0.shape, generator=generator)
        sigma = flow.sample_sigmas(len(timesteps), generator, flow_shift=flow_shift)
        assert torch.equal(timesteps, (sigma * 1000).floor() * 0.5)


def test_learned_draws_with_gumbel_noise_that_depends_on_the_seed(idle, monkeypatch):  # noqa: F811
    """In the long run each way is drawn as often as its odds say (3 to 1 here), and a seed repeats its draws."""
    model, batches = idle
    drawn: dict[int, list[list[float]]] = {}
    ranks, rates = set(), set()

    def watched(supernet, parameters, healing, steps, *, seed, before, **options):
        ranks.update(min(p.shape) for p in parameters[0]["params"])
        rates.add(tuple(group["lr"] for group in parameters))
        for odds in parameters[1]["params"]:
            odds.data[0] = math.log(3)
        for step in range(steps):
            before(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
            drawn.setdefault(seed, []).append([round(b.gate.item(), 5) for b in supernet.transformer_blocks])

    monkeypatch.setattr(pruning_learned, "flow_steps", watched)
    for seed in (0, 1, 0):
        sana15.prune(
            model, 3, "learned", batches=batches, learning_steps=300, group=2, rank=3, lr=0.01, odds_lr=0.2, seed=seed
        )
    assert (ranks, rates) == ({3}, {(0.01, 0.2)})
    first, again, other = drawn[0][:300], drawn[0][300:], drawn[1]
    assert first == again != other
    assert all(set(row) == {0.0, 1.0} and sum(row) == 3 for row in first)
    assert torch.tensor(first).mean(0).tolist() == pytest.approx([0.75, 0.25] * 3, abs=0.08)


@pytest.mark.parametrize(
    ("by", "options", "message"),
    [
        ("search", {"batches": []}, "at least one calibration batch"),
        ("learned", {"batches": []}, "at least one calibration batch"),
        ("search", {"seed": 2**44}, "seed must be"),
        ("learned", {"seed": -1}, "seed must be"),
        ("search", {"candidates": 0}, "candidates must be at least 1"),
        ("learned", {"learning_steps": 0}, "learning_steps and rank must be at least 1"),
        ("learned", {"group": 0}, "group must be at least 1"),
    ],
)
def test_bad_options(idle, by, options, message):  # noqa: F811
    model, batches = idle
    with pytest.raises(ValueError, match=message):
        sana15.prune(model, 4, by, **{"batches": batches} | options)


def test_groups_with_too_many_ways_are_refused(idle):  # noqa: F811
    _, batches = idle
    deep = sana15.prune(sana15.grow(idle[0], 30), indices=range(30))
    with pytest.raises(ValueError, match="155117520 ways to keep 15 of 30; take a smaller group"):
        sana15.prune(deep, 15, "learned", batches=batches, group=30)


def test_a_third_of_the_prompts_is_for_judging(idle):  # noqa: F811
    _, batches = idle
    judged, healing = split(batches)
    assert {b.chunk for b in judged} == {2}
    assert [(b.chunk, b.step) for b in healing] == [(0, 0), (1, 0), (3, 0)]
    judged, healing = split([b for b in batches if b.chunk < 2])
    assert len(judged) == 4
    assert len(healing) == 2


def test_flow_steps_lower_the_loss_and_repeat(idle):  # noqa: F811
    model, batches = idle
    results = []
    for _ in range(2):
        small = sana15.prune(model, by="indices", indices=[0, 3, 5]).train()
        distance = Distillation(small, model, [0, 3, 5])
        groups = [{"params": list(small.parameters()), "lr": 1e-3}]
        before = small.proj_out.weight.detach().clone()
        flow_steps(small, groups, batches, 4, seed=1)
        assert not torch.equal(before, small.proj_out.weight)
        results.append((small.state_dict(), distance.loss().item()))
    assert all(torch.equal(results[0][0][n], t) for n, t in results[1][0].items())


# Distillation


def test_distillation_compares_with_the_counterparts(idle):  # noqa: F811
    model, batches = idle
    kept = [0, 3, 5]
    small = sana15.prune(model, by="indices", indices=kept)
    distance = Distillation(small, model, kept)
    b = batches[0]
    inputs = (b.latents, b.text, b.timestep, b.mask)
    small(*inputs)
    found = distance.loss()
    ours, theirs, velocities = [], [], []
    for m, to in ((small, ours), (model, theirs)):
        fresh = chosen_blocks(m, range(len(m.transformer_blocks)))
        hooks = [k.register_forward_hook(lambda _, i, o, to=to: to.append(o)) for k in fresh.transformer_blocks]
        velocities.append(fresh(*inputs))
        for hook in hooks:
            hook.remove()
    terms = []
    for a, t in zip(ours, (theirs[1], theirs[3], theirs[5])):
        keep = (t - t.mean()).abs() <= 3 * t.std()
        assert not keep.all()  # something is masked
        terms.append((a - t)[keep].square().mean() / t[keep].var())
    velocity = (velocities[0] - velocities[1]).square().mean()
    assert found.item() == pytest.approx((torch.stack(terms).mean() + 0.1 * velocity).item(), rel=1e-4)
    found.backward()
    assert small.transformer_blocks[0].ff.conv_point.weight.grad.any()
    assert all(p.grad is None for p in model.parameters())
    whole = sana15.prune(model, by="indices", indices=range(6))
    same = Distillation(whole, model, range(6))
    whole(*inputs)
    assert same.loss().item() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="not those of a model pruned from this teacher"):
        Distillation(small, model, [0, 1])
    for kept in ([0, 0, 1], [3, 1, 5], [0, 1, 6], [-1, 0, 1]):
        with pytest.raises(ValueError, match="not those of a model pruned from this teacher"):
            Distillation(small, model, kept)


def test_pruning_does_not_load_the_training_loop():
    code = (
        "import sys, sana15.pruning.removal; print([m for m in ('yaml', 'sana15.training.config') if m in sys.modules])"
    )
    assert run_python(code).communicate()[0] == "[]\n"
