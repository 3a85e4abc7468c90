"""sana_ext.nn against the modules of diffusers whose state dicts they share."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers_models import ExactStock, fused_calls
from helpers import DTYPES, assert_matches, dtype_id, rand
from peft import LoraConfig, get_peft_model
from stock_layers import C, attentions, convolutions
from torch.func import functional_call

import sana_ext

pytestmark = pytest.mark.usefixtures("one_thread")


def as_function(module):
    def function(x, **parameters):
        if x.dtype != torch.float64:
            return functional_call(module, parameters, x)
        with ExactStock():
            return functional_call(module, parameters, x)

    return function


def maker(module, *shape):
    parameters = {name: p.detach().double() for name, p in module.named_parameters()}
    return lambda seed: {"x": rand(seed, *shape)} | parameters


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_linear_attention_matches_diffusers(qk_norm, bias, dtype):
    ours, stock = attentions(qk_norm, bias)
    assert_matches(as_function(ours), as_function(stock), maker(stock, 2, 35, C), dtype)


@pytest.mark.parametrize("norm_type", [None, "rms_norm"])
@pytest.mark.parametrize("residual_connection", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_glumbconv_matches_diffusers(norm_type, residual_connection, dtype):
    ours, stock = convolutions(norm_type=norm_type, residual_connection=residual_connection)
    assert_matches(as_function(ours), as_function(stock), maker(stock, 2, 16, 5, 7), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("make", [lambda: attentions("rms_norm_across_heads"), convolutions], ids=["attention", "ffn"])
def test_dtypes(make, dtype):
    ours, stock = (module.to(dtype) for module in make())
    x = rand(1, 2, 35, C) if isinstance(stock, Attention) else rand(1, 2, 16, 5, 7)
    got, expected = ours(x.to(dtype)), stock(x.to(dtype))
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(
        got, expected, rtol=4 * torch.finfo(dtype).eps + 1e-5, atol=8 * torch.finfo(dtype).eps + 1e-6
    )


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("make", [lambda: attentions("rms_norm_across_heads"), convolutions], ids=["attention", "ffn"])
def test_autocast(make, low):
    ours, stock = make()
    x = (rand(1, 2, 35, C) if isinstance(stock, Attention) else rand(1, 2, 16, 5, 7)).float()
    expected = stock(x)
    with torch.autocast("cpu", low):
        got, peer = ours(x), stock(x)
    assert got.dtype == peer.dtype
    assert (got - expected).abs().max() <= 2 * (peer - expected).abs().max()


def test_tokens_and_images_are_the_same():
    module, _ = convolutions(norm_type="rms_norm")
    image = torch.randn(2, 16, 5, 7)
    tokens = module(image.flatten(2).transpose(1, 2), 5, 7)
    assert torch.equal(tokens.transpose(1, 2).unflatten(2, (5, 7)), module(image))
    with pytest.raises(ValueError, match="need height and width"):
        module(torch.randn(2, 35, 16))


def test_options():
    module = sana_ext.nn.LinearAttention(
        48, heads=3, head_dim=8, bias=True, out_bias=False, dropout=0.5, dtype=torch.float64
    )
    assert module.to_q.weight.shape == (24, 48)
    assert module.to_out[0].bias is None
    assert module(rand(0, 1, 4, 48)).shape == (1, 4, 48)
    assert (module(rand(0, 1, 4, 48)) == 0).any()  # dropout
    assert sana_ext.nn.GLUMBConv(4, 6, residual_connection=False, device="meta").conv_point.weight.device.type == "meta"
    assert sana_ext.nn.GLUMBConv(4, 6, residual_connection=False)(torch.randn(1, 4, 2, 3)).shape == (1, 6, 2, 3)


def test_eps_is_the_denominators():
    x = 1e-6 * rand(0, 1, 4, C).float()
    module = sana_ext.nn.LinearAttention(C)
    strict = module(x)
    module.eps = 1.0
    assert (module(x) - module.to_out[0].bias).abs().max() < 1e-3 * (strict - module.to_out[0].bias).abs().max()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sana_ext.nn.LinearAttention(64, qk_norm="layer_norm"), "qk_norm must be None or"),
        (lambda: sana_ext.nn.LinearAttention(65), "dim 65 is not a multiple of head_dim 32"),
        (lambda: sana_ext.nn.GLUMBConv(4, 4, norm_type="batch_norm"), "norm_type must be None or"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("make", [lambda: attentions(None)[0], lambda: convolutions()[0]], ids=["attention", "ffn"])
def test_lora_is_applied_and_hooks_fire(make):
    module = make()
    x = torch.randn(2, 35, C) if isinstance(module, sana_ext.nn.LinearAttention) else torch.randn(2, 16, 5, 7)
    base = module(x)
    assert fused_calls(lambda: module(x))
    targets = ["to_v", "to_out.0"] if x.dim() == 3 else ["conv_inverted", "conv_point"]
    adapted = get_peft_model(copy.deepcopy(module), LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    got = adapted(x)
    assert (got - base).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(got, merged(x), rtol=1e-3, atol=1e-4)
    seen = []
    layer = module.to_v if x.dim() == 3 else module.conv_depth
    layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(module(x), base, rtol=1e-4, atol=1e-5)
    assert seen == [1]
