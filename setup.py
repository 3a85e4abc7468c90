"""Builds the compiled part: libsana_ext_cpu.so, libsana_ext_cuda.so (both without Python) and the module _C.

The folders are the file lists; csrc/sana_ext_build.py writes the build.ninja. SANA_EXT_BUILD=auto|none|cpu|cuda chooses:
auto builds the CPU library or fails, and the CUDA library where nvcc can compile, else it says in one line why not; a
named choice that cannot be met fails. MAX_JOBS limits the parallel compilations.
SANA_EXT_BUILD=emulator builds only libsana_ext_emulator.so: the CUDA kernels and their glue on the host, for tests.
"""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
from sana_ext_build import (  # noqa: E402, F401  (the checks read the flags here)
    CUDA_ARCHITECTURES,
    KERNEL_FLAGS,
    NVCC_FLAGS,
    TORCH_TARGET,
    VERSION,
    X86_FLAGS,
    compiler,
    gencode,
    host_compiler,
    ninja_file,
    nvcc_command,
    nvcc_link_flags,
    nvcc_version,
    python_header,
    torch_flags,
)

sys.path.remove(str(ROOT / "csrc"))
SOURCES = runpy.run_path(str(ROOT / "sana_ext/_sources.py"))  # importing the package would import torch
CUDA_FLOOR = (12, 8)
NONE = "SANA_EXT_BUILD=none installs without kernels"
TOOLS = "pip install 'setuptools>=77' ninja pybind11"  # what a build without isolation needs beside torch


@dataclass
class Plan:
    """What to build, and with which tools."""

    libraries: list[str] = field(default_factory=list)  # "cpu", "cuda", "emulator"
    bindings: bool = False  # the module _C
    nvcc: str | None = None
    why_no_cuda: str | None = None

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
        missing.append("torch (pip install torch)")
    elif tuple(int(n) for n in version("torch").split(".")[:2]) < TORCH_TARGET:
        missing.append(f"torch >= {'.'.join(map(str, TORCH_TARGET))} (found {version('torch')})")
    if find_ninja() is None:
        missing.append("ninja (pip install ninja)")
    if not (compiler() and all(map(shutil.which, {compiler()[0], host_compiler()}))):
        missing.append(f"a C++ compiler ({os.environ.get('CXX') or 'c++'})")
    return f"needs {' and '.join(missing)}" if missing else None


def why_no_cuda(nvcc):
    """Why the CUDA library cannot be built with this nvcc, or None: it must compile and link a one-line kernel."""
    if nvcc is None:
        return "no nvcc in CUDA_HOME, on PATH or in the nvidia-cuda-nvcc wheels (see the extra [nvcc])"
    found = nvcc_version(nvcc)
    if found < CUDA_FLOOR:
        return f"{nvcc} is CUDA {found[0]}.{found[1]}, older than {CUDA_FLOOR[0]}.{CUDA_FLOOR[1]}"
    (ROOT / "build").mkdir(exist_ok=True)
    # Below the sources, so that a folder's name that nvcc does not bear is met here.
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        includes = ["cuda_fp16.h", *(["torch/csrc/stable/version.h"] if importlib.util.find_spec("torch") else [])]
        checks = [f"#if !__has_include(<{name}>)\n#error no <{name}>\n#endif" for name in includes]
        Path(folder, "probe.cu").write_text(
            "\n".join([*checks, "#include <cuda_fp16.h>", "__global__ void probe() {}\n"])
        )
        flags = [*NVCC_FLAGS.split(), *gencode().split(), *(torch_flags() if len(includes) > 1 else [])]
        command = [*nvcc_command(nvcc), *flags, "probe.cu", *nvcc_link_flags(nvcc), "-o", "probe.so"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if result.returncode == 0:
        return None
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    said = next((line for line in lines if re.search(r"error|fatal|unsupported", line, re.IGNORECASE)), "")
    said = said or (lines[-1] if lines else f"exit code {result.returncode}")
    return f"{nvcc} cannot compile with {host_compiler()} for {' '.join(CUDA_ARCHITECTURES)}: {said}"


def wanted():
    mode = os.environ.get("SANA_EXT_BUILD") or "auto"
    if mode not in ("auto", "none", "cpu", "cuda", "emulator"):
        raise SystemExit(f"SANA_EXT_BUILD={mode} is unknown; choose auto, none, cpu or cuda")
    return mode


def choose():
    mode = wanted()
    if mode == "none":
        return Plan()
    against = why_no_cpu()
    if against and mode == "auto":
        raise SystemExit(f"sana_ext: cannot build the kernels: {against}; {NONE}")
    if against:
        raise SystemExit(f"SANA_EXT_BUILD={mode} cannot be met: {against}")
    if mode == "emulator":
        return Plan(["emulator"])
    plan = Plan(["cpu"], bindings=importlib.util.find_spec("pybind11") is not None and python_header().exists())
    if not plan.bindings:
        print("sana_ext: not building the module _C (build facts): needs pybind11 and Python.h", file=sys.stderr)
    if mode == "cpu":
        plan.why_no_cuda = "SANA_EXT_BUILD=cpu"
        return plan
    nvcc = find_nvcc()
    plan.why_no_cuda = why_no_cuda(nvcc)
    if plan.why_no_cuda and mode == "cuda":
        raise SystemExit(f"SANA_EXT_BUILD=cuda cannot be met: {plan.why_no_cuda}")
    if plan.why_no_cuda:
        print(f"sana_ext: building CPU kernels only: {plan.why_no_cuda}", file=sys.stderr)
        return plan
    plan.libraries.append("cuda")
    plan.nvcc = nvcc
    return plan


class NinjaBuild(build_ext):
    """One build.ninja for everything; the libraries keep their plain names."""

    def run(self):
        # Only here, where something is compiled: the metadata and a source distribution need no compiler.
        self.plan = choose()
        planned = {ext.name for ext in self.plan.extensions()}
        self.extensions[:] = [ext for ext in self.extensions or [] if ext.name in planned]
        # setuptools compiles into build_lib and copies from there into the source tree.
        folders = [Path(self.build_lib, "sana_ext"), *([ROOT / "sana_ext"] if self.inplace else [])]
        sources = self.remaining_sources(folders[-1])
        for folder in folders:
            (folder / SOURCES["RECORD"]).unlink(missing_ok=True)
        if not self.inplace:
            self.remove_others(folders[0])
        super().run()
        built = dict.fromkeys(self.plan.libraries, SOURCES["fingerprint"](ROOT))
        if built:
            SOURCES["write_record"](folders[-1], {**sources, **built}, self.plan.why_no_cuda)

    def remaining_sources(self, folder):
        """What the record says of libraries in the source tree that this build leaves as they are."""
        recorded = SOURCES["read_record"](folder).get("sources", {}) if self.inplace else {}
        return {name: of for name, of in recorded.items() if (folder / f"libsana_ext_{name}.so").exists()}

    def remove_others(self, folder):
        """What an earlier build left in build_lib would go into the wheel."""
        names = {Path(self.get_ext_filename(ext.name)).name for ext in self.extensions}
        for file in [*folder.glob("libsana_ext_*.so"), *folder.glob("_C*.so")]:
            if file.name not in names:
                file.unlink()

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
        text = ninja_file(targets, self.plan.libraries, self.plan.nvcc, temp)
        (temp / "build.ninja").write_bytes(os.fsencode(text))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), "-C", str(temp), "--quiet", *jobs]).returncode:
            raise SystemExit(f"sana_ext: compiling failed; the compiler's message stands above; {NONE}")


def kept_by():
    """Which installer keeps the wheel built here for all who ask for this commit or archive: "pip", "uv" or None.

    Both know such a wheel by where its source came from, not by the environment variables of its build.
    """
    if any(re.match(r"pip-(req-build|install)-", part) for part in ROOT.parts):
        return "pip"
    for cache in ROOT.parents:
        bucket = ROOT.relative_to(cache).parts[0]
        if (cache / "CACHEDIR.TAG").exists() and re.match(r"(git|sdists)-v\d+$", bucket):
            # --no-cache is a cache of its own that uv removes when it is done.
            passing = cache.parent == Path(tempfile.gettempdir()).resolve() and cache.name.startswith(".tmp")
            return None if passing else "uv"
    return None


try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        bdist_wheel = None


class NoWheel(Command):
    """Stands in for the missing command."""

    user_options: ClassVar = []

    def initialize_options(self):
        found = f"setuptools {setuptools.__version__} alone cannot build a wheel"
        raise SystemExit(f"sana_ext: {found}; {TOOLS}")

    finalize_options = run = initialize_options


class Wheel(bdist_wheel or NoWheel):
    """A wheel without kernels is not left in an installer's cache, where it would be taken for one with kernels."""

    def run(self):
        keeper = kept_by() if wanted() == "none" else None
        if keeper == "uv":
            raise SystemExit(
                "SANA_EXT_BUILD=none: uv would keep this wheel without kernels and use it where kernels are wanted; "
                "add --no-cache, or install from a checkout"
            )
        before = set(Path(self.dist_dir).glob("*.whl"))
        super().run()
        if keeper == "pip":
            # pip installs what it has just built, and looks only for names with the machine's tags in its cache.
            for wheel in set(Path(self.dist_dir).glob("*.whl")) - before:
                wheel.rename(wheel.with_name(re.sub(r"[^-]+\.whl$", "without_kernels.whl", wheel.name)))


def licence():
    """PEP 639's expression; older versions of setuptools know only the field before it."""
    new = tuple(int(n) for n in setuptools.__version__.split(".")[:2]) >= (77, 0)
    return {"license_expression" if new else "license": "Apache-2.0", "license_files": ["LICENSE"]}


if __name__ == "__main__":
    every = {"none": Plan(), "emulator": Plan(["emulator"])}.get(wanted(), Plan(["cpu", "cuda"], bindings=True))
    commands = {"build_ext": NinjaBuild, "bdist_wheel": Wheel}
    setup(ext_modules=every.extensions(), cmdclass=commands, **licence())  # build_ext leaves out what it does not build
