"""The training loop: configuration, resuming, and that it learns."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sana15.sampling.pipeline import Pipeline
from sana15.training.config import TrainConfig, load_config
from sana15.training.run import learning_rate, train

TINY = ["batch_size=4", "log_every=1", "save_every=3", "sample_every=100", "sample_steps=1", "warmup=2", "workers=0"]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    out = tmp_path_factory.mktemp("ae")
    return train(load_config(None, [*TINY, "task=autoencoder", f"out={out}", "steps=4"]))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_autoencoder_learns_and_exports(autoencoder):
    from sana15.model.autoencoder import Autoencoder
    from sana15.training.data import SceneBatches

    losses = [m["loss"] for m in metrics(autoencoder.parent) if "loss" in m]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    latents = Autoencoder.load(autoencoder).encode(SceneBatches(5, 16, 1)[0].pictures)
    assert 0.5 < latents.std() < 2.0  # the scaling factor gives about unit variance


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "came8bit", "came", "soap"])
def test_an_interrupted_run_ends_with_the_same_weights(optimizer, tmp_path):
    betas = "betas=[0.9,0.999,0.9999]" if "came" in optimizer else "betas=[0.9,0.99]"
    common = [*TINY, f"optimizer={optimizer}", betas, "task=autoencoder", "batch_size=2", "steps=6", "seed=3"]
    straight = train(load_config(None, [*common, f"out={tmp_path / 'a'}"]))
    train(load_config(None, [*common[:-2], "steps=4", "seed=3", f"out={tmp_path / 'b'}"]))
    # As if killed after step 4 with a half-written checkpoint and a cut-off line behind it.
    (tmp_path / "b" / "checkpoint.partial").mkdir()
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    resumed = train(load_config(None, [*common, f"out={tmp_path / 'b'}"]))
    a, b = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [m["step"] for m in metrics(tmp_path / "b") if "loss" in m]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_transformer_trains_samples_and_exports(autoencoder, tmp_path):
    options = [*TINY, f"out={tmp_path}", "steps=2", f"transformer.autoencoder={autoencoder}", "precision=bf16"]
    options.append("sample_guidance=2.5")
    exported = train(load_config(None, options))
    assert all(torch.isfinite(torch.tensor(m["loss"])) for m in metrics(tmp_path) if "loss" in m)
    assert 0 <= next(m["score"] for m in metrics(tmp_path) if "score" in m) <= 1
    assert (tmp_path / "samples" / "00000002.png").exists()
    pipe = Pipeline.from_pretrained(exported)
    assert pipe("a red circle", steps=1)[0][0].size == (64, 64)
    assert pipe.config.num_layers == 12
    assert pipe.guidance == 2.5


def test_tensorboard_shows_what_metrics_hold(autoencoder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(autoencoder.parent / "tensorboard")).Reload()
    lines = [m for m in metrics(autoencoder.parent) if "loss" in m]
    assert {"loss", "lr", "images_per_s", "grad_norm"} <= set(board.Tags()["scalars"])
    shown = {event.step: event.value for event in board.Scalars("loss")}
    assert shown == pytest.approx({m["step"]: m["loss"] for m in lines})


def test_what_changes_nothing_in_the_result_may_change_on_resuming(autoencoder, tmp_path):
    options = [*TINY, f"out={tmp_path}", f"transformer.autoencoder={autoencoder}", "sample_every=9"]
    train(load_config(None, [*options, "steps=1"]))
    changed = ["steps=2", "sample_guidance=2.5", "log_every=1", "transformer.compile=false"]
    before = (tmp_path / "config.yaml").read_text().replace("compile: false", "compile: true")
    (tmp_path / "config.yaml").write_text(before)
    assert Pipeline.from_pretrained(train(load_config(None, [*options, *changed]))).guidance == 2.5
    with pytest.raises(ValueError, match="run with another transformer"):
        train(load_config(None, [*options, "steps=3", "transformer.flow_shift=2.0"]))


def test_another_configuration_in_the_same_folder_is_refused(autoencoder):
    with pytest.raises(ValueError, match="run with another lr"):
        train(load_config(None, [*TINY, "task=autoencoder", f"out={autoencoder.parent}", "steps=4", "lr=0.5"]))


def test_learning_rate():
    config = TrainConfig(lr=1.0, warmup=4, steps=10, schedule="cosine")
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[0] == 0.25
    assert max(rates) == rates[3]
    assert rates[9] < 0.05
    config = TrainConfig(lr=1.0, warmup=4, steps=20, schedule="decay")
    assert [learning_rate(config, step) for step in (0, 3, 16, 18, 20)] == [0.25, 1.0, 1.0, 0.5, 0.0]
    config = TrainConfig(lr=1.0, warmup=4, steps=20, schedule="decay", decay_part=0.5)
    assert [learning_rate(config, step) for step in (0, 3, 10, 15, 20)] == [0.25, 1.0, 1.0, 0.5, 0.0]


def test_config_files_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 7\ntransformer:\n  flow_shift: 2\n")
    config = load_config(path, ["lr=1e-4", "transformer.caption_drop=0.2", "betas=[0.8, 0.9]"])
    assert (config.steps, config.lr, config.transformer.flow_shift) == (7, 1e-4, 2.0)
    assert (config.transformer.caption_drop, config.betas) == (0.2, [0.8, 0.9])


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["stpes=3"], "unknown configuration key stpes"),
        (["transformer.shift=3"], "unknown configuration key transformer.shift"),
        (["steps=many"], "steps must be int"),
        (["steps=0"], "steps must be at least 1"),
        (["precision=fp8"], "precision must be one of"),
        (["optimizer=sgd"], "optimizer must be one of adamw, adamw8bit, came8bit, came, soap, got 'sgd'"),
        (["optimizer=came8bit"], "betas must be 3 numbers for came8bit, got"),
        (["decay_part=0"], "decay_part must be above 0 and at most 1, got 0"),
        (["decay_part=1.5"], "decay_part must be above 0 and at most 1, got 1.5"),
        (["lr"], "must have the form key=value"),
        (["betas=[1"], "the value is not valid YAML"),
        (["seed=1", "seed.x=2"], "seed is no mapping"),
        (["transformer=3"], "transformer must be a mapping"),
    ],
)
def test_bad_configuration(overrides, match):
    with pytest.raises(ValueError, match=match):
        load_config(None, overrides)


def test_shipped_configurations_are_valid():
    from pathlib import Path

    for path in sorted((Path(__file__).parents[3] / "configs").glob("*.yaml")):
        load_config(path, [])


def test_numbers_in_lists_of_a_configuration(tmp_path):
    """YAML 1.1 reads 1e-3 as text, in lists too; what is no number is named with its place."""
    (tmp_path / "c.yaml").write_text("betas: [9e-1, 99e-2]\ntransformer: {block_lr: [1e-1, 1]}\n", encoding="utf-8-sig")
    config = load_config(tmp_path / "c.yaml", ["sample_guidance_interval=[1e-1, 9e-1]"])
    assert (config.betas, config.transformer.block_lr) == ([0.9, 0.99], [0.1, 1.0])
    assert config.sample_guidance_interval == [0.1, 0.9]
    for text, value in (
        ("[0.9, x]", "'x'"),
        ("[0.9, true]", "True"),
        ("[0.9, [1]]", r"\[1\]"),
        ("[0.9, null]", "None"),
    ):
        with pytest.raises(ValueError, match=rf"^betas\[1\] must be a number, got {value}$"):
            load_config(None, [f"betas={text}"])
