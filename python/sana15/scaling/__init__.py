"""Inference-time scaling: repeated sampling with a judge, on a budget, in a folder that survives being killed."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .run import search

__all__ = [
    "search",
]
__getattr__ = loader(
    __name__,
    {
        "search": "run",
    },
)
