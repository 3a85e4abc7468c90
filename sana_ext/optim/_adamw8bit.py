"""AdamW with 8-bit states, and the state dict of bitsandbytes both ways."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..ops import adamw8bit as _ops  # noqa: F401  (registers the ops)
from ..reference.adamw8bit import BLOCK, rest32
from ..reference.code8 import dynamic_table
from . import _shards as shards
from ._base import Optimizer8bit, Spec, Work, number, numbers

_WRAPPED = (
    "__bnb_optimizer_quant_state__"  # bitsandbytes hides the tensors of its states from FSDP in a dict of this name
)
_THEIR_OPTIONS = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}  # of other optimizers, but in every group


class AdamW8bit(Optimizer8bit):
    """AdamW (arXiv:1711.05101) with both moments in 8 bits (arXiv:2110.02861), as bitsandbytes' AdamW8bit has them.

    The formulas are in ``sana_ext.reference.adamw8bit``, the meaning of the bytes in ``sana_ext.reference.code8``. State per
    parameter: ``state1`` and ``state2``, uint8 of its shape, and ``absmax1`` and ``absmax2``, one fp32 number for each 256
    values: 2.03 bytes per value. A parameter of fewer than `min_8bit_size` values keeps both moments in fp32, and so does a
    sharded one (FSDP2) whose shards are not whole blocks of 256 values. torch.distributed.checkpoint re-shards states of either
    kind; it cannot turn one into the other, and the attempt ends with an error.

    It differs from bitsandbytes in one thing: a positive second moment is never stored as 0. Below 1.6e-7 of its block's
    largest it takes the smallest positive code; stored as 0 beside a first moment that is not, it would turn the next steps of
    a rarely seen value into hundreds of times the rate. A second moment that bitsandbytes stored as 0 is read that way, too.

    ``load_state_dict`` also takes what bitsandbytes' AdamW8bit saved; ``bitsandbytes_state_dict`` writes what it loads.

    Args:
        params: parameters, groups of them, or ``named_parameters()``; float32 or bfloat16 (gradients, too).
        lr: learning rate; a number, or a tensor of one element.
        betas: of the gradient's average and of its square's.
        eps: added to the square root of the average square.
        weight_decay: decoupled: ``p -= lr * weight_decay * p``, before the update.
        min_8bit_size: parameters with fewer values keep fp32 states.
        stochastic_rounding: round bfloat16 parameters up or down by chance, so that small steps are not lost. The draws
            depend on `seed`, the step and the parameter's place alone: a resumed run repeats them.
        seed: of stochastic rounding.
        bitsandbytes_cuda_order: decay after the update, and negative first moments never become 0, as bitsandbytes does on
            GPUs (its CPU code has the order of the default).
        capturable: keep the step count on the parameters' device, and never wait for that device.

    Raises:
        ValueError, TypeError: an argument or a parameter that does not fit.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = False,
        seed: int = 0,
        bitsandbytes_cuda_order: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "min_8bit_size": min_8bit_size,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "bitsandbytes_cuda_order": bitsandbytes_cuda_order,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_common(group)
        check = partial(self._check, group)
        check(numbers(group["betas"], 2) and all(0 <= b < 1 for b in group["betas"]), "betas", "two numbers in [0, 1)")
        check(number(group["eps"]) and group["eps"] >= 0, "eps", "a number >= 0")
        check(isinstance(group["seed"], int) and 0 <= group["seed"] < 2**32, "seed", "an integer in 0..2^32-1")

    def _quantises(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return torch.Size(shape).numel() >= max(1, group["min_8bit_size"])

    def _quantised(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Blocks run over the whole parameter, so every shard but the last must end where a block does."""
        axis = shards.mesh_axis(p)
        if axis is not None:
            inner = torch.Size(p.shape[1:]).numel()
            ends = accumulate(shards.rows(p.shape[0], p.device_mesh.size(axis)))  # type: ignore[attr-defined]
            if any(end * inner % BLOCK and end < p.shape[0] for end in ends):
                return False
        return super()._quantised(p, group)

    def _spec(self, shape: tuple[int, ...], group: dict[str, Any], quantised: bool) -> Spec:
        dtype = torch.uint8 if quantised else torch.float32
        spec: Spec = {"state1": (shape, dtype, True), "state2": (shape, dtype, True)}
        if quantised:
            blocks = -(-torch.Size(shape).numel() // BLOCK)
            spec |= {"absmax1": ((blocks,), torch.float32, True), "absmax2": ((blocks,), torch.float32, True)}
        return spec

    def _update(self, work: list[Work], factor: Tensor, found_inf: Tensor) -> None:
        ops = torch.ops.sana_ext
        ops.adamw8bit_check([w.grad for w in work], factor, found_inf)
        owners = {id(w.owner.device_mesh): w.owner for w in work if shards.mesh_axis(w.owner) is not None}  # type: ignore[attr-defined]
        for owner in owners.values():
            shards.reduce_([(owner, found_inf)], "max")
        hyper, seeds = self._numbers(work, factor)
        none = torch.empty(0, device=found_inf.device)
        for order in (False, True):
            chosen = [i for i, w in enumerate(work) if w.group["bitsandbytes_cuda_order"] == order]
            if not chosen:
                continue
            every = len(chosen) == len(work)
            ops.adamw8bit_step(
                [work[i].param for i in chosen],
                [work[i].grad for i in chosen],
                *(
                    [work[i].state.get(name, none) for i in chosen]
                    for name in ("state1", "state2", "absmax1", "absmax2")
                ),
                hyper if every else hyper[chosen],
                seeds if every or seeds is None else seeds[chosen],
                found_inf,
                order,
            )

    def _numbers(self, work: list[Work], factor: Tensor) -> tuple[Tensor, Tensor | None]:
        """The op's tensors hyper and seeds, on the parameters' device."""
        device = factor.device
        rows = tuple(_row(w) for w in work)
        if self._constants is None or self._constants[0] != (device, rows):  # unchanged ones are not copied again
            self._constants = (device, rows), torch.tensor(rows, dtype=torch.float64, device=device)
        lr, beta1, rest1, beta2, rest2, eps, decay, after, by_chance, place, seed = self._constants[1].unbind(1)
        if any(isinstance(w.group["lr"], Tensor) for w in work):
            rates = [w.group["lr"] for w in work]
            lr = torch.stack(
                [
                    r.to(device, torch.float64).reshape(()) if isinstance(r, Tensor) else lr[i]
                    for i, r in enumerate(rates)
                ]
            )
        t = torch.stack([w.state["step"] for w in work]).to(device, torch.float64) + 1
        correct1, correct2 = 1 - beta1**t, (1 - beta2**t).sqrt()
        size = torch.where(after > 0, lr * correct2, lr) / correct1
        root = torch.where(after > 0, 1.0, 1 / correct2)
        eps = torch.where(after > 0, eps * correct2, eps)
        hyper = torch.stack(
            [beta1, rest1, beta2, rest2, size, root, eps, 1 - lr * decay, factor.to(torch.float64).expand_as(lr)], dim=1
        )
        if not any(w.group["stochastic_rounding"] for w in work):
            return hyper, None
        mixed = t.long() * 0x9E3779B1 + place.long() * 0x85EBCA6B + seed.long() * 0xC2B2AE35
        return hyper, torch.where(by_chance > 0, mixed & 0xFFFFFFFF, -1)

    # States of bitsandbytes

    def _read(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Takes also what bitsandbytes' AdamW8bit saved."""
        state = {key: self._unwrapped(entry) for key, entry in state_dict["state"].items()}
        groups = [{k: v for k, v in group.items() if k not in _THEIR_OPTIONS} for group in state_dict["param_groups"]]
        return {**state_dict, "state": state, "param_groups": groups}

    def _unwrapped(self, entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        entry = {key: value for key, value in entry.items() if key != _WRAPPED} | entry.get(_WRAPPED, {})
        for name, signed in (("qmap1", True), ("qmap2", False)):
            qmap, table = entry.pop(name, None), dynamic_table(signed)
            if qmap is not None and not torch.allclose(qmap.float().cpu(), table, rtol=1e-6, atol=0):
                self._fail(ValueError, f"the loaded state has another code than the dynamic one of 8 bits ({name})")
        return entry

    def bitsandbytes_state_dict(self) -> dict[str, Any]:
        """The state in the form that bitsandbytes' AdamW8bit loads (step counts as integers, with its tables)."""
        result = self.state_dict()
        tables = {"qmap1": dynamic_table(True), "qmap2": dynamic_table(False)}
        state = {}
        for key, entry in result["state"].items():
            tensors = {name: value for name, value in entry.items() if name != "step"}
            if tensors["state1"].dtype == torch.uint8:
                tensors |= {name: table.to(tensors["state1"].device) for name, table in tables.items()}
            state[key] = {"step": int(entry["step"].item()), _WRAPPED: tensors}
        own = self.defaults.keys() - {"lr", "betas", "eps", "weight_decay"}
        groups = [{k: v for k, v in group.items() if k not in own} | _THEIR_OPTIONS for group in result["param_groups"]]
        return {"state": state, "param_groups": groups}  # with what learning-rate schedulers keep in the groups


def _row(w: Work) -> tuple[float, ...]:
    group = w.group
    (beta1, beta2), after = group["betas"], bool(group["bitsandbytes_cuda_order"])
    rests = (rest32(beta1), rest32(beta2)) if after else (1 - beta1, 1 - beta2)
    lr = 0.0 if isinstance(group["lr"], Tensor) else float(group["lr"])
    numbers = (lr, beta1, rests[0], beta2, rests[1], group["eps"], group["weight_decay"])
    return *numbers, float(after), float(group["stochastic_rounding"]), float(w.place), float(group["seed"])
