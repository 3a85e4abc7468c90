"""sana15: the SANA-1.5 system on sana_ext's kernels."""

from typing import TYPE_CHECKING

from .lazy import loader

if TYPE_CHECKING:
    from .growth import grow, grow_optimizer_state
    from .model import SanaConfig, SanaTransformer
    from .pruning import block_importance, calibration, prune
    from .sampling import Pipeline
    from .scaling import search

__all__ = [
    "Pipeline",
    "SanaConfig",
    "SanaTransformer",
    "block_importance",
    "calibration",
    "grow",
    "grow_optimizer_state",
    "prune",
    "search",
]
__getattr__ = loader(
    __name__,
    {
        "Pipeline": "sampling",
        "SanaConfig": "model",
        "SanaTransformer": "model",
        "block_importance": "pruning",
        "calibration": "pruning",
        "grow": "growth",
        "grow_optimizer_state": "growth",
        "prune": "pruning",
        "search": "scaling",
    },
)
