"""sana15: the SANA-1.5 system on sana_ext's kernels."""

from typing import Any

from .config import SanaConfig
from .model import SanaTransformer

__all__ = ["Pipeline", "SanaConfig", "SanaTransformer"]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":  # loaded when asked for: it needs pillow and numpy
        from .pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
