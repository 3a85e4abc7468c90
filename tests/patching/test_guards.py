"""Each reason for which a block, a part or a layer keeps diffusers' own code, one by one."""

import pytest
import torch
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers_models import assert_agrees, fused_calls, run, transformer
from torch import nn

import sana_ext
from sana_ext.patching import guards

pytestmark = pytest.mark.usefixtures("fused_parts", "one_thread")
FIRST = "transformer_blocks.0"
OPERAND = guards.Operand(torch.device("cpu"), torch.float32, None)
PARTS = tuple(guards.KERNELS)


class Marked(nn.Parameter):
    """A tensor subclass as quantised weights are; what is computed with it is plain."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def affine_norm(block):
    block.norm1 = nn.LayerNorm(96, eps=1e-6)
    nn.init.normal_(block.norm1.weight)


def biased_point(block):
    point = block.ff.conv_point
    block.ff.conv_point = nn.Conv2d(point.in_channels, point.out_channels, 1)


def broadcast_weight(block):
    block.attn1.norm_q.weight = nn.Parameter(torch.full((1,), 1.3))


def marked_bias(block):
    layer = block.attn1.to_out[0]
    layer.bias = Marked(layer.bias.detach())


# change of a block: (part that keeps diffusers' code, reason)
CHANGES = {
    "affine norm": (affine_norm, "norm1", "has affine parameters"),
    "broadcast norm": (broadcast_weight, "attn1", "norm_q is not an RMSNorm over all channels"),
    "subclassed bias": (marked_bias, "attn1.to_out.0", "has a bias of type Marked"),
    "other activation": (lambda b: setattr(b.ff, "nonlinearity", nn.GELU()), "ff", "nonlinearity is a"),
    "residual of its own": (lambda b: setattr(b.ff, "residual_connection", True), "ff", "a residual of its own"),
    "biased last convolution": (biased_point, "ff", "conv_point has a bias"),
    "reflected border": (lambda b: setattr(b.ff.conv_depth, "padding_mode", "reflect"), "ff", "is not a plain 3x3"),
}


@pytest.mark.parametrize(("change", "part", "reason"), CHANGES.values(), ids=CHANGES)
def test_changed_part_keeps_its_own_code(change, part, reason):
    model = transformer()
    sana_ext.patch(model)
    before = run(model)
    change(model.transformer_blocks[0])
    if part == "ff":  # the stock module must be able to run what it was turned into
        depth = model.transformer_blocks[0].ff.conv_depth
        depth._reversed_padding_repeated_twice = [1, 1, 1, 1]
    report = sana_ext.patch(model)
    assert list(report.skipped) == [f"{FIRST}.{part}"]
    assert reason in report.skipped[f"{FIRST}.{part}"]
    after = assert_agrees(model)
    if part != "attn1.to_out.0":
        assert (after - before).abs().max() > 1e-4


def test_block_with_another_forward():
    class Other(SanaTransformerBlock):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    model = transformer()
    model.transformer_blocks[0].__class__ = Other
    report = sana_ext.patch(model)
    assert report.skipped == {FIRST: "Other overrides forward"}
    assert type(model.transformer_blocks[0]) is Other


def test_subclassed_block_with_the_stock_forward_is_fused():
    class Same(SanaTransformerBlock):
        pass

    model = transformer(num_layers=1)
    model.transformer_blocks[0].__class__ = Same
    assert sana_ext.patch(model).replaced == [FIRST]
    assert sana_ext.unpatch(model) == 1
    assert type(model.transformer_blocks[0]) is Same


def test_block_without_cross_attention():
    model = transformer(num_layers=1)
    model.transformer_blocks[0].attn2 = None
    assert sana_ext.patch(model).skipped == {FIRST: "it has no cross-attention"}
    model = transformer(num_layers=1)
    sana_ext.patch(model)
    model.transformer_blocks[0].attn2 = None
    assert not fused_calls(lambda: run(model))


def test_class_changed_after_patch_cannot_be_restored():
    model = transformer(num_layers=1)
    sana_ext.patch(model)
    block = model.transformer_blocks[0]
    block.__class__ = type("FSDPSanaTransformerBlock", (type(block),), {})
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0 has the class FSDPSanaTransformerBlock"):
        sana_ext.unpatch(model)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_every_kind_of_hook_is_seen(kind):
    model = transformer(num_layers=1)
    getattr(model.transformer_blocks[0].ff, f"register_{kind}")(lambda *_: None)
    assert sana_ext.patch(model).skipped == {f"{FIRST}.ff": "has hooks"}


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_every_kind_of_global_hook_is_seen(kind):
    model = transformer(num_layers=1)
    sana_ext.patch(model)
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: None)
    try:
        assert not fused_calls(lambda: run(model))
    finally:
        handle.remove()
    assert fused_calls(lambda: run(model))


def test_parameters_of_another_kind():
    weight = torch.randn(4, 4)
    reason = lambda t, **changes: guards.tensor_reason("weight", t, OPERAND._replace(**changes))  # noqa: E731
    assert reason(nn.Parameter(weight)) is None
    assert reason(weight) is None
    assert reason(Marked(weight)) == "has a weight of type Marked"
    assert reason(None) == "has a weight of type NoneType"
    assert reason(weight.to("meta")) == "has its weight on meta, the input is on cpu"
    assert reason(weight.to_sparse()) == "has a weight of layout torch.sparse_coo"
    assert reason(weight.bfloat16()) == "has a bfloat16 weight, the input is float32"
    assert reason(weight.bfloat16(), autocast=torch.bfloat16) is None
    assert reason(weight.to(torch.int8), autocast=torch.bfloat16) == "has a int8 weight, the input is float32"
    assert reason(weight.double(), autocast=torch.bfloat16) == "has a float64 weight, the input is float32"


def test_inputs_of_another_kind():
    block = transformer(num_layers=1).transformer_blocks[0]

    def reason(x, parts=PARTS, **changes):
        return guards.block_reason(block, x, OPERAND._replace(dtype=x.dtype, **changes), parts)

    x = torch.randn(2, 6, 96)
    assert reason(x) is None
    assert reason(x, parts=("attn1", "ff")) == "no compiled kernel answers on cpu"
    assert reason(Marked(x)) == "the input is a Marked"
    assert reason(x[0]) == reason(x[:, :0]) == "the input has no tokens"
    assert reason(x.to(torch.float8_e4m3fn)) == "cpu kernels do not take float8_e4m3fn"
    assert reason(x.double()) is None
    assert reason(x.double(), autocast=torch.bfloat16) == "float64 under autocast"


def test_a_part_needs_all_its_kernels(monkeypatch):
    monkeypatch.undo()  # the fixture's own answer
    monkeypatch.setattr(guards, "compiled_parts", {})
    missing = {"gated_residual_backward", "dwconv_glu_forward"}
    monkeypatch.setattr(guards, "has_kernel", lambda op, device: device == "cpu" and op not in missing)
    guards.find_kernels()
    assert guards.compiled_parts == {
        ("cpu", False): ("norms", "attn1"),
        ("cpu", True): ("attn1",),
        ("cuda", False): (),
        ("cuda", True): (),
    }


class Wide(nn.Linear):
    """A layer that answers in fp32 whatever it is given, as some quantised layers do."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(x.float(), self.weight.float(), None)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 model", "autocast"])
@pytest.mark.parametrize("name", ["attn1.to_q", "attn1.to_v", "attn2.to_q", "ff"])
def test_dtypes_of_foreign_layers_travel_as_in_diffusers(name, autocast):
    """What the next layers see, and the result, have the dtypes that they have in the stock model."""
    if name == "attn2.to_q" and not autocast:
        pytest.skip("torch's attention refuses the mixture in the stock model, too")
    seen = []
    for patched in (False, True):
        model = transformer(num_layers=1, qk_norm=None)
        block = model.transformer_blocks[0]
        if not autocast:
            block.bfloat16()
        if patched:
            sana_ext.patch(model)
        if name == "ff":
            block.ff.register_forward_hook(lambda module, args, output: output.float())
        else:
            block.get_submodule(name).__class__ = Wide
        dtypes = []
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0]):
            layer.register_forward_pre_hook(lambda module, args, to=dtypes: to.append(args[0].dtype))
        dtype = torch.float32 if autocast else torch.bfloat16
        x, text, t = (torch.randn(2, n, 96).to(dtype) for n in (12, 5, 6))
        with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
            out = block(x, None, text, None, t.flatten(1), 3, 4)
        seen.append([*dtypes, out.dtype])
    stock, fused = seen
    assert fused == stock
