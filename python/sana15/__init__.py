"""sana15: the SANA-1.5 system on sana_ext's kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SanaConfig
    from .growth import grow
    from .growth_training import grow_optimizer_state
    from .importance import block_importance
    from .model import SanaTransformer
    from .pipeline import Pipeline
    from .pruning import prune
    from .scaling.search import search
    from .trajectory import calibration

#: Loaded when asked for: the command line prints its help without torch.
_HOMES = {
    "Pipeline": "pipeline",
    "SanaConfig": "config",
    "SanaTransformer": "model",
    "block_importance": "importance",
    "calibration": "trajectory",
    "grow": "growth",
    "grow_optimizer_state": "growth_training",
    "prune": "pruning",
    "search": "scaling.search",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
