"""One small figure as a PNG: axes to draw on, saved when the block ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def axes_of(path: Path, **settings: Any) -> Iterator[Any]:
    """Matplotlib axes with a grid; `settings` as Axes.set takes them, such as xlabel and yscale."""
    with panels_of(path, [settings]) as (axes,):
        yield axes


@contextmanager
def panels_of(path: Path, settings: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """Axes side by side, one for each of the settings; the first has the legend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, len(settings), figsize=(6 * len(settings), 3.8), layout="constrained", squeeze=False)
    panels = list(grid[0])
    try:
        yield panels
        for axes, given in zip(panels, settings):
            axes.set(**given)
            axes.grid(alpha=0.3)
        if panels[0].get_legend_handles_labels()[0]:
            panels[0].legend(fontsize=8)
        figure.savefig(path, dpi=110, format="png")
    finally:
        plt.close(figure)
