"""sana15.storage.weights: diffusers folders, both ways, strict, and never half-written."""

import json

import pytest
import torch
from diffusers import SanaTransformer2DModel
from model_cases import SMALL, batch, pair
from safetensors.torch import load_file, save_file

from sana15 import SanaConfig, SanaTransformer
from sana15.model.checkpoint import load_transformer, save_transformer
from sana15.storage.files import DataError
from sana15.storage.weights import INDEX, WEIGHTS


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_loads_what_diffusers_saves(tmp_path, shard):
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (shard == "10GB") == (tmp_path / WEIGHTS).exists()
    loaded = load_transformer(tmp_path)
    for name, value in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(loaded(*batch().values()), ours(*batch().values()))


def test_diffusers_loads_what_we_save(tmp_path):
    theirs, ours = pair()
    save_transformer(ours, tmp_path / "transformer")
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert loaded.config.num_layers == SMALL["num_layers"]
    modes = {path.stat().st_mode for path in (tmp_path / "transformer").iterdir()}
    assert len(modes) == 1  # weights are as readable as config.json
    for name, value in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_dtype(tmp_path):
    _, ours = pair()
    save_transformer(ours, tmp_path / "half", dtype=torch.float16)
    assert load_transformer(tmp_path / "half", dtype=torch.bfloat16).proj_out.weight.dtype == torch.bfloat16
    assert ours.proj_out.weight.dtype == torch.float32


def test_missing_damaged_and_unfitting(tmp_path):
    _, ours = pair()
    folder = tmp_path / "t"
    save_transformer(ours, folder)
    config = json.loads((folder / "config.json").read_text())

    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(ValueError, match="23 tensors missing"):
        load_transformer(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
    with pytest.raises(ValueError, match="23 tensors unexpected"):
        load_transformer(folder)
    (folder / "config.json").write_text(json.dumps(config | {"caption_channels": 24}))
    with pytest.raises(ValueError, match=r"caption_projection.linear_1.weight is \[96, 20\]"):
        load_transformer(folder)

    (folder / "config.json").write_text(json.dumps(config))
    weights = (folder / WEIGHTS).read_bytes()
    for damage in (weights[: len(weights) // 2], b"", b"\xff" * 100):
        (folder / WEIGHTS).write_bytes(damage)
        with pytest.raises(ValueError, match="is damaged"):
            load_transformer(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="holds no"):
        load_transformer(folder)


def test_damaged_index(tmp_path):
    _, ours = pair()
    save_transformer(ours, tmp_path / "t", shard_bytes=100_000)
    index = tmp_path / "t" / INDEX
    whole = json.loads(index.read_text())
    name, file = next(iter(whole["weight_map"].items()))
    outside = whole["weight_map"] | {name: "../t/" + file}
    lying = whole["weight_map"] | {name: sorted(set(whole["weight_map"].values()))[-1]}
    absent = whole["weight_map"] | {name: "absent.safetensors"}
    for text, error, match in (
        ("{", DataError, "is damaged"),
        ("[]", DataError, "no JSON object"),
        ("{}", DataError, "weight_map must map"),
        (json.dumps({"weight_map": outside}), DataError, "files in the same folder"),
        (json.dumps({"weight_map": lying}), DataError, f"lacks {name}, which the index says"),
        (json.dumps({"weight_map": absent}), FileNotFoundError, "named by the index but missing"),
    ):
        index.write_text(text)
        with pytest.raises(error, match=match):
            load_transformer(tmp_path / "t")


def test_integer_weights_are_refused(tmp_path):
    _, ours = pair()
    save_transformer(ours, tmp_path / "t")
    state = load_file(tmp_path / "t" / WEIGHTS)
    save_file(state | {"proj_out.bias": state["proj_out.bias"].to(torch.int8)}, tmp_path / "t" / WEIGHTS)
    with pytest.raises(DataError, match=r"proj_out\.bias holds I8"):
        load_transformer(tmp_path / "t")


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    _, ours = pair()
    save_transformer(ours, tmp_path / "t")
    before = (tmp_path / "t" / WEIGHTS).read_bytes()

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("sana15.storage.weights.stream_tensors", full)
    with pytest.raises(OSError, match="no space"):
        save_transformer(SanaTransformer(SanaConfig(**SMALL)), tmp_path / "t")
    assert (tmp_path / "t" / WEIGHTS).read_bytes() == before
