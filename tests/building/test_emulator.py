"""SANA_EXT_EMULATOR=1: the emulated CUDA kernels answer in place of the CPU's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sana_ext

PACKAGE = Path(sana_ext.__file__).parent
PROGRAM = """
import torch, sana_ext
from sana_ext import _extension, reference
x, shift, scale = torch.randn(2, 3, 16), torch.randn(2, 16), torch.randn(2, 16)
torch.testing.assert_close(sana_ext.norm_modulate(x, shift, scale), reference.norm_modulate(x, shift, scale))
u, weight = torch.randn(1, 6, 16), torch.randn(16, 1, 3, 3)
torch.testing.assert_close(sana_ext.dwconv_glu(u, weight, None, 2, 3), reference.dwconv_glu(u, weight, None, 2, 3))
print(_extension.libraries()["cpu"].reason)
print(sana_ext.kernel_info("dwconv_glu")[0].backward)
print(sana_ext.kernel_info("gated_residual")[0].backward)
"""


def run(program, **env):
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "SANA_EXT_EMULATOR": "1", **env}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)


def test_the_emulated_kernels_answer():
    result = run(PROGRAM)
    if not (PACKAGE / "libsana_ext_emulator.so").exists():
        assert "SANA_EXT_EMULATOR=1, but" in result.stderr
        assert result.stderr.strip().splitlines()[-1].endswith("is not built")
        pytest.skip("the emulator is not built: make check PARTS=emulator does")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:3] == ["the CUDA kernels, emulated", "compiled", "compiled"]
