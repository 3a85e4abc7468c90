"""Patched models whose layers are changed one by one, before and after patch, against the stock model so changed."""

import copy

import pytest
import torch
from diffusers_models import assert_fused, run, transformer
from module_changes import Scaled, adapt, leaves, parametrize, record, sloped
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

import sana_ext

pytestmark = pytest.mark.usefixtures("fused_parts", "one_thread")
FIRST = "transformer_blocks.0"


def both(change, first, **config):
    """(stock output, patched output) with the change made before or after patch."""
    outputs = []
    for patched in (False, True):
        model = transformer(**({"num_layers": 1} | config))
        if patched and first == "patch":
            sana_ext.patch(model)
        change(model)
        if patched:
            sana_ext.patch(model)
        outputs.append(run(model))
    return outputs


def assert_close(got, expected, name=""):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5, msg=name or None)


def norm_over_tokens(name):
    return lambda model: setattr(model.transformer_blocks[0], name, nn.LayerNorm((35, 96), elementwise_affine=False))


def buffered(name, weight, factor):
    def change(model):
        layer = model.get_submodule(f"{FIRST}.{name}")
        value = layer._parameters.pop(weight, None)
        layer.register_buffer(weight, torch.full((96,), factor) if value is None else value.detach() * factor)

    return change


def broadcast_table(model):
    block = model.transformer_blocks[0]
    block.scale_shift_table = nn.Parameter(torch.tensor([[0.1], [0.2], [0.9], [-0.1], [0.3], [1.1]]))


def circular(model):
    layer = model.get_submodule(f"{FIRST}.ff.conv_depth")
    layer._conv_forward = lambda x, weight, bias: nn.functional.conv2d(
        nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, groups=layer.groups
    )


def buffered_table(model):
    block = model.transformer_blocks[0]
    block.register_buffer("scale_shift_table", block._parameters.pop("scale_shift_table").detach())


CHANGES = {
    "norm1 over tokens": norm_over_tokens("norm1"),
    "norm2 over tokens": norm_over_tokens("norm2"),
    "weight of norm1 a buffer": buffered("norm1", "weight", 0.7),
    "bias of to_out a buffer": buffered("attn1.to_out.0", "bias", 5.0),
    "bias of to_k a buffer": buffered("attn2.to_k", "bias", 5.0),
    "table a buffer": buffered_table,
    "table of one channel": broadcast_table,
    "circular": circular,
}


@pytest.mark.parametrize("first", ["change", "patch"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_of_another_kind(change, first):
    stock, patched = both(change, first)
    assert_close(patched, stock)


def table(model):
    scaled = Scaled()
    register_parametrization(model.transformer_blocks[0], "scale_shift_table", scaled)
    return scaled


@pytest.mark.parametrize("first", ["change", "patch"])
def test_parametrised_table(first):
    """It is asked for once in a call, the rest of the block stays fused, and every order of taking both off works."""
    stock, patched = both(table, first)
    assert_close(patched, stock)
    model = transformer(num_layers=1)
    if first == "patch":
        sana_ext.patch(model)
    scaled = table(model)
    assert sana_ext.patch(model).replaced == [FIRST]
    before = scaled.asked
    run(model).sum().backward()
    assert scaled.asked == before + 1
    assert scaled.factor.grad is not None
    assert_fused(model)
    twin = copy.deepcopy(model)
    assert_close(run(twin), stock)
    assert sana_ext.unpatch(twin) == 1
    assert torch.equal(run(copy.deepcopy(twin)), stock)
    remove_parametrizations(twin.transformer_blocks[0], "scale_shift_table")
    assert torch.equal(run(twin), stock)
    remove_parametrizations(model.transformer_blocks[0], "scale_shift_table")
    assert_fused(model)
    assert_close(run(model), stock)
    assert sana_ext.unpatch(model) == 1
    assert type(model.transformer_blocks[0]) is type(transformer(num_layers=1).transformer_blocks[0])


def test_parametrised_table_of_a_model_that_keeps_its_text():
    model = transformer(num_layers=1)
    register_parametrization(model, "scale_shift_table", Scaled())
    expected = run(model)
    sana_ext.patch(model, cache_text=True)
    with torch.no_grad():
        assert_close(run(model), expected)
    remove_parametrizations(model, "scale_shift_table")
    assert_close(run(model), expected)
    sana_ext.unpatch(model)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("cache_text", [False, True])
@pytest.mark.parametrize("which", ["every module", "layers"])
def test_modules_are_called_as_in_the_stock_model(which, cache_text):
    model = transformer(num_layers=1)
    inside = [n for n, m in model.named_modules() if n.startswith(FIRST) and not isinstance(m, nn.ModuleList)]
    seen = record(model, [n for n in leaves(model) if n in inside] if which == "layers" else inside)
    with torch.no_grad():
        run(model)
        stock = list(seen)
        seen.clear()
        sana_ext.patch(model, cache_text=cache_text)
        run(model)
    assert [name for name, _ in seen] == [name for name, _ in stock]
    for (name, expected), (_, got) in zip(stock, seen):
        for a, b in zip(got, expected):
            assert_close(a, b, name)


@pytest.mark.parametrize("change", [sloped, adapt, parametrize])
def test_each_layer_may_be_changed(change):
    stock = transformer(num_layers=1)
    patched = copy.deepcopy(stock)
    sana_ext.patch(patched)
    names = leaves(stock) if change is not parametrize else [n for n, _ in stock.named_parameters()]
    for name in [n for n in names if n.startswith(FIRST) or n == "scale_shift_table"]:
        outputs = []
        for model in (patched, stock):
            changed = change(model, name)
            outputs.append(run(model).detach())
            if change is sloped:
                changed.remove()
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4, msg=name)
