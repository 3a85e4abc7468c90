"""Parameters and gradients of the tests of CAME8bit, and its slow twin."""

import torch
from helpers import rand
from torch import nn

from sana_ext.ops.came8bit import _came8bit_step
from sana_ext.optim import CAME8bit

#: Matrices with rows shorter and longer than a block, 1x1 and other convolutions, vectors, a batch, a scalar, emptiness.
MATRICES = [(64, 96), (37, 700), (5, 2500), (700, 3), (48, 100, 1, 1)]
SHAPES = [*MATRICES, (500, 1, 3, 3), (5000,), (7,), (6, 30, 40), (), (0, 4), (3, 4, 30, 50)]
CODES = [None, "256-dynamic", "2048-linear"]


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [nn.Parameter(random(i, shape).to(dtype)) for i, shape in enumerate(shapes)]


def random(seed, shape):
    return rand(seed, *shape) if shape else rand(seed, 1)[0]


def set_gradients(params, step, scale=1.0):
    """Rows and columns of different size, as real gradients have."""
    for i, p in enumerate(params):
        g = random(1000 * step + i, p.shape)
        if p.dim() > 1:
            g = g * rand(i + 77, *p.shape[:1]).exp().view(-1, *[1] * (p.dim() - 1))
        p.grad = (g * scale).to(p.dtype)


class Reference(CAME8bit):
    """The same optimizer through the op's default kernel, whatever is compiled."""

    def _step_op(self):
        return _came8bit_step


def states(optimizer):
    return [dict(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
