"""linear_attention and its packed form: ReLU linear attention with the RMSNorms of queries and keys, in two passes."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from . import _checks as check
from ._library import accumulator_dtype, define, differentiable, without_autocast

STEM = "linear_attention"
_op = torch.ops.sana_ext
Tensor = torch.Tensor

#: Up to this eps the row scale of normalised queries is dropped: it cancels in the ratio, as if eps were 0.
NEGLIGIBLE_EPS = 1e-12


# Schema and default kernels. Fixed outputs: what is absent is a tensor of no elements.


def _statistics(q: Tensor, weight_q: Tensor | None, weight_k: Tensor | None, eps: float) -> tuple[bool, bool]:
    """Tells whether rstd_q and rstd_k exist. fp64 is there for exact derivatives, so it keeps even a negligible eps."""
    wants_q = weight_q is not None and (eps > NEGLIGIBLE_EPS or q.dtype == torch.float64)
    return wants_q, weight_k is not None


def _saved(q: Tensor, k: Tensor, v: Tensor, wq: Tensor | None, wk: Tensor | None, norm_eps: float, eps: float) -> Any:
    """(state, rstd_q, rstd_k), what the backward needs besides the inputs."""
    state = reference.linear_attention_state(k, v, wk, norm_eps)
    wants = _statistics(q, wq, wk, eps)
    return state, *(reference.row_rstd(x, norm_eps) if w else state.new_empty(0) for x, w in zip((q, k), wants))


def _saved_fake(q: Tensor, heads: int, dim: int, wq: Tensor | None, wk: Tensor | None, eps: float) -> Any:
    state = q.new_empty((q.shape[0], heads, dim + 1, dim), dtype=accumulator_dtype(q.dtype))
    wants = _statistics(q, wq, wk, eps)
    return state, *(state.new_empty(q.shape[:2] if w else 0) for w in wants)


def _gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, wq: Any, wk: Any, saved: Any, eps: float) -> Any:
    state, rstd_q, rstd_k = saved
    rstd_q, rstd_k = (r if r.numel() else None for r in (rstd_q, rstd_k))
    *rows, dwq, dwk = reference.linear_attention_backward(dout, q, k, v, wq, wk, state, rstd_q, rstd_k, eps)
    return rows, *(dw.to(w.dtype) if w is not None else state.new_empty(0) for dw, w in ((dwq, wq), (dwk, wk)))


def _weights_fake(state: Tensor, *weights: Tensor | None) -> Any:
    return tuple(state.new_empty(0) if w is None else w.new_empty(w.shape) for w in weights)


@without_autocast
def _forward(q: Tensor, k: Tensor, v: Tensor, wq: Tensor | None, wk: Tensor | None, norm_eps: float, eps: float) -> Any:
    out = reference.linear_attention(q, k, v, weight_q=wq, weight_k=wk, norm_eps=norm_eps, eps=eps)
    return out.contiguous(), *_saved(q, k, v, wq, wk, norm_eps, eps)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, wq: Tensor | None, wk: Tensor | None, norm_eps: float, eps: float
) -> Any:
    return q.new_empty(q.shape), *_saved_fake(q, q.shape[2], q.shape[3], wq, wk, eps)


@without_autocast
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wq: Tensor | None,
    wk: Tensor | None,
    state: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    eps: float,
) -> Any:
    rows, *dweights = _gradients(dout, q, k, v, wq, wk, (state, rstd_q, rstd_k), eps)
    return *(dx.to(x.dtype).contiguous() for dx, x in zip(rows, (q, k, v))), *dweights


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wq: Tensor | None,
    wk: Tensor | None,
    state: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    eps: float,
) -> Any:
    return *(x.new_empty(x.shape) for x in (q, k, v)), *_weights_fake(state, wq, wk)


@without_autocast
def _qkv_forward(qkv: Tensor, heads: int, wq: Tensor | None, wk: Tensor | None, norm_eps: float, eps: float) -> Any:
    q, k, v = reference.unpack(qkv, heads)
    out = reference.linear_attention(q, k, v, weight_q=wq, weight_k=wk, norm_eps=norm_eps, eps=eps)
    return out.flatten(2).contiguous(), *_saved(q, k, v, wq, wk, norm_eps, eps)


def _qkv_forward_fake(
    qkv: Tensor, heads: int, wq: Tensor | None, wk: Tensor | None, norm_eps: float, eps: float
) -> Any:
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return qkv.new_empty((B, N, C)), *_saved_fake(qkv, heads, C // heads, wq, wk, eps)


@without_autocast
def _qkv_backward(
    dout: Tensor,
    qkv: Tensor,
    wq: Tensor | None,
    wk: Tensor | None,
    state: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    eps: float,
) -> Any:
    q, k, v = reference.unpack(qkv, state.shape[1])
    dout = dout.unflatten(-1, q.shape[2:])
    rows, *dweights = _gradients(dout, q, k, v, wq, wk, (state, rstd_q, rstd_k), eps)
    return torch.stack(rows, 2).to(qkv.dtype).flatten(2), *dweights


def _qkv_backward_fake(
    dout: Tensor,
    qkv: Tensor,
    wq: Tensor | None,
    wk: Tensor | None,
    state: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    eps: float,
) -> Any:
    return qkv.new_empty(qkv.shape), *_weights_fake(state, wq, wk)


define(
    STEM,
    "linear_attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? weight_q, Tensor? weight_k, float norm_eps, float eps)"
    " -> (Tensor out, Tensor state, Tensor rstd_q, Tensor rstd_k)",
    _forward,
    _forward_fake,
)
define(
    STEM,
    "linear_attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? weight_q, Tensor? weight_k, Tensor state, Tensor rstd_q,"
    " Tensor rstd_k, float eps) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dweight_q, Tensor dweight_k)",
    _backward,
    _backward_fake,
)
define(
    STEM,
    "linear_attention_qkv_forward",
    "(Tensor qkv, int heads, Tensor? weight_q, Tensor? weight_k, float norm_eps, float eps)"
    " -> (Tensor out, Tensor state, Tensor rstd_q, Tensor rstd_k)",
    _qkv_forward,
    _qkv_forward_fake,
)
define(
    STEM,
    "linear_attention_qkv_backward",
    "(Tensor dout, Tensor qkv, Tensor? weight_q, Tensor? weight_k, Tensor state, Tensor rstd_q, Tensor rstd_k,"
    " float eps) -> (Tensor dqkv, Tensor dweight_q, Tensor dweight_k)",
    _qkv_backward,
    _qkv_backward_fake,
)


# Autograd


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _, eps = inputs
    ctx.eps = eps
    ctx.save_for_backward(*(t for t in tensors if not isinstance(t, int)), *output[1:])


def _autograd(ctx: Any, dout: Tensor, _state: Any, _rstd_q: Any, _rstd_k: Any) -> Any:
    saved = ctx.saved_tensors  # once: checkpointing recomputes them at the first access
    wq, wk = saved[3:5]
    dq, dk, dv, dwq, dwk = _op.linear_attention_backward(dout, *saved, ctx.eps)
    return dq, dk, dv, None if wq is None else dwq, None if wk is None else dwk, None, None


def _qkv_autograd(ctx: Any, dout: Tensor, _state: Any, _rstd_q: Any, _rstd_k: Any) -> Any:
    saved = ctx.saved_tensors
    wq, wk = saved[1:3]
    dqkv, dwq, dwk = _op.linear_attention_qkv_backward(dout, *saved, ctx.eps)
    return dqkv, None, None if wq is None else dwq, None if wk is None else dwk, None, None


differentiable("linear_attention_forward", _autograd, _context, "linear_attention_backward")
differentiable("linear_attention_qkv_forward", _qkv_autograd, _context, "linear_attention_qkv_backward")


# Public functions


def _weight(op: str, name: str, value: Tensor | None, channels: int) -> None:
    if value is None:
        return
    check.tensor(op, name, value, 1, "[H * D]")
    check.shape(op, name, value, (channels,), "[H * D]")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weight_q: Tensor | None = None,
    weight_k: Tensor | None = None,
    norm_eps: float = 1e-5,
    eps: float = 1e-15,
) -> Tensor:
    """ReLU linear attention: ``out_n = S^T qhat_n / (qhat_n . z + eps)`` per image and head.

    ``qhat = relu(norm(q))``, ``khat = relu(norm(k))``, ``S = sum_n khat_n v_n^T``, ``z = sum_n khat_n``; the norms are
    RMSNorms over all H * D channels of a token, and absent without their weight. Accumulates in fp32 (fp64 for fp64).

    Args:
        q, k, v: [B, N, H, D], float, of one or of several dtypes (float64 mixes with no other); any strides (a last
            dimension that is not dense is copied).
        weight_q, weight_k: [H * D], float, or None for no norm.
        norm_eps: added to the mean square of the norms (diffusers: 1e-5).
        eps: added to the denominator (diffusers: 1e-15, NVlabs: 1e-8). With weight_q, an eps of at most 1e-12 counts
            as 0 except in fp64: the scale of the query row then cancels and is not computed.

    Returns:
        [B, N, H, D], contiguous, dtype of q. A row whose denominator is 0 (no positive query, say) is exactly 0.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; the message names the argument.

    Source: arXiv:2410.10629, section 2.2; the norms are SANA-1.5's; diffusers ``SanaLinearAttnProcessor2_0``.
    """
    op = "linear_attention"
    check.tensor(op, "q", q, 4, "[B, N, H, D]")
    if 0 in q.shape[1:]:
        raise ValueError(f"sana_ext.{op}: q must have at least one token, head and channel, got {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        check.tensor(op, name, x, 4, "[B, N, H, D]")
        check.shape(op, name, x, tuple(q.shape), "[B, N, H, D] of q")
    channels = q.shape[2] * q.shape[3]
    _weight(op, "weight_q", weight_q, channels)
    _weight(op, "weight_k", weight_k, channels)
    check.together(op, q=q, k=k, v=v, weight_q=weight_q, weight_k=weight_k)
    check.plain_autograd(op, q=q, k=k, v=v, weight_q=weight_q, weight_k=weight_k)
    check.positive(op, "norm_eps", norm_eps)
    check.positive(op, "eps", eps)
    return _op.linear_attention_forward(q, k, v, weight_q, weight_k, norm_eps, eps)[0]


def linear_attention_qkv(
    qkv: Tensor,
    heads: int,
    *,
    weight_q: Tensor | None = None,
    weight_k: Tensor | None = None,
    norm_eps: float = 1e-5,
    eps: float = 1e-15,
) -> Tensor:
    """``linear_attention`` of one packed projection; its gradient is one packed tensor as well.

    Args:
        qkv: [B, N, 3C], float: the channels of all queries, then of all keys, then of all values.
        heads: number of heads H; C must be a multiple of it, D = C / H.
        weight_q, weight_k: [C], float, or None for no norm.
        norm_eps, eps: as in ``linear_attention``.

    Returns:
        [B, N, C], contiguous, dtype of qkv.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    op = "linear_attention_qkv"
    check.tensor(op, "qkv", qkv, 3, "[B, N, 3C]")
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"sana_ext.{op}: heads must be an int, got {type(heads).__name__}")
    if heads < 1:
        raise ValueError(f"sana_ext.{op}: heads must be at least 1, got {heads}")
    if 0 in qkv.shape[1:] or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"sana_ext.{op}: qkv must have at least one token and a multiple of 3 * heads = {3 * heads} channels,"
            f" got {list(qkv.shape)}"
        )
    _weight(op, "weight_q", weight_q, qkv.shape[2] // 3)
    _weight(op, "weight_k", weight_k, qkv.shape[2] // 3)
    check.together(op, qkv=qkv, weight_q=weight_q, weight_k=weight_k)
    check.plain_autograd(op, qkv=qkv, weight_q=weight_q, weight_k=weight_k)
    check.positive(op, "norm_eps", norm_eps)
    check.positive(op, "eps", eps)
    return _op.linear_attention_qkv_forward(qkv, heads, weight_q, weight_k, norm_eps, eps)[0]
