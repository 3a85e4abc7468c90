"""Training: one loop, its tasks, and runs that survive being killed."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .config import TrainConfig, load_config
    from .loop import fit
    from .run import train
    from .soap import SOAP

__all__ = [
    "SOAP",
    "TrainConfig",
    "fit",
    "load_config",
    "train",
]
__getattr__ = loader(
    __name__,
    {
        "SOAP": "soap",
        "TrainConfig": "config",
        "fit": "loop",
        "load_config": "config",
        "train": "run",
    },
)
