"""dwconv_glu and glumbconv against their reference and against diffusers' GLUMBConv."""

import importlib
import mmap

import pytest
import torch
from helpers import (
    DTYPES,
    EMULATED,
    WIDEST,
    assert_compiles,
    assert_matches,
    assert_thread_independent,
    dtype_id,
    gradcheck,
    needs_fp64,
    opcheck,
    rand,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import sana_ext
from sana_ext import reference

compiled_kernel = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("sana_ext::dwconv_glu_forward", "CPU"),
    reason="a promise of the compiled kernel, which is not built here",
)

# (B, height, width, F): one pixel, one row, one column, odd sizes, F below, at and over a vector and a channel block.
SHAPES = [
    (1, 1, 1, 1), (2, 1, 7, 5), (2, 6, 1, 16), (1, 3, 5, 33), (2, 2, 2, 8), (1, 4, 9, 70), (3, 5, 6, 32), (0, 3, 4, 8),
    (1, 67, 3, 7), (1, 16, 16, 129),
]  # fmt: skip


def maker(B, height, width, F, bias=True):
    def make(seed):
        return {
            "u": rand(seed, B, height * width, 2 * F, scale=1.5),
            "weight": rand(seed + 1, 2 * F, 1, 3, 3, scale=0.4),
            "bias": rand(seed + 2, 2 * F, scale=0.5) if bias else None,
        }

    return make


def on_grid(op, height, width):
    return lambda u, weight, bias: op(u, weight, bias, height, width)


def example(B=2, height=3, width=4, F=6, bias=True, seed=0):
    """In the widest dtype that the kernels have here."""
    tensors = maker(B, height, width, F, bias=bias)(seed)
    low = {name: None if t is None else t.to(WIDEST) for name, t in tensors.items()}
    return low | {"height": height, "width": width}


def whole(B, height, width, C, F, *, biases=True, conv=False):
    """Maker of the inputs of glumbconv."""
    one = (1, 1) if conv else ()

    def make(seed):
        return {
            "x": rand(seed, B, height * width, C),
            "w_in": rand(seed + 1, 2 * F, C, *one, scale=C**-0.5),
            "b_in": rand(seed + 2, 2 * F, scale=0.3) if biases else None,
            "w_dw": rand(seed + 3, 2 * F, 1, 3, 3, scale=0.4),
            "b_dw": rand(seed + 4, 2 * F, scale=0.3) if biases else None,
            "w_out": rand(seed + 5, C, F, *one, scale=F**-0.5),
        }

    return make


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward_and_gradients(shape, bias, dtype):
    _, height, width, _ = shape
    functions = (on_grid(f, height, width) for f in (sana_ext.dwconv_glu, reference.dwconv_glu))
    assert_matches(*functions, maker(*shape, bias=bias), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_sana_shape(dtype):
    """The 1600M Mix-FFN at 512 px: F = 5600 on a 16 x 16 grid."""
    functions = (on_grid(f, 16, 16) for f in (sana_ext.dwconv_glu, reference.dwconv_glu))
    assert_matches(*functions, maker(1, 16, 16, 5600), dtype)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_mixture(low):
    """Under autocast u is 16-bit and the parameters are fp32."""
    dtypes = {"u": low, "weight": torch.float32, "bias": torch.float32}
    assert_matches(*(on_grid(f, 5, 7) for f in (sana_ext.dwconv_glu, reference.dwconv_glu)), maker(2, 5, 7, 40), dtypes)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("form", [{}, {"biases": False}, {"conv": True}], ids=["linear", "no_bias", "conv"])
def test_glumbconv(dtype, form):
    def run(f):
        return lambda **inputs: f(**inputs, height=5, width=6)

    def with_biases(f):
        return lambda **inputs: run(f)(**({"b_in": None, "b_dw": None} | inputs))

    make = whole(2, 5, 6, 24, 50, **form)
    assert_matches(with_biases(sana_ext.glumbconv), with_biases(reference.glumbconv), make, dtype)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast_bf16", "autocast_fp16"])
def test_diffusers_module(mode):
    """Output and every gradient against diffusers' own GLUMBConv, whose fp64 run is the truth."""
    sana_transformer = pytest.importorskip("diffusers.models.transformers.sana_transformer")
    stock = sana_transformer.GLUMBConv(20, 20, expand_ratio=2.5, norm_type=None, residual_connection=False)
    autocast = {"autocast_bf16": torch.bfloat16, "autocast_fp16": torch.float16}.get(mode)
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32

    def run(fused):
        def call(x, **state):
            low = autocast if x.dtype != torch.float64 else None
            with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
                if fused:
                    return sana_ext.glumbconv(
                        x, state["conv_inverted_weight"], state["conv_inverted_bias"], state["conv_depth_weight"],
                        state["conv_depth_bias"], state["conv_point_weight"], 6, 7,
                    )  # fmt: skip
                image = x.transpose(1, 2).unflatten(2, (6, 7))
                named = {name: state[name.replace(".", "_")] for name, _ in stock.named_parameters()}
                return torch.func.functional_call(stock, named, (image,)).flatten(2).transpose(1, 2)

        return call

    def make(seed):
        shapes = {name.replace(".", "_"): p.shape for name, p in stock.named_parameters()}
        return {"x": rand(seed, 2, 42, 20)} | {
            name: rand(seed + 1 + i, *shape, scale=0.3) for i, (name, shape) in enumerate(shapes.items())
        }

    assert_matches(run(True), run(False), make, dtype)


def test_closed_form_backward():
    """The reference's closed-form backward is the derivative of its forward."""
    height, width = 5, 3
    u, weight, bias = (t.requires_grad_() for t in maker(2, height, width, 7)(0).values())
    out = reference.dwconv_glu(u, weight, bias, height, width)
    dout = rand(9, *out.shape)
    expected = torch.autograd.grad(out, (u, weight, bias), dout)
    closed = reference.dwconv_glu_backward(dout, u, weight, bias, height, width)
    for a, b in zip(closed, expected):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("parameter_grads", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_default_kernels(parameter_grads, bias):
    """The kernels that answer without a compiled library return the same shapes, dtypes, strides and values."""
    inputs = {k: v.bfloat16() if k == "u" else v.float() for k, v in maker(2, 3, 4, 10, bias=True)(0).items()}
    args = (inputs["u"], inputs["weight"], inputs["bias"] if bias else None, 3, 4)
    dout = rand(3, 2, 12, 10).bfloat16()
    ops = torch.ops.sana_ext
    ops_module = importlib.import_module("sana_ext.ops.glumbconv")  # the package holds the function of that name
    ours = [ops.dwconv_glu_forward(*args), *ops.dwconv_glu_backward(dout, *args, parameter_grads)]
    default = [ops_module._dwconv_glu(*args), *ops_module._dwconv_glu_backward(dout, *args, parameter_grads)]
    with torch.autocast("cpu"):  # changes nothing here: the op decides its dtypes itself
        under_autocast = ops_module._dwconv_glu(inputs["u"].float(), *args[1:])
    assert torch.equal(under_autocast, ops_module._dwconv_glu(inputs["u"].float(), *args[1:]))
    for a, b in zip(ours, default):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)


def test_frozen_parameters():
    """Without parameter gradients, du is the same bit for bit."""
    u, weight, bias = maker(1, 4, 5, 40)(0).values()
    grads = []
    for train in (True, False):
        leaves = [t.float().clone().requires_grad_(train or i == 0) for i, t in enumerate((u, weight, bias))]
        sana_ext.dwconv_glu(*leaves, 4, 5).square().sum().backward()
        grads.append(leaves[0].grad)
        assert all((leaf.grad is not None) == train for leaf in leaves[1:])
    assert torch.equal(*grads)
    bias = bias.float().requires_grad_()
    sana_ext.dwconv_glu(u.float(), weight.float(), bias, 4, 5).sum().backward()
    assert bias.grad.abs().sum() > 0


@compiled_kernel
def test_strided_input():
    """Channel-major images, padded and sliced rows, expanded batches and strided parameters."""
    v = example(2, 3, 4, 20)
    expected = sana_ext.dwconv_glu(**v)
    u = v["u"]
    wide = torch.cat([u, u * 9], dim=2)[:, :, : u.shape[2]]
    apart = torch.stack([u, u * 9], dim=2).flatten(1, 2)[:, ::2]
    channel_major, token_major = (u.transpose(*d).contiguous().transpose(*d) for d in ((1, 2), (0, 1)))
    for strided in (channel_major, token_major, wide, apart):
        assert not strided.is_contiguous()
        assert torch.equal(sana_ext.dwconv_glu(**v | {"u": strided}), expected)
    parameters = {k: torch.stack([v[k], v[k] * 9], dim=1).select(1, 0) for k in ("weight", "bias")}
    parameters["weight"] = parameters["weight"].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(sana_ext.dwconv_glu(**v | parameters), expected)
    one = sana_ext.dwconv_glu(**v | {"u": u[:1].contiguous()})
    assert torch.equal(sana_ext.dwconv_glu(**v | {"u": u[:1].expand(3, -1, -1)}), one.expand(3, -1, -1))


@compiled_kernel
@pytest.mark.parametrize("dtype", [WIDEST, torch.bfloat16], ids=dtype_id)
def test_expanded_gradients(dtype):
    """Incoming gradients with stride 0 on any dimension, channel-major and sliced ones."""
    v = {k: t.to(dtype) if isinstance(t, torch.Tensor) else t for k, t in example(2, 3, 4, 20).items()}
    wide = rand(1, 2, 12, 40).to(dtype)
    cases = [
        wide[:1, :, :20].expand(2, -1, -1),
        wide[:, :1, :20].expand(-1, 12, -1),
        wide[:, :, :1].expand(-1, -1, 20),
        wide[:1, :1, :1].expand(2, 12, 20),
        wide[:, :, :20],
        wide[:, :, :20].transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for dout in cases:
        a, b = (torch.ops.sana_ext.dwconv_glu_backward(d, *v.values(), True) for d in (dout, dout.contiguous()))
        assert all(torch.equal(s, t) for s, t in zip(a, b))


@compiled_kernel
@pytest.mark.skipif(EMULATED, reason="the CUDA kernels have no streaming stores")
@pytest.mark.parametrize("F", [5600, 5608], ids=["streamed", "unaligned rows"])
def test_large_outputs_are_the_same(F):
    """Results beyond the caches are written by streaming stores: the bits are those of the images one by one."""
    v = {k: t.float() for k, t in maker(3, 16, 16, F)(0).items()}
    dout = rand(3, 3, 256, F).float()

    def run(i):
        out = sana_ext.dwconv_glu(v["u"][i], v["weight"], v["bias"], 16, 16)
        args = (dout[i], v["u"][i], v["weight"], v["bias"], 16, 16, False)
        return out, torch.ops.sana_ext.dwconv_glu_backward(*args)[0]

    images = [run(slice(b, b + 1)) for b in range(3)]
    for whole_batch, parts in zip(run(slice(0, 3)), zip(*images)):
        assert whole_batch.numel() * 4 > 1 << 24 > parts[0].numel() * 4 / 2
        assert torch.equal(whole_batch, torch.cat(parts))


def test_extreme_values():
    """Where exp overflows or vanishes the result is what fp64 gives; one NaN pixel spoils its 3 x 3 neighbours only."""
    v = {k: t.float() if isinstance(t, torch.Tensor) else t for k, t in example(1, 5, 5, 17).items()}
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20, -20, 87, -87, 88.5, -88.5, 104, -104, 1e4, -1e4, -1e30, -3e38])
    u = values.repeat(v["u"].numel() // len(values) + 1)[: v["u"].numel()].reshape(v["u"].shape)
    u.requires_grad_()
    out = sana_ext.dwconv_glu(**v | {"u": u})
    (du,) = torch.autograd.grad(out.sum(), u)
    u64 = u.detach().double().requires_grad_()
    truth = reference.dwconv_glu(u64, v["weight"].double(), v["bias"].double(), 5, 5)
    (du64,) = torch.autograd.grad(truth.sum(), u64)
    torch.testing.assert_close(out.double(), truth, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(du.double(), du64, rtol=2e-5, atol=1e-5)

    spoiled = v["u"].clone()
    spoiled[0, 12] = float("nan")  # the middle pixel of 5 x 5
    nan = sana_ext.dwconv_glu(**v | {"u": spoiled}).isnan().all(dim=2).reshape(5, 5)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(nan, expected)
    clean = ~expected.flatten()
    assert torch.equal(sana_ext.dwconv_glu(**v | {"u": spoiled})[0, clean], sana_ext.dwconv_glu(**v)[0, clean])


def test_offsets_beyond_32_bits():
    """The second image starts more than 2^31 elements after the first; the pages between are never touched."""
    v = {k: t.bfloat16() if isinstance(t, torch.Tensor) else t for k, t in example(2, 3, 4, 9).items()}
    step = 2**31 + 11
    memory = mmap.mmap(-1, 2 * (step + v["u"].numel()), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    u = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(v["u"].shape, (step, 18, 1)).copy_(v["u"])
    expected, got = sana_ext.dwconv_glu(**v), sana_ext.dwconv_glu(**v | {"u": u})
    assert torch.equal(got, expected)
    a, b = (torch.ops.sana_ext.dwconv_glu_backward(expected, *(v | {"u": t}).values(), True) for t in (u, v["u"]))
    assert all(torch.equal(s, t) for s, t in zip(a, b))
    del u
    memory.close()


@needs_fp64
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    v = maker(2, 3, 4, 3, bias=bias)(0)
    gradcheck(on_grid(sana_ext.dwconv_glu, 3, 4), list(v.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype, bias):
    v = maker(2, 3, 4, 6, bias=bias)(0)
    opcheck(torch.ops.sana_ext.dwconv_glu_forward, (*v.values(), 3, 4), dtype)


def test_compiles():
    v = [t.float() for t in maker(2, 3, 4, 6)(0).values()]
    assert_compiles(on_grid(sana_ext.dwconv_glu, 3, 4), v)
    assert_compiles(lambda *a: sana_ext.glumbconv(*a, 3, 4), [t.float() for t in whole(2, 3, 4, 8, 6)(0).values()])


def test_compiles_with_dynamic_grid():
    """One graph serves several resolutions."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(sana_ext.dwconv_glu, fullgraph=True, dynamic=True, backend=count)
    for height, width in ((3, 5), (5, 7), (6, 8)):
        v = example(2, height, width, 9)
        assert torch.equal(compiled(**v), sana_ext.dwconv_glu(**v))
    assert len(graphs) == 1


@compiled_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(2, 9, 11, 65), (1, 150, 5, 40)], ids=str)
def test_thread_independent(dtype, shape):
    v = {k: t.to(dtype) for k, t in maker(*shape)(0).items()}
    assert_thread_independent(on_grid(sana_ext.dwconv_glu, *shape[1:3]), v)


def test_second_derivative_is_refused():
    u, weight, bias = (t.requires_grad_() for t in list(example(1, 2, 3, 4).values())[:3])
    out = sana_ext.dwconv_glu(u, weight, bias, 2, 3)
    grads = torch.autograd.grad(out.square().sum(), (u, weight, bias), create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        torch.autograd.grad(sum(g.sum() for g in grads), (u, weight, bias), allow_unused=True)


@given(
    B=st.integers(0, 3), height=st.integers(1, 9), width=st.integers(1, 9), F=st.integers(1, 70), bias=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_size(B, height, width, F, bias, seed):
    """Output and gradients agree with the reference for any size."""
    v = example(B, height, width, F, bias, seed)
    close = {"rtol": 2e-5, "atol": 2e-4} if EMULATED else {"rtol": 1e-12, "atol": 1e-11}
    u = v["u"].requires_grad_()
    dout = rand(seed + 3, B, height * width, F).to(WIDEST)
    out, truth = (f(u, v["weight"], v["bias"], height, width) for f in (sana_ext.dwconv_glu, reference.dwconv_glu))
    torch.testing.assert_close(out, truth, **close)
    ours = torch.ops.sana_ext.dwconv_glu_backward(dout, u.detach(), v["weight"], v["bias"], height, width, True)
    closed = reference.dwconv_glu_backward(dout, u.detach(), v["weight"], v["bias"], height, width)
    for a, b in list(zip(ours, closed))[: 3 if bias else 2]:
        torch.testing.assert_close(a, b, **close)


@given(
    height=st.integers(-3, 20),
    width=st.integers(-3, 20),
    tokens=st.integers(0, 40),
    channels=st.integers(0, 9),
    taps=st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_any_mismatch_is_an_error(height, width, tokens, channels, taps):
    """Whatever does not fit raises and names an argument; what fits gives the right shape."""
    u, weight = torch.zeros(2, tokens, channels), torch.zeros(taps, 1, 3, 3)
    fits = height > 0 and width > 0 and height * width == tokens and channels == taps > 0 and channels % 2 == 0
    if fits:
        assert sana_ext.dwconv_glu(u, weight, None, height, width).shape == (2, tokens, channels // 2)
    else:
        with pytest.raises(ValueError, match=r"sana_ext\.dwconv_glu: (u|weight|height|width) "):
            sana_ext.dwconv_glu(u, weight, None, height, width)


BAD = [
    ("rank", lambda v: v | {"u": v["u"][0]}, ValueError, "u must have shape"),
    ("type", lambda v: v | {"u": 3}, TypeError, r"u must be a torch\.Tensor"),
    ("integer", lambda v: v | {"u": v["u"].long()}, TypeError, "u has dtype int64"),
    ("grid", lambda v: v | {"height": 5}, ValueError, r"u has 12 tokens, which is not height \* width = 5 \* 4"),
    ("float height", lambda v: v | {"height": 3.0}, TypeError, "height must be an integer, got float"),
    ("bool width", lambda v: v | {"width": True}, TypeError, "width must be an integer, got bool"),
    ("tensor width", lambda v: v | {"width": torch.tensor(4)}, TypeError, "width must be an integer, got Tensor"),
    ("negative", lambda v: v | {"height": -3, "width": -4}, ValueError, "height must be at least 1, got -3"),
    ("no tokens", lambda v: v | {"u": v["u"][:, :0], "height": 0}, ValueError, "height must be at least 1, got 0"),
    ("odd 2F", lambda v: v | {"u": v["u"][..., 1:]}, ValueError, "u must have an even"),
    ("no channels", lambda v: v | {"u": v["u"][..., :0]}, ValueError, "u must have an even"),
    ("taps", lambda v: v | {"weight": v["weight"][..., :2]}, ValueError, "weight must have shape"),
    ("half the channels", lambda v: v | {"weight": v["weight"][:6]}, ValueError, "weight must have shape"),
    ("dense weight", lambda v: v | {"weight": rand(0, 12, 12, 3, 3)}, ValueError, "weight must have shape"),
    ("weight rank", lambda v: v | {"weight": v["weight"][:, 0]}, ValueError, "weight must have shape"),
    ("no weight", lambda v: v | {"weight": None}, TypeError, r"weight must be a torch\.Tensor"),
    ("bias shape", lambda v: v | {"bias": v["bias"][:-1]}, ValueError, "bias must have shape"),
    (
        "fp64 mix",
        lambda v: v | {"u": v["u"].double(), "weight": v["weight"].float(), "bias": None},
        TypeError,
        "weight is float32 and u is float64",
    ),
    ("device mix", lambda v: v | {"bias": v["bias"].to("meta")}, ValueError, "bias is on meta"),
    ("sparse", lambda v: v | {"u": v["u"].to_sparse()}, ValueError, "u must be a dense tensor"),
]


@pytest.mark.parametrize(("change", "error", "match"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        sana_ext.dwconv_glu(**change(example()))


BAD_WHOLE = [
    ("rank", lambda v: v | {"x": v["x"][0]}, ValueError, "x must have shape"),
    ("grid", lambda v: v | {"width": 5}, ValueError, "x has 12 tokens"),
    ("no channels", lambda v: v | {"x": v["x"][..., :0]}, ValueError, "x must have at least one channel"),
    ("w_in", lambda v: v | {"w_in": v["w_in"][:, :-1]}, ValueError, "w_in must have shape"),
    ("w_in odd", lambda v: v | {"w_in": v["w_in"][1:], "b_in": None}, ValueError, "w_in must have an even"),
    ("w_in 3x3", lambda v: v | {"w_in": rand(0, 12, 8, 3, 3)}, ValueError, "w_in must have shape"),
    ("b_in", lambda v: v | {"b_in": v["b_in"][1:]}, ValueError, "b_in must have shape"),
    ("w_dw", lambda v: v | {"w_dw": v["w_dw"][1:]}, ValueError, "w_dw must have shape"),
    ("b_dw", lambda v: v | {"b_dw": v["b_dw"][1:]}, ValueError, "b_dw must have shape"),
    ("w_out", lambda v: v | {"w_out": v["w_out"][:, 1:]}, ValueError, "w_out must have shape"),
    ("device", lambda v: v | {"w_out": v["w_out"].to("meta")}, ValueError, "w_out is on meta"),
]


@pytest.mark.parametrize(("change", "error", "match"), [b[1:] for b in BAD_WHOLE], ids=[b[0] for b in BAD_WHOLE])
def test_bad_input_of_glumbconv(change, error, match):
    with pytest.raises(error, match=match):
        sana_ext.glumbconv(**change(whole(2, 3, 4, 8, 6)(0) | {"height": 3, "width": 4}))


@compiled_kernel
def test_the_operators_own_checks():
    """A direct call of torch.ops must not read outside a tensor either."""
    u, weight, bias, *_ = example(2, 3, 4, 6).values()
    ops = torch.ops.sana_ext
    bad = [
        (u, weight, bias, 4, 4),
        (u, weight[:4], bias, 3, 4),
        (u, weight, bias[:4], 3, 4),
        (u[0], weight, bias, 3, 4),
    ]
    for args in bad:
        with pytest.raises(Exception):  # noqa: B017, PT011
            ops.dwconv_glu_forward(*args)
    for dout in (t.to(WIDEST) for t in (rand(0, 2, 12, 5), rand(0, 2, 11, 6), rand(0, 1, 12, 6))):
        with pytest.raises(Exception):  # noqa: B017, PT011
            ops.dwconv_glu_backward(dout, u, weight, bias, 3, 4, True)
