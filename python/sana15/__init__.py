"""sana15: the SANA-1.5 system on sana_ext's kernels."""

from typing import Any

from .config import SanaConfig
from .model import SanaTransformer

__all__ = ["Pipeline", "SanaConfig", "SanaTransformer", "grow", "grow_optimizer_state"]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":  # loaded when asked for: it needs pillow and numpy
        from .pipeline import Pipeline

        return Pipeline
    if name == "grow":
        from .growth import grow

        return grow
    if name == "grow_optimizer_state":
        from .growth_training import grow_optimizer_state

        return grow_optimizer_state
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
