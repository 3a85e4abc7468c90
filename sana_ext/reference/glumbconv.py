"""Reference of the glumbconv family: SANA's Mix-FFN and its middle: SiLU, depthwise 3x3 convolution and gate.

arXiv:2410.10629, section 2.2; diffusers ``GLUMBConv.forward``. With u = W_in x + b_in on the grid [height, width]:

    s = silu(u);  c = DW(s) + b_dw = [c_a | c_g];  h = c_a * silu(c_g)        dwconv_glu: u [2F] -> h [F] channels
    y = W_out h                                                               glumbconv: x -> y

DW is the depthwise 3x3 correlation with zeros around the image. Backward of dwconv_glu, with p = sigmoid:

    dc_a = dh * c_g * p(c_g);  dc_g = dh * c_a * p(c_g) * (1 + c_g * (1 - p(c_g)))
    dw[i, j] = sum over pixels of dc(y, x) * s(y + i - 1, x + j - 1);  db = sum dc
    ds = DW with the taps flipped (dc);  du = ds * p(u) * (1 + u * (1 - p(u)))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dwconv_glu(
    u: torch.Tensor,  # [B, N, 2F]
    weight: torch.Tensor,  # [2F, 1, 3, 3]
    bias: torch.Tensor | None,  # [2F]
    height: int,
    width: int,
) -> torch.Tensor:  # [B, N, F]
    a, g = _depthwise(F.silu(_image(u, height, width)), weight, bias).chunk(2, dim=1)
    return _tokens(a * F.silu(g))


def glumbconv(
    x: torch.Tensor,  # [B, N, C]
    w_in: torch.Tensor,  # [2F, C] or [2F, C, 1, 1]
    b_in: torch.Tensor | None,  # [2F]
    w_dw: torch.Tensor,  # [2F, 1, 3, 3]
    b_dw: torch.Tensor | None,  # [2F]
    w_out: torch.Tensor,  # [C, F] or [C, F, 1, 1]
    height: int,
    width: int,
) -> torch.Tensor:  # [B, N, C]
    u = F.conv2d(_image(x, height, width), w_in.reshape(*w_in.shape[:2], 1, 1), b_in)
    h = _image(dwconv_glu(_tokens(u), w_dw, b_dw, height, width), height, width)
    return _tokens(F.conv2d(h, w_out.reshape(*w_out.shape[:2], 1, 1)))


def dwconv_glu_backward(
    dout: torch.Tensor,  # [B, N, F]
    u: torch.Tensor,  # [B, N, 2F]
    weight: torch.Tensor,  # [2F, 1, 3, 3]
    bias: torch.Tensor | None,  # [2F]
    height: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(du, dweight, dbias) in the accumulator type; dbias is there with and without a bias."""
    acc = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, dh = _image(u.to(acc), height, width), _image(dout.to(acc), height, width)
    weight = weight.to(acc)
    p_u = torch.sigmoid(u)
    s = u * p_u
    c_a, c_g = _depthwise(s, weight, bias).chunk(2, dim=1)
    p = torch.sigmoid(c_g)
    dc = torch.cat([dh * c_g * p, dh * c_a * p * (1 + c_g * (1 - p))], dim=1)
    ds = _depthwise(dc, weight.flip(2, 3), None)
    padded = F.pad(s, (1, 1, 1, 1))
    taps = [(dc * padded[:, :, i : i + height, j : j + width]).sum((0, 2, 3)) for i in range(3) for j in range(3)]
    du = ds * p_u * (1 + u * (1 - p_u))
    return _tokens(du), torch.stack(taps, dim=1).reshape(weight.shape), dc.sum((0, 2, 3))


def _image(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, N, C] -> [B, C, height, width], a view with the channels last in memory."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def _tokens(image: torch.Tensor) -> torch.Tensor:
    return image.flatten(2).transpose(1, 2)


def _depthwise(s: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In the dtype of s, to which autocast would bring the weights."""
    bias = None if bias is None else bias.to(s.dtype)
    return F.conv2d(s, weight.to(s.dtype), bias, padding=1, groups=s.shape[1])
