"""The scaling curve and the experiment's replays: what is picked of recorded candidates, and the folders that cannot tell."""

import numpy as np
import pytest
from search_fakes import Grey, Meter, quality

import sana15
from sana15.evaluation.layout import picture_path
from sana15.evaluation.scores import means
from sana15.experiments import replay
from sana15.sampling.settings import Seed
from sana15.scaling.curve import Recorded, markdown, picked_worth, read_run, scaling_curve, sets_of
from sana15.scaling.policies import stopped
from sana15.scenes.testset import load


def test_sets_are_disjoint_and_nested():
    for n, sets in ((256, 4), (17, 4), (64, 1)):
        for count in (1, n // sets):
            found = [list(range(n))[s] for s in sets_of(n, count, sets)]
            assert [len(f) for f in found] == [count] * sets
            assert len({c for part in found for c in part}) == count * sets
        assert all(a.start == b.start for a, b in zip(sets_of(n, 1, sets), sets_of(n, n // sets, sets)))
    with pytest.raises(ValueError, match="4 disjoint sets of 5 need 20 candidates, there are 16"):
        sets_of(16, 5, 4)


def test_the_pick_of_each_set():
    scores = np.array([[[0.1, 0.9, 0.5, 0.5], [0.3, 0.2, 0.1, 0.4]]])  # [1, 2, 4]
    worth = np.array([[0.0, 1, 1, 0], [0, 1, 1, 1]])
    assert picked_worth(scores, worth, 1, 4).tolist() == [0.5, 0.75]
    assert picked_worth(scores, worth, 2, 2).tolist() == [1.0, 0.5]  # a tie: the earlier one
    assert picked_worth(scores, worth, 4, 1).tolist() == [1.0, 1.0]
    two = np.stack([scores[0], -scores[0]])  # judges that contradict each other: all tie, the first is picked
    assert picked_worth(two, worth, 4, 1).tolist() == [0.0, 0.0]


def test_the_curve_is_that_of_its_chances():
    """A perfect judge of pictures that are right with chance p finds a right one of N with 1 - (1 - p)^N; a blind one with p."""
    rng = np.random.default_rng(0)
    worth = (rng.random((400, 64)) < 0.3).astype(float)
    blind = Recorded(["colors", "position"] * 200, ["blind"], {20: rng.random((1, 400, 64))}, worth)
    curve = scaling_curve(blind, [1, 4, 16], 4, resamples=500)
    for k, count in enumerate(curve.counts):
        oracle, picked = curve.scores["oracle"]["mean of categories"][k], curve.scores["blind"]["mean of categories"][k]
        assert oracle.value == pytest.approx(1 - 0.7**count, abs=0.03)
        error = np.sqrt(0.3 * 0.7 / (400 * 4))  # of 1,600 independent picks
        assert picked.value == pytest.approx(0.3, abs=4 * error)
        assert picked.high - picked.low == pytest.approx(2 * 1.96 * error, rel=0.15)
        assert picked.pictures == 400 * 4 * count
    text = markdown(curve)
    assert f"| oracle | position | {curve.scores['oracle']['position'][0].value:.3f} |" in text


def test_a_paired_difference_has_a_narrower_interval():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    tags = ["colors"] * 200
    first, second = (np.clip(hard + shift + 0.02 * rng.standard_normal(200), 0, 1.2) for shift in (0.05, 0.0))
    alone = means(first.tolist(), tags, [1] * 200, rng, 500)["mean of prompts"]
    paired = means((first - second).tolist(), tags, [1] * 200, rng, 500)["mean of prompts"]
    assert paired.low < 0.05 < paired.high
    assert paired.high - paired.low < (alone.high - alone.low) / 5


class Scenes(Grey):
    """Grey pictures of the checker's size."""

    def finish(self, state):
        return [picture.resize((64, 64)) for picture in super().finish(state)]


@pytest.fixture
def searched(tmp_path):
    lines = [load()[0], load()[-1]]

    def call(**options):
        options = {"n": 8, "pick": 1, "judge": Meter(), "policy": "best_of_n"} | options
        return sana15.search(Scenes(), lines, out=tmp_path / "run", **options)

    return call


def test_a_search_s_folder_is_read(searched, tmp_path):
    searched()
    recorded = read_run(tmp_path / "run")
    expected = [[quality(Seed(0, p, c)) for c in range(8)] for p in range(2)]
    assert np.allclose(recorded.finished[0], expected, atol=1 / 250)
    assert recorded.worth.tolist() == [[0.0] * 8] * 2  # grey shows nothing
    assert (recorded.tags, recorded.names) == (["single_object", "color_attr"], ["meter"])


def test_folders_without_a_curve(searched, tmp_path):
    searched(policy="halving")
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="12 of 16 candidates were not finished and judged"):
        read_run(run)
    ledger = run / "ledger-000-of-001.jsonl"
    ledger.write_text("{broken\n")
    with pytest.raises(ValueError, match=r"ledger-000-of-001.jsonl:1 is damaged"):
        read_run(run)
    ledger.unlink()
    with pytest.raises(ValueError, match=r"is not done: ledger-000-of-001\.jsonl is missing"):
        read_run(run)
    with pytest.raises(FileNotFoundError, match=r"run.json is missing"):
        read_run(tmp_path)


def test_a_lost_picture_is_named(searched, tmp_path):
    searched()
    picture_path(tmp_path / "run/candidates", 1, 3).unlink()
    with pytest.raises(FileNotFoundError, match=r"00001/samples/0003.png is missing"):
        read_run(tmp_path / "run")


def recorded_scores(generator, prompts, n):
    """[steps 2 and 4, finished] of [P, n] as the meter reads them."""
    judge, found = Meter(), []
    for step in (2, 4, 8):
        state = [[(Seed(0, p, c), step) for c in range(n)] for p in range(prompts)]
        pictures = [generator.finish(s) if step == 8 else generator.preview(s) for s in state]
        found.append(np.array([[v.score for v in judge.judge(row, {})] for row in pictures]))
    return found


@pytest.mark.parametrize("n", [16, 13])
def test_replays_pick_what_the_policies_pick(tmp_path, n):
    prompts = [f"prompt {i}" for i in range(8)]
    *early, final = recorded_scores(Grey(), len(prompts), n)
    generator = Grey()
    real = sana15.search(generator, prompts, out=tmp_path / "halving", n=n, pick=1, judge=Meter(), policy="halving")
    assert [f.picked[0] for f in real.found] == replay.halving_replayed(early, final).tolist()
    assert real.spent.total == len(prompts) * replay.halving_price(generator, n)
    real = sana15.search(Grey(), prompts, out=tmp_path / "stop", n=n, pick=1, judge=Meter(), policy="stop", stop_at=0.8)
    made, chosen = stopped(final, 0.8)
    assert [f.made for f in real.found] == made.tolist()
    assert [f.picked[0] for f in real.found] == chosen.tolist()


def test_stop_is_calibrated_on_other_prompts():
    """Scores of the two halves differ by a shift, so that a half's own threshold would be another."""
    rng = np.random.default_rng(0)
    worth = (rng.random((40, 32)) < 0.5).astype(float)
    scores = worth + 0.1 * rng.random((40, 32)) + 10.0 * (np.arange(40)[:, None] % 2)
    levels, value, made = replay.stop_replayed(scores, worth, 16)
    assert levels[0] > 9  # of even prompts, from the odd ones
    assert levels[1] < 2
    assert made[::2].tolist() == [16.0] * 20
    assert set(made[1::2]) == {4.0}
    assert value[::2].mean() > value[1::2].mean()


def test_correlations_of_previews():
    rng = np.random.default_rng(0)
    final = rng.random((1, 10, 50))
    recorded = Recorded(["x"] * 10, ["j"], {5: final**3, 10: -final, 20: final}, final[0])
    rows = replay.correlation_table(recorded).splitlines()[2:]
    assert "| 1.000 | 10 |" in rows[0]  # monotone: the ranks agree
    assert "| -1.000 | -1.000 | 10 |" in rows[1]
