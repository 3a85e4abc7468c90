"""Decides which 16-bit arithmetic torch may do itself on this machine's CPU, and which runs in fp32 instead.

A processor without bf16 (fp16) instructions multiplies such matrices several times slower than fp32 ones. The
compiled library looks at the processor; without it the answer is always "torch's own". SANA_EXT_CPU_ISA=avx2 forces
fp32 arithmetic.
"""

from __future__ import annotations

import torch

from ._library import define

#: 16-bit dtypes whose matrix products run in fp32 arithmetic on the CPU; filled by probe().
UPCAST: set[torch.dtype] = set()

define(
    "linear",
    "native_arithmetic",
    "(ScalarType dtype) -> bool",
    lambda dtype: True,
    lambda dtype: dtype not in UPCAST,
)


def probe() -> None:
    """Asks the loaded library once, so that a traced or faked call only reads a table."""
    UPCAST.clear()
    UPCAST.update(d for d in (torch.bfloat16, torch.float16) if not torch.ops.sana_ext.native_arithmetic(d))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype where it is on. Devices that it does not know (tensors without memory) have none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def operand_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which torch's matrix products would take x: autocast's where it is on."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype


def upcast(x: torch.Tensor) -> bool:
    """Tells whether products with x run in fp32 arithmetic by kernels of this package."""
    return x.device.type == "cpu" and operand_dtype(x) in UPCAST
