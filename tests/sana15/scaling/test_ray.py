"""examples/search_ray.py on one machine with two workers: the pictures of a search without Ray. Needs Ray."""

import sys
from pathlib import Path

import pytest
from kill_search import PROMPTS, digest
from tiny_pipeline import make

import sana15
from sana15.sampling.pipeline import Pipeline

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.skipif(not EXAMPLES.exists(), reason="needs the source tree")
def test_two_workers_make_what_one_process_makes(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import search_ray

    model = make(tmp_path / "model")
    (tmp_path / "p.txt").write_text("\n".join([*PROMPTS, "a red ring"]))
    options = {"n": 3, "pick": 1, "judge": "learned", "steps": 2, "guidance": 3.0}
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, runtime_env={"env_vars": path_of_workers()}
    )
    try:
        rows = search_ray.run(str(model), str(tmp_path / "p.txt"), 4, 2, out=str(tmp_path / "ray"), **options)
    finally:
        ray.shutdown()
    assert [(row["shard"], row["prompts"], row["pictures"], row["unjudged"]) for row in rows] == [
        (i, 1, 3, 0) for i in range(4)
    ]
    alone = sana15.search(Pipeline.from_pretrained(model), [*PROMPTS, "a red ring"], out=tmp_path / "alone", **options)
    assert sum(row["units"] for row in rows) == alone.spent.total
    made, expected = ({k: v for k, v in digest(tmp_path / n).items() if k.endswith(".png")} for n in ("ray", "alone"))
    assert made == expected
    assert len(made) == 4 * 3 + 4


def path_of_workers():
    """What a worker needs to find this test's packages and the example."""
    return {"PYTHONPATH": ":".join([str(EXAMPLES), *(p for p in sys.path if p)]), "OMP_NUM_THREADS": "1"}
