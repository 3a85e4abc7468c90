"""Evaluation: folders of images in GenEval's layout, scores with intervals, exports to the benchmarks' own tools."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .layout import judge_folder, read_prompts
    from .scores import compare, score_table

__all__ = [
    "compare",
    "judge_folder",
    "read_prompts",
    "score_table",
]
__getattr__ = loader(
    __name__,
    {
        "compare": "scores",
        "judge_folder": "layout",
        "read_prompts": "layout",
        "score_table": "scores",
    },
)
