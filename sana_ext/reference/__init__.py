"""The specification of every op in plain PyTorch: forward, and backward in closed form."""

from .norm_modulate import (
    gated_residual,
    gated_residual_backward,
    norm_modulate,
    norm_modulate_backward,
    residual_norm_modulate,
    row_statistics,
)

__all__ = [
    "gated_residual",
    "gated_residual_backward",
    "norm_modulate",
    "norm_modulate_backward",
    "residual_norm_modulate",
    "row_statistics",
]
