"""Back to the authors' names: no order of names or files matters, other programs read the file, and nothing is lost."""

import dataclasses
import json
import random
import shlex

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers_models import inputs
from safetensors.torch import load_file, save_file

from sana15 import SanaConfig
from sana15.cli import main
from sana15.model.checkpoint import load_transformer
from sana15.model.release import convert, infer_config, parameter_shapes, read_release, to_release
from sana15.storage.weights import INDEX, WEIGHTS, Weight, write_folder

SIZES = {
    "num_layers": 2, "num_attention_heads": 3, "num_cross_attention_heads": 3, "cross_attention_head_dim": 32,
    "in_channels": 4, "out_channels": 4, "caption_channels": 24, "sample_size": 8,
}  # fmt: skip
HEADS = {"num_cross_attention_heads": 3}


def tensors(config, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in parameter_shapes(config).items()}


def lazily(state):
    return {name: Weight.of(t) for name, t in state.items()}


def shuffled(mapping, seed):
    names = list(mapping)
    random.Random(seed).shuffle(names)
    return {name: mapping[name] for name in names}


def folder_of(path, state, config, shards, seed):
    """A transformer folder by hand: which file has which tensor, and the order of its index, are up to the seed."""
    path.mkdir()
    path.joinpath("config.json").write_text(json.dumps(config.to_dict()))
    names = list(shuffled(state, seed))
    files = [WEIGHTS] if shards == 1 else [f"part-{i}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({name: state[name].contiguous() for name in names[i::shards]}, path / file)
    if shards > 1:
        places = {name: files[i % shards] for i, name in enumerate(names)}
        path.joinpath(INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shuffled(places, seed + 1)}))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": None, "attention_bias": True}, {"guidance_embeds": True}])
def test_every_order_gives_the_same_bytes_and_the_way_back(tmp_path, suffix, changes):
    config = SanaConfig(**SIZES | changes)
    state, written = tensors(config), set()
    for seed in range(4):
        folder = folder_of(tmp_path / f"in{seed}", state, config, 1 + seed, seed)
        convert(folder, tmp_path / f"{seed}{suffix}")
        written.add((tmp_path / f"{seed}{suffix}").read_bytes())
        told = convert(tmp_path / f"{seed}{suffix}", tmp_path / f"out{seed}", changes=HEADS)
        assert told == config
        back = load_transformer(tmp_path / f"out{seed}").state_dict()
        assert all(torch.equal(back[name], t) for name, t in state.items())
    assert len(written) == 1
    stacked = read_release(tmp_path / f"0{suffix}")["blocks.1.attn.qkv.weight"].load()
    parts = [state[f"transformer_blocks.1.attn1.to_{p}.weight"] for p in "qkv"]
    assert torch.equal(stacked, torch.cat(parts))


def test_a_folder_does_not_depend_on_the_order_of_its_tensors(tmp_path):
    config = SanaConfig(**SIZES | {"num_layers": 11})
    weights, seen = lazily(tensors(config)), set()
    for seed in range(4):
        write_folder(config.to_dict(), shuffled(weights, seed), tmp_path / str(seed), shard_bytes=300_000)
        files = sorted((tmp_path / str(seed)).iterdir())
        assert len(files) > 5
        seen.add(tuple((file.name, file.read_bytes()) for file in files))
    assert len(seen) == 1


@pytest.mark.parametrize("wide", "qkv")
def test_stacked_parts_of_several_precisions_lose_nothing(wide):
    config = SanaConfig(**SIZES)
    state = {n: t.bfloat16() for n, t in tensors(config).items()}
    state[f"transformer_blocks.0.attn1.to_{wide}.weight"] = torch.randn(96, 96)
    stacked = to_release(lazily(state), config)["blocks.0.attn.qkv.weight"]
    assert stacked.dtype == stacked.load().dtype == torch.float32
    for part, name in zip(stacked.load().chunk(3), "qkv"):
        assert torch.equal(part, state[f"transformer_blocks.0.attn1.to_{name}.weight"].float())


def test_the_pth_holds_plain_tensors_only(tmp_path):
    config = SanaConfig(**SIZES)
    folder = folder_of(tmp_path / "in", tensors(config), config, 1, 0)
    assert main(["convert", str(folder), str(tmp_path / "OUT.PTH"), "--dtype", "bf16"]) == 0
    stored = torch.load(tmp_path / "OUT.PTH", weights_only=True)
    assert list(stored) == ["state_dict"]
    assert {type(t) for t in stored["state_dict"].values()} == {torch.Tensor}
    assert {t.dtype for t in stored["state_dict"].values()} == {torch.bfloat16}
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in stored["state_dict"].values())
    assert stored["state_dict"]["pos_embed"].shape == (1, 64, 96)
    assert stored["state_dict"]["y_embedder.y_embedding"].shape == (300, 24)
    # from one file of the release's layout to the other, there and back
    convert(tmp_path / "OUT.PTH", tmp_path / "b.safetensors", changes=HEADS)
    same = load_file(tmp_path / "b.safetensors")
    assert same.keys() == stored["state_dict"].keys()
    assert all(torch.equal(same[n], t) for n, t in stored["state_dict"].items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_diffusers_reads_a_sana_1_0_file(tmp_path, suffix):
    """Offline, with the folder's own config; bit-equal tensors and outputs."""
    torch.manual_seed(0)
    given = SanaTransformer2DModel(**SIZES | {"cross_attention_dim": 96, "qk_norm": None}).eval()
    given.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / f"sana{suffix}")
    read = SanaTransformer2DModel.from_single_file(
        str(tmp_path / f"sana{suffix}"), config=str(tmp_path / "in"), local_files_only=True
    )
    for name, tensor in given.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(read(**inputs(given)).sample, given(**inputs(given)).sample)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_from_file_to_file_nothing_is_lost(tmp_path, dtype):
    """Not what no folder keeps either: the features of the empty prompt, and the head for the loss."""
    config = SanaConfig(**SIZES)
    convert(folder_of(tmp_path / "in", tensors(config), config, 1, 0), tmp_path / "a.pth")
    state = torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"]
    shapes = {"y_embedder.y_embedding": (300, 24), "logvar_linear.weight": (1, 96), "logvar_linear.bias": (1,)}
    state |= {name: torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "b.pth")
    convert(tmp_path / "b.pth", tmp_path / "c.SAFETENSORS", dtype=dtype, changes=HEADS)
    convert(tmp_path / "c.SAFETENSORS", tmp_path / "d.pth", changes=HEADS)
    for stored in (load_file(tmp_path / "c.SAFETENSORS"), torch.load(tmp_path / "d.pth")["state_dict"]):
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[name], t.to(dtype or t.dtype)) for name, t in state.items())


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a"])
def test_numbers_too_large_for_the_dtype_are_refused(tmp_path, name, capsys):
    """Where there was no infinity, none is written."""
    config = SanaConfig(**SIZES)
    state = tensors(config)
    wide, key = "transformer_blocks.1.attn1.to_k.weight", "blocks.1.attn.qkv.weight"
    state[wide][3, 4] = 1e5
    folder = folder_of(tmp_path / "in", state, config, 2, 0)
    assert main(["convert", str(folder), str(tmp_path / name), "--dtype", "fp16"]) == 2
    told = capsys.readouterr().err
    assert f"{wide if name == 'a' else key} holds numbers too large for float16" in told
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert main(["convert", str(folder), str(tmp_path / name), "--dtype", "bf16"]) == 0


def test_the_command_that_reads_it_back_is_one_for_a_shell(tmp_path, capsys):
    config = SanaConfig(**SIZES)
    folder = folder_of(tmp_path / "in", tensors(config), config, 1, 0)
    assert main(["convert", str(folder), str(tmp_path / "a 'b' c.pth")]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("to read it back: sana15 "))
    words[2] = str(tmp_path / "back")
    assert main(words) == 0


def test_what_the_file_does_not_tell_is_said(tmp_path, capsys):
    """And what is said suffices: here the heads, and the scale of time, which stands in no tensor."""
    config = SanaConfig(**SIZES | {"timestep_scale": 1000.0, "norm_eps": 1e-5, "interpolation_scale": 1.5})
    folder = folder_of(tmp_path / "in", tensors(config), config, 1, 0)
    assert main(["convert", str(folder), str(tmp_path / "a.pth")]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("to read it back: sana15 convert ")
    changes = told.split()[8:]
    assert changes == ["num_cross_attention_heads=3", "timestep_scale=1000.0", "norm_eps=1.0e-05"]
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b"), *changes]) == 0
    assert SanaConfig.load(tmp_path / "b") == dataclasses.replace(config, cross_attention_dim=96)


def test_a_scale_that_the_table_does_not_tell_is_said(tmp_path, capsys):
    """One position has no spacing."""
    config = SanaConfig(**SIZES | {"sample_size": 1, "interpolation_scale": 2.0, "num_cross_attention_heads": 3})
    folder = folder_of(tmp_path / "in", tensors(config), config, 1, 0)
    assert main(["convert", str(folder), str(tmp_path / "a.safetensors")]) == 0
    changes = capsys.readouterr().out.splitlines()[-1].split()[8:]
    assert changes == ["num_cross_attention_heads=3", "interpolation_scale=2.0"]
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b"), *changes]) == 0
    assert SanaConfig.load(tmp_path / "b").interpolation_scale == 2.0


def test_a_name_for_neither_folder_nor_release_is_refused(tmp_path, capsys):
    config = SanaConfig(**SIZES)
    folder = folder_of(tmp_path / "in", tensors(config), config, 1, 0)
    for name in ("a.ckpt", "a.bin", "a.PT"):
        assert main(["convert", str(folder), str(tmp_path / name)]) == 2
        assert "files are written as .pth or .safetensors" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_ffn_s_width_survives_rounding():
    """453 / 224 * 224 is below 453 in double precision."""
    config = SanaConfig(**SIZES | {"num_attention_heads": 7, "num_cross_attention_heads": 7, "mlp_ratio": 2.023})
    assert config.hidden == 453
    shapes = {n: torch.empty(s, device="meta") for n, s in parameter_shapes(config).items()}
    found = infer_config(to_release(lazily(shapes), config), "here", {"num_cross_attention_heads": 7})
    assert found.hidden == 453
