"""The forward of a transformer whose text or whose whole step `patch` keeps; its blocks are FusedBlock's."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..ops._checks import transforming
from . import cuda_graph, text_cache
from .block import FusedBlock
from .reversible import Reversible, class_without, in_front, put_on

GRAPHS = "_sana_ext_step_graphs"  # of the transformer


class KeepingModel(Reversible):
    """Mixed into the transformer's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(type(self), "_sana_ext_stock"):  # unpatched while a hook still holds this function
            return type(self).forward(self, *args, **kwargs)
        forward = super().forward  # type: ignore[misc]
        cache: text_cache.TextCache | None = self.__dict__.get(text_cache.ATTRIBUTE)
        graphs: cuda_graph.StepGraphs | None = self.__dict__.get(GRAPHS)
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or transforming():
            return forward(*args, **kwargs)
        if torch.is_grad_enabled():
            if cache is not None:
                cache.clear()
            return forward(*args, **kwargs)
        given = dict(zip(("hidden_states", "encoder_hidden_states"), args)) | kwargs
        text, batch = given.get("encoder_hidden_states"), len(given.get("hidden_states", ()))
        if graphs is not None and (out := graphs.serve(self, cache, forward, args, kwargs, text, batch)) is not None:
            return out
        if cache is None:
            return forward(*args, **kwargs)
        with cache.step(self, text, batch):
            return forward(*args, **kwargs)


def keep(model: Any, stock: Any, text: bool, step: bool) -> str | None:
    """Gives the transformer a text cache, step graphs or both; or says why it cannot."""
    cls: Any = type(model)
    if "forward" in vars(model):
        return "its forward was replaced on the instance; patch before adding hooks"
    if cls.forward is not stock.forward:
        return f"{cls.__name__} overrides forward"
    blocks = [m for m in model.modules() if isinstance(m, FusedBlock)]
    if not blocks:
        return "none of its blocks is replaced"
    if text and not any(text_cache.serves(block) for block in blocks):
        return "no block has plain layers for its text"
    put_on(model, _keeping_class)
    if text:
        cache = text_cache.TextCache()
        for module in (model, *blocks):
            module.__dict__[text_cache.ATTRIBUTE] = cache
    if step:
        model.__dict__[GRAPHS] = cuda_graph.StepGraphs()
    return None


def release(module: Any) -> None:
    """Takes away from a module what `keep` gave it."""
    for name in (text_cache.ATTRIBUTE, GRAPHS):
        module.__dict__.pop(name, None)
    if isinstance(module, KeepingModel) and (stock := class_without(module)) is not None:
        module.__class__ = stock


@functools.cache
def _keeping_class(cls: Any) -> type:
    """cls with KeepingModel in front. Name, module and the forward's signature stay: diffusers reads all three."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return KeepingModel.forward(self, *args, **kwargs)

    return in_front(KeepingModel, cls, {"__module__": cls.__module__, "forward": forward})
