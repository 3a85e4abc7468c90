"""Classes that `patch` gives to an object in place of its own, and that `unpatch` takes away again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch.nn.utils.parametrize import is_parametrized

PREFIX = "_sana_ext_"  # of what patch keeps on an object; no pickle holds it


class Reversible:
    """Mixed into an object's class in front of the stock class, which stays reachable through super()."""

    _sana_ext_stock: Any  # the object's class before `patch`

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = _bare(type(self))
        own: Any = self
        state = self.__dict__ if is_parametrized(own) else _state(self)  # its class refuses to give its state
        twin.__setstate__(copy.deepcopy(state, memo))
        return twin

    def __copy__(self) -> Any:
        twin = _bare(type(self))
        twin.__setstate__(_state(self))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickled object is a stock object: the file loads without sana_ext (patch again after loading)."""
        state = {name: value for name, value in _state(self).items() if not name.startswith(PREFIX)}
        return _bare, (self._sana_ext_stock,), state


class EqualsStock(type):
    """The class of our classes: they equal the stock class that they stand for.

    So what asks `type(x) in [...]` finds a patched object to be what it was (diffusers' from_pipe). Hashes stay apart: what
    keeps classes by class, as fully_shard does, must not take one for the other.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is not None and vars(cls).get("_sana_ext_stock") is other)

    __hash__ = type.__hash__


def in_front(mixin: type, cls: Any, members: dict[str, Any]) -> type:
    """The class that stands for `cls`: of its name, with the mixin in front and these members."""
    meta = EqualsStock if type(cls) is type else type(cls)  # a metaclass of others' is theirs
    return meta(cls.__name__, (mixin, cls), members | {"_sana_ext_stock": cls})


def put_on(module: Any, make: Callable[[Any], type]) -> None:
    """Gives the module the class make(its class).

    torch's own class of a parametrised module stays the outermost: it is taken off for the one right below it.
    """
    cls = type(module)
    module.__class__ = _over(make(cls.__bases__[0]), cls) if _is_injected(module) else make(cls)


def class_without(module: Any) -> type | None:
    """The class that the module had before `put_on`, or None where other code changed it since."""
    cls: Any = type(module)
    if "_sana_ext_stock" in vars(cls):
        return cls._sana_ext_stock
    below = cls.__bases__[0]
    if _is_injected(module) and "_sana_ext_stock" in vars(below):
        return _over(below._sana_ext_stock, cls)
    return None


def _is_injected(module: Any) -> bool:
    """The name of the class that torch.nn.utils.parametrize makes for one module."""
    cls = type(module)
    return is_parametrized(module) and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"


def _over(base: Any, injected: Any) -> type:
    """The injected class with another one below it."""
    members = {name: value for name, value in vars(injected).items() if name not in ("__dict__", "__weakref__")}
    if not hasattr(base, "__deepcopy__"):
        members.setdefault("__deepcopy__", Reversible.__deepcopy__)
    return type(injected.__name__, (base,), members)


_bare: Any = object.__new__


def _state(patched: Any) -> Any:
    return object.__reduce_ex__(patched, 4)[2]
