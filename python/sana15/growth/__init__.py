"""Growth in depth: 1.6B to 4.8B parameters from the weights that are there."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .folder import check_growth, grow_folder
    from .growing import grow
    from .optimizer import block_groups, block_multipliers, grow_optimizer_state, set_learning_rates

__all__ = [
    "block_groups",
    "block_multipliers",
    "check_growth",
    "grow",
    "grow_folder",
    "grow_optimizer_state",
    "set_learning_rates",
]
__getattr__ = loader(
    __name__,
    {
        "block_groups": "optimizer",
        "block_multipliers": "optimizer",
        "check_growth": "folder",
        "grow": "growing",
        "grow_folder": "folder",
        "grow_optimizer_state": "optimizer",
        "set_learning_rates": "optimizer",
    },
)
