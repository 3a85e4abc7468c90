"""linear_attention and linear_attention_qkv against their reference."""

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
from linear_attention_cases import NORMS, compiled_only, functions, has_kernel, maker, packed

import sana_ext
from sana_ext import reference

LOW = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (2, 5, 2, 4),
    (1, 1, 1, 1),
    (2, 67, 3, 5),
    (1, 20 if EMULATED else 130, 2, 72),
    (1, 35, 2, 112),
    (3, 33, 5, 32),
    (0, 4, 2, 8),
    (1, 30, 36, 32) if EMULATED else (1, 300, 70, 32),
]
every_norm = pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
cpu_only = pytest.mark.skipif(EMULATED, reason="about the CPU's kernels, and too large for the emulator")
widest_and_bf16 = pytest.mark.parametrize("dtype", [WIDEST, torch.bfloat16], ids=dtype_id)
with_and_without_norms = pytest.mark.parametrize("norms", [(), NORMS["both norms"]], ids=["no norms", "both norms"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@with_and_without_norms
def test_forward_and_gradients(shape, dtype, norms):
    assert_matches(*functions(), maker(*shape, norms), dtype)


@pytest.mark.parametrize("shape", [(2, 67, 3, 5), (2, 130, 4, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@every_norm
def test_packed(shape, dtype, norms):
    assert_matches(*functions(shape[2]), packed(maker(*shape, norms)), dtype)


@pytest.mark.parametrize("eps", [0.0, 1e-15, 1e-8, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@every_norm
def test_eps(eps, dtype, norms):
    assert_matches(*functions(eps=eps, norm_eps=1e-3), maker(2, 70, 3, 8, norms), dtype)


NAMES = ("q", "k", "v", "weight_q", "weight_k")
F32, BF16, F16 = LOW
MIXES = {
    "autocast": dict(zip(NAMES, (BF16, BF16, BF16, F32, F32))),
    "autocast fp16": dict(zip(NAMES, (F16, F16, F16, F32, F32))),
    "all different": dict(zip(NAMES, (F32, F16, BF16, BF16, F16))),
    "16-bit queries": dict(zip(NAMES, (BF16, F32, F32, F32, BF16))),
}


@pytest.mark.parametrize("dtypes", MIXES.values(), ids=MIXES)
def test_mixed_dtypes(dtypes):
    for D in (8, 32):
        assert_matches(*functions(), maker(2, 70, 3, D), dtypes)


@pytest.mark.parametrize("eps", [1e-15, 1e-8])
@pytest.mark.parametrize("k", [1e-6, 1.0, 6e4])
@pytest.mark.parametrize("q", [1e-6, 1.0, 6e4])
@pytest.mark.parametrize("dtype", LOW[EMULATED:], ids=dtype_id)  # fp32 takes too long under the emulator
@with_and_without_norms
def test_magnitudes(q, k, eps, dtype, norms):
    """Forward and gradients at the ends of fp16. The output is scaled so that gradients of 1 / |q| fit into fp16."""
    small = min(q, k, 1.0)
    op, ref = functions(eps=eps)
    make = maker(2, 67, 3, 32, norms, q, k)
    assert_matches(
        lambda **v: op(**v) * small,
        lambda **v: ref(**v) * small,
        lambda seed: {n: v.clamp(-6e4, 6e4) for n, v in make(seed).items()},
        dtype,
    )


@pytest.mark.parametrize("eps", [0.0, 1e-15, 1e-8])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@with_and_without_norms
def test_zero_denominator(eps, dtype, norms):
    """Rows without a positive query or key are exactly 0 and get a gradient of exactly 0; never NaN."""
    op, _ = functions(eps=eps)
    for D in (5, 32):
        inputs = {n: v.to(dtype).requires_grad_() for n, v in maker(1, 6, 2, D, norms)(0).items()}
        with torch.no_grad():
            for w in norms:
                inputs[w].abs_()
            inputs["q"][0, 2] = -inputs["q"][0, 2].abs()
            inputs["q"][0, 3] = 0
            inputs["k"][:, :, 1] = -1.0
        out = op(**inputs)
        grads = torch.autograd.grad(out.float().sum(), list(inputs.values()))
        assert all(torch.isfinite(t).all() for t in (out, *grads))
        assert not out[0, 2:4].any()
        assert not out[:, :, 1].any()
        assert not grads[0][0, 3].any()
        if not norms:
            assert not grads[0][0, 2].any()


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_nan_is_not_hidden(dtype):
    inputs = {n: v.to(dtype) for n, v in maker(1, 40, 2, 32)(0).items()}
    for name in "qkv":
        poisoned = inputs | {name: inputs[name].clone()}
        poisoned[name][0, 7, 1, 3] = torch.nan
        out = sana_ext.linear_attention(**poisoned)
        assert out[0, 7, 1].isnan().all() if name == "q" else out[0, :, 1, 3].isnan().all()


@compiled_only
@widest_and_bf16
def test_strided_input(dtype):
    """Slices of one projection, head-major and channel-major layouts, groups of q, k, v, every second token."""
    q, k, v, *weights = (x.to(dtype) for x in maker(2, 67, 3, 32)(0).values())
    run = lambda *x: sana_ext.linear_attention(*x, weight_q=weights[0], weight_k=weights[1])  # noqa: E731
    expected = run(q, k, v)
    layouts = {
        "packed": reference.unpack(torch.stack([q, k, v], 2).flatten(2), 3),
        "head-major": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "groups": torch.stack([q, k, v], 3).unbind(3),
        "channel-major": [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (q, k, v)],
        "every second token": [torch.stack([x, x * 9], 2).flatten(1, 2)[:, ::2] for x in (q, k, v)],
    }
    for name, views in layouts.items():
        got = run(*views)
        assert got.is_contiguous()
        assert got.shape == q.shape
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13, msg=name)


@compiled_only
@cpu_only
@pytest.mark.parametrize(("H", "D"), [(70, 32), (112, 20)], ids=["streamed", "unaligned heads"])
def test_large_outputs_are_the_same(H, D):
    """Results beyond the caches are written by streaming stores: the bits are those of the images one by one."""
    q, k, v = (rand(i, 4, 490, H, D).float() for i in range(3))
    parts = [sana_ext.linear_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1]) for b in range(4)]
    assert q.numel() * 4 > 1 << 24 > parts[0].numel() * 4
    assert torch.equal(sana_ext.linear_attention(q, k, v), torch.cat(parts))


@pytest.mark.parametrize("D", [5, 32])
@widest_and_bf16
def test_expanded_input_and_gradient(D, dtype):
    values = {n: v.to(dtype) for n, v in maker(2, 19, 3, D)(0).items()}
    inputs = {n: v[:1].expand_as(v) if v.dim() == 4 else v for n, v in values.items()}
    dense = {n: v.contiguous() for n, v in inputs.items()}
    results = []
    for values, expand in ((inputs, True), (dense, False)):
        leaves = {n: v.detach().requires_grad_() for n, v in values.items()}
        out = sana_ext.linear_attention(**leaves)
        cotangent = rand(3, 1, 1, 1, D).to(dtype).expand_as(out)
        results.append(
            [out, *torch.autograd.grad(out, list(leaves.values()), cotangent if expand else cotangent.contiguous())]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", LOW[:2], ids=dtype_id)
def test_packed_equals_separate_bitwise(dtype):
    inputs = {n: v.to(dtype) for n, v in maker(2, 70, 3, 32)(0).items()}
    qkv = torch.stack([inputs["q"], inputs["k"], inputs["v"]], 2).flatten(2).requires_grad_()
    leaves = {n: v.clone().requires_grad_() for n, v in inputs.items()}
    weights = {w: inputs[w] for w in NORMS["both norms"]}
    a = sana_ext.linear_attention(**leaves)
    b = sana_ext.linear_attention_qkv(qkv, 3, **weights)
    assert torch.equal(a.flatten(2), b)
    cotangent = rand(1, *a.shape).to(dtype)
    rows = torch.autograd.grad(a, [leaves[n] for n in "qkv"], cotangent)
    (dqkv,) = torch.autograd.grad(b, qkv, cotangent.flatten(2))
    assert torch.equal(torch.stack(rows, 2).flatten(2), dqkv)


@needs_fp64
@pytest.mark.parametrize("eps", [1e-15, 1e-2])
@every_norm
def test_gradcheck(norms, eps):
    inputs = maker(2, 4, 2, 3, norms)(0)
    op, _ = functions(eps=eps)
    gradcheck(lambda *values: op(**dict(zip(inputs, values))), list(inputs.values()))
    inputs = packed(maker(2, 4, 2, 3, norms))(0)
    op, _ = functions(2, eps=eps)
    gradcheck(lambda *values: op(**dict(zip(inputs, values))), list(inputs.values()))


@pytest.mark.parametrize("eps", [1e-15, 1e-8])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@every_norm
def test_opcheck(norms, dtype, eps):
    v = maker(2, 5, 2, 4, norms)(0)
    weights = [v.get(w) for w in NORMS["both norms"]]
    opcheck(torch.ops.sana_ext.linear_attention_forward, (v["q"], v["k"], v["v"], *weights, 1e-5, eps), dtype)
    qkv = packed(maker(2, 5, 2, 4, norms))(0)["qkv"]
    opcheck(torch.ops.sana_ext.linear_attention_qkv_forward, (qkv, 2, *weights, 1e-5, eps), dtype)


@pytest.mark.parametrize("heads", [None, 3])
def test_compiles(heads):
    op, _ = functions(heads)
    make = maker(2, 9, 3, 8)
    inputs = {k: v.float() for k, v in (make if heads is None else packed(make))(0).items()}
    assert_compiles(lambda *values: op(**dict(zip(inputs, values))), list(inputs.values()))


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 700, 1, 32), (2, 15 if EMULATED else 150, 7, 12), (5, 20, 2, 32)], ids=str)
def test_thread_independent(shape, dtype):
    op, _ = functions(shape[2], eps=1e-8)
    assert_thread_independent(op, {k: v.to(dtype) for k, v in packed(maker(*shape))(0).items()})


@pytest.mark.parametrize("heads", [None, 3])
def test_second_derivative_is_refused(heads):
    op, _ = functions(heads)
    make = maker(1, 5, 3, 4)
    leaves = {k: v.to(WIDEST).requires_grad_() for k, v in (make if heads is None else packed(make))(0).items()}
    grad = torch.autograd.grad(op(**leaves).square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        torch.autograd.grad(sum(g.sum() for g in grad), list(leaves.values()), allow_unused=True)


@pytest.mark.parametrize(
    ("model", "autocast"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)],
    ids=["fp32", "bf16", "fp16", "autocast"],
)
def test_stock_diffusers(model, autocast):
    """Against the self-attention of a SANA-1.5 block, run by diffusers' own processor."""
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    torch.manual_seed(0)
    attention = Attention(
        64, heads=2, kv_heads=2, dim_head=32, qk_norm="rms_norm_across_heads", processor=SanaLinearAttnProcessor2_0()
    )
    attention.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    for norm in (attention.norm_q, attention.norm_k):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    attention = attention.to(model)
    x = torch.randn(2, 67, 64).to(model)
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        stock = attention(x)
        q, k, v = (to(x).unflatten(-1, (2, 32)) for to in (attention.to_q, attention.to_k, attention.to_v))
        weights = {"weight_q": attention.norm_q.weight, "weight_k": attention.norm_k.weight}
        ours = sana_ext.linear_attention(q, k, v, **weights).flatten(2)
    doubles = {n: w.double() for n, w in weights.items()}
    truth = reference.linear_attention(q.double(), k.double(), v.double(), **doubles).flatten(2)
    assert ours.dtype == q.dtype
    error = lambda out: (out.double() - truth).abs().max().item()  # noqa: E731
    assert error(ours) <= 2 * error(stock) + 2e-6
    if has_kernel:  # rounds once, whatever the mode
        assert error(ours) <= torch.finfo(ours.dtype).eps / 2 * truth.abs().max().item() + 2e-6
