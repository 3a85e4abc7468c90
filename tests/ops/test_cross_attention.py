"""cross_attention: torch's own where the processor has 16-bit arithmetic, else fp32 arithmetic."""

import importlib
import math

import pytest
import torch
from helpers import DTYPES, assert_compiles, assert_matches, dtype_id, gradcheck, outputs_and_gradients, rand

import sana_ext
from sana_ext import reference

LOW = [torch.bfloat16, torch.float16]
ops = torch.ops.sana_ext

MASKS = {
    "bool": lambda B, N, T, H: torch.arange(T)[None] < torch.arange(1, B + 1)[:, None] * max(1, T // (B + 1)),
    "bool [B, 1, T]": lambda B, N, T, H: MASKS["bool"](B, N, T, H)[:, None],
    "added": lambda B, N, T, H: ((~MASKS["bool"](B, N, T, H))[:, None] * -10000.0).double(),
    "added [B, H, N, T]": lambda B, N, T, H: rand(5, B, H, N, T),
    "added [1, 1, N, T]": lambda B, N, T, H: rand(5, 1, 1, N, T),
    "everything out": lambda B, N, T, H: torch.zeros(B, T, dtype=torch.bool),
    "everything -10000": lambda B, N, T, H: torch.full((B, 1, T), -10000.0, dtype=torch.float64),
}
ATTENTION = [(2, 5, 7, 2, 8), (1, 1, 1, 1, 1), (2, 33, 20, 3, 5), (0, 4, 6, 2, 8), (3, 0, 6, 2, 8), (1, 40, 50, 2, 112)]


def attention_maker(B, N, T, H, D, mask):
    def make(seed):
        q, k, v = rand(seed, B, N, H * D), rand(seed + 1, B, T, H * D), rand(seed + 2, B, T, H * D)
        heads = {
            name: t.view(B, -1, H, D) if t.numel() else t.new_empty(B, t.shape[1], H, D)
            for name, t in zip("qkv", (q, k, v))
        }
        return heads | {"mask": None if mask is None else MASKS[mask](B, N, T, H)}

    return make


def without_mask(make):
    return lambda seed: {k: t for k, t in make(seed).items() if k != "mask"}


def attentions(make, op):
    mask = make(0)["mask"]
    return lambda q, k, v: op(q, k, v, mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype))


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward_and_gradients(shape, mask, dtype):
    make = attention_maker(*shape, mask)
    assert_matches(
        attentions(make, ops.cross_attention_forward),
        attentions(make, reference.cross_attention),
        without_mask(make),
        dtype,
    )


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_public_function(both, mask, dtype):
    make = attention_maker(2, 12, 9, 2, 16, mask)
    assert_matches(
        attentions(make, sana_ext.cross_attention),
        attentions(make, reference.cross_attention),
        without_mask(make),
        dtype,
    )


def test_formula():
    """The reference is torch's attention; this is the formula by hand."""
    q, k, v, mask = attention_maker(2, 5, 7, 2, 8, "added")(0).values()
    scores = torch.einsum("bnhd,bthd->bhnt", q, k) / math.sqrt(8) + mask[:, None]
    expected = torch.einsum("bhnt,bthd->bnhd", scores.softmax(-1), v)
    torch.testing.assert_close(sana_ext.cross_attention(q, k, v, mask), expected, rtol=1e-12, atol=1e-12)


def test_blocks(monkeypatch):
    """The backward gives the same gradients however it is cut into blocks of images and heads."""
    make = attention_maker(3, 6, 7, 4, 8, "added [B, H, N, T]")
    module = importlib.import_module("sana_ext.ops.cross_attention")
    runs = []
    for elements in (1, 2 * 42, 5 * 42, 9 * 42, 1 << 24):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
        runs.append(outputs_and_gradients(attentions(make, ops.cross_attention_forward), without_mask(make)(0), 0))
    for run in runs[1:]:
        for name, value in run.items():
            torch.testing.assert_close(value, runs[0][name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
def test_opcheck(dtype):
    q, k, v, _ = attention_maker(2, 5, 7, 2, 8, None)(0).values()
    for mask in (None, MASKS["bool"](2, 5, 7, 2), MASKS["added"](2, 5, 7, 2).to(dtype)):
        args = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        torch.library.opcheck(ops.cross_attention_forward, (*args, mask))


def test_compiles(both):
    q, k, v, mask = attention_maker(2, 5, 7, 2, 8, "bool")(0).values()
    assert_compiles(lambda *qkv: sana_ext.cross_attention(*qkv, mask), [t.bfloat16() for t in (q, k, v)])


def test_gradcheck():
    make = attention_maker(2, 3, 4, 2, 5, "added")
    gradcheck(attentions(make, ops.cross_attention_forward), list(without_mask(make)(0).values()))


def test_autocast(both):
    v = {k: t.float() for k, t in attention_maker(2, 5, 7, 2, 8, "added")(0).items()}
    with torch.autocast("cpu", torch.bfloat16):
        got, stock = sana_ext.cross_attention(**v), reference.cross_attention(**v)
    assert got.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(got, stock, rtol=2e-2, atol=2e-2)


def test_keeps_only_its_inputs(upcast):
    leaves = [t.bfloat16().requires_grad_() for t in list(attention_maker(2, 5, 7, 2, 8, None)(0).values())[:3]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sana_ext.cross_attention(*leaves)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves}


def test_small_heads_that_need_gradients_run_in_fp32(monkeypatch):
    """torch's 16-bit backward is slow on small heads; without gradients, and on large heads, torch's own runs."""
    module = importlib.import_module("sana_ext.ops.cross_attention")
    monkeypatch.setattr(module, "upcast", lambda x: False)
    q, k, v = (t.bfloat16() for t in list(attention_maker(2, 5, 7, 2, 8, None)(0).values())[:3])

    def node(*args):
        return type(sana_ext.cross_attention(*args).grad_fn).__name__

    assert "sana_ext" in node(q.requires_grad_(), k, v)
    assert "sana_ext" not in node(q.detach().float().requires_grad_(), k.float(), v.float())
    with torch.no_grad():
        assert sana_ext.cross_attention(q, k, v).grad_fn is None
    monkeypatch.setattr(module, "SMALL_HEAD", 5 * 7 * 8)
    assert "sana_ext" not in node(q, k, v)


BAD_ATTENTION = [
    ("rank", lambda v: v | {"q": v["q"][0]}, ValueError, "q must have shape"),
    ("tokens", lambda v: v | {"v": v["v"][:, :-1]}, ValueError, "v must have shape"),
    ("heads", lambda v: v | {"k": v["k"][:, :, :1]}, ValueError, "k must have shape"),
    ("no tokens", lambda v: v | {"k": v["k"][:, :0], "v": v["v"][:, :0]}, ValueError, "at least one token"),
    ("no channels", lambda v: v | {"q": v["q"][..., :0]}, ValueError, "at least one head"),
    ("dtype mix", lambda v: v | {"k": v["k"].bfloat16()}, TypeError, "k is bfloat16"),
    ("mask type", lambda v: v | {"mask": 3}, ValueError, "mask must be a torch.Tensor"),
    ("mask rank", lambda v: v | {"mask": v["mask"][0, 0]}, ValueError, "mask must be a torch.Tensor"),
    ("mask dtype", lambda v: v | {"mask": v["mask"].int()}, TypeError, "bool or floating point"),
    ("mask shape", lambda v: v | {"mask": v["mask"][..., :-1]}, ValueError, "mask must have shape"),
    ("mask device", lambda v: v | {"mask": v["mask"].to("meta")}, ValueError, "mask is on meta"),
    ("mask gradient", lambda v: v | {"mask": v["mask"].requires_grad_()}, ValueError, "gets no gradient"),
]


@pytest.mark.parametrize(
    ("change", "error", "match"), [b[1:] for b in BAD_ATTENTION], ids=[b[0] for b in BAD_ATTENTION]
)
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        sana_ext.cross_attention(
            **change({k: t.float() for k, t in attention_maker(2, 5, 7, 2, 8, "added")(0).items()})
        )
