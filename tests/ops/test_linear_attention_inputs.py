"""linear_attention and linear_attention_qkv given bad, odd and random input."""

import pytest
import torch
from helpers import DTYPES, EMULATED, EPS32, WIDEST, rand
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_attention_cases import NORMS, compiled_only, functions, maker, packed

import sana_ext
from sana_ext import reference


def example():
    return maker(2, 5, 3, 4)(0)


BAD = [
    ("rank", lambda v: v | {"q": v["q"][0]}, ValueError, "q must have shape"),
    ("type", lambda v: v | {"v": None}, TypeError, "v must be a torch.Tensor"),
    ("integer", lambda v: v | {"k": v["k"].long()}, TypeError, "k has dtype int64"),
    ("complex", lambda v: v | {"q": v["q"].cfloat()}, TypeError, "q has dtype complex64"),
    ("sparse", lambda v: v | {"q": v["q"].to_sparse()}, ValueError, "q must be a dense tensor"),
    ("k shape", lambda v: v | {"k": v["k"][:, :-1]}, ValueError, "k must have shape"),
    ("v shape", lambda v: v | {"v": v["v"][..., :-1]}, ValueError, "v must have shape"),
    ("no tokens", lambda v: v | {"q": v["q"][:, :0]}, ValueError, "q must have at least one token"),
    ("no heads", lambda v: v | {"q": v["q"][:, :, :0]}, ValueError, "q must have at least one token, head"),
    ("weight length", lambda v: v | {"weight_q": v["weight_q"][1:]}, ValueError, "weight_q must have shape"),
    ("weight rank", lambda v: v | {"weight_k": v["weight_k"][None]}, ValueError, "weight_k must have shape"),
    ("weight type", lambda v: v | {"weight_k": 1.0}, TypeError, "weight_k must be a torch.Tensor"),
    ("fp64 mix", lambda v: v | {"k": v["k"].float()}, TypeError, "k is float32 and q is float64"),
    ("fp64 weight", lambda v: v | {"weight_q": v["weight_q"].float()}, TypeError, "weight_q is float32"),
    ("device mix", lambda v: v | {"v": v["v"].to("meta")}, ValueError, "v is on meta"),
    ("negative eps", lambda v: v | {"eps": -1e-15}, ValueError, "eps must be a number >= 0"),
    ("NaN eps", lambda v: v | {"norm_eps": float("nan")}, ValueError, "norm_eps must be a number >= 0"),
    ("eps type", lambda v: v | {"eps": "small"}, TypeError, "eps must be a number"),
]


@pytest.mark.parametrize(("change", "error", "match"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        sana_ext.linear_attention(**change(example()))


BAD_PACKED = [
    ("rank", lambda x: (x[0], 3), ValueError, "qkv must have shape"),
    ("heads", lambda x: (x, 5), ValueError, "multiple of 3 \\* heads = 15"),
    ("no heads", lambda x: (x, 0), ValueError, "heads must be at least 1"),
    ("heads type", lambda x: (x, 3.0), TypeError, "heads must be an int"),
    ("no tokens", lambda x: (x[:, :0], 3), ValueError, "qkv must have at least one token"),
]


@pytest.mark.parametrize(("change", "error", "match"), [b[1:] for b in BAD_PACKED], ids=[b[0] for b in BAD_PACKED])
def test_bad_packed_input(change, error, match):
    with pytest.raises(error, match=match):
        sana_ext.linear_attention_qkv(*change(packed(maker(2, 5, 3, 4))(0)["qkv"]))


@compiled_only
def test_kernels_check_their_arguments():
    """A direct call of the ops, past the public functions, must not read outside a tensor either."""
    ops = torch.ops.sana_ext
    q, k, x, wq, wk = (v.to(WIDEST) for v in example().values())
    out, state, rstd_q, rstd_k = ops.linear_attention_forward(q, k, x, wq, wk, 1e-5, 1e-8)
    for args in [
        (q, k[:, 1:], x, wq, wk),
        (q, k, x, wq[1:], wk),
        (q, k, x.long() if EMULATED else x.float(), wq, wk),
        (q[0], k[0], x[0], wq, wk),
    ]:
        with pytest.raises((RuntimeError, ValueError)):
            ops.linear_attention_forward(*args, 1e-5, 1e-15)
    good = (out, q, k, x, wq, wk, state, rstd_q, rstd_k)
    for i in range(len(good)):
        bad = list(good)
        bad[i] = bad[i][..., 1:]
        with pytest.raises((RuntimeError, ValueError)):
            ops.linear_attention_backward(*bad, 1e-8)


sizes = st.integers(0, 40)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), sizes, st.integers(0, 5), sizes),
    dtype=st.sampled_from(DTYPES),
    norms=st.sampled_from(list(NORMS.values())),
    eps=st.sampled_from([0.0, 1e-15, 1e-6]),
    cut=st.sampled_from(["", "", "", "q", "k", "v", "weight_q", "weight_k"]),
    axis=st.integers(0, 3),
    odd=st.sampled_from([torch.float32, torch.float64, torch.int32, torch.bool, None]),
)
def test_any_shape_matches_or_is_refused(shape, dtype, norms, eps, cut, axis, odd):
    """Random sizes; one tensor may lose an element on one axis, or take another dtype."""
    inputs = {n: v.to(dtype) for n, v in maker(*shape, norms)(1).items()}
    if cut in inputs:
        x = inputs[cut]
        axis = min(axis, x.dim() - 1)
        inputs[cut] = x.narrow(axis, 0, max(x.shape[axis] - 1, 0)) if odd is None else x.to(odd)
    floats = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    dtypes = {v.dtype for v in inputs.values()}
    same = inputs["q"].shape == inputs["k"].shape == inputs["v"].shape
    channels = inputs["q"].shape[2] * inputs["q"].shape[3]
    valid = same and 0 not in inputs["q"].shape[1:] and all(inputs[w].numel() == channels for w in norms)
    valid = valid and dtypes <= floats and (torch.float64 not in dtypes or len(dtypes) == 1)
    op, ref = functions(eps=eps)
    if not valid:
        names = "|".join(["q", "k", "v", *norms])
        with pytest.raises((ValueError, TypeError), match=f"sana_ext.linear_attention: ({names}) "):
            op(**inputs)
        return
    truth, peer = ref(**{n: v.double() for n, v in inputs.items()}), ref(**inputs)
    error = lambda x: (x.double() - truth).abs().max().item() if x.numel() else 0.0  # noqa: E731
    largest = truth.abs().max().item() if truth.numel() else 0.0
    out = op(**inputs)
    # One draw instead of five: the reference may be lucky, so we are granted one rounding of our own besides.
    own = 1e-12 if out.dtype == torch.float64 else torch.finfo(out.dtype).eps / 2 + 8 * EPS32
    assert error(out) <= 2 * error(peer) + own * largest


@settings(max_examples=60, deadline=None)
@given(channels=st.integers(0, 60), heads=st.integers(-1, 9), tokens=st.integers(0, 5))
def test_any_packed_shape_matches_or_is_refused(channels, heads, tokens):
    qkv = rand(2, 2, tokens, channels).to(WIDEST)
    if tokens and channels and heads > 0 and channels % (3 * heads) == 0:
        torch.testing.assert_close(
            sana_ext.linear_attention_qkv(qkv, heads), reference.linear_attention_qkv(qkv, heads)
        )
    else:
        with pytest.raises(ValueError, match=r"qkv|heads"):
            sana_ext.linear_attention_qkv(qkv, heads)
