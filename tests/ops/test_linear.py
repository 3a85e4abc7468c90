"""linear: torch's own where the processor has 16-bit arithmetic, else fp32 arithmetic."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_compiles, assert_matches, dtype_id, gradcheck, opcheck, outputs_and_gradients, rand
from hypothesis import given, settings
from hypothesis import strategies as st

import sana_ext
from sana_ext import reference

LOW = [torch.bfloat16, torch.float16]
ops = torch.ops.sana_ext
compiled = pytest.mark.skipif(
    not sana_ext._extension.libraries()["cpu"].loaded, reason="the compiled CPU library is not built"
)


def op_linear(x, weight, bias=None):
    """The registered op itself, which sana_ext.linear calls for 16-bit tensors only."""
    return ops.linear_forward(x.flatten(0, -2), weight.flatten(1), bias).view(*x.shape[:-1], weight.shape[0])


def maker(rows, K, F_, bias=True, conv=False):
    def make(seed):
        return {
            "x": rand(seed, *rows, K),
            "weight": rand(seed + 1, F_, K, *([1, 1] if conv else []), scale=max(K, 1) ** -0.5),
            "bias": rand(seed + 2, F_) if bias else None,
        }

    return make


SHAPES = [  # rows, K, F: single elements, odd sizes, few and many rows, several panels, empty
    ((1,), 1, 1),
    ((2, 3), 1, 5),
    ((7,), 33, 1),
    ((2, 5), 16, 24),
    ((3, 11), 37, 65),
    ((1,), 129, 257),
    ((2, 70), 64, 1500),
    ((0, 4), 8, 6),
    ((4,), 8, 0),
    ((2, 600), 80, 600),
    ((35,), 1100, 20),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_forward_and_gradients(shape, dtype, bias):
    assert_matches(op_linear, reference.linear, maker(*shape, bias), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "1x1 conv"])
def test_public_function(both, dtype, conv):
    assert_matches(sana_ext.linear, reference.linear, maker((2, 21), 40, 72, conv=conv), dtype)


def test_vector_input(both):
    x, weight, bias = (t.bfloat16() for t in maker((), 24, 9)(0).values())
    assert sana_ext.linear(x, weight, bias).shape == (9,)
    torch.testing.assert_close(sana_ext.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_one_real_shape(upcast, dtype):
    make = maker((1, 256), 2240, 2240)
    v = {k: t.to(dtype) for k, t in make(0).items()}
    truth = reference.linear(**{k: t.float() for k, t in v.items()})
    error = (sana_ext.linear(**v).float() - truth).abs() / truth.abs().clamp_min(1)
    assert error.max() <= torch.finfo(dtype).eps / 2 * 1.001 + 1e-5  # one rounding


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_autocast(both, dtype):
    """fp32 parameters and input under autocast: dtypes and values of F.linear, gradients in fp32."""
    make = maker((2, 9), 40, 24)

    def under_autocast(fn):
        def call(x, weight, bias):
            with torch.autocast("cpu", dtype):
                return fn(x, weight, bias)

        return call

    v = {k: t.float() for k, t in make(0).items()}
    ours, stock = (outputs_and_gradients(under_autocast(fn), v, 0) for fn in (sana_ext.linear, F.linear))
    for name in stock:
        assert ours[name].dtype == stock[name].dtype
        torch.testing.assert_close(ours[name], stock[name], rtol=2e-2, atol=2e-2)
    mixed = {k: t.to(d) for (k, t), d in zip(v.items(), (dtype, torch.float32, torch.float32))}
    assert under_autocast(sana_ext.linear)(**mixed).dtype == dtype
    with torch.autocast("cpu", dtype):  # fp64 is left alone by autocast
        assert sana_ext.linear(*(t.double() for t in v.values())).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=dtype_id)
def test_strided_input(dtype):
    """Channel-major rows, a slice of a wider tensor, a transposed and a sliced weight, an expanded batch."""
    x, weight, bias = (t.to(dtype) for t in maker((2, 30), 24, 17)(0).values())
    expected = op_linear(x, weight, bias)
    for strided in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([x, x], 2)[..., :24],
        torch.cat([x, x], 1)[:, :30],
    ):
        assert torch.equal(op_linear(strided, weight, bias), expected)
    for w in (
        weight.t().contiguous().t(),
        torch.cat([weight, weight], 1)[:, 24:],
        torch.stack([weight, weight], 2)[..., 1],
    ):
        assert torch.equal(op_linear(x, w, bias), expected)
    assert torch.equal(op_linear(x, weight, torch.stack([bias, bias], 1)[:, 0]), expected)
    row = x[:1, :1].expand(2, 30, 24)
    torch.testing.assert_close(op_linear(row, weight, bias), op_linear(row.contiguous(), weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=dtype_id)
def test_strided_gradient(dtype):
    """The gradient of a sum is expanded (stride 0), that of a transposed output is column-major."""
    leaves = [t.to(dtype).requires_grad_() for t in maker((40,), 24, 17)(0).values()]
    y = op_linear(*leaves)
    dense = rand(9, 40, 17).to(dtype)
    for strided in (torch.ones(1, 1, dtype=dtype).expand(40, 17), dense.t().contiguous().t(), dense[:1].expand(40, 17)):
        got = torch.autograd.grad(y, leaves, strided, retain_graph=True)
        expected = torch.autograd.grad(y, leaves, strided.contiguous(), retain_graph=True)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "x weight", "weight bias"])
def test_partial_gradients(upcast, needed):
    """What needs no gradient is neither computed nor kept."""
    v = {k: t.bfloat16().requires_grad_(k in needed) for k, t in maker((20,), 24, 17)(0).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = sana_ext.linear(**v)
    assert ((17, 24) in kept) == ("x" in needed)
    assert ((20, 24) in kept) == ("weight" in needed)
    dy = rand(5, 20, 17).bfloat16()
    full = reference.linear_backward(dy, v["x"].detach(), v["weight"].detach())
    for name, grad in zip(needed.split(), torch.autograd.grad(y, [v[k] for k in needed.split()], dy)):
        expected = full[list(v).index(name)]
        torch.testing.assert_close(grad.float(), expected, rtol=1e-2, atol=1e-3)


def test_gradcheck():
    gradcheck(op_linear, list(maker((2, 3), 5, 4)(0).values()))
    gradcheck(op_linear, [*list(maker((2, 3), 5, 4)(0).values())[:2], None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
def test_opcheck(dtype):
    for rows in (3, 70):
        x, weight, bias = maker((rows,), 12, 10)(0).values()
        for b in (bias, None):
            opcheck(ops.linear_forward, (x, weight, b), dtype)


def test_compiles(both):
    values = [t.bfloat16() for t in maker((2, 9), 40, 24)(0).values()]
    assert_compiles(sana_ext.linear, values)
    assert_compiles(lambda x, w: sana_ext.linear(x, w[..., None, None]), values[:2])

    def under_autocast(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return sana_ext.linear(x, w)

    assert_compiles(under_autocast, [t.float() for t in values[:2]])


def test_fake_tensors(upcast):
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(5, 8, 1, 1, dtype=torch.bfloat16)
        assert sana_ext.linear(x, w).shape == (2, 3, 5)


def test_second_derivative_is_refused(upcast):
    leaves = [t.bfloat16().requires_grad_() for t in maker((4,), 6, 5)(0).values()]
    grads = torch.autograd.grad(sana_ext.linear(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        torch.autograd.grad(sum(g.sum() for g in grads), leaves, allow_unused=True)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(0, 90),
    K=st.integers(1, 70),
    F_=st.integers(0, 90),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_any_size(M, K, F_, dtype, bias, scale):
    """Against the fp32 reference rounded once: at most one unit of the last place of the output away."""
    v = {k: None if t is None else t.to(dtype) for k, t in maker((M,), K, F_, bias)(M + K).items()}
    v["x"] = (v["x"] * scale).to(dtype)
    got = op_linear(**v)
    truth = reference.linear(**{k: None if t is None else t.double() for k, t in v.items()})
    assert got.shape == truth.shape
    size = reference.linear(*(None if t is None else t.double().abs() for t in v.values()))  # what may cancel
    unit = {torch.float64: 1e-15, torch.float32: 2e-7}.get(dtype, torch.finfo(dtype).eps / 2)
    assert ((got.double() - truth).abs() <= unit * truth.abs() * 1.01 + 1e-6 * size + 1e-7).all()


BAD = [
    ("type", lambda v: v | {"x": 3}, TypeError, "x must be a torch.Tensor"),
    ("weight type", lambda v: v | {"weight": None}, TypeError, "weight must be a torch.Tensor"),
    ("scalar", lambda v: v | {"x": torch.ones(())}, ValueError, "x must have shape"),
    ("integer", lambda v: v | {"x": v["x"].long()}, TypeError, "int64"),
    ("channels", lambda v: v | {"x": v["x"][..., :-1]}, ValueError, "x must have shape"),
    ("weight rank", lambda v: v | {"weight": v["weight"][0]}, ValueError, "weight must have shape"),
    (
        "3x3 weight",
        lambda v: v | {"weight": v["weight"][..., None, None].repeat(1, 1, 3, 3)},
        ValueError,
        "weight must have shape",
    ),
    ("bias", lambda v: v | {"bias": v["bias"][:-1]}, ValueError, "bias must have shape"),
    ("fp64 mix", lambda v: v | {"bias": v["bias"].double()}, TypeError, "float64 mixes"),
    ("dtype mix", lambda v: v | {"weight": v["weight"].bfloat16()}, TypeError, "weight is bfloat16 and x is float32"),
    ("device mix", lambda v: v | {"weight": v["weight"].to("meta")}, ValueError, "weight is on meta"),
    ("sparse", lambda v: v | {"weight": v["weight"].to_sparse()}, ValueError, "dense"),
]


@pytest.mark.parametrize(("change", "error", "match"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        sana_ext.linear(**change({k: t.float() for k, t in maker((2, 3), 5, 4)(0).items()}))


@compiled
def test_bad_direct_call():
    """The compiled op never reads outside a tensor, whatever it is given."""
    x, w, b = (t.bfloat16() for t in maker((6,), 8, 4)(0).values())
    dy = torch.ones(6, 4, dtype=torch.bfloat16)
    for args in [
        (x[0], w, b),
        (x, w[0], b),
        (x[:, :5], w, b),
        (x, w, b[:2]),
        (x, w, b[None]),
        (x, w.float(), b),
        (x, w, b.double()),
    ]:
        with pytest.raises(Exception, match=r"."):
            ops.linear_forward(*args)
    for args in [(dy, x[:3], w), (dy, x, w[:2]), (dy[0], x, w), (dy, x.float(), w), (dy, x, w.double()), (dy, x[0], w)]:
        with pytest.raises(Exception, match=r"."):
            ops.linear_backward(*args, True)


# The processor's answer

PROBE = """
import torch, sana_ext
from sana_ext.ops import _arithmetic
dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
native = [torch.ops.sana_ext.native_arithmetic(d) for d in dtypes]
x, w, b = torch.randn(3, 40).bfloat16(), torch.randn(20, 40).bfloat16(), torch.randn(20).bfloat16()
expected = torch.nn.functional.linear(x.float(), w.float(), b.float()).bfloat16()
same = torch.allclose(sana_ext.linear(x, w, b).float(), expected.float(), rtol=1e-2)
print(native, sorted(map(str, _arithmetic.UPCAST)), same)
"""


@compiled
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_a_lower_level_means_fp32_arithmetic(level):
    if os.uname().machine != "x86_64":
        pytest.skip("the levels are x86-64's")
    env = os.environ | {"SANA_EXT_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True)
    if "is not available here" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[False, False, True, True] ['torch.bfloat16', 'torch.float16'] True"
