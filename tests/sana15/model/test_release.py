"""The authors' .pth layout: true key structure at small size, strict both ways, and files that must be refused."""

import json
import pickle

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from release_files import HEADS, TEXT, C, F, release
from safetensors.torch import load_file

from sana15.cli import main
from sana15.model.checkpoint import load_transformer
from sana15.model.config import SanaConfig
from sana15.model.release import convert, infer_config, parameter_shapes, read_release, source_of
from sana15.storage.values import parse_bytes
from sana15.storage.weights import INDEX, WEIGHTS, Weight


def oracle(state):
    """diffusers' own map, completed by the norms that it leaves behind in a SANA-1.5 file."""
    from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers

    rest = dict(state)
    expected = convert_sana_transformer_to_diffusers(rest)
    for name in list(rest):
        if "_norm" in name:
            _, number, attention, norm, _ = name.split(".")
            ours = f"{'attn1' if attention == 'attn' else 'attn2'}.norm_{norm[0]}.weight"
            expected[f"transformer_blocks.{number}.{ours}"] = rest.pop(name)
    assert not rest
    return expected


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("qk_norm", [True, False], ids=["sana15", "sana10"])
@pytest.mark.parametrize("nesting", ["state_dict", "state_dict_ema", None])
def test_pth_to_folder(tmp_path, qk_norm, nesting):
    state = release(qk_norm=qk_norm)
    stored = {nesting: state, "epoch": 3, "optimizer": {"lr": 1e-4}} if nesting else state
    torch.save(stored, tmp_path / "sana.pth")
    assert main(["convert", str(tmp_path / "sana.pth"), str(tmp_path / "transformer"), HEADS]) == 0
    loaded = load_transformer(tmp_path / "transformer")
    same(dict(loaded.state_dict()), oracle(state))
    assert loaded.config.sample_size == 16
    assert loaded.config.qk_norm == ("rms_norm_across_heads" if qk_norm else None)
    same(dict(SanaTransformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()), oracle(state))


def test_averaged_weights_when_asked_for(tmp_path):
    first, second = release(), {k: v + 1 for k, v in release().items()}
    torch.save({"state_dict": first, "state_dict_ema": second}, tmp_path / "sana.pth")
    for ema, expected in ((False, first), (True, second)):
        stored = read_release(tmp_path / "sana.pth", ema=ema)
        same({name: weight.load() for name, weight in stored.items()}, expected)


def test_sprint_keys(tmp_path):
    torch.save({"state_dict": release(sprint=True)}, tmp_path / "sprint.pth")
    config = convert(tmp_path / "sprint.pth", tmp_path / "t", changes={"num_cross_attention_heads": 2})
    assert config.guidance_embeds
    loaded = load_transformer(tmp_path / "t").state_dict()
    assert torch.equal(
        loaded["time_embed.guidance_embedder.linear_2.bias"], release(sprint=True)["cfg_embedder.mlp.2.bias"]
    )
    assert torch.equal(
        loaded["time_embed.timestep_embedder.linear_1.bias"], release(sprint=True)["t_embedder.mlp.0.bias"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_tensor_equal(tmp_path, dtype):
    """.pth -> diffusers folder in several files -> release layout -> folder: equal bits, the dtype as stored."""
    state = release(dtype=dtype)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b", shard_bytes=100_000, changes={"num_cross_attention_heads": 2})
    convert(tmp_path / "b", tmp_path / "c.safetensors")
    back = load_file(tmp_path / "c.safetensors")
    null_text = {"y_embedder.y_embedding": torch.zeros(300, TEXT, dtype=dtype)}  # no folder keeps it
    same(back, state | null_text)
    convert(tmp_path / "c.safetensors", tmp_path / "d", changes={"num_cross_attention_heads": 2})
    same(load_file(tmp_path / "d" / WEIGHTS), dict(load_transformer(tmp_path / "b", dtype=dtype).state_dict()))


def test_shards_and_dtype(tmp_path):
    torch.save({"state_dict": release()}, tmp_path / "a.pth")
    arguments = [
        "convert",
        str(tmp_path / "a.pth"),
        str(tmp_path / "b"),
        HEADS,
        "--dtype",
        "bf16",
        "--shard-size",
        "100kB",
    ]
    assert main(arguments) == 0
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    index = json.loads((tmp_path / "b" / INDEX).read_text())
    assert len(files) > 3
    assert sorted({*index["weight_map"].values()}) == [f.name for f in files]
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in stored.values())
    largest = max(t.numel() * 2 for t in stored.values())
    assert all(sum(t.numel() * 2 for t in load_file(f).values()) <= max(100_000, largest) for f in files)
    same(stored, {name: t.bfloat16() for name, t in oracle(release()).items()})
    assert SanaTransformer2DModel.from_pretrained(tmp_path / "b").config.num_layers == 2


@pytest.mark.parametrize("size", ["600M", "1600M", "4800M"])
def test_published_sizes_are_recognised(size):
    """From shapes alone, without memory: the config that the table of sizes has."""
    config = SanaConfig.named(size)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        theirs, _, parts = source_of(name)
        weights[theirs] = type("Meta", (), {"shape": (shape[0] * parts, *shape[1:])})
    assert infer_config(weights, size) == config
    table = get_2d_sincos_pos_embed(config.width, 16, base_size=16, interpolation_scale=2.0)[None].float()
    weights["pos_embed"] = Weight(tuple(table.shape), table.dtype, lambda: table)
    found = infer_config(weights, size)
    assert (found.sample_size, found.interpolation_scale) == (16, 2.0)


class Evil:
    """Unpickled by a careless reader, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def refused(tmp_path, kind):
    state, path = release(), tmp_path / "bad.pth"
    if kind == "missing block tensor":
        del state["blocks.1.attn.k_norm.weight"]
    elif kind == "missing block":
        state = {k: v for k, v in state.items() if not k.startswith("blocks.0.")}
        state["blocks.0.mlp.point_conv.conv.weight"] = torch.zeros(C, F, 1, 1)
    elif kind == "unexpected":
        state["blocks.0.attn.rope.weight"] = torch.zeros(3)
    elif kind == "wrong shape":
        state["blocks.1.cross_attn.kv_linear.weight"] = torch.zeros(C, C)
    elif kind == "integers":
        state["t_block.1.bias"] = torch.zeros(6 * C, dtype=torch.int8)
    elif kind == "another model":
        state = {"conv.weight": torch.zeros(3)}
    stored = {"state_dict": state}
    if kind == "code":
        stored = {"state_dict": state, "config": Evil(tmp_path / "canary")}
    if kind == "not a dict":
        stored = [torch.zeros(3)]
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "old pickle":
        path.write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    else:
        torch.save(stored, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-5000])
    if kind == "empty":
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing block tensor", "does not fit 2 blocks: 1 tensors missing (blocks.1.attn.k_norm.weight)"),
        ("missing block", "tensors missing (blocks.0.attn.k_norm.weight, blocks.0.attn.proj.bias, "),
        ("unexpected", "1 tensors unexpected (blocks.0.attn.rope.weight)"),
        ("wrong shape", "blocks.1.cross_attn.kv_linear.weight is [96, 96], expected [192, 96]"),
        ("integers", "t_block.1.bias is no floating-point tensor but int8"),
        ("another model", "is no SANA checkpoint: x_embedder.proj.weight is missing"),
        ("code", "damaged or holds other objects than tensors"),
        ("old pickle", "damaged or holds other objects than tensors"),
        ("not a dict", "holds list, not a state_dict"),
        ("text", "bad.pth is damaged"),
        ("cut", "bad.pth is damaged"),
        ("empty", "bad.pth is damaged"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, kind, message, capsys):
    path = refused(tmp_path, kind)
    assert main(["convert", str(path), str(tmp_path / "out"), HEADS]) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{tmp}/a.pth", "{tmp}/out"], 2, "has width 96, which was never published: add num_cross_attention_heads=N"),
        (["{tmp}/a.pth", "{tmp}/out", "num_cross_attention_heads=7"], 2, "must divide the width 96"),
        (["{tmp}/a.pth", "{tmp}/out", HEADS, "colour=red"], 2, "unknown configuration key colour"),
        (["{tmp}/a.pth", "{tmp}/out", HEADS, "--shard-size", "big"], 2, "a size must be written as 5GB"),
        (["{tmp}/a.pth", "{tmp}/out", HEADS, "--ema"], 3, "holds no state_dict_ema"),
        (["{tmp}/a.pth", "{tmp}/a.pth", HEADS], 2, "exists; remove it"),
        (["{tmp}/none.pth", "{tmp}/out"], 3, "none.pth is missing"),
        (["{tmp}", "{tmp}/out"], 3, "config.json is missing: not a model folder"),
    ],
)
def test_wrong_usage(tmp_path, arguments, code, message, capsys):
    torch.save({"state_dict": release()}, tmp_path / "a.pth")
    assert main(["convert", *(a.format(tmp=tmp_path) for a in arguments)]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_sizes_in_words():
    assert [parse_bytes(t) for t in ("5GB", "1.5 MB", "10kb", "77")] == [5_000_000_000, 1_500_000, 10_000, 77]
    for bad in ("", "GB", "-1GB", "0", "5TB"):
        with pytest.raises(ValueError, match="a size must be written"):
            parse_bytes(bad)
