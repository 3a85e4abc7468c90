"""--device: auto, cpu or cuda; every command that computes takes it to the model, and the model's code stays on one device."""

from types import SimpleNamespace

import pytest
import torch

from sana15 import device, judges
from sana15.cli import main
from sana15.device import of_pipeline, resolved
from sana15.generator import PipelineGenerator
from sana15.importance import batch_loss
from sana15.pipeline import Pipeline
from sana15.sampling import Sampling, Seed
from sana15.train import train
from sana15.train_config import TrainConfig
from sana15.trajectory import calibration

PROMPTS = ["a red circle", "a blue square and a red circle"]
COMMANDS = {
    "sample": ["sample", "a red circle", "--out", "{tmp}/out"],
    "search": ["search", "--prompts", "test", "--out", "{tmp}/out"],
    "demo": ["demo", "--out", "{tmp}/out"],
    "importance": ["importance", "mini", "--out", "{tmp}/out"],
    "prune": ["prune", "mini", "{tmp}/out", "--keep", "6"],
}


class Placed(Exception):
    pass


@pytest.fixture
def pretend(monkeypatch):
    """pretend(gpu): a PyTorch that sees a GPU or none, for sana15.device alone."""

    def pretend(gpu):
        cuda = SimpleNamespace(is_available=lambda: gpu)
        monkeypatch.setattr(device, "torch", SimpleNamespace(cuda=cuda, backends=torch.backends, device=torch.device))

    return pretend


@pytest.mark.parametrize(
    ("name", "there", "expected"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_resolved(name, there, expected, pretend):
    pretend(there)
    assert resolved(name) == expected


def test_refused(pretend):
    pretend(False)
    with pytest.raises(ValueError, match=r"device is cuda, and this PyTorch (sees no GPU|is built without CUDA)"):
        resolved("cuda")
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, got 'gpu'"):
        resolved("gpu")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("options", "expected"), [([], "cuda"), (["--device", "cuda"], "cuda"), (["--device", "cpu"], "cpu")]
)
def test_the_command_places_the_model(command, options, expected, tmp_path, monkeypatch, pretend):
    def to(pipe, device):
        raise Placed(device)

    pretend(True)
    monkeypatch.setattr(Pipeline, "to", to)
    with pytest.raises(Placed, match=f"^{expected}$"):
        main([a.format(tmp=tmp_path) for a in COMMANDS[command]] + options)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_gpu_is_one_line_and_nothing_is_written(command, tmp_path, pretend, capsys):
    pretend(False)
    assert main([a.format(tmp=tmp_path) for a in COMMANDS[command]] + ["--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sana15 {command}: device is cuda, and this PyTorch ")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_training_without_its_gpu_leaves_no_run(tmp_path, pretend):
    pretend(False)
    with pytest.raises(ValueError, match="device is cuda"):
        train(TrainConfig(out=str(tmp_path / "run"), device="cuda"))
    assert not (tmp_path / "run").exists()


def test_healing_trains_where_it_measured(tmp_path, monkeypatch, pretend):
    """Not where TrainConfig's own default would put it."""

    def train(config):
        raise Placed(config.device)

    monkeypatch.setattr("sana15.train.train", train)
    pretend(True)
    for options, expected in (([], "cuda"), (["--device", "cpu"], "cpu")):
        with pytest.raises(Placed, match=f"^{expected}$"):
            main(["prune", "mini", str(tmp_path / "out"), "--indices", "0,1", "--heal", "1", *options])


def test_nothing_of_the_model_stays_behind():
    """The meta device stands for a GPU: an op between it and the CPU is an error on either."""
    pipe = Pipeline.from_pretrained("mini").to("meta")
    generator = PipelineGenerator(pipe, Sampling(steps=3))
    state = generator.advance(generator.start(PROMPTS, [Seed(0, 0, 0), Seed(0, 1, 0)]), 3)
    state = generator.keep(state, [1])
    assert state.sampler.latents.device.type == "meta"
    assert pipe.autoencoder.decode(state.sampler.latents).shape == (1, 3, 64, 64)
    for batch in calibration(pipe, PROMPTS, steps=2):
        assert {t.device.type for t in (batch.latents, batch.text, batch.x0, batch.noise, batch.sigmas)} == {"meta"}
        assert batch_loss(pipe.transformer, batch).device.type == "meta"


def test_a_named_judge_sits_beside_the_pipeline(monkeypatch):
    class Elsewhere:
        device = torch.device("cuda:0")

    assert of_pipeline(Elsewhere()) == "cuda:0"
    assert of_pipeline(Pipeline.from_pretrained("mini")) == "cpu"
    assert of_pipeline(Pipeline.from_pretrained("mini").to("meta")) == "cpu"  # a pipeline whose parts are offloaded
    assert of_pipeline(object()) == "cpu"
    seen = []
    for judge in ("clip.ClipJudge", "vlm.VisionLanguageJudge"):
        monkeypatch.setattr(f"sana15.judges.{judge}.load", lambda *given: seen.append(given))
    judges.make("clip:a", "cuda:0")
    judges.make("vlm:b", "cuda:0")
    assert seen == [("a", "cuda:0"), ("b", "cuda:0")]
