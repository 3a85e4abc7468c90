"""A measurement leaves what it measures as it was: the modes of modules, hooks' owners, random states, settings of torch."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..storage.concurrency import using

_guard = threading.Lock()
#: Modules that are in eval mode only while somebody measures: by how many.
_measured: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Every module of the models in eval mode; afterwards each has its own mode again, not its parent's.

    Threads may measure one model at the same time: the modes come back when the last one is done. What is no module is
    left alone.
    """
    with _guard:
        changed = [
            module
            for model in models
            if isinstance(model, nn.Module)
            for module in model.modules()
            if module.training or module in _measured
        ]
        for module in changed:
            _measured[module] = _measured.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _guard:
            for module in changed:
                _measured[module] -= 1
                if not _measured[module]:
                    del _measured[module]
                    module.training = True


@contextmanager
def unchanged() -> Iterator[None]:
    """Random states (torch's on every device in use, NumPy's, Python's), the default dtype and the number of threads stay.

    What draws in another thread meanwhile, such as a training's step, waits.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with using(torch.default_generator), torch.random.fork_rng(devices):
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002, the global one is what is kept
        dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
