"""A folder's scheduler settings, every one of them, against diffusers' schedulers with and without it."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline, SCMScheduler
from helpers import rand
from tiny_pipeline import make, make_published

from sana15.cli import main
from sana15.sampling import flow
from sana15.sampling.pipeline import Pipeline
from sana15.sampling.schedulers import CLASSES, folder_sampler
from sana15.sampling.settings import noise
from sana15.storage.files import DataError

DPM, EULER = DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
PLAIN = {DPM: {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}, EULER: {"shift": 2.0}}
#: Other values than the default, for every setting of a class but its shift; a new setting of diffusers must be put in here.
OTHER = {
    DPM: {
        "num_train_timesteps": [500], "beta_start": [0.01], "beta_end": [0.5], "trained_betas": [[0.1] * 1000],
        "beta_schedule": ["scaled_linear", "squaredcos_cap_v2"], "solver_order": [1, 3], "prediction_type": ["epsilon", "sample"],
        "thresholding": [True], "dynamic_thresholding_ratio": [0.5], "sample_max_value": [0.1],
        "algorithm_type": ["deis", "sde-dpmsolver++", "dpmsolver"], "solver_type": ["heun", "bh1", "bh2", "logrho"],
        "lower_order_final": [False], "euler_at_final": [True], "use_karras_sigmas": [True],
        "use_exponential_sigmas": [True], "use_beta_sigmas": [True], "use_lu_lambdas": [True], "use_flow_sigmas": [False],
        "final_sigmas_type": ["sigma_min"], "lambda_min_clipped": [-5.1], "variance_type": ["learned", "learned_range"],
        "timestep_spacing": ["leading", "trailing"], "steps_offset": [1], "rescale_betas_zero_snr": [True],
        "use_dynamic_shifting": [True], "time_shift_type": ["linear"],
    },
    EULER: {
        "num_train_timesteps": [500], "use_dynamic_shifting": [True], "base_shift": [0.1], "max_shift": [3.0],
        "base_image_seq_len": [16], "max_image_seq_len": [64], "invert_sigmas": [True], "shift_terminal": [0.1, 0.0],
        "use_karras_sigmas": [True], "use_exponential_sigmas": [True], "use_beta_sigmas": [True],
        "time_shift_type": ["linear"], "stochastic_sampling": [True],
    },
}  # fmt: skip
CASES = [(cls, key, value) for cls, keys in OTHER.items() for key, values in keys.items() for value in values]


def sampled(scheduler, steps):
    """The latents after every step of a smooth velocity field; None where diffusers itself refuses the setting."""
    torch.manual_seed(0)
    x = rand(0, 2, 4, 3, 3).float()
    out = []
    try:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            velocity = torch.tanh(0.7 * x) - 0.3 * x + torch.sin(t / 300)
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
            out.append(x)
    except (ValueError, NotImplementedError, IndexError):
        return None
    return torch.stack(out)


def folder_with(path, config, index=None):
    (path / "scheduler").mkdir(parents=True)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    if index is not None:
        (path / "model_index.json").write_text(json.dumps({"scheduler": index}))
    return path


@pytest.mark.parametrize("cls", OTHER)
def test_every_setting_of_diffusers_is_known(cls):
    there = set(inspect.signature(cls.__init__).parameters) - {"self"}
    ours = CLASSES[cls.__name__]
    assert there == {ours.shift, *ours.fixed, *ours.idle}
    assert there == {ours.shift, *OTHER[cls]}
    defaults = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}
    assert all(defaults[name] == value for name, value in ours.defaults.items())
    assert all(name in ours.defaults or not ours.refused(name, defaults[name]) for name in ours.fixed)
    assert defaults[ours.shift] == 1.0


@pytest.mark.parametrize(
    ("cls", "key", "value"), CASES, ids=[f"{c.__name__[:4]}-{k}-{str(v)[:9]}" for c, k, v in CASES]
)
def test_a_setting_is_refused_exactly_where_it_changes_pictures(tmp_path, cls, key, value):
    others = {"final_sigmas_type": "sigma_min"} if value == "dpmsolver" else {}
    settings = PLAIN[cls] | {key: value} | others
    same = True
    for steps in (1, 2, 10, 20):
        plain = sampled(cls(**PLAIN[cls]), steps)
        try:
            other = sampled(cls(**settings), steps)
        except (ValueError, NotImplementedError):
            other = None
        same = same and other is not None and other.shape == plain.shape and torch.equal(other, plain)
    folder = folder_with(tmp_path, {"_class_name": cls.__name__} | PLAIN[cls] | {key: value})
    if same:
        assert folder_sampler(folder) == (CLASSES[cls.__name__].sampler, 2.0)
        return
    with pytest.raises(DataError) as error:
        folder_sampler(folder)
    assert f"scheduler_config.json: {cls.__name__} with {key} " in str(error.value)


@pytest.mark.parametrize("shift", [None, 0.5, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("cls", PLAIN)
@pytest.mark.parametrize("how", ["saved", "short"])
def test_the_folder_s_sampler_is_diffusers(tmp_path, cls, shift, how):
    """As diffusers saves it, with every setting, and with the least that one may write; without a shift it is 1, not 3."""
    key = CLASSES[cls.__name__].shift
    settings = {k: v for k, v in PLAIN[cls].items() if k != key} | ({} if shift is None else {key: shift})
    scheduler = cls(**settings)
    if how == "saved":
        scheduler.save_pretrained(tmp_path / "scheduler")
    else:
        folder_with(tmp_path, {"_class_name": cls.__name__} | settings)
    own = folder_sampler(tmp_path)
    for steps in (1, 2, 20):
        scheduler.set_timesteps(steps)
        plan = flow.schedule(steps, sampler=own.sampler, flow_shift=own.flow_shift)
        torch.testing.assert_close(torch.tensor(plan.sigmas).float(), scheduler.sigmas.float(), rtol=1e-6, atol=1e-6)


def test_the_index_names_the_class_as_for_diffusers(tmp_path):
    """Switched with from_config and saved: settings of the old class stay in the file, and mean nothing to the new one."""
    EULER.from_config(DPM(**PLAIN[DPM] | {"solver_order": 3}).config).save_pretrained(tmp_path / "a" / "scheduler")
    assert json.loads((tmp_path / "a/scheduler/scheduler_config.json").read_text())["solver_order"] == 3
    assert folder_sampler(tmp_path / "a") == ("flow_euler", 1.0)
    folder = folder_with(tmp_path / "b", {"_class_name": "DPMSolverMultistepScheduler"} | PLAIN[DPM],
                         ["diffusers", "FlowMatchEulerDiscreteScheduler"])  # fmt: skip
    assert folder_sampler(folder) == ("flow_euler", EULER.from_pretrained(folder / "scheduler").config.shift)


@pytest.mark.parametrize(
    ("config", "index", "message"),
    [
        (dict(SCMScheduler().config) | {"_class_name": "SCMScheduler"}, None, "sana15 has no SCMScheduler; it samples as"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}, None, "no FlowMatchHeunDiscreteScheduler"),
        ({"shift": 3.0}, ["diffusers", "UniPCMultistepScheduler"], "sana15 has no UniPCMultistepScheduler"),
        ({"shift": 3.0}, None, "names no class (_class_name) for its shift"),
        ({"_class_name": ["Euler"], "shift": 3.0}, None, "sana15 has no ['Euler']"),
        ({"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0}, None, "use_flow_sigmas false is not supported, only true"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "3"}, None, "shift must be a finite number above 0, got 3"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, None, "shift must be a finite number above 0, got 0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": None}, None, "above 0, got null"),
        ({"_class_name": "DPMSolverMultistepScheduler", **PLAIN[DPM], "flow_shift": math.inf}, None, "above 0, got inf"),
        ({"_class_name": "DPMSolverMultistepScheduler", **PLAIN[DPM], "solver_order": True}, None, "solver_order true is not"),
    ],
)  # fmt: skip
def test_what_sana15_does_not_have_is_refused_in_one_line(tmp_path, capsys, config, index, message):
    folder = make(tmp_path / "model")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    if index is not None:
        (folder / "model_index.json").write_text(json.dumps({"scheduler": index}))
    assert main(["sample", "a red circle", "--model", str(folder), "--out", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_setting_that_is_newer_than_this_is_not_passed_over(tmp_path, monkeypatch):
    class Newer(EULER):
        def __init__(self, shift=1.0, new_way=0.5, **others):
            pass

    monkeypatch.setattr("diffusers.FlowMatchEulerDiscreteScheduler", Newer)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "nobody_s": 1}
    assert folder_sampler(folder_with(tmp_path / "a", config | {"new_way": 0.5})).flow_shift == 3.0
    with pytest.raises(DataError, match=r"FlowMatchEulerDiscreteScheduler with new_way 0\.7 is not supported"):
        folder_sampler(folder_with(tmp_path / "b", config | {"new_way": 0.7}))


def test_a_folder_without_scheduler(tmp_path):
    assert folder_sampler(tmp_path) == ("flow_dpm", 3.0)
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}))
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json is missing: model_index.json names DPM"):
        folder_sampler(tmp_path)


@pytest.mark.parametrize("scheduler", [EULER(shift=6.0), EULER(), DPM(**PLAIN[DPM] | {"lower_order_final": False})])
def test_pictures_are_those_of_diffusers_pipeline(tmp_path, scheduler):
    """With the folder's own sampler, nothing said."""
    make_published(tmp_path)
    scheduler.save_pretrained(tmp_path / "scheduler")
    ours = Pipeline.from_pretrained(tmp_path, dtype=torch.float32)
    stock = SanaPipeline(
        tokenizer=ours.text.tokenizer, text_encoder=ours.text.model, vae=ours.autoencoder.model, transformer=_stock(tmp_path),
        scheduler=scheduler,
    )  # fmt: skip
    stock.set_progress_bar_config(disable=True)
    latents = noise(3, 0, 0, ours.latent_shape(64, 64))[None]
    expected = stock("a cat", latents=latents, num_inference_steps=6, height=64, width=64, use_resolution_binning=False)
    got = ours("a cat", seed=3, steps=6)[0][0]
    difference = np.abs(np.asarray(got, int) - np.asarray(expected.images[0], int))
    assert difference.max() <= 1
    other = ours("a cat", seed=3, steps=6, sampler="flow_dpm" if ours.sampler == "flow_euler" else "flow_euler")[0][0]
    assert np.abs(np.asarray(got, int) - np.asarray(other, int)).max() > 1  # so the comparison can tell


def _stock(folder):
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel.from_pretrained(folder / "transformer").eval()


def test_the_sampler_that_was_used_is_recorded(tmp_path):
    folder = make(tmp_path / "model")
    (folder / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2}'
    )
    command = ["sample", "a red circle", "--model", str(folder), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert main(command) == 0
    from sana15.storage.png import read_png

    values = read_png(tmp_path / "out" / "00000-000.png")[1]
    assert (values["sampler"], values["flow_shift"]) == ("flow_euler", 2.0)
    assert main([*command, "--sampler", "flow_euler"]) == 0  # the same run
    assert main([*command, "--sampler", "flow_dpm"]) == 2  # another one
