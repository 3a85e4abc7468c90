"""The fused forward of diffusers' SanaTransformerBlock; `patch` gives a block a class that inherits from FusedBlock.

Equations: SANA, arXiv:2410.10629, section 2.2, in the order of diffusers' block:

    (shift1, scale1, gate1, shift2, scale2, gate2) = table + t6
    x = x + gate1 * attn1(LN(x) * (1 + scale1) + shift1)          ReLU linear attention
    x = x + attn2(x, text)                                        softmax attention, no norm and no gate
    x = x + gate2 * ff(LN(x) * (1 + scale2) + shift2)             Mix-FFN

Weights are read from diffusers' own modules at every call: no copy exists that could go stale. A part that a guard
refuses calls its stock module, with the inputs it would have seen in diffusers.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import nn

from .._plain import Operand, child, leaf_reason, operand_of, parameter
from ..ops.cross_attention import cross_attention
from ..ops.glumbconv import glumbconv
from ..ops.linear import linear
from ..ops.linear_attention import linear_attention
from ..ops.norm_modulate import gated_residual, norm_modulate, residual_norm_modulate
from . import guards, projections, text_cache
from .reversible import Reversible

EPS = 1e-15  # of diffusers' SanaLinearAttnProcessor2_0
FP16_LIMIT = 65504
_logger = logging.getLogger("sana_ext")
_said: set[str] = set()


class FusedBlock(Reversible):
    """Mixed into a block's class."""

    _sana_ext_names: Any  # the module that defines the stock block, for the classes it uses

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, N, C]
        attention_mask: torch.Tensor | None = None,  # without effect, as in diffusers
        encoder_hidden_states: torch.Tensor | None = None,  # [B, M, C]
        encoder_attention_mask: torch.Tensor | None = None,  # [B, 1, M], added to the scores
        timestep: torch.Tensor | None = None,  # [B, 6 * C]
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:  # [B, N, C]
        arguments = (
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            height,
            width,
        )
        if not hasattr(type(self), "_sana_ext_names"):  # unpatched while a hook still holds this function
            return type(self).forward(self, *arguments)
        x = hidden_states
        device = x.device.type
        parts = guards.compiled_parts.get((device, torch.is_grad_enabled()), ())
        operand = operand_of(x) if parts else Operand(x.device, x.dtype, None)
        reason = guards.block_reason(self, x, operand, parts)
        if reason or timestep is None:
            if reason:
                _say("a block", reason)
            return super().forward(*arguments)  # type: ignore[misc]
        plan = guards.plan(self, self._sana_ext_names, operand, parts, x.shape[-1])
        for name, reason in zip(plan._fields, plan):
            if reason:
                _say(name, reason)
        return fused_forward(
            self, plan, operand, x, encoder_hidden_states, encoder_attention_mask, timestep, height, width
        )


def _say(what: str, reason: str) -> None:
    """Logs a run-time fallback once."""
    if torch.compiler.is_compiling():
        return
    text = f"sana_ext: {what} runs diffusers' own code: {reason}"
    if text not in _said:
        _said.add(text)
        _logger.warning(text)


def fused_forward(
    block: Any,
    plan: guards.Plan,
    operand: Operand,
    x: torch.Tensor,
    text: torch.Tensor | None,
    mask: torch.Tensor | None,
    timestep: torch.Tensor,
    height: Any,
    width: Any,
) -> torch.Tensor:
    low = operand.autocast
    norm1, attn1, attn2, norm2, ff = (child(block, name) for name in plan._fields)
    table = parameter(block, "scale_shift_table")
    if table is None:  # parametrised: once, as in diffusers, since a parametrisation may have a state
        table = block.scale_shift_table
    modulation = table[None] + timestep.reshape(x.shape[0], 6, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)  # [B, C] each
    x = x.contiguous()  # the patch embedding's is channel-major

    # Self-attention. The operand takes autocast's dtype at once, one rounding, unless stock code wants to see it.
    plain = low and not plan.attn1 and _plain(attn1, operand)
    n = _norm(norm1, plan.norm1, x, shift1, scale1, low if low and plain else x.dtype)
    y = attn1(n) if plan.attn1 else _self_attention(attn1, n, operand)
    x = gated_residual(_promoted(x, y, gate1), y, gate1)

    # Cross-attention, then the second norm: one pass where both are fused
    if text is not None and _serves(text, mask, x) and not plan.attn2:
        y = _cross_attention(block, x, text, mask, operand)
    else:
        y = attn2(x, encoder_hidden_states=text, attention_mask=mask)
    x = _promoted(x, y)
    out = low if low and not plan.ff else torch.promote_types(x.dtype, modulation.dtype)
    if plan.norm2:
        x = x + y
        n = _norm(norm2, plan.norm2, x, shift2, scale2, out)
    else:
        x, n = residual_norm_modulate(x, y, shift2, scale2, eps=norm2.eps, out_dtype=out)

    # Mix-FFN
    if plan.ff:
        y = ff(n.unflatten(1, (height, width)).permute(0, 3, 1, 2)).flatten(2, 3).permute(0, 2, 1)
    else:
        inner, depth, point = child(ff, "conv_inverted"), child(ff, "conv_depth"), child(ff, "conv_point")
        w_in, b_in = parameter(inner, "weight"), parameter(inner, "bias")
        w_dw, b_dw = parameter(depth, "weight"), parameter(depth, "bias")
        y = glumbconv(n, w_in, b_in, w_dw, b_dw, parameter(point, "weight"), height=height, width=width)
    return gated_residual(_promoted(x, y, gate2), y, gate2)


def _norm(
    norm: Any, stock: str | None, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, out: torch.dtype
) -> torch.Tensor:
    if stock:
        return (norm(x) * (1 + scale[:, None]) + shift[:, None]).to(out)
    return norm_modulate(x, shift, scale, eps=norm.eps, out_dtype=out)


def _promoted(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """The residual stream in the dtype of torch's own addition: under autocast fp32 from the first gate on."""
    dtype = x.dtype
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return x if dtype == x.dtype else x.to(dtype)


def _plain(attn: Any, operand: Operand) -> bool:
    layers = [child(attn, name) for name in ("to_q", "to_k", "to_v")]
    layers.append(child(child(attn, "to_out"), "0"))
    return not any(leaf_reason(layer, nn.Linear, operand) for layer in layers)


def _projections(attn: Any, n: torch.Tensor, operand: Operand) -> tuple[torch.Tensor, ...]:
    """q, k and v [B, N, H * D], by one product where their weights lie together."""
    names = ("to_q", "to_k", "to_v")
    if not (torch.is_grad_enabled() or operand.autocast or torch.compiler.is_compiling()):
        layers = [child(attn, name) for name in names]
        if not any(leaf_reason(layer, nn.Linear, operand) for layer in layers):
            together = projections.packed(layers)
            if together is not None:
                return linear(n, *together).chunk(3, -1)
    return tuple(_linear(attn, name, n, operand) for name in names)


def _linear(attn: Any, name: str, x: torch.Tensor, operand: Operand) -> torch.Tensor:
    """A stock layer's product; any other layer (LoRA, quantised, offloaded, hooked) is called as the module it is."""
    layer = child(attn, name)
    if leaf_reason(layer, nn.Linear, operand):
        return layer(x)
    return linear(x, parameter(layer, "weight"), parameter(layer, "bias"))


def _output(attn: Any, x: torch.Tensor, operand: Operand) -> torch.Tensor:
    to_out = child(attn, "to_out")
    return child(to_out, "1")(_linear(to_out, "0", x, operand))  # the projection, dropout


def _self_attention(attn: Any, n: torch.Tensor, operand: Operand) -> torch.Tensor:
    q, k, v = _projections(attn, n, operand)
    norm_q, norm_k = child(attn, "norm_q"), child(attn, "norm_k")
    norm = norm_k if norm_q is None else norm_q
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))
    out = linear_attention(
        q,
        k,
        v,
        weight_q=None if norm_q is None else parameter(norm_q, "weight"),
        weight_k=None if norm_k is None else parameter(norm_k, "weight"),
        norm_eps=1e-5 if norm is None else norm.eps,
        eps=EPS,
    )
    y = _output(attn, out.flatten(2).to(n.dtype), operand)  # a foreign to_q may have changed it
    return y.clip(-FP16_LIMIT, FP16_LIMIT) if operand.dtype == torch.float16 else y


def _serves(text: torch.Tensor, mask: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Each image has text, and the mask is one additive row each; other forms have diffusers' own handling."""
    if text.dim() != 3 or text.shape[0] != x.shape[0]:
        return False
    if mask is None:
        return text.shape[1] > 0
    return mask.is_floating_point() and not mask.requires_grad and mask.shape == (text.shape[0], 1, text.shape[1])


def _cross_attention(
    block: Any, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None, operand: Operand
) -> torch.Tensor:
    attn = child(block, "attn2")
    cache: text_cache.TextCache | None = block.__dict__.get(text_cache.ATTRIBUTE)

    norm_q, norm_k = child(attn, "norm_q"), child(attn, "norm_k")

    def keys_and_values() -> text_cache.Pair:
        k, v = (_linear(attn, name, text, operand) for name in ("to_k", "to_v"))
        return (k if norm_k is None else norm_k(k)), v

    # The layers are called in the order of diffusers' processor.
    q = _linear(attn, "to_q", x, operand)
    kept = None
    if cache is not None and not torch.compiler.is_compiling():
        kept = cache.keys_and_values(block, keys_and_values, operand)
    if kept is None:
        k, v = (_linear(attn, name, text, operand) for name in ("to_k", "to_v"))
    if norm_q is not None:
        q = norm_q(q)
    if kept is not None:
        k, v = kept
    elif norm_k is not None:
        k = norm_k(k)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))  # [B, N | M, H, D]
    y = _output(attn, cross_attention(q, k, v, mask).flatten(2).to(q.dtype), operand)
    return y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor


def names_of(block_class: type) -> Any:
    """The module that defines diffusers' stock block, with the classes that its code uses."""
    return sys.modules[block_class.__module__]
