"""sana15.SanaTransformer against diffusers' SanaTransformer2DModel on the same random weights."""

import dataclasses
import json

import pytest
import torch
from diffusers import SanaTransformer2DModel
from helpers import EPS32, rand
from model_cases import SMALL, batch, pair

from sana15 import SanaConfig, SanaTransformer
from sana15.model.config import SIZES

SMALL_FOLDER = SanaConfig(**SMALL).to_dict()
VARIANTS = {
    "sana15": {},
    "sana10": {"qk_norm": None},
    "patch2": {"patch_size": 2},
    "4K": {"interpolation_scale": 2.0},
    "sprint": {"guidance_embeds": True},
}


def run(model, values):
    """Output and every gradient, by name."""
    latents, text = (values[k].detach().clone().requires_grad_() for k in ("latents", "text"))
    guidance = values.get("guidance")
    if isinstance(model, SanaTransformer):
        out = model(latents, text, values["timestep"], values["mask"], guidance)
    else:
        out = model(
            latents, text, values["timestep"], guidance, encoder_attention_mask=values["mask"], return_dict=False
        )[0]
    names, parameters = zip(*model.named_parameters())
    grads = torch.autograd.grad(out, [latents, text, *parameters], rand(9, *out.shape).to(out))
    return {"out": out.detach()} | dict(zip(["dlatents", "dtext", *names], grads))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", [(8, 8), (6, 10)], ids=str)
def test_fp32_equals_diffusers(variant, side):
    theirs, ours = pair(**VARIANTS[variant])
    values = batch(side, guidance=variant == "sprint")
    expected, got = run(theirs, values), run(ours, values)
    assert expected.keys() == got.keys()
    # The key bias of an attention without qk-norm has no effect: its gradient is rounding noise, measured against the rest.
    noise = 1e-2 * max(e.abs().max().item() for e in expected.values())
    for name, e in expected.items():
        error = (got[name] - e).abs().max().item() / max(e.abs().max().item(), noise)
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "autocast"])
def test_low_precision_is_no_worse_than_diffusers(mode):
    """The project's error rule; the gradients of this small model are small tensors, so every one pools over 8 seeds."""
    dtype = torch.float32 if mode == "autocast" else getattr(torch, mode)
    theirs, ours = pair(dtype)
    exact, _ = pair(torch.float64)
    exact.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()})
    pooled = {}
    for seed in range(8):
        values = batch(dtype=dtype, seed=seed)
        truth = run(exact, {k: v.double() for k, v in values.items()})
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            peer, got = run(theirs, values), run(ours, values)
        for name, t in truth.items():
            pooled.setdefault(name, []).append((got[name].double() - t, peer[name].double() - t, t))
    for name, runs in pooled.items():
        ours_error, peer_error, truth = (torch.stack([run[i] for run in runs]) for i in range(3))
        for kind, size in (("max", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
            error, allowed = size(ours_error), 2 * size(peer_error) + 4 * EPS32 * truth.abs().max()
            assert error <= allowed, f"{name}: {kind} error {error:.3e} > {allowed:.3e}"


@pytest.mark.parametrize("size", [s for s in SIZES if s != "mini"])
def test_published_parameter_counts(size):
    counts = {
        "600M": 591_876_896,
        "1600M": 1_604_641_952,
        "2400M": 2_383_937_952,
        "3200M": 3_163_233_952,
        "4800M": 4_721_825_952,
    }
    with torch.device("meta"):
        model = SanaTransformer(SanaConfig.named(size))
    assert sum(p.numel() for p in model.parameters()) == counts[size]


def test_counts_without_qk_norm():
    for size, count in (("600M", 591_747_872), ("1600M", 1_604_462_752)):
        with torch.device("meta"):
            model = SanaTransformer(SanaConfig.named(size, qk_norm=None))
        assert sum(p.numel() for p in model.parameters()) == count


def test_gradient_checkpointing_changes_nothing():
    _, ours = pair()
    expected = run(ours, batch())
    ours.gradient_checkpointing = True
    for name, value in run(ours, batch()).items():
        assert torch.equal(value, expected[name]), name


def test_compiles_as_one_graph():
    _, ours = pair()
    values = list(batch().values())
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*values), ours(*values))


def test_config_round_trip(tmp_path):
    config = SanaConfig(**SMALL)
    (tmp_path / "config.json").write_text(json.dumps(SanaTransformer2DModel.from_config(config.to_dict()).config))
    assert SanaConfig.load(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("missing", [f.name for f in dataclasses.fields(SanaConfig)])
def test_a_key_that_is_left_out_has_diffusers_value(missing):
    """Folders of older versions lack keys: SANA-1.0's qk_norm, guidance and timestep_scale."""
    left = {k: v for k, v in SMALL_FOLDER.items() if k != missing}
    if missing in ("num_attention_heads", "num_cross_attention_heads", "cross_attention_head_dim"):
        with pytest.raises(ValueError, match="must equal the width"):  # diffusers' heads, of width 2240
            SanaConfig.from_dict(left)
        return
    found = SanaConfig.from_dict(left).to_dict()
    with torch.device("meta"):
        theirs = dict(SanaTransformer2DModel.from_config(left).config)
    theirs["out_channels"] = theirs["out_channels"] or theirs["in_channels"]
    differing = {k for k, v in found.items() if not k.startswith("_") and theirs[k] != v}
    assert differing <= {"cross_attention_dim"} & {missing}  # diffusers' number is that of width 2240


def test_what_an_ema_folder_and_a_training_one_say():
    """EMAModel.save_pretrained adds its own keys, out_channels may be null, and dropout acts in training alone."""
    added = {"decay": 0.9999, "min_decay": 0.0, "optimization_step": 7, "update_after_step": 0, "use_ema_warmup": False,
             "inv_gamma": 1.0, "power": 2 / 3}  # fmt: skip
    found = SanaConfig.from_dict(SMALL_FOLDER | added | {"out_channels": None, "dropout": 0.1})
    assert found.out_channels == found.in_channels
    assert found.to_dict()["dropout"] == 0.1
    with pytest.raises(ValueError, match="unknown keys in the model's config: decya"):
        SanaConfig.from_dict(SMALL_FOLDER | {"decya": 1})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_layers": 0}, "num_layers must be a positive integer"),
        ({"cross_attention_head_dim": 7}, "must equal the width"),
        ({"qk_norm": "layer"}, "qk_norm must be"),
        ({"dropout": 1.0}, "dropout must be below 1"),
        ({"norm_elementwise_affine": True}, "affine norms"),
        ({"in_channels": -1}, "in_channels must be a positive integer"),
        ({"mlp_ratio": None}, "mlp_ratio must be a finite number"),
        ({"norm_eps": "x"}, "norm_eps must be a finite number"),
        ({"timestep_scale": float("nan")}, "timestep_scale must be a finite number"),
        ({"interpolation_scale": "1"}, "interpolation_scale must be a finite number above 0"),
    ],
)
def test_bad_config(changes, match):
    with pytest.raises(ValueError, match=match):
        SanaConfig(**SMALL | changes)


def test_bad_config_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        SanaConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a SANA model config"):
        SanaConfig.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"num_blocks": 3}))
    with pytest.raises(ValueError, match="num_blocks"):
        SanaConfig.load(tmp_path)
    with pytest.raises(ValueError, match="choose one of"):
        SanaConfig.named("1.6B")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"latents": torch.zeros(2, 3, 8, 8)}, "latents must be"),
        ({"latents": torch.zeros(2, 4, 0, 8)}, "positive multiples"),
        ({"text": torch.zeros(1, 7, 20)}, "text must be"),
        ({"timestep": torch.zeros(())}, "timestep must have shape"),
        ({"mask": torch.ones(2, 3)}, "text_mask must be"),
        ({"guidance": torch.ones(2)}, "guidance must be None"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input(change, match):
    _, ours = pair()
    with pytest.raises(ValueError, match=match):
        ours(*(batch() | change).values())


@torch.no_grad()
def test_a_projected_text_takes_the_place_of_text_and_mask():
    _, model = pair()
    latents, t = rand(1, 3, 4, 8, 8).float(), torch.tensor([4.0, 32.0, 500.0])
    text, mask = rand(2, 3, 5, 20).float(), torch.ones(3, 5)
    mask[0, 2:] = 0
    projected = model.project(text, mask)
    assert torch.equal(model(latents, projected, t), model(latents, text, t, mask))
    last = model(latents[1:], projected.last(2), t[1:])
    torch.testing.assert_close(last, model(latents[1:], text[1:], t[1:], mask[1:]))
    assert torch.equal(model(latents, model.project(text), t), model(latents, text, t))
    for wrong in ((latents[:2], projected, t[:2]), (latents, projected, t, mask)):
        with pytest.raises(ValueError, match="a projected text must be this model's, of"):
            model(*wrong)
    with pytest.raises(ValueError, match="text_mask must be"):
        model.project(text, mask[:2])


def test_tensors_without_memory():
    """Meta tensors, as accelerate's init_empty_weights leaves them: shapes come out, forward and backward."""
    with torch.device("meta"):
        model = SanaTransformer(SanaConfig.named("mini", num_layers=2))
        latents, text, timestep = torch.randn(2, 16, 8, 8), torch.randn(2, 5, 128), torch.ones(2)
    out = model(latents, text, timestep, torch.ones(2, 5, device="meta"))
    out.sum().backward()
    assert out.shape == (2, 16, 8, 8)
    assert all(p.grad.is_meta for p in model.parameters())
