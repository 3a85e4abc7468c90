"""The experiments behind this project's claims, each a resumable grid of cells: `sana15 reproduce`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .grid import Experiment

#: Name -> what it asks. The module of that name holds an EXPERIMENT.
EXPERIMENTS = {
    "growth": "how a grown model trains on, by the strategy it was grown with",
    "pruning": "what depth pruning costs, and how much of it healing brings back",
    "scaling": "what search gains: one image picked of N by the learned judge",
    "optimizers": "whether the 8-bit optimizers learn as their fp32 forms do",
    "judges": "how well the learned judge tells right images from wrong ones",
    "agreement": "how well the exact checker agrees with the renderer",
}
BUDGETS = ("smoke", "small", "full")


def load(name: str) -> Experiment:
    """Loads an experiment by its name; ValueError where there is none."""
    if name not in EXPERIMENTS:
        raise ValueError(f"no experiment {name!r}; there is {', '.join(EXPERIMENTS)}")
    experiment: Experiment = import_module(f".{name}", __name__).EXPERIMENT
    return experiment
