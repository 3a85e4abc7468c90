"""Keeps apart what a call of a diffusers pipeline puts on models that other calls use too, and takes away only at its end.

SANA-PAG sets attention processors; others register hooks or replace a forward. A call that waits takes them with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..storage.concurrency import using

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_REGISTRY = "_diffusers_hook"  # of a module that diffusers' hooks are on

Seen = tuple[dict[str, Any], dict[str, Any], dict[str, dict[Any, Any]]]


class Turn:
    """The time in which one call has the pipeline's parts for itself; nothing of it is on them outside its time.

    begin and end are called by the same thread. Other calls on the same parts wait, also those of another pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        parts = [v for v in vars(pipe).values() if isinstance(v, nn.Module) or _is_tokenizer(v)]
        self._parts = parts
        self._modules = modules_of(pipe)
        # Offloading replaces every forward at the end of a call, and means it to stay.
        self._attributes = ("processor",) if getattr(pipe, "_all_hooks", None) else ("processor", "forward")
        self._inside: list[Seen] | None = None
        self._stack = ExitStack()

    def begin(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(using(*self._parts))
            outside = self._seen()
            stack.callback(self._leave, outside)
            if self._inside is not None:
                self._put(self._inside)
            self._stack = stack.pop_all()

    def end(self) -> None:
        self._stack.close()

    def _leave(self, outside: list[Seen]) -> None:
        self._inside = self._seen()
        self._put(outside)

    def _seen(self) -> list[Seen]:
        return [_seen(m, self._attributes) for m in self._modules]

    def _put(self, wanted: list[Seen]) -> None:
        for module, seen in zip(self._modules, wanted):
            _put(module, seen, self._attributes)


def modules_of(pipe: Any) -> list[nn.Module]:
    parts = [v for v in vars(pipe).values() if isinstance(v, nn.Module)]
    return [*dict.fromkeys(m for part in parts for m in part.modules())]


def caches(pipe: Any) -> list[str]:
    """Names of the hooks whose state belongs to one call from its first step to its last: diffusers' attention caches."""
    return sorted({name for _, name in _stateful(modules_of(pipe))})


def reset_caches(pipe: Any) -> None:
    """As before the first step. Pipelines do so at their end, but not where a call fails, nor for every model."""
    for registry in {id(registry): registry for registry, _ in _stateful(modules_of(pipe))}.values():
        registry.reset_stateful_hooks(recurse=False)


def _stateful(modules: Iterable[nn.Module]) -> list[tuple[Any, str]]:
    registries = [m.__dict__[_REGISTRY] for m in modules if _REGISTRY in m.__dict__]
    return [(r, type(hook).__name__) for r in registries for hook in r.hooks.values() if hook._is_stateful]


def _is_tokenizer(part: Any) -> bool:
    """Or a processor with one: fast ones keep the padding of the last call."""
    return hasattr(part, "padding_side") or hasattr(part, "tokenizer")


def _seen(module: nn.Module, names: Iterable[str]) -> Seen:
    own = module.__dict__
    attributes = {name: own[name] for name in names if name in own}
    children = {name: own["_modules"][name] for name in names if name in own["_modules"]}
    return attributes, children, {name: dict(own[name]) for name in _HOOKS if own[name]}


def _put(module: nn.Module, wanted: Seen, names: Iterable[str]) -> None:
    attributes, children, hooks = wanted
    own = module.__dict__
    _replace(own, attributes, names)
    _replace(own["_modules"], children, names)
    for name in _HOOKS:
        if own[name] or name in hooks:
            _replace(own[name], hooks.get(name, {}), [*own[name]])


def _replace(values: dict[Any, Any], wanted: Mapping[Any, Any], names: Iterable[Any]) -> None:
    """`wanted`, in its order, in the place of what stands under `names`."""
    if {name: values[name] for name in names if name in values} != wanted:
        for name in names:
            values.pop(name, None)
        values.update(wanted)
