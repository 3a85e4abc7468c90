"""The self-test of ``python -m sana_ext``: every op against its reference on small shapes, with gradients.

The rule is the test suite's: no output or gradient is further from the fp64 truth than twice the reference run in the
same dtype, plus 4 fp32 rounding steps of the largest value.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import _extension, _selftest_optimizers, reference
from ._info import OPTIMIZERS
from .ops import __all__ as PUBLIC

EPS32 = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Outcome:
    """One op on one device in one dtype; `ratio` is the worst error over the allowed one."""

    op: str
    device: str
    dtype: torch.dtype
    ratio: float
    worst: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0  # False for a NaN


def _case(op: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors in fp64, other arguments): odd sizes, so that whole vectors and tails are both met."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    B, N, H, D, C, T, height, width = 2, 35, 3, 32, 37, 11, 5, 7
    rows = {"x": rand(B, N, C), "y": rand(B, N, C)}
    coefficients = {name: rand(B, C, scale=0.5) for name in ("shift", "scale", "gate")}
    norms = {"weight_q": rand(H * D), "weight_k": rand(H * D)}
    if op == "linear_attention":
        return {name: rand(B, N, H, D) for name in "qkv"} | norms, {}
    if op == "linear_attention_qkv":
        return {"qkv": rand(B, N, 3 * H * D)} | norms, {"heads": H}
    if op == "dwconv_glu":
        tensors = {"u": rand(B, N, 2 * C), "weight": rand(2 * C, 1, 3, 3, scale=0.3), "bias": rand(2 * C)}
        return tensors, {"height": height, "width": width}
    if op == "glumbconv":
        tensors = {"x": rand(B, N, C), "w_in": rand(2 * T, C, scale=0.2), "b_in": rand(2 * T)}
        tensors |= {"w_dw": rand(2 * T, 1, 3, 3, scale=0.3), "b_dw": rand(2 * T), "w_out": rand(C, T, scale=0.3)}
        return tensors, {"height": height, "width": width}
    if op == "linear":
        return {"x": rand(B, N, C), "weight": rand(T, C, scale=0.2), "bias": rand(T)}, {}
    if op == "cross_attention":
        return {"q": rand(B, N, H, D), "k": rand(B, T, H, D), "v": rand(B, T, H, D)}, {}
    if op == "norm_modulate":
        return {"x": rows["x"], "shift": coefficients["shift"], "scale": coefficients["scale"]}, {}
    if op == "gated_residual":
        return rows | {"gate": coefficients["gate"]}, {}
    if op == "residual_norm_modulate":
        return rows | coefficients, {}
    raise KeyError(f"the self-test has no case for {op}")


def _results(function: Any, tensors: dict[str, torch.Tensor], others: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name, moved to the CPU in fp64."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    result = function(**leaves, **others)
    outputs = result if isinstance(result, tuple) else (result,)
    cotangents = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    named |= {f"gradient of {name}": g for name, g in zip(leaves, gradients)}
    return {name: t.cpu().double() for name, t in named.items()}


def _runs(op: str, device: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], ...]:
    """Ours, the reference in that dtype, truth."""
    specified = getattr(reference, op)
    exact, others = _case(op)
    low = {name: t.to(device, dtype) for name, t in exact.items()}
    truth = _results(specified, {name: t.cpu().double() for name, t in low.items()}, others)
    peer = _results(specified, low, others)
    return _results(getattr(importlib.import_module("sana_ext"), op), low, others), peer, truth


def check_op(op: str, device: str, dtype: torch.dtype) -> Outcome:
    """Runs one op; a crash of the op is reported as a failure with its message."""
    start = time.perf_counter()
    try:
        ours, peer, truth = (
            _selftest_optimizers.results(op, device, dtype) if op in OPTIMIZERS else _runs(op, device, dtype)
        )
    except Exception as error:
        return Outcome(op, device, dtype, float("inf"), f"{type(error).__name__}: {error}", time.perf_counter() - start)
    ratios = {}
    for name, t in truth.items():
        allowed = 2 * (peer[name] - t).abs().max() + 4 * EPS32 * t.abs().max()
        ratios[name] = ((ours[name] - t).abs().max() / allowed.clamp_min(1e-300)).item()
    worst = max(ratios, key=lambda name: ratios[name] if ratios[name] == ratios[name] else float("inf"))
    return Outcome(op, device, dtype, ratios[worst], worst, time.perf_counter() - start)


def run() -> Iterator[Outcome]:
    """All public ops in fp32, bf16 and fp16, and the optimizers' in the first two, on the CPU and, with the CUDA library
    loaded, on the GPU."""
    devices = ["cpu"]
    if _extension.libraries()["cuda"].loaded and torch.cuda.is_available():
        devices.append("cuda")
    for device in devices:
        for op in sorted(PUBLIC):
            for dtype in DTYPES:
                yield check_op(op, device, dtype)
        for op in OPTIMIZERS:
            for dtype in DTYPES[:2]:
                yield check_op(op, device, dtype)
