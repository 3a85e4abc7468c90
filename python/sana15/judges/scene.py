"""The exact scene checker as a judge: the oracle, to measure others by. As a selector it is the metric itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..scenes.checker import RULES, check_batch
from ..scenes.prompts import parse
from .base import Verdict


def scene_line(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """GenEval's metadata, read from the prompt where only that is given; ValueError for what no scene can show."""
    return line if "include" in line else parse(line["prompt"]).metadata(line["prompt"])


class SceneJudge:
    name = "scenes"

    def __init__(self, rule: str = "strict") -> None:
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r}; the rules are {', '.join(RULES)}")
        self.rule = rule

    def identity(self) -> dict[str, Any]:
        return {"judge": self.name, "rule": self.rule}

    def judge(self, pictures: Sequence[Image.Image], line: Mapping[str, Any]) -> list[Verdict]:
        asked = scene_line(line)
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        return [
            Verdict(float(v.correct), v.correct, v.reason)
            for v in check_batch(pixels, [asked] * len(pixels), self.rule)
        ]
