"""The ops: importing this package registers their schemas, default kernels and gradients."""

from .cross_attention import cross_attention
from .glumbconv import dwconv_glu, glumbconv
from .linear import linear
from .norm_modulate import gated_residual, norm_modulate, residual_norm_modulate

__all__ = [
    "cross_attention",
    "dwconv_glu",
    "gated_residual",
    "glumbconv",
    "linear",
    "norm_modulate",
    "residual_norm_modulate",
]
