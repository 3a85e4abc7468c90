"""Training on after growth: optimizer states carried over by name, learning rates by block, old blocks frozen at first."""

import json

import pytest
import tiny_pipeline
import torch
from grown_folders import source
from model_cases import batch
from safetensors.torch import load_file, save_file

import sana15
import sana_ext.optim
from sana15.growth.folder import grow_folder
from sana15.growth.growing import block_of
from sana15.growth.optimizer import block_groups, block_multipliers, set_learning_rates
from sana15.storage.weights import WEIGHTS
from sana15.training.checkpoints import resume, take_over
from sana15.training.config import load_config
from sana15.training.run import _task, make_optimizer, train
from sana15.training.tasks import TransformerTask

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW8bit": lambda p: sana_ext.optim.AdamW8bit(p, lr=1e-3, min_8bit_size=256),
    "CAME8bit": lambda p: sana_ext.optim.CAME8bit(p, lr=1e-3, min_8bit_size=256),
}


def stepped(model, optimizer, steps=2):
    for seed in range(steps):
        optimizer.zero_grad()
        model(*batch(seed=seed).values()).square().mean().backward()
        optimizer.step()
    return optimizer


def by_name(optimizer, model):
    return {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["partial_preservation", "interleave", "cyclic"])
@pytest.mark.parametrize("way", ["names in the state", "names given", "target"])
def test_optimizer_states_follow_their_blocks(kind, strategy, way):
    make, model = OPTIMIZERS[kind], source(3)
    named = way != "names given"
    optimizer = stepped(model, make([*model.named_parameters()] if named else [*model.parameters()]))
    big = sana15.grow(model, 5, keep=2, strategy=strategy)
    new = make([*big.named_parameters()] if named else [*big.parameters()])
    options = {
        "names given": {"names": [n for n, _ in model.named_parameters()]},
        "target": {"target": new.state_dict()},
    }
    state = sana15.grow_optimizer_state(optimizer.state_dict(), big.growth_map, **options.get(way, {}))
    new.load_state_dict(state)
    before, after = by_name(optimizer, model), by_name(new, big)
    for name, entry in after.items():
        index, inner = block_of(name)
        old = None if index is None else big.growth_map[index]
        if index is not None and old is None:
            assert not entry, name
        else:
            assert equal(entry, before[name if index is None else f"transformer_blocks.{old}.{inner}"]), name
    tensors = [t.data_ptr() for entry in state["state"].values() for t in entry.values() if t.dim()]
    assert len(set(tensors)) == len(tensors)  # copies of a block have states of their own
    stepped(big, new)
    assert all(by_name(new, big).values())


def test_states_of_groups_and_of_a_wrapped_model():
    """Weight decay in one group, none in the other, and the transformer inside of something larger."""
    model = torch.nn.ModuleDict({"text": torch.nn.Linear(3, 3), "transformer": source(3)})

    def groups(module):
        named = [*module.named_parameters()]
        return [
            {"params": [(n, p) for n, p in named if p.dim() > 1]},
            {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
        ]

    optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    big = torch.nn.ModuleDict({"text": model["text"], "transformer": sana15.grow(model["transformer"], 5, keep=3)})
    new = torch.optim.AdamW(groups(big), lr=1e-3)
    new.load_state_dict(sana15.grow_optimizer_state(optimizer.state_dict(), big["transformer"].growth_map))
    assert [g["weight_decay"] for g in new.param_groups] == [0.01, 0.0]
    before, after = by_name(optimizer, model), by_name(new, big)
    for name, entry in after.items():
        is_new = any(f"_blocks.{i}." in name for i in (3, 4))
        assert (not entry) if is_new else equal(entry, before[name]), name


def test_added_norms_start_without_state():
    model = source(2, qk_norm=None)
    optimizer = stepped(model, torch.optim.AdamW(model.named_parameters()))
    big = sana15.grow(model, 4, keep=2, add_qk_norm=True)
    new = torch.optim.AdamW(big.named_parameters())
    state = sana15.grow_optimizer_state(optimizer.state_dict(), big.growth_map, target=new.state_dict())
    new.load_state_dict(state)
    after = by_name(new, big)
    assert not after["transformer_blocks.0.attn1.norm_q.weight"]
    name = "transformer_blocks.1.attn1.to_q.weight"
    assert equal(after[name], by_name(optimizer, model)[name])


def test_a_targets_groups_and_settings_stay():
    model = source(2)
    optimizer = stepped(model, torch.optim.AdamW(model.named_parameters(), lr=1e-3))
    big = sana15.grow(model, 4, keep=2)
    first, others = [], []
    for name, parameter in big.named_parameters():
        (first if "_blocks.0." in name else others).append((name, parameter))
    new = torch.optim.AdamW([{"params": others, "lr": 3e-4}, {"params": first, "lr": 7e-5}], weight_decay=0.3)
    new.load_state_dict(sana15.grow_optimizer_state(optimizer.state_dict(), big.growth_map, target=new.state_dict()))
    assert [(g["lr"], g["weight_decay"], g["param_names"]) for g in new.param_groups] == [
        (3e-4, 0.3, [name for name, _ in others]),
        (7e-5, 0.3, [name for name, _ in first]),
    ]
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert equal(by_name(new, big)[name], by_name(optimizer, model)[name])


def test_states_that_cannot_be_matched_are_refused():
    model = source(2)
    plain = stepped(model, torch.optim.AdamW(model.parameters()), 1).state_dict()
    named = torch.optim.AdamW(model.named_parameters()).state_dict()
    split = torch.optim.AdamW(
        [{"params": [*model.transformer_blocks[0].named_parameters(prefix="transformer_blocks.0")]},
         {"params": [*model.transformer_blocks[1].named_parameters(prefix="transformer_blocks.1")]}]
    ).state_dict()  # fmt: skip
    for state, blocks, options, message in (
        (plain, [0, 1, None], {}, "has no parameter names"),
        (plain, [0, 1, None], {"names": ["a"]}, "parameters, but 1 names were given"),
        (named, [0, 2, None], {}, "names block 2 of 2"),
        (split, [0, 1, None], {}, "is in several groups: pass target"),
        (named, [0], {"target": named}, "lies outside the 1 blocks of the growth map"),
    ):
        with pytest.raises(ValueError, match=message):
            sana15.grow_optimizer_state(state, blocks, **options)


def test_learning_rates_and_freezing_by_block():
    big = sana15.grow(source(2), 3, keep=2)
    rates = block_multipliers(big.growth_map, 0.5, 2.0)
    assert rates == [0.5, 0.5, 2.0]
    optimizer = torch.optim.AdamW(block_groups(big.named_parameters(), rates, big.growth_map, freeze_steps=2))
    found = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert found.keys() == dict(big.named_parameters()).keys()
    start = {n: p.detach().clone() for n, p in big.named_parameters()}
    for step in range(3):
        set_learning_rates(optimizer, 1e-3, step)
        assert found["proj_out.bias"]["lr"] == 1e-3
        assert found["transformer_blocks.1.ff.conv_point.weight"]["lr"] == 0.5e-3
        assert found["transformer_blocks.2.ff.conv_point.weight"]["lr"] == 2e-3
        stepped(big, optimizer, 1)
        for name, p in big.named_parameters():
            frozen = step < 2 and (block_of(name)[0] or 0) < 2 and block_of(name)[0] is not None
            if frozen or name.endswith(("conv_point.weight", "proj_out.bias")):
                assert torch.equal(p, start[name]) == frozen, (name, step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0],), "block 1 lies outside the 1 blocks of the multipliers"),
        (([1.0, -1.0],), "must be at least 0"),
        (([], [], 3), "needs a growth map"),
        (([], [0], 3), "lies outside the 1 blocks of the growth map"),
    ],
)
def test_groups_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_groups(source(2).named_parameters(), *arguments)


def test_training_from_a_grown_folder(tmp_path):
    src = tiny_pipeline.make(tmp_path / "src")
    grow_folder(src, tmp_path / "big", layers=4, keep=2)
    common = ["batch_size=4", "save_every=1", "keep=3", "sample_every=100", "sample_steps=1", "warmup=1", "steps=3"]
    common += [f"transformer.autoencoder={src / 'vae'}", f"transformer.start={tmp_path / 'big'}"]
    out = tmp_path / "run"
    train(load_config(None, [*common, "transformer.freeze_old=2", "transformer.new_lr=2", f"out={out}"]))
    start = load_file(tmp_path / "big" / "transformer" / WEIGHTS)
    moved = {}
    for step in (1, 2, 3):
        weights = load_file(out / f"checkpoint-{step:08d}" / "weights.safetensors")
        name = "transformer_blocks.{}.ff.conv_point.weight"
        moved[step] = [
            not torch.equal(weights["transformer." + name.format(i)], start[name.format(i)].float()) for i in range(4)
        ]
    assert moved == {1: [False, False, True, True], 2: [False, False, True, True], 3: [True] * 4}
    options = ["transformer.new_lr=2", f"transformer.start={src}", f"out={tmp_path / 'x'}"]
    with pytest.raises(ValueError, match="need a grown model"):
        train(load_config(None, [*common, *options]))
    with pytest.raises(ValueError, match="one number for each of the 4 blocks"):
        train(load_config(None, [*common, "transformer.block_lr=[1, 1]", f"out={tmp_path / 'z'}"]))
    (tmp_path / "big" / "sana15.json").write_text(json.dumps({"growth": {"map": [0, 1]}}))
    with pytest.raises(ValueError, match="must name a source block or null for each of the 4 blocks"):
        train(load_config(None, [*common, f"out={tmp_path / 'y'}"]))


def test_rates_of_copied_and_new_blocks(tmp_path):
    src = tiny_pipeline.make(tmp_path / "src")
    grow_folder(src, tmp_path / "big", layers=4, keep=2)
    options = [f"transformer.autoencoder={src / 'vae'}", f"transformer.start={tmp_path / 'big'}"]
    task = TransformerTask.of_config(
        load_config(None, [*options, "transformer.old_lr=0.5", "transformer.new_lr=3"]), "cpu"
    )
    rates = {name: group["lr_multiplier"] for group in task.groups() for name, _ in group["params"]}
    assert {n: rates[f"transformer.transformer_blocks.{n}.ff.conv_point.weight"] for n in range(4)} == {
        0: 0.5, 1: 0.5, 2: 3.0, 3: 3.0}  # fmt: skip
    assert rates["transformer.proj_out.weight"] == 1.0


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "came8bit", "soap"])
def test_a_run_takes_over_the_optimizer_states_of_the_run_before(kind, tmp_path):
    src = tiny_pipeline.make(tmp_path / "src")
    came = ["betas=[0.9, 0.999, 0.9999]"] if kind.startswith("came") else []
    common = ["batch_size=4", "keep=3", "save_every=1", "sample_every=100", "sample_steps=1", "warmup=1", *came]
    common += [f"transformer.autoencoder={src / 'vae'}", f"optimizer={kind}"]
    first = [*common, "steps=2", f"transformer.start={src}", f"out={tmp_path / 'first'}"]
    export = train(load_config(None, first))
    grow_folder(export, tmp_path / "big", layers=4, keep=2, strategy="interleave")
    takes = [f"transformer.start={tmp_path / 'big'}", f"transformer.start_run={tmp_path / 'first'}", "steps=1"]
    second = load_config(None, [*common, *takes, "transformer.new_lr=2", f"out={tmp_path / 'second'}"])

    task = _task(second, "cpu")
    optimizer = make_optimizer(second, task.groups())
    take_over(tmp_path / "first", kind, optimizer, task.growth_map)
    before = _task(load_config(None, first), "cpu")
    source_optimizer = make_optimizer(load_config(None, first), before.groups())
    resume(tmp_path / "first", before.module, source_optimizer)
    old, new = by_name(source_optimizer, before.module), by_name(optimizer, task.module)
    assert task.growth_map == [0, None, None, 1]
    for name, entry in new.items():
        index, inner = block_of(name.removeprefix("transformer."))
        copied = None if index is None else task.growth_map[index]
        if index is not None and copied is None:
            assert not entry, name
            continue
        assert entry, name
        assert equal(entry, old[name if index is None else f"transformer.transformer_blocks.{copied}.{inner}"]), name

    train(second)
    state = load_file(tmp_path / "second" / "checkpoint-00000001" / "optimizer.safetensors")
    assert {int(v.max()) for k, v in state.items() if k.endswith(".step")} == {1, 3}  # new ones and copied ones


def test_optimizer_states_that_cannot_be_taken_over(tmp_path):
    src = tiny_pipeline.make(tmp_path / "src")
    common = ["batch_size=4", "sample_every=100", "sample_steps=1", "steps=1", f"transformer.autoencoder={src / 'vae'}"]
    common += [f"transformer.start={src}"]
    train(load_config(None, [*common, f"out={tmp_path / 'first'}"]))
    takes = [*common, f"out={tmp_path / 'second'}", f"transformer.start_run={tmp_path / 'first'}"]
    with pytest.raises(ValueError, match="was trained with adamw, this run with adamw8bit"):
        train(load_config(None, [*takes, "optimizer=adamw8bit"]))
    with pytest.raises(ValueError, match="holds no checkpoint of a run"):
        train(load_config(None, [*common, f"out={tmp_path / 'x'}", f"transformer.start_run={src}"]))
    with pytest.raises(ValueError, match=r"needs a transformer\.start"):
        load_config(None, [f"transformer.start_run={tmp_path / 'first'}"])
    checkpoint = next((tmp_path / "first").glob("checkpoint-*"))
    weights = load_file(checkpoint / "weights.safetensors")
    name = "transformer.transformer_blocks.0.ff.conv_point.weight"
    save_file(weights | {name: weights[name][:-1].contiguous()}, checkpoint / "weights.safetensors")
    with pytest.raises(ValueError, match=r"conv_point.weight is \[.*, .*conv_point.weight is \["):
        train(load_config(None, [*takes, f"out={tmp_path / 'y'}"]))
