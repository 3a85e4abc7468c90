"""The network, its parts and its folder."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .autoencoder import Autoencoder
    from .checkpoint import load_transformer, save_transformer
    from .config import SanaConfig
    from .folder import ModelFolder
    from .text import GemmaTextEncoder, MiniTextEncoder
    from .transformer import SanaTransformer

__all__ = [
    "Autoencoder",
    "GemmaTextEncoder",
    "MiniTextEncoder",
    "ModelFolder",
    "SanaConfig",
    "SanaTransformer",
    "load_transformer",
    "save_transformer",
]
__getattr__ = loader(
    __name__,
    {
        "Autoencoder": "autoencoder",
        "GemmaTextEncoder": "text",
        "MiniTextEncoder": "text",
        "ModelFolder": "folder",
        "SanaConfig": "config",
        "SanaTransformer": "transformer",
        "load_transformer": "checkpoint",
        "save_transformer": "checkpoint",
    },
)
