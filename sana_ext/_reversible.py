"""Classes that `patch` gives to an object in place of its own, and that `unpatch` takes away again."""

from __future__ import annotations

import copy
from typing import Any

PREFIX = "_sana_ext_"  # of what patch keeps on an object; no pickle holds it


class Reversible:
    """Mixed into an object's class in front of the stock class, which stays reachable through super()."""

    _sana_ext_stock: Any  # the object's class before `patch`

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = _bare(type(self))
        twin.__setstate__(copy.deepcopy(_state(self), memo))
        return twin

    def __copy__(self) -> Any:
        twin = _bare(type(self))
        twin.__setstate__(_state(self))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickled object is a stock object: the file loads without sana_ext (patch again after loading)."""
        state = {name: value for name, value in _state(self).items() if not name.startswith(PREFIX)}
        return _bare, (self._sana_ext_stock,), state


_bare: Any = object.__new__


def _state(patched: Any) -> Any:
    return object.__reduce_ex__(patched, 4)[2]
