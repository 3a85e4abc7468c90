"""Views of a model: the same weights with some of its blocks, or with other modules in the place of blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .transformer import SanaTransformer


def with_blocks(model: SanaTransformer, blocks: Sequence[nn.Module]) -> SanaTransformer:
    """The model with other blocks in the place of its own; everything else is shared with it.

    Raises:
        ValueError: a forward on the model itself, which would run the model instead of the view.
    """
    state = dict(vars(model))
    if "forward" in state:
        raise ValueError(
            "the model's forward was replaced (by an offloading or casting hook), so it cannot run with other blocks; "
            "take that off first"
        )
    state.pop("_compiled_call_impl", None)  # compiled, it would call the model, too
    view: SanaTransformer = object.__new__(type(model))  # copy.copy refuses a parametrised model
    vars(view).update(state, _modules=dict(model._modules))
    view.transformer_blocks = nn.ModuleList(blocks)
    view.config = dataclasses.replace(model.config, num_layers=len(blocks))
    view.growth_map = view.kept_blocks = None
    return view


def chosen_blocks(model: SanaTransformer, kept: Sequence[int]) -> SanaTransformer:
    """A model that shares everything with this one and has only the blocks `kept`."""
    return with_blocks(model, [model.transformer_blocks[i] for i in kept])


class Watched(nn.Module):
    """Stands for a block in a view of its model and tells what goes in and what comes out.

    A hook on the block itself would hear everybody who uses the model, in whatever thread, and change the block for them.
    """

    def __init__(self, block: nn.Module, tell: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.block, self.tell = block, tell

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        out: torch.Tensor = self.block(x, *rest, **named)
        self.tell(x, out)
        return out
