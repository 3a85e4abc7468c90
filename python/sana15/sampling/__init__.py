"""From prompts to images."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .diffusers_pipeline import DiffusersGenerator
    from .generator import Generator
    from .pipeline import Pipeline
    from .settings import Sampling

__all__ = [
    "DiffusersGenerator",
    "Generator",
    "Pipeline",
    "Sampling",
]
__getattr__ = loader(
    __name__,
    {
        "DiffusersGenerator": "diffusers_pipeline",
        "Generator": "generator",
        "Pipeline": "pipeline",
        "Sampling": "settings",
    },
)
