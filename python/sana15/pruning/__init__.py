"""Pruning in depth: which blocks matter, which go, and healing of what stays."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .folder import prune_folder
    from .healing import Healing
    from .importance import block_importance
    from .removal import prune
    from .trajectory import calibration

__all__ = [
    "Healing",
    "block_importance",
    "calibration",
    "prune",
    "prune_folder",
]
__getattr__ = loader(
    __name__,
    {
        "Healing": "healing",
        "block_importance": "importance",
        "calibration": "trajectory",
        "prune": "removal",
        "prune_folder": "folder",
    },
)
