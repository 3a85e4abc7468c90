"""The ops: importing this package registers their schemas, default kernels and gradients."""

from .norm_modulate import gated_residual, norm_modulate, residual_norm_modulate

__all__ = ["gated_residual", "norm_modulate", "residual_norm_modulate"]
