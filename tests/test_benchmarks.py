"""The recorded tables, and the harness: a wrong result is never timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the source tree")
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture
def tables():
    return pytest.importorskip("tables")


@pytest.fixture
def harness():
    return pytest.importorskip("harness")


def test_readme_shows_the_recorded_results():
    done = subprocess.run([sys.executable, BENCHMARKS / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_changed_record_is_noticed(tables, tmp_path):
    path = next((BENCHMARKS / "results").glob("*.json"))
    runs = json.loads(path.read_text())
    row = runs[0]["rows"][0]
    (tmp_path / path.name).write_text(json.dumps(runs))
    before = tables.tables(tmp_path)
    assert tables.line(row) in before
    row["ms"]["ours"] *= 1.1
    (tmp_path / path.name).write_text(json.dumps(runs))
    assert tables.tables(tmp_path) != before


def test_a_later_run_replaces_the_same_command(tables, tmp_path):
    run = json.loads(next((BENCHMARKS / "results").glob("*.json")).read_text())[0]
    (tmp_path / "one.json").write_text(json.dumps([run | {"date": "old"}, run | {"date": "new"}]))
    text = tables.tables(tmp_path)
    assert "new" in text
    assert ", old;" not in text


def case(harness, ours, ran):
    def eager(x):
        return x * 2

    inputs = {"x": torch.randn(4, 50)}

    def timed(**v):
        ran.append("ours")
        return ours(**v)

    columns = {"eager": harness.forward(eager, inputs), "ours": harness.forward(timed, inputs)}
    return harness.Case("double", "4x50", torch.float32, columns, harness.gate(ours, eager, inputs))


def run(harness, monkeypatch, path, ours, ran):
    monkeypatch.setattr(
        harness, "ceilings", lambda device: dict.fromkeys(("copy_GBps", "fp32_GFLOPs", "bf16_GFLOPs"), 1.0)
    )
    monkeypatch.setattr(
        sys, "argv", ["bench.py", "--quick", "--threads", str(torch.get_num_threads()), "--json", str(path)]
    )
    harness.run([lambda: case(harness, ours, ran)], harness.arguments(""))


def test_a_wrong_result_is_not_timed_and_fails(harness, monkeypatch, tmp_path):
    ran = []
    with pytest.raises(SystemExit, match="wrong results, not timed: double 4x50 float32"):
        run(harness, monkeypatch, tmp_path / "r.json", lambda x: x * 2.001, ran)
    assert not ran
    assert json.loads((tmp_path / "r.json").read_text())[0]["rows"] == []


def test_a_right_result_is_recorded(harness, monkeypatch, tmp_path, capsys):
    ran = []
    for _ in range(2):
        run(harness, monkeypatch, tmp_path / "r.json", lambda x: x + x, ran)
    assert ran
    first, second = json.loads((tmp_path / "r.json").read_text())
    (row,) = first["rows"]
    assert set(row["ms"]) == {"eager", "ours"}
    assert row["ratio"]["eager"][0] > 0
    assert first["command"] == second["command"]
    assert "| double | 4x50 | float32 |" in capsys.readouterr().out


def test_an_interruption_loses_one_case(harness, monkeypatch, tmp_path):
    path = tmp_path / "r.json"
    monkeypatch.setattr(
        harness, "ceilings", lambda device: dict.fromkeys(("copy_GBps", "fp32_GFLOPs", "bf16_GFLOPs"), 1.0)
    )
    monkeypatch.setattr(
        sys, "argv", ["bench.py", "--quick", "--threads", str(torch.get_num_threads()), "--json", str(path)]
    )

    def killed():
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            harness.run([lambda: case(harness, lambda x: x + x, []), killed], harness.arguments(""))
    assert [len(record["rows"]) for record in json.loads(path.read_text())] == [1, 1]


@pytest.mark.parametrize("bench", ["linear_attention", "norm_modulate", "glumbconv", "model"])
def test_what_only_leaves_out_is_not_made(harness, monkeypatch, bench):
    """A transformer of 1.6 billion parameters takes minutes."""
    if bench == "model":
        pytest.importorskip("diffusers")
    module = pytest.importorskip(f"bench_{bench}")
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "no such case", "float32"])
    args = harness.arguments("", tokens=64, heads=2, channels=64, pixels=512, loop=1)
    monkeypatch.setattr(torch, "manual_seed", None)
    arguments = {
        "linear_attention": [(args, 1, 64, True, torch.float32, "forward")],
        "norm_modulate": [(args, 1, 64, "norm_modulate", torch.float32, "backward")],
        "glumbconv": [(args, 1, 8, "dwconv_glu", torch.float32, "forward")],
    }
    if bench == "model":
        assert module.block_case(args, 1, torch.float32, "forward") is None
        assert module.step_case(args, torch.bfloat16) is None
    else:
        assert all(module.case(*given) is None for given in arguments[bench])
    assert harness.wanted(args, "no such case forward", "4x4", torch.float32)
    assert not harness.wanted(args, "no such case forward", "4x4", torch.bfloat16)


@pytest.fixture
def gpu_script(tmp_path):
    """benchmarks/gpu.sh with programs that only write down how they were called; a call that names `broken` fails."""
    program = '#!/bin/sh\n[ "$1" = -c ] && echo some-gpu && exit\necho "$@" >> "$CALLS"\ncase "$*" in *$BROKEN*) exit 3;; esac\n'
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)

    def call(*stages, broken="nothing is broken"):
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
            "CALLS": str(calls), "OUT": str(tmp_path / "out"), "BROKEN": broken,
        }  # fmt: skip
        done = subprocess.run([BENCHMARKS / "gpu.sh", *stages], capture_output=True, text=True, env=env)
        return done.returncode, done.stderr, calls.read_text().splitlines()

    return call


def test_gpu_script_runs_what_is_missing(gpu_script):
    code, error, calls = gpu_script("ops", "train", broken="norm_modulate")
    assert code == 1
    assert "failed: ops-norm--cold\n" in error
    assert "attention" not in error
    total = len(calls)
    assert total > 15
    code, error, calls = gpu_script("ops", "train")
    assert (code, error) == (0, "")
    assert 0 < len(calls) < total
    assert all("bench_norm_modulate.py --device cuda" in call for call in calls)
    assert gpu_script("ops", "train") == (0, "", [])
    code, _, calls = gpu_script("all")
    assert code == 0
    assert any("pytest" in call for call in calls)
    assert any("loop 20" in call for call in calls)
    assert gpu_script("autotune")[2] != []


def test_gpu_script_says_what_it_cannot_do(gpu_script):
    assert gpu_script("opps")[:2] == (
        2,
        "gpu.sh: no stage opps; there are build check sanitize ops model train autotune all\n",
    )
    code, error, calls = gpu_script()
    assert (code, calls) == (2, [])
    assert "benchmarks/gpu.sh all" in error


def test_every_option_of_the_gpu_script_exists():
    """Each benchmark that it calls takes the options that it gives."""
    text = (BENCHMARKS / "gpu.sh").read_text()
    for line in text.splitlines():
        words = line.split()
        if (
            not words
            or "bench" not in words[:4]
            or "harness" in line
            or words[0].startswith("#")
            or words[0] == "bench()"
        ):
            continue
        words = words[words.index("bench") :]
        source = (BENCHMARKS / f"bench_{words[2]}.py").read_text() + (BENCHMARKS / "harness.py").read_text()
        for option in (w for w in words if w.startswith("--")):
            name = option.removeprefix("--")
            assert f'"{option}"' in source or f"{name}=" in source, line
