"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (arXiv:2409.11321), for short trainings such as healing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

SIDES = ("left", "right")


class SOAP(torch.optim.Optimizer):
    """Adam on gradients that are turned into the eigenbasis of their second moments, matrix by matrix.

    A parameter is a matrix [first axis, all others]. It is turned where both sides measure `smallest` to `largest`; otherwise
    (biases, depthwise convolutions, tables, the matrices of a large model) it gets plain Adam. Per turned matrix [m, n] the
    state is 2 (m m + n n + m n) numbers and a step costs about 8 (m + n) m n FLOPs: it pays where a step's gradient costs
    far more than that, and steps are few.

    Other than in the paper, the first step moves, as Adam's; its gradient makes the basis for the second, and counts in
    full in the means that are faded by `basis_beta` from then on. The moment is kept unturned, so that it stays right when
    the basis changes, and is turned in every step. A state that has no basis after its first step, AdamW's for example,
    never gets one.

    Args:
        lr, betas, eps, weight_decay: as AdamW's.
        basis_beta: of the exponential means of G G^T and G^T G.
        every: steps from one refresh of the basis (a power iteration and a QR) to the next; the first three all refresh it.

    Raises:
        ValueError: a number out of its range. TypeError: parameters that are not fp32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        basis_beta: float = 0.9,
        every: int = 5,
        smallest: int = 16,
        largest: int = 1024,
    ) -> None:
        adam = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        basis = {"basis_beta": basis_beta, "every": every, "smallest": smallest, "largest": largest}
        super().__init__(params, adam | basis)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except Exception:
            self.param_groups.pop()  # refused as a whole
            raise

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad.flatten(1) if p.dim() > 1 else p.grad.reshape(1, -1), group)
        return loss

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        turned = "gram_left" in state
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        moment, square = state["exp_avg"], gradient
        if turned:
            left, right = state["basis_left"], state["basis_right"]
            moment, square = left.T @ moment @ right, left.T @ gradient @ right
        state["exp_avg_sq"].mul_(beta2).addcmul_(square, square, value=1 - beta2)
        update = moment / (1 - beta1**step)
        update /= (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        if turned:
            update = left @ update @ right.T
            _refresh(state, gradient, group["basis_beta"], turn=step % group["every"] == 0 or step <= 3)
        elif step == 1 and all(group["smallest"] <= size <= group["largest"] for size in gradient.shape):
            _begin(state, gradient, 1 - beta2)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"])


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"SOAP: {name} must be at least 0, got {group[name]}")
    if not group["eps"] > 0:
        raise ValueError(f"SOAP: eps must be above 0, got {group['eps']}")
    if len(group["betas"]) != 2 or not all(0 <= b < 1 for b in group["betas"]):
        raise ValueError(f"SOAP: betas must be two numbers in [0, 1), got {group['betas']}")
    if not 0 <= group["basis_beta"] < 1:
        raise ValueError(f"SOAP: basis_beta must be in [0, 1), got {group['basis_beta']}")
    if not (group["every"] >= 1 and 1 <= group["smallest"] <= group["largest"]):
        raise ValueError("SOAP: every must be at least 1, and smallest from 1 to largest")
    if other := {p.dtype for p in group["params"]} - {torch.float32}:
        raise TypeError(f"SOAP trains fp32 parameters, got {', '.join(map(str, other))}")


def _grams(gradient: Tensor) -> tuple[Tensor, Tensor]:
    return gradient @ gradient.T, gradient.T @ gradient


def _begin(state: dict[str, Tensor], gradient: Tensor, weight: float) -> None:
    """The first basis, for the next step, and Adam's squares in it; in this step most of them would be rounding errors."""
    for side, gram in zip(SIDES, _grams(gradient)):
        finite = gram.nan_to_num(0, 0, 0)  # eigh raises otherwise; like Adam, this lets NaN through to the weights
        state[f"gram_{side}"], state[f"basis_{side}"] = gram, _eigenvectors(finite)
    state["exp_avg_sq"] = (state["basis_left"].T @ gradient @ state["basis_right"]).square_().mul_(weight)


def _eigenvectors(gram: Tensor) -> Tensor:
    """The eigenvectors, row by row in memory: a state that comes back from a file is, and products may round by layout.

    fp32 may fail on the many equal eigenvalues that a gradient of low rank has: with an error, or with NaN (MKL on AMD).
    """
    for values in (gram, gram.double()):
        try:
            found = torch.linalg.eigh(values).eigenvectors
        except torch.linalg.LinAlgError:
            continue
        if found.isfinite().all():
            return found.to(gram.dtype).contiguous()
    return torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device
    )  # a basis, if not the best; power iterations turn it


def _refresh(state: dict[str, Tensor], gradient: Tensor, beta: float, turn: bool) -> None:
    """Takes the gradient into the means; with `turn` one power iteration moves each basis towards their eigenvectors.

    Eigenvectors are sorted by falling eigenvalue first, and Adam's squares with them: each direction keeps its own.
    """
    for axis, (side, gram) in enumerate(zip(SIDES, _grams(gradient))):
        mean = state[f"gram_{side}"].lerp_(gram, 1 - beta)
        if turn:
            basis = state[f"basis_{side}"]
            order = (basis * (mean @ basis)).sum(0).argsort(descending=True, stable=True)
            state["exp_avg_sq"] = state["exp_avg_sq"].index_select(axis, order)
            state[f"basis_{side}"] = torch.linalg.qr(mean @ basis[:, order]).Q.contiguous()
