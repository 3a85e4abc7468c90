"""--device: auto, cpu or cuda; every command that computes takes it to the model, and the model's code stays on one device."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana15 import device, judges
from sana15.cli import main
from sana15.device import of_pipeline, resolved
from sana15.pruning.importance import batch_loss
from sana15.pruning.trajectory import calibration
from sana15.sampling.pipeline import Pipeline, PipelineGenerator
from sana15.sampling.settings import Sampling, Seed
from sana15.scaling.run import _claim, search
from sana15.scenes.testset import load
from sana15.training.config import TrainConfig
from sana15.training.run import train

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
    """pretend(gpu): a PyTorch that sees a GPU or none."""
    return lambda gpu: monkeypatch.setattr(device, "gpu_is_there", lambda: gpu)


class OneDevice(TorchDispatchMode):
    """No op but a copy may have tensors of several devices; single numbers may stay on the CPU, as on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if func not in copies and len({t.device.type for t in tensors}) > 1:
            raise AssertionError(f"{func} of {[(t.device.type, list(t.shape)) for t in tensors]}")
        return func(*args, **kwargs or {})


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
    """On the device of the pipeline, which the option chose."""

    def heal(folder, pipe, healing):
        raise Placed(placed[-1])

    placed = []
    monkeypatch.setattr("sana15.pruning.folder.heal_on_scenes", heal)
    monkeypatch.setattr(Pipeline, "to", lambda pipe, device: (placed.append(device), pipe)[1])
    pretend(True)
    for options, expected in (([], "cuda"), (["--device", "cpu"], "cpu")):
        with pytest.raises(Placed, match=f"^{expected}$"):
            main(["prune", "mini", str(tmp_path / "out"), "--indices", "0,1", "--heal", "1", *options])


def test_nothing_stays_behind():
    """The meta device stands for a GPU."""
    pipe = Pipeline.from_pretrained("mini").to("meta")
    with OneDevice():
        with pytest.raises(AssertionError, match="aten"):
            torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2, device="meta"))
        generator = PipelineGenerator(pipe, Sampling(steps=3))
        state = generator.advance(generator.start(PROMPTS, [Seed(0, 0, 0), Seed(0, 1, 0)]), 3)
        state = generator.select(state, [1])
        assert state.sampler.latents.device.type == "meta"
        assert pipe.autoencoder.decode(state.sampler.latents).shape == (1, 3, 64, 64)
        for batch in calibration(pipe, PROMPTS, steps=2):
            assert {t.device.type for t in (batch.latents, batch.text, batch.x0, batch.noise, batch.sigmas)} == {"meta"}
            assert batch_loss(pipe.transformer, batch).device.type == "meta"


def test_the_demos_stock_model_is_where_ours_is(monkeypatch):
    """Its pictures are made: what is missing on meta is only their way to the CPU."""
    from sana15.evaluation import demo

    pipe = Pipeline.from_pretrained("mini").to("meta")
    seen = []

    def pixels(one, items, settings):
        seen.append(
            {t.device.type for m in (one.text, one.transformer, one.autoencoder) for t in m.state_dict().values()}
        )
        raise Placed

    monkeypatch.setattr(demo, "_pixels", pixels)
    with pytest.raises(Placed):
        demo.timing_table(pipe, Sampling(steps=1), load()[:8])
    assert seen == [{"meta"}]


def test_a_named_judge_sits_beside_the_pipeline(monkeypatch):
    class Elsewhere:
        device = torch.device("cuda:0")

    assert of_pipeline(Elsewhere()) == "cuda:0"
    assert of_pipeline(Pipeline.from_pretrained("mini")) == "cpu"
    assert of_pipeline(Pipeline.from_pretrained("mini").to("meta")) == "cpu"  # a pipeline whose parts are offloaded
    assert of_pipeline(object()) == "cpu"
    assert of_pipeline(SimpleNamespace(pipe=Elsewhere())) == "cuda:0"  # a generator
    seen = []
    for judge in ("clip.ClipJudge", "vlm.VisionLanguageJudge"):
        monkeypatch.setattr(f"sana15.judges.{judge}.load", lambda *given: seen.append(given))
    judges.make("clip:a", "cuda:0")
    judges.make("vlm:b", "cuda:0")
    assert seen == [("a", "cuda:0"), ("b", "cuda:0")]


def test_search_loads_a_named_judge_there(tmp_path, monkeypatch):
    def load(*given):
        raise Placed(*given)

    monkeypatch.setattr("sana15.judges.clip.ClipJudge.load", load)
    pipe = SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr("sana15.scaling.run._generator", lambda *_: None)
    with pytest.raises(Placed, match=r"'a', 'cuda:1'"):
        search(pipe, ["a red circle"], out=tmp_path / "out", judge="clip:a")


def test_eval_loads_its_detectors_there(tmp_path, monkeypatch, pretend, capsys):
    def load(*given):
        raise Placed(*given)

    pretend(True)
    monkeypatch.setattr("sana15.evaluation.detector.PhotoDetector.load", load)
    monkeypatch.setattr("sana15.evaluation.export.read_folder", lambda root: [])
    arguments = ["eval", str(tmp_path), "--device", "cuda"]
    with pytest.raises(Placed, match=r"'a', 'cuda'"):
        main([*arguments, "--detector", "a"])
    monkeypatch.setattr("sana15.evaluation.detector.ClipColors.load", load)
    with pytest.raises(Placed, match=r"'b', 'cuda'"):
        main([*arguments, "--detector", "a", "--clip", "b"])
    assert main(arguments) == 2
    assert "--device belongs to --detector" in capsys.readouterr().err


def test_choosing_without_measuring_needs_no_gpu(tmp_path, pretend):
    pretend(False)
    assert main(["prune", "mini", str(tmp_path / "out"), "--indices", "0,1", "--device", "cuda"]) == 0


def test_a_gpu_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Pipeline, "from_pretrained", full)
    assert main(["sample", "a red circle", "--out", str(tmp_path / "out")]) == 3
    assert (
        "memory is too small for this; try a smaller --batch-size (--heal-batch), or --device cpu"
        in capsys.readouterr().err
    )

    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Pipeline, "from_pretrained", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["sample", "a red circle", "--out", str(tmp_path / "out")])


def test_a_search_goes_on_where_it_was_begun(tmp_path):
    """Pictures of two devices differ by rounding; a folder of before this was recorded is taken as it is."""
    settings = {"prompts": [{"prompt": "a"}]}
    assert _claim(tmp_path / "a", settings, "cuda") == torch.get_num_threads()
    assert _claim(tmp_path / "a", settings, "cuda") == torch.get_num_threads()
    with pytest.raises(ValueError, match="was begun on the device cuda, this is cpu"):
        _claim(tmp_path / "a", settings, "cpu")
    path = tmp_path / "a" / "run.json"
    recorded = json.loads(path.read_text())
    del recorded["made_with"]["device"]
    path.write_text(json.dumps(recorded))
    _claim(tmp_path / "a", settings, "cpu")
