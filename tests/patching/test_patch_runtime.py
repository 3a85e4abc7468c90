"""Patched models under hooks, offloading and casting, and calls that diffusers serves in its own way."""

import copy

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers_models import FUSED_BLOCK, TINY, assert_agrees, assert_fused, fused_calls, run, transformer
from torch import nn

import sana_ext
from sana_ext.patching import block as fused
from sana_ext.patching import guards

pytestmark = pytest.mark.usefixtures("fused_parts", "one_thread")
FIRST = "transformer_blocks.0"
CANCELS = ("attn1.to_q", "attn1.norm_q")  # linear attention is a quotient: a factor of q has no effect
CORE = {
    "attn1": "linear_attention_forward",
    "attn1.norm_q": "linear_attention_forward",
    "norm1": "norm_modulate_forward",
    "norm2": "residual_norm_modulate_forward",
    "ff": "dwconv_glu_forward",
    "ff.conv_depth": "dwconv_glu_forward",
}


# Hooks


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name", ["attn1", "attn1.to_q", "attn1.norm_q", "attn2", "attn2.to_out.0", "norm1", "norm2", "ff", "ff.conv_depth"]
)
def test_forward_hook_fires_and_may_change_the_output(name, when):
    model = transformer()
    expected = run(model)
    if when == "after":
        sana_ext.patch(model)
    seen = []

    def double(module, args, output):
        seen.append(name)
        return 2 * output

    handle = model.get_submodule(f"{FIRST}.{name}").register_forward_hook(double)
    report = sana_ext.patch(model)
    assert len(report.replaced) == 2
    assert "has hooks" in " ".join(report.skipped.values()) or name == "attn2.to_out.0"
    seen.clear()
    assert (assert_agrees(model) - expected).abs().max() > 1e-4 or name in CANCELS
    assert seen == [name] * 2  # once patched, once stock
    handle.remove()
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=2e-5)
    assert_fused(model)


@pytest.mark.parametrize("name", CORE)
def test_pre_hooks_and_backward_hooks_fire(name):
    model = transformer(num_layers=1)
    sana_ext.patch(model)
    seen = []
    module = model.get_submodule(f"{FIRST}.{name}")
    module.register_forward_pre_hook(lambda *_: seen.append("forward"))
    run(model)
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    run(model).sum().backward()
    assert seen == ["forward", "forward", "backward"]
    calls = fused_calls(lambda: run(model))
    assert calls[CORE[name]] == 0


def test_hooks_on_the_block_itself_keep_it_fused():
    model = transformer()
    sana_ext.patch(model)
    seen = []
    model.transformer_blocks[0].register_forward_hook(lambda *_: seen.append("block"))
    assert_fused(model)
    assert seen == ["block"]


def test_global_hooks_run_stock():
    model = transformer()
    sana_ext.patch(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert not fused_calls(lambda: run(model))
    finally:
        handle.remove()
    assert nn.Linear in seen
    assert_fused(model)


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.parametrize("library", ["diffusers", "accelerate"])
def test_block_hooked_before_patch_is_refused_loudly(library):
    model = transformer()
    block = model.transformer_blocks[0]
    if library == "diffusers":
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Doubling(), "doubling")
    else:
        add_hook_to_module(block, AccelerateHook())
    report = sana_ext.patch(model)
    assert report.replaced == ["transformer_blocks.1"]
    assert "forward was replaced on the instance" in report.skipped[FIRST]
    assert "patch before adding hooks" in str(report)
    assert type(block) is SanaTransformerBlock
    assert_fused(model, blocks=1)


@pytest.mark.parametrize("library", ["diffusers", "accelerate"])
def test_block_hooked_after_patch(library):
    """The hook holds the fused forward; unpatch reaches through it, although the hook stays."""
    model = transformer()
    sana_ext.patch(model)
    expected = run(model)
    block = model.transformer_blocks[0]
    if library == "diffusers":
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Doubling(), "doubling")
    else:
        add_hook_to_module(block, AccelerateHook())
    assert_fused(model)
    hooked = run(model)
    assert torch.equal(hooked, expected) == (library == "accelerate")
    assert sana_ext.unpatch(model) == 2
    assert not fused_calls(lambda: run(model))
    torch.testing.assert_close(run(model), hooked, rtol=1e-4, atol=2e-5)
    if library == "accelerate":
        remove_hook_from_module(block)
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("first", ["cast", "patch"])
def test_layerwise_casting(first):
    """Weights rest in fp8 and are cast up by a hook around each layer's own forward."""
    model = transformer()
    if first == "patch":
        sana_ext.patch(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    report = sana_ext.patch(model)
    assert "forward replaced on the instance" in report.skipped[f"{FIRST}.attn1.to_q"]
    assert_agrees(model)
    assert_fused(model, without=("dwconv_glu_forward",))


@pytest.mark.parametrize("first", ["offload", "patch"])
def test_sequential_offload(first):
    """accelerate keeps weights on meta and brings each layer's in around its own forward."""
    model = transformer()
    expected = run(model)
    if first == "patch":
        sana_ext.patch(model)
    cpu_offload(model, execution_device="cpu")
    assert model.transformer_blocks[0].attn1.to_q.weight.device.type == "meta"
    report = sana_ext.patch(model)
    assert report.skipped
    if first == "offload":
        assert report.replaced == []
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=2e-5)


def test_group_offload_of_blocks_and_leaves():
    for kind in ("block_level", "leaf_level"):
        model = transformer()
        expected = run(model)
        sana_ext.patch(model)
        options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **options)
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=2e-5)


def test_empty_weights_are_left_alone():
    with init_empty_weights():
        model = transformer(TINY)
    assert sana_ext.patch(model).replaced == []


# Calls that diffusers serves in its own way


def test_calls_with_other_arguments():
    """Missing mask, bias instead of mask, one text row per token, no text, unexpected lengths: as diffusers does."""
    block = transformer(num_layers=1).transformer_blocks[0]
    fast = copy.deepcopy(block)
    sana_ext.patch(fast)
    x, text, t = torch.randn(2, 12, 96), torch.randn(2, 5, 96), torch.randn(2, 6 * 96)
    row, full = -10000.0 * torch.rand(2, 1, 5).round(), -10000.0 * torch.rand(2, 12, 5).round()
    for mask in (None, row, full, row > -1, row.requires_grad_()):
        torch.testing.assert_close(
            fast(x, None, text, mask, t, 3, 4), block(x, None, text, mask, t, 3, 4), rtol=1e-4, atol=2e-5
        )
    torch.testing.assert_close(
        fast(x, None, None, None, t, 3, 4), block(x, None, None, None, t, 3, 4), rtol=1e-4, atol=2e-5
    )
    named = {"encoder_hidden_states": text, "timestep": t, "height": 4, "width": 3}
    torch.testing.assert_close(fast(x, **named), block(x, **named), rtol=1e-4, atol=2e-5)
    columns = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(fast(columns, **named), fast(x, **named))


@pytest.mark.parametrize(
    "changes",
    [
        {"height": 5},
        {"timestep": None},
        {"timestep": torch.randn(2, 7)},
        {"encoder_hidden_states": torch.randn(2, 5, 3)},
    ],
    ids=["height", "no_timestep", "timestep", "text"],
)
def test_bad_calls_raise(changes):
    block = transformer(num_layers=1).transformer_blocks[0]
    sana_ext.patch(block)
    given = {"encoder_hidden_states": torch.randn(2, 5, 96), "timestep": torch.randn(2, 576), "height": 3, "width": 4}
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        block(torch.randn(2, 12, 96), **(given | changes))


def test_fallbacks_at_run_time_are_said_once(caplog):
    model = transformer()
    sana_ext.patch(model)
    fused._said.clear()
    model.transformer_blocks[0].ff.register_forward_hook(lambda *_: None)
    run(model)
    run(model)
    said = [record.message for record in caplog.records if record.name == "sana_ext"]
    assert said == ["sana_ext: ff runs diffusers' own code: has hooks"]


def test_every_fused_op_of_a_block_is_counted():
    assert set(FUSED_BLOCK) == {op for ops in guards.KERNELS.values() for op in ops[0]}
