"""kernel_info and ``python -m sana_ext``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sana_ext
from sana_ext import _extension, _info, _selftest, _selftest_optimizers
from sana_ext.ops import __all__ as PUBLIC

EVERY = [*PUBLIC, *_info.OPTIMIZERS]
needs_cpu_library = pytest.mark.skipif(not _extension.libraries()["cpu"].loaded, reason="the CPU library is not built")


def test_every_public_op_has_a_line_per_device():
    table = sana_ext.kernel_info()
    assert {(info.op, info.device) for info in table} == {(op, device) for op in EVERY for device in ("cpu", "cuda")}
    assert all(info.why for info in table)
    text = str(table)
    assert all(op in text for op in EVERY)


@needs_cpu_library
def test_compiled_kernel_names_level_and_its_tests():
    info, cuda = sana_ext.kernel_info("norm_modulate")
    assert (info.forward, info.backward, info.path) == ("compiled", "compiled", "tuned")
    assert info.level == _extension.isa()
    assert info.tested == _info.TESTED[info.level]
    assert cuda.level is None


@needs_cpu_library
@pytest.mark.parametrize("op", _info.OPTIMIZERS)
def test_an_optimizers_step_has_no_gradient(op):
    info = sana_ext.kernel_info(op)[0]
    assert (info.forward, info.backward, info.path, info.level) == ("compiled", "none", "tuned", _extension.isa())


@needs_cpu_library
@pytest.mark.parametrize("op", ["linear_attention", "linear_attention_qkv"])
def test_linear_attention_path_depends_on_the_head_dimension(op):
    assert [sana_ext.kernel_info(op, D=d)[0].path for d in (32, 4, 64)] == ["tuned", "generic", "generic"]
    assert sana_ext.kernel_info(op)[0].path == "by D"


@needs_cpu_library
def test_linear_answers_where_16_bit_arithmetic_is_missing(monkeypatch):
    monkeypatch.setattr(_info, "UPCAST", set())
    assert sana_ext.kernel_info("linear")[0].path == "torch"
    monkeypatch.setattr(_info, "UPCAST", {torch.bfloat16})
    linear, on_cuda = sana_ext.kernel_info("linear")
    assert (linear.forward, linear.backward, on_cuda.forward) == ("compiled", "compiled", "torch")
    assert "weight is read once" in sana_ext.kernel_info("linear", M=32)[0].why
    assert "products by torch" in sana_ext.kernel_info("linear", M=33)[0].why
    assert "products in fp32" in sana_ext.kernel_info("cross_attention")[0].why


def test_unknown_op():
    with pytest.raises(ValueError, match="unknown op 'softmax'; there is cross_attention"):
        sana_ext.kernel_info("softmax")


def test_cuda_path_depends_on_the_size(monkeypatch):
    monkeypatch.setattr(_extension, "has_kernel", lambda op, device: device == "cuda" and op == "norm_modulate_forward")
    of = lambda **sizes: sana_ext.kernel_info("norm_modulate", **sizes)[1]  # noqa: E731
    assert (of().forward, of().backward, of().path) == ("compiled", "default", "by C")
    assert of(C=2304).path == "tuned"
    assert of(C=2312).path == of(C=2241).path == "generic"


def test_cuda_path_of_linear_attention(monkeypatch):
    monkeypatch.setattr(_extension, "has_kernel", lambda op, device: device == "cuda" and op.startswith("linear_att"))
    for op in ("linear_attention", "linear_attention_qkv"):
        of = lambda **sizes: sana_ext.kernel_info(op, **sizes)[1]  # noqa: B023, E731
        assert (of().forward, of().backward, of().path) == ("compiled", "compiled", "by D")
        assert (of(D=32).path, of(D=64).path) == ("tuned", "generic")


def test_composed_op_names_its_parts():
    assert "linear and dwconv_glu" in sana_ext.kernel_info("glumbconv")[0].why


@pytest.mark.parametrize("op", PUBLIC)
@pytest.mark.parametrize("dtype", _selftest.DTYPES, ids=str)
def test_self_test_passes(op, dtype):
    outcome = _selftest.check_op(op, "cpu", dtype)
    assert outcome.ok, outcome


@pytest.mark.parametrize("op", _info.OPTIMIZERS)
@pytest.mark.parametrize("dtype", _selftest.DTYPES[:2], ids=str)
def test_self_test_of_the_optimizers_passes_and_sees_a_wrong_result(op, dtype, monkeypatch):
    outcome = _selftest.check_op(op, "cpu", dtype)
    assert outcome.ok, outcome
    right = _selftest_optimizers.results

    def wrong(*arguments):
        ours, peer, truth = right(*arguments)
        return {name: t * 1.01 if name.startswith("parameter") else t for name, t in ours.items()}, peer, truth

    monkeypatch.setattr(_selftest_optimizers, "results", wrong)
    assert not _selftest.check_op(op, "cpu", dtype).ok


def test_self_test_sees_a_wrong_result(monkeypatch):
    right = sana_ext.norm_modulate
    monkeypatch.setattr(sana_ext, "norm_modulate", lambda x, shift, scale: right(x, shift, scale) * 1.0001)
    outcome = _selftest.check_op("norm_modulate", "cpu", torch.float32)
    assert not outcome.ok
    monkeypatch.setattr(sana_ext, "norm_modulate", lambda x, shift, scale: right(x, shift, scale) * float("nan"))
    assert not _selftest.check_op("norm_modulate", "cpu", torch.float32).ok
    monkeypatch.delattr(sana_ext, "norm_modulate")
    assert "AttributeError" in _selftest.check_op("norm_modulate", "cpu", torch.float32).worst


def command(*prefix, **env):
    root = str(Path(sana_ext.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, **env}
    return subprocess.run([sys.executable, *prefix], env=environment, capture_output=True, text=True)


def test_command_line():
    result = command("-m", "sana_ext")
    assert result.returncode == 0, result.stdout + result.stderr
    for text in (sana_ext.__version__, torch.__version__, "libsana_ext_cpu.so", "norm_modulate", "self-test:"):
        assert text in result.stdout
    assert f"self-test: {len(EVERY)} ops on " in result.stdout.splitlines()[-1]


def test_command_line_fails_when_an_op_is_wrong():
    code = (
        "import sys, sana_ext, sana_ext.__main__ as main\n"
        "right = sana_ext.gated_residual; sana_ext.gated_residual = lambda x, y, gate: right(x, y, gate) + 1\n"
        "sys.exit(main.main())"
    )
    result = command("-c", code)
    assert result.returncode == 1
    assert "self-test FAILED: gated_residual on cpu, float32: output 0: error" in result.stdout
    assert "3 of" in result.stdout.splitlines()[-1]
