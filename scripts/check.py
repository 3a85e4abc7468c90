"""`make check`: every check of the project, one part after the other, with the time of each and a summary.

    python3 scripts/check.py            all parts
    python3 scripts/check.py lint neon  only these
    python3 scripts/check.py --list     what there is

Needs nothing but Python's standard library; the parts use the environment that `make test` creates. A part that lacks
a tool fails and says which package has it. Full output is kept in build/check/<part>.log.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build/check"
BIN = ROOT / os.environ.get("VENV", ".venv") / "bin"
PYTHON = str(BIN / "python")
SECOND_TORCH = os.environ.get("SECOND_TORCH", "2.14.1")
SECOND_TORCH_TOOLS = [
    "numpy",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
]
BUILD_TOOLS = ["setuptools>=77", "ninja", "pybind11"]
LIMIT_SECONDS = 3600  # of one command
CORES = os.cpu_count() or 1
WORKERS = ["-n", str(min(CORES, 8)), "--dist", "worksteal"]  # of pytest
# Where the installation is checked and not the kernels' speed.
QUICK = {"CXXFLAGS": "-O1", "SANA_EXT_CUDA_ARCHITECTURES": "90"}
QUICK_BUILD = QUICK | {"SANA_EXT_BUILD": "cpu"}
# What makes torch's own kernels choose as on a processor without AVX-512, beside our SANA_EXT_CPU_ISA.
AVX2 = {
    "SANA_EXT_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
PACKAGES = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "clang++": "clang",
    "nm": "binutils",
    "c++filt": "binutils",
}

PARTS: dict[str, Callable[[], str]] = {}
log_path = OUT / "check.log"


class Failed(Exception):
    pass


def part(function: Callable[[], str]) -> Callable[[], str]:
    PARTS[function.__name__.replace("_", "-")] = function
    return function


def run(command: list[str | Path], env: dict[str, str] | None = None, cwd: Path = ROOT, fails_with: str = "") -> str:
    """Runs, logs, returns the output; with `fails_with`, the command must fail and say so."""
    process = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=LIMIT_SECONDS,
    )
    shown = " ".join([*(f"{k}={v}" for k, v in (env or {}).items()), *map(str, command)])
    with log_path.open("a") as log:
        log.write(f"$ {shown}\n{process.stdout}\n")
    if fails_with:
        if process.returncode == 0 or fails_with not in process.stdout:
            raise Failed(f"expected a failure that says {fails_with!r}: {shown}\n{process.stdout[-2000:]}")
    elif process.returncode:
        errors = [line for line in process.stdout.splitlines() if re.search(r"\b(error|FAILED|Error)\b", line)]
        raise Failed(
            "\n".join([f"exit code {process.returncode}: {shown}", *errors[:20], "...", process.stdout[-3000:]])
        )
    return process.stdout


def need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({PACKAGES.get(tool, tool) for tool in missing}))
        raise Failed(f"missing: {', '.join(missing)} (on Debian and Ubuntu: apt-get install {packages})")


def last_line(text: str, pattern: str) -> str:
    found = [line for line in text.splitlines() if re.search(pattern, line)]
    return found[-1].strip() if found else ""


def op_tests() -> list[str]:
    """tests/ops/test_<family>.py of every family of ops."""
    stems = [p.stem for p in sorted((ROOT / "sana_ext/ops").glob("[!_]*.py"))]
    return [f"tests/ops/test_{stem}.py" for stem in stems if (ROOT / f"tests/ops/test_{stem}.py").exists()]


def pytest(python: str | Path, env: dict[str, str], *args: str | Path, cwd: Path = ROOT) -> str:
    if not args:
        raise Failed("no test file was found, and pytest without one would run the whole suite")
    return last_line(run([python, "-m", "pytest", *WORKERS, *args], env, cwd), r"\d+ (passed|failed)")


def ctest(name: str, *options: str, without: str = "") -> str:
    build = ROOT / "build" / name
    tools = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={BIN}/ninja"]
    run([BIN / "cmake", "-S", ROOT, "-B", build, *tools, *options])
    run([BIN / "cmake", "--build", build])
    command = [BIN / "ctest", "--test-dir", build, f"-j{CORES}", "--output-on-failure", "--no-tests=error"]
    return last_line(
        run([*command, "-E", without] if without else command),
        "tests passed",
    )


def venv(folder: Path, packages: list[str], shares: bool = False) -> Path:
    """A virtual environment, kept from run to run; with `shares` it also sees the packages of the main one."""
    stamp = folder / (".installed-" + re.sub(r"[^\w.=-]", "", "-".join(packages)))
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        run([PYTHON, "-m", "venv", folder])
        if packages:
            run([folder / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "-q", *packages])
        if shares:
            # Python 3.11's venv brings an old setuptools of its own, which would hide the shared one.
            run([folder / "bin/python", "-m", "pip", "uninstall", "-q", "-y", "setuptools"])
            purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
            theirs = run([folder / "bin/python", "-c", purelib]).strip()
            Path(theirs, "shared.pth").write_text(run([PYTHON, "-c", purelib]))
        stamp.touch()
    return folder / "bin/python"


@part
def test() -> str:
    """make test: the environment, the build, the whole suite"""
    report = OUT / "test.xml"
    summary = last_line(run(["make", "test", f"PYTEST_ARGS=--junitxml={report}"]), r"\d+ (passed|failed)")
    skips = Counter(e.get("message", "") for e in ElementTree.parse(report).iter("skipped"))
    gpu = sum(n for reason, n in skips.items() if re.search("GPU|CUDA", reason, re.IGNORECASE))
    others = "".join(f"\n    skipped {n}: {reason}" for reason, n in sorted(skips.items()))
    return f"{summary}; {gpu} tests skipped for lack of a GPU{others}"


@part
def lint() -> str:
    """ruff, ruff format, mypy, prose, clang-format"""
    run(["make", "lint"])
    return "clean"


@part
def cpp() -> str:
    """ctest: the torch-free kernels at every instruction set level, by g++"""
    return ctest("cmake")


@part
def clang() -> str:
    """the same by clang++"""
    need("clang++")
    return ctest("clang", "-DCMAKE_CXX_COMPILER=clang++")


@part
def sanitizers() -> str:
    """the same under AddressSanitizer and UndefinedBehaviorSanitizer"""
    return ctest("sanitizers", "-DSANA_EXT_SANITIZE=ON")


@part
def neon() -> str:
    """the CPU kernels cross-compiled for AArch64, under qemu-user"""
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    # The emulator's CUDA kernels know no instruction sets of the host, and take minutes under qemu.
    return ctest("aarch64", "--toolchain", str(ROOT / "csrc/tests/aarch64.cmake"), without="^test_cuda_")


@part
def emulator() -> str:
    """the op tests of every family with CUDA kernels, answered by those kernels under the emulator"""
    run([PYTHON, "setup.py", "-q", "build_ext", "--inplace"], {"SANA_EXT_BUILD": "emulator"})
    stems = [p.stem for p in sorted((ROOT / "csrc/cuda").glob("*.cpp"))]
    found = (path for stem in ["emulator", *stems] for path in sorted((ROOT / "tests").rglob(f"test_{stem}*.py")))
    return pytest(PYTHON, {"SANA_EXT_EMULATOR": "1"}, *(path for path in found if path.parent.name != "gpu"))


@part
def symbols() -> str:
    """no code of one instruction set level can answer for another"""
    need("nm")
    return run([PYTHON, "scripts/check_symbols.py"]).strip()


@part
def isa_baseline() -> str:
    """the op tests with SANA_EXT_CPU_ISA=baseline"""
    return pytest(PYTHON, {"SANA_EXT_CPU_ISA": "baseline"}, *op_tests())


@part
def isa_avx2() -> str:
    """the op tests as on a processor with AVX2 and no AVX-512"""
    return pytest(PYTHON, AVX2, *op_tests())


@part
def nvcc_wheels() -> str:
    """the CUDA library built by the nvcc of the extra [nvcc], with no other nvcc in sight"""
    extra = (
        "import importlib.metadata as m; print('\\n'.join(r for r in m.requires('sana-ext') if r.endswith('\"nvcc\"')))"
    )
    requirements = [line.split(";")[0].strip() for line in run([PYTHON, "-c", extra]).splitlines()]
    python = venv(ROOT / ".venv-nvcc", requirements, shares=True)
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not os.access(Path(f) / "nvcc", os.X_OK)]
    env = QUICK | {"PATH": os.pathsep.join(folders), "CUDA_HOME": "", "CUDA_PATH": "", "SANA_EXT_BUILD": "cuda"}
    target = OUT / "nvcc-wheels"
    run([python, "setup.py", "-q", "build_ext", "--build-lib", target, "--build-temp", target / "temp"], env)
    if ".venv-nvcc" not in (target / "temp/build.ninja").read_text():
        raise Failed("another nvcc was used")
    return f"libsana_ext_cuda.so: {(target / 'sana_ext/libsana_ext_cuda.so').stat().st_size} bytes"


@part
def kernels() -> str:
    """make kernels: registers, spills, instructions, machine code and PTX of every CUDA kernel"""
    wheels = next((ROOT / ".venv-nvcc").glob("lib/python*/site-packages/nvidia/cu13"), None)
    here = shutil.which("nvcc") or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    env = {"CUDA_HOME": str(wheels)} if wheels and not here else {}
    find = "import sys; sys.path.append('scripts'); import check_kernels as k; print(k.find_cuobjdump() or '')"
    if not run([PYTHON, "-c", find], env).strip():
        folder = ROOT / ".venv-disassembler"
        venv(folder, ["triton"])
        tools = next(folder.glob("lib/python*/site-packages/triton/backends/nvidia/bin"))
        env["PATH"] = f"{os.environ['PATH']}{os.pathsep}{tools}"
    output = run(["make", "kernels"], env | {"CI": "true"})
    return f"{last_line(output, 'kernels in')}; {last_line(output, '^machine code')}"


@part
def second_torch() -> str:
    """libraries built with one torch, op tests under another, in both directions"""
    version = "import torch; print(torch.__version__)"
    other = venv(ROOT / f".venv-torch-{SECOND_TORCH}", [f"torch=={SECOND_TORCH}", *SECOND_TORCH_TOOLS, *BUILD_TOOLS])
    first, second = run([PYTHON, "-c", version]).strip(), run([other, "-c", version]).strip()
    back = OUT / "built-by-second-torch"
    run(
        [other, "setup.py", "-q", "build", "--build-lib", back, "--build-temp", back / "temp"],
        {"SANA_EXT_BUILD": "cpu"},
    )
    shutil.copytree(ROOT / "tests", back / "tests", dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", back)
    built = "import sana_ext; print(sana_ext._extension.build_info()['torch_at_build'])"
    results = []
    # All op tests under the newer torch; two files are enough to see that the older one takes the newer one's build.
    for python, tree, builder, runner, tests in (
        (other, ROOT, first, second, op_tests()),
        (PYTHON, back, second, first, op_tests()[:2]),
    ):
        env = {"PYTHONPATH": str(tree)}
        if run([python, "-c", built], env, tree).strip() != builder:
            raise Failed(f"torch {runner} did not run the libraries that were built with {builder}")
        line = pytest(python, env, *tests, cwd=tree)
        results.append(f"built with {builder}, run with {runner}: {line}")
    loaded = "import sana_ext, torch; print(sana_ext._extension.libraries()['cuda'].loaded, torch.version.cuda)"
    if (ROOT / "sana_ext/libsana_ext_cuda.so").exists():
        results.append(
            f"CUDA library loaded, CUDA of torch: {run([other, '-c', loaded], {'PYTHONPATH': str(ROOT)}).strip()}"
        )
    return "\n     ".join(results)


@part
def install() -> str:
    """README's installation, line by line in a clean checkout with a space in its path; the source distribution"""
    import readme_commands

    checkout, lines = OUT / "a clean checkout", []
    shutil.rmtree(checkout, ignore_errors=True)
    for name in run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]).split("\0"):
        if name and (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    shutil.rmtree(OUT / "fresh", ignore_errors=True)
    python = venv(OUT / "fresh", [], shares=True)
    # The isolated build takes the torch that is tested here, not the newest; both builds make the CPU library alone.
    pinned, version = OUT / "constraint.txt", "from importlib.metadata import version; print(version('torch'))"
    pinned.write_text(f"torch=={run([PYTHON, '-c', version]).strip()}\n")
    constraint = {"PIP_CONSTRAINT": str(pinned), "PIP_BUILD_CONSTRAINT": str(pinned)}
    env = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", **QUICK_BUILD, **constraint}
    for command in readme_commands.install_commands():
        output = run(["bash", "-euo", "pipefail", "-c", command], env, checkout)
        lines.append(last_line(output, "self-test"))
        if command.startswith("pip"):
            report = run([python, "-m", "sana_ext"], env, checkout)
            library = OUT / "fresh/lib"
            if f"sources of {checkout}: {library}" not in report or "No compiled kernel" in report:
                raise Failed(f"after {command!r} the checkout does not use the installed library:\n{report}")
            run([python, "-m", "pip", "uninstall", "-q", "-y", "sana-ext"] if "isolation" not in command else ["true"])
    return f"{lines[-1]}; source distribution: {install_source_distribution(python)}"


def require_whole(archive: Path) -> None:
    """Fails unless the archive has every file of the checkout, and pytest finds every test in it."""
    shutil.unpack_archive(archive, archive.parent)
    root = next(path for path in archive.parent.iterdir() if path.is_dir())
    missing = [name for name in run(["git", "ls-files", "-z"]).split("\0") if name and not (root / name).exists()]
    if missing:
        raise Failed(f"the source distribution lacks {', '.join(missing)}")
    collect = [PYTHON, "-m", "pytest", "--collect-only", "-q"]
    theirs, ours = (run(collect, {"PYTHONPATH": str(tree)}, tree) for tree in (root, ROOT))
    if theirs != ours:
        raise Failed(f"pytest finds other tests in the source distribution:\n{theirs}")


def install_source_distribution(python: Path) -> str:
    """From an empty folder; once without kernels, whose wheel must not be found in pip's cache afterwards."""
    dist, empty, cache = OUT / "dist", OUT / "empty", OUT / "pip-cache"
    for folder in (dist, cache):
        shutil.rmtree(folder, ignore_errors=True)
    empty.mkdir(exist_ok=True)
    run([PYTHON, "setup.py", "-q", "sdist", "-d", dist])
    archive = next(dist.glob("*.tar.gz"))
    require_whole(archive)
    requirement = f"sana-ext @ {archive.as_uri()}"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--cache-dir", cache, "install", "-q"]
    pip += ["--force-reinstall", "--no-build-isolation", "--no-deps", requirement]
    loaded = [
        python,
        "-c",
        "import sana_ext; print(sana_ext.__file__, sana_ext.kernel_info('norm_modulate')[0].forward)",
    ]
    for mode, forward in (("none", "default"), ("cpu", "compiled")):
        run(pip, {**QUICK_BUILD, "SANA_EXT_BUILD": mode})
        where = run(loaded, cwd=empty).strip()
        if not where.startswith(str(OUT / "fresh")) or not where.endswith(forward):
            raise Failed(f"installed with SANA_EXT_BUILD={mode}: {where}")
    return last_line(run([python, "-m", "sana_ext"], cwd=empty), "self-test")


@part
def build_modes() -> str:
    """SANA_EXT_BUILD=auto|none|cpu|cuda build what they say; without any library the package works and says so"""
    setup = f"import runpy; s = runpy.run_path({str(ROOT / 'setup.py')!r}, run_name='setup'); nvcc = s['find_nvcc']()"
    nvcc = run([PYTHON, "-c", f"{setup}; print('' if s['why_no_cuda'](nvcc) else nvcc)"]).strip()
    expected = {"none": set(), "cpu": {"cpu"}, "auto": {"cpu", "cuda"} if nvcc else {"cpu"}}
    if nvcc:
        expected["cuda"] = {"cpu", "cuda"}
    temp = OUT / "modes-temp"
    for mode, libraries in expected.items():
        target = OUT / f"mode-{mode}"
        shutil.rmtree(target, ignore_errors=True)
        run(
            [PYTHON, "setup.py", "-q", "build", "--build-lib", target, "--build-temp", temp],
            QUICK | {"SANA_EXT_BUILD": mode},
        )
        found = {p.stem.removeprefix("libsana_ext_") for p in target.glob("sana_ext/libsana_ext_*.so")}
        if found != libraries or bool(list(target.glob("sana_ext/_C*.so"))) != bool(libraries):
            raise Failed(f"SANA_EXT_BUILD={mode} built {sorted(found)}, expected {sorted(libraries)}")
    report = run([PYTHON, "-m", "sana_ext"], {"PYTHONPATH": str(OUT / "mode-none")}, OUT / "mode-none")
    if "not built" not in report:
        raise Failed(f"python -m sana_ext does not say that nothing was built:\n{report}")
    without = "" if nvcc else " (no nvcc that compiles here: cuda not tried)"
    return f"{', '.join(expected)}{without}; without libraries: {last_line(report, 'self-test')}"


@part
def benchmarks() -> str:
    """every benchmark runs on small shapes and passes its correctness gate"""
    scripts = {script: script.read_text() for script in sorted((ROOT / "benchmarks").glob("*.py"))}
    quick = {script: "--quick" for script in scripts if script.stem.startswith("bench_")}
    smoke = {script: "--smoke" for script, text in scripts.items() if '"--smoke"' in text}
    for script, option in {**quick, **smoke}.items():
        run([PYTHON, script, option])
    return ", ".join(script.stem for script in {**quick, **smoke})


@part
def experiments() -> str:
    """every experiment with the budget `smoke`, from its cells to table and figure; and the tables of docs/results again"""
    out, names = OUT / "experiments", "import sana15.experiments as e; print(*e.EXPERIMENTS)"
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    run([BIN / "sana15", "reproduce", "--budget", "smoke", "--out", out], {"OMP_NUM_THREADS": str(CORES)})
    spent = time.monotonic() - began
    for name in run([PYTHON, "-c", names]).split():
        table, figure = out / name / f"{name}.md", out / name / f"{name}.png"
        if not figure.exists() or not re.search(r"\b(\d+) of \1 cells", table.read_text()):
            raise Failed(f"{name} has no whole table and figure")
    return f"all in {spent:.0f} s; {results_again()}"


def results_again() -> str:
    """Makes the tables of docs/results again from their ledgers: a table that was edited, or that another code made, differs."""
    stored, out = ROOT / "docs/results", OUT / "results"
    shutil.rmtree(out, ignore_errors=True)
    kept = sorted(path.parent for path in stored.glob("*/options.json"))
    for folder in kept:
        (out / folder.name).mkdir(parents=True)
        for name in ("options.json", f"{folder.name}.json"):
            shutil.copy(folder / name, out / folder.name)
        run([BIN / "sana15", "reproduce", folder.name, "--budget", "full", "--out", out, "--report"])
        if (out / folder.name / f"{folder.name}.md").read_text() != (folder / f"{folder.name}.md").read_text():
            raise Failed(f"docs/results/{folder.name}/{folder.name}.md is not what its ledger says")
    return f"{len(kept)} stored tables are what their ledgers say"


@part
def readme() -> str:
    """the commands and examples of README.md that are marked as checked"""
    return last_line(run([PYTHON, "scripts/readme_commands.py"]), "blocks")


def main() -> int:
    global log_path
    chosen = sys.argv[1:] or list(PARTS)
    if chosen == ["--list"]:
        print("\n".join(f"{name:<14} {function.__doc__}" for name, function in PARTS.items()))
        return 0
    if unknown := [name for name in chosen if name not in PARTS]:
        print(f"unknown: {', '.join(unknown)}; there is {', '.join(PARTS)}")
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    if chosen[0] != "test" and not Path(PYTHON).exists():
        chosen = ["test", *chosen]
    results, start = [], time.monotonic()
    for name in chosen:
        print(f"{name}: {PARTS[name].__doc__}", flush=True)
        log_path = OUT / f"{name}.log"
        log_path.unlink(missing_ok=True)
        began = time.monotonic()
        try:
            line, ok = PARTS[name](), True
        except (Failed, subprocess.TimeoutExpired, OSError, StopIteration) as error:
            line, ok = f"{type(error).__name__}: {error}", False
        results.append((name, ok, time.monotonic() - began))
        print(f"  {'ok' if ok else 'FAILED'} {results[-1][2]:.0f} s  {line}\n", flush=True)
    print("\n".join(f"{name:<14} {'ok' if ok else 'FAILED':<7} {seconds:6.0f} s" for name, ok, seconds in results))
    failed = sum(not ok for _, ok, _ in results)
    print(f"{time.monotonic() - start:.0f} s in all")
    print(f"check: {len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
