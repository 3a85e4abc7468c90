"""Builds the compiled part: libsana_ext_cpu.so, libsana_ext_cuda.so (both without Python) and the module _C.

The folders are the file lists. SANA_EXT_BUILD=auto|none|cpu|cuda chooses: auto builds what this machine can build and says
in one line why it chose less; a named choice that cannot be met fails.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"
TORCH_TARGET = "2.10"  # the oldest torch the libraries run with
TARGET_MACRO = "-DTORCH_TARGET_VERSION=0x020a000000000000"
X86_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
}
ISA_FLAGS = X86_FLAGS if os.uname().machine in ("x86_64", "AMD64") else {"baseline": ""}
CUDA_ARCHITECTURES = os.environ.get("SANA_EXT_CUDA_ARCHITECTURES", "80 89 90 90+PTX").split()


def find_nvcc():
    """nvcc of CUDA_HOME, of PATH, or of the nvidia-cuda-nvcc wheels, in this order."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin/nvcc"] if home else []
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates += sorted(Path(p) / "nvidia" / cu / "bin/nvcc" for p in sys.path for cu in ("cu13", "cuda_nvcc"))
    return next((str(c.resolve()) for c in candidates if c.exists()), None)


def choose():
    """(libraries to build, nvcc or None)."""
    wanted = os.environ.get("SANA_EXT_BUILD", "auto")
    if wanted not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"SANA_EXT_BUILD={wanted} is unknown; choose auto, none, cpu or cuda")
    if wanted == "none":
        return [], None
    missing = []
    for module in ("torch", "pybind11"):
        try:
            __import__(module)
        except ImportError:
            missing.append(module)
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        missing.append(f"a C++ compiler ({compiler})")
    if missing:
        why = "needs " + " and ".join(missing)
        if wanted != "auto":
            raise SystemExit(f"SANA_EXT_BUILD={wanted} cannot be met: {why}")
        print(f"sana_ext: building no kernels: {why}; every op runs its PyTorch default", file=sys.stderr)
        return [], None
    nvcc = find_nvcc()
    if wanted == "cuda" and not nvcc:
        raise SystemExit("SANA_EXT_BUILD=cuda cannot be met: no nvcc in CUDA_HOME, on PATH or in the nvidia-cuda-nvcc wheels")
    if wanted == "auto" and not nvcc:
        print("sana_ext: building CPU kernels only: no nvcc found (pip install 'sana-ext[nvcc]')", file=sys.stderr)
    return (["cpu", "cuda"] if nvcc and wanted != "cpu" else ["cpu"]), nvcc if wanted != "cpu" else None


class NinjaBuild(build_ext):
    """One build.ninja for everything; the libraries keep their plain names."""

    def get_ext_filename(self, name):
        if "libsana_ext" in name:
            return str(Path(*name.split(".")).with_suffix(".so"))
        return super().get_ext_filename(name)

    def build_extensions(self):
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        targets = {ext.name.rpartition(".")[2]: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions}
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        (temp / "build.ninja").write_text(ninja_file(targets))
        import ninja

        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(temp)], check=True)


def ninja_file(targets):
    import pybind11
    import torch

    torch_root = Path(torch.__file__).parent
    cxx = os.environ.get("CXX", "c++")
    common = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-maybe-uninitialized {os.environ.get('CXXFLAGS', '')}"
    torch_flags = f"{TARGET_MACRO} -isystem {torch_root}/include -isystem {torch_root}/include/torch/csrc/api/include"
    nvcc_flags = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"  # nvcc knows where its own headers and libraries are
    lines = [
        f"cxx = {cxx}",
        "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule nvcc\n  command = {NVCC} -MD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx -shared $in $libs -o $out",
        f"rule nvcclink\n  command = {NVCC} -shared -cudart static $in $libs -o $out",
    ]
    objects = {name: [] for name in targets}

    def compile(target, source, flags, rule="cxx", suffix=""):
        obj = f"{source.relative_to(ROOT)}{suffix}.o"
        objects[target].append(obj)
        lines.append(f"build {obj}: {rule} {source}\n  flags = {flags}")

    if "libsana_ext_cpu" in targets:
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            compile("libsana_ext_cpu", source, f"{common} {torch_flags}")
        kernel_flags = f"{common} -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi"
        for source in sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp")):
            levels = {"baseline": ""} if source.stem == "isa" else ISA_FLAGS
            for isa, flags in levels.items():
                compile("libsana_ext_cpu", source, f"{kernel_flags} -DSANA_EXT_ISA={isa} {flags}", suffix=f".{isa}")
    if "libsana_ext_cuda" in targets:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
            compile("libsana_ext_cuda", source, f"{nvcc_flags} -DUSE_CUDA {torch_flags}", "nvcc")
        gencode = " ".join(
            f"-gencode arch=compute_{a.removesuffix('+PTX')},code={'compute' if a.endswith('+PTX') else 'sm'}_{a.removesuffix('+PTX')}"
            for a in CUDA_ARCHITECTURES
        )
        for source in sorted((ROOT / "csrc/cuda/kernels").glob("*.cu")):
            compile("libsana_ext_cuda", source, f"{nvcc_flags} --threads 2 {gencode}", "nvcc")
    if "_C" in targets:
        built = " ".join(sorted(name.removeprefix("libsana_ext_") for name in targets if name != "_C"))
        facts = {"VERSION": VERSION, "TORCH": torch.__version__, "TORCH_TARGET": TORCH_TARGET, "LIBRARIES": built,
                 "NVCC": NVCC or "", "CUDA_ARCHITECTURES": " ".join(CUDA_ARCHITECTURES) if NVCC else ""}  # fmt: skip
        macros = " ".join(f"-DSANA_EXT_{k}='\"{v}\"'" for k, v in facts.items())
        includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
        compile("_C", ROOT / "csrc/bindings.cpp", f"{common} {includes} {macros}")
    torch_libs = f"-L{torch_root}/lib -ltorch_cpu"
    for name, path in targets.items():
        rule = "nvcclink" if name == "libsana_ext_cuda" else "link"
        lines.append(f"build {path}: {rule} {' '.join(objects[name])}\n  libs = {'' if name == '_C' else torch_libs}")
    return "\n".join(lines) + "\n"


LIBRARIES, NVCC = choose()
names = ["sana_ext._C", *(f"sana_ext.libsana_ext_{lib}" for lib in LIBRARIES)] if LIBRARIES else []
setup(ext_modules=[Extension(name, []) for name in names], cmdclass={"build_ext": NinjaBuild})
