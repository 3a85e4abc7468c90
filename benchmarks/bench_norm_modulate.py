"""norm_modulate, gated_residual and residual_norm_modulate against the expressions of diffusers' SanaTransformerBlock."""

import harness
import torch
import torch.nn.functional as F

import sana_ext


def eager_norm_modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def eager_gated_residual(x, y, gate):
    return x + gate[:, None] * y


def eager_residual_norm_modulate(x, y, shift, scale):
    z = y + x
    return z, eager_norm_modulate(z, shift, scale)


# name: eager function, arguments, passes over an [N, C] tensor that the forward and the backward cannot avoid
OPS = {
    "norm_modulate": (eager_norm_modulate, ("x", "shift", "scale"), 2, 3),
    "gated_residual": (eager_gated_residual, ("x", "y", "gate"), 3, 3),
    "residual_norm_modulate": (eager_residual_norm_modulate, ("x", "y", "shift", "scale"), 4, 5),
}


def case(args, B, N, name, dtype, direction):
    N, C = (64, 256) if args.quick else (N, args.channels)
    eager, names, forward_units, backward_units = OPS[name]
    op, shape = f"{name} {direction}", f"{B}x{N}x{C}"
    if not harness.wanted(args, op, shape, dtype):
        return None
    torch.manual_seed(0)
    sizes = {k: (B, N, C) if k in "xy" else (B, C) for k in names}
    inputs = {k: torch.randn(size, device=args.device).to(dtype) for k, size in sizes.items()}
    functions = {"eager": eager, "ours": getattr(sana_ext, name)}
    if not args.no_compile:
        functions["compile"] = harness.compiled(eager)
    units = backward_units if direction == "backward" else forward_units
    return harness.Case(
        op,
        shape,
        dtype,
        {k: getattr(harness, direction)(fn, inputs) for k, fn in functions.items()},
        harness.gate(functions["ours"], eager, inputs, gradients=direction == "backward"),
        bytes=units * B * N * C * dtype.itemsize,
    )


if __name__ == "__main__":
    args = harness.arguments(__doc__, tokens=(1024,), channels=2240)
    harness.run(
        [
            lambda B=images, N=tokens, n=name, d=dtype, k=direction: case(args, B, N, n, d, k)
            for images in args.images
            for tokens in args.tokens
            for name in OPS
            for dtype in (torch.float32, torch.bfloat16)
            for direction in ("forward", "backward")
        ],
        args,
    )
