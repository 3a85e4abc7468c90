"""sana15: the SANA-1.5 system on sana_ext's kernels."""

from importlib import import_module
from typing import Any

from .config import SanaConfig
from .model import SanaTransformer

#: Loaded when asked for: some need pillow and numpy.
_HOMES = {
    "Pipeline": "pipeline",
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
