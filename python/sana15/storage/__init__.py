"""Files that are whole or not there, and exact words about bad ones."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .files import DataError, open_tensors, read_tensors, replacing, staging, write_tensors
    from .png import read_png, save_png

__all__ = [
    "DataError",
    "open_tensors",
    "read_png",
    "read_tensors",
    "replacing",
    "save_png",
    "staging",
    "write_tensors",
]
__getattr__ = loader(
    __name__,
    {
        "DataError": "files",
        "open_tensors": "files",
        "read_png": "png",
        "read_tensors": "files",
        "replacing": "files",
        "save_png": "png",
        "staging": "files",
        "write_tensors": "files",
    },
)
