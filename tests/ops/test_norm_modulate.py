"""norm_modulate, gated_residual, residual_norm_modulate against their reference."""

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

import sana_ext
from sana_ext import reference

SHAPES = [(2, 5, 8), (1, 1, 1), (2, 7, 33), (3, 33, 20), (1, 64, 1152), (0, 4, 16), (2, 70, 2240), (1, 3, 2312)]
OPS = {
    "norm_modulate": ("x", "shift", "scale"),
    "gated_residual": ("x", "y", "gate"),
    "residual_norm_modulate": ("x", "y", "shift", "scale", "gate"),
    "residual_norm_modulate_without_gate": ("x", "y", "shift", "scale"),
}
every_op = pytest.mark.parametrize("name", OPS)


def functions(name):
    name = name.removesuffix("_without_gate")
    return getattr(sana_ext, name), getattr(reference, name)


def maker(name, B, N, C):
    def make(seed):
        rows = {k: rand(seed + i, B, N, C) for i, k in enumerate(("x", "y"))}
        coefficients = {k: rand(seed + 5 + i, B, C, scale=0.5) for i, k in enumerate(("shift", "scale", "gate"))}
        return {k: v for k, v in (rows | coefficients).items() if k in OPS[name]}

    return make


def example(name, B=2, N=5, C=12):
    return maker(name, B, N, C)(0)


@every_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward_and_gradients(name, shape, dtype):
    assert_matches(*functions(name), maker(name, *shape), dtype)


@every_op
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_mixture(name, low):
    """Under autocast the residual stream and the modulation are fp32, the branch is 16-bit."""
    dtypes = dict.fromkeys(("x", "shift", "scale", "gate"), torch.float32) | {"y": low}
    assert_matches(*functions(name), maker(name, 2, 35, 24), dtypes)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_out_dtype(out):
    x, shift, scale = (t.bfloat16() for t in maker("norm_modulate", 2, 5, 16)(0).values())
    assert sana_ext.norm_modulate(x, shift, scale, out_dtype=out).dtype == out
    z, n = sana_ext.residual_norm_modulate(x.float(), x, shift, scale, out_dtype=out)
    assert (z.dtype, n.dtype) == (torch.float32, out)


@every_op
def test_strided_input(name):
    """Channel-major rows (the patch embedding's), sliced rows, expanded batches, [B, 1, C] coefficients."""
    op, _ = functions(name)
    inputs = {k: v.to(WIDEST) for k, v in example(name, 2, 6, 16).items()}
    expected = op(**inputs)
    strided = {}
    for k, v in inputs.items():
        if v.dim() == 3:
            strided[k] = v.transpose(1, 2).contiguous().transpose(1, 2)
        else:
            strided[k] = torch.stack([v, v * 9], 2).select(2, 0)[:, None]
    got = op(**strided)
    rounding = 1e-6 if EMULATED else 1e-14
    for a, b in zip(
        expected if isinstance(expected, tuple) else (expected,), got if isinstance(got, tuple) else (got,)
    ):
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)
    expanded = {k: v[:1].expand_as(v) for k, v in inputs.items()}
    a, b = op(**expanded), op(**{k: v.contiguous() for k, v in expanded.items()})
    assert all(
        torch.equal(s, t) for s, t in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,))
    )


@every_op
@pytest.mark.parametrize("C", [16, 17])
def test_expanded_gradient(name, C):
    """The gradient of a sum has stride 0; a kernel that takes it for a dense one reads elsewhere."""
    op, _ = functions(name)

    def gradients(dense):
        leaves = {k: v.to(WIDEST).requires_grad_() for k, v in example(name, 2, 9, C).items()}
        out = op(**leaves)
        outs = out if isinstance(out, tuple) else (out,)
        ones = [torch.ones_like(o) if dense else o.new_ones(()).expand_as(o) for o in outs]
        return torch.autograd.grad(outs, list(leaves.values()), ones)

    for got, expected in zip(gradients(dense=False), gradients(dense=True)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@needs_fp64
@every_op
def test_gradcheck(name):
    op, _ = functions(name)
    inputs = example(name)
    gradcheck(lambda *values: op(**dict(zip(inputs, values))), list(inputs.values()))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float16], ids=dtype_id)
def test_opcheck(dtype):
    v = maker("residual_norm_modulate", 2, 5, 12)(0)
    x, y, shift, scale, gate = (v[k] for k in ("x", "y", "shift", "scale", "gate"))
    ops = torch.ops.sana_ext
    opcheck(ops.norm_modulate_forward, (x, shift, scale, 1e-6, dtype), dtype)
    opcheck(ops.gated_residual_forward, (x, y, gate), dtype)
    for g in (gate, None):
        opcheck(ops.residual_norm_modulate_forward, (x, y, g, shift, scale, 1e-6, dtype), dtype)


@every_op
def test_compiles(name):
    op, _ = functions(name)
    inputs = {k: v.float() for k, v in example(name).items()}
    assert_compiles(lambda *values: op(**dict(zip(inputs, values))), list(inputs.values()))


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_thread_independent(name, dtype):
    op, _ = functions(name)
    N = 33 if EMULATED else 130
    assert_thread_independent(op, {k: v.to(dtype) for k, v in example(name, 2, N, 257).items()})


@every_op
def test_second_derivative_is_refused(name):
    op, _ = functions(name)
    leaves = {k: v.to(WIDEST).requires_grad_() for k, v in example(name).items()}
    out = op(**leaves)
    out = out[1] if isinstance(out, tuple) else out
    # The first derivative is linear in the cotangent, and its own derivative must say that it does not exist.
    grad = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        torch.autograd.grad(sum(g.sum() for g in grad), list(leaves.values()), allow_unused=True)


BAD = [
    ("rank", lambda v: v | {"x": v["x"][0]}, ValueError, "x must have shape"),
    ("type", lambda v: v | {"x": 3}, TypeError, "x must be a torch.Tensor"),
    ("integer", lambda v: v | {"x": v["x"].long()}, TypeError, "int64"),
    ("channels", lambda v: v | {"scale": v["scale"][:, :-1]}, ValueError, "scale must have shape"),
    ("batch", lambda v: v | {"shift": v["shift"][:1]}, ValueError, "shift must have shape"),
    ("no tokens", lambda v: v | {"x": v["x"][:, :0]}, ValueError, "at least one token"),
    ("fp64 mix", lambda v: v | {"shift": v["shift"].float()}, TypeError, "float64 mixes"),
    ("device mix", lambda v: v | {"shift": v["shift"].to("meta")}, ValueError, "shift is on meta"),
]


@pytest.mark.parametrize(("change", "error", "match"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        sana_ext.norm_modulate(**change(example("norm_modulate")))


def test_bad_scalars():
    v = example("norm_modulate")
    with pytest.raises(ValueError, match="eps must be a number >= 0"):
        sana_ext.norm_modulate(**v, eps=-1.0)
    with pytest.raises(TypeError, match="out_dtype int32"):
        sana_ext.norm_modulate(**v, out_dtype=torch.int32)
