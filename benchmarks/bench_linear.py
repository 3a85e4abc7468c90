"""linear and cross_attention against torch's own, at the shapes of a SANA-1.5 1600M block with 1024 tokens.

On a processor with 16-bit arithmetic both columns are torch's own and the ratio is 1, but for the backward of small heads
(those of the mini model, at its training batch). To see an AVX2 machine from a newer one:
SANA_EXT_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import harness
import torch
import torch.nn.functional as F

import sana_ext

LOW = (torch.bfloat16, torch.float16)
# rows, K, F: the projections of the attention, the two 1x1 convolutions of Mix-FFN, the text's key, the time embedding
FORWARD = [(1024, 2240, 2240), (1024, 2240, 11200), (1024, 5600, 2240), (300, 2240, 2240), (2, 2240, 2240)]
BACKWARD = [(256, 2240, 2240)]  # stock may need ten seconds for 1024 rows
BLOCK, MINI = (1, 1024, 300, 20, 112), (64, 64, 17, 4, 32)  # images, tokens, text tokens, heads, head dim
ATTENTION = [(BLOCK, "forward"), (BLOCK, "backward"), (MINI, "backward")]


def linear_case(args, shape, dtype, direction):
    M, K, F_ = (40, 64, 96) if args.quick else shape
    torch.manual_seed(0)
    inputs = {"x": torch.randn(M, K), "weight": torch.randn(F_, K) * K**-0.5, "bias": torch.randn(F_)}
    return make(args, "linear", f"{M}x{K}x{F_}", dtype, direction, inputs, F.linear, sana_ext.linear, 2 * M * K * F_)


def attention_case(args, shape, dtype, direction):
    B, N, T, H, D = (1, 40, 20, 2, 16) if args.quick else shape
    torch.manual_seed(0)
    inputs = {name: torch.randn(B, tokens, H, D) for name, tokens in (("q", N), ("k", T), ("v", T))}
    mask = torch.arange(T, device=args.device)[None] < T * 2 // 3

    def eager(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2)

    def ours(q, k, v):
        return sana_ext.cross_attention(q, k, v, mask)

    return make(
        args, "cross_attention", f"{B}x{N}x{T}x{H}x{D}", dtype, direction, inputs, eager, ours, 4 * B * N * T * H * D
    )


def make(args, op, shape, dtype, direction, inputs, eager, ours, flops):
    inputs = {k: t.to(args.device, dtype) for k, t in inputs.items()}
    functions = {"eager": eager, "ours": ours}
    if not args.no_compile:
        functions["compile"] = harness.compiled(eager)
    return harness.Case(
        f"{op} {direction}",
        shape,
        dtype,
        {k: getattr(harness, direction)(fn, inputs) for k, fn in functions.items()},
        harness.gate(ours, eager, inputs, gradients=direction == "backward"),
        flops=flops * (2 if direction == "backward" else 1),
        bytes=sum(t.numel() for t in inputs.values()) * dtype.itemsize,
    )


if __name__ == "__main__":
    args = harness.arguments(__doc__)
    shapes = [(s, "forward") for s in (FORWARD[:1] if args.quick else FORWARD)] + [(s, "backward") for s in BACKWARD]
    harness.run(
        [lambda s=s, d=d, way=way: linear_case(args, s, d, way) for s, way in shapes for d in LOW]
        + [lambda s=s, d=d, way=way: attention_case(args, s, d, way) for s, way in ATTENTION for d in LOW],
        args,
    )
