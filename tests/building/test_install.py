"""What an installation does: whose libraries a source tree uses, what a missing one says, what a build refuses to do."""

import os
import runpy
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import sana_ext
from sana_ext import _extension, _sources
from sana_ext.ops import _library

PACKAGE = Path(sana_ext.__file__).parent
ROOT = PACKAGE.parent
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")
needs_cpu_library = pytest.mark.skipif(not (PACKAGE / "libsana_ext_cpu.so").exists(), reason="no CPU library here")


@pytest.fixture(scope="module")
def setup():
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def copy_tree(folder):
    """A checkout: the sources, nothing compiled."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", _sources.RECORD)
    for name in ("csrc", "sana_ext"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "setup.py", folder)
    return folder


def install(checkout, site):
    """The package of `checkout` with this environment's CPU library, as if it had been built there and installed."""
    shutil.copytree(checkout / "sana_ext", site / "sana_ext")
    shutil.copy(PACKAGE / "libsana_ext_cpu.so", site / "sana_ext")
    _sources.write_record(site / "sana_ext", {"cpu": _sources.fingerprint(checkout)}, "no nvcc anywhere")
    return site


def python(*arguments, cwd, path=(), **env):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **env}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


REPORT = """
import sana_ext, sana_ext.__main__
print(sana_ext.__file__)
print(sana_ext.kernel_info("norm_modulate")[0].forward)
print(sana_ext.__main__.report())
"""


@needs_cpu_library
def test_a_checkout_uses_the_installed_copy_of_its_sources_and_says_so(tmp_path):
    checkout = copy_tree(tmp_path / "a checkout")
    site = install(checkout, tmp_path / "site")
    report = python("-c", REPORT, cwd=checkout, path=[site])
    assert report.returncode == 0, report.stderr
    file, forward, *lines = report.stdout.splitlines()
    assert (Path(file).parent, forward) == (checkout / "sana_ext", "compiled")
    (line,) = [line for line in lines if line.startswith("libsana_ext_cpu.so:")]
    assert f"loaded from the installed copy, which was built from the sources of {checkout}" in line
    assert str(site / "sana_ext/libsana_ext_cpu.so") in line
    assert any("not built; no nvcc anywhere" in line for line in lines)  # what pip does not show
    assert not report.stderr


@pytest.fixture
def shadowed(tmp_path, monkeypatch):
    """A checkout and, in a later folder of sys.path, a copy of it that was built and installed."""
    checkout = copy_tree(tmp_path / "checkout")
    package = tmp_path / "site/sana_ext"
    package.mkdir(parents=True)
    (package / "libsana_ext_cpu.so").touch()
    _sources.write_record(package, {"cpu": _sources.fingerprint(checkout)}, None)
    monkeypatch.setattr(sys, "path", [str(checkout), str(tmp_path / "empty"), str(package.parent)])
    return checkout / "sana_ext", package


def test_the_installed_copy_is_found(shadowed):
    own, installed = shadowed
    assert _sources.home(own) == (
        installed,
        f"loaded from the installed copy, which was built from the sources of {own.parent}",
    )
    (own / "libsana_ext_cuda.so").touch()
    assert _sources.home(own) == (own, "")  # what lies in the folder itself comes first
    assert _sources.home(installed) == (installed, "")


@pytest.mark.parametrize("changed", ["csrc/cpu/linear.cpp", "csrc/cuda/kernels/new.cuh", "setup.py"])
def test_libraries_of_other_sources_are_not_taken(shadowed, changed):
    own, installed = shadowed
    with (own.parent / changed).open("a") as file:
        file.write("\n")
    against = f"those in {installed} were built from other sources than {own.parent} has: install it again"
    assert _sources.home(own) == (own, against)


@pytest.mark.parametrize("record", ["{torn", "[]", '{"sources": 1}', "{}", None])
def test_libraries_without_a_record_are_not_taken(shadowed, record):
    own, installed = shadowed
    (installed / _sources.RECORD).unlink()
    if record is not None:
        (installed / _sources.RECORD).write_text(record)
    assert _sources.home(own)[0] == own


def test_a_later_copy_of_the_same_sources_is_found(shadowed, monkeypatch, tmp_path):
    own, installed = shadowed
    stale = shutil.copytree(installed, tmp_path / "stale/sana_ext")
    _sources.write_record(stale, {"cpu": "of other sources"}, None)
    monkeypatch.setattr(sys, "path", [str(stale.parent), *sys.path])
    assert _sources.home(own)[0] == installed


@needs_cpu_library
def test_the_report_names_what_was_not_taken(tmp_path):
    checkout = copy_tree(tmp_path / "checkout")
    site = install(checkout, tmp_path / "site")
    (checkout / "csrc/common/new.h").touch()
    report = python("-c", REPORT, cwd=checkout, path=[site])
    assert report.returncode == 0, report.stderr
    assert report.stdout.splitlines()[1] == "default"
    assert f"not built; those in {site / 'sana_ext'} were built from other sources" in report.stdout


def test_the_tests_of_the_kernels_are_no_part_of_the_fingerprint(tmp_path):
    checkout = copy_tree(tmp_path)
    before = _sources.fingerprint(checkout)
    (checkout / "csrc/tests/test_new.cpp").write_text("int main() {}\n")
    assert _sources.fingerprint(checkout) == before
    assert _sources.fingerprint(tmp_path / "sana_ext") is None


def test_an_outdated_library_in_the_source_tree_is_reported(tmp_path, monkeypatch):
    checkout = copy_tree(tmp_path)
    monkeypatch.setattr(_extension, "_package", checkout / "sana_ext")
    sources = {"cpu": _sources.fingerprint(checkout), "cuda": "of other sources"}
    _sources.write_record(checkout / "sana_ext", sources, None)
    assert _extension.outdated() == ["libsana_ext_cuda.so"]


WARNED = """
import threading, warnings
import torch, sana_ext
x, c = torch.randn(2, 5, 8), torch.randn(2, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sana_ext.kernel_info()
    sana_ext.linear(x, torch.randn(3, 8))
    sana_ext.cross_attention(*(torch.randn(1, 4, 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)))
    assert not caught, caught[0].message  # torch's own answers these with the library too
    {first}
    threads = [threading.Thread(target=sana_ext.norm_modulate, args=(x, c, c)) for _ in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    sana_ext.gated_residual(x, x, c)
print(len(caught), caught[0].category.__name__, caught[0].message)
"""
FIRST = {
    "threads": "",
    "compiled": "torch.compile(sana_ext.norm_modulate, fullgraph=True, backend='eager')(x, c, c)",
}


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_a_missing_library_is_one_warning_at_the_first_op(tmp_path, first):
    checkout = copy_tree(tmp_path)
    result = python("-c", WARNED.format(first=first), cwd=checkout)
    assert result.returncode == 0, result.stderr
    expected = "1 RuntimeWarning sana_ext: libsana_ext_cpu.so is missing (not built): ops on cpu run their PyTorch"
    assert result.stdout.startswith(expected)


def test_the_library_of_the_tensors_device_counts(monkeypatch):
    called = _library._reporting("norm_modulate_forward", lambda x: x)
    monkeypatch.setattr(_library, "MISSING", {"cuda": "of another device"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called(torch.ones(1))
        called([torch.ones(1)])
    monkeypatch.setattr(_library, "_device", lambda args: "cuda")
    with pytest.warns(RuntimeWarning, match="of another device"):
        called(torch.ones(1))
    assert not _library.MISSING


def test_every_op_without_a_cuda_kernel_is_known():
    kernels = "".join(source.read_text() for source in (ROOT / "csrc/cuda").glob("*.cpp"))
    assert {op for op in _library.OPS if f'"{op}"' not in kernels} == _library.NOT_COMPILED["cuda"]


# Builds


def build(command, folder, mode, cwd=ROOT, **env):
    arguments = ["setup.py", "-q", *command, "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    environment = {**os.environ, "SANA_EXT_BUILD": mode, **env}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


#: Writes what a compiler is asked for, and reads what it is given.
COMPILER = """
for word; do
  case "$last" in -o|-MF) : > "$word" || exit 1 ;; -c) [ -r "$word" ] || exit 1 ;; esac
  last=$word
done"""


@pytest.mark.parametrize("name", ["two words", "it's $HOME", 'a"b', "q: ü#(d)&;", "tab\there"])
def test_a_folder_of_any_name_builds(tmp_path, name):
    folder = tmp_path / name
    copy_tree(folder / "checkout")
    cxx = program(tmp_path / "my tools/c++", COMPILER)
    result = build(["build_ext"], folder, "cpu", cwd=folder / "checkout", CXX=str(cxx))
    assert result.returncode == 0, result.stderr + result.stdout
    built = {file.name for file in (folder / "lib/sana_ext").iterdir()}
    assert {"libsana_ext_cpu.so", _sources.RECORD} <= built
    assert (folder / "temp/csrc/cpu/linear.cpp.o").exists()


def test_words_of_cxx(setup, monkeypatch, tmp_path):
    plain = program(tmp_path / "my tools" / "c++", "")
    for wanted, words, host in (
        (str(plain), [str(plain)], str(plain)),
        ("ccache g++ -m64", ["ccache", "g++", "-m64"], "g++"),
        ("", ["c++"], "c++"),
    ):
        monkeypatch.setenv("CXX", wanted)
        assert (setup["compiler"](), setup["host_compiler"]()) == (words, host)


LACKING = {
    "compiler": ({"CXX": "no-such-compiler"}, "needs a C++ compiler (no-such-compiler)"),
    "ninja": ({"PATH": "/nowhere", "CXX": "/bin/true"}, "needs ninja (pip install ninja)"),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_auto_builds_the_cpu_library_or_fails_and_names_none(setup, monkeypatch, lacking):
    env, says = LACKING[lacking]
    monkeypatch.delenv("SANA_EXT_BUILD", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    find_spec = setup["importlib"].util.find_spec
    monkeypatch.setattr(setup["importlib"].util, "find_spec", lambda name: None if name == lacking else find_spec(name))
    with pytest.raises(SystemExit) as error:
        setup["choose"]()
    line = f"sana_ext: cannot build the kernels: {says}; SANA_EXT_BUILD=none installs without kernels"
    assert str(error.value) == line
    monkeypatch.setenv("SANA_EXT_BUILD", "none")
    assert setup["choose"]().libraries == []


def test_a_compiler_that_compiles_nothing_fails_and_names_none(tmp_path):
    cxx = program(tmp_path / "c++", "echo broken >&2; exit 1")
    result = build(["build_ext"], tmp_path, "cpu", CXX=str(cxx))
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].endswith("SANA_EXT_BUILD=none installs without kernels")
    assert not list(tmp_path.rglob(_sources.RECORD))


@pytest.mark.parametrize("command", ["egg_info", "sdist"])
def test_metadata_and_source_distribution_need_no_compiler(tmp_path, command):
    arguments = {"egg_info": ["egg_info", "-e", str(tmp_path)], "sdist": ["sdist", "-d", str(tmp_path)]}[command]
    env = {**os.environ, "CXX": "no-such-compiler", "SANA_EXT_BUILD": "auto"}
    result = subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=ROOT, env=env, capture_output=True)
    assert result.returncode == 0, result.stderr


NVCC = """
case "$*" in *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.1'; exit ;; esac
"""
REFUSES = NVCC + "echo 'In file included from x' >&2; echo 'host_config.h: error: unsupported GNU version!' >&2; exit 1"


@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_cuda_is_built_where_nvcc_compiles(setup, monkeypatch, capsys, tmp_path, mode):
    program(tmp_path / "bin/nvcc", REFUSES)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("SANA_EXT_BUILD", mode)
    says = f"{tmp_path}/bin/nvcc cannot compile with c++ for 80 89 90 90+PTX: host_config.h: error: unsupported GNU version!"
    if mode == "cuda":
        with pytest.raises(SystemExit) as error:
            setup["choose"]()
        assert str(error.value) == f"SANA_EXT_BUILD=cuda cannot be met: {says}"
    else:
        plan = setup["choose"]()
        assert (plan.libraries, plan.nvcc, plan.why_no_cuda) == (["cpu"], None, says)
        assert capsys.readouterr().err.splitlines() == [f"sana_ext: building CPU kernels only: {says}"]
    program(tmp_path / "bin/nvcc", NVCC)
    assert setup["choose"]().libraries == ["cpu", "cuda"]


def wheels(folder, mode, root=ROOT, **env):
    """Builds a wheel in the source tree `root`; its name, or the last line of the failure."""
    dist = folder / "dist"
    result = build(["build", "--build-base", str(folder / "base")], folder, mode, cwd=root, **env)
    assert result.returncode == 0, result.stderr
    arguments = ["bdist_wheel", "--skip-build", "--bdist-dir", str(folder / "bdist"), "--dist-dir", str(dist)]
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder / "base"), *arguments]
    result = subprocess.run(
        command, cwd=root, env={**os.environ, "SANA_EXT_BUILD": mode, **env}, capture_output=True, text=True
    )
    if result.returncode:
        return result.stderr.strip().splitlines()[-1]
    (wheel,) = dist.iterdir()
    return wheel.name


def metadata(root):
    """What setup.py reads beside the package."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    return root


def test_a_wheel_without_kernels_is_never_found_in_a_cache(tmp_path):
    own = metadata(copy_tree(tmp_path / "checkout"))
    assert wheels(tmp_path / "1", "none", own) == "sana_ext-0.1.0-py3-none-any.whl"
    by_pip = metadata(copy_tree(tmp_path / "pip-install-x1y2/sana-ext_0a"))
    assert wheels(tmp_path / "2", "none", by_pip) == "sana_ext-0.1.0-py3-none-without_kernels.whl"
    with zipfile.ZipFile(tmp_path / "2/dist/sana_ext-0.1.0-py3-none-without_kernels.whl") as wheel:
        assert "Tag: py3-none-any" in wheel.read("sana_ext-0.1.0.dist-info/WHEEL").decode()  # what `pip check` reads
    by_uv = metadata(copy_tree(tmp_path / "uv/git-v2/checkouts/0a/1b"))
    (tmp_path / "uv/CACHEDIR.TAG").touch()
    assert wheels(tmp_path / "3", "none", by_uv).startswith("SANA_EXT_BUILD=none: uv would keep this wheel")


def test_uv_without_a_cache_takes_a_wheel_without_kernels(tmp_path):
    root = metadata(copy_tree(tmp_path / ".tmpA1/sdists-v11/0a"))
    (tmp_path / ".tmpA1/CACHEDIR.TAG").touch()
    assert wheels(tmp_path / "1", "none", root, TMPDIR=str(tmp_path)) == "sana_ext-0.1.0-py3-none-any.whl"


def test_what_an_earlier_build_left_is_not_in_the_wheel(tmp_path):
    left = tmp_path / "lib/sana_ext/libsana_ext_cuda.so"
    left.parent.mkdir(parents=True)
    left.touch()
    assert build(["build_ext"], tmp_path, "cpu", CXX=str(program(tmp_path / "c++", COMPILER))).returncode == 0
    assert not left.exists()


def test_the_package_is_quiet_where_its_library_is_there():
    assert all(not _extension.libraries()[device].loaded for device in _library.MISSING)
