"""The experiments behind this project's claims, each a resumable grid of cells: `sana15 reproduce`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .grid import Experiment

#: Name -> what it asks. The module of that name holds an EXPERIMENT.
EXPERIMENTS = {
    "growth": "what growing a base to three times its depth saves against that depth from scratch",
    "pruning": "what depth pruning costs, what healing brings back, and whether training that depth would be better",
    "scaling": "what search gains: one image picked of N by the learned judge",
    "sizes": "at which compute a small model with search passes a larger one",
    "optimizers": "whether the 8-bit optimizers learn as their fp32 forms do, and what 16-bit weights lose",
    "kernels": "whether training with these kernels is training with stock ops, and how fast each is",
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
