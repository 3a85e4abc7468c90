"""sana15.search: policies and their price, the ledger, resuming after kills, shards, judges that fail."""

import json
import threading

import numpy as np
import pytest
import torch
from kill_search import Shade, digest, kill_and_compare
from search_fakes import PROMPTS, Comparing, Grey, Meter, Moody, best, grey, qualities, quality
from tiny_pipeline import make

import sana15
from sana15.sampling.pipeline import Pipeline
from sana15.sampling.settings import Seed
from sana15.scaling.ledger import Ledger
from sana15.scaling.policies import calibrate_stop, expected_gains
from sana15.storage.files import DataError


@pytest.fixture
def go(tmp_path):
    def call(out="run", generator=None, prompts=PROMPTS, judge=None, **options):
        generator, judge = generator or Grey(), judge or Meter()
        result = sana15.search(generator, prompts, out=tmp_path / out, judge=judge, **{"n": 16, "pick": 3} | options)
        return result, generator, judge

    return call


def test_best_of_n_is_the_global_top_and_calls_the_judge_once_per_image(go, tmp_path):
    result, generator, judge = go(batch_size=5)
    assert [f.picked for f in result.found] == [best(p, 16, 3) for p in range(3)]
    assert judge.calls == 3 * 16 == result.spent.judge_calls
    assert result.spent.evaluations == 3 * 16 * 16 == generator.evaluated
    assert generator.started[:4] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15]]
    for p, (images, scores) in enumerate(zip(result.images, result.scores, strict=True)):
        assert [i.getpixel((0, 0))[0] for i in images] == [round(250 * s) for s in scores]
        for place, c in enumerate(best(p, 16, 3)):
            picked = tmp_path / f"run/picks/{p:05d}/samples/{place:04d}.png"
            assert picked.read_bytes() == (tmp_path / f"run/candidates/{p:05d}/samples/{c:04d}.png").read_bytes()
    totals = json.loads((tmp_path / "run/result-000-of-001.json").read_text())
    assert (totals["made"], totals["evaluations"], totals["judge_calls"], totals["unjudged"]) == (48, 768, 48, [])


def test_tournament_by_scores_calls_the_judge_once_per_image(go):
    result, _, judge = go(policy="tournament", n=13, pick=1)
    assert [f.picked for f in result.found] == [best(p, 13, 1) for p in range(3)]  # not a power of two
    assert judge.calls == 3 * 13
    assert [len(f.picked) for f in go("other", policy="tournament", n=13, pick=4)[0].found] == [4] * 3


def test_tournament_asks_in_both_orders_and_disagreement_is_a_tie(go):
    result, _, judge = go(policy="tournament", pick=1, judge=Comparing())
    assert [f.picked for f in result.found] == [best(p, 16, 1) for p in range(3)]
    assert judge.calls == 3 * 2 * 15 == result.spent.judge_calls
    assert result.scores == [[None]] * 3
    # It prefers whatever it sees at that place: all ties, the earlier goes on.
    for name, bias in (("first", 2.0), ("second", -2.0)):
        biased = go(name, policy="tournament", pick=1, judge=Comparing(bias=bias))[0]
        assert [f.picked for f in biased.found] == [[0]] * 3


def test_stop_makes_no_more_than_it_needs(go):
    result, generator, _ = go(policy="stop", stop_at=0.6, pick=2)
    for p, f in enumerate(result.found):
        enough = next(m for m in range(4, 17, 4) if sum(q >= 0.6 for q in qualities(p)[:m]) >= 2)
        assert f.made == enough
        assert f.picked == best(p, enough, 2)
    assert len(generator.finished) == sum(f.made for f in result.found) < 48
    assert all(f.made == 16 for f in go("never", policy="stop", stop_at=2.0)[0].found)


def test_halving_keeps_the_better_previews(go):
    result, generator, judge = go(policy="halving", pick=1, batch_size=6)
    assert [f.made for f in result.found] == [4] * 3
    price = 16 * 2 * 2 + 8 * 2 * 2 + 4 * 2 * 4  # alive x evaluations a step x steps
    assert result.spent.evaluations == 3 * price == generator.evaluated
    assert judge.calls == 3 * (16 + 8 + 4) == result.spent.judge_calls
    early = [0.5 * q + 0.5 * quality(Seed(0, 0, c + 1000)) for c, q in enumerate(qualities(0))]
    alive = sorted(range(16), key=lambda c: -round(early[c] * 250))[:4]
    assert result.found[0].picked == [max(alive, key=lambda c: qualities(0)[c])]
    assert [f.made for f in go("all", policy="halving", n=3, pick=3)[0].found] == [3] * 3  # nothing to drop


def test_bandit_gives_more_to_prompts_that_need_it(go):
    result, _, _ = go(policy="bandit", stop_at=0.6, pick=1, budget=3 * 8 * 17, prompts=[*PROMPTS, "four", "five"])
    for f in result.found:
        if f.made < 16 and max(qualities(f.index)[: f.made]) < 0.6:
            assert result.spent.total > 3 * 8 * 17 - 17  # only because nothing was left
        assert f.made == 4 or max(qualities(f.index)[: f.made - 4]) < 0.6
    gains = expected_gains([np.array([0.9, 0.95, 0.9, 0.92]), np.array([0.1, 0.2, 0.15, 0.1])], 1)
    assert gains[1] > gains[0] > 0


def test_bandit_spends_the_next_round_where_it_is_likely_to_gain_most(go):
    first = [np.array([round(q * 250) / 250 for q in qualities(p)[:4]]) for p in range(3)]
    favourite = int(np.argmax(expected_gains(first, 1)))
    result, _, _ = go(policy="bandit", pick=1, budget=3 * 91)  # a round of 4 * 17 for each, one more
    assert [f.made for f in result.found] == [8 if p == favourite else 4 for p in range(3)]


@pytest.mark.parametrize("policy", ["best_of_n", "tournament", "stop", "halving", "bandit"])
@pytest.mark.parametrize("budget", [160, 205, 411, 700, 1500])
def test_the_budget_is_never_exceeded_and_what_is_spent_is_true(go, policy, budget):
    options = {"stop_at": 0.95} if policy == "stop" else {}
    for judge in (Meter(), Comparing()):
        result, generator, judge = go(judge.__class__.__name__, policy=policy, budget=budget, judge=judge, **options)
        assert generator.evaluated + judge.calls == result.spent.total <= budget
        assert all(len(f.picked) == 3 for f in result.found)


def test_several_judges_vote_by_rank(go):
    result, _, _ = go(judge=[Meter(), Meter(sign=-1), Meter()], pick=16)
    assert result.found[0].picked == best(0, 16, 16)
    assert result.spent.judge_calls == 3 * 48
    tied = go("tied", judge=[Meter(), Meter(sign=-1)])[0]
    assert tied.found[0].picked == [0, 1, 2]


def test_resuming_repeats_nothing(go, tmp_path):
    first = go(policy="halving", batch_size=6)[0]
    before = digest(tmp_path / "run")
    again, generator, judge = go(policy="halving", batch_size=6)
    assert again.found == first.found
    assert (generator.started, judge.calls) == ([], 0)
    assert digest(tmp_path / "run") == before


class Dies(Exception):
    pass


@pytest.mark.parametrize("policy", ["best_of_n", "tournament", "stop", "halving", "bandit"])
def test_whatever_line_of_the_ledger_is_the_last(go, tmp_path, policy, monkeypatch):
    """A run that dies before any of its lines, whole or torn, ends as if nothing had been."""
    options = {"policy": policy, "batch_size": 4, "n": 8, "pick": 1, "prompts": PROMPTS[:2]}
    options |= {"stop_at": 0.9} if policy == "stop" else {}
    judge = Comparing if policy == "tournament" else Meter
    whole = go("whole", judge=judge(), **options)[0]
    lines = len((tmp_path / "whole/ledger-000-of-001.jsonl").read_text().splitlines())
    append = Ledger.append
    for fatal in range(0, lines, 3):

        def dying(self, record, fatal=fatal):
            if len(self.records) == fatal:
                self._file.write(json.dumps(record).encode()[: 7 * (fatal % 2)])  # torn, or not begun
                self._file.flush()
                raise Dies
            append(self, record)

        out = f"{fatal}"
        with monkeypatch.context() as m:
            m.setattr(Ledger, "append", dying)
            with pytest.raises(Dies):
                go(out, judge=judge(), **options)
        for left in ("candidates/00001/samples/.0000.png", "picks/00000/.metadata.jsonl", ".run.json"):
            (tmp_path / out / f"{left}.7.partial").write_bytes(b"half")
        assert go(out, judge=judge(), **options)[0].found == whole.found
        assert digest(tmp_path / out) == digest(tmp_path / "whole")


@pytest.mark.skipif(torch.get_num_threads() > 1, reason="forks, which needs OMP_NUM_THREADS=1")
def test_kills_at_random_moments(tmp_path):
    pipe = Pipeline.from_pretrained(make(tmp_path / "model"))
    assert kill_and_compare(pipe, tmp_path, 3, seed=1, policies=("halving", "stop")) >= 3


def test_shards_make_what_one_process_makes(go, tmp_path):
    one = go("one", prompts=[*PROMPTS, "four", "five"])[0]
    parts = [go("two", prompts=[*PROMPTS, "four", "five"], shard=(i, 2))[0] for i in (1, 0)]
    assert sorted((f.index, f.picked, f.scores) for part in parts for f in part.found) == [
        (f.index, f.picked, f.scores) for f in one.found
    ]
    a, b = (digest(tmp_path / name) for name in ("one", "two"))
    assert {k: v for k, v in a.items() if k.endswith(".png")} == {k: v for k, v in b.items() if k.endswith(".png")}
    ledger = Ledger(tmp_path / "two/ledger-000-of-002.jsonl")
    with pytest.raises(ValueError, match="is in use: another process works on this run"):
        go("two", prompts=[*PROMPTS, "four", "five"], shard=(0, 2))
    ledger.close()


def test_a_lost_picture_is_made_again_and_must_be_the_same(go, tmp_path):
    go()
    before = digest(tmp_path / "run")
    lost = tmp_path / "run/candidates/00001/samples/0002.png"
    lost.write_bytes(lost.read_bytes()[:50])
    _, generator, judge = go()
    assert len(generator.finished) == 1  # batch 1
    assert judge.calls == 0
    assert digest(tmp_path / "run") == before
    lost.unlink()

    class Other(Grey):
        def finish(self, state):
            return [grey(0.123) for _ in state]

    with pytest.raises(DataError, match=r"0002\.png was lost or damaged and comes out differently now"):
        go(generator=Other())


def test_a_resumed_run_has_the_threads_that_it_was_begun_with(go):
    seen = []

    class Counting(Meter):
        def judge(self, pictures, line):
            seen.append(torch.get_num_threads())
            if len(seen) == 1:
                raise RuntimeError("not yet")
            return super().judge(pictures, line)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert go(judge=Counting(), attempts=1)[0].unjudged
        torch.set_num_threads(2)
        assert not go(judge=Counting(), attempts=1)[0].unjudged
        assert set(seen) == {3}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_damaged_and_foreign_folders(go, tmp_path):
    go()
    path = tmp_path / "run/ledger-000-of-001.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "{broken\n", *lines[3:]]))
    with pytest.raises(DataError, match=r"ledger-000-of-001.jsonl:4 is damaged"):
        go()
    swapped = [line.replace('"batch": [0]', '"batch": [0, 1]') for line in lines]
    assert swapped != lines
    path.write_text("".join(swapped))
    with pytest.raises(DataError, match=r"candidate \d+ of prompt 0 was made in another batch"):
        go()
    path.write_text('{"kind": "image", "prompt": 77}\n')
    with pytest.raises(DataError, match="speaks of prompt 77"):
        go()
    path.write_text('{"kind": "image", "prompt": 1}\n')
    with pytest.raises(DataError, match="a record of prompt 1 is damaged"):
        go()
    with pytest.raises(ValueError, match="is another run: its n differs"):
        go(n=17)
    with pytest.raises(ValueError, match="is another run: its judges differs"):
        go(judge=Meter(sign=-1))
    (tmp_path / "else").mkdir()
    (tmp_path / "else/x").write_text("")
    with pytest.raises(ValueError, match="holds something else"):
        go("else")


@pytest.mark.parametrize("mood", ["raise", "nonsense", "slow"])
@pytest.mark.parametrize("policy", ["best_of_n", "bandit", "halving"])
def test_a_judge_that_fails_loses_nothing(go, tmp_path, mood, policy):
    options = {"policy": policy, "attempts": 2, "backoff": 0.0, "timeout": 0.05}
    result, generator, _ = go(judge=Moody(mood), **options)
    ((index, reason),) = result.unjudged
    assert index == 1
    assert "judge meter failed 2 times" in reason
    assert [len(f.picked) for f in result.found] == [3, 0, 3]
    made = len(generator.finished)
    result, generator, _ = go(judge=Moody(None), **options | {"timeout": 5.0})
    assert result.unjudged == []
    whole = go("whole", judge=Moody(None), **options | {"timeout": 5.0})
    if policy != "bandit":  # there the others may have had the budget
        assert result.found == whole[0].found
        assert made + len(generator.finished) == len(whole[1].finished)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be a positive integer"),
        ({"pick": 17}, "pick must be at most n = 16"),
        ({"policy": "luck"}, "unknown policy 'luck'; the policies are best_of_n"),
        ({"policy": "stop"}, "stop needs stop_at"),
        ({"stop_at": 0.5}, "stop_at must be a finite number, for stop or bandit only"),
        ({"policy": "stop", "stop_at": 1.0, "judge": [Meter(), Meter()]}, "stop needs one judge"),
        ({"budget": 152}, "budget must be at least 153 for 3 pictures of each of 3 prompts, got 152"),
        ({"shard": (3, 3)}, "shard must be i/n"),
        ({"shard": (0, 4)}, "shard must be i/n"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [{"text": "x"}]}, 'prompt 0 has no text "prompt"'),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"steps": 3}, "a generator brings its own settings"),
    ],
)
def test_mistakes(go, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        go(**options)
    assert not (tmp_path / "run").exists()


def test_previews_are_refused_where_there_are_none(go):
    closed = Grey()
    closed.can_pause = False
    with pytest.raises(ValueError, match="halving needs previews"):
        go(generator=closed, policy="halving")
    assert go(generator=closed)[0].found


def test_a_calibrated_threshold_costs_no_more_than_it_may():
    rng = np.random.default_rng(0)
    correct = (rng.random((200, 16)) < rng.beta(2, 2, (200, 1))).astype(float)
    scores = correct + 0.4 * rng.standard_normal(correct.shape)
    best_score = correct[np.arange(200), scores.argmax(1)].mean()
    level, made = calibrate_stop(scores, correct, tolerance=0.02)
    strict, more = calibrate_stop(scores, correct, tolerance=0.0)
    assert made < more <= 16
    assert level < strict

    def stopped(row):
        return next((m for m in range(4, 16, 4) if scores[row, :m].max() >= level), 16)

    counts = [stopped(row) for row in range(200)]
    assert np.mean(counts) == pytest.approx(made)
    assert np.mean([correct[r, scores[r, :m].argmax()] for r, m in enumerate(counts)]) >= best_score - 0.02


def test_any_diffusers_pipeline(tmp_path):
    from generator_cases import arguments, parts  # noqa: F401 - a fixture's function
    from tiny_pipeline import make_published

    folder = make_published(tmp_path / "published")
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import AutoTokenizer, Gemma2Model

    pipe = SanaPipeline(
        AutoTokenizer.from_pretrained(folder / "tokenizer"), Gemma2Model.from_pretrained(folder / "text_encoder"),
        AutoencoderDC.from_pretrained(folder / "vae"), SanaTransformer2DModel.from_pretrained(folder / "transformer"),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )  # fmt: skip
    before = threading.active_count()
    options = {"n": 4, "pick": 1, "policy": "halving", "judge": Shade(), "num_inference_steps": 4}
    options |= {"guidance_scale": 3.0, "height": 64, "width": 64, "use_resolution_binning": False}
    result = sana15.search(pipe, ["any text", "another"], out=tmp_path / "out", **options)
    assert result.spent.evaluations == 2 * (4 * 2 * 1 + 2 * 2 * 1 + 1 * 2 * 2)
    assert [len(f.picked) for f in result.found] == [1, 1]
    assert threading.active_count() == before
    again = digest(tmp_path / "out")
    sana15.search(pipe, ["any text", "another"], out=tmp_path / "out", **options)
    assert digest(tmp_path / "out") == again
