"""``python -m sana_ext``: what was built, which kernel answers which op here, and a self-test of a few seconds."""

from __future__ import annotations

import platform
import sys
import time
import warnings

from . import __version__, _extension, _info, _selftest


def report() -> str:
    lines = [
        f"sana_ext {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        _info.torch_line(),
        "",
    ]
    built = _extension.build_info()
    if built is None:
        lines.append("build: no facts recorded (the module _C was not built)")
    else:
        nvcc = f"; {built['nvcc']} for {built['cuda_architectures']}" if built["nvcc"] else ""
        against = f"torch {built['torch_at_build']}, runs with torch >= {built['torch_target']}"
        lines.append(f"build: compiler {built['compiler']}, {against}{nvcc}")
    for name, library in _extension.libraries().items():
        state = f"{library.reason}: {library.path}" if library.loaded else f"not loaded: {library.reason}"
        lines.append(f"libsana_ext_{name}.so: {state}")
    lines += [
        f"{name}: built from other sources than this folder has now; build it again" for name in _extension.outdated()
    ]
    if not any(library.loaded for library in _extension.libraries().values()):
        lines.append("No compiled kernel is in use: every op runs its PyTorch default, correct but not faster.")
    lines += [_info.cpu_level(), _info.arithmetic(), "", str(_info.kernel_info()), ""]
    return "\n".join(lines)


def self_test() -> bool:
    start = time.perf_counter()
    outcomes = list(_selftest.run())
    failed = [o for o in outcomes if not o.ok]
    for o in failed:
        reason = f"{o.worst}: error {o.ratio:.3g} times the allowed one" if o.ratio < float("inf") else o.worst
        print(f"self-test FAILED: {o.op} on {o.device}, {str(o.dtype).removeprefix('torch.')}: {reason}")
    ops, devices = len({o.op for o in outcomes}), " and ".join(sorted({o.device for o in outcomes}))
    verdict = f"{len(failed)} of {len(outcomes)} comparisons failed" if failed else "all agree with their references"
    print(f"self-test: {ops} ops on {devices}: {verdict} ({time.perf_counter() - start:.1f} s)")
    return not failed


def main() -> int:
    print(report())
    warnings.filterwarnings("ignore", "sana_ext: libsana_ext_")  # the report has just said it
    return 0 if self_test() else 1


if __name__ == "__main__":
    sys.exit(main())
