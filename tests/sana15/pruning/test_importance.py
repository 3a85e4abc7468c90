"""sana15.calibration, sana15.block_importance and sana15 importance, against slow direct computations."""

import json
import math
from itertools import chain

import numpy as np
import pytest
import tiny_pipeline
import torch
from importance_cases import PROMPTS, pass_through
from PIL import Image

import sana15
from sana15 import Pipeline
from sana15.cli import main
from sana15.model.depth import chosen_blocks
from sana15.pruning.importance import Importance
from sana15.sampling import flow
from sana15.storage.files import DataError


@pytest.fixture
def pipe(tmp_path):
    """Four blocks, none of which does nothing; block 2 is turned into one where a test asks for it."""
    pipe = Pipeline.from_pretrained(tiny_pipeline.make(tmp_path / "tiny", num_layers=4))
    pipe.guidance, pipe.guidance_interval = 3.0, (0.0, 0.8)
    return pipe


# Calibration


def test_calibration_is_the_sampled_trajectory(pipe):
    batches = list(sana15.calibration(pipe, PROMPTS, steps=5, seed=3, batch_size=3))
    assert [(b.chunk, b.step, len(b)) for b in batches] == [(c, s, 3 - 2 * c) for c in (0, 1) for s in range(5)]
    plan = flow.schedule(5, flow_shift=pipe.flow_shift)
    pictures = pipe(PROMPTS, seed=3, steps=5)
    for chunk, prompts in ((0, PROMPTS[:3]), (1, PROMPTS[3:])):
        own = [b for b in batches if b.chunk == chunk]
        with torch.no_grad():
            text, mask = pipe.text.encode(prompts)
        for b, sigma, t in zip(own, plan.sigmas, plan.timesteps):
            assert b.sigma == sigma
            assert torch.equal(b.timestep, torch.full((len(b),), t))
            assert torch.equal(b.x0, own[0].x0)
            assert torch.equal(b.noise, own[0].noise)
            assert torch.equal(b.text, text)
            assert torch.equal(b.mask, mask)
            with torch.no_grad():  # the conditional branch alone
                assert torch.equal(b.velocity, pipe.transformer(b.latents, text, b.timestep, mask))
        for made, sampled in zip(pipe.decode(own[0].x0), pictures[3 * chunk :]):
            off = np.abs(np.asarray(made).astype(int) - np.asarray(sampled[0]))
            assert (off <= 1).mean() > 0.999
        assert not torch.allclose(own[0].latents, own[0].noise)  # the loss gets noise of its own


def test_calibration_gives_out_chosen_steps_of_the_same_trajectory(pipe):
    every = list(sana15.calibration(pipe, PROMPTS, steps=6))
    some = list(sana15.calibration(pipe, PROMPTS, steps=6, at=[0, 4]))
    assert [b.step for b in some] == [0, 4]
    assert torch.equal(some[1].latents, every[4].latents)
    assert torch.equal(some[1].x0, every[0].x0)


def test_calibration_is_a_stream(pipe):
    """A chunk is sampled when it is asked for, and no batch of an earlier one is kept."""
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(1))
    batches = sana15.calibration(pipe, PROMPTS * 1000, steps=2, batch_size=2, guidance=1.0)
    next(batches)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a purple unicorn"]}, "does not know"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"at": [5], "steps": 5}, "at must name steps from 0 to 4"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_calibration_refuses_at_once(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        sana15.calibration(pipe, **{"prompts": PROMPTS} | arguments)


# Importance


def directly(model, batches, bins):
    """Importance by its definition: token by token in NumPy, and the loss of a model that lacks the block."""
    L = len(model.transformer_blocks)
    cosines, losses = [[[] for _ in range(bins)] for _ in range(L)], [[[] for _ in range(bins)] for _ in range(L + 1)]
    for b in batches:
        where = min(int(b.sigma * bins), bins - 1)
        streams = []
        hooks = [
            m.register_forward_hook(lambda m, i, o, streams=streams: streams.append((i[0], o)))
            for m in model.transformer_blocks
        ]
        with torch.no_grad():
            model(b.latents, b.text, b.timestep, b.mask)
        for hook in hooks:
            hook.remove()
        for i, (before, after) in enumerate(streams):
            for x, y in zip(before.double().numpy(), after.double().numpy()):
                tokens = [1 - (p @ q) / math.sqrt((p @ p) * (q @ q)) for p, q in zip(x, y)]
                cosines[i][where].append(sum(tokens) / len(tokens))
        for i in range(L + 1):
            less = chosen_blocks(model, [j for j in range(L) if j != i])
            noisy = (1 - b.sigma) * b.x0 + b.sigma * b.noise
            with torch.no_grad():
                v = less(noisy, b.text, torch.full((len(b),), float(int(1000 * np.float32(b.sigma)))), b.mask)
            losses[i][where] += (v - (b.noise - b.x0)).double().square().flatten(1).mean(1).tolist()
    return cosines, losses


def test_importance_is_the_direct_computation(pipe):
    model, bins = pipe.transformer, 4
    batches = list(sana15.calibration(pipe, PROMPTS, steps=5, batch_size=3))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = sana15.block_importance(model, iter(batches), bins=bins)
    cosines, losses = directly(model, batches, bins)
    mean = np.mean
    assert found.cosine == pytest.approx([mean([*chain(*block)]) for block in cosines], rel=1e-9)
    base = mean([*chain(*losses[-1])])
    assert found.loss == pytest.approx(base, rel=1e-6)
    changes = [mean([*chain(*block)]) - base for block in losses[:-1]]
    assert found.loss_change == pytest.approx(changes, rel=1e-4, abs=1e-6)
    assert max(map(abs, changes)) > 1e-3  # something was measured
    for b in range(bins):
        assert found.samples[b] == len(cosines[0][b])
        for i in range(4):
            if found.samples[b]:
                assert found.cosine_by_bin[i][b] == pytest.approx(mean(cosines[i][b]), rel=1e-9)
                change = mean(losses[i][b]) - mean(losses[-1][b])
                assert found.loss_change_by_bin[i][b] == pytest.approx(change, rel=1e-4, abs=1e-6)
            else:
                assert math.isnan(found.cosine_by_bin[i][b])
    assert sum(found.samples) == 20
    assert found.samples.count(0) == 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert len(model.transformer_blocks) == model.config.num_layers == 4


def test_a_block_that_does_nothing_has_no_importance(pipe):
    pass_through(pipe.transformer, 2)
    found = sana15.block_importance(pipe.transformer, sana15.calibration(pipe, PROMPTS, steps=3))
    assert found.cosine[2] == pytest.approx(0, abs=1e-12)
    assert found.loss_change[2] == pytest.approx(0, abs=1e-6)
    assert min(found.cosine[i] for i in (0, 1, 3)) > 1e-4


def test_importance_does_not_depend_on_the_batch(pipe):
    a, b = (
        sana15.block_importance(pipe.transformer, sana15.calibration(pipe, PROMPTS, steps=3, batch_size=size))
        for size in (1, 4)
    )
    assert a.cosine == pytest.approx(b.cosine, rel=1e-4)
    assert a.loss_change == pytest.approx(b.loss_change, rel=1e-3, abs=1e-6)


def test_without_the_loss(pipe):
    found = sana15.block_importance(pipe.transformer, sana15.calibration(pipe, PROMPTS, steps=2), loss=False)
    assert found.loss is None
    assert found.loss_change == []


def test_importance_needs_batches_and_finite_activations(pipe):
    with pytest.raises(ValueError, match="at least one calibration batch"):
        sana15.block_importance(pipe.transformer, [])
    batches = list(sana15.calibration(pipe, PROMPTS, steps=2))
    with pytest.raises(ValueError, match="bins must be 1 to 1000"):
        sana15.block_importance(pipe.transformer, batches, bins=1001)
    with pytest.raises(ValueError, match="bins must be 1 to 1000"):
        sana15.block_importance(pipe.transformer, batches, bins=0)
    pipe.transformer.transformer_blocks[1].ff.conv_point.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        sana15.block_importance(pipe.transformer, batches)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in pipe.transformer.transformer_blocks)


def test_a_view_shares_everything_and_changes_nothing(pipe):
    model = pipe.transformer
    view = chosen_blocks(model, [0, 3])
    assert view.config.num_layers == 2
    assert view.transformer_blocks[1] is model.transformer_blocks[3]
    assert view.patch_embed is model.patch_embed
    assert len(model.transformer_blocks) == model.config.num_layers == 4


# The command


def test_command_writes_json_and_figure(tmp_path, capsys):
    source = tiny_pipeline.make(tmp_path / "tiny", num_layers=3)
    arguments = [
        "importance",
        str(source),
        "--count",
        "3",
        "--steps",
        "2",
        "--bins",
        "5",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "3 of them empty" in text
    assert "loss of the whole model" in text
    found = Importance.load(tmp_path / "out" / "importance.json")
    assert (found.layers, sum(found.samples), found.settings["prompts"]) == (3, 6, 3)
    values = json.loads((tmp_path / "out" / "importance.json").read_text())
    assert values["cosine_by_bin"][0].count(None) == 3
    found.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == values
    with Image.open(tmp_path / "out" / "importance.png") as figure:
        assert min(figure.size) > 300
    assert main([*arguments, "--no-loss"]) == 0
    assert json.loads((tmp_path / "out" / "importance.json").read_text())["loss"] is None
    assert main([*arguments, "--count", "0"]) == 2
    assert main(["importance", str(source / "transformer"), "--out", str(tmp_path / "x")]) == 3
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"cosine": [1], "cosine_by_bin": [], "samples": []}',
        '{"cosine": ["a"], "cosine_by_bin": [[]], "samples": [1]}',
        f'{{"cosine": [1{"0" * 400}], "cosine_by_bin": [[1]], "samples": [1]}}',
        '{"cosine": [1], "cosine_by_bin": [[1]], "samples": [1], "loss": "abc"}',
        '{"cosine": [1], "cosine_by_bin": [[1]], "samples": [1], "loss": 1, "loss_change": [1], "loss_by_bin": 5}',
        '{"cosine": [1], "cosine_by_bin": [[1]], "samples": [1], "settings": 5}',
    ],
)
def test_a_file_that_is_no_importance(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError):
        Importance.load(tmp_path / "x.json")
