"""sana15: the SANA-1.5 system on sana_ext's kernels."""

from .config import SanaConfig
from .model import SanaTransformer

__all__ = ["SanaConfig", "SanaTransformer"]
