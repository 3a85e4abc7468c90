"""sana15.grow and sana15 grow: the documented tensors, exact starts, optimizer states, folders, memory, and kills."""

import json
import signal
import time
from pathlib import Path

import pytest
import tiny_pipeline
import torch
from diffusers import SanaTransformer2DModel
from grown_folders import files_below, output, run_python, source
from model_cases import SMALL, batch
from safetensors.torch import load_file, save_file

import sana15
from sana15 import SanaConfig, SanaTransformer
from sana15.cli import main
from sana15.growth.folder import check_growth, grow_folder
from sana15.growth.growing import STRATEGIES, block_of, growth_map
from sana15.model.checkpoint import load_transformer, save_transformer
from sana15.model.release import parameter_shapes
from sana15.sampling.pipeline import Pipeline
from sana15.storage.files import DataError, open_tensors, stream_tensors
from sana15.storage.weights import INDEX, WEIGHTS

NEW = None
OUTPUTS = ("attn1.to_out.0.weight", "attn1.to_out.0.bias", "attn2.to_out.0.weight", "attn2.to_out.0.bias")
OUTPUTS += ("ff.conv_point.weight",)


def first_blocks(model, keep):
    """The model without its other blocks."""
    small = SanaTransformer(SanaConfig(**model.config.__dict__ | {"num_layers": keep})).eval()
    state = {n: t for n, t in model.state_dict().items() if (block_of(n)[0] or 0) < keep}
    small.load_state_dict(state, strict=True)
    return small


@pytest.mark.parametrize(
    ("strategy", "depth", "layers", "keep", "expected"),
    [
        ("partial_preservation", 4, 6, None, [0, 1, NEW, NEW, NEW, NEW]),
        ("partial_preservation", 4, 6, 4, [0, 1, 2, 3, NEW, NEW]),
        ("partial_preservation", 1, 2, None, [0, NEW]),
        ("partial_preservation", 4, 3, None, [0, 1, NEW]),
        ("partial_preservation", 20, 60, None, [*range(18), *[NEW] * 42]),
        ("interleave", 3, 5, None, [0, NEW, 1, NEW, 2]),
        ("interleave", 3, 6, None, [0, NEW, 1, NEW, NEW, 2]),
        ("interleave", 4, 4, 3, [0, 1, NEW, 2]),
        ("interleave", 1, 3, None, [0, NEW, NEW]),
        ("cyclic", 3, 8, None, [0, 1, 2, 0, 1, 2, 0, 1]),
        ("cyclic", 4, 5, 2, [0, 1, 0, 1, 0]),
        ("block_replication", 3, 9, None, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        ("block_replication", 3, 5, None, [0, 0, 1, 1, 2]),
        ("stack", 3, 6, None, [0, 1, 2, 0, 1, 2]),
        ("stack", 3, 8, None, [0, 1, 0, 1, 2, 0, 1, 2]),
        ("stack", 4, 4, None, [0, 1, 2, 3]),
    ],
)
def test_growth_map(strategy, depth, layers, keep, expected):
    assert growth_map(depth, layers, keep, strategy)[0] == expected


def test_every_depth_has_every_kept_block_in_order_and_both_ends():
    for strategy in STRATEGIES:
        for depth in range(1, 7):
            for keep in range(1, depth + 1):
                for layers in range(keep, 15):
                    blocks, kept = growth_map(depth, layers, keep, strategy)
                    old = [b for b in blocks if b is not None]
                    assert (len(blocks), kept, blocks[0]) == (layers, keep, 0)
                    assert set(old) == set(range(keep))
                    if strategy in ("partial_preservation", "interleave", "block_replication"):
                        assert old == sorted(old)
                    if strategy in ("interleave", "block_replication", "stack") and (keep > 1 or strategy == "stack"):
                        assert blocks[-1] == keep - 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_grown_tensors(strategy):
    model = source()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    big = sana15.grow(model, layers=7, keep=3, strategy=strategy, seed=5)
    assert big.growth_map == growth_map(4, 7, 3, strategy)[0]
    assert big.config == SanaConfig(**SMALL | {"num_layers": 7})
    state = big.state_dict()
    C = big.config.width
    for name, value in state.items():
        index, inner = block_of(name)
        old = None if index is None else big.growth_map[index]
        if index is None:
            assert torch.equal(value, before[name]), name
        elif old is not None:
            assert torch.equal(value, before[f"transformer_blocks.{old}.{inner}"]), name
        elif inner in OUTPUTS or (inner.startswith("attn") and inner.endswith("bias")):
            assert not value.any(), name
        elif ".norm_" in inner:
            assert torch.equal(value, torch.ones(C)), name
        elif inner == "scale_shift_table":
            assert 0.8 < value.std() * C**0.5 < 1.2
        else:  # uniform: the bound says the spread
            fan = {"to_q": C + C, "to_k": C + C, "to_v": C + C}
            stacked = 3 * C if "attn1" in inner else C if "to_q" in inner else 2 * C
            bound = (6 / (C + stacked)) ** 0.5 if inner.split(".")[1] in fan else (9 if "depth" in inner else C) ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound, name
            assert 0.9 < value.std() / (bound / 3**0.5) < 1.1, name
    pointers = [t.data_ptr() for t in (*state.values(), *model.state_dict().values())]
    assert len(set(pointers)) == len(pointers)  # neither copies nor the source share memory
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_new_blocks_come_from_the_seed_and_differ_from_each_other():
    a, b, c = (sana15.grow(source(2), 4, keep=1, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    name = "transformer_blocks.{}.ff.conv_inverted.weight"
    assert not torch.equal(a[name.format(2)], c[name.format(2)])
    assert not torch.equal(a[name.format(2)], a[name.format(3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["partial_preservation", "interleave"])
def test_the_start_is_the_kept_blocks_function(strategy, dtype):
    model = source().to(dtype)
    for keep, reference in ((4, model), (2, first_blocks(model, 2).to(dtype))):
        big = sana15.grow(model, 7, keep=keep, strategy=strategy)
        assert big.proj_out.weight.dtype == dtype
        assert torch.equal(output(big, dtype), output(reference, dtype))
    big.transformer_blocks[-1 if strategy == "partial_preservation" else 3].ff.conv_point.weight.data.fill_(1e-3)
    assert not torch.equal(output(big, dtype), output(reference, dtype))


def test_new_blocks_learn():
    """The zero projections get gradients at once, so the new blocks do not stay identities."""
    big = sana15.grow(source(2), 4, keep=2).train()
    big(*batch().values()).square().mean().backward()
    for block in big.transformer_blocks[2:]:
        assert all(dict(block.named_parameters())[name].grad.any() for name in OUTPUTS)


def test_norms_can_be_added():
    model = source(qk_norm=None)
    plain, normed = sana15.grow(model, 6), sana15.grow(model, 6, add_qk_norm=True)
    assert (plain.config.qk_norm, normed.config.qk_norm) == (None, "rms_norm_across_heads")
    for name, value in normed.state_dict().items():
        assert torch.equal(value, torch.ones_like(value) if ".norm_" in name else plain.state_dict()[name]), name
    assert not torch.equal(output(plain), output(normed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 6, "keep": 5}, "keep must be 1 to 4, the blocks of the source; got 5"),
        ({"layers": 6, "keep": 0}, "keep must be 1 to 4"),
        ({"layers": 2, "keep": 3}, "layers must be at least the 3 blocks that are kept, got 2"),
        ({"layers": 0}, "layers must be at least"),
        ({"layers": 10**9}, "layers must be at most 10000"),
        ({"layers": 6, "keep": True}, "keep must be an integer"),
        ({"layers": 6.5}, "layers must be an integer"),
        ({"layers": 6, "strategy": "widen"}, "unknown strategy 'widen'; choose one of partial_preservation"),
    ],
)
def test_what_cannot_be_grown(arguments, message):
    with pytest.raises(ValueError, match=message):
        sana15.grow(source(), **arguments)


# Folders


@pytest.mark.parametrize("shards", [None, 150_000])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_folder_grows_as_a_model_does_and_diffusers_loads_it(tmp_path, strategy, shards, capsys):
    model = source()
    save_transformer(model, tmp_path / "src", shard_bytes=shards)
    arguments = ["grow", str(tmp_path / "src"), str(tmp_path / "dst"), "--layers", "6", "--seed", "3", "--check"]
    arguments += ["--strategy", strategy] + (["--shard-size", "150kB"] if shards else [])
    assert main(arguments) == 0
    assert (tmp_path / "dst" / INDEX).exists() == bool(shards)
    expected = sana15.grow(model, 6, strategy=strategy, seed=3)
    theirs = SanaTransformer2DModel.from_pretrained(tmp_path / "dst")
    assert theirs.config.num_layers == 6
    assert theirs.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    assert torch.equal(output(load_transformer(tmp_path / "dst")), output(expected))
    record = json.loads((tmp_path / "dst" / "sana15.json").read_text())["growth"]
    assert (record["map"], record["strategy"], record["seed"]) == (expected.growth_map, strategy, 3)
    lines = capsys.readouterr().out
    exact = strategy in ("partial_preservation", "interleave")
    assert ("torch.equal" in lines) == exact
    assert ("the start does not preserve the function" in lines) == (not exact)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


def test_a_pipeline_grows_with_its_other_parts(tmp_path):
    src = tiny_pipeline.make(tmp_path / "src")
    (src / "sana15.json").write_text('{"guidance": 2.0}')
    (src / "vae" / "transformer").mkdir()  # only the pipeline's own transformer is left out of the copy
    (src / "vae" / "transformer" / "note").write_text("kept")
    assert main(["grow", str(src), str(tmp_path / "dst"), "--layers", "5", "--check"]) == 0
    for path in src.rglob("*"):
        if path.is_file() and path.parent != src / "transformer" and path.name != "sana15.json":
            assert (tmp_path / "dst" / path.relative_to(src)).read_bytes() == path.read_bytes()
    recorded = json.loads((tmp_path / "dst" / "sana15.json").read_text())
    assert (recorded["guidance"], recorded["growth"]["map"]) == (2.0, [0, NEW, NEW, NEW, NEW])
    pipe = Pipeline.from_pretrained(tmp_path / "dst")
    assert pipe("a red circle", steps=1)[0][0].size == (64, 64)
    assert load_file(tmp_path / "dst" / "transformer" / WEIGHTS)["proj_out.weight"].dtype == torch.float16


def test_norms_added_to_a_folder(tmp_path, capsys):
    save_transformer(source(qk_norm=None), tmp_path / "src", dtype=torch.bfloat16)
    arguments = ["--layers", "5", "--keep", "4", "--add-qk-norm", "--check"]
    assert main(["grow", str(tmp_path / "src"), str(tmp_path / "dst"), *arguments]) == 0
    assert "the start does not preserve the function: qk-norm was added" in capsys.readouterr().out
    stored = load_file(tmp_path / "dst" / WEIGHTS)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["transformer_blocks.0.attn2.norm_k.weight"], torch.ones(96).bfloat16())


def test_the_check_finds_a_wrong_tensor_and_a_wrong_function(tmp_path, monkeypatch):
    save_transformer(source(), tmp_path / "src")
    growth, _ = grow_folder(tmp_path / "src", tmp_path / "dst", layers=6)
    state = load_file(tmp_path / "dst" / WEIGHTS)
    name = "transformer_blocks.5.ff.conv_point.weight"
    state[name][0, 0] = 1e-30
    save_file(state, tmp_path / "dst" / WEIGHTS)
    with pytest.raises(DataError, match=f"{name} is not what partial_preservation makes"):
        check_growth(tmp_path / "src", tmp_path / "dst", growth)
    monkeypatch.setattr("sana15.growth.growing.OUTPUTS", ("attn1.to_out.0.", "attn2.to_out.0."))
    with pytest.raises(DataError, match="must equal the source without its last 2 blocks, but it is off by"):
        grow_folder(tmp_path / "src", tmp_path / "other", layers=6, check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]  # what fails its check is not left there


@pytest.mark.parametrize(
    ("kind", "arguments", "code", "message"),
    [
        ("", ["--layers", "6", "--keep", "5"], 2, "keep must be 1 to 4, the blocks of the source; got 5"),
        ("", ["--layers", "1"], 2, "layers must be at least the 2 blocks that are kept, got 1"),
        ("", ["--layers", "6", "--strategy", "widen"], 2, "unknown strategy 'widen'"),
        ("", ["--layers", "6", "--shard-size", "big"], 2, "a size must be written as 5GB"),
        ("target exists", ["--layers", "6"], 2, "dst exists; remove it"),
        ("inside", ["--layers", "6"], 2, "lies inside the source"),
        ("no source", ["--layers", "6"], 3, "none is no folder"),
        ("no config", ["--layers", "6"], 3, "config.json is missing"),
        ("missing block", ["--layers", "6"], 3, "23 tensors missing (transformer_blocks.3."),
        ("other width", ["--layers", "6"], 3, "the config says"),
        ("cut", ["--layers", "6"], 3, "is damaged"),
        ("settings", ["--layers", "6"], 3, "sana15.json is damaged"),
        ("not finite", ["--layers", "6", "--check"], 3, "output is not finite"),
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
    elif kind == "not finite":
        state["proj_out.bias"][0] = torch.inf
        save_file(state, src / WEIGHTS)
    before, entries = files_below(tmp_path), sorted(tmp_path.iterdir())
    origin = tmp_path / "none" if kind == "no source" else src
    assert main(["grow", str(origin), str(dst), *arguments]) == code
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
import sys, time, sana15.growth.folder as g
def slowly(name, shape, seed, width, make=g.grown_weights.__globals__["new_tensor"]):
    time.sleep(0.2)
    return make(name, shape, seed, width)
g.grown_weights.__globals__["new_tensor"] = slowly
g.grow_folder(sys.argv[1], sys.argv[2], layers=8, shard_bytes=150_000)
"""
    process = run_python(slow, src, dst)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob(".dst.partial-*/**/*.safetensors")) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.glob(".dst.partial-*/**/*.safetensors"))  # it was in the middle
    assert not dst.exists()
    grow_folder(src, dst, layers=8, check=True)
    assert files_below(src) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_is_that_of_one_tensor(tmp_path):
    """1600M at a quarter of its width, 20 -> 60 blocks: the peak grows by a few tensors, not by a file or a model."""
    heads = {"num_attention_heads": 18, "num_cross_attention_heads": 6, "cross_attention_head_dim": 96}
    config = SanaConfig.named("1600M", **heads)
    shapes = parameter_shapes(config)
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    (src / "config.json").write_text(json.dumps(config.to_dict()))
    stream_tensors({n: (s, torch.bfloat16, lambda s=s: torch.zeros(s)) for n, s in shapes.items()}, src / WEIGHTS)
    measure = """
import re, sys
import torch
from sana15 import SanaConfig, SanaTransformer
from sana15.growth.folder import grow_folder
def peak():  # of this process; getrusage's begins with its parent's
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
with torch.device("meta"):
    SanaTransformer(SanaConfig.named("mini"))
before = peak()
grow_folder(sys.argv[1], sys.argv[2], layers=60, check=True)
print(peak() - before)
"""
    process = run_python(measure, src, dst)
    grown = int(process.communicate(timeout=300)[0])
    assert process.returncode == 0
    sizes = [path.stat().st_size for path in (src / WEIGHTS, dst / WEIGHTS)]
    (dst / WEIGHTS).unlink()
    # The check holds in fp32 what stands outside the blocks, and one block: 12 % of the source's 20 blocks in bf16.
    assert sizes[1] > 2.8 * sizes[0]
    assert grown < 0.4 * sizes[0], (grown, sizes)


def test_stream_tensors_writes_what_the_library_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7, dtype=torch.float64), "c": torch.tensor(2.5),
        "d": torch.randn(0, 4), "e": torch.randn(4, 6).half().T,
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    stream_tensors({n: (tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}, path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert all((8 + length + header[n]["data_offsets"][0]) % t.itemsize == 0 for n, t in tensors.items())  # aligned
    for name, value in load_file(path).items():
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, tensors.pop(name))
    assert not tensors
    with open_tensors(path) as stored:
        assert stored.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match=r"a has shape \[2\], not \[3\]"):
        stream_tensors({"a": ((3,), torch.float32, lambda: torch.zeros(2))}, Path(tmp_path / "y"))
