"""An infinity or a NaN in any argument: where the reference ends in none, no finite value may be left behind.

GradScaler skips a step because it finds such a value; one that an op turned into a number would be trained on.
"""

import itertools
import math

import pytest
import torch
from helpers import DTYPES, EMULATED, dtype_id, rand

import sana_ext
from sana_ext import _selftest, reference
from sana_ext.ops import __all__ as PUBLIC

VALUES = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
dtypes = pytest.mark.parametrize("dtype", DTYPES[-3:], ids=dtype_id)


def case(op, variant, dtype):
    tensors, others = _selftest._case(op)
    if variant == "without norms":
        tensors = {name: t for name, t in tensors.items() if not name.startswith("weight_")}
    if variant == "without a gate":
        del tensors["gate"]
    if variant == "large eps":
        others = {**others, "eps": 1e-3}
    if variant == "another head size":  # in the last dimension, which is not the tuned 32
        width = {"q": 12, "k": 12, "v": 12, "qkv": 36 * 3, "weight_q": 36, "weight_k": 36}
        tensors = {name: t[..., : width[name]] for name, t in tensors.items()}
    return {name: t.to(dtype) for name, t in tensors.items()}, others


VARIANTS = [(op, "") for op in PUBLIC]
VARIANTS += [
    (op, v)
    for op in ("linear_attention", "linear_attention_qkv")
    for v in ("without norms", "large eps", "another head size")
]
VARIANTS += [("residual_norm_modulate", "without a gate")]


def results(function, tensors, others):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    result = function(**leaves, **others)
    outputs = result if isinstance(result, tuple) else (result,)
    cotangents = [rand(i, *o.shape).to(o) for i, o in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {f"out{i}": o.detach() for i, o in enumerate(outputs)} | {f"d{n}": g for n, g in zip(leaves, gradients)}


def hidden(ours, *references):
    """Where no reference is finite and ours is: elements of outputs and of parameters' gradients, tokens of rows' gradients.

    The norm of a query takes a NaN of one head to all channels of the token's gradient; ours, whose row scale cancels, need not.
    On a GPU a head does not learn of another head's NaN: under the emulator whole tensors count.
    """
    lost = {}
    for name, ours_here in ours.items():
        bad, found = ~torch.stack([r[name].isfinite() for r in references]).any(0), ~ours_here.isfinite()
        if name.startswith("d") and bad.dim() >= 3:
            bad, found = (t.flatten(2).any(2) for t in (bad, found))
        if EMULATED:
            bad, found = bad.any(), found.any()
        kept = bad & ~found
        if kept.any():
            lost[name] = f"{int(kept.sum())} of {int(bad.sum())}"
    return lost


@dtypes
@pytest.mark.parametrize(("op", "variant"), VARIANTS)
def test_no_argument_hides_it(op, variant, dtype):
    """Each value at one or two places of each argument in turn, whatever the signs around them."""
    tensors, others = case(op, variant, dtype)
    for i, (name, t) in enumerate(tensors.items()):
        places = [7 * i % t.numel(), t.numel() - 1 - 3 * i % t.numel()][EMULATED:]
        for place, value in itertools.product(places, VALUES):
            planted = t.clone()
            planted.view(-1)[place] = VALUES[value]
            given = tensors | {name: planted}
            ours, theirs = (results(getattr(m, op), given, others) for m in (sana_ext, reference))
            # Also in fp64: with AVX512_BF16, oneDNN's bf16 convolution multiplies values beyond a row's end by 0.
            exact = results(getattr(reference, op), {n: t.double() for n, t in given.items()}, others)
            lost = hidden(ours, theirs, exact)
            assert not lost, f"{value} at {place} of {name}: finite in ours, not in the reference: {lost}"


@pytest.mark.parametrize("value", VALUES)
@dtypes
@pytest.mark.parametrize("op", ["linear_attention", "linear_attention_qkv"])
def test_a_query_of_either_sign_beside_a_weight_of_either_sign(op, dtype, value):
    tensors, others = case(op, "", dtype)
    queries = next(iter(tensors))
    for sign in (1, -1):
        weights = tensors | {"weight_q": torch.full_like(tensors["weight_q"], 0.7 * sign)}
        planted = tensors[queries].clone()
        planted.view(*planted.shape[:2], -1)[1, 3, 5] = VALUES[value]
        ours, theirs = (results(getattr(m, op), weights | {queries: planted}, others) for m in (sana_ext, reference))
        assert not torch.isfinite(theirs["out0"]).all()
        assert not hidden(ours, theirs), (sign, hidden(ours, theirs))
        # Other tokens and other images are none of its business.
        assert torch.isfinite(ours["out0"][0]).all()
        assert torch.isfinite(ours["out0"][1, 4:]).all()


@pytest.mark.parametrize("upcast_or_not", ["upcast", "torch's own"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("op", ["linear", "cross_attention", "glumbconv"])
def test_nor_does_fp32_arithmetic(request, op, dtype, value, upcast_or_not):
    if upcast_or_not == "upcast":
        request.getfixturevalue("upcast")
    tensors, others = case(op, "", dtype)
    if op == "cross_attention":
        others = {"mask": torch.arange(tensors["k"].shape[1]).expand(2, -1) % 3 > 0}
    for name, t in tensors.items():
        for place in (0, t.numel() // 2):
            planted = t.clone()
            planted.view(-1)[place] = VALUES[value]
            given = tensors | {name: planted}
            ours = results(getattr(sana_ext, op), given, others)
            # In fp32: torch's 16-bit products spread a NaN to neighbouring rows.
            theirs = results(getattr(reference, op), {n: t.float() for n, t in given.items()}, others)
            assert not hidden(ours, theirs), (name, place, hidden(ours, theirs))


@dtypes
def test_silu_of_minus_infinity_is_nan_and_of_large_numbers_is_not(dtype):
    u = torch.zeros(2, 9, 34, dtype=dtype)
    weight, bias = torch.zeros(34, 1, 3, 3, dtype=dtype), torch.zeros(34, dtype=dtype)
    weight[:, 0, 1, 1], bias[17:] = 1, 1
    largest = torch.finfo(dtype).max
    u[0, 0], u[0, 1], u[1, 2, :17], u[1, 6, 17:] = -largest, -1e4, -math.inf, -math.inf
    out = sana_ext.dwconv_glu(u, weight, bias, 3, 3)
    assert (out[0].double().abs() < 1e-30).all()
    assert out[1, [2, 6]].isnan().all()
