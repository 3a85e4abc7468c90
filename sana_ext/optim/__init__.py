"""8-bit optimizers with kernels."""

from ._adamw8bit import AdamW8bit
from ._came8bit import CAME8bit, read_sana_state
from ._fused import FusedBackward, fuse_backward

__all__ = ["AdamW8bit", "CAME8bit", "FusedBackward", "fuse_backward", "read_sana_state"]
