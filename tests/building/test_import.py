"""What `import sana_ext` loads, which kernel answers, and what a missing or broken library does."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sana_ext
from sana_ext import _extension
from sana_ext.ops._library import OPS

PACKAGE = Path(sana_ext.__file__).parent
needs_cpu_library = pytest.mark.skipif(not _extension.libraries()["cpu"].loaded, reason="the CPU library is not built")


def python(code, folder=None, **env):
    """Runs code in a new interpreter that sees the package of `folder` (default: the one under test)."""
    folder = folder or PACKAGE.parent
    environment = {**os.environ, "PYTHONPATH": str(folder), **env}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def copy_package(folder, *patterns):
    """The package's Python files and those compiled files that match."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, folder / "sana_ext", ignore=ignore)
    for pattern in patterns:
        for file in PACKAGE.glob(pattern):
            shutil.copy(file, folder / "sana_ext")
    return folder


def test_import_loads_torch_and_nothing_heavier():
    code = (
        "import json, sys, torch; before = set(sys.modules); import sana_ext; new = set(sys.modules) - before\n"
        "print(json.dumps([sorted(new), torch.cuda.is_initialized()]))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    new, cuda = json.loads(result.stdout)
    own = {name for name in new if name.split(".")[0] == "sana_ext"}
    assert own
    heavy = {"diffusers", "transformers", "accelerate", "peft", "safetensors", "PIL", "scipy", "torchvision", "triton"}
    assert not heavy & {name.split(".")[0] for name in new}
    assert not [name for name in new if name.startswith(("torch._inductor", "torch._dynamo", "torch._functorch"))]
    assert not cuda


def test_import_time_is_torchs():
    """A guard against work at import: the package's own modules are a fraction of torch's number."""
    code = "import sys, torch; before = len(sys.modules); import sana_ext; print(len(sys.modules) - before, before)"
    added, before = map(int, python(code).stdout.split())
    assert added < before / 10


FAMILIES = (
    "norm_modulate",
    "gated_residual",
    "residual_norm_modulate",
    "linear",
    "dwconv_glu",
    "linear_attention",
    "linear_attention_qkv",
)


@needs_cpu_library
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", FAMILIES)
def test_the_compiled_kernel_answers_on_the_cpu(op, direction):
    name = f"{op}_{direction}"
    registered = [line for line in torch._C._dispatch_dump(f"sana_ext::{name}").splitlines() if line.startswith("CPU:")]
    assert len(registered) == 1
    assert f"csrc/cpu/{OPS[name]}.cpp" in registered[0]
    assert _extension.has_kernel(name, "cpu")
    assert not _extension.has_kernel(name, "xpu")


@needs_cpu_library
@pytest.mark.skipif(not (PACKAGE.parent / "csrc").exists(), reason="needs the source tree")
def test_every_registration_of_the_sources_is_in_the_library():
    for source in (PACKAGE.parent / "csrc/cpu").glob("*.cpp"):
        for block in re.findall(
            r"STABLE_TORCH_LIBRARY_IMPL\(sana_ext, (\w+), m\) \{(.*?)^\}", source.read_text(), re.S | re.M
        ):
            for name in re.findall(r'm\.impl\("(\w+)"', block[1]):
                dump = torch._C._dispatch_dump(f"sana_ext::{name}")
                assert re.search(rf"^{block[0]}:.*csrc/cpu/{source.name}", dump, re.M), (
                    f"{name} of {source.name}:\n{dump}"
                )


@needs_cpu_library
def test_every_compiled_kernel_belongs_to_an_op():
    """No op is registered by C++ alone: each has a schema, a default kernel and a fake in Python."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("sana_ext::")]
    assert {n.removeprefix("sana_ext::") for n in names} == set(OPS)


def test_without_libraries_the_default_kernels_answer_and_are_reported(tmp_path):
    folder = copy_package(tmp_path)
    code = (
        "import torch, sana_ext\n"
        "x = torch.randn(2, 5, 8); c = torch.randn(2, 8)\n"
        "torch.testing.assert_close(sana_ext.norm_modulate(x, c, c), sana_ext.reference.norm_modulate(x, c, c))\n"
        "(info, _) = sana_ext.kernel_info('norm_modulate')\n"
        "assert (info.forward, info.backward, info.path, info.level) == ('default', 'default', 'default', None), info\n"
        "assert info.why == 'libsana_ext_cpu.so: not built', info\n"
        "assert sana_ext._extension.build_info() is None and sana_ext._extension.isa() is None\n"
        "print(sana_ext.__file__)"
    )
    result = python(code, folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(folder))


def test_without_libraries_the_self_test_passes(tmp_path):
    """Where the kernels are compiled, nothing else runs the default kernels of most ops, or their gradients."""
    folder = copy_package(tmp_path)
    result = python("import runpy; runpy.run_module('sana_ext', run_name='__main__')", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every op runs its PyTorch default" in result.stdout
    assert "all agree with their references" in result.stdout


@needs_cpu_library
def test_missing_bindings_disable_no_kernel(tmp_path):
    folder = copy_package(tmp_path, "libsana_ext_cpu.so")
    code = (
        "import sana_ext; assert sana_ext._extension.build_info() is None\n"
        "print(sana_ext.kernel_info('norm_modulate')[0].forward)"
    )
    assert python(code, folder).stdout.strip() == "compiled"


def test_corrupt_library_raises_and_names_the_file(tmp_path):
    folder = copy_package(tmp_path)
    library = folder / "sana_ext/libsana_ext_cpu.so"
    library.write_bytes(b"\x7fELF and then nothing of use")
    result = python("import sana_ext", folder)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: sana_ext:")
    assert str(library) in last
    assert "cannot be loaded" in last


FOREIGN = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
torch::stable::Tensor same(const torch::stable::Tensor& x) { return x; }
STABLE_TORCH_LIBRARY_IMPL(sana_ext, CPU, m) { m.impl("op_of_another_version", TORCH_BOX(&same)); }
"""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("int nothing;", r"it lacks kernels \(.*linear_forward, .*\)"),
        (FOREIGN, r"unknown ops \(op_of_another_version\)"),
    ],
    ids=["no kernels", "unknown op"],
)
def test_library_of_another_version_raises_and_names_the_file(tmp_path, source, says):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs c++")
    folder = copy_package(tmp_path)
    library = folder / "sana_ext/libsana_ext_cpu.so"
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    flags = ["-std=c++17", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000", *include]
    (tmp_path / "foreign.cpp").write_text(source)
    link = [f"-L{torch_folder}/lib", "-ltorch_cpu", "-o", str(library)]
    subprocess.run([compiler, *flags, str(tmp_path / "foreign.cpp"), *link], check=True)
    last = python("import sana_ext", folder).stderr.strip().splitlines()[-1]
    assert re.fullmatch(rf"ImportError: sana_ext: {library} belongs to another version .* {says}; build it again", last)


def test_unknown_level_gives_one_clear_line():
    result = python("import sana_ext", SANA_EXT_CPU_ISA="nonsense")
    assert result.returncode != 0
    expected = "SANA_EXT_CPU_ISA='nonsense' is not a known level; choose one of baseline, avx2, avx512, neon"
    assert result.stderr.strip().splitlines()[-1] == f"ValueError: {expected}"


@needs_cpu_library
def test_unavailable_level_gives_one_clear_line():
    foreign = "neon" if _extension.best_isa() != "neon" else "avx2"
    result = python("import sana_ext", SANA_EXT_CPU_ISA=foreign)
    assert result.returncode != 0
    expected = f"'{foreign}' is not available here; this processor's best level is '{_extension.best_isa()}'"
    assert expected in result.stderr.strip().splitlines()[-1]


@needs_cpu_library
def test_level_can_be_chosen():
    lowest = "neon" if _extension.best_isa() == "neon" else "baseline"
    result = python("import sana_ext; print(sana_ext._extension.isa())", SANA_EXT_CPU_ISA=lowest)
    assert result.stdout.strip() == lowest


def test_cuda_library_is_loaded_only_by_its_own_cuda(monkeypatch):
    for built, torchs, expected in (
        ("13.0", "13.2", None),
        ("13.0", "12.8", "built with CUDA 13.0, this torch uses CUDA 12.8"),
        ("", "13.0", None),
        ("13.0", None, "this torch is built without CUDA"),
    ):
        monkeypatch.setattr(_extension, "build_info", lambda built=built: {"cuda": built})
        monkeypatch.setattr(torch.version, "cuda", torchs)
        assert _extension._why_no_cuda() == expected
