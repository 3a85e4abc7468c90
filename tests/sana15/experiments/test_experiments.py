"""The grid of cells behind `sana15 reproduce`, and the arithmetic of the experiments."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sana15.cli import main
from sana15.experiments import BUDGETS, EXPERIMENTS, grid, load, pruning, trajectory
from sana15.experiments.grid import Cell, Experiment, Place, Report, claim, done, run_cells, write_report
from sana15.experiments.judges import auc
from sana15.experiments.pruning import recovered
from sana15.pruning.healing import Healing
from sana15.pruning.trajectory import CalibrationBatch


@dataclass(frozen=True)
class Options:
    numbers: tuple[int, ...] = (1, 2, 3)


def squares(ran, fails=()):
    """Each number squared, then their sum."""

    def square(number):
        def run(place):
            ran.append(number)
            if number in fails:
                raise ValueError("broken")
            (place.folder / f"{number}.txt").write_text(str(number**2))
            return {"square": number**2}

        return run

    def total(place):
        return {"total": sum(int(p.read_text()) for p in place.folder.glob("*.txt"))}

    def cells(options):
        names = tuple(f"square-{n}" for n in options.numbers)
        return [Cell("total", total, names), *(Cell(n, square(i)) for n, i in zip(names, options.numbers))]

    def report(options, results, folder):
        return Report(f"{len(results)} results", lambda path: path.write_bytes(b"drawn"))

    return Experiment("squares", {"smoke": Options()}, cells, report)


def run(experiment, folder, **given):
    run_cells(experiment, Options(), folder, progress=lambda text: None, **given)


def test_cells_run_once_and_after_what_they_need(tmp_path):
    ran = []
    for _ in range(2):
        run(squares(ran), tmp_path / "s")
    assert ran == [1, 2, 3]
    records = done(squares(ran), Options(), tmp_path / "s")
    assert records["total"]["result"] == {"total": 14}
    assert records["total"].keys() == {"cell", "seconds", "date", "machine", "commit", "torch", "threads", "result"}


def test_a_part_of_the_cells_brings_what_it_needs(tmp_path):
    ran = []
    run(squares(ran), tmp_path / "one", only="square-2")
    assert ran == [2]
    run(squares(ran), tmp_path / "two", only="total")
    assert ran == [2, 1, 2, 3]
    with pytest.raises(ValueError, match="no cell of squares has 'cube' in its name"):
        run(squares(ran), tmp_path / "one", only="cube")


def test_a_cell_that_fails_costs_itself(tmp_path):
    ran = []
    with pytest.raises(ValueError, match="broken"):
        run(squares(ran, fails=[2]), tmp_path / "s")
    run(squares(ran), tmp_path / "s")
    assert ran == [1, 2, 2, 3]


def test_another_processs_cell_is_waited_for(tmp_path, monkeypatch):
    """A locked cell is not computed here; what it comes before waits until its file is there."""
    ran, experiment, folder = [], squares([]), tmp_path / "s"
    claim(folder, Options())
    experiment = squares(ran)
    lock = grid._locked(folder / "locks/square-1")
    assert lock.__enter__()

    def other_is_done(seconds):
        (folder / "shared/1.txt").write_text("1")
        (folder / "cells/square-1.json").write_text(json.dumps({"result": {}}))

    monkeypatch.setattr(time, "sleep", other_is_done)
    run(experiment, folder)
    lock.__exit__(None, None, None)
    assert ran == [2, 3]
    assert done(experiment, Options(), folder)["total"]["result"] == {"total": 14}


KILLED = """
import os, pathlib, sys, time
from sana15.experiments.grid import Cell, Experiment, run_cells
from dataclasses import dataclass

@dataclass(frozen=True)
class Options:
    n: int = 4

def cell(place, i):
    with open("ran", "a") as ran: ran.write(f"{i}\\n")
    if i == 2 and sys.argv[1] == "hang":
        pathlib.Path("hangs").touch()
        time.sleep(60)
    return {"i": i}

cells = lambda o: [Cell(f"c{i}", lambda place, i=i: cell(place, i)) for i in range(o.n)]
run_cells(Experiment("k", {}, cells, None), Options(), pathlib.Path("k"))
"""


def test_a_kill_costs_one_cell(tmp_path):
    (tmp_path / "k.py").write_text(KILLED)
    process = subprocess.Popen([sys.executable, "k.py", "hang"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([sys.executable, "k.py", "on"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "ran").read_text().split() == ["0", "1", "2", "2", "3"]


def test_cells_of_other_options_are_not_mixed_in(tmp_path):
    claim(tmp_path / "s", Options())
    claim(tmp_path / "s", Options())
    with pytest.raises(ValueError, match=r"holds cells with numbers \[1, 2, 3\], now it is \[1\]; another --out"):
        claim(tmp_path / "s", Options((1,)))
    (tmp_path / "s/options.json").unlink()
    with pytest.raises(ValueError, match=r"holds something else: there is no options\.json; another --out"):
        claim(tmp_path / "s", Options())


def test_the_report_says_where_it_comes_from(tmp_path):
    experiment = squares([])
    run(experiment, tmp_path, only="square-1")
    text = write_report(experiment, Options(), tmp_path, "sana15 reproduce squares")
    assert text.startswith("1 results\n\n`sana15 reproduce squares`, 20")
    assert "1 of 4 cells" in text
    assert "![squares](squares.png)" in text
    assert (tmp_path / "squares.md").read_text() == text
    assert json.loads((tmp_path / "squares.json").read_text())["square-1"]["result"] == {"square": 1}
    assert (tmp_path / "squares.png").read_bytes() == b"drawn"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_ledger_without_files_goes_on(tmp_path):
    """A checkout has NAME.json alone: results stay, and what a waiting cell reads is computed again, nothing else."""
    ran = []

    def cell(name, after=()):
        def run(place):
            ran.append(name)
            (place.common / name).write_text(name)
            return {"read": [(place.common / a).read_text() for a in after]}

        return Cell(name, run, after, made=name)

    experiment = Experiment(
        "chain", {}, lambda options: [cell("a"), cell("b", ("a",)), cell("c", ("b",)), cell("d", ("a",))],
        lambda options, results, folder: Report("chain"),
    )  # fmt: skip
    run(experiment, tmp_path / "one/chain", only="b")
    assert ran == ["a", "b"]
    write_report(experiment, Options(), tmp_path / "one/chain", "")
    other = tmp_path / "two/chain"
    other.mkdir(parents=True)
    for name in ("chain.json", "options.json"):
        (other / name).write_bytes((tmp_path / "one/chain" / name).read_bytes())
    (other / "options.json").write_bytes((tmp_path / "one/chain/options.json").read_bytes())
    before = done(experiment, Options(), tmp_path / "one/chain")
    ran.clear()
    run(experiment, other, only="d")
    assert ran == ["a", "d"]
    run(experiment, other)
    assert ran == ["a", "d", "b", "c"]
    assert {name: done(experiment, Options(), other)[name] for name in before} == before


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_budgets_and_cells(name):
    experiment = load(name)
    assert experiment.name == name
    assert tuple(experiment.budgets) == BUDGETS
    for options in experiment.budgets.values():
        names = [cell.name for cell in experiment.cells(options)]
        assert len(set(names)) == len(names)
        assert {a for cell in experiment.cells(options) for a in cell.after} <= set(names)


def test_a_wrong_name_is_one_line(capsys):
    assert main(["reproduce", "growth", "grwth", "--budget", "smoke"]) == 2
    assert "no experiment 'grwth'; there is growth, pruning" in capsys.readouterr().err


def test_the_list_of_cells_computes_nothing(tmp_path, capsys):
    assert main(["reproduce", "optimizers", "--budget", "smoke", "--list", "--out", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "optimizers: scenes-128-00"
    assert not (tmp_path / "o").exists()


def test_agreement_from_cells_to_table(tmp_path, capsys):
    arguments = ["reproduce", "agreement", "--budget", "smoke", "--out", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 0
    text = (tmp_path / "agreement/agreement.md").read_text()
    assert "### As rendered\n\nAgreement **" in text
    assert "| all |" in text
    assert "### Damaged objects (10 images each)" in text
    assert (tmp_path / "agreement/agreement.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(arguments) == 0
    assert "..." not in capsys.readouterr().out.split("### As rendered")[0]  # nothing was computed again


# Pruning


def test_part_of_the_loss_that_is_recovered():
    """Categories count alike, however many prompts they have; the interval is there where prompts differ."""
    tags = ["counting"] * 2 + ["colors"] * 6
    whole = np.array([[1.0, 1.0] + [0.8] * 6] * 3)
    pruned = np.array([[0.0, 0.0] + [0.4] * 6] * 3)
    healed = np.array([[0.5, 0.5] + [0.8] * 6] * 3)
    found = recovered(whole, pruned, healed, tags)
    assert found["pruned"] == pytest.approx((0.2, 0.2, 0.2))
    assert found["healed"] == pytest.approx((0.65, 0.65, 0.65))
    assert found["lost"][0] == pytest.approx(0.7)
    assert found["recovered"] == pytest.approx((0.45 / 0.7,) * 3)
    healed[:, 2:5] = 0.4
    value, low, high = recovered(whole, pruned, healed, tags)["recovered"]
    assert value == pytest.approx((0.55 - 0.2) / 0.7)
    assert low < value - 0.05
    assert high > value + 0.05


def test_seeds_widen_the_interval():
    tags = ["counting"] * 4
    whole, pruned = np.ones((3, 4)), np.zeros((3, 4))
    same, apart = np.full((3, 4), 0.5), np.repeat([[0.2], [0.5], [0.8]], 4, axis=1)
    assert recovered(whole, pruned, same, tags)["recovered"] == pytest.approx((0.5, 0.5, 0.5))
    value, low, high = recovered(whole, pruned, apart, tags)["recovered"]
    assert value == pytest.approx(0.5)
    assert low <= 0.3
    assert high >= 0.7


def test_nothing_lost_is_nothing_to_recover(recwarn):
    """A part of nothing is no number, and no warning of an empty quantile either."""
    same = np.full((2, 3), 0.5)
    assert np.isnan(recovered(same, same, same, ["a"] * 3)["recovered"]).all()
    assert not recwarn.list


def test_simple_strategies_keep_what_they_say(tmp_path):
    place, options = Place(tmp_path, "cpu", tmp_path), pruning.Options()
    assert pruning.chosen(place, options, "uniform", 8, 0) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert pruning.chosen(place, options, "random", 8, 0) == pruning.chosen(place, options, "random", 8, 0)
    assert pruning.chosen(place, options, "random", 8, 0) != pruning.chosen(place, options, "random", 8, 1)
    pruning._made(place, options, 2, "authors").write_text('{"rule": [0.5, 0.1, 0.9, 0.9]}')
    assert pruning.chosen(place, options, "authors", 2, 2) == [2, 3]


@pytest.mark.parametrize(
    ("importance", "kept"), [([5, 1, 1, 5], [0, 3]), ([1, 1, 5, 5], [2, 3]), ([5, 5, 1, 1], [0, 1])]
)
def test_contiguous_leaves_out_the_least_important_neighbours(importance, kept):
    assert pruning.contiguous(importance, 2) == kept


def test_the_authors_rule_ignores_the_sign():
    """A block that turns its input round has the largest 1 - cosine, and nothing of the authors' rule."""
    model = trajectory.scratch(2, 32, 0).eval()
    with torch.no_grad():
        batch = CalibrationBatch(
            torch.randn(1, 16, 2, 2), torch.zeros(0), torch.zeros(1), torch.randn(1, 3, 128), torch.ones(1, 3),
            torch.zeros(0), torch.zeros(0), 0.5, 0, 0,
        )  # fmt: skip

        class Turned(torch.nn.Module):
            def forward(self, x, *rest, **named):
                return -x

        model.transformer_blocks[0] = Turned()
    first, second = pruning.authors_rule(model, [batch])
    assert first == pytest.approx(0, abs=1e-12)
    assert second > 1e-4


def test_the_comparison_has_the_same_compute():
    options = pruning.Options()
    for keep in options.keep:
        run, mark = pruning.comparison(options, keep, 0)
        spent = trajectory.flops(pruning.source(options, 0), options.mark, options.recipe)
        spent += pruning.healing_flops(options, keep)
        assert trajectory.flops(run, mark, options.recipe) == pytest.approx(spent, rel=1e-3)


def test_the_blocks_that_were_pruned_are_healed(tmp_path, monkeypatch):
    """Choice, pruning and healing are cells of their own; the report has complete ones only."""
    options = pruning.Options(by=("importance",), keep=(8,), seeds=(4,), heal=7, distill=3.0)
    asked = []

    def prune(source, target, *, indices, heal, **given):
        asked.append((indices, heal))

    monkeypatch.setattr(pruning, "prune_folder", prune)
    monkeypatch.setattr(pruning, "scores", lambda *given: [0.5])
    monkeypatch.setattr(pruning, "load_transformer", lambda folder: trajectory.scratch(1, 32, 0))
    monkeypatch.setattr(pruning, "held_out_loss", lambda *given: 0.25)
    monkeypatch.setattr(pruning, "chosen", lambda *given: [3, 4])
    monkeypatch.setattr(pruning, "test_prompts", lambda recipe: [{"tag": "a"}])
    cells = {cell.name: cell for cell in pruning.cells(options)}
    place = Place(tmp_path, "cpu", tmp_path)
    results = {"measured-4": {"whole": [1.0], "loss": 0.2}}
    results["pruned-importance-8-4"] = cells["pruned-importance-8-4"].run(place)
    assert "| 8 |" not in pruning.report(options, results, tmp_path).text
    results["healed-importance-8-4"] = cells["healed-importance-8-4"].run(place)
    assert asked == [([3, 4], None), ([3, 4], Healing(7, seed=4, distill=3.0))]
    assert "| 8 | importance | 1 | 0.500 (0.500 - 0.500) |" in pruning.report(options, results, tmp_path).text


# Judges


def test_area_under_the_curve_counts_pairs():
    scores, correct = np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False])
    assert auc(scores, correct) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert np.isnan(auc(scores, np.ones(4, bool)))
