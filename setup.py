"""Builds the compiled part: libsana_ext_cpu.so, libsana_ext_cuda.so (both without Python) and the module _C.

The folders are the file lists. SANA_EXT_BUILD=auto|none|cpu|cuda chooses: auto builds what this machine can build and
says in one line why it chose less; a named choice that cannot be met fails. MAX_JOBS limits the parallel compilations.
SANA_EXT_BUILD=emulator builds only libsana_ext_emulator.so: the CUDA kernels and their glue on the host, for tests.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"
TORCH_TARGET = (2, 10)  # the oldest torch that the libraries run with
CUDA_FLOOR = (12, 8)
# 90+PTX is code that newer GPUs translate when they load it.
CUDA_ARCHITECTURES = os.environ.get("SANA_EXT_CUDA_ARCHITECTURES", "80 89 90 90+PTX").split()

COMMON_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-maybe-uninitialized"
KERNEL_FLAGS = "-ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi"
X86_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
}
ISA_FLAGS = X86_FLAGS if platform.machine() == "x86_64" else {"baseline": ""}
# What runs on the host in place of a GPU.
EMULATOR_FLAGS = "-DSANA_EXT_EMULATOR -O2 -Wno-unknown-pragmas"
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"


@dataclass
class Plan:
    """What to build, and with which tools."""

    libraries: list[str] = field(default_factory=list)  # "cpu", "cuda", "emulator"
    bindings: bool = False  # the module _C
    nvcc: str | None = None

    def extensions(self):
        names = [f"libsana_ext_{name}" for name in self.libraries] + (["_C"] if self.bindings else [])
        return [Extension(f"sana_ext.{name}", []) for name in names]


def find_nvcc():
    """nvcc of CUDA_HOME, of PATH, or of the nvidia-cuda-nvcc wheels, in this order."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin/nvcc"] if home else []
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    # An isolated build does not have the environment's own packages on sys.path: look there too.
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    candidates += [Path(folder) / "nvidia/cu13/bin/nvcc" for folder in dict.fromkeys(folders)]
    return next((str(c.resolve()) for c in candidates if c.is_file() and os.access(c, os.X_OK)), None)


def nvcc_version(nvcc):
    found = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find_ninja():
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def why_no_cpu():
    """What the compiled part lacks here, or None."""
    missing = []
    if sys.platform != "linux":
        missing.append("Linux")
    if importlib.util.find_spec("torch") is None:
        missing.append("torch")
    elif tuple(int(n) for n in version("torch").split(".")[:2]) < TORCH_TARGET:
        missing.append(f"torch >= {'.'.join(map(str, TORCH_TARGET))} (found {version('torch')})")
    if find_ninja() is None:
        missing.append("ninja")
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler.split()[-1]):
        missing.append(f"a C++ compiler ({compiler})")
    return f"needs {' and '.join(missing)}" if missing else None


def why_no_cuda(nvcc):
    if nvcc is None:
        return "no nvcc in CUDA_HOME, on PATH or in the nvidia-cuda-nvcc wheels (see the extra [nvcc])"
    found = nvcc_version(nvcc)
    return (
        f"{nvcc} is CUDA {found[0]}.{found[1]}, older than {CUDA_FLOOR[0]}.{CUDA_FLOOR[1]}"
        if found < CUDA_FLOOR
        else None
    )


def choose():
    wanted = os.environ.get("SANA_EXT_BUILD") or "auto"
    if wanted not in ("auto", "none", "cpu", "cuda", "emulator"):
        raise SystemExit(f"SANA_EXT_BUILD={wanted} is unknown; choose auto, none, cpu or cuda")
    if wanted == "none":
        return Plan()
    against = why_no_cpu()
    if against and wanted != "auto":
        raise SystemExit(f"SANA_EXT_BUILD={wanted} cannot be met: {against}")
    if against:
        print(f"sana_ext: building no kernels: {against}; every op runs its PyTorch default", file=sys.stderr)
        return Plan()
    if wanted == "emulator":
        return Plan(["emulator"])
    plan = Plan(["cpu"], bindings=importlib.util.find_spec("pybind11") is not None and python_header().exists())
    if not plan.bindings:
        print("sana_ext: not building the module _C (build facts): needs pybind11 and Python.h", file=sys.stderr)
    if wanted == "cpu":
        return plan
    nvcc = find_nvcc()
    against = why_no_cuda(nvcc)
    if against and wanted == "cuda":
        raise SystemExit(f"SANA_EXT_BUILD=cuda cannot be met: {against}")
    if against:
        print(f"sana_ext: building CPU kernels only: {against}", file=sys.stderr)
        return plan
    plan.libraries.append("cuda")
    plan.nvcc = nvcc
    return plan


def python_header():
    return Path(sysconfig.get_path("include")) / "Python.h"


class NinjaBuild(build_ext):
    """One build.ninja for everything; the libraries keep their plain names."""

    def get_ext_filename(self, name):
        if "libsana_ext" in name:
            return str(Path(*name.split(".")).with_suffix(".so"))
        return super().get_ext_filename(name)

    def build_extensions(self):
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        targets = {
            ext.name.rpartition(".")[2]: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions
        }
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        (temp / "build.ninja").write_text(ninja_file(targets, PLAN))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), "-C", str(temp), "--quiet", *jobs]).returncode:
            raise SystemExit("sana_ext: compiling failed; the compiler's message stands above")


def ninja_file(targets, plan):
    torch = Path(importlib.util.find_spec("torch").origin).parent
    cxx = os.environ.get("CXX", "c++")
    common = f"{COMMON_FLAGS} {os.environ.get('CXXFLAGS', '')}"
    stable = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    torch_flags = f"{stable} -isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include"
    nvcc = f"{plan.nvcc} -ccbin {cxx.split()[-1]}"
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule nvcc\n  command = {nvcc} -MD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared $in $libs -o $out",
        f"rule nvcclink\n  command = {nvcc} -shared -cudart static $in $libs -o $out",
    ]
    objects = {name: [] for name in targets}

    def compile(target, source, flags, rule="cxx", suffix=""):
        obj = f"{source.relative_to(ROOT)}{suffix}.o"
        objects[target].append(obj)
        lines.append(f"build {obj}: {rule} {source}\n  flags = {flags}")

    if "libsana_ext_cpu" in targets:
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            compile("libsana_ext_cpu", source, f"{common} {torch_flags}")
        for source in sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp")):
            levels = {"baseline": ""} if source.stem == "isa" else ISA_FLAGS
            for isa, flags in levels.items():
                flags = f"{common} {KERNEL_FLAGS} -DSANA_EXT_ISA={isa} {flags}"
                compile("libsana_ext_cpu", source, flags, suffix=f".{isa}")
    if "libsana_ext_emulator" in targets:
        sources = [("csrc/cuda/*.cpp", torch_flags), ("csrc/cuda/kernels/*.cu", "-x c++"), ("csrc/emulator/*.cpp", "")]
        for pattern, more in sources:
            for source in sorted(ROOT.glob(pattern)):
                compile("libsana_ext_emulator", source, f"{common} {EMULATOR_FLAGS} {more}", suffix=".emulator")
    if "libsana_ext_cuda" in targets:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
            compile("libsana_ext_cuda", source, f"{NVCC_FLAGS} -DUSE_CUDA {torch_flags}", "nvcc")
        for source in sorted((ROOT / "csrc/cuda/kernels").glob("*.cu")):
            compile("libsana_ext_cuda", source, f"{NVCC_FLAGS} --threads 2 {gencode()}", "nvcc")
    if "_C" in targets:
        import pybind11

        facts = {
            "VERSION": VERSION,
            "TORCH": torch_version(torch),
            "TORCH_TARGET": ".".join(map(str, TORCH_TARGET)),
            "LIBRARIES": " ".join(plan.libraries),
            "NVCC": plan.nvcc or "",
            "CUDA": ".".join(map(str, nvcc_version(plan.nvcc))) if plan.nvcc else "",
            "CUDA_ARCHITECTURES": " ".join(CUDA_ARCHITECTURES) if plan.nvcc else "",
        }
        macros = " ".join(f"-DSANA_EXT_{k}='\"{v}\"'" for k, v in facts.items())
        includes = f"-isystem {pybind11.get_include()} -isystem {python_header().parent}"
        compile("_C", ROOT / "csrc/bindings.cpp", f"{common} {includes} {macros}")
    torch_libs = f"-L{torch}/lib -ltorch_cpu"
    libs = {"_C": "", "libsana_ext_cpu": torch_libs, "libsana_ext_emulator": torch_libs}
    stub = ""
    if "libsana_ext_cuda" in targets:
        # The library must ask for libtorch_cuda.so, and a CPU torch has none to link with: a stub of that name does.
        stub = "stubs/libtorch_cuda.so"
        function = "void aoti_torch_get_current_cuda_stream(void) {}"
        shared = "-shared -fPIC -Wl,-soname,libtorch_cuda.so"
        lines.append(f"rule stub\n  command = echo '{function}' | {cxx} -x c - {shared} -o $out\nbuild {stub}: stub")
        # The wheels keep the static runtime in lib/, where their nvcc does not look.
        libs["libsana_ext_cuda"] = f"-Lstubs -ltorch_cuda -L{Path(plan.nvcc).parent.parent}/lib {torch_libs}"
    for name, path in targets.items():
        rule, after = ("nvcclink", f" | {stub}") if name == "libsana_ext_cuda" else ("link", "")
        lines.append(f"build {path}: {rule} {' '.join(objects[name])}{after}\n  libs = {libs[name]}")
    return "\n".join(lines) + "\n"


def torch_version(torch):
    """torch.__version__ without importing torch; the metadata of PyPI's wheels leave out its +cu130."""
    return re.search(r"^__version__ = '(.+)'", (torch / "version.py").read_text(), re.MULTILINE)[1]


def gencode():
    """nvcc's options for CUDA_ARCHITECTURES."""
    options = []
    for architecture in CUDA_ARCHITECTURES:
        number, ptx = architecture.removesuffix("+PTX"), architecture.endswith("+PTX")
        options.append(f"-gencode arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    return " ".join(options)


if __name__ == "__main__":
    PLAN = choose()
    setup(ext_modules=PLAN.extensions(), cmdclass={"build_ext": NinjaBuild})
