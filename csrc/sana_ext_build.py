"""Writes the build.ninja of the compiled part: what is compiled from what, with which flags. setup.py runs it.

Paths may hold spaces, quotes and dollar signs: what stands in a `build` line is escaped for ninja, what stands in a
command for the shell and for ninja. The sources are named relative to the build folder, since nvcc hands its arguments
to a shell of its own without escaping them.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
VERSION = "0.1.0"
TORCH_TARGET = (2, 10)  # the oldest torch that the libraries run with
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


def compiler():
    """The words of CXX: a program, or several words of which the last that is no option is the program."""
    wanted = os.environ.get("CXX") or "c++"
    return [wanted] if shutil.which(wanted) else shlex.split(wanted)


def host_compiler():
    return next((word for word in reversed(compiler()) if not word.startswith("-")), "c++")


def shell(*words):
    """Words of a command in a build.ninja."""
    return shlex.join(map(str, words)).replace("$", "$$")


def ninja_path(path):
    """A path in a `build` line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def nvcc_version(nvcc):
    found = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    return (int(found[1]), int(found[2])) if found else (0, 0)


def nvcc_command(nvcc):
    return [nvcc, "-ccbin", host_compiler()]


def nvcc_link_flags(nvcc):
    # The wheels keep the static runtime in lib/, where their nvcc does not look.
    return ["-shared", "-cudart", "static", f"-L{Path(nvcc).parent.parent}/lib"]


def gencode():
    """nvcc's options for CUDA_ARCHITECTURES."""
    options = []
    for architecture in CUDA_ARCHITECTURES:
        number, ptx = architecture.removesuffix("+PTX"), architecture.endswith("+PTX")
        options.append(f"-gencode arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    return " ".join(options)


def torch_folder():
    return Path(importlib.util.find_spec("torch").origin).parent


def torch_flags():
    stable = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    include = torch_folder() / "include"
    return [stable, "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]


def torch_version():
    """torch.__version__ without importing torch; the metadata of PyPI's wheels leave out its +cu130."""
    text = (torch_folder() / "version.py").read_text()
    return re.search(r"^__version__ = '(.+)'", text, re.MULTILINE)[1]


def python_header():
    return Path(sysconfig.get_path("include")) / "Python.h"


def bindings_flags(libraries, nvcc):
    """What _C is compiled with: the facts of this build, as string literals."""
    import pybind11

    facts = {
        "VERSION": VERSION,
        "TORCH": torch_version(),
        "TORCH_TARGET": ".".join(map(str, TORCH_TARGET)),
        "LIBRARIES": " ".join(libraries),
        "NVCC": nvcc or "",
        "CUDA": ".".join(map(str, nvcc_version(nvcc))) if nvcc else "",
        "CUDA_ARCHITECTURES": " ".join(CUDA_ARCHITECTURES) if nvcc else "",
    }
    escaped = {name: re.sub(r'(["\\])', r"\\\1", value) for name, value in facts.items()}
    macros = [f'-DSANA_EXT_{name}="{value}"' for name, value in escaped.items()]
    return ["-isystem", pybind11.get_include(), "-isystem", str(python_header().parent), *macros]


def ninja_file(targets, libraries, nvcc, folder):
    """The text of `folder`/build.ninja; targets: name -> file, libraries: those among them, nvcc: path or None."""
    cxx = shell(*compiler())
    common = f"{COMMON_FLAGS} {shell(*shlex.split(os.environ.get('CXXFLAGS', '')))}"
    torch = shell(*torch_flags())
    cuda = shell(*nvcc_command(nvcc)) if nvcc else ""
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared $in $libs -o $out",
    ]
    if nvcc:
        lines += [
            f"rule nvcc\n  command = {cuda} -MD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule nvcclink\n  command = {cuda} $in $libs -o $out",
        ]
    objects = {name: [] for name in targets}

    def compile(target, source, flags, rule="cxx", suffix=""):
        obj = f"{source.relative_to(ROOT)}{suffix}.o"
        objects[target].append(obj)
        lines.append(f"build {obj}: {rule} {ninja_path(os.path.relpath(source, folder))}\n  flags = {flags}")

    if "libsana_ext_cpu" in targets:
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            compile("libsana_ext_cpu", source, f"{common} {torch}")
        for source in sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp")):
            levels = {"baseline": ""} if source.stem == "isa" else ISA_FLAGS
            for isa, flags in levels.items():
                flags = f"{common} {KERNEL_FLAGS} -DSANA_EXT_ISA={isa} {flags}"
                compile("libsana_ext_cpu", source, flags, suffix=f".{isa}")
    if "libsana_ext_emulator" in targets:
        sources = [("csrc/cuda/*.cpp", torch), ("csrc/cuda/kernels/*.cu", "-x c++"), ("csrc/emulator/*.cpp", "")]
        for pattern, more in sources:
            for source in sorted(ROOT.glob(pattern)):
                compile("libsana_ext_emulator", source, f"{common} {EMULATOR_FLAGS} {more}", suffix=".emulator")
    if "libsana_ext_cuda" in targets:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
            compile("libsana_ext_cuda", source, f"{NVCC_FLAGS} -DUSE_CUDA {torch}", "nvcc")
        for source in sorted((ROOT / "csrc/cuda/kernels").glob("*.cu")):
            compile("libsana_ext_cuda", source, f"{NVCC_FLAGS} --threads 2 {gencode()}", "nvcc")
    if "_C" in targets:
        compile("_C", ROOT / "csrc/bindings.cpp", f"{common} {shell(*bindings_flags(libraries, nvcc))}")
    torch_libs = shell(f"-L{torch_folder() / 'lib'}", "-ltorch_cpu")
    libs = {"_C": "", "libsana_ext_cpu": torch_libs, "libsana_ext_emulator": torch_libs}
    stub = ""
    if "libsana_ext_cuda" in targets:
        # The library must ask for libtorch_cuda.so, and a CPU torch has none to link with: a stub of that name does.
        stub = "stubs/libtorch_cuda.so"
        function = "void aoti_torch_get_current_cuda_stream(void) {}"
        shared = "-shared -fPIC -Wl,-soname,libtorch_cuda.so"
        lines.append(f"rule stub\n  command = echo '{function}' | {cxx} -x c - {shared} -o $out\nbuild {stub}: stub")
        libs["libsana_ext_cuda"] = f"-Lstubs -ltorch_cuda {shell(*nvcc_link_flags(nvcc))} {torch_libs}"
    for name, path in targets.items():
        rule, after = ("nvcclink", f" | {stub}") if name == "libsana_ext_cuda" else ("link", "")
        target = ninja_path(os.path.relpath(path, folder))
        lines.append(f"build {target}: {rule} {' '.join(objects[name])}{after}\n  libs = {libs[name]}")
    return "\n".join(lines) + "\n"
