"""Healing on what the source makes of prompts: no pictures are needed, and any pipeline will do."""

import dataclasses
import json

import pytest
import torch
from tiny_pipeline import make_published

import sana15
from sana15.cli import main
from sana15.model.checkpoint import load_transformer, save_transformer
from sana15.pruning import folder as pruning_files
from sana15.pruning import samples as healing_samples
from sana15.pruning.folder import prune_folder
from sana15.pruning.healing import Healing
from sana15.pruning.importance import Importance, batch_loss
from sana15.pruning.samples import Samples, heal_on_samples
from sana15.pruning.trajectory import calibration
from sana15.sampling.pipeline import Pipeline, PipelineGenerator
from sana15.sampling.settings import Sampling, Seed
from sana15.storage.weights import folder_weights
from sana15.training import run as train
from sana15.training.distillation import Distillation
from sana15.training.loop import Average

KEPT = [0, 1, 3, 4, 6, 8, 9, 11]
PROMPTS = ["a red circle", "two blue stars and a green square", "a yellow ring"]
QUICK = Healing(steps=2, batch_size=2, data="samples")


def weights(folder):
    return load_transformer(folder / "transformer").state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def samples_of(pipe, prompts=PROMPTS, steps=3):
    samples = Samples()
    for _ in samples.remember(calibration(pipe, prompts, steps=steps, at=[0], batch_size=2)):
        pass
    return samples


def test_samples_are_the_pipelines_pictures():
    pipe = Pipeline.from_pretrained("mini")
    samples = Samples()
    given = list(calibration(pipe, PROMPTS, steps=3, batch_size=2))
    passed = list(samples.remember(iter(given)))
    assert all(a is b for a, b in zip(given, passed, strict=True))
    generator = PipelineGenerator(pipe, Sampling(steps=3))
    state = generator.advance(generator.start(PROMPTS, [Seed(0, i, 0) for i in range(3)]), 3)
    torch.testing.assert_close(torch.stack(samples.latents), state.sampler.latents, atol=1e-4, rtol=1e-4)
    for i, prompt in enumerate(PROMPTS):
        text, mask = pipe.text.encode([prompt])
        torch.testing.assert_close(samples.text[i][samples.mask[i]], text[0][mask[0]])


def test_batches_repeat_no_picture_before_all_were_drawn():
    pipe = Pipeline.from_pretrained("mini")
    samples = samples_of(pipe)
    generator = torch.Generator().manual_seed(0)
    drawn = healing_samples._Batches(pipe, samples, 2, 3).draw(generator)
    assert [len(t) for t in drawn] == [6, 6, 6]
    x0 = drawn[0].view(3, 2, *drawn[0].shape[1:])
    assert torch.equal(x0[0], x0[1])
    assert torch.equal(x0[0], x0[2])
    assert not torch.equal(x0[0, 0], x0[0, 1])
    x0, _, _ = healing_samples._Batches(pipe, samples, 7, 1).draw(generator)
    counts = [sum(torch.equal(x, latents) for x in x0) for latents in samples.latents]
    assert sorted(counts) == [2, 2, 3]


def test_a_quarter_goes_without_text():
    pipe = Pipeline.from_pretrained("mini")
    samples = samples_of(pipe)
    _, text, mask = healing_samples._Batches(pipe, samples, 100, 4).draw(torch.Generator().manual_seed(0))
    with torch.no_grad():
        null, null_mask = pipe.text.encode([""], negative=True)
    empty = mask.sum(1) == null_mask.sum()
    assert 60 < empty.sum() < 140
    assert torch.equal(text[empty][:, :1], null.expand(int(empty.sum()), -1, -1))
    texts = [t[m] for t, m in zip(samples.text, samples.mask)]
    for row, given in zip(text[~empty], mask[~empty]):
        assert any(torch.equal(row[given], t) for t in texts)


def test_same_seed_same_weights_and_nothing_else_changes(tmp_path):
    options = {"indices": KEPT, "count": 3, "sampling_steps": 3}
    folders = [tmp_path / name for name in ("plain", "healed", "again", "other")]
    heals = (None, QUICK, QUICK, dataclasses.replace(QUICK, seed=1))
    for folder, heal in zip(folders, heals):
        prune_folder("mini", folder, heal=heal, **options)
    plain, healed, again, other = map(weights, folders)
    assert same(healed, again)
    assert not same(healed, plain)
    assert not same(healed, other)
    assert {w.dtype for w in folder_weights(folders[1] / "transformer").values()} == {torch.float16}
    names = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in folders]
    assert names[0] == names[1]
    record = json.loads((folders[1] / "sana15.json").read_text())["pruning"]
    assert record["calibration"] == {"prompts": None, "count": 3, "steps": 3}
    assert Healing(**record["healing"]) == QUICK.for_kept(KEPT, 12)


@pytest.mark.parametrize("distill", [10.0, 0.0])
def test_it_learns(tmp_path, distill):
    pipe = Pipeline.from_pretrained("mini")
    prune_folder("mini", tmp_path / "out", indices=KEPT)
    judged = list(calibration(pipe, ["a green heart", "three red squares"], steps=3, seed=5))

    def losses():
        model = load_transformer(tmp_path / "out" / "transformer")
        distance = Distillation(model, Pipeline.from_pretrained("mini").transformer, KEPT)
        total = 0.0
        for batch in judged:
            with torch.no_grad():
                model(batch.latents, batch.text, batch.timestep, batch.mask)
            total += distance.loss().item()
        flow = sum(batch_loss(model, batch).sum().item() for batch in judged)
        return total, flow

    before = losses()
    lr = None if distill else 1e-3
    healing = Healing(20, lr=lr, batch_size=4, distill=distill, data="samples").for_kept(KEPT, 12)
    heal_on_samples(tmp_path / "out", pipe, samples_of(pipe, PROMPTS * 8), healing)
    after = losses()
    if distill:
        assert after[0] < 0.7 * before[0]
    else:
        assert after[1] < before[1]


@pytest.mark.parametrize(("distill", "flow"), [(10.0, 0.0), (0.0, 1.0)])
def test_what_the_loss_is_and_what_is_written(tmp_path, monkeypatch, distill, flow):
    """The schedule's rates on the loss that scenes get, and of the weights their average is written."""
    asked, rates, averages = [], [], []
    loss, rate, swap = healing_samples.training_loss, train.learning_rate, Average.swap
    monkeypatch.setattr(healing_samples, "training_loss", lambda *a, **kw: (asked.append(kw), loss(*a, **kw))[1])
    monkeypatch.setattr(train, "learning_rate", lambda config, step: (rates.append(rate(config, step)), rates[-1])[1])
    monkeypatch.setattr(Average, "swap", lambda self: (averages.append((self.decay, self.values)), swap(self))[1])
    healing = Healing(steps=10, lr=1e-3, batch_size=1, noises=2, distill=distill, data="samples")
    prune_folder("mini", tmp_path / "out", indices=KEPT, count=2, sampling_steps=2, heal=healing)
    shift = Pipeline.from_pretrained("mini").flow_shift
    for given in asked:
        assert (given["distillation"] is not None) == (distill > 0)
        del given["distillation"]
        assert given == {"flow_shift": shift, "stratified": True, "flow_weight": flow, "distill": distill}
    assert rates == pytest.approx([1e-3] * 8 + [1e-3 * 2 / 3, 1e-3 / 3])
    ((decay, values),) = averages
    assert decay == 0.9
    written = weights(tmp_path / "out")
    assert all(torch.equal(written[name], value.half().float()) for name, value in values.items())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published models' parts at toy size, with 4 blocks."""
    folder = make_published(tmp_path_factory.mktemp("published"))
    grown = sana15.grow(load_transformer(folder / "transformer"), 4, keep=2, strategy="interleave")
    save_transformer(grown, folder / "transformer2", dtype=torch.bfloat16)
    (folder / "transformer").rename(folder / "unused")
    (folder / "transformer2").rename(folder / "transformer")
    (folder / "prompts.txt").write_text("a cat\na dog on a chair\n")
    return folder


@pytest.mark.parametrize("by", ["indices", "search"])
def test_a_pipeline_with_gemma(published, tmp_path, by, capsys):
    chosen = {"indices": ["--indices", "0,2"], "search": ["--keep", "2", "--by", "search", "--trial-steps", "1"]}[by]
    calibrated = ["--prompts", str(published / "prompts.txt"), "--steps", "2"]
    assert main(["prune", str(published), str(tmp_path / "out"), *chosen, *calibrated, "--heal", "2"]) == 0
    assert "healed: 2 steps of 4 samples at 4 noise levels, distillation 10, rate 0.0001" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "sana15.json").read_text())["pruning"]["kept"]
    prune_folder(published, tmp_path / "plain", indices=kept)
    healed, plain = (weights(tmp_path / name) for name in ("out", "plain"))
    assert not same(healed, plain)
    assert {w.dtype for w in folder_weights(tmp_path / "out" / "transformer").values()} == {torch.bfloat16}
    Pipeline.from_pretrained(tmp_path / "out")("a cat", steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a file of calibration prompts with --prompts"),
        (["--prompts", "{folder}/prompts.txt", "--heal-on", "scenes"], "only a model with the mini text encoder"),
    ],
)
def test_what_other_pipelines_need(published, tmp_path, options, message, capsys):
    given = [o.format(folder=published) for o in options]
    assert main(["prune", str(published), str(tmp_path / "out"), "--indices", "0,2", "--heal", *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_measuring_and_healing_share_the_samples(tmp_path, monkeypatch):
    """One calibration: its batches go to the strategy, its pictures to healing. With an importance there is one for healing."""
    called, original = [], calibration
    monkeypatch.setattr(
        pruning_files, "calibration", lambda *args, at, **kw: (called.append(at), original(*args, at=at, **kw))[1]
    )
    seen = []
    monkeypatch.setattr(pruning_files, "heal_on_samples", lambda folder, pipe, samples, heal: seen.append(len(samples)))
    given = Importance([float(i) for i in range(12)], [[float(i)] for i in range(12)], [1])
    for name, importance in (("a", None), ("b", given)):
        prune_folder("mini", tmp_path / name, keep=8, importance=importance, count=5, sampling_steps=2, heal=QUICK)
    assert called == [None, [0]]
    assert seen == [5, 5]


def test_gradient_checkpointing_changes_no_gradient():
    """Its second pass through the blocks must not disturb what the distillation has seen in the first."""
    found = []
    for checkpointing in (False, True):
        pipe = Pipeline.from_pretrained("mini")
        (batch,) = calibration(pipe, PROMPTS[:2], steps=1)
        model = sana15.prune(pipe.transformer, by="indices", indices=KEPT).train()
        model.gradient_checkpointing = checkpointing
        distance = Distillation(model, pipe.transformer, KEPT)
        model(batch.latents, batch.text, batch.timestep, batch.mask)
        distance.loss().backward()
        found.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.filterwarnings("ignore:var")
def test_a_source_that_is_not_finite_is_one_line(published, tmp_path, capsys, monkeypatch):
    original = healing_samples._Batches.draw
    monkeypatch.setattr(healing_samples._Batches, "draw", lambda *args: (torch.nan * (x := original(*args))[0], *x[1:]))
    options = ["--indices", "0,2", "--prompts", str(published / "prompts.txt"), "--steps", "1", "--heal", "2"]
    assert main(["prune", str(published), str(tmp_path / "out"), *options]) == 2
    assert "the loss is nan at step 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
