"""dwconv_glu (SiLU, depthwise 3x3, gate) and the whole glumbconv against diffusers' GLUMBConv on channels_last tensors."""

import harness
import torch
import torch.nn.functional as F

import sana_ext


def eager_stencil(u, weight, bias, side):
    """u [B, N, 2F]: a channels_last view of the picture, as the 1x1 convolution leaves it."""
    x = F.silu(u.unflatten(1, (side, side)).permute(0, 3, 1, 2))
    a, g = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1]).chunk(2, dim=1)
    return (a * F.silu(g)).flatten(2).transpose(1, 2)


def eager_ffn(x, w_in, b_in, weight, bias, w_out, side):
    x = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    u = F.silu(F.conv2d(x, w_in, b_in))
    a, g = F.conv2d(u, weight, bias, padding=1, groups=u.shape[1]).chunk(2, dim=1)
    return F.conv2d(a * F.silu(g), w_out).flatten(2).transpose(1, 2)


def case(args, B, side, name, dtype, direction):
    side, C, hidden = (8, 64, 160) if args.quick else (side, args.channels, args.channels * 5 // 2)
    op = f"{name} {direction}"
    shape = f"{B}x{side}x{side}x{2 * hidden if name == 'dwconv_glu' else C}"
    if not harness.wanted(args, op, shape, dtype):
        return None
    torch.manual_seed(0)

    def randn(*size):
        return torch.randn(size, device=args.device)

    stencil = {"weight": randn(2 * hidden, 1, 3, 3) / 3, "bias": randn(2 * hidden) * 0.1}
    if name == "dwconv_glu":
        inputs = {"u": randn(B, side * side, 2 * hidden), **stencil}
        eager, flops, units = lambda **v: eager_stencil(side=side, **v), 0, 3 if direction == "forward" else 5
        ours = lambda u, weight, bias: sana_ext.dwconv_glu(u, weight, bias, side, side)  # noqa: E731
    else:
        inputs = {
            "x": randn(B, side * side, C),
            "w_in": randn(2 * hidden, C, 1, 1) / C**0.5,
            "b_in": randn(2 * hidden) * 0.1,
            **stencil,
            "w_out": randn(C, hidden, 1, 1) / hidden**0.5,
        }
        eager, units = lambda **v: eager_ffn(side=side, **v), 0
        flops = 6.0 * B * side * side * C * hidden * (1 if direction == "forward" else 2)

        def ours(x, w_in, b_in, weight, bias, w_out):
            return sana_ext.glumbconv(x, w_in, b_in, weight, bias, w_out, side, side)

    inputs = {k: v.to(dtype) for k, v in inputs.items()}
    functions = {"eager": eager, "ours": ours}
    if not args.no_compile:
        functions["compile"] = harness.compiled(eager)
    return harness.Case(
        op,
        shape,
        dtype,
        {k: getattr(harness, direction)(fn, inputs) for k, fn in functions.items()},
        harness.gate(ours, eager, inputs, gradients=direction == "backward"),
        flops=0 if args.quick else flops,
        bytes=units * B * side * side * hidden * dtype.itemsize,
    )


if __name__ == "__main__":
    args = harness.arguments(__doc__, sides=(32,), channels=2240)
    harness.run(
        [
            lambda B=images, s=side, n=name, d=dtype, k=direction: case(args, B, s, n, d, k)
            for images in args.images
            for side in args.sides
            for name in ("dwconv_glu", "glumbconv")
            for dtype in (torch.float32, torch.bfloat16)
            for direction in ("forward", "backward")
        ],
        args,
    )
