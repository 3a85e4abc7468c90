"""The arithmetic of benchmarks/pruning_quality.py."""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from sana15.healing import Healing

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the source tree")
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture
def experiment():
    return pytest.importorskip("pruning_quality")


def test_part_of_the_loss_that_is_recovered(experiment):
    """Categories count alike, however many prompts they have; the interval is there where prompts differ."""
    tags = ["counting"] * 2 + ["colors"] * 6
    whole = np.array([1.0, 1.0] + [0.8] * 6)
    pruned = np.array([[0.0, 0.0] + [0.4] * 6] * 3)
    healed = np.array([[0.5, 0.5] + [0.8] * 6] * 3)
    found = experiment.recovered(whole, pruned, healed, tags)
    assert found["pruned"] == pytest.approx((0.2, 0.2, 0.2))
    assert found["healed"] == pytest.approx((0.65, 0.65, 0.65))
    assert found["lost"][0] == pytest.approx(0.7)
    assert found["recovered"] == pytest.approx((0.45 / 0.7,) * 3)
    healed[:, 2:5] = 0.4
    value, low, high = experiment.recovered(whole, pruned, healed, tags)["recovered"]
    assert value == pytest.approx((0.55 - 0.2) / 0.7)
    assert low < value - 0.05
    assert high > value + 0.05


def test_seeds_widen_the_interval(experiment):
    tags = ["counting"] * 4
    whole, pruned = np.ones(4), np.zeros((3, 4))
    same, apart = np.full((3, 4), 0.5), np.repeat([[0.2], [0.5], [0.8]], 4, axis=1)
    assert experiment.recovered(whole, pruned, same, tags)["recovered"] == pytest.approx((0.5, 0.5, 0.5))
    value, low, high = experiment.recovered(whole, pruned, apart, tags)["recovered"]
    assert value == pytest.approx(0.5)
    assert low <= 0.3
    assert high >= 0.7


def test_one_search_serves_all_depths(experiment, tmp_path):
    """Its order of removals is kept; a shallower choice is the order's beginning, without another search."""
    (tmp_path / "searched-3.json").write_text("[5, 2, 7, 1, 6, 4]")
    assert experiment.chosen(tmp_path, "search", 8, 3, None) == [0, 3, 4, 6, 8, 9, 10, 11]
    assert experiment.chosen(tmp_path, "search", 6, 3, None) == [0, 3, 8, 9, 10, 11]


def test_cells_of_other_options_are_not_mixed_in(experiment, tmp_path):
    options = {"every": 5, "n": 2, "steps": 20, "count": 100, "heal": 100, "distill": 10.0}
    for _ in range(2):
        experiment.claim(tmp_path, argparse.Namespace(**options, keep=[8]))
    for name, value, shown in (
        ("heal", 50, "heal_steps 100"),
        ("distill", 1.0, "heal_distill 10.0"),
        ("every", 1, "every 5"),
    ):
        with pytest.raises(SystemExit, match=f"holds cells with {re.escape(shown)}, now it is {value}; another --out"):
            experiment.claim(tmp_path, argparse.Namespace(**options | {name: value}))
    (tmp_path / "options.json").rename(tmp_path / "whole.json")
    with pytest.raises(SystemExit, match="holds something else: there is no options"):
        experiment.claim(tmp_path, argparse.Namespace(**options))


def test_a_cell_is_filled_where_it_is_not(experiment, tmp_path, monkeypatch):
    """Blocks that were chosen, and their score, stay; a complete cell is left alone; the report has complete ones only."""
    args = argparse.Namespace(
        heal=7, distill=3.0, every=5, n=1, steps=2, keep=[8], by=["loss", "learned"], device="cpu"
    )
    pruned, scored = [], []

    def prune(source, target, *, indices, heal, **options):
        pruned.append((indices, heal))

    def worth(folder, args):
        scored.append(folder.name)
        return [0.5]

    monkeypatch.setattr(experiment, "prune_folder", prune)
    monkeypatch.setattr(experiment, "worth", worth)
    monkeypatch.setattr(experiment, "chosen", lambda *_: [1, 2])
    monkeypatch.setattr(experiment, "chosen_prompts", lambda every: [{"tag": "a"}])
    (tmp_path / "whole.json").write_text("[1.0]")
    path = tmp_path / "loss-8-4.json"
    path.write_text(json.dumps({"kept": [3, 4], "pruned": [0.25]}))
    assert "| 8 |" not in experiment.report(tmp_path, args)
    experiment.cell(tmp_path, "loss", 8, 4, args)
    assert json.loads(path.read_text()) == {"kept": [3, 4], "pruned": [0.25], "healed": [0.5]}
    assert pruned == [([3, 4], Healing(7, seed=4, distill=3.0))]
    experiment.cell(tmp_path, "loss", 8, 4, args)
    experiment.cell(tmp_path, "learned", 8, 4, args)
    assert scored == ["healed", "pruned", "healed"]
    assert json.loads((tmp_path / "learned-8-4.json").read_text())["kept"] == [1, 2]
    assert experiment.report(tmp_path, args).count("| 8 |") == 2
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json"] * 3
