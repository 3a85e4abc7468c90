"""`patch(cuda_graph=True)`: a whole denoising step as one CUDA graph, captured once for each form of the call.

A graph repeats the kernels that it saw, with their addresses and their constants. What it saw is therefore part of its
key: shapes, dtypes and plain arguments of the call; addresses of all weights; class and epsilon of every module. Edits
in place of weights and inputs are seen, since a graph reads them. What a graph cannot see (hooks, adapters, autocast, arguments
on another device) makes the call run as without the option, and so does the first step on a new text if the text's
keys and values are cached: that step fills the buffers which the graph reads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .._plain import untouched
from .text_cache import CachedText, Pair, TextCache

DEVICE = "cuda"
GRAPHS = 4  # kept at once for a model, each with its own buffers
WARM_UPS = 2  # runs before a capture, in which libraries choose their algorithms and allocate


class CudaGraph:
    """Captures what fn() launches; `outputs` are overwritten by every replay."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        side, now = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(now)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                fn()
        now.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = fn()
        self.done = torch.cuda.Event()
        self.release()

    def wait(self) -> None:
        """Buffers may be written when the last replay is over and its outputs are read, whatever stream that was on."""
        self.done.wait()

    def replay(self) -> Any:
        self.graph.replay()
        return self.outputs

    def release(self) -> None:
        """The outputs of this replay have been read."""
        self.done.record()


_logger = logging.getLogger("sana_ext")
capture: Callable[[Callable[[], Any]], Any] = CudaGraph


class _Step:
    """One captured form of the call with the buffers that the graph reads."""

    def __init__(self, run: Callable[..., Any], leaves: list[Any], spec: Any, text: CachedText | None) -> None:
        self.inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.pairs: dict[Any, Pair] = {}
        self.filled: object = None  # the revision of the text whose keys and values are in `pairs`
        if text is not None:
            self.filled = text.revision
            self.pairs = {attn: (k.clone(), v.clone()) for attn, (_, (k, v)) in text.pairs.items()}
        args, kwargs = pytree.tree_unflatten(self.inputs, spec)
        self.graph = capture(lambda: run(self.pairs, *args, **kwargs))

    def __call__(self, leaves: list[Any], text: CachedText | None) -> Any:
        self.graph.wait()
        for buffer, leaf in zip(self.inputs, leaves):
            if isinstance(leaf, torch.Tensor):
                buffer.copy_(leaf)
        if text is not None and self.filled != text.revision:
            for attn, (_, pair) in text.pairs.items():
                for buffer, value in zip(self.pairs[attn], pair):
                    buffer.copy_(value)
            self.filled = text.revision
        outputs = pytree.tree_map_only(torch.Tensor, torch.clone, self.graph.replay())
        self.graph.release()
        return outputs


class StepGraphs:
    """The captured steps of one model. Copies start empty."""

    def __init__(self) -> None:
        self.replays = self.captures = 0
        self._steps: dict[Any, _Step] = {}
        self._lock = threading.Lock()
        self._failed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> StepGraphs:
        twin = memo[id(self)] = StepGraphs()
        return twin

    def serve(
        self,
        model: Any,
        cache: TextCache | None,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        source: Any,
        batch: int,
    ) -> Any:
        """forward(*args, **kwargs) by a graph, or None where none may serve; `source` is the text among the arguments."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = None if self._failed else _key(model, leaves, spec)
        text = None if key is None or cache is None else cache.complete(model, source, batch)
        if key is None or (cache is not None and text is None) or not self._lock.acquire(blocking=False):
            return None
        try:
            step = self._steps.pop(key, None)
            if step is None:
                step = _Step(_forward_with(cache, forward), leaves, spec, text)
                self.captures += 1
            self._steps[key] = step  # the last used comes last
            while len(self._steps) > GRAPHS:
                del self._steps[next(iter(self._steps))]
            self.replays += 1
            return step(leaves, text)
        except RuntimeError as error:
            self._failed = True
            self._steps.clear()
            _logger.warning("sana_ext: no CUDA graph, steps run without: %s", str(error).split("\n")[0])
            return None
        finally:
            self._lock.release()


def _forward_with(cache: TextCache | None, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(pairs: dict[Any, Pair], *args: Any, **kwargs: Any) -> Any:
        if cache is None:
            return forward(*args, **kwargs)
        with cache.fixed(pairs):
            return forward(*args, **kwargs)

    return run


def _key(model: Any, leaves: list[Any], spec: Any) -> Any:
    """All that a graph of this call has fixed; None where a graph would not see something that matters."""
    if torch.is_autocast_enabled(DEVICE):
        return None
    form: list[Any] = []
    for leaf in leaves:
        if type(leaf) is torch.Tensor and leaf.device.type == DEVICE and not leaf.is_inference():
            form.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        elif leaf is None or type(leaf) in (bool, int, float, str):
            form.append((type(leaf), leaf))
        else:
            return None
    for module in model.modules():
        if not untouched(module, ("torch.nn.modules", "diffusers", "sana_ext")):
            return None
        processor = module.__dict__.get("processor")
        if processor is not None and type(processor).__module__.split(".")[0] != "diffusers":
            return None
        form.append((type(module), type(processor), module.training, module.__dict__.get("eps")))
        for tensors in (module._parameters, module._buffers):
            for t in tensors.values():
                if t is None:
                    continue
                if t.device.type != DEVICE:
                    return None
                form.append((t.data_ptr(), t.dtype))
    return spec, tuple(form)
