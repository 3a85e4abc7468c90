"""setup.py's choices, the agreement of the two build descriptions, and the checks of the compiled objects."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import check_kernels  # noqa: E402
import check_symbols  # noqa: E402

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def setup():
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def fake_nvcc(folder, release="13.0"):
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def no_cuda(monkeypatch):
    """No nvcc anywhere: what the machine has is out of sight."""
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "nvidia/cu13/bin/nvcc").exists()])
    for name in ("CUDA_HOME", "CUDA_PATH", "SANA_EXT_BUILD"):
        monkeypatch.delenv(name, raising=False)


def test_nvcc_is_found_in_order(setup, no_cuda, monkeypatch, tmp_path):
    find = setup["find_nvcc"]
    assert find() is None
    wheels = fake_nvcc(tmp_path / "site/nvidia/cu13/bin")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find() == str(wheels)
    on_path = fake_nvcc(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert find() == str(on_path)
    home = fake_nvcc(tmp_path / "home/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert find() == str(home)
    home.chmod(0o644)  # not a program: the next one counts
    assert find() == str(on_path)


def test_auto_says_why_it_builds_less(setup, no_cuda, monkeypatch, capsys, tmp_path):
    assert setup["choose"]().libraries == ["cpu"]
    assert (
        "CPU kernels only: no nvcc in CUDA_HOME, on PATH or in the nvidia-cuda-nvcc wheels" in capsys.readouterr().err
    )
    fake_nvcc(tmp_path / "bin", "11.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup["choose"]().libraries == ["cpu"]
    assert "is CUDA 11.8, older than 12.8" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"needs a C\+\+ compiler \(no-such-compiler\); SANA_EXT_BUILD=none installs"):
        setup["choose"]()


@pytest.mark.parametrize("old", ["2.9.1", "1.13.0"])
def test_old_torch_is_refused(setup, no_cuda, monkeypatch, old):
    monkeypatch.setitem(setup["why_no_cpu"].__globals__, "version", lambda name: old)
    monkeypatch.setenv("SANA_EXT_BUILD", "cpu")
    with pytest.raises(SystemExit, match=rf"cannot be met: needs torch >= 2.10 \(found {old}\)"):
        setup["choose"]()


def test_choices(setup, no_cuda, monkeypatch, tmp_path):
    fake_nvcc(tmp_path / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    both = ["cpu", "cuda"]
    expected = {"none": [], "cpu": ["cpu"], "emulator": ["emulator"], "cuda": both, "auto": both, "": both}
    for choice, libraries in expected.items():
        monkeypatch.setenv("SANA_EXT_BUILD", choice)
        assert setup["choose"]().libraries == libraries, choice


IMPOSSIBLE = [
    ("cuda", {}, "SANA_EXT_BUILD=cuda cannot be met: no nvcc in CUDA_HOME, on PATH or in the nvidia-cuda-nvcc wheels"),
    ("cpu", {"CXX": "no-such-compiler"}, "SANA_EXT_BUILD=cpu cannot be met: needs a C++ compiler (no-such-compiler)"),
    ("gpu", {}, "SANA_EXT_BUILD=gpu is unknown; choose auto, none, cpu or cuda"),
]


@pytest.mark.parametrize(("choice", "env", "message"), IMPOSSIBLE, ids=[i[0] for i in IMPOSSIBLE])
def test_impossible_choice_fails_with_one_line(no_cuda, choice, env, message, tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    env = {**os.environ, "SANA_EXT_BUILD": choice, **env}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_cmake_uses_the_same_flags(setup):
    cmake = (ROOT / "CMakeLists.txt").read_text()
    flags = dict(re.findall(r"set\((\w+) (-m?[^)]*)\)", cmake))
    assert flags["kernel_flags"] == setup["KERNEL_FLAGS"]
    assert flags["flags_avx2"] == setup["X86_FLAGS"]["avx2"]
    avx512 = re.search(r"set\(flags_avx512 (.*)\)", cmake)[1].replace("${flags_avx2}", flags["flags_avx2"])
    assert avx512 == setup["X86_FLAGS"]["avx512"]


def test_foreign_weak_symbol_is_found(tmp_path):
    if not (shutil.which("c++") and shutil.which("nm")):
        pytest.skip("needs c++ and nm")
    source = tmp_path / "bad.cpp"
    source.write_text(
        "template <class T> __attribute__((noinline)) T twice(T x) { return x + x; }\n"
        "namespace sana_ext::cpu::avx2 { template <class T> __attribute__((noinline)) T mine(T x) { return x * x; }\n"
        "int f(int x) { return twice(x) + mine(x); } }\n"
    )
    subprocess.run(["c++", "-std=c++17", "-c", str(source), "-o", str(tmp_path / "bad.o")], check=True)
    assert check_symbols.foreign(tmp_path / "bad.o", "avx2") == ["int twice<int>(int)"]


MANGLED = "_ZN8sana_ext4cuda12_GLOBAL__N_112other_kernelILi32EEEvNS0_4ArgsE"
PTXAS = f"""\
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_90'
ptxas info    : Function properties for {MANGLED}
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 77 registers, used 1 barriers, 64 bytes smem, 512 bytes cmem[0]
"""


def test_ptxas_report_is_read():
    if not shutil.which("c++filt"):
        pytest.skip("needs c++filt")
    (usage,) = check_kernels.parse(PTXAS)
    assert usage == check_kernels.Usage("other_kernel<32>", "90", 77, 64, 20)


def test_every_cuda_kernel_has_a_budget():
    kernels = set()
    for source in check_kernels.KERNELS.glob("*.cu"):
        kernels |= set(re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", source.read_text()))
    assert kernels, "the pattern finds no kernel"
    assert kernels == {name.split("<")[0] for name in check_kernels.budgets()}


def test_budget_of_an_instantiation():
    limits = {"kernel": 255, "kernel<__*, true>": 168}
    names = ["kernel", "kernel<float, true>", "kernel<__half, false>", "kernel<__half, true>", "other"]
    assert [check_kernels.budget(name, limits) for name in names] == [255, 255, 255, 168, None]


SASS = f"""\
Fatbin elf code:
================
arch = sm_80
code version = [1,7]

	code for sm_80
		Function : {MANGLED}
	.headerflags    @"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
                                                                           /* 0x000fc40000000f00 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;        /* 0x0000000402047981 */
Fatbin elf code:
================
arch = sm_90
		Function : {MANGLED}
        /*0000*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;    /* 0x0000000402047981 */
        /*0010*/             @UP1  LDG.E.64 R4, [R2.64] ;                  /* 0x0000000402047981 */
"""


def test_machine_code_is_read():
    if not shutil.which("c++filt"):
        pytest.skip("needs c++filt")
    found = check_kernels.instructions_in(SASS)
    assert found == {
        ("other_kernel<32>", "80"): {"MOV", "LDG.E.128.CONSTANT"},
        ("other_kernel<32>", "90"): {"HMMA.16816.F32.BF16", "LDG.E.64"},
    }
    required = {"other_kernel<*>": ["LDG.128", "HMMA", "LDG"], "other_kernel": ["MOV"]}
    assert check_kernels.missing_instructions(found, required) == (
        4,
        [
            "other_kernel<32> has no HMMA on sm_80",
            "other_kernel<32> has no LDG.128 on sm_90",
            "machine code of other_kernel is demanded, but there is no such kernel",
        ],
    )


def test_headers_demand_machine_code():
    required = check_kernels.required_instructions()
    assert "LDG.128" in required["norm_modulate_forward_kernel<*>"]
    assert all(re.fullmatch(r"[A-Z]+(\.\w+)*", i) for wanted in required.values() for i in wanted)


def test_disassembler_is_found(monkeypatch, tmp_path):
    def tool(folder, name):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text("#!/bin/sh\n")
        (tmp_path / folder / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert check_kernels.find_cuobjdump() is None
    tool("path", "cuobjdump")  # alone it disassembles nothing
    assert check_kernels.find_cuobjdump() is None
    for folder in ("site/triton/backends/nvidia/bin", "cuda/bin"):
        for name in ("cuobjdump", "nvdisasm"):
            tool(folder, name)
    assert check_kernels.find_cuobjdump() == str(tmp_path / "site/triton/backends/nvidia/bin/cuobjdump")
    assert check_kernels.find_cuobjdump(str(tmp_path / "cuda/bin/nvcc")) == str(tmp_path / "cuda/bin/cuobjdump")
    tool("path", "nvdisasm")
    assert check_kernels.find_cuobjdump() == str(tmp_path / "path/cuobjdump")
