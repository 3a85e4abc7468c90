"""An 8-bit optimizer's state on the shapes of a published model, measured as allocated: one step fused into the backward.

Parameter after parameter: its weight is made, the gradient arrives, the hook of `fuse_backward` steps and frees the gradient,
and the weight's memory is given back, since weights of the largest model need not fit beside the state (`--keep-weights`
keeps them). The states stay, all of them. No forward pass of the model is run.

    python benchmarks/optimizer_state.py --size 4800M
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sana15.model.config import SanaConfig
from sana15.model.transformer import SanaTransformer
from sana_ext.optim import AdamW8bit, CAME8bit, fuse_backward

OPTIMIZERS = {"CAME8bit": CAME8bit, "AdamW8bit": AdamW8bit}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Measured:
    parameters: int
    state: int  # bytes of the storages of all state tensors
    predicted: int  # `state_bytes()` before the first step
    largest_gradients: int  # most bytes of gradients that existed after a step
    resident: int  # growth of the process from before the first step to after the last one; 0 where it cannot be read
    peak: int  # largest size of the process
    seconds: float


def measure(size: str, optimizer: str, dtype: torch.dtype, keep_weights: bool = False) -> Measured:
    with torch.device("meta"):
        shapes = [(name, p.shape) for name, p in SanaTransformer(SanaConfig.named(size)).named_parameters()]
    params = []
    for name, shape in shapes:
        p = nn.Parameter(torch.empty(shape, dtype=dtype))
        p.untyped_storage().resize_(0)
        params.append((name, p))
    stepper = OPTIMIZERS[optimizer](params, lr=1e-4)
    predicted = stepper.state_bytes()
    fuse_backward(stepper)
    before, largest, began = resident(), 0, time.perf_counter()
    for _, p in params:
        p.untyped_storage().resize_(p.numel() * p.element_size())
        p.data.fill_(0.5)
        p.sum().backward()
        largest = max(largest, sum(q.grad.untyped_storage().nbytes() for _, q in params if q.grad is not None))
        if not keep_weights:
            p.untyped_storage().resize_(0)
    seconds = time.perf_counter() - began
    assert len(stepper.state) == len(params)
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for s in stepper.state.values() for t in s.values()}
    return Measured(
        sum(p.numel() for _, p in params),
        sum(s.nbytes() for s in storages.values()),
        predicted,
        largest,
        resident() - before,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        seconds,
    )


def resident() -> int:
    """Bytes of this process in memory (Linux), after the heap has handed back what was freed: weights lie between states."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)
    return int(statm.read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="4800M", help="600M, 1600M, 4800M or mini (default 4800M)")
    parser.add_argument("--optimizer", default="CAME8bit", choices=OPTIMIZERS, help="default CAME8bit")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of weights and gradients (default bf16)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default 2)")
    parser.add_argument("--keep-weights", action="store_true", help="do not free a weight after its step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    m = measure(args.size, args.optimizer, DTYPES[args.dtype], args.keep_weights)
    print(f"{args.optimizer} on {args.size}, {m.parameters} parameters in {args.dtype}, {m.seconds:.0f} s")
    print(f"state       {m.state} bytes = {m.state / 2**30:.2f} GiB = {m.state / m.parameters:.4f} per parameter")
    print(f"predicted   {m.predicted} bytes; gradients left after a step: {m.largest_gradients} bytes")
    print(f"process     grew by {m.resident / 2**30:.2f} GiB, largest {m.peak / 2**30:.2f} GiB")
