"""Reference of the 8-bit block codes of optimizer states: what a byte means, and how a tensor is written in bytes.

A tensor is cut into blocks of ``block_size`` consecutive values (in memory order of the flat tensor; the last block may be shorter).
Each value becomes one byte, each block one or two fp32 scales. Three codes:

``dynamic``           signed; value = table[byte] * scale, scale = the block's largest magnitude. The table has 0, +1 and, in each of
                      seven decades (10^(d-7), 10^(d-6)], d = 0..6, 2^d evenly spaced values and their negatives
``dynamic-unsigned``  the same for values >= 0, with 2^(d+1) values a decade; a negative value is stored as 0, a positive one never
``linear``            value = byte * step + low, scales = (low, step), low = the block's minimum, step = (maximum - minimum) / 255;
                      where 0 lies between them step = (maximum - minimum) / 254, and low is the multiple of step nearest to
                      the minimum, so that 0 is one of the values

``dynamic`` with blocks of 256 is the code of bitsandbytes' 8-bit optimizers (arXiv:2110.02861); ``linear`` with blocks of 2048
consecutive values is that of the SANA-1.5 paper (arXiv:2501.18427). ``CODES`` names these two. Rules that hold for all:

- Rounding: dynamic takes the nearest value of ``value * (1 / scale)``, where a border is the fp32 mean of two neighbours and a value
  on a border takes the neighbour nearer to 0; linear rounds ``(value - low) * (1 / step)`` to the nearest integer, halves to even.
- A state is always finite: NaN is stored as 0, and a magnitude above 2^100, infinity too, as 2^100.
- A block without any magnitude of at least 2^-100 is stored as zeros with scale 0; under ``linear`` a block whose step is below 2^-100
  is stored as its minimum with step 0. So neither subnormal numbers nor 0/0 appear. ``dynamic-unsigned`` has a scale of at least
  2^-100 wherever a value is positive.
- ``dynamic-unsigned`` stores a positive value below the first border, 1.6e-7 of the scale, as the smallest positive one, 3.25e-7 of
  it. Second moments of 0 would leave steps of m / eps. bitsandbytes stores 0 there; the tables are the same.
- Under a scale of 0 every byte means 0: a state of zero bytes and zero scales is a tensor of zeros.
- ``linear`` reads a value below step / 1024, the rounding of the sum, as 0. A moment of 0 that came back as half a step would move
  what never had a gradient, since what CAME divides by is as small.
- A tensor of no elements has no blocks.
"""

from __future__ import annotations

from functools import cache

import torch

#: Name -> (block size, code). The names are arguments of the optimizers.
CODES = {"256-dynamic": (256, "dynamic"), "2048-linear": (2048, "linear")}
KINDS = ("dynamic", "dynamic-unsigned", "linear")
LARGEST, SMALLEST = 2.0**100, 2.0**-100
_DECADES = 7
_ZERO = 127  # the byte of 0 in the signed table
_ROUNDING = 2.0**-10  # of a linear step


@cache
def dynamic_magnitudes(signed: bool) -> torch.Tensor:
    """The magnitudes in rising order, fp32: 0, seven decades, 1. 129 of them signed, 256 unsigned.

    Every operation is rounded to fp32 by itself, so the table is the same on every machine. bitsandbytes computes its table by
    ``torch.linspace``, whose last bit depends on the processor's vectors; without vectors it is this table bit by bit.
    """
    f32 = torch.float32
    low, high = torch.tensor(0.1, dtype=f32), torch.tensor(1.0, dtype=f32)
    decades = []
    for d in range(_DECADES):
        n = 2**d if signed else 2 ** (d + 1)
        i = torch.arange(n + 1, dtype=f32)
        step = (high - low) / torch.tensor(n, dtype=f32)
        edges = torch.where(i < (n + 1) // 2, low + step * i, high - step * (n - i))
        decades.append((edges[:-1] + edges[1:]) * 0.5 * torch.tensor(10.0 ** (d - _DECADES + 1), dtype=f32))
    return torch.cat([torch.zeros(1), *decades, torch.ones(1)])


@cache
def dynamic_table(signed: bool) -> torch.Tensor:
    """Returns the meaning of each byte, [256] fp32 in rising order; bitsandbytes calls it qmap."""
    magnitudes = dynamic_magnitudes(signed)
    return torch.cat([-magnitudes[1:-1].flip(0), magnitudes]) if signed else magnitudes


@cache
def _borders(signed: bool) -> torch.Tensor:
    magnitudes = dynamic_magnitudes(signed)
    return (magnitudes[:-1] + magnitudes[1:]) * 0.5


def quantize(x: torch.Tensor, block_size: int, code: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes of x's shape, uint8; scales fp32: [blocks], or [blocks, 2] = (low, step) for ``linear``).

    x: any shape, any floating-point dtype; it is taken in fp32.
    """
    _check(block_size, code)
    flat = x.detach().to(torch.float32).flatten().nan_to_num(nan=0.0).clamp(-LARGEST, LARGEST)
    if flat.numel() == 0:
        scales = flat.new_zeros((0, 2) if code == "linear" else (0,))
        return torch.zeros_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format), scales
    blocks = -(-flat.numel() // block_size)
    # The tail is filled up with its last value, which changes neither minimum nor maximum.
    rows = torch.cat([flat, flat[-1:].expand(blocks * block_size - flat.numel())]).view(blocks, block_size)
    if code == "linear":
        low, high = rows.amin(1), rows.amax(1)
        crosses = (low < 0) & (high > 0)
        step = (high - low) / torch.where(crosses, flat.new_tensor(254.0), flat.new_tensor(255.0))
        step = torch.where(step < SMALLEST, 0.0, step)
        low = torch.where((low <= 0) & (high >= 0), -(torch.round(-low * _inverse(step)) * step), low)
        bytes_ = torch.round((rows - low[:, None]) * _inverse(step)[:, None]).clamp(0, 255)
        scales = torch.stack([low, step], dim=1)
    else:
        absmax = rows.abs().amax(1)
        signed = code == "dynamic"
        tiny = torch.where(absmax > 0, absmax.new_tensor(0.0 if signed else SMALLEST), 0.0)
        scales = torch.where(absmax < SMALLEST, tiny, absmax)
        bytes_ = encode_dynamic(rows * _inverse(scales)[:, None], signed)
        if not signed:
            bytes_ = torch.where(rows > 0, bytes_.clamp(min=1), bytes_)
    return bytes_.to(torch.uint8).flatten()[: flat.numel()].view(x.shape), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, block_size: int, code: str) -> torch.Tensor:
    """The fp32 values of the bytes, in their shape; scales as ``quantize`` returns them."""
    _check(block_size, code)
    flat = codes.flatten()
    shape = (-(-flat.numel() // block_size), *((2,) if code == "linear" else ()))
    if codes.dtype != torch.uint8 or scales.dtype != torch.float32 or tuple(scales.shape) != shape:
        raise ValueError(
            f"dequantize: expected uint8 codes and float32 scales of shape {list(shape)} for blocks of {block_size}, got "
            f"{codes.dtype} codes and {scales.dtype} scales of shape {list(scales.shape)}"
        )
    each = scales.repeat_interleave(block_size, dim=0)[: flat.numel()]
    if code == "linear":
        values = flat.to(torch.float32) * each[:, 1] + each[:, 0]
        values = torch.where(values.abs() < each[:, 1] * _ROUNDING, 0.0, values)
    else:
        values = dynamic_table(code == "dynamic").to(codes.device)[flat.long()] * each
    return values.view(codes.shape)


def encode_dynamic(x: torch.Tensor, signed: bool) -> torch.Tensor:
    """The bytes (as int64) of the table's values nearest to x, finite fp32 between -1 and 1, by search in the table.

    Those of positive values that are not to become 0 are ``quantize``'s.
    """
    borders = _borders(signed).to(x.device)
    if not signed:
        return torch.bucketize(x, borders)  # how many borders lie below x
    magnitude = torch.bucketize(x.abs(), borders)
    return torch.where(x < 0, _ZERO - magnitude.clamp(max=_ZERO), _ZERO + magnitude)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, 1.0 / scale, 0.0)


def _check(block_size: int, code: str) -> None:
    if code not in KINDS:
        raise ValueError(f"code must be one of {', '.join(KINDS)}, got {code!r}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
