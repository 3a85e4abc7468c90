"""PNG files that say how they were made: a `parameters` text chunk as other tools write it, and the same as JSON in `sana15`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .files import DataError, replacing


def parameters(values: dict[str, Any]) -> str:
    """The text that picture viewers know: the prompt, then one line of settings."""
    lines = [values["prompt"]]
    if values["negative_prompt"]:
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    fields = {
        "Steps": values["steps"],
        "Sampler": values["sampler"],
        "CFG scale": values["guidance"],
        "Seed": values["seed"],
        "Size": f"{values['width']}x{values['height']}",
        "Model hash": values["model_sha256"][:10],
        "Model": values["model"],
        "Version": f"sana15 {values['version']}",
    }
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """The value, as a JSON string where it would not come back from the line: readers cut it at commas and colons."""
    plain = not set(',:"\n').intersection(value) and value == value.strip()
    return value if plain else json.dumps(value, ensure_ascii=False)


def save_png(picture: Image.Image, path: Path, values: dict[str, Any]) -> None:
    """Writes the picture with its description; a reader never sees a part of it."""
    with replacing(path) as partial:
        picture.save(partial, format="PNG", pnginfo=_chunks(values))


def encode_png(picture: Image.Image, values: dict[str, Any]) -> bytes:
    """Returns the bytes that save_png writes."""
    data = io.BytesIO()
    picture.save(data, format="PNG", pnginfo=_chunks(values))
    return data.getvalue()


def _chunks(values: dict[str, Any]) -> PngInfo:
    info = PngInfo()
    info.add_text("parameters", parameters(values))
    info.add_text("sana15", json.dumps(values))
    return info


def read_png(path: Path) -> tuple[NDArray[np.uint8], dict[str, Any] | None]:
    """Pixels [H, W, 3] and the description (None where there is none).

    Raises:
        FileNotFoundError: it is missing. DataError: it is no picture, or not all of one.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
            text = picture.info.get("sana15")
        values = json.loads(text) if text else None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{path} is damaged: {reason}") from None
    return pixels, values if isinstance(values, dict) else None
