"""Parameters that are cut along their first axis over processes (FSDP2's DTensor), as the optimizers see them.

State tensors of a sharded parameter are DTensors too, so that torch.distributed.checkpoint saves and re-shards them. An
8-bit block never crosses a shard: where the borders of shards are not borders of blocks, the parameter's momentum stays
fp32 (see `aligned`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(t: Tensor) -> bool:
    """Tells whether t is a DTensor; asks without importing torch.distributed.tensor, which takes its time."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """This process's part; an ordinary tensor is its own."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def mesh_axis(p: Any) -> int | None:
    """The mesh axis along which p's first axis is cut; None for an ordinary or a replicated tensor."""
    if not is_sharded(p):
        return None
    cuts = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if not cuts:
        return None
    if len(cuts) > 1 or not p.placements[cuts[0]].is_shard(0):
        raise ValueError(
            f"sana_ext.optim: a sharded parameter must be cut along its first axis only, got {p.placements}"
        )
    return cuts[0]


def gradient(p: Any, grad: Any) -> Tensor:
    """The local gradient, in p's placement."""
    if not is_sharded(p):
        return grad
    if grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    return grad.to_local()


def rows(n: int, parts: int) -> list[int]:
    """Returns the sizes into which torch cuts n rows."""
    size = -(-n // parts)
    return [max(0, min(size, n - r * size)) for r in range(parts)]


def aligned(p: Any, spec: Callable[[tuple[int, ...]], Any]) -> bool:
    """Tells whether every state tensor of the shards, by `spec`, is what torch cuts out of that of the whole parameter."""
    axis = mesh_axis(p)
    if axis is None:
        return True
    parts = p.device_mesh.size(axis)
    whole = spec(tuple(p.shape))
    shards = [spec((n, *p.shape[1:])) for n in rows(p.shape[0], parts)]
    return all(
        [shard[key][0][0] for shard in shards] == rows(shape[0], parts) for key, (shape, _, cut) in whole.items() if cut
    )


def like(p: Any, part: Tensor, whole: Sequence[int], cut: bool) -> Tensor:
    """`part` as p's state: for a DTensor one of shape `whole`, cut as p is, or on every process the same."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor, Replicate

    placements = p.placements if cut else [Replicate()] * len(p.placements)
    stride = torch.empty(tuple(whole), device="meta").stride()
    return DTensor.from_local(part, p.device_mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride)


def reduce_(parts: Sequence[tuple[Any, Tensor]], op: str = "sum") -> None:
    """Adds up (or takes the maximum of) tensors over the processes that share each owner's shards, in place.

    All tensors of one process group travel together, in fp32.
    """
    together: dict[Any, list[Tensor]] = {}
    for owner, t in parts:
        axis = mesh_axis(owner)
        if axis is not None and t.numel():
            together.setdefault(owner.device_mesh.get_group(axis), []).append(t)
    for group, tensors in together.items():
        flat = torch.cat([t.flatten() for t in tensors])
        kind = torch.distributed.ReduceOp.SUM if op == "sum" else torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(flat, kind, group=group)
        for t, reduced in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(reduced.view(t.shape))
