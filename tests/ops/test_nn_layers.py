"""sana_ext.nn's modules and those of diffusers under the same changes of their layers."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers_models import fused_calls
from module_changes import adapt, leaves, parametrize, record, sloped
from stock_layers import C, attentions, convolutions
from torch import nn
from torch.nn.utils import prune

import sana_ext

pytestmark = pytest.mark.usefixtures("one_thread")
F2 = 80  # hidden channels of `convolutions`, twice


def conv(name, *sizes, **options):
    def change(module):
        torch.manual_seed(3)
        setattr(module, name, nn.Conv2d(*sizes, **options))

    return change


def buffered(name, weight):
    def change(module):
        layer = module.get_submodule(name)
        value = layer._parameters.pop(weight).detach() * 1.5
        layer.register_buffer(weight, value)

    return change


def circular(module):
    """As pictures that tile are made: the method behind the forward is replaced on the instance."""
    layer = module.conv_depth
    layer._conv_forward = lambda x, weight, bias: nn.functional.conv2d(
        nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, groups=layer.groups
    )


def normalised(module):
    nn.utils.parametrizations.weight_norm(module.conv_depth)
    module.conv_depth.parametrizations.weight.original0.data.mul_(2)


def attribute(name, **values):
    return lambda module: [setattr(module.get_submodule(name), key, value) for key, value in values.items()]


CONVOLUTIONS = {
    "inverted 3x3": conv("conv_inverted", 16, F2, 3, padding=1),
    "inverted without bias": conv("conv_inverted", 16, F2, 1, bias=False),
    "inverted in groups": conv("conv_inverted", 16, F2, 1, groups=4),
    "inverted with padding": conv("conv_inverted", 16, F2, 1, padding=1),
    "depth dilated": conv("conv_depth", F2, F2, 3, padding=2, dilation=2, groups=F2),
    "depth without padding": conv("conv_depth", F2, F2, 3, groups=F2),
    "depth padded the same": conv("conv_depth", F2, F2, 3, padding="same", groups=F2),
    "depth strided": conv("conv_depth", F2, F2, 3, padding=1, stride=2, groups=F2),
    "depth reflected": conv("conv_depth", F2, F2, 3, padding=1, padding_mode="reflect", groups=F2),
    "depth 5x5": conv("conv_depth", F2, F2, 5, padding=2, groups=F2),
    "depth not depthwise": conv("conv_depth", F2, F2, 3, padding=1, groups=F2 // 2),
    "depth without bias": conv("conv_depth", F2, F2, 3, padding=1, groups=F2, bias=False),
    "depth's weight 1x1": lambda m: setattr(m.conv_depth, "weight", nn.Parameter(torch.randn(F2, 1, 1, 1))),
    "depth circular": circular,
    "depth's dilation set later": attribute("conv_depth", dilation=(2, 2), padding=(2, 2)),
    "bias a buffer": buffered("conv_inverted", "bias"),
    "point with bias": conv("conv_point", F2 // 2, 16, 1),
    "point 3x3": conv("conv_point", F2 // 2, 16, 3, padding=1),
    "point strided": conv("conv_point", F2 // 2, 16, 1, stride=2),
    "norm's eps": attribute("norm", eps=0.5),
    "weight norm": normalised,
    "pruned": lambda m: prune.l1_unstructured(m.conv_inverted, "weight", 0.5),
}


@pytest.mark.parametrize("change", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_of_another_kind(change):
    ours, stock = convolutions(norm_type="rms_norm", residual_connection=False)
    x = torch.randn(2, 16, 5, 7)
    before = stock(x)
    for module in (ours, stock):
        torch.manual_seed(4)
        change(module)
    expected, got = stock(x), ours(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (
        expected.shape != before.shape
        or (expected - before).abs().max() > 1e-4
        or change is CONVOLUTIONS["depth padded the same"]
    )
    tokens = ours(x.flatten(2).transpose(1, 2), 5, 7)
    torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def norms_of(make):
    def change(module):
        module.norm_q, module.norm_k = make(), make()

    return change


ATTENTIONS = {
    "other eps of one": attribute("norm_k", eps=2.0),
    "other eps of the other": attribute("norm_q", eps=2.0),
    "other eps of both": lambda m: [attribute(n, eps=0.7)(m) for n in ("norm_q", "norm_k")],
    "LayerNorm": norms_of(lambda: nn.LayerNorm(C)),
    "LayerNorm over tokens": norms_of(lambda: nn.LayerNorm((16, C), elementwise_affine=False)),
    "norm without weight": norms_of(lambda: nn.RMSNorm(C, 0.1, elementwise_affine=False)),
    "norm with the dtype's eps": norms_of(lambda: nn.RMSNorm(C)),
    "Identity": norms_of(nn.Identity),
    "no norm of q": lambda m: setattr(m, "norm_q", None),
    "no norm of k": lambda m: setattr(m, "norm_k", None),
    "bias a buffer": buffered("to_q", "bias"),
    "weight a buffer": buffered("norm_q", "weight"),
    "dropped projection": lambda m: setattr(m, "to_v", nn.Sequential(m.to_v, nn.Tanh())),
}


@pytest.mark.parametrize("change", ATTENTIONS.values(), ids=ATTENTIONS)
def test_norms_and_projections_of_another_kind(change):
    ours, stock = attentions("rms_norm_across_heads", bias=True)
    for module in (ours, stock):
        change(module)
    x = torch.randn(2, 16, C)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["attention", "ffn"])
def modules(request):
    """(ours, diffusers', input)"""
    if request.param == "attention":
        return *attentions("rms_norm_across_heads"), torch.randn(2, 16, C)
    return *convolutions(norm_type="rms_norm"), torch.randn(2, 16, 5, 7)


def test_layers_are_called_as_in_diffusers(modules):
    *pair, x = modules
    names = leaves(pair[0])
    stock, ours = (record(module, names) for module in pair[::-1])
    for module in pair:
        module(x)
    assert [name for name, _ in ours] == [name for name, _ in stock]
    for (name, expected), (_, got) in zip(stock, ours):
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", [sloped, adapt], ids=["hook", "adapter"])
def test_each_layer_may_be_changed(modules, change):
    *pair, x = modules
    for name in leaves(pair[0]):
        with torch.no_grad():
            outputs = []
            for module in pair:
                changed = change(module, name)
                outputs.append(module(x))
                if change is sloped:
                    changed.remove()
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4, msg=name)


def test_each_weight_may_be_parametrised(modules):
    *pair, x = modules
    for name, _ in list(pair[0].named_parameters()):
        gradients = []
        for module in pair:
            scaled = parametrize(module, name)
            gradients.append(torch.autograd.grad(module(x).square().mean(), scaled.factor)[0])
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6, msg=name)


def test_plain_layers_still_run_fused(modules):
    ours, stock, x = modules
    op = "linear_attention_forward" if isinstance(stock, Attention) else "dwconv_glu_forward"
    assert fused_calls(lambda: ours(x))[op] == 1


def test_forward_of_all_layers_of_a_class_replaced(monkeypatch):
    """As some programs apply adapters: torch's class gets another forward."""
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) * 2)
    ours, stock = attentions(None)
    x = torch.randn(2, 16, C)
    torch.testing.assert_close(ours(x), stock(x))


def test_global_hooks_see_the_layers():
    ours, _ = attentions("rms_norm_across_heads")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        ours(torch.randn(2, 16, C))
    finally:
        handle.remove()
    assert seen[:5] == [ours.to_q, ours.to_k, ours.to_v, ours.norm_q, ours.norm_k]


def test_is_plain():
    layer = nn.Linear(2, 2)
    assert sana_ext.nn.is_plain(layer, nn.Linear, "weight", "bias")
    assert not sana_ext.nn.is_plain(layer, nn.Module)
    assert not sana_ext.nn.is_plain(None, nn.Linear)
    layer.register_forward_hook(lambda *_: None).remove()
    assert sana_ext.nn.is_plain(layer, nn.Linear)
    nn.utils.parametrizations.weight_norm(layer)
    assert not sana_ext.nn.is_plain(layer, nn.Linear)


def test_eps_of_the_norms_set_on_the_attention():
    ours, stock = attentions("rms_norm_across_heads")
    ours.norm_eps = stock.norm_q.eps = stock.norm_k.eps = 0.4
    x = torch.randn(2, 16, C)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
    assert ours.norm_eps == 0.4
