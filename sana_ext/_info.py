"""Tells which implementation answers each op on each device, by which path, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _extension
from .ops import __all__ as PUBLIC
from .ops._arithmetic import UPCAST

DEVICES = ("cpu", "cuda")

#: What runs on every change of the kernels, per instruction set level (`make check`).
TESTED = {
    "baseline": "all op tests",
    "avx2": "all op tests",
    "avx512": "all op tests, where the processor has it",
    "neon": "the torch-free kernel tests, under qemu-user; never run on an Arm processor",
}
#: Ops of the optimizers, which are no public functions and have no gradient.
OPTIMIZERS = ("adamw8bit_step", "came8bit_step")
#: Public functions without an op of their own.
COMPOSED = {"glumbconv": ("linear", "dwconv_glu")}
#: Public functions that are torch's own wherever the processor has the arithmetic.
MOSTLY_TORCH = ("linear", "cross_attention")


@dataclass(frozen=True)
class KernelInfo:
    """One line of :func:`kernel_info`.

    forward, backward: ``compiled`` (a kernel of this package), ``default`` (the reference in plain PyTorch), ``torch``
    (torch's own op, on purpose), ``composed`` (of other ops of this package) or ``none`` (an optimizer's step).
    path: ``tuned``, ``generic``, ``default``, ``torch`` or ``composed``; why: the reason in words.
    level: instruction set level of a compiled CPU kernel; tested: which runs of that level are recorded.
    """

    op: str
    device: str
    forward: str
    backward: str
    path: str
    why: str
    level: str | None = None
    tested: str | None = None


class KernelTable(tuple[KernelInfo, ...]):
    """The lines of :func:`kernel_info`; ``str()`` is a table."""

    def __str__(self) -> str:
        rows = [("op", "device", "forward", "backward", "path", "why")]
        rows += [(r.op, r.device, r.forward, r.backward, r.path, r.why) for r in self]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[5]]).rstrip() for row in rows)


def kernel_info(op: str | None = None, **sizes: int) -> KernelTable:
    """Tells which implementation answers, per op and device, by which path, and why.

    Args:
        op: a public op ("linear_attention") or an optimizer's ("came8bit_step"); default: all of them.
        sizes: what the path depends on, in the letters of the docstrings (``D=32``, ``C=2240``); unknown ones are
            ignored. Without them a path that depends on a size says so.

    Returns:
        A tuple of :class:`KernelInfo` whose ``str()`` is a readable table.

    Raises:
        ValueError: an op that does not exist.
    """
    every = [*sorted(PUBLIC), *OPTIMIZERS]
    if op is not None and op not in every:
        raise ValueError(f"sana_ext.kernel_info: unknown op {op!r}; there is {', '.join(every)}")
    names = every if op is None else [op]
    return KernelTable(_describe(name, device, sizes) for name in names for device in DEVICES)


def _describe(op: str, device: str, sizes: dict[str, int]) -> KernelInfo:
    if op in COMPOSED:
        return KernelInfo(op, device, "composed", "composed", "composed", f"of {' and '.join(COMPOSED[op])}")
    if op in MOSTLY_TORCH and (device != "cpu" or not UPCAST):
        why = "on CUDA torch's own op answers" if device == "cuda" else _native_arithmetic()
        return KernelInfo(op, device, "torch", "torch", "torch", why)
    library = _extension.libraries()[device]
    forward, backward = (
        "compiled" if _extension.has_kernel(name, device) else "default"
        for name in ((op, op) if op in OPTIMIZERS else (f"{op}_forward", f"{op}_backward"))
    )
    if op in OPTIMIZERS:
        backward = "none"
    if "compiled" not in (forward, backward):
        why = f"no kernel for {device}" if library.loaded else f"libsana_ext_{device}.so: {library.reason}"
        if op in MOSTLY_TORCH:
            why = "products in fp32 through torch: this processor has no 16-bit arithmetic"
        return KernelInfo(op, device, forward, backward, "default", why)
    level = _extension.isa() if device == "cpu" else None
    path, why = PATHS.get((op, device), _one_path)(sizes)
    tested = TESTED.get(level, "untested") if level else None
    return KernelInfo(op, device, forward, backward, path, f"{level}: {why}" if level else why, level, tested)


def _native_arithmetic() -> str:
    if not _extension.libraries()["cpu"].loaded:
        return "without the compiled library torch's own op answers"
    return "this processor has 16-bit arithmetic: torch's own op answers"


# Paths of the compiled kernels, as their dispatch in csrc decides.


def _one_path(sizes: dict[str, int]) -> tuple[str, str]:
    return "tuned", "one path for every shape"


def _norm_modulate_cuda(sizes: dict[str, int]) -> tuple[str, str]:
    rule = "aligned rows of up to 2304 channels, a multiple of 8, stay in registers"
    return _by_size(sizes, "C", lambda c: c % 8 == 0 and c <= 2304, rule)


def _dwconv_glu_cuda(sizes: dict[str, int]) -> tuple[str, str]:
    rule = "aligned rows with F a multiple of 8 (of 4 in fp32) are copied 16 bytes at a time"
    return _by_size(sizes, "F", lambda f: f % 8 == 0, rule)


def _came8bit_cuda(sizes: dict[str, int]) -> tuple[str, str]:
    rule = "aligned rows with C a multiple of 8, and blocks, too, in 16-byte accesses"
    return _by_size(sizes, "C", lambda c: c % 8 == 0, rule)


def _linear_attention(sizes: dict[str, int]) -> tuple[str, str]:
    return _by_size(sizes, "D", lambda d: d == 32, "a head dimension of 32 is fixed at compile time")


def _linear_attention_cuda(sizes: dict[str, int]) -> tuple[str, str]:
    rule = "aligned 16-bit rows with a head dimension of 32 go to the tensor cores"
    return _by_size(sizes, "D", lambda d: d == 32, rule)


def _linear(sizes: dict[str, int]) -> tuple[str, str]:
    """Two ways, both meant; which one depends on the number of rows M."""
    if "M" not in sizes:
        return "tuned", "up to 32 rows the weight is read once; more: panels of it in fp32, products by torch"
    few = sizes["M"] <= 32
    return "tuned", f"M={sizes['M']}; {'the weight is read once' if few else 'panels in fp32, products by torch'}"


def _by_size(sizes: dict[str, int], name: str, tuned: Callable[[int], bool], rule: str) -> tuple[str, str]:
    if name not in sizes:
        return f"by {name}", f"tuned: {rule}; else generic"
    return ("tuned" if tuned(sizes[name]) else "generic"), f"{name}={sizes[name]}; {rule}"


PATHS: dict[tuple[str, str], Callable[[dict[str, int]], tuple[str, str]]] = {
    ("norm_modulate", "cuda"): _norm_modulate_cuda,
    ("gated_residual", "cuda"): _norm_modulate_cuda,
    ("residual_norm_modulate", "cuda"): _norm_modulate_cuda,
    ("dwconv_glu", "cuda"): _dwconv_glu_cuda,
    ("came8bit_step", "cuda"): _came8bit_cuda,
    ("linear_attention", "cpu"): _linear_attention,
    ("linear_attention_qkv", "cpu"): _linear_attention,
    ("linear_attention", "cuda"): _linear_attention_cuda,
    ("linear_attention_qkv", "cuda"): _linear_attention_cuda,
    ("linear", "cpu"): _linear,
}


def cpu_level() -> str:
    """One line on the instruction set level."""
    level = _extension.isa()
    if level is None:
        return "CPU kernels: not built"
    return (
        f"CPU kernels: {level} (best here: {_extension.best_isa()}; SANA_EXT_CPU_ISA chooses); "
        f"tested with this level: {TESTED.get(level, 'nothing')}"
    )


def arithmetic() -> str:
    """One line on who multiplies 16-bit matrices on the CPU."""
    if not UPCAST:
        return "16-bit matrix products on the CPU: torch's own"
    names = ", ".join(sorted(str(d).removeprefix("torch.") for d in UPCAST))
    return f"16-bit matrix products on the CPU: {names} in fp32 arithmetic (no such instructions here)"


def torch_line() -> str:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"torch {torch.__version__}, {cuda}, {torch.get_num_threads()} CPU threads"
