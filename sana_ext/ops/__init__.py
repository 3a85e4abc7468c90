"""The ops: importing this package registers their schemas, default kernels and gradients."""

from . import adamw8bit, came8bit  # noqa: F401  (registers the ops)
from .cross_attention import cross_attention
from .glumbconv import dwconv_glu, glumbconv
from .linear import linear
from .linear_attention import linear_attention, linear_attention_qkv
from .norm_modulate import gated_residual, norm_modulate, residual_norm_modulate

__all__ = [
    "cross_attention",
    "dwconv_glu",
    "gated_residual",
    "glumbconv",
    "linear",
    "linear_attention",
    "linear_attention_qkv",
    "norm_modulate",
    "residual_norm_modulate",
]
