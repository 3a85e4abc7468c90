"""The fused path inside a stock diffusers SANA model: `patch` puts it in, `unpatch` takes it out, `Report` says what was done.

`replacement` has the two functions, `guards` what they and every call check, `block` the fused forward.
"""

from .replacement import patch, unpatch
from .report import Report

__all__ = ["Report", "patch", "unpatch"]
