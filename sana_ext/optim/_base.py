"""The base of the 8-bit optimizers: gradients in, state tensors lazily made, skipped steps, bit-exact state dicts."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _shards as shards

DTYPES = (torch.float32, torch.bfloat16)
#: Shape and dtype of each state tensor, and whether its first axis is cut as that of a sharded parameter.
Spec = dict[str, tuple[tuple[int, ...], torch.dtype, bool]]


class Work(NamedTuple):
    """One parameter of one step, as plain tensors: of a DTensor this process's shard, everything else as it is."""

    param: Tensor  # contiguous
    grad: Tensor  # contiguous, float32 or bfloat16
    state: dict[str, Tensor]
    group: dict[str, Any]
    owner: Tensor  # the parameter itself, a DTensor maybe
    place: int  # its number among all parameters of the optimizer


class Optimizer8bit(torch.optim.Optimizer):
    """Base class. A subclass says what its state is (`_spec`) and how a list of parameters is updated (`_update`)."""

    _step_supports_amp_scaling = True  # GradScaler leaves grad_scale and found_inf as attributes for step()

    #: (what a subclass made it of, its numbers on the device); on the class, since copies of an optimizer start without it.
    _constants: tuple[Any, Tensor] | None = None

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._skipped: Tensor | None = None
        self._fused: set[int] = set()  # id of each parameter that fuse_backward steps
        super().__init__(params, defaults)

    # For subclasses

    def _quantises(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        """Tells whether a parameter of this shape is large enough for 8-bit state."""
        raise NotImplementedError

    def _spec(self, shape: tuple[int, ...], group: dict[str, Any], quantised: bool) -> Spec:
        """The state of a parameter, or of a shard, of this shape. "step" comes by itself. All state starts as zeros."""
        raise NotImplementedError

    def _update(self, work: list[Work], factor: Tensor, found_inf: Tensor) -> None:
        """Updates parameters and states in place; gradients count times `factor` (fp32, no dimensions).

        found_inf (fp32, [1]) is raised if a gradient is not finite; with any value but 0 nothing may be touched.
        state["step"] holds the number of steps done before this one and is not touched either.
        """
        raise NotImplementedError

    # Parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for i, p in enumerate(group["params"]):
                self._check_dtype(p, self._name(group, i))
        except Exception:
            self.param_groups.pop()  # refused as a whole
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuses hyperparameters that cannot be meant."""

    def _check_common(self, group: dict[str, Any]) -> None:
        """Those of both AdamW8bit and CAME8bit."""
        lr, decay = group["lr"], group["weight_decay"]
        one = lr.numel() == 1 if isinstance(lr, Tensor) else number(lr) and lr >= 0
        self._check(group, one, "lr", "a number >= 0")
        self._check(group, number(decay) and decay >= 0, "weight_decay", "a number >= 0")
        self._check(group, isinstance(group["min_8bit_size"], int), "min_8bit_size", "an integer")

    def _check(self, group: dict[str, Any], ok: bool, name: str, wanted: str) -> None:
        if not ok:
            self._fail(ValueError, f"{name} must be {wanted}, got {group[name]!r}")

    def _check_dtype(self, p: Tensor, name: str) -> None:
        if p.dtype not in DTYPES:
            self._fail(TypeError, f"{name} has dtype {_short(p.dtype)}; supported are float32 and bfloat16")

    def _fail(self, kind: type[Exception], message: str) -> None:
        raise kind(f"sana_ext.optim.{type(self).__name__}: {message}")

    @staticmethod
    def _name(group: dict[str, Any], i: int) -> str:
        return group["param_names"][i] if "param_names" in group else f"parameter {i} {list(group['params'][i].shape)}"

    # The step

    @property
    def skipped_steps(self) -> int:
        """The number of steps that were skipped because of NaN or Inf in a gradient; with fuse_backward, per parameter."""
        return 0 if self._skipped is None else int(self._skipped.item())

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | None = None,
        clip_factor: Tensor | float | None = None,
    ) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: recomputes the loss, as everywhere in torch.optim.
            grad_scale: gradients are divided by this number (GradScaler's protocol).
            found_inf: a tensor of one element; any value but 0 skips the step.
            clip_factor: gradients are multiplied by this number. For a limit on their global norm pass
                ``(limit / (torch.nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1)``; the gradients stay as
                they are and no pass over memory is spent on them.

        A gradient with NaN or Inf skips the whole step: no parameter and no state is touched, `skipped_steps` counts it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = getattr(self, "grad_scale", None) if grad_scale is None else grad_scale
        found_inf = getattr(self, "found_inf", None) if found_inf is None else found_inf
        members = [
            (g, i)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        ]
        self._step_on(members, grad_scale, found_inf, clip_factor)
        return loss

    def _step_on(
        self,
        members: list[tuple[int, int]],  # of param_groups, and of the group's parameters
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | None = None,
        clip_factor: Tensor | float | None = None,
    ) -> None:
        if not members:
            return
        device = self.param_groups[members[0][0]]["params"][members[0][1]].device
        first = [0, *accumulate(len(group["params"]) for group in self.param_groups)]
        work, copies = [], []
        for g, i in members:
            group = self.param_groups[g]
            p = group["params"][i]
            if p.device != device:
                self._fail(
                    ValueError, f"{self._name(group, i)} is on {p.device}, others on {device}; use an optimizer each"
                )
            grad = self._gradient(p, self._name(group, i))
            local = shards.local(p)
            dense = local.contiguous()
            if dense is not local:
                copies.append((local, dense))
            state = {k: shards.local(v) for k, v in self._state_of(p, group).items()}
            work.append(Work(dense, grad, state, group, p, first[g] + i))
        factor = torch.ones((), device=device)
        if grad_scale is not None:
            factor = factor / grad_scale
        if clip_factor is not None:
            factor = factor * clip_factor
        found = torch.zeros(1, device=device)
        if found_inf is not None:
            found.copy_(found_inf.reshape(1))
        self._update(work, factor.to(device, torch.float32).reshape(()), found)
        for local, dense in copies:
            local.copy_(dense)
        self._count(work, found)

    def _gradient(self, p: Tensor, name: str) -> Tensor:
        grad = p.grad
        assert grad is not None
        self._check_dtype(p, name)
        if grad.layout != torch.strided:
            self._fail(ValueError, f"the gradient of {name} is sparse; only dense gradients are supported")
        if grad.dtype not in DTYPES:
            self._fail(
                TypeError, f"the gradient of {name} has dtype {_short(grad.dtype)}; supported are float32 and bfloat16"
            )
        return shards.gradient(p, grad).contiguous()

    def _count(self, work: list[Work], found: Tensor) -> None:
        skip = (found != 0).to(torch.float32)
        if self._skipped is None:
            self._skipped = torch.zeros(1, dtype=torch.int64, device=found.device)
        self._skipped += skip.to(self._skipped)
        steps = [w.state["step"] for w in work]
        done = (1.0 - skip).reshape(())
        torch._foreach_add_(steps, done if steps[0].device == done.device else done.item())

    # State

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            on_device = group.get("capturable", False)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
            quantised = self._quantised(p, group)
            whole = self._spec(tuple(p.shape), group, quantised)
            part = self._spec(tuple(shards.local(p).shape), group, quantised)
            for key, (shape, dtype, cut) in part.items():
                zeros = torch.zeros(shape, dtype=dtype, device=shards.local(p).device)
                state[key] = shards.like(p, zeros, whole[key][0], cut)
        return state

    def _quantised(self, p: Tensor, group: dict[str, Any]) -> bool:
        quantised = self._quantises(tuple(p.shape), group)
        return quantised and shards.aligned(p, lambda shape: self._spec(shape, group, True))

    def state_bytes(self) -> int:
        """Bytes of this process's state once every parameter has been stepped; known before any is allocated."""
        total = 0
        for group in self.param_groups:
            for p in group["params"]:
                spec = self._spec(tuple(shards.local(p).shape), group, self._quantised(p, group))
                sizes = (math.prod(shape) * dtype.itemsize for shape, dtype, _ in spec.values())
                total += sum(sizes) + torch.float32.itemsize  # and the step's number
        return total

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, bit by bit: codes stay uint8 and scales fp32 whatever the parameters' dtype.

        The tensors are copied, so that the loaded dictionary does not change with the next step. An option that is not in
        the dictionary, since it is newer, stays as it is here.
        """
        state_dict = state_dict.copy()
        for before_loading in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before_loading(self, state_dict) or state_dict
        state_dict = self._read(state_dict)
        kept = {
            key: {k: _Kept(v) if isinstance(v, Tensor) else v for k, v in entry.items()}
            if isinstance(entry, dict)
            else entry
            for key, entry in state_dict["state"].items()
        }
        before = dict(self.state), self.param_groups
        with self._without_hooks():  # they are to see no state on its way
            super().load_state_dict({**state_dict, "state": kept})
        try:
            for group, own in zip(self.param_groups, before[1]):
                for name in self.defaults:
                    group.setdefault(name, own.get(name, self.defaults[name]))
                for i, p in enumerate(group["params"]):
                    if p in self.state:
                        self.state[p] = self._loaded(p, group, self._name(group, i), self.state[p])
        except Exception:
            self.state.clear()
            self.state.update(before[0])
            self.param_groups = before[1]
            raise
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _read(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict in this optimizer's form; a subclass that reads others' says how."""
        return state_dict

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        """Puts the hooks of load_state_dict aside."""
        names = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
        hooks = {name: getattr(self, name) for name in names}
        vars(self).update({name: OrderedDict() for name in names})
        try:
            yield
        finally:
            vars(self).update(hooks)

    def _loaded(self, p: Tensor, group: dict[str, Any], name: str, state: dict[str, Any]) -> dict[str, Tensor]:
        shape = tuple(shards.local(p).shape)
        plain = {k: v.tensor if isinstance(v, _Kept) else v for k, v in state.items()}
        quantised = any(isinstance(v, Tensor) and v.dtype == torch.uint8 for v in plain.values())
        expected = self._spec(shape, group, quantised)
        if problem := _difference(expected, plain):
            self._fail(ValueError, f"the loaded state of {name} does not fit: {problem}")
        if not quantised:
            coded = [k for k, (_, dtype, _) in self._spec(shape, group, True).items() if dtype == torch.uint8]
            for key in coded:
                if _holds_codes(shards.local(plain[key])):
                    self._fail(
                        ValueError,
                        f"the loaded state of {name} does not fit: {key} is float32 and holds 8-bit codes; here it is "
                        "kept in fp32 (min_8bit_size, or shards that end inside a block), where it was saved it was not",
                    )
        result = {}
        for key, (_, _, cut) in expected.items():
            value = plain[key].detach()
            whole = self._spec(tuple(p.shape), group, quantised)[key][0]
            result[key] = shards.like(
                p, shards.local(value).to(shards.local(p).device, copy=True).contiguous(), whole, cut
            )
        step = torch.as_tensor(plain["step"], dtype=torch.float32).detach().reshape(())
        result["step"] = step.to(p.device if group["capturable"] else "cpu", copy=True)
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_skipped", None)
        self.__dict__.setdefault("_fused", set())


class _Kept:
    """Carries a tensor through torch's load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _difference(expected: Spec, found: dict[str, Any]) -> str | None:
    missing = [key for key in (*expected, "step") if key not in found]
    if missing:
        return f"no {', '.join(missing)}"
    for key, (shape, dtype, _) in expected.items():
        value = found[key]
        got = f"{_short(value.dtype)} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or tuple(shards.local(value).shape) != shape or value.dtype != dtype:
            return f"{key} must be {_short(dtype)} {list(shape)}, got {got}"
    return None


def _holds_codes(value: Tensor) -> bool:
    """Tells whether fp32 values are codes: torch.distributed.checkpoint copies uint8 into fp32 tensors without a word."""
    if value.numel() < 64 or value.max() <= 1:
        return False
    return bool(((value >= 0) & (value <= 255) & (value == value.round())).all())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers(values: Any, count: int) -> bool:
    return isinstance(values, (tuple, list)) and len(values) == count and all(map(number, values))
