"""Rows of equal or nearly equal values: LayerNorm makes nothing of the first and loses nothing of the others."""

import pytest
import torch
from helpers import DTYPES, EMULATED, dtype_id, outputs_and_gradients, rand

import sana_ext
from sana_ext import reference

#: Tuned and generic on a GPU, tails of every vector length, longer than what is kept in shared memory.
WIDTHS = [1, 2, 15, 33, 64, 1120, 2240, 2243, *([] if EMULATED else [9001])]
VALUES = [0.1, -10.1, 1000.1, 10000.3, 3e-30, 7e4]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
FORMS = ["norm_modulate", "residual", "gated"]


def run(form, x, shift, scale, module=sana_ext, **options):
    """The modulated norm of x, which the residual forms add up from two parts."""
    if form == "norm_modulate":
        return module.norm_modulate(x, shift, scale, **options)
    gate = torch.full_like(shift, 0.5) if form == "gated" else None
    y = x * (0.5 if form == "gated" else 0.25)
    rest = x * 0.75
    return module.residual_norm_modulate(rest, y, shift, scale, gate=gate, **options)[1]


@pytest.mark.parametrize("form", FORMS)
@dtypes
@pytest.mark.parametrize("C", WIDTHS)
def test_a_row_of_equal_values_is_exactly_the_shift(C, dtype, form):
    shift, scale = rand(1, 1, C).to(dtype), rand(2, 1, C).to(dtype)
    largest = torch.finfo(dtype).max
    values = [*VALUES, largest / 2] if dtype != torch.float16 else [v for v in VALUES if v < 6e4] + [largest]
    for value in values:
        x = torch.full((1, 3, C), value, dtype=dtype)
        n = run(form, x, shift, scale, out_dtype=dtype)
        assert torch.equal(n, shift[:, None].expand_as(n)), value


@dtypes
@pytest.mark.parametrize("C", [15, 64, 2240])
def test_gradients_of_a_row_of_equal_values(C, dtype):
    """xhat is 0: nothing of dn reaches scale, and a constant dn nothing of x."""
    x = torch.full((1, 4, C), 1000.1, dtype=dtype, requires_grad=True)
    shift, scale = (torch.zeros(1, C, dtype=dtype, requires_grad=True) for _ in range(2))
    sana_ext.norm_modulate(x, shift, scale).backward(torch.ones(1, 4, C, dtype=dtype))
    assert (scale.grad == 0).all()
    assert (x.grad == 0).all()
    assert (shift.grad == 4).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("C", [33, 64, 2240, 2243])
@pytest.mark.parametrize("offset", [1e4, -1e6, 3e7])
def test_a_small_spread_around_a_large_offset(offset, C, form):
    """fp32, against fp64 on the same numbers, which lie a few rounding steps apart."""
    step = torch.finfo(torch.float32).eps * abs(offset)
    x = (offset + step * rand(3, 1, 5, C).round()).float()
    x[0, 0, 1:] = x[0, 0, 0]
    x[0, 0, C // 2] += 4 * step  # all equal but one
    shift, scale = rand(1, 1, C).float(), rand(2, 1, C).float()
    if form == "norm_modulate":
        z = x
        n = sana_ext.norm_modulate(x, shift, scale, eps=1e-12)
    else:
        gate = torch.ones(1, C) if form == "gated" else None
        z, n = sana_ext.residual_norm_modulate(x, torch.zeros_like(x), shift, scale, gate=gate, eps=1e-12)
        assert torch.equal(z, x)
    truth = reference.norm_modulate(z.double(), shift.double(), scale.double(), eps=1e-12)
    torch.testing.assert_close(n.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("C", [64, 2240, 2243])
def test_an_outlier_in_front_costs_nothing(C):
    """The row's first value, from which the sums start, is a thousand times the others."""
    x = rand(1, 1, 6, C)
    x[:, ::2, 0], x[:, 1::2, -1] = 1e3, -1e3
    inputs = {"x": x, "shift": rand(2, 1, C), "scale": rand(3, 1, C)}
    low = {name: t.float() for name, t in inputs.items()}
    truth = outputs_and_gradients(reference.norm_modulate, {name: t.double() for name, t in low.items()}, 0)
    peer = outputs_and_gradients(reference.norm_modulate, low, 0)
    ours = outputs_and_gradients(sana_ext.norm_modulate, low, 0)
    for name, t in truth.items():
        error, allowed = ((run[name].double() - t).abs().max() for run in (ours, peer))
        assert error <= 2 * allowed + 5e-7 * t.abs().max(), name


# Gradients in the dtype of what they belong to


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift_dtype", DTYPES[-3:], ids=dtype_id)
@pytest.mark.parametrize("scale_dtype", DTYPES[-3:], ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES[-3:], ids=dtype_id)
def test_each_gradient_is_rounded_once_to_its_own_dtype(dtype, shift_dtype, scale_dtype, form):
    """Sums that only fp32 holds: 40 times 3000.3, beyond fp16, and not a multiple of what bf16 can say."""
    C = 24
    tensors = {"x": rand(1, 1, 40, C).to(dtype), "shift": rand(2, 1, C).to(shift_dtype)}
    tensors["scale"] = rand(3, 1, C).to(scale_dtype)
    if form != "norm_modulate":
        tensors["y"] = rand(4, 1, 40, C).to(dtype)
    if form == "gated":
        tensors["gate"] = rand(5, 1, C).to(shift_dtype)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    function = sana_ext.norm_modulate if form == "norm_modulate" else sana_ext.residual_norm_modulate
    result = function(**leaves, out_dtype=torch.float32)
    n = result if form == "norm_modulate" else result[1]
    z = tensors["x"] if form == "norm_modulate" else result[0].detach()
    dn = torch.full_like(n, 3000.3)
    n.backward(dn)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == tensors[name].dtype
    xhat = torch.nn.functional.layer_norm(z.double(), (C,), eps=1e-6)
    truths = {"shift": dn.double().sum(1), "scale": (dn.double() * xhat).sum(1)}
    for name, truth in truths.items():
        expected = truth.to(tensors[name].dtype)
        close = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[expected.dtype]
        torch.testing.assert_close(leaves[name].grad, expected, rtol=close, atol=0.2)
    if shift_dtype == torch.float32:
        assert torch.isfinite(leaves["shift"].grad).all()
