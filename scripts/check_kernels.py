"""`make kernels`: compiles every csrc/cuda/kernels/*.cu; fails on spills, registers over budget, missing machine code.

The budget stands in the kernel's header: "// Register budget, checked by `make kernels`: name 40, other_name 64". Every
kernel must have one; "name<__*, true> 32" is that of some instantiations. Each object must carry machine code for every
architecture of setup.py, and PTX for newer GPUs. The emulator's test kernels (csrc/tests/*.cu) are compiled too, without
budgets: they use every primitive.

"// Machine code, checked by `make kernels`: name<*, true>: LDG.128 HMMA; other_name: STG.128" in a header demands
instructions of every instantiation that the pattern matches, on every architecture: LDG.128 is any LDG with .128 among
its modifiers. This needs cuobjdump and nvdisasm: of PATH, of CUDA_HOME, beside nvcc, or those in the package triton.
Without them it is not checked, which is a failure where the variable CI is set.
"""

from __future__ import annotations

import concurrent.futures
import fnmatch
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc/cuda/kernels"
TESTS = ROOT / "csrc/tests"
OUT = ROOT / "build/kernels"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<sm>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)


@dataclass(frozen=True)
class Usage:
    """What ptxas reports for one kernel on one architecture."""

    kernel: str
    sm: str
    registers: int
    shared: int
    spills: int


def parse(ptxas: str) -> list[Usage]:
    found = list(ENTRY.finditer(ptxas))
    names = demangle([m["name"] for m in found])
    usage = []
    for m, name in zip(found, names):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        spills = int(m["stores"]) + int(m["loads"])
        usage.append(Usage(name, m["sm"], int(m["registers"]), int(shared[1]) if shared else 0, spills))
    return sorted(usage, key=lambda u: (u.kernel, u.sm))


def demangle(names: list[str]) -> list[str]:
    """Plain names with their template arguments: norm_modulate_forward_kernel, other_kernel<32>."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for line in text.splitlines():
        line = re.sub(r"^void ", "", line.replace("(anonymous namespace)::", ""))
        line = re.sub(r"\([\w:]+\)(\d)", r"\1", line)  # the casts of enumerators and bools among template arguments
        short.append(re.sub(r"\b(?:sana_ext|cuda)::", "", line.split("(")[0]))
    return short


def budgets() -> dict[str, int]:
    found: dict[str, int] = {}
    for header in sorted(KERNELS.glob("*.h")):
        for line in re.findall(r"Register budget, checked by `make kernels`: (.*)", header.read_text()):
            for name, limit in re.findall(r"(\w+(?:<[^>]*>)?) (\d+)", line):
                found[name] = int(limit)
    return found


def budget(kernel: str, limits: dict[str, int]) -> int | None:
    """That of the instantiation, if there is one, else that of the kernel."""
    own = [limit for pattern, limit in limits.items() if "<" in pattern and fnmatch.fnmatchcase(kernel, pattern)]
    return min(own) if own else limits.get(kernel.split("<")[0])


def required_instructions() -> dict[str, list[str]]:
    """Pattern of a kernel's name -> instructions that it must have."""
    found: dict[str, list[str]] = {}
    for header in [*sorted(KERNELS.glob("*.h")), *sorted(TESTS.glob("*.cuh"))]:
        for line in re.findall(r"Machine code, checked by `make kernels`: (.*)", header.read_text()):
            for entry in line.split(";"):
                pattern, _, instructions = entry.strip().rpartition(": ")
                found.setdefault(pattern, []).extend(instructions.split())
    return found


def find_cuobjdump(nvcc: str | None = None) -> str | None:
    """cuobjdump with nvdisasm beside it, which it calls."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [Path(f) for f in os.environ["PATH"].split(os.pathsep) if f]
    folders += [Path(home) / "bin"] if home else []
    folders += [Path(nvcc).parent] if nvcc else []
    folders += [Path(f) / "triton/backends/nvidia/bin" for f in sys.path]
    tools = ("cuobjdump", "nvdisasm")
    return next((str(f / tools[0]) for f in folders if all(shutil.which(t, path=str(f)) for t in tools)), None)


def instructions_in(sass: str) -> dict[tuple[str, str], set[str]]:
    """Output of `cuobjdump -sass` -> the instructions of each (kernel, architecture)."""
    found, kernels = {}, []
    sm = ""
    for line in sass.splitlines():
        if match := re.match(r"\s*arch = sm_(\w+)", line):
            sm = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernels.append((match[1], sm))
            found[kernels[-1]] = set()
        elif kernels and (match := INSTRUCTION.search(line)):
            found[kernels[-1]].add(match[1])
    return {(name, sm): found[mangled, sm] for name, (mangled, sm) in zip(demangle([k for k, _ in kernels]), kernels)}


def missing_instructions(
    found: dict[tuple[str, str], set[str]], required: dict[str, list[str]]
) -> tuple[int, list[str]]:
    """(instructions found of those required, what is wrong)."""
    count, problems = 0, []
    for pattern, wanted in required.items():
        matching = [key for key in found if fnmatch.fnmatchcase(key[0], pattern)]
        if not matching:
            problems.append(f"machine code of {pattern} is demanded, but there is no such kernel")
        for name, sm in matching:
            have = [i.split(".") for i in found[name, sm]]
            for instruction in wanted:
                first, *modifiers = instruction.split(".")
                if any(h[0] == first and set(modifiers) <= set(h[1:]) for h in have):
                    count += 1
                else:
                    problems.append(f"{name} has no {instruction} on sm_{sm}")
    return count, problems


def disassemble(cuobjdump: str, objects: list[Path]) -> dict[tuple[str, str], set[str]]:
    env = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}"}
    found = {}
    for compiled in objects:
        result = subprocess.run([cuobjdump, "-sass", str(compiled)], capture_output=True, text=True, env=env)
        if result.returncode:
            raise SystemExit(f"{cuobjdump} -sass {compiled} failed: {result.stderr}")
        found |= instructions_in(result.stdout)
    return found


def code_in(data: bytes) -> list[set[str]]:
    """For each fat binary in an object or library: {"sm_80", ..., "compute_90"}.

    Layout: magic, version and header size (16 bit each), size (64 bit); then entries of kind (16 bit; 1 is PTX, 2 is
    machine code), version, header size (32 bit), payload size (64 bit), and the architecture at offset 28.
    """
    containers = []
    at = data.find(FATBIN_MAGIC)
    while at >= 0:
        _, header, size = struct.unpack_from("<HHQ", data, at + 4)
        entry, end = at + header, at + header + size
        kinds = set()
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            kinds.add(f"{'compute' if kind == 1 else 'sm'}_{architecture}")
            entry += entry_header + payload
        containers.append(kinds)
        at = data.find(FATBIN_MAGIC, end)
    return containers


def compile_kernel(source: Path, nvcc: str, flags: str) -> tuple[list[Usage], list[str]]:
    target = OUT / f"{source.stem}.o"
    command = [nvcc, *flags.split(), "-Xptxas", "-v", "-c", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return [], [f"{source.name} does not compile:\n{result.stdout}{result.stderr}"]
    return parse(result.stdout + result.stderr), []


def main() -> int:
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    nvcc = setup["find_nvcc"]()
    if reason := setup["why_no_cuda"](nvcc):
        print(f"make kernels: {reason}")
        return 1
    print(f"nvcc {'.'.join(map(str, setup['nvcc_version'](nvcc)))}: {nvcc}")
    expected = {
        f"compute_{a.removesuffix('+PTX')}" if a.endswith("+PTX") else f"sm_{a}" for a in setup["CUDA_ARCHITECTURES"]
    }
    OUT.mkdir(parents=True, exist_ok=True)
    limits, seen, used, problems = budgets(), set(), set(), []
    sources = [*sorted(KERNELS.glob("*.cu")), *sorted(TESTS.glob("*.cu"))]
    flags = f"{setup['NVCC_FLAGS']} {setup['gencode']()}"
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda source: compile_kernel(source, nvcc, flags), sources))
    print(f"{'kernel':<60} {'arch':<7} {'registers':>9} {'budget':>7} {'shared':>7} {'spills':>7}")
    for source, (usage, errors) in zip(sources, results):
        problems += errors
        for u in usage:
            plain = u.kernel.split("<")[0]
            limit = budget(u.kernel, limits)
            if source.parent == KERNELS:
                seen.add(plain)
                used |= {p for p in limits if fnmatch.fnmatchcase(u.kernel, p) or p == plain}
            print(f"{u.kernel:<60} sm_{u.sm:<4} {u.registers:>9} {limit or '-':>7} {u.shared:>7} {u.spills:>7}")
            if u.spills:
                problems.append(f"{u.kernel} spills {u.spills} bytes on sm_{u.sm}")
            if limit is None and source.parent == TESTS:
                continue
            if limit is None:
                problems.append(f"{plain} has no register budget in {source.stem}.h")
            elif u.registers > limit:
                problems.append(f"{u.kernel} uses {u.registers} registers on sm_{u.sm}, over its budget of {limit}")
        if not errors:
            if not usage:
                problems.append(f"{source.name}: ptxas reported no kernel")
            carried = code_in((OUT / f"{source.stem}.o").read_bytes())
            if carried != [expected]:
                problems.append(
                    f"{source.name}: expected code for {sorted(expected)}, found {[sorted(c) for c in carried]}"
                )
    problems += [f"{name} has a budget but is no kernel" for name in sorted(set(limits) - used)]
    objects = [OUT / f"{source.stem}.o" for source, (_, errors) in zip(sources, results) if not errors]
    if cuobjdump := find_cuobjdump(nvcc):
        count, missing = missing_instructions(disassemble(cuobjdump, objects), required_instructions())
        problems += missing
        print(f"machine code: {count} demanded instructions found, by {cuobjdump}")
    else:
        print("machine code: not checked, no cuobjdump with nvdisasm (pip install triton has both)")
        if os.environ.get("CI"):
            problems.append("the machine code was not checked")
    for problem in problems:
        print(f"FAILED: {problem}")
    print(f"{len(seen)} kernels in {len(sources)} files carry {', '.join(sorted(expected))}; {len(problems)} problems")
    return 1 if problems or not sources else 0


if __name__ == "__main__":
    sys.exit(main())
