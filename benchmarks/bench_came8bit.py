"""CAME8bit's step on the parameters of SANA blocks, against two optimizers that stand in the column `eager`.

"plain": CAME with an 8-bit first moment in plain PyTorch, written as the authors' optimizer is (one parameter after the
other), with true blocks of 2048 values; its dynamic code is searched by torch.bucketize. "AdamW": torch.optim.AdamW, fused,
which keeps 8 bytes of state per fp32 parameter (4 per bf16 one). The floor counts every byte of parameter, gradient and state once.
"""

import harness
import torch

from sana_ext.optim import CAME8bit
from sana_ext.reference import code8

BETAS, EPS = (0.9, 0.999, 0.9999), (1e-30, 1e-16)


def shapes(C, F):
    """One block of width C: attention, cross-attention, Mix-FFN, modulation table, QK-norm weights and biases."""
    matrices = [(C, C)] * 8 + [(2 * F, C, 1, 1), (C, F, 1, 1), (6, C)]
    return [*matrices, (2 * F, 1, 3, 3), (2 * F,), (2 * F,), *[(C,)] * 9]


class Plain:
    """CAME-8bit in plain PyTorch."""

    def __init__(self, params, lr, code):
        self.params, self.lr, self.state, (self.block, self.code) = params, lr, {}, code8.CODES[code]

    def _root(self, row, col):
        return (row / row.mean()).rsqrt()[:, None] * col.rsqrt()[None]

    @torch.no_grad()
    def step(self):
        for p in self.params:
            g = p.grad.to(torch.promote_types(p.dtype, torch.float32))
            factored = p.dim() == 2 or (p.dim() == 4 and p.shape[2] == 1)
            if factored:
                g = g.view(p.shape[0], -1)
            if p not in self.state:
                zeros = [torch.zeros(n, dtype=g.dtype) for n in (g.shape * 2 if factored else (g.shape,))]
                self.state[p] = [*code8.quantize(torch.zeros_like(g), self.block, self.code), *zeros]
            state = self.state[p]
            squares = g**2 + EPS[0]
            if factored:
                state[2].lerp_(squares.mean(1), 1 - BETAS[1])
                state[3].lerp_(squares.mean(0), 1 - BETAS[1])
                u = self._root(state[2], state[3]).mul_(g)
            else:
                state[2].lerp_(squares, 1 - BETAS[1])
                u = state[2].rsqrt().mul_(g)
            u.div_((u.norm() / u.numel() ** 0.5).clamp_(min=1.0))
            m = code8.dequantize(state[0], state[1], self.block, self.code).to(g.dtype)
            m.mul_(BETAS[0]).add_(u, alpha=1 - BETAS[0])
            state[0], state[1] = code8.quantize(m, self.block, self.code)
            if factored:
                residual = (u - m) ** 2 + EPS[1]
                state[4].lerp_(residual.mean(1), 1 - BETAS[2])
                state[5].lerp_(residual.mean(0), 1 - BETAS[2])
                m = self._root(state[4], state[5]).mul_(m)
            p.add_(m.view(p.shape), alpha=-self.lr)


def gate(layout, dtype, device, code):
    """The first step by the rule of the tests, and the second one's codes near those of the plain optimizer."""

    def check():
        truth, peer, ours = (
            harness.parameters_with_gradients(layout, d, device) for d in (torch.float64, dtype, dtype)
        )
        for p, q in zip(truth, ours):
            p.data.copy_(q.data)
            p.grad.copy_(q.grad)
        before = [p.detach().clone() for p in ours]
        for optimizer in (Plain(truth, 1e-2, code), Plain(peer, 1e-2, code), CAME8bit(ours, 1e-2, code=code)):
            optimizer.step()
        for i, (t, p, q) in enumerate(zip(truth, peer, ours)):
            harness.assert_no_worse(f"parameter {i}", q.detach(), p.detach(), t.detach())
            assert not torch.equal(q, before[i]), f"parameter {i} did not move"

    return check


def case(args, dtype, code, other):
    C, F = (64, 160) if args.quick else (args.channels, args.channels * 5 // 2)
    layout = shapes(C, F) * args.blocks
    small = shapes(64, 160)
    ours, peer = (
        harness.parameters_with_gradients(layout, dtype, args.device),
        harness.parameters_with_gradients(layout, dtype, args.device),
    )
    eager = torch.optim.AdamW(peer, lr=1e-4, fused=True) if other == "AdamW" else Plain(peer, 1e-4, code)
    values = sum(p.numel() for p in ours)

    return harness.Case(
        f"CAME8bit {code} against {other}",
        f"{values / 1e6:.3g}M parameters",
        dtype,
        {"eager": eager.step, "ours": CAME8bit(ours, 1e-4, code=code).step},
        gate(small, dtype, args.device, code),
        bytes=(3 * dtype.itemsize + 2.06) * values,
    )


if __name__ == "__main__":
    args = harness.arguments(__doc__.splitlines()[0], channels=2240, blocks=1)
    harness.run(
        [
            lambda d=dtype, c=code, o=other: case(args, d, c, o)
            for dtype in (torch.float32, torch.bfloat16)
            for code in code8.CODES
            for other in ("AdamW", "plain")
        ],
        args,
    )
