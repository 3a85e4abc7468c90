"""Patched models whose parts are replaced: LoRA, foreign attention processors, foreign and quantised layers."""

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
)
from diffusers_models import assert_agrees, assert_fused, fused_calls, inputs, run, transformer
from peft import LoraConfig
from torch import nn

import sana_ext

pytestmark = pytest.mark.usefixtures("fused_parts", "one_thread")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "conv_inverted", "conv_point"]
FIRST = "transformer_blocks.0"


def lora(*targets):
    return LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=list(targets))


def with_adapter(model, *targets):
    torch.manual_seed(2)
    model.add_adapter(lora(*targets))
    return model


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
@pytest.mark.parametrize("first", ["lora", "patch"])
def test_lora_before_and_after_patch(targets, first):
    model = transformer()
    base = run(model)
    if first == "patch":
        sana_ext.patch(model)
    with_adapter(model, *targets)
    report = sana_ext.patch(model)
    assert len(report.replaced) == 2
    assert "lora" in report.skipped[f"{FIRST}.attn1.to_q"]
    adapted = assert_agrees(model)
    assert (adapted - base).abs().max() > 1e-2
    # The projections are LoRA's; the attention core and the norms stay fused, the FFN unless its convolutions changed.
    assert_fused(model, without=("dwconv_glu_forward",) if targets is EVERYTHING else ())
    assert (f"{FIRST}.ff" in report.skipped) == (targets is EVERYTHING)


def test_lora_on_the_ffn_alone_leaves_the_rest_fused():
    model = with_adapter(transformer(), "conv_inverted")
    report = sana_ext.patch(model)
    assert set(report.skipped) == {f"{FIRST}.ff", "transformer_blocks.1.ff"}
    assert "conv_inverted is a peft" in report.skipped[f"{FIRST}.ff"]
    assert_fused(model, without=("dwconv_glu_forward",))
    assert_agrees(model)


def test_lora_fuse_unfuse_scale_and_unload():
    model = transformer()
    sana_ext.patch(model)
    base = run(model)
    with_adapter(model, *EVERYTHING)
    adapted = assert_agrees(model)
    model.fuse_lora()
    torch.testing.assert_close(assert_agrees(model), adapted, rtol=1e-3, atol=1e-4)
    model.unfuse_lora()
    torch.testing.assert_close(assert_agrees(model), adapted, rtol=1e-3, atol=1e-4)
    model.set_adapters(["default"], [0.5])
    assert (assert_agrees(model) - adapted).abs().max() > 1e-3
    model.disable_adapters()
    torch.testing.assert_close(assert_agrees(model), base, rtol=1e-4, atol=1e-5)
    model.unload_lora()
    torch.testing.assert_close(assert_agrees(model), base, rtol=1e-4, atol=1e-5)  # merging rounds the base weights
    assert_fused(model)


def test_lora_training_gradients_match_stock():
    gradients = []
    for patched in (False, True):
        model = with_adapter(transformer(), *EVERYTHING).train()
        if patched:
            sana_ext.patch(model)
        run(model).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    stock, fused = gradients
    assert stock.keys() == fused.keys()
    assert all("lora" in name for name in stock)
    for name, g in stock.items():
        torch.testing.assert_close(fused[name], g, rtol=1e-4, atol=1e-5 * g.abs().max().item() + 1e-9, msg=name)


def test_lora_under_autocast():
    model = with_adapter(transformer(), *ATTENTION)
    sana_ext.patch(model)
    with torch.no_grad(), torch.autocast("cpu"):
        fused = run(model)
        sana_ext.unpatch(model)
        stock = run(model)
    assert fused.dtype == stock.dtype == torch.bfloat16
    assert (fused.float() - stock.float()).norm() < 2e-2 * stock.float().norm()


@pytest.mark.parametrize("processor", [PAGIdentitySanaLinearAttnProcessor2_0, PAGCFGSanaLinearAttnProcessor2_0])
def test_pag_processors_are_honoured(processor):
    """Perturbed-attention guidance swaps the processor of some self-attentions and puts the old one back."""
    batch = 3 if processor is PAGCFGSanaLinearAttnProcessor2_0 else 2
    model = transformer(qk_norm=None)
    given = inputs(model, batch=batch, masked=False) | {"timestep": torch.full((batch,), 4)}
    plain = model(**given).sample
    sana_ext.patch(model)
    before = model.transformer_blocks[0].attn1.processor
    model.transformer_blocks[0].attn1.processor = processor()
    calls = fused_calls(lambda: model(**given))
    assert calls["linear_attention_forward"] == 1
    assert calls["dwconv_glu_forward"] == 2
    fused = model(**given).sample
    sana_ext.unpatch(model)
    stock = model(**given).sample
    torch.testing.assert_close(fused, stock, rtol=1e-4, atol=2e-5)
    assert (stock - plain).abs().max() > 1e-3
    report = sana_ext.patch(model)
    assert report.skipped == {f"{FIRST}.attn1": f"has the processor {processor.__name__}"}
    model.transformer_blocks[0].attn1.processor = before
    assert model.transformer_blocks[0].attn1.processor is before
    calls = fused_calls(lambda: model(**given))
    assert calls["linear_attention_forward"] == 2


def test_set_attn_processor_after_patch():
    """A single processor lands on both attentions of every block; the stock ones put back serve fused again."""
    model = transformer(qk_norm=None)
    stock_processors = model.attn_processors
    sana_ext.patch(model)
    expected = run(model)
    model.set_attn_processor(AttnProcessor2_0())
    report = sana_ext.patch(model)
    assert set(report.skipped) == {f"transformer_blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2)}
    foreign = assert_agrees(model)
    assert (foreign - expected).abs().max() > 1e-3
    assert_fused(model, without=("linear_attention_forward",))
    model.set_attn_processor(stock_processors)
    assert torch.equal(run(model), expected)
    assert_fused(model)


def test_subclassed_processor_is_foreign():
    class Twice(SanaLinearAttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    model = transformer()
    sana_ext.patch(model)
    before = run(model)
    model.transformer_blocks[1].attn1.set_processor(Twice())
    assert (assert_agrees(model) - before).abs().max() > 1e-2


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class IntegerLinear(nn.Module):
    """The shape of a quantised layer: an integer weight, and arithmetic that only the module itself knows."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Marked(nn.Parameter):
    """A tensor subclass as quantised weights are; what is computed with it is plain."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def replaced_by_subclass(model, name):
    model.get_submodule(name).__class__ = Scaled


def quantised(model, name):
    model.set_submodule(name, IntegerLinear(model.get_submodule(name)))


def subclass_weight(model, name):
    layer = model.get_submodule(name)
    layer.weight = Marked(layer.weight.detach())


def parametrized(model, name):
    nn.utils.parametrizations.spectral_norm(model.get_submodule(name)).eval()


@pytest.mark.parametrize("layer", ["attn1.to_k", "attn1.to_out.0", "attn2.to_q", "attn2.to_v", "ff.conv_point"])
@pytest.mark.parametrize("change", [replaced_by_subclass, quantised, subclass_weight, parametrized])
def test_foreign_layer_is_called(change, layer):
    if layer.startswith("ff") and change in (replaced_by_subclass, quantised):
        pytest.skip("a Linear's change")
    model = transformer()
    sana_ext.patch(model)
    change(model, f"{FIRST}.{layer}")
    report = sana_ext.patch(model)
    expected = {f"{FIRST}.ff" if layer.startswith("ff") else f"{FIRST}.{layer}"}
    assert set(report.skipped) == expected, report
    assert_agrees(model)
    if not layer.startswith("ff"):
        assert_fused(model)


def test_dilated_convolution_is_not_mistaken_for_the_stencil():
    model = transformer()
    sana_ext.patch(model)
    before = run(model)
    depth = model.transformer_blocks[0].ff.conv_depth
    depth.dilation, depth.padding = (2, 2), (2, 2)
    assert (assert_agrees(model) - before).abs().max() > 1e-3
    assert "conv_depth is not a plain 3x3" in sana_ext.patch(model).skipped[f"{FIRST}.ff"]


def test_other_norms_keep_their_attention():
    model = transformer()
    attn1, attn2 = model.transformer_blocks[0].attn1, model.transformer_blocks[1].attn2
    attn1.norm_q, attn1.norm_k = nn.LayerNorm(96), nn.LayerNorm(96)
    attn2.norm_q = nn.LayerNorm(96)
    model.transformer_blocks[1].attn1.norm_q.eps = 1e-3
    report = sana_ext.patch(model)
    assert report.skipped == {
        f"{FIRST}.attn1": "norm_q is a torch.nn.modules.normalization.LayerNorm, not RMSNorm",
        "transformer_blocks.1.attn1": "norm_q and norm_k differ in eps",
    }
    assert_agrees(model)


def test_eps_of_the_norms_is_read_from_the_model():
    model = transformer(norm_eps=0.3)
    for block in model.transformer_blocks:
        for attn in (block.attn1, block.attn2):
            attn.norm_q.eps = attn.norm_k.eps = 0.7
    report = sana_ext.patch(model)
    assert report.skipped == {}
    assert_agrees(model)


def test_rescaled_output_and_dropout():
    model = transformer(dropout=0.5)
    for block in model.transformer_blocks:
        block.attn2.rescale_output_factor = 2.0
    sana_ext.patch(model)
    assert_agrees(model)
    model.train()
    torch.manual_seed(3)
    fused = run(model)
    sana_ext.unpatch(model)
    torch.manual_seed(3)
    torch.testing.assert_close(fused, run(model), rtol=1e-4, atol=2e-5)
