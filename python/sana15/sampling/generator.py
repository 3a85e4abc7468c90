"""Generators that can pause: a batch of pictures is advanced step by step, looked at, thinned out, and finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from .settings import Item, Seed


class Generator(Protocol):
    """The protocol that search asks of whoever makes the images.

    A state holds everything that a picture follows from, the sampler's history included: pausing changes nothing. advance and
    select may use up the state that they are given; go on with the one that they return. A step is a denoising step.

    Attributes:
        steps: of a finished picture.
        can_pause: whether advance, preview and select work; else only start and finish do.
    """

    steps: int

    @property
    def can_pause(self) -> bool: ...

    def check(self, prompts: Sequence[str]) -> None:
        """ValueError for a prompt that the model cannot read."""
        ...

    def identity(self) -> dict[str, Any]:
        """Returns what the images follow from beside prompt and seed; a resumed run must have the same. JSON."""
        ...

    def describe(self, item: Item) -> dict[str, Any]:
        """Returns what the PNG file of an image says: the keys of pipeline.describe; seed and size may be left out."""
        ...

    def evaluations(self, first: int, last: int) -> int:
        """Transformer evaluations of one picture from step `first` to step `last`; guidance makes two of one step."""
        ...

    def start(self, prompts: Sequence[str], seeds: Sequence[Seed]) -> Any:
        """A state before the first step; one seed for each prompt."""
        ...

    def advance(self, state: Any, to_step: int) -> Any:
        """The state when `to_step` steps are done; a state that is there already is returned as it is."""
        ...

    def preview(self, state: Any) -> list[Image.Image]:
        """Decodes what the model expects the finished images to be: its last data prediction. Costs no evaluation."""
        ...

    def select(self, state: Any, indices: Sequence[int]) -> Any:
        """The chosen pictures only, in that order; the others are given up."""
        ...

    def finish(self, state: Any) -> list[Image.Image]:
        """The pictures, after the steps that are still to do."""
        ...
