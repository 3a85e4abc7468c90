"""The benchmark harness: correctness gate, interleaved timing, machine ceilings, table and JSON.

A case is a set of columns (callables that do the same work) on one shape. Before anything is timed the gate compares
`ours` with `eager` by the rule of the tests: err(ours) <= 2 err(eager) + 4 eps32 max|truth|, truth being eager in fp64 on
the same inputs. A red gate prints no number and makes the run fail. Columns are timed in turn, round by round, so that a
machine whose speed drifts slows them alike; a ratio is the median of the rounds' ratios, its spread the quartiles.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tables
import torch

EPS32 = torch.finfo(torch.float32).eps
FORCING = (
    "SANA_EXT_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
)


@dataclass
class Case:
    """One row of a table. `columns` maps eager / compile / ours to callables; `flops` and `bytes` are the least possible."""

    op: str
    shape: str
    dtype: torch.dtype
    columns: dict[str, Callable[[], Any]]
    gate: Callable[[], None]
    flops: float = 0.0
    bytes: float = 0.0
    rounds: int | None = None


def arguments(description: str, **integers: int | tuple[int, ...]) -> argparse.Namespace:
    """The options of every benchmark; `integers` adds --NAME with its default for a benchmark's own sizes."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in integers.items():
        several = "+" if isinstance(default, tuple) else None
        parser.add_argument(f"--{name}", type=int, nargs=several, default=default, help=f"default {default}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    parser.add_argument("--images", type=int, nargs="+", default=[1], metavar="B", help="batch sizes (default 1)")
    parser.add_argument("--cold", action="store_true", help="empty the GPU's L2 cache before every call")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs: the kernels' time, not the launches'")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds per case (default 9)")
    parser.add_argument("--quick", action="store_true", help="small shapes, 2 rounds: checks that the benchmark runs")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile column")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="run only cases with all this in their name"
    )
    parser.add_argument("--json", type=Path, help="append the results to this file (default: print the table only)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if (args.cold or args.graph) and args.device != "cuda":
        parser.error("--cold and --graph need --device cuda")
    if args.quick:
        args.rounds = 2
    torch.set_num_threads(args.threads)
    return args


def wanted(args: argparse.Namespace, op: str, shape: str, dtype: torch.dtype) -> bool:
    """Whether --only picks the case; asked before its tensors or models are made."""
    return all(text in label(op, shape, dtype) for text in args.only)


def label(op: str, shape: str, dtype: torch.dtype) -> str:
    return f"{op} {shape} {short(dtype)}"


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def parameters_with_gradients(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: str
) -> list[torch.nn.Parameter]:
    """The same normal values whatever the dtype and device."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        p.grad = torch.randn(shape, generator=generator).to(device, dtype)
        params.append(p)
    return params


def gate(
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: dict[str, torch.Tensor],
    *,
    gradients: bool = False,
) -> Callable[[], None]:
    """The correctness gate for functions of named tensors; its AssertionError names what differs."""

    def run(fn: Callable[..., Any], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = dict(zip(values, leaves(*values.values()))) if gradients else values
        with torch.set_grad_enabled(gradients):
            out = fn(**given)
            outs = out if isinstance(out, tuple) else (out,)
            named = {f"out{i}": o.detach() for i, o in enumerate(outs)}
            if gradients:
                grads = torch.autograd.grad(outs, list(given.values()), [cotangent(o) for o in outs])
                named |= {f"d{k}": g for k, g in zip(given, grads)}
        return named

    def check() -> None:
        truth = run(eager, {k: v.double() for k, v in inputs.items()})
        peer, own = run(eager, inputs), run(ours, inputs)
        for name, t in truth.items():
            assert_no_worse(name, own[name], peer[name], t)

    return check


def assert_no_worse(name: str, ours: torch.Tensor, peer: torch.Tensor, truth: torch.Tensor) -> None:
    scale = truth.abs().max().item()
    for kind, err in (("max", lambda e: e.abs().max().item()), ("rms", lambda e: e.pow(2).mean().sqrt().item())):
        error, allowed = err(ours.double() - truth), 2 * err(peer.double() - truth) + 4 * EPS32 * scale
        assert error <= allowed, f"{name}: {kind} error {error:.3e} > {allowed:.3e}"


def cotangent(out: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(out.device).manual_seed(out.numel())
    return torch.randn(out.shape, generator=generator, dtype=torch.float64, device=out.device).to(out)


def forward(fn: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return fn(**inputs)

    return run


class backward:
    """Times the backward alone: the graph is built at the first call and kept; `saved` is its size in bytes, on a GPU."""

    def __init__(self, fn: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> None:
        self.fn, self.inputs = fn, inputs
        self.saved: int | None = None
        self.built: tuple[Any, Any, Any] | None = None

    def __call__(self) -> Any:
        if self.built is None:
            given = dict(zip(self.inputs, leaves(*self.inputs.values())))
            self.fn(**given)  # what a first call alone allocates, tables and compiled code, does not count
            before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            out = self.fn(**given)
            outs = out if isinstance(out, tuple) else (out,)
            if torch.cuda.is_available():
                kept = sum(o.numel() * o.element_size() for o in outs)
                self.saved = torch.cuda.memory_allocated() - before - kept
            self.built = outs, list(given.values()), [cotangent(o) for o in outs]
        outs, given, cotangents = self.built
        return torch.autograd.grad(outs, given, cotangents, retain_graph=True)


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True)


def time_once(fn: Callable[[], Any], device: str, repeats: int, evict: Callable[[], Any] | None = None) -> float:
    """Seconds per call; with `evict` each call is timed apart, after it."""
    if evict is not None:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            evict()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3 / repeats
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        fn()
    return (time.perf_counter() - begin) / repeats


def evictor() -> Callable[[], Any]:
    """Writes more than any L2 cache holds."""
    buffer = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    return buffer.zero_


def captured(fn: Callable[[], Any]) -> Callable[[], Any]:
    """fn as one CUDA graph; fn itself, said in so many words, where it cannot be captured."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):  # a backward runs on its forward's stream: all on one
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            fn()
    except RuntimeError as error:
        print(f"timed without a graph: {str(error).splitlines()[0]}")
        return fn
    return graph.replay


def measure(case: Case, rounds: int, device: str, cold: bool = False, graph: bool = False) -> dict[str, Any]:
    evict = evictor() if cold else None
    columns = {name: captured(fn) if graph else fn for name, fn in case.columns.items()}
    repeats = {}
    for name, fn in columns.items():  # warm up, and choose repeats so that one sample lasts at least 20 ms
        fn()
        repeats[name] = max(1, int(0.02 / max(time_once(fn, device, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in case.columns}
    for _ in range(case.rounds or rounds):
        for name, fn in columns.items():
            samples[name].append(time_once(fn, device, repeats[name], evict))
    result: dict[str, Any] = {"ms": {name: 1e3 * statistics.median(s) for name, s in samples.items()}, "ratio": {}}
    for name in samples:
        if name != "ours":
            ratios = sorted(a / b for a, b in zip(samples[name], samples["ours"]))
            quartiles = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
            result["ratio"][name] = [statistics.median(ratios), *quartiles]
    saved = {name: getattr(fn, "saved", None) for name, fn in case.columns.items()}
    if any(size is not None for size in saved.values()):
        result["saved_MB"] = {name: round(size / 1e6, 1) for name, size in saved.items() if size is not None}
    if graph:
        result["without_graph"] = [name for name, fn in columns.items() if fn is case.columns[name]]
    return result


def ceilings(device: str) -> dict[str, float]:
    """This machine's measured ceilings: copy bandwidth in GB/s, fp32 and bf16 matrix product in GFLOP/s."""
    size = 1 << 26 if device == "cpu" else 1 << 28
    a, b = torch.ones(size, device=device), torch.empty(size, device=device)
    copy = min(time_once(lambda: b.copy_(a), device, 1) for _ in range(6))
    result = {"copy_GBps": 8 * size / copy / 1e9}
    n = 1536 if device == "cpu" else 8192
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x = torch.randn(n, n, device=device).to(dtype)
        product = time_once(lambda x=x: x @ x, device, 1)
        if product < 1:  # a CPU without bf16 arithmetic takes seconds; once is enough to see that
            product = min(product, *(time_once(lambda x=x: x @ x, device, 1) for _ in range(3)))
        result[f"{label}_GFLOPs"] = 2 * n**3 / product / 1e9
    return result


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str, threads: int) -> dict[str, Any]:
    """Everything a figure must carry: machine, versions, commit, date, command."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": threads,
        "capability": str(
            torch.cuda.get_device_capability() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
        ),
        "forced": {k: os.environ[k] for k in FORCING if k in os.environ},
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(cases: Sequence[Callable[[], Case | None]], args: argparse.Namespace) -> None:
    """Gates, times, prints and records every case; cases are built one at a time so that their memory is freed in between.

    A case that --only leaves out may be None.
    """
    device = args.device
    limits = ceilings(device)
    head = machine(device, args.threads) | {"ceilings": {k: round(v, 1) for k, v in limits.items()}}
    about = ("machine", "capability", "torch", "commit", "date")
    print(", ".join(str(head[k]) for k in about), f"{args.threads} threads", sep=", ")
    if head["forced"]:
        print("forced:", " ".join(f"{k}={v}" for k, v in head["forced"].items()))
    print("ceilings:", ", ".join(f"{k} {v:.0f}" for k, v in limits.items()))
    print("", *tables.LINES, sep="\n")
    failed: list[str] = []
    rows: list[dict[str, Any]] = []
    record = recorder(args.json, head, rows)
    record()
    case = None
    for build in cases:
        case = None  # freed before the next one is made
        case = build()
        if case is None or not wanted(args, case.op, case.shape, case.dtype):
            continue
        if args.no_compile:
            case.columns.pop("compile", None)
        try:
            case.gate()
            result = measure(case, args.rounds, device, args.cold, args.graph)
        except torch.OutOfMemoryError:
            print(f"| {case.op} | {case.shape} | {short(case.dtype)} | does not fit the memory |", flush=True)
            continue
        except AssertionError as error:
            failed.append(label(case.op, case.shape, case.dtype))
            print(f"| {case.op} | {case.shape} | {short(case.dtype)} | wrong: {error} |", flush=True)
            continue
        rate = limits["fp32_GFLOPs"]
        if case.dtype.itemsize == 2:  # 16-bit operands can always be taken to fp32
            rate = max(rate, limits["bf16_GFLOPs"])
        floor = 1e3 * max(case.flops / rate / 1e9, case.bytes / limits["copy_GBps"] / 1e9)
        rows.append({"op": case.op, "shape": case.shape, "dtype": short(case.dtype), "floor_ms": floor} | result)
        print(tables.line(rows[-1]), flush=True)
        if "saved_MB" in result:
            print(
                "kept for the backward, MB:", ", ".join(f"{k} {v}" for k, v in result["saved_MB"].items()), flush=True
            )
        record()
    if failed:
        raise SystemExit(f"wrong results, not timed: {', '.join(failed)}")


def recorder(path: Path | None, head: dict[str, Any], rows: list[dict[str, Any]]) -> Callable[[], None]:
    """Appends the run to the file; called after every case, so that an interruption loses one."""
    if path is None:
        return lambda: None
    path.parent.mkdir(parents=True, exist_ok=True)
    previous = json.loads(path.read_text()) if path.exists() else []

    def record() -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps([*previous, head | {"rows": rows}], indent=1) + "\n")
        part.replace(path)

    return record
