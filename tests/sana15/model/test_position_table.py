"""What the authors' position table says about a model: by its content, against the tables that diffusers computes."""

import itertools

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers_models import inputs
from release_files import CHANNELS, HEADS, TEXT, C, release

from sana15.cli import main
from sana15.model.checkpoint import load_transformer
from sana15.model.config import SanaConfig
from sana15.model.position_table import interpolation_of, position_table


def table_of(side, scale, width=C, base=None):
    base = base or side
    return get_2d_sincos_pos_embed(width, side, base_size=base, interpolation_scale=scale)[None].float()


def converted(tmp_path, table, *changes):
    torch.save({"state_dict": release() | {"pos_embed": table}}, tmp_path / "a.pth")
    return main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "t"), HEADS, *changes])


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("scale", [None, 1.0, 2.0, 0.5])
def test_convert_follows_the_content(tmp_path, side, scale):
    """Input size 32 with an embedding, 64 without, another interpolation: the output is diffusers' with these settings."""
    table = torch.zeros(1, side * side, C) if scale is None else table_of(side, scale)
    assert converted(tmp_path, table) == 0
    model = load_transformer(tmp_path / "t")
    assert (model.config.sample_size, model.config.interpolation_scale) == (side, scale)
    settings = {"sample_size": side, "interpolation_scale": scale, "qk_norm": "rms_norm_across_heads", "num_layers": 2}
    theirs = SanaTransformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=3, num_cross_attention_heads=2,
        cross_attention_head_dim=48, cross_attention_dim=C, caption_channels=TEXT, **settings,
    ).eval()  # fmt: skip
    theirs.load_state_dict(model.state_dict())
    given = inputs(theirs)
    with torch.no_grad():
        expected = theirs(**given).sample
        ours = model(given["hidden_states"], given["encoder_hidden_states"], given["timestep"].float(),
                     given["encoder_attention_mask"])  # fmt: skip
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_every_setting_is_told_from_its_table():
    scales = (0.1, 0.5, 0.7, 1.0, 4 / 3, 1.37, 2.0, 3.0, 16.0)
    for width, side, scale in itertools.product((32, 96, 1152), (2, 5, 16, 32), scales):
        assert interpolation_of(table_of(side, scale, width), side, side) == scale
    for dtype, scale in itertools.product((torch.bfloat16, torch.float16), (0.5, 1.0, 4 / 3, 2.0)):
        assert interpolation_of(table_of(32, scale).to(dtype), 32, 32) == scale
        assert interpolation_of(table_of(32, scale).to(dtype).float(), 32, 32) == scale  # stored wide again
    assert interpolation_of(table_of(16, 2.0, base=32), 16, 16) == 1.0  # positions 0, 1, 2, ... whatever the base was
    assert interpolation_of(table_of(16, 1.0), 16, 32) == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 1.0, 2.0])
def test_the_table_that_is_written_is_diffusers(scale, dtype):
    config = SanaConfig.named("mini", sample_size=16, interpolation_scale=scale)
    expected = torch.zeros(1, 256, 128) if scale is None else table_of(16, scale, 128)
    assert torch.equal(position_table(config, dtype), expected.to(dtype))


def random(side):
    return torch.randn(1, side * side, C, generator=torch.Generator().manual_seed(0))


STRANGE = {
    "noise": lambda: random(8),
    "learned": lambda: table_of(8, 1.0) + 0.01 * random(8),
    "one number off": lambda: table_of(8, 1.0).index_fill(1, torch.tensor([37]), 0.5),
    "rows before columns": lambda: table_of(8, 1.0).unflatten(1, (8, 8)).transpose(1, 2).flatten(1, 2),
    "hardly any spacing": lambda: table_of(8, 1e300),
    "constant": lambda: torch.ones(1, 64, C),
    "not a number": lambda: torch.full((1, 64, C), float("nan")),
    "one position": lambda: table_of(1, 1.0),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_table_that_no_setting_explains_is_refused(tmp_path, kind, capsys):
    table = STRANGE[kind]()
    assert converted(tmp_path, table) == 3
    error = capsys.readouterr().err
    assert "a.pth: pos_embed: " in error
    assert "say interpolation_scale=NUMBER, or =null for none" in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    assert converted(tmp_path, table, "interpolation_scale=null") == 0
    assert SanaConfig.load(tmp_path / "t").interpolation_scale is None


@pytest.mark.parametrize("shape", [(1, 60, C), (1, 64, C + 4), (2, 64, C), (1, 0, C)])
def test_a_table_of_another_shape_is_refused(tmp_path, shape, capsys):
    assert converted(tmp_path, torch.zeros(shape)) == 3
    assert f"pos_embed is {list(shape)}, expected [1, side * side, 96]" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["0", "-1", ".nan", ".inf"])
def test_a_scale_that_is_none_is_refused(tmp_path, scale, capsys):
    assert converted(tmp_path, torch.zeros(1, 64, C), f"interpolation_scale={scale}") == 2
    assert "SanaConfig.interpolation_scale must be a finite number above 0, or None, got" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_changed_size_keeps_the_positions(tmp_path):
    """sample_size=64 on a table of 32: the same spacing of the same latents, so the scale follows."""
    assert converted(tmp_path, table_of(32, 1.0), "sample_size=64") == 0
    config = SanaConfig.load(tmp_path / "t")
    assert (config.sample_size, config.interpolation_scale) == (64, 2.0)
