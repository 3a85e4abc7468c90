"""sana15.prune and sana15 prune: which blocks stay, folders, diffusers, published depths, kills, bad input."""

import json
import signal
import time

import numpy as np
import pytest
import tiny_pipeline
import torch
from diffusers import SanaTransformer2DModel
from grown_folders import files_below, output, run_python, source
from model_cases import batch
from pruned_folders import idle as idle
from safetensors.torch import load_file, save_file

import sana15
from sana15 import Pipeline, SanaConfig, SanaTransformer
from sana15.cli import main
from sana15.growth.folder import grow_folder
from sana15.growth.growing import block_of, grown_weights
from sana15.model.checkpoint import load_transformer, save_transformer
from sana15.model.config import SIZES
from sana15.model.depth import chosen_blocks
from sana15.model.folder import recorded_map, reopening
from sana15.model.release import parameter_shapes
from sana15.pruning.folder import prune_folder, read_indices
from sana15.pruning.importance import Importance
from sana15.pruning.removal import highest, pruned_config
from sana15.storage.weights import INDEX, WEIGHTS, Weight, weights_sha256


def importance_of(cosine, loss_change=None):
    loss = {} if loss_change is None else {"loss": 1.0, "loss_change": loss_change}
    return Importance(cosine=cosine, cosine_by_bin=[[c] for c in cosine], samples=[1], **loss)


# Which blocks stay


@pytest.mark.parametrize(
    ("scores", "keep", "expected"),
    [
        ([0.5, 0.1, 0.3, 0.2], 2, [0, 2]),
        ([0.5, 0.1, 0.3, 0.2], 4, [0, 1, 2, 3]),
        ([0.1, 0.2, 0.3, 0.4], 1, [3]),
        ([0.2, 0.2, 0.2, 0.2], 2, [0, 1]),
        ([-0.2, 0.0, -0.1], 2, [1, 2]),
    ],
)
def test_the_highest_stay_in_order(scores, keep, expected):
    assert highest(scores, keep) == expected


def test_each_rule_reads_its_own_numbers():
    found = importance_of([0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.2, 0.3])
    assert sana15.prune(source(), 2, importance=found).kept_blocks == [0, 1]
    assert sana15.prune(source(), 2, "loss", importance=found).kept_blocks == [1, 3]
    helped = importance_of([0.1] * 4, [0.1, -0.9, 0.2, -0.1])  # without 1 the loss falls
    assert sana15.prune(source(), 3, "loss", importance=helped).kept_blocks == [0, 2, 3]
    assert sana15.prune(source(), by="indices", indices=[2, 3]).kept_blocks == [2, 3]


@pytest.mark.parametrize("by", ["importance", "loss"])
def test_blocks_that_do_nothing_go_first(idle, by):
    model, batches = idle
    assert sana15.prune(model, 4, by, batches=batches).kept_blocks == [0, 2, 3, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pruned_model_is_the_source_without_the_others(dtype):
    model = source().to(dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pruned = sana15.prune(model, by="indices", indices=[0, 2])
    assert (pruned.config.num_layers, len(pruned.transformer_blocks)) == (2, 2)
    for name, value in pruned.state_dict().items():
        index, inner = block_of(name)
        old = name if index is None else f"transformer_blocks.{[0, 2][index]}.{inner}"
        assert torch.equal(value, before[old]), name
        assert value.data_ptr() != model.state_dict()[old].data_ptr()
    assert torch.equal(output(pruned, dtype), output(chosen_blocks(model, [0, 2]), dtype))
    assert not torch.equal(output(pruned, dtype), output(model, dtype))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 5}, "keep must be 1 to 4, the blocks of the source; got 5"),
        ({"keep": 0}, "keep must be 1 to 4"),
        ({}, "keep must say how many blocks stay"),
        ({"keep": 2}, "needs importance or batches"),
        ({"keep": 2, "by": "search"}, "needs batches"),
        ({"keep": 2, "by": "random"}, "unknown strategy 'random'; choose one of importance"),
        ({"keep": 2, "by": "indices"}, "needs indices"),
        ({"keep": 2, "by": "loss", "indices": [0, 1]}, "nothing else takes them"),
        ({"keep": 2, "by": "search", "importance": importance_of([1.0] * 4)}, "does not use an importance"),
        ({"indices": [0], "importance": importance_of([1.0] * 4)}, "does not use an importance"),
        ({"by": "indices", "indices": [2, 1]}, "indices must be ascending"),
        ({"by": "indices", "indices": [1, 1]}, "each block once"),
        ({"by": "indices", "indices": [0, 4]}, "blocks 0 to 3, but the indices name 4"),
        ({"by": "indices", "indices": [-1]}, "the indices name -1"),
        ({"by": "indices", "indices": []}, "one or more block numbers"),
        ({"by": "indices", "indices": [0.5]}, "one or more block numbers"),
        ({"by": "indices", "indices": [0, 1], "keep": 3}, "keep is 3, but there are 2 indices"),
        ({"keep": 2, "importance": importance_of([1.0, 2.0])}, "that of 2 blocks, the model has 4"),
        ({"keep": 2, "by": "loss", "importance": importance_of([1.0] * 4)}, "without the loss"),
        ({"keep": 2, "importance": importance_of([1.0] * 4), "rank": 3}, "takes no rank"),
    ],
)
def test_what_cannot_be_pruned(arguments, message):
    with pytest.raises(ValueError, match=message):
        sana15.prune(source(), **arguments)


# Folders


@pytest.mark.parametrize("shards", [None, 150_000])
def test_a_folder_is_pruned_as_a_model_is_and_diffusers_loads_it(tmp_path, shards, capsys):
    model = source()
    save_transformer(model, tmp_path / "src", shard_bytes=shards)
    before = files_below(tmp_path / "src")
    importance_of([0.4, 0.1, 0.3, 0.2]).save(tmp_path / "i.json")
    arguments = ["prune", str(tmp_path / "src"), str(tmp_path / "dst"), "--keep", "3"]
    arguments += ["--importance", str(tmp_path / "i.json")] + (["--shard-size", "150kB"] if shards else [])
    assert main(arguments) == 0
    assert "3 blocks kept by importance: 0 2 3" in capsys.readouterr().out
    assert (tmp_path / "dst" / INDEX).exists() == bool(shards)
    expected = sana15.prune(model, by="indices", indices=[0, 2, 3])
    theirs = SanaTransformer2DModel.from_pretrained(tmp_path / "dst")
    assert theirs.config.num_layers == 3
    assert theirs.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    ours = load_transformer(tmp_path / "dst")
    assert torch.equal(output(ours), output(expected))
    inputs = batch()
    with torch.no_grad():
        out = theirs(inputs["latents"], inputs["text"], inputs["timestep"], encoder_attention_mask=inputs["mask"])
    assert torch.allclose(out.sample, output(ours), rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "dst" / "sana15.json").read_text())["pruning"]
    assert record == {"by": "importance", "source_layers": 4, "kept": [0, 2, 3], "spent": {}}
    replay = ["prune", str(tmp_path / "src"), str(tmp_path / "again"), "--by", "indices", "--indices"]
    assert main([*replay, str(tmp_path / "dst"), *arguments[7:]]) == 0
    assert files_below(tmp_path / "again").keys() == files_below(tmp_path / "dst").keys()
    for name, value in load_transformer(tmp_path / "again").state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    assert files_below(tmp_path / "src") == before


def test_a_pipeline_is_calibrated_pruned_and_keeps_its_other_parts(tmp_path):
    src = tiny_pipeline.make(tmp_path / "src", num_layers=4)
    (src / "sana15.json").write_text('{"guidance": 2.5}')
    grow_folder(src, tmp_path / "grown", layers=6, keep=4)  # blocks 4 and 5 do nothing yet
    arguments = ["prune", str(tmp_path / "grown"), str(tmp_path / "dst"), "--keep", "4", "--count", "3", "--steps", "2"]
    assert main(arguments) == 0
    settings = json.loads((tmp_path / "dst" / "sana15.json").read_text())
    assert settings["guidance"] == 2.5
    assert settings["pruning"]["kept"] == [0, 1, 2, 3]
    assert recorded_map(tmp_path / "dst", 4) == [0, 1, 2, 3]  # the growth map of what is left
    for part in ("text_encoder", "vae", "scheduler"):
        assert files_below(tmp_path / "dst" / part) == files_below(src / part)
    a, b = (Pipeline.from_pretrained(tmp_path / name)("a red circle", steps=2)[0][0] for name in ("src", "dst"))
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(("keep", "size"), [(40, "3200M"), (30, "2400M"), (20, "1600M")])
def test_the_published_depths(tmp_path, keep, size):
    """60 -> 40, 30, 20: on the full shapes without their weights, and at a narrow width with weights."""
    kept = [i * 60 // keep for i in range(keep)]
    full = SanaConfig.named("4800M")
    asked = []
    weights = {n: Weight(s, torch.bfloat16, lambda n=n: asked.append(n)) for n, s in parameter_shapes(full).items()}
    config = pruned_config(full, kept)
    assert config == SIZES[size]
    pruned = grown_weights(weights, config, kept, 0)
    assert {n: w.shape for n, w in pruned.items()} == parameter_shapes(SIZES[size])
    for weight in pruned.values():
        weight.load()
    names = [
        n if block_of(n)[0] is None else f"transformer_blocks.{kept[block_of(n)[0]]}.{block_of(n)[1]}" for n in pruned
    ]
    assert asked == names

    narrow = {"num_attention_heads": 1, "num_cross_attention_heads": 1, "cross_attention_head_dim": 32}
    torch.manual_seed(1)
    model = SanaTransformer(SanaConfig.named("4800M", caption_channels=16, **narrow)).eval()
    save_transformer(model, tmp_path / "src", dtype=torch.bfloat16, shard_bytes=400_000)
    importance_of([1.0 if i in kept else 0.5 for i in range(60)]).save(tmp_path / "i.json")
    prune_folder(tmp_path / "src", tmp_path / "dst", keep=keep, importance=Importance.load(tmp_path / "i.json"))
    theirs = SanaTransformer2DModel.from_pretrained(tmp_path / "dst").state_dict()
    state = model.state_dict()
    assert sum(name.endswith("attn1.to_q.weight") for name in theirs) == keep
    for name, value in theirs.items():
        index, inner = block_of(name)
        old = name if index is None else f"transformer_blocks.{kept[index]}.{inner}"
        assert torch.equal(value, state[old].bfloat16()), name
    assert {w.dtype for w in reopening(tmp_path / "dst").values()} == {torch.bfloat16}


def test_a_grown_models_map_follows_its_blocks(tmp_path):
    grown = sana15.grow(source(), 6, keep=3)  # 0 1 2 and three new ones
    assert sana15.prune(grown, indices=[0, 2, 4]).growth_map == [0, 2, None]
    save_transformer(source(), tmp_path / "src")
    grow_folder(tmp_path / "src", tmp_path / "grown", layers=6, keep=3)
    prune_folder(tmp_path / "grown", tmp_path / "dst", indices=[0, 2, 4])
    assert recorded_map(tmp_path / "dst", 3) == [0, 2, None]


def test_a_record_is_of_the_model_that_was_pruned(tmp_path, capsys):
    """Growth drops the record of a pruning before it; a record for another depth is refused."""
    save_transformer(source(), tmp_path / "src")
    prune_folder(tmp_path / "src", tmp_path / "three", indices=[0, 2, 3])
    prune_folder(tmp_path / "three", tmp_path / "two", indices=[0, 2])
    arguments = ["prune", str(tmp_path / "src"), str(tmp_path / "dst"), "--indices"]
    assert main([*arguments, str(tmp_path / "two")]) == 2
    assert "a model of 3 blocks that was pruned, the source has 4" in capsys.readouterr().err
    grow_folder(tmp_path / "three", tmp_path / "grown", layers=5, keep=3)
    assert "pruning" not in json.loads((tmp_path / "grown" / "sana15.json").read_text())
    assert main([*arguments, str(tmp_path / "grown")]) == 3
    assert "no pruning" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_an_importance_of_other_weights_is_noted(tmp_path, capsys):
    save_transformer(source(), tmp_path / "src")
    for digest, noted in (("0" * 64, True), (weights_sha256(tmp_path / "src"), False), ("", False)):
        found = importance_of([0.4, 0.3, 0.2, 0.1])
        found.settings["model"] = {"name": "other", "sha256": digest}
        found.save(tmp_path / "i.json")
        arguments = ["--keep", "2", "--importance", str(tmp_path / "i.json")]
        assert main(["prune", str(tmp_path / "src"), str(tmp_path / f"dst{digest[:1]}{noted}"), *arguments]) == 0
        assert ("measured on other weights (other)" in capsys.readouterr().err) is noted


def test_numbers_of_numpy():
    assert sana15.prune(source(), indices=np.array([0, 2])).kept_blocks == [0, 2]
    assert sana15.prune(source(), np.int64(1), importance=importance_of([0.1, 0.2, 0.3, 0.4])).kept_blocks == [3]


def test_read_indices(tmp_path):
    assert read_indices(",".join(map(str, range(100))), 100) == list(range(100))  # longer than a file's name may be
    (tmp_path / "list.json").write_text("[0, 3]")
    assert read_indices("0,2,5", 6) == [0, 2, 5]
    assert read_indices(str(tmp_path / "list.json"), 6) == [0, 3]


@pytest.mark.parametrize(
    ("kind", "arguments", "code", "message"),
    [
        ("", ["--keep", "5"], 2, "keep must be 1 to 4, the blocks of the source; got 5"),
        ("", [], 2, "--keep says how many blocks stay"),
        ("", ["--keep", "2"], 2, "is a transformer alone and cannot be calibrated"),
        ("", ["--keep", "2", "--by", "magic", "--indices", "0"], 2, "unknown strategy 'magic'"),
        ("", ["--by", "indices", "--indices", "1,0"], 2, "indices must be ascending"),
        ("", ["--indices", "0,1", "--prompts", "none.txt"], 2, "nothing is measured"),
        ("", ["--by", "indices", "--indices", "0,9"], 2, "the indices name 9"),
        ("", ["--by", "indices", "--indices", "a,b"], 2, "must be numbers as in 0,1,3 or a file"),
        ("bad list", ["--by", "indices", "--indices", "LIST"], 3, "holds no list of block numbers"),
        ("bad list", ["--keep", "2", "--importance", "LIST"], 3, "is damaged"),
        ("", ["--by", "indices", "--indices", "0", "--shard-size", "big"], 2, "a size must be written as 5GB"),
        ("target exists", ["--by", "indices", "--indices", "0"], 2, "dst exists; remove it"),
        ("inside", ["--by", "indices", "--indices", "0"], 2, "lies inside the source"),
        ("no source", ["--by", "indices", "--indices", "0"], 3, "none is no folder"),
        ("no config", ["--by", "indices", "--indices", "0"], 3, "config.json is missing"),
        ("missing block", ["--by", "indices", "--indices", "0"], 3, "23 tensors missing (transformer_blocks.3."),
        ("other width", ["--by", "indices", "--indices", "0"], 3, "the config says"),
        ("cut", ["--by", "indices", "--indices", "0"], 3, "is damaged"),
        ("settings", ["--by", "indices", "--indices", "0"], 3, "sana15.json is damaged"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, kind, arguments, code, message, capsys):
    src, dst = tmp_path / "src", tmp_path / "dst"
    save_transformer(source(), src)
    config = json.loads((src / "config.json").read_text())
    state = load_file(src / WEIGHTS)
    if kind == "target exists":
        dst.mkdir()
    elif kind == "inside":
        dst = src / "dst"
    elif kind == "bad list":
        (tmp_path / "list").write_text("{")
        arguments = [str(tmp_path / "list") if a == "LIST" else a for a in arguments]
    elif kind == "no config":
        (src / "config.json").unlink()
    elif kind == "missing block":
        save_file({n: t for n, t in state.items() if block_of(n)[0] != 3}, src / WEIGHTS)
    elif kind == "other width":
        wide = {"num_attention_heads": 4, "num_cross_attention_heads": 4, "cross_attention_head_dim": 32}
        (src / "config.json").write_text(json.dumps(config | wide | {"cross_attention_dim": 128}))
    elif kind == "cut":
        (src / WEIGHTS).write_bytes((src / WEIGHTS).read_bytes()[:-100])
    elif kind == "settings":
        (src / "sana15.json").write_text("{")
    before, entries = files_below(tmp_path), sorted(tmp_path.iterdir())
    origin = tmp_path / "none" if kind == "no source" else src
    assert main(["prune", str(origin), str(dst), *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert files_below(tmp_path) == before
    assert sorted(tmp_path.iterdir()) == entries


def test_a_kill_in_the_middle_leaves_no_target_and_the_next_run_succeeds(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    save_transformer(source(), src, shard_bytes=150_000)
    before = files_below(src)
    slow = """
import sys, time, sana15.model.folder as m
class Slow(m.Weight):
    def __getattribute__(self, name):
        if name == "load":
            time.sleep(0.1)
        return super().__getattribute__(name)
m.Weight = Slow
from sana15.pruning.folder import prune_folder
prune_folder(sys.argv[1], sys.argv[2], by="indices", indices=[0, 1, 3], shard_bytes=150_000)
"""
    process = run_python(slow, src, dst)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob(".dst.partial-*/**/*.safetensors")) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.glob(".dst.partial-*/**/*.safetensors"))  # it was in the middle
    assert not dst.exists()
    prune_folder(src, dst, by="indices", indices=[0, 1, 3])
    assert files_below(src) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]
