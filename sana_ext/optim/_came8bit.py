"""CAME with an 8-bit first moment, and a reader for the states of the authors' optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.came8bit import GEOMETRY  # noqa: F401  (registers the op)
from ..reference.came8bit import Geometry, trimmed
from ..reference.code8 import CODES
from . import _shards as shards
from ._base import Optimizer8bit, Spec, Work, number, numbers

_FACTORED = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")


class CAME8bit(Optimizer8bit):
    """CAME (arXiv:2307.02047) as SANA-1.5 trains with it, the first moment in 8 bits, in true blocks of consecutive values.

    The formulas are in ``sana_ext.reference.came8bit``. Second-order statistics are fp32: one number per row and per column
    of a matrix or 1x1 convolution, of its gradient and of its residual; one per value of vectors and other convolutions.
    Larger tensors are batches of matrices, as in came-pytorch, where that is less state. So SANA's models take 1.02 bytes
    of state per parameter, 1.03 with the dynamic code.

    CAME has no bias correction: its first steps are about 11 lr, 7 lr at step 10 and 2.5 lr at step 100. Warm up over at
    least some 1,000 steps, or pass ``bias_correction=True`` (another optimizer: its steps begin with 1.1 lr).

    Args:
        params: parameters, groups of them, or ``named_parameters()``; float32 or bfloat16 (gradients, too).
        lr: learning rate; a number, or a tensor of one element.
        betas: of the update, of its square and of the residual.
        eps: added to the squared gradient and to the squared residual.
        clip_threshold: largest rms of a parameter's update, before the momentum.
        weight_decay: decoupled: ``p -= lr * weight_decay * p`` first.
        code: "2048-linear" (the paper's minimum-maximum code, blocks of 2048 values, with 0 as one of
            its values), "256-dynamic" (signed dynamic code,
            blocks of 256 values), or None: the first moment in fp32. A block ends where a row does: a row is cut into
            as many equal pieces as it has whole blocks; rows of fewer than 64 values share one. After 40 steps on
            synthetic gradients of 1120 x 2240 values the first moment was off by 1.8 % (linear) and 2.5 % (dynamic),
            0.6 % of the signs lost by either; with rows and columns of very different size and heavy tails (t, 3
            degrees) by 3.3 % and 3.1 %, 1.1 % and 0.7 % of the signs. Linear is faster and smaller: the default.
        block_size: another length of the blocks.
        min_8bit_size: parameters with fewer values, and all vectors, keep an fp32 first moment.
        bias_correction: divide the averages by ``1 - beta^t``.
        stochastic_rounding: round bfloat16 parameters up or down by chance, so that small steps are not lost. The draws
            depend on the step and the parameter's place alone: a resumed run repeats them.
        capturable: keep the step count on the parameters' device, and never wait for that device.

    Sharded parameters (FSDP2) must be cut along their first axis. Results equal those of one process up to the order of
    sums. Where shards end inside a block (rows of fewer than 64 values only) the first moment is fp32, and a checkpoint with
    8-bit codes of that parameter is refused.

    Raises:
        ValueError, TypeError: an argument or a parameter that does not fit.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        *,
        code: str | None = "2048-linear",
        block_size: int | None = None,
        min_8bit_size: int = 4096,
        bias_correction: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
            "code": code,
            "block_size": block_size,
            "min_8bit_size": min_8bit_size,
            "bias_correction": bias_correction,
            "stochastic_rounding": stochastic_rounding,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_common(group)
        check = partial(self._check, group)
        check(
            numbers(group["betas"], 3) and all(0 <= b < 1 for b in group["betas"]), "betas", "three numbers in [0, 1)"
        )
        check(numbers(group["eps"], 2) and all(e >= 0 for e in group["eps"]), "eps", "two numbers >= 0")
        check(number(group["clip_threshold"]) and group["clip_threshold"] > 0, "clip_threshold", "a number > 0")
        check(group["code"] is None or group["code"] in CODES, "code", f"{', '.join(map(repr, CODES))} or None")
        block = group["block_size"]
        check(block is None or (isinstance(block, int) and 1 <= block <= 2**16), "block_size", "an integer in 1..65536")

    def _quantises(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        large = torch.Size(shape).numel() >= max(1, group["min_8bit_size"])
        return group["code"] is not None and large and len(shape) > 1

    def _spec(self, shape: tuple[int, ...], group: dict[str, Any], quantised: bool) -> Spec:
        fp32, geometry = torch.float32, _geometry(shape, group)
        spec: Spec = {"exp_avg": (shape, torch.uint8 if quantised else fp32, True)}
        axes = trimmed(shape)
        batched = geometry.factored and len(axes) > 2
        if quantised:
            units, numbers = geometry.matrices * geometry.units, (2,) if _code(group) == "linear" else ()
            first = (shape[0], units // max(1, shape[0])) if batched else (units,)
            spec["exp_avg_scale"] = ((*first, geometry.blocks, *numbers), fp32, True)
        if not geometry.factored:
            return spec | {"exp_avg_sq": (shape, fp32, True)}
        for name in _FACTORED:
            if batched:
                spec[name] = (axes[:-1] if name.endswith("row") else (*axes[:-2], axes[-1]), fp32, True)
            elif name.endswith("row"):
                spec[name] = ((geometry.rows,), fp32, True)
            else:
                spec[name] = ((geometry.cols,), fp32, False)
        return spec

    def _update(self, work: list[Work], factor: Tensor, found_inf: Tensor) -> None:
        work = [w for w in work if w.owner.numel()]
        if not work:
            return
        device = found_inf.device
        geometries = [_geometry(tuple(w.param.shape), w.group) for w in work]
        sizes = [sum(g.work) for g in geometries]
        space = torch.zeros(sum(sizes), dtype=torch.float32, device=device).split(sizes)
        none = torch.empty(0, device=device)
        states = [w.state for w in work]
        hyper, seeds = self._numbers(work, factor)
        arguments = (
            [w.param for w in work],
            [w.grad for w in work],
            [s["exp_avg"] for s in states],
            [s.get("exp_avg_scale", none) for s in states],
            [s["exp_avg_sq_row" if g.factored else "exp_avg_sq"] for s, g in zip(states, geometries)],
            *([s.get(name, none) for s in states] for name in _FACTORED[1:]),
            list(space),
            hyper,
            seeds,
            found_inf,
            [n for w, g in zip(work, geometries) for n in (*_first(g), _code(w.group) == "linear")],
        )
        step = self._step_op()
        if not any(shards.is_sharded(w.owner) for w in work):
            step(*arguments, 0, 3)
            return
        for phase in range(4):
            step(*arguments, phase, phase)
            if phase < 3:
                self._add_up(phase, work, geometries, space, found_inf)

    def _step_op(self) -> Any:
        return torch.ops.sana_ext.came8bit_step

    def _add_up(self, phase: int, work: list[Work], geometries: list[Geometry], space: Any, found_inf: Tensor) -> None:
        """Completes the sums of one phase over the processes that share the parameters."""
        parts = []
        for w, geometry, t in zip(work, geometries, space):
            total, col, square, res_total, res_col, _, _ = t.split(geometry.work)
            if phase == 1:
                parts.append((w.owner, square))
            elif geometry.factored and len(trimmed(tuple(w.param.shape))) == 2:  # a batch is cut between matrices
                parts += (
                    [(w.owner, total), (w.owner, col)] if phase == 0 else [(w.owner, res_total), (w.owner, res_col)]
                )
        shards.reduce_(parts)
        if phase == 0:
            owners = {id(w.owner.device_mesh): w.owner for w in work if shards.mesh_axis(w.owner) is not None}  # type: ignore[attr-defined]
            for owner in owners.values():
                shards.reduce_([(owner, found_inf)], "max")

    def _numbers(self, work: list[Work], factor: Tensor) -> tuple[Tensor, Tensor | None]:
        """The op's tensors hyper and seeds, on the parameters' device."""
        device = factor.device
        rows = tuple(_row(w) for w in work)
        if self._constants is None or self._constants[0] != (device, rows):  # unchanged ones are not copied again
            self._constants = (device, rows), torch.tensor(rows, dtype=torch.float64, device=device)
        numbers = self._constants[1]
        hyper = numbers[:, : len(rows[0]) - 3].clone()
        hyper[:, 8] = factor
        for i, w in enumerate(work):
            if isinstance(w.group["lr"], Tensor):
                hyper[i, 0] = w.group["lr"].reshape(()).to(device)
        if not any(w.group["bias_correction"] or w.group["stochastic_rounding"] for w in work):
            return hyper, None
        t = torch.stack([w.state["step"] for w in work]).to(device, torch.float64) + 1
        corrected, by_chance, places = numbers[:, -3:].unbind(1)
        hyper[:, 9:12] = torch.where(corrected[:, None] > 0, 1 / (1 - hyper[:, 2:5] ** t[:, None]), 1.0)
        mixed = (t.long() * 0x9E3779B1 + places.long() * 0x85EBCA6B) & 0xFFFFFFFF
        return hyper, torch.where(by_chance > 0, mixed, -1)


def read_sana_state(optimizer: CAME8bit, state_dict: dict[str, Any]) -> None:
    """Loads the state of the authors' ``CAME8BitWrapper`` (NVlabs/Sana), which codes groups of 2048 rows as one block.

    The first moments are decoded and coded again in this optimizer's blocks; statistics and step counts are taken as they
    are. Learning rates and other options stay those of `optimizer`.

    Args:
        optimizer: over the same parameters in the same order.
        state_dict: what ``CAME8BitWrapper.state_dict()`` returned, or CAMEWrapper's (no 8-bit tensors).

    Raises:
        ValueError: the numbers of parameters differ, a tensor's shape does not fit, or a statistic is missing.
    """
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    own = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    if len(saved) != len(own):
        raise ValueError(
            f"sana_ext.optim.read_sana_state: {len(saved)} parameters in the state, {len(own)} in the optimizer"
        )
    states = {}
    for n, (i, (group, p)) in enumerate(zip(saved, own)):
        if i in state_dict["state"]:
            states[n] = _converted(optimizer, p, group, state_dict["state"][i])
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _converted(optimizer: CAME8bit, p: Tensor, group: dict[str, Any], entry: dict[str, Any]) -> dict[str, Tensor]:
    shape = tuple(p.shape)
    m = entry["exp_avg"]
    if isinstance(m, (list, tuple)):
        m = torch.cat([part["data"].float() * part["scale"].float() + part["min"].float() for part in m])
    if m.numel() != p.numel():
        raise ValueError(
            f"sana_ext.optim.read_sana_state: exp_avg has shape {list(m.shape)}, the parameter {list(shape)}"
        )
    m = m.detach().float().reshape(shape)
    quantised = optimizer._quantises(shape, group)
    state = {"step": torch.as_tensor(entry["step"], dtype=torch.float32), "exp_avg": m}
    spec = optimizer._spec(shape, group, quantised)
    if quantised:
        codes, scales = _geometry(shape, group).quantize(m, _code(group))
        state |= {"exp_avg": codes, "exp_avg_scale": scales.view(spec["exp_avg_scale"][0])}
    if missing := [k for k in spec if k not in state and k not in entry]:
        raise ValueError(
            f"sana_ext.optim.read_sana_state: the state of a parameter of shape {list(shape)} has no {missing[0]}"
        )
    return state | {k: entry[k].float() for k in spec if k not in state}


def _row(w: Work) -> tuple[float, ...]:
    """The op's numbers of a parameter, then three of the optimizer's."""
    group, lr = w.group, w.group["lr"]
    return (
        0.0 if isinstance(lr, Tensor) else float(lr),
        group["weight_decay"],
        *group["betas"],
        *group["eps"],
        group["clip_threshold"],
        *(1.0, 1.0, 1.0, 1.0),
        float(_geometry(tuple(w.owner.shape), group).rows),
        float(w.owner.numel()),
        *(float(group["bias_correction"]), float(group["stochastic_rounding"]), float(w.place)),
    )


def _geometry(shape: tuple[int, ...], group: dict[str, Any]) -> Geometry:
    return Geometry.of(shape, group["block_size"] or (CODES[group["code"]][0] if group["code"] else 256))


def _code(group: dict[str, Any]) -> str:
    return CODES[group["code"]][1] if group["code"] else "dynamic"


def _first(g: Geometry) -> tuple[int, ...]:
    return g.matrices, g.rows, g.cols, int(g.factored), g.block
