"""A measurement changes nothing in what it measures: modes, gradients, hooks, random states, settings."""

import random
import threading

import numpy as np
import pytest
import tiny_pipeline
import torch
from safetensors.torch import load_file

from sana15 import block_importance, prune
from sana15.judges.learned import LearnedJudge
from sana15.model.measuring import evaluating, unchanged
from sana15.pruning.folder import prune_folder
from sana15.pruning.healing import Healing
from sana15.pruning.samples import Samples, heal_on_samples
from sana15.pruning.trajectory import calibration
from sana15.sampling.pipeline import Pipeline
from sana15.training.config import load_config
from sana15.training.run import train

PROMPTS = ["a red circle", "two stars"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipe(folder):
    """Every second module in training mode, a parameter frozen."""
    found = Pipeline.from_pretrained(folder)
    for part in found.parts:
        for i, module in enumerate(part.modules()):
            module.training = i % 2 == 0
        next(part.parameters()).requires_grad_(False)
    return found


def states():
    torch_state, numpy_state = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002
    settings = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    return torch_state, numpy_state, random.getstate(), settings


def about(pipe):
    modules = [module for part in pipe.parts for module in part.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    gradients = [(p.requires_grad, p.grad) for part in pipe.parts for p in part.parameters()]
    return [m.training for m in modules], hooks, gradients, states()


def batches(pipe):
    return calibration(pipe, PROMPTS, steps=2, at=[0], guidance=1.0)


def heal(pipe, folder, tmp_path):
    prune_folder(folder, tmp_path / "pruned", indices=[1])
    samples = Samples()
    for _ in samples.remember(batches(pipe)):
        pass
    heal_on_samples(tmp_path / "pruned", pipe, samples, Healing(steps=1, batch_size=2, noises=1, lr=1e-3))


def stops_half_way(pipe, folder, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPTS, steps=2, callback=stop)


MEASUREMENTS = {
    "pictures": lambda pipe, *_: pipe(PROMPTS, steps=1),
    "pictures that are interrupted": stops_half_way,
    "calibration": lambda pipe, *_: list(batches(pipe)),
    "calibration that is given up": lambda pipe, *_: next(iter(batches(pipe))),
    "importance": lambda pipe, *_: block_importance(pipe.transformer, batches(pipe), bins=2),
    "search": lambda pipe, *_: prune(
        pipe.transformer, 1, "search", batches=list(batches(pipe)), candidates=2, trial_steps=1
    ),
    "learned": lambda pipe, *_: prune(pipe.transformer, 1, "learned", batches=list(batches(pipe)), learning_steps=1),
    "healing": heal,
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_leaves_the_model_as_it_was(name, pipe, folder, tmp_path):
    before = about(pipe)
    MEASUREMENTS[name](pipe, folder, tmp_path)
    assert about(pipe) == before


def test_a_model_in_training_mode_makes_the_same_pictures(pipe, folder):
    transformer, autoencoder, text = (part.train() for part in pipe.parts)
    for module in (transformer.proj_out, autoencoder.model.decoder, text.layer):  # as dropout in an adapter does
        module.register_forward_hook(lambda module, _, out: out + float(module.training))
    expected = Pipeline.from_pretrained(folder)(PROMPTS, steps=1)
    assert [p[0].tobytes() for p in pipe(PROMPTS, steps=1)] == [p[0].tobytes() for p in expected]


def test_threads_measure_one_model_at_the_same_time(pipe):
    before = [module.training for module in pipe.transformer.modules()]
    modes, begun = [], threading.Barrier(4)

    def measure():
        begun.wait()
        for _ in range(200):
            with evaluating(pipe.transformer):
                modes.append(any(module.training for module in pipe.transformer.modules()))

    threads = [threading.Thread(target=measure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert modes == [False] * 800
    assert [module.training for module in pipe.transformer.modules()] == before


def test_random_states_and_settings_come_back_after_a_failure():
    before = states()

    def measure():
        with unchanged():
            torch.manual_seed(1)
            np.random.seed(1)  # noqa: NPY002
            random.seed(1)
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(torch.get_num_threads() + 1)
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        measure()
    assert states() == before


def test_reading_a_model_draws_nothing(folder):
    before = states()
    Pipeline.from_pretrained(folder)
    LearnedJudge.load()
    assert states() == before


def test_patch_does_not_seed_the_gpus(monkeypatch):
    """Its check of the installed diffusers draws on the CPU, where the state comes back."""
    from diffusers.models.transformers.sana_transformer import SanaTransformerBlock

    from sana_ext.patching import replacement

    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = states()
    replacement._disagreement.__wrapped__(SanaTransformerBlock)
    assert (seeded, states()) == ([], before)


def weights(out):
    return load_file(max(out.glob("checkpoint-*")) / "weights.safetensors")


@pytest.mark.parametrize("text", ["frozen", "trained along"])
def test_samples_change_nothing_in_training(text, folder, tmp_path, monkeypatch):
    """From a folder, with a text encoder that stays as it is or one that learns; at other steps, and resumed behind one."""
    from sana15.training import tasks as train_tasks

    entries = train_tasks.test_set()[:5]
    monkeypatch.setattr(train_tasks, "test_set", lambda: entries)
    sample = train_tasks.TransformerTask.sample

    def noisy(*arguments):  # as a metric of somebody else's might
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        return sample(*arguments)

    monkeypatch.setattr(train_tasks.TransformerTask, "sample", noisy)
    loss = train_tasks.TransformerTask.loss

    def dropout(task, batch, generator):  # as a model with dropout
        return loss(task, batch, generator) + torch.rand(()) * task.module["transformer"].proj_out.bias.sum()

    monkeypatch.setattr(train_tasks.TransformerTask, "loss", dropout)
    given = [f"transformer.text_encoder={folder / 'text_encoder'}"] if text == "frozen" else []
    common = [
        "batch_size=2", "steps=4", "warmup=1", "workers=0", "save_every=2", "sample_steps=1", "precision=bf16", "device=cpu",
        f"transformer.start={folder}", f"transformer.autoencoder={folder / 'vae'}", *given,
    ]  # fmt: skip
    found = []
    for every in (1, 2, 1000):
        train(load_config(None, [*common, f"out={tmp_path / str(every)}", f"sample_every={every}"]))
        found.append(weights(tmp_path / str(every)))
    for steps in (2, 4):  # the first ends with a sample
        train(load_config(None, [*common, f"out={tmp_path / 'resumed'}", f"steps={steps}"]))
    found.append(weights(tmp_path / "resumed"))
    assert all(torch.equal(found[0][k], other[k]) for other in found[1:] for k in found[0])
