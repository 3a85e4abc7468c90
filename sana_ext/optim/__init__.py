"""8-bit optimizers with kernels."""

from ._base import FusedBackward, fuse_backward

__all__ = ["FusedBackward", "fuse_backward"]
