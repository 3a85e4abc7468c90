"""The arithmetic of benchmarks/pruning_quality.py."""

import sys
from pathlib import Path

import numpy as np
import pytest

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
