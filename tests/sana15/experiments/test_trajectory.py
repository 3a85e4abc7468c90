"""Runs that experiments share: their draws, marks, branches and growth; what optimizers and 16-bit weights do to them."""

import math

import numpy as np
import pytest
import torch

from sana15.experiments import latents, optimizers
from sana15.experiments.grid import Place
from sana15.experiments.growth import TINY
from sana15.experiments.intervals import crossing, over_seeds, shown
from sana15.experiments.muon import Muon, is_matrix, orthogonal, packed, unpacked
from sana15.experiments.sizes import passing
from sana15.experiments.trajectory import (
    Method,
    Origin,
    Run,
    flops,
    model_name,
    model_path,
    run_cells,
    scratch,
    step_flops,
    trunk_flops,
)
from sana15.experiments.weights16 import Weights16, cut
from sana15.model.config import SanaConfig
from sana15.storage.files import read_tensors
from sana15.training.checkpoints import checkpoints
from sana15.training.loop import fit


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    there = Place(folder, "cpu", folder)
    for cell in latents.cells(TINY.scenes):
        assert cell.run(there) == {"scenes": TINY.scenes}
    return there


ADAMW = Method()


def computed(place, run, marks, method=ADAMW, trunk_only=()):
    return {cell.name: cell.run(place) for cell in run_cells(run, marks, TINY, method, trunk_only)}


def weights(place, run, mark):
    folder = checkpoints(place.common / run.path(TINY) / f"trunk-{mark}")[mark]
    tensors = read_tensors(folder / "weights.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_a_batch_is_of_its_generator(place):
    data = latents.load(place.common, TINY.scenes, "cpu")
    first, again, other = (data.batch(4, 0.5, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (4, 16, 8, 8)


def test_latents_are_those_of_the_prompts_scenes(place):
    """Latent i belongs to prompt i: encoded again from the scenes, it is the same up to fp16."""
    from sana15.model.autoencoder import Autoencoder
    from sana15.model.folder import MINI
    from sana15.training.data import SceneBatches

    data = latents.load(place.common, TINY.scenes, "cpu")
    batch = SceneBatches(latents.SEED, latents.ENCODED, 2)[1]
    assert data.prompts[latents.ENCODED :] == batch.prompts
    found = latents.encoded(Autoencoder.load(MINI / "vae"), batch.pictures)
    torch.testing.assert_close(data.latents[latents.ENCODED :].float(), found, atol=2e-2, rtol=1e-2)


def test_a_mark_on_the_way_changes_nothing(place):
    """The trunk is stored and taken up again at every mark: with the same bits as without."""
    through, stopped = Run("through", 3, 1), Run("stopped", 3, 1)
    computed(place, through, (), trunk_only=(4,))
    found = computed(place, stopped, (2,), trunk_only=(4,))
    assert weights(place, through, 4) == weights(place, stopped, 4)
    assert found[model_name(stopped, 2)]["steps"] == 2  # a branch of no step: 20 % of 2
    assert "losses" in found["stopped-3-trunk-4"]


def test_a_run_done_is_not_computed_again(place, monkeypatch):
    run = Run("once", 0, 1)
    first = computed(place, run, (2,))
    monkeypatch.setattr("sana15.experiments.trajectory.fitted", None)
    assert computed(place, run, (2,)) == first


def test_a_branch_lets_the_rate_fall_to_zero(place, monkeypatch):
    rates = []
    monkeypatch.setattr(
        "sana15.experiments.trajectory.fit", lambda *a, rate, **k: rates.append([rate(s) for s in a[3]])
    )
    computed(place, Run("rates", 0, 1), (5, 10))
    trunk, branch, second, last = rates
    assert trunk == pytest.approx([TINY.lr * (s + 1) / 100 for s in range(5)])
    assert branch == pytest.approx([TINY.lr])
    assert second == pytest.approx([TINY.lr * (s + 1) / 100 for s in range(5, 10)])
    assert last == pytest.approx([TINY.lr, TINY.lr / 2])


def test_a_grown_run_begins_as_its_source(place):
    """Partial preservation of all blocks adds zero blocks: before its first step the loss is the source's."""
    base = Run("source", 1, 1)
    computed(place, base, (), trunk_only=(2,))
    grown = Run("grown", 1, 3, Origin(base, 2, (("strategy", "partial_preservation"), ("keep", 1))), first=2)
    seen = {}

    def first_loss(model, run):
        seen["model"] = model.growth_map
        return Method().hooks(model, run)

    found = computed(place, grown, (3,), Method(hooks=first_loss))
    assert seen["model"] == [0, None, None]
    assert found[model_name(grown, 3)]["layers"] == 3
    assert SanaConfig.load(place.common / model_path(grown, 3, TINY) / "transformer").num_layers == 3
    # The third step's loss equals the source's own third step's: same draws, same function.
    computed(place, base, (), trunk_only=(2, 3))
    ours, theirs = (
        found["grown-1-trunk-3"]["losses"],
        computed(place, base, (), trunk_only=(2, 3))["source-1-trunk-3"]["losses"],
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_compute_counts_what_came_before():
    base = Run("source", 0, 4)
    grown = Run("grown", 0, 12, Origin(base, 100, ()))
    assert step_flops(grown, TINY) == 3 * step_flops(base, TINY)
    assert trunk_flops(grown, 10, TINY) == 100 * step_flops(base, TINY) + 10 * step_flops(grown, TINY)
    assert flops(grown, 10, TINY) == trunk_flops(grown, 12, TINY)
    late = Run("late", 0, 12, Origin(base, 100, ()), first=100)
    assert trunk_flops(late, 120, TINY) == 100 * step_flops(base, TINY) + 20 * step_flops(late, TINY)


def test_settings_are_in_the_name_of_a_runs_folder():
    paths = {
        Run("a", 0, 1).path(TINY),
        Run("a", 0, 2).path(TINY),
        Run("a", 1, 1).path(TINY),
        Run("a", 0, 1, lr=2.0).path(TINY),
    }
    assert len(paths) == 4


# Optimizers


def test_every_arm_goes_on_where_it_stopped(place):
    """Also the optimizers' states, and weights of 16 and 24 bits, come back from a mark with the same bits."""
    for arm, method in optimizers.METHODS.items():
        through, stopped = Run(f"{arm}-through", 5, 1, lr=0.1), Run(f"{arm}-stopped", 5, 1, lr=0.1)
        computed(place, through, (), method, trunk_only=(4,))
        computed(place, stopped, (), method, trunk_only=(2, 4))
        assert weights(place, through, 4) == weights(place, stopped, 4), arm


def test_orthogonal_has_singular_values_near_one():
    for shape in ((20, 50), (50, 20), (30, 30)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert 0.3 < values.min() < values.max() < 1.3
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(orthogonal(matrix).flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_packed_values_are_off_by_half_a_step():
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    codes, scale = packed(values)
    assert codes.dtype == torch.int8
    assert (unpacked(codes, scale, values.shape) - values).abs().max() <= scale.max() / 2 * 1.001
    assert torch.equal(unpacked(*packed(torch.zeros(5)), torch.Size([5])), torch.zeros(5))


def test_muon_takes_matrices_and_adamw_the_rest():
    model = scratch(1, 32, 0)
    taken = {name for name, p in model.named_parameters() if is_matrix(name, p)}
    assert "transformer_blocks.0.attn1.to_q.weight" in taken
    assert "transformer_blocks.0.ff.conv_point.weight" in taken
    assert not {n for n in taken if "table" in n or "conv_depth" in n or "bias" in n or "norm" in n}
    # What Muon leaves is updated as torch's AdamW would.
    twin = scratch(1, 32, 0)
    ours, theirs = Muon(model, 1e-3), torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(model.parameters(), twin.parameters()):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if name not in taken:
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="bits must be 8 or 32, got 4"):
        Muon(model, 1e-3, bits=4)


# Weights of 16 bits


def test_cut_to_16_bits_is_bfloat16():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-5, 5).repeat(1000)
    assert torch.equal(cut(values, 16), values.bfloat16().float())
    assert torch.equal(cut(values, 32), values)
    assert ((cut(values, 24) - values).abs() <= values.abs() * 2.0**-16).all()


def test_rounding_by_chance_is_right_in_the_mean():
    value = torch.full((100_000,), 1.0 + 0.3 * 2.0**-7)
    found = cut(value, 16, torch.Generator().manual_seed(0))
    assert set(found.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert found.mean().item() == pytest.approx(value[0].item(), abs=2.0**-7 * 0.01)


@pytest.mark.parametrize(
    ("kept", "by_chance", "moved"), [(16, False, 0.0), (16, True, 1.0), (24, False, 1.0), (32, False, 1.0)]
)
def test_small_steps_are_lost_in_16_bits_alone(kept, by_chance, moved):
    """Each step is a tenth of bf16's last digit; the loss sees 16 bits whatever is kept."""
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.full((1000,), 1.0))
    weights = Weights16(module, Run("w", 0, 1), kept, by_chance)
    around, after = weights.hooks()
    seen = []

    def loss(step, generator):
        seen.append(bool((module.w == module.w.bfloat16().float()).all()))
        return module.w.sum()

    optimizer = torch.optim.SGD([module.w], lr=0.1 * 2.0**-8)
    fit(loss, [module.w], optimizer, range(100), clip=None, around=around, done=lambda step, value, norm: after(step))
    assert all(seen)
    assert (1.0 - module.w.mean().item()) / (100 * 0.1 * 2.0**-8) == pytest.approx(moved, abs=0.02)


# Numbers of the reports


def test_interval_over_seeds_is_students():
    mean, half = over_seeds([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert shown([0.5]) == "0.500"
    assert shown([]) == "-"
    assert shown([1.0, 1.0], 2, "+") == "+1.00 ± 0.00"


def test_crossing_is_between_the_marks():
    xs, ys = [100, 200, 400], [1.0, 0.8, 0.4]
    assert crossing(xs, ys, 0.8) == pytest.approx(200)
    assert crossing(xs, ys, 0.6) == pytest.approx(math.sqrt(200 * 400))
    assert crossing(xs, ys, 1.5) == 100
    assert crossing(xs, ys, 0.3) is None


def test_passing_is_the_least_count():
    assert passing([0.1, 0.3, 0.5], 0.3, (1, 2, 4)) == 2
    assert passing([0.1, 0.3, 0.5], 0.6, (1, 2, 4)) is None
    assert np.isfinite(flops(Run("a", 0, 1), 10, TINY))
