"""AdamW8bit's step on the parameters of SANA blocks, against two optimizers that stand in the column `eager`.

"bitsandbytes": its AdamW8bit. "AdamW": torch.optim.AdamW, fused, which keeps 8 bytes of fp32 state per fp32 parameter. The
floor counts every byte of parameter, gradient and 8-bit state once.
"""

import harness
import torch

from sana_ext.optim import AdamW8bit

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def shapes(C):
    """One block of width C: attention, cross-attention, Mix-FFN, modulation table, QK-norm weights and biases."""
    F = C * 5 // 2
    matrices = [(C, C)] * 8 + [(2 * F, C, 1, 1), (C, F, 1, 1), (6, C)]
    return [*matrices, (2 * F, 1, 3, 3), (2 * F,), (2 * F,), *[(C,)] * 9]


def make(name, params):
    if name == "AdamW":
        return torch.optim.AdamW(params, fused=True, **OPTIONS)
    if name == "bitsandbytes":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(params, **OPTIONS)
    return AdamW8bit(params, **OPTIONS)


def gate(layout, dtype, device, other):
    """Two steps. Truth is torch's AdamW in fp64 for the first one, when no state has been through its bytes; in the second
    one ours strays no further from it than the bytes allow, and with bitsandbytes no further than that."""

    def check():
        truth, peer, ours = (
            harness.parameters_with_gradients(layout, d, device) for d in (torch.float64, dtype, dtype)
        )
        for p, q in zip(truth, ours):
            p.data.copy_(q.data)
            p.grad.copy_(q.grad)
        optimizers = [make("AdamW", truth), make(other, peer), make("ours", ours)]
        for step in range(2):
            before = [p.detach().clone() for p in truth]
            for optimizer in optimizers:
                optimizer.step()
            for i, (t, p, q) in enumerate(zip(truth, peer, ours)):
                if step == 0:
                    harness.assert_no_worse(f"parameter {i}", q.detach(), p.detach(), t.detach())
                    continue
                error, moved = (q.double() - t).norm(), (t - before[i]).norm()
                rounding = torch.finfo(dtype).eps * t.norm()
                assert error <= 0.05 * moved + rounding, f"parameter {i}: error {error:.3e} of a step {moved:.3e}"

    return check


def case(args, dtype, other):
    name = f"AdamW8bit against {other}"
    layout = shapes(64 if args.quick else args.channels) * args.blocks
    values = sum(torch.Size(shape).numel() for shape in layout)
    shape = f"{values / 1e6:.3g}M parameters"
    if not harness.wanted(args, name, shape, dtype):
        return None
    columns = {"eager": other, "ours": "ours"}
    return harness.Case(
        name,
        shape,
        dtype,
        {
            column: make(who, harness.parameters_with_gradients(layout, dtype, args.device)).step
            for column, who in columns.items()
        },
        gate(shapes(64), dtype, args.device, other),
        bytes=(3 * dtype.itemsize + 4 + 4 * 4 / 256) * values,
    )


if __name__ == "__main__":
    args = harness.arguments(__doc__.splitlines()[0], channels=2240, blocks=1)
    harness.run(
        [
            lambda d=dtype, o=other: case(args, d, o)
            for dtype in (torch.float32, torch.bfloat16)
            for other in ("bitsandbytes", "AdamW")
        ],
        args,
    )
