"""Reference of linear_attention: ReLU linear attention with optional RMSNorm of queries and keys, also in packed form.

SANA (arXiv:2410.10629, section 2.2) and SANA-1.5 (which adds the norms); the rounding points in 16 bit are those of
diffusers' ``SanaLinearAttnProcessor2_0`` and ``RMSNorm``. Per image and head, n over tokens:

    qhat = relu(norm_q(q)),  khat = relu(norm_k(k));   norm(x) = weight x rstd,  rstd = 1 / sqrt(mean_C(x^2) + norm_eps)
    S = sum_n khat_n v_n^T,  z = sum_n khat_n           S [D, D] and z [D] are the state [D+1, D]
    out_n = S^T qhat_n / (qhat_n . z + eps)             a row with denominator 0 is 0

Backward, with g = dout. rstd_q leaves the ratio when eps becomes e = eps / rstd_q (e = eps without weight_q):

    u = relu(weight_q * q),  d = u . z + e,  t = S g,  a = g / d,  b = -(u . t) / d^2
    du = (t / d + b z) [u > 0];   dq = weight_q du + q (eps rstd_q / C) sum_heads b;   dweight_q = sum q du
    dS = sum_n u_n a_n^T;  dz = sum_n b_n u_n
    dkhat = (dS v + dz) [khat > 0];   dv = dS^T khat;   dweight_k = sum rstd_k k dkhat
    dk = rstd_k weight_k dkhat - k (rstd_k^3 / C) sum_C(weight_k dkhat k)
"""

from __future__ import annotations

import torch


def linear_attention(
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor,  # [B, N, H, D]
    v: torch.Tensor,  # [B, N, H, D]
    *,
    weight_q: torch.Tensor | None = None,  # [H * D]
    weight_k: torch.Tensor | None = None,  # [H * D]
    norm_eps: float = 1e-5,
    eps: float = 1e-15,
) -> torch.Tensor:  # [B, N, H, D]
    acc = _accumulator(q)
    qhat = _relu_norm(q, weight_q, norm_eps)
    state = _state(_relu_norm(k, weight_k, norm_eps), v.to(acc))
    num_den = torch.matmul(qhat.transpose(1, 2), _with_denominator(state)).transpose(1, 2)  # [B, N, H, D+1]
    den = num_den[..., -1:] + eps
    return (num_den[..., :-1] / torch.where(den == 0, 1, den)).to(q.dtype)


def linear_attention_qkv(
    qkv: torch.Tensor,  # [B, N, 3C]
    heads: int,
    *,
    weight_q: torch.Tensor | None = None,  # [C]
    weight_k: torch.Tensor | None = None,  # [C]
    norm_eps: float = 1e-5,
    eps: float = 1e-15,
) -> torch.Tensor:  # [B, N, C]
    q, k, v = unpack(qkv, heads)
    return linear_attention(q, k, v, weight_q=weight_q, weight_k=weight_k, norm_eps=norm_eps, eps=eps).flatten(2)


def unpack(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views [B, N, H, D] of the queries, keys and values in [B, N, 3C]."""
    q, k, v = qkv.unflatten(-1, (3, heads, qkv.shape[-1] // (3 * heads))).unbind(2)
    return q, k, v


def linear_attention_state(
    k: torch.Tensor,  # [B, N, H, D]
    v: torch.Tensor,  # [B, N, H, D]
    weight_k: torch.Tensor | None,  # [H * D]
    norm_eps: float,
) -> torch.Tensor:
    """The state [B, H, D+1, D] that the backward needs: S, z as its last row; unrounded, in the accumulator type."""
    acc = _accumulator(k)
    weight = None if weight_k is None else weight_k.to(acc)
    return _state(_relu_norm(k.to(acc), weight, norm_eps), v.to(acc))


def row_rstd(x: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + norm_eps) over all channels of each token, in the accumulator type: [B, N]."""
    return torch.rsqrt(x.to(_accumulator(x)).square().mean((-2, -1)) + norm_eps)


def linear_attention_backward(
    dout: torch.Tensor,  # [B, N, H, D]
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor,  # [B, N, H, D]
    v: torch.Tensor,  # [B, N, H, D]
    weight_q: torch.Tensor | None,  # [H * D]
    weight_k: torch.Tensor | None,  # [H * D]
    state: torch.Tensor,  # [B, H, D+1, D]
    rstd_q: torch.Tensor | None,  # [B, N]; None with weight_q means that eps is taken as 0
    rstd_k: torch.Tensor | None,  # [B, N]; None without weight_k
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dweight_q, dweight_k) in the accumulator type; without a weight its gradient means nothing."""
    acc, (H, D) = state.dtype, q.shape[2:]
    g, q, k, v = (x.to(acc) for x in (dout, q, k, v))
    wq, wk = (1.0 if w is None else w.to(acc).view(H, D) for w in (weight_q, weight_k))
    rk = 1.0 if rstd_k is None else rstd_k[..., None, None]
    S, z = state[:, :, :D], state[:, :, D]

    # With a norm what is not finite reaches the whole token through its scale, which may have left the formulas.
    lost = torch.zeros_like(q[..., :1, 0]) if weight_q is None else (q - q).sum((-2, -1))[..., None]
    u = torch.relu(wq * q)
    e = eps if weight_q is None else 0.0 if rstd_q is None else eps / rstd_q[..., None]
    d = torch.einsum("bnhi,bhi->bnh", u, z) + e + lost
    inverse = torch.where(d == 0, 0, 1 / d)[..., None]
    t = torch.einsum("bhij,bnhj->bnhi", S, g)
    a = g * inverse
    b = -(u * t).sum(-1, keepdim=True) * inverse * inverse
    du = torch.where(u <= 0, 0, t * inverse + b * z[:, None])  # NaN passes, as it does in torch
    dq = wq * du
    dq = dq + lost[..., None]
    if rstd_q is not None:
        dq = dq + q * (eps / (H * D) * rstd_q * b.sum((-2, -1)))[..., None, None]
    dS = torch.einsum("bnhi,bnhj->bhij", u, a)
    dz = (b * u).sum(1)

    khat = torch.relu(wk * k * rk)
    dkhat = torch.where(khat <= 0, 0, torch.einsum("bhij,bnhj->bnhi", dS, v) + dz[:, None])
    dv = torch.einsum("bhij,bnhi->bnhj", dS, khat)
    dk = wk * dkhat
    if rstd_k is not None:
        dk = rk * dk - k * (rk**3 / (H * D)) * (dk * k).sum((-2, -1), keepdim=True)
    return dq, dk, dv, (q * du).sum((0, 1)).flatten(), (rk * k * dkhat).sum((0, 1)).flatten()


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _relu_norm(x: torch.Tensor, weight: torch.Tensor | None, norm_eps: float) -> torch.Tensor:
    """relu(norm(x)) in the accumulator type: [B, N, H, D]."""
    acc = _accumulator(x)
    if weight is not None:
        x = x * row_rstd(x, norm_eps)[..., None, None]  # the accumulator type, by promotion
        if weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(weight.dtype)
        x = x * weight.view(x.shape[2:])
    return torch.relu(x).to(acc)


def _state(khat: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    S = torch.matmul(khat.permute(0, 2, 3, 1), v.transpose(1, 2))  # [B, H, D, D]
    return torch.cat([S, khat.sum(1)[:, :, None]], 2)


def _with_denominator(state: torch.Tensor) -> torch.Tensor:
    """[B, H, D+1, D] -> [B, H, D, D+1]: S with z as one more column: one product gives both sides of the ratio."""
    D = state.shape[-1]
    return torch.cat([state[:, :, :D], state[:, :, D, :, None]], -1)
