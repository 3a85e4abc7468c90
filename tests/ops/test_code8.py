"""The 8-bit block codes: sana_ext/reference/code8.py. The C++ of the same is tested by csrc/tests/test_code8.cpp."""

import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from sana_ext import reference
from sana_ext.reference import code8

KINDS = code8.KINDS
UNSIGNED = "dynamic-unsigned"


def values(n: int, seed: int = 0, unsigned: bool = False) -> torch.Tensor:
    """Magnitudes over ten decades, as optimizer states have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 10 - 8)
    return x.abs() if unsigned else x


def checksum(table: torch.Tensor) -> int:
    value = 2166136261
    for byte in table.numpy().tobytes():
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value


def test_tables_are_those_of_the_kernels():
    """csrc/tests/test_code8.cpp has the same two numbers."""
    assert checksum(code8.dynamic_magnitudes(True)) == 0xB707EBE0
    assert checksum(code8.dynamic_magnitudes(False)) == 0xA1F0A4CF


@pytest.mark.parametrize("signed", [True, False])
def test_table_is_evenly_spaced_in_each_decade(signed):
    """Against exact fractions: the midpoints of n equal parts of (0.1, 1] times a power of ten."""
    exact = [Fraction(0)]
    for d in range(7):
        n = 2**d if signed else 2 ** (d + 1)
        exact += [(Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * j + 1, 2 * n)) / 10 ** (6 - d) for j in range(n)]
    exact.append(Fraction(1))
    exact = [-e for e in exact[-2:0:-1]] + exact if signed else exact
    table = reference.dynamic_table(signed)
    assert table.dtype == torch.float32
    assert len(table) == len(exact) == 256
    truth = torch.tensor([float(e) for e in exact], dtype=torch.float64)
    assert ((table - truth).abs() <= 2e-7 * truth.abs()).all()
    assert (table.diff() > 0).all()


def test_tables_are_those_of_bitsandbytes():
    """To the last bits, which depend on the vector length that torch.linspace uses; bit by bit where it uses none."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes.functional import create_dynamic_map

    tables = [reference.dynamic_table(signed) for signed in (True, False)]
    for table, signed in zip(tables, (True, False)):
        assert ((create_dynamic_map(signed=signed) - table).abs() <= 2.4e-7 * table.abs()).all()
    program = (
        "import torch, bitsandbytes.functional as f\n"
        "both = torch.cat([f.create_dynamic_map(signed=True), f.create_dynamic_map(signed=False)])\n"
        "print(*both.view(torch.int32).tolist())"
    )
    without_vectors = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=without_vectors, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(bits) for bits in torch.cat(tables).view(torch.int32).tolist()]


@pytest.mark.parametrize("block_size", [64, 256, 1000])
@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_takes_the_nearest_value(signed, block_size):
    """Against a search of all 256 distances in fp64."""
    kind = "dynamic" if signed else UNSIGNED
    x = values(3001, unsigned=not signed)
    codes, scales = reference.quantize(x, block_size, kind)
    assert codes.dtype == torch.uint8
    assert scales.dtype == torch.float32
    assert codes.shape == x.shape
    assert scales.shape == (-(-3001 // block_size),)
    assert torch.equal(scales, torch.stack([block.abs().max() for block in x.split(block_size)]))
    table = reference.dynamic_table(signed).double()
    scaled = x.double() / scales.repeat_interleave(block_size)[:3001].double()
    # A positive second moment may not take the value 0.
    distances = (scaled[:, None] - table).abs()
    if not signed:
        distances[:, 0] = torch.where(x > 0, torch.inf, distances[:, 0])
    best = distances.min(1).values
    taken = (scaled - table[codes.long()]).abs()
    assert (taken <= best + 1e-7 * scaled.abs()).all()
    back = reference.dequantize(codes, scales, block_size, kind)
    assert torch.equal(back, table.float()[codes.long()] * scales.repeat_interleave(block_size)[:3001])


@pytest.mark.parametrize("signed", [True, False])
def test_a_tie_goes_to_the_neighbour_nearer_to_zero(signed):
    table = reference.dynamic_table(signed)
    borders = (table[:-1] + table[1:]) * 0.5
    below = torch.arange(255)
    codes = code8.encode_dynamic(borders, signed)
    assert torch.equal(codes, torch.where(borders > 0, below, below + 1))
    infinity = torch.tensor(torch.inf)
    assert torch.equal(code8.encode_dynamic(torch.nextafter(borders, infinity), signed), below + 1)
    assert torch.equal(code8.encode_dynamic(torch.nextafter(borders, -infinity), signed), below)


def test_every_byte_means_itself():
    """Bytes of a block with a full-scale value come back as they were."""
    for kind, signed in (("dynamic", True), (UNSIGNED, False)):
        codes = torch.cat([torch.arange(256), torch.tensor([255])]).to(torch.uint8)
        for scale in (1.0, 3e-7, 5e20):
            x = reference.dequantize(codes, torch.full((1,), scale), 257, kind)
            again, scales = reference.quantize(x, 257, kind)
            assert torch.equal(again, codes), (kind, scale, signed)
            assert scales.tolist() == [torch.tensor(scale).item()]


def test_linear_is_a_rounded_line():
    x = values(5000)
    codes, scales = reference.quantize(x, 2048, "linear")
    assert scales.shape == (3, 2)
    assert codes.dtype == torch.uint8
    for i, block in enumerate(x.split(2048)):
        low, step = scales[i]
        assert step == (block.max() - block.min()) / 254  # 0 is one of the values
        assert (low - block.min()).abs() <= step / 2
        assert (codes.split(2048)[i] == torch.round((block - low) / step).clamp(0, 255)).float().mean() > 0.9999
    positive = x.abs() + 1e-3
    _, one_sided = reference.quantize(positive, 2048, "linear")
    for i, block in enumerate(positive.split(2048)):
        assert one_sided[i].tolist() == [block.min(), (block.max() - block.min()) / 255]
    back = reference.dequantize(codes, scales, 2048, "linear")
    assert ((back - x).abs() <= 0.5001 * scales[:, 1].repeat_interleave(2048)[:5000] + 1e-6 * x.abs()).all()
    halves, _ = reference.quantize(torch.tensor([0.0, 0.5, 1.5, 2.5, 255.0]), 5, "linear")
    assert halves.tolist() == [0, 0, 2, 2, 255]


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_block_may_be_short(kind):
    """Blocks are independent: a tensor in pieces of whole blocks gives the same bytes."""
    x = values(700, unsigned=kind == UNSIGNED)
    codes, scales = reference.quantize(x, 256, kind)
    for i, piece in enumerate(x.split(256)):
        piece_codes, piece_scales = reference.quantize(piece, 256, kind)
        assert torch.equal(codes.split(256)[i], piece_codes)
        assert torch.equal(scales[i : i + 1], piece_scales)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_constants_and_nothing(kind):
    codes, scales = reference.quantize(torch.zeros(10, 30), 256, kind)
    assert codes.shape == (10, 30)
    assert torch.equal(scales, torch.zeros_like(scales))
    assert torch.equal(reference.dequantize(codes, scales, 256, kind), torch.zeros(10, 30))
    fresh = reference.dequantize(torch.zeros(300, dtype=torch.uint8), torch.zeros_like(scales), 256, kind)
    assert torch.equal(fresh, torch.zeros(300))
    for constant in (1.5, 1e-20, 3e25):
        x = torch.full((300,), constant)
        assert torch.equal(reference.dequantize(*reference.quantize(x, 256, kind), 256, kind), x)
    codes, scales = reference.quantize(torch.zeros(0, 5), 256, kind)
    assert codes.shape == (0, 5)
    assert codes.dtype == torch.uint8
    assert scales.shape[0] == 0
    assert reference.dequantize(codes, scales, 256, kind).shape == (0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_always_finite(kind):
    x = torch.tensor([torch.nan, torch.inf, 2.0, 3e38, 1e-40])
    if kind != UNSIGNED:
        x = torch.cat([x, torch.tensor([-torch.inf])])
    codes, scales = reference.quantize(x, 256, kind)
    back = reference.dequantize(codes, scales, 256, kind)
    assert torch.isfinite(scales).all()
    assert torch.isfinite(back).all()
    largest = torch.tensor(2.0**100)
    assert torch.allclose(back[[1, 3]], largest.expand(2), rtol=1e-6)
    tolerance = 2.0**100 / 200 if kind == "linear" else 0.0
    tiny = reference.dynamic_table(False)[1] * largest if kind == UNSIGNED else 0.0
    assert (back[[0, 2, 4]].abs() - torch.tensor([0.0, tiny, tiny])).max() <= tolerance
    # A NaN alone is a zero and costs its neighbours nothing.
    alone = torch.tensor([torch.nan, 0.25, 1.0])
    back = reference.dequantize(*reference.quantize(alone, 256, kind), 256, kind)
    assert back[0] == 0
    assert back[2] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_blocks_are_zeros(kind):
    """No subnormal scale, no 1 / 0."""
    for magnitude in (2.0**-101, 1e-38, 1e-44):
        x = torch.tensor([0.0, magnitude / 2, magnitude])
        codes, scales = reference.quantize(x, 256, kind)
        if kind == UNSIGNED:  # positive values stay positive
            assert scales == 2.0**-100
            assert torch.equal(codes > 0, x > 0)
            continue
        assert (scales == 0).all()
        assert (reference.dequantize(codes, scales, 256, kind) == 0).all()
    x = torch.tensor([0.0, 2.0**-92])
    assert reference.dequantize(*reference.quantize(x, 256, kind), 256, kind)[1] == 2.0**-92


def test_negative_second_moments_are_zeros():
    codes, scales = reference.quantize(torch.tensor([-1.0, 0.5, 1.0]), 256, UNSIGNED)
    assert codes[0] == 0
    assert scales.tolist() == [1.0]


def test_other_dtypes_are_taken_in_fp32():
    x = values(512).bfloat16()
    for given in (x, x.double()):
        codes, scales = reference.quantize(given, 256, "dynamic")
        expected, expected_scales = reference.quantize(x.float(), 256, "dynamic")
        assert torch.equal(codes, expected)
        assert torch.equal(scales, expected_scales)
    transposed = values(512).view(16, 32).t()
    assert torch.equal(
        reference.quantize(transposed, 256, "dynamic")[0],
        reference.quantize(transposed.contiguous(), 256, "dynamic")[0],
    )


def test_bad_input_is_one_clear_line():
    x = torch.ones(300)
    codes, scales = reference.quantize(x, 256, "dynamic")
    with pytest.raises(ValueError, match="code must be one of dynamic, dynamic-unsigned, linear, got 'nf4'"):
        reference.quantize(x, 256, "nf4")
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        reference.quantize(x, 0, "dynamic")
    with pytest.raises(ValueError, match=r"scales of shape \[2\] for blocks of 256.*shape \[1\]"):
        reference.dequantize(codes, scales[:1], 256, "dynamic")
    with pytest.raises(ValueError, match="expected uint8 codes"):
        reference.dequantize(codes.int(), scales, 256, "dynamic")
