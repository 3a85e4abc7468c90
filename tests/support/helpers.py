"""The numeric rule of the project, once (design: numerics), and the checks that every op passes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sana_ext import _extension

EPS32 = torch.finfo(torch.float32).eps
Make = Callable[[int], dict[str, torch.Tensor | None]]

# Under SANA_EXT_TEST_DEVICE=cuda the operands of the op tests live on a GPU.
DEVICE = os.environ.get("SANA_EXT_TEST_DEVICE", "cpu")
# The CUDA kernels answer, which have no float64: there, or under SANA_EXT_EMULATOR=1 emulated on the host.
EMULATED = os.environ.get("SANA_EXT_EMULATOR", "") == "1" or DEVICE == "cuda"
needs_fp64 = pytest.mark.skipif(EMULATED, reason="the CUDA kernels have no float64")
_cuda = _extension.libraries()["cuda"]
# Two marks: without the reason "needs a GPU" a machine that has one would count a missing library as a missing GPU.
needs_gpu = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not _cuda.loaded, reason=f"needs a GPU and its library: {_cuda.reason}"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16][EMULATED:]
WIDEST = DTYPES[0]
dtype_id = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731


def rand(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Standard normal fp64 leaf, the raw material of every case."""
    generator = torch.Generator().manual_seed(seed * 1000003 + sum(shape) * 101 + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE) * scale


def outputs_and_gradients(
    fn: Callable[..., Any], inputs: dict[str, torch.Tensor | None], seed: int
) -> dict[str, torch.Tensor]:
    """Runs fn(**inputs), backpropagates a fixed random cotangent, returns {"out0": ..., "d<name>": ...}."""
    leaves = {
        k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_() if v is not None else None
        for k, v in inputs.items()
    }
    result = fn(**leaves)
    outs = result if isinstance(result, tuple) else (result,)
    cotangents = [rand(seed + 77 + i, *o.shape).to(o) for i, o in enumerate(outs)]
    given = {k: v for k, v in leaves.items() if v is not None}
    grads = torch.autograd.grad(outs, list(given.values()), cotangents)
    return {f"out{i}": o.detach() for i, o in enumerate(outs)} | {f"d{k}": g for k, g in zip(given, grads)}


def pooled_runs(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    make: Make,
    dtype: torch.dtype | dict[str, torch.dtype],
    seeds: int = 5,
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ours, the reference in that dtype, truth) in fp64, for outputs and every gradient by name.

    Truth is the reference in fp64 on the same (rounded) inputs. Results are flat; where one has fewer than 1,000 elements,
    all pool over `seeds` runs.
    """
    runs: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    for seed in range(seeds):
        inputs = make(seed)
        of = (lambda k: dtype) if isinstance(dtype, torch.dtype) else (lambda k: dtype[k])
        low = {k: None if v is None else v.to(of(k)) for k, v in inputs.items()}
        truth = outputs_and_gradients(reference, {k: None if v is None else v.double() for k, v in low.items()}, seed)
        peer = outputs_and_gradients(reference, low, seed)
        ours = outputs_and_gradients(op, low, seed)
        for name, t in truth.items():
            assert ours[name].shape == t.shape, f"{name}: shape {list(ours[name].shape)}, expected {list(t.shape)}"
            assert ours[name].dtype == peer[name].dtype, f"{name}: {ours[name].dtype}, reference {peer[name].dtype}"
            runs.setdefault(name, []).append((ours[name].double(), peer[name].double(), t))
        if min(t.numel() for t in truth.values()) >= 1000:
            break
    pooled = {}
    for name, triples in runs.items():
        ours_, peer_, truth_ = (torch.cat([triple[i].flatten() for triple in triples]) for i in range(3))
        if truth_.numel():
            assert torch.isfinite(ours_).all() or not torch.isfinite(truth_).all(), f"{name}: not finite"
            pooled[name] = ours_, peer_, truth_
    return pooled


def assert_matches(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    make: Make,
    dtype: torch.dtype | dict[str, torch.dtype],
    seeds: int = 5,
) -> None:
    """err(ours) <= 2 * err(reference run in that dtype) + 4 eps32 * max|truth|, for outputs and every gradient by name.

    err is the max-abs and the RMS error, both must hold. fp64 agrees to 1e-12 of the larger of 1 and the largest value.
    bf16 gradients also keep a relative L2 error below 1e-2.
    """
    of = (lambda k: dtype) if isinstance(dtype, torch.dtype) else dtype.get
    given = [name for name, value in make(0).items() if value is not None]
    all_fp64 = all(of(name) == torch.float64 for name in given)
    for name, (ours, peer, truth) in pooled_runs(op, reference, make, dtype, seeds).items():
        largest = truth.abs().max().item()
        for kind, err in (("max", max_abs), ("rms", rms)):
            error, allowed = err(ours - truth), 2 * err(peer - truth) + 4 * EPS32 * largest
            if all_fp64:
                allowed = 1e-12 * max(largest, 1.0)
            assert error <= allowed, f"{name}: {kind} error {error:.3e} > {allowed:.3e} (largest value {largest:.3e})"
        if name[1:] in given and of(name[1:]) == torch.bfloat16:
            l2 = ((ours - truth).norm() / truth.norm().clamp_min(1e-30)).item()
            assert l2 < 1e-2, f"{name}: relative L2 error {l2:.3e}"


def max_abs(error: torch.Tensor) -> float:
    return error.abs().max().item()


def rms(error: torch.Tensor) -> float:
    return error.pow(2).mean().sqrt().item()


def gradcheck(fn: Callable[..., Any], inputs: Sequence[torch.Tensor | None]) -> None:
    """torch.autograd.gradcheck in fp64; inputs are fp64 tensors."""
    leaves = tuple(None if t is None else t.detach().clone().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(fn, leaves, eps=1e-6, atol=1e-6, rtol=1e-5)


def opcheck(op: Any, args: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> None:
    """All four parts of torch.library.opcheck."""
    cast = tuple(
        a.to(dtype).requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )
    torch.library.opcheck(op, cast)


def assert_compiles(fn: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """fullgraph=True under dynamo and AOT autograd: same outputs and gradients as eager, bitwise."""

    def run(f: Callable[..., Any]) -> list[torch.Tensor]:
        leaves = [t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs]
        result = f(*leaves)
        outs = result if isinstance(result, tuple) else (result,)
        sum(o.float().square().sum() for o in outs).backward()
        return [*(o.detach() for o in outs), *(t.grad for t in leaves if isinstance(t, torch.Tensor))]

    torch._dynamo.reset()
    for a, b in zip(run(fn), run(torch.compile(fn, fullgraph=True, backend="aot_eager"))):
        assert torch.equal(a, b)


def assert_thread_independent(fn: Callable[..., Any], inputs: dict[str, torch.Tensor | None]) -> None:
    """Bitwise equal outputs and gradients with 1, 2 and 3 threads, and from run to run."""
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(outputs_and_gradients(fn, inputs, 0))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(value, run[name]), f"{name} depends on the thread count"


def normal_parameters(shapes, dtype, device):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def normal_gradients(params, step):
    """The same on every device."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)
