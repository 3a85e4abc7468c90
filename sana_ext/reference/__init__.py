"""The specification of every op in plain PyTorch: forward, and backward in closed form."""

from .adamw8bit import adamw, adamw8bit
from .came8bit import came8bit_phase
from .code8 import CODES, dequantize, dynamic_table, quantize
from .cross_attention import attention_mask, cross_attention, cross_attention_backward
from .glumbconv import dwconv_glu, dwconv_glu_backward, glumbconv
from .linear import linear, linear_backward
from .linear_attention import (
    linear_attention,
    linear_attention_backward,
    linear_attention_qkv,
    linear_attention_state,
    row_rstd,
    unpack,
)
from .norm_modulate import (
    gated_residual,
    gated_residual_backward,
    norm_modulate,
    norm_modulate_backward,
    residual_norm_modulate,
    row_statistics,
)

__all__ = [
    "CODES",
    "adamw",
    "adamw8bit",
    "attention_mask",
    "came8bit_phase",
    "cross_attention",
    "cross_attention_backward",
    "dequantize",
    "dwconv_glu",
    "dwconv_glu_backward",
    "dynamic_table",
    "gated_residual",
    "gated_residual_backward",
    "glumbconv",
    "linear",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_qkv",
    "linear_attention_state",
    "linear_backward",
    "norm_modulate",
    "norm_modulate_backward",
    "quantize",
    "residual_norm_modulate",
    "row_rstd",
    "row_statistics",
    "unpack",
]
