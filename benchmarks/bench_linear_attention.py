"""linear_attention with and without qk-norm against the expressions of diffusers' SanaLinearAttnProcessor2_0."""

import harness
import torch
import torch.nn.functional as F

import sana_ext

DIM = 32


def rms_norm(x, weight):
    accumulator = x.double() if x.dtype == torch.float64 else x.float()
    x = accumulator * torch.rsqrt(accumulator.square().mean(-1, keepdim=True) + 1e-5)
    return x.to(weight.dtype) * weight


def eager(q, k, v, weight_q=None, weight_k=None):
    """q, k, v [B, N, C] as the projections leave them."""
    dtype, heads = q.dtype, q.shape[-1] // DIM
    if weight_q is not None:
        q, k = rms_norm(q, weight_q), rms_norm(k, weight_k)
    q = F.relu(q.transpose(1, 2).unflatten(1, (heads, -1)))
    k = F.relu(k.transpose(1, 2).unflatten(1, (heads, -1)).transpose(2, 3))
    v = v.transpose(1, 2).unflatten(1, (heads, -1))
    if dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    v = F.pad(v, (0, 0, 0, 1), value=1.0)
    out = torch.matmul(torch.matmul(v, k), q)
    out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
    return out.flatten(1, 2).transpose(1, 2).to(dtype)


def ours(q, k, v, weight_q=None, weight_k=None):
    q, k, v = (t.unflatten(-1, (-1, DIM)) for t in (q, k, v))
    return sana_ext.linear_attention(q, k, v, weight_q=weight_q, weight_k=weight_k).flatten(2)


def case(args, B, tokens, norm, dtype, direction):
    heads, tokens = (4, 64) if args.quick else (args.heads, tokens)
    C = heads * DIM
    op, shape = f"linear_attention{', qk-norm' if norm else ''} {direction}", f"{B}x{tokens}x{heads}x{DIM}"
    if not harness.wanted(args, op, shape, dtype):
        return None
    torch.manual_seed(0)
    inputs = {name: torch.randn(B, tokens, C, device=args.device).to(dtype) for name in "qkv"}
    if norm:
        weights = {name: 1 + 0.2 * torch.randn(C, device=args.device) for name in ("weight_q", "weight_k")}
        inputs |= {name: w.to(dtype) for name, w in weights.items()}
    functions = {"eager": eager, "ours": ours}
    if not args.no_compile:
        functions["compile"] = harness.compiled(eager)
    backward = direction == "backward"
    return harness.Case(
        op,
        shape,
        dtype,
        {name: getattr(harness, direction)(fn, inputs) for name, fn in functions.items()},
        harness.gate(ours, eager, inputs, gradients=backward),
        flops=(8 if backward else 4) * B * tokens * C * DIM if dtype == torch.float32 else 0,
        bytes=(7 if backward else 4) * B * tokens * C * dtype.itemsize,
    )


if __name__ == "__main__":
    args = harness.arguments(__doc__, tokens=(1024, 4096), heads=70)
    harness.run(
        [
            lambda B=images, t=tokens, n=norm, d=dtype, k=direction: case(args, B, t, n, d, k)
            for images in args.images
            for tokens in args.tokens
            for norm in (True, False)
            for dtype in (torch.float32, torch.bfloat16)
            for direction in ("forward", "backward")
        ],
        args,
    )
