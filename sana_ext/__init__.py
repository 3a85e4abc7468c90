"""sana_ext: fast kernels for SANA, and a drop-in backend for diffusers.

Importing loads torch and nothing heavier. Compiled kernels are used where they exist; ``python -m sana_ext`` tells
which.
"""

from . import _extension, nn, optim, reference
from ._info import kernel_info
from .ops import (
    _arithmetic,
    cross_attention,
    dwconv_glu,
    gated_residual,
    glumbconv,
    linear,
    linear_attention,
    linear_attention_qkv,
    norm_modulate,
    residual_norm_modulate,
)
from .patching import patch, unpatch

__version__ = "0.1.0"

_extension.load()
_arithmetic.probe()

__all__ = [
    "cross_attention",
    "dwconv_glu",
    "gated_residual",
    "glumbconv",
    "kernel_info",
    "linear",
    "linear_attention",
    "linear_attention_qkv",
    "nn",
    "norm_modulate",
    "optim",
    "patch",
    "reference",
    "residual_norm_modulate",
    "unpatch",
]
