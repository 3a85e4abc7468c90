"""sana15.search: many candidates for each prompt, judged, the best picked, in a folder that can be resumed and shared."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..device import of_pipeline
from ..evaluation.layout import picture_path, write_metadata
from ..judges import Judge, JudgeFailed, Patient, Verdict, make
from ..model.text import is_mini
from ..sampling.diffusers_pipeline import DiffusersGenerator
from ..sampling.generator import Generator
from ..sampling.pipeline import Pipeline, PipelineGenerator
from ..sampling.settings import Sampling
from ..storage.concurrency import claimed_target, claiming
from ..storage.files import DataError, read_json, write_durably
from ..storage.redaction import redacted_values
from .ledger import Ledger
from .policies import POLICIES
from .prompt import PromptSearch, Spent

_logger = logging.getLogger(__name__)

BATCH_MINI, BATCH = 32, 1  # pictures computed at once where nothing is said


@dataclass(frozen=True)
class PromptResult:
    """The result for one prompt; `picked` are candidates, best first, `scores` theirs (None: by comparison only)."""

    index: int
    line: Mapping[str, Any]
    picked: list[int]
    scores: list[float | None]
    made: int
    spent: Spent
    unjudged: str = ""  # why the judge gave no verdict; nothing is picked then
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)  # candidate -> the first judge's, where it was asked

    @property
    def order(self) -> list[int]:
        """Judged candidates: the picked ones, then the others by the first judge's score."""
        rest = sorted(set(self.verdicts) - set(self.picked), key=lambda c: (-self.verdicts[c].score, c))
        return [c for c in self.picked if c in self.verdicts] + rest


@dataclass(frozen=True)
class SearchResult:
    """The result of a search; lists by prompt of this shard."""

    out: Path
    found: list[PromptResult]
    retries: int

    @property
    def images(self) -> list[list[Image.Image]]:
        """The picked pictures, best first."""
        return [[_open(picture_path(self.out / "candidates", f.index, c)) for c in f.picked] for f in self.found]

    @property
    def scores(self) -> list[list[float | None]]:
        return [f.scores for f in self.found]

    @property
    def spent(self) -> Spent:
        return Spent(sum(f.spent.evaluations for f in self.found), sum(f.spent.judge_calls for f in self.found))

    @property
    def unjudged(self) -> list[tuple[int, str]]:
        """(prompt's index, reason)."""
        return [(f.index, f.unjudged) for f in self.found if f.unjudged]


@claiming(lambda given: given["out"], shared=True)
def search(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    out: str | Path,
    n: int = 32,
    pick: int = 4,
    judge: str | Judge | Sequence[str | Judge] = "learned",
    policy: str = "best_of_n",
    budget: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    stop_at: float | None = None,
    shard: tuple[int, int] = (0, 1),
    attempts: int = 3,
    timeout: float = 120.0,
    backoff: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> SearchResult:
    """Repeated sampling (SANA-1.5, arXiv:2501.18427, section 2.4): makes candidates, judges them, picks the best.

    The same call on the same folder goes on where it was: pictures and verdicts that are there are used, and the result is
    the one of a run that was never killed, byte for byte on the same machine, libraries and number of threads (which is set
    for the time of the run).

    Args:
        pipe: a sana15.Pipeline, any diffusers pipeline, or an object with the methods of sana15.sampling.generator.Generator.
        prompts: texts, or GenEval's metadata (objects with "prompt").
        out: the run's folder: candidates/ and picks/ in GenEval's layout, run.json, ledger-*.jsonl, result-*.json.
        n, pick: candidates per prompt at most, and how many are picked.
        judge: a name (judges.make), a judge, or several: then ranks decide (mean_ranks).
        policy: best_of_n, tournament, stop, halving or bandit (scaling/policies.py).
        budget: of the whole run, in transformer evaluations of one picture plus judge calls; never exceeded. Each prompt has
            an equal share, with bandit they share. None is no limit.
        seed: a candidate's noise follows from (seed, prompt's index, candidate) alone.
        batch_size: pictures computed at once, of one prompt; default 32 for the mini model, else 1.
        stop_at: the score at which `stop` (and `bandit`) are content with a pick; calibrate_stop finds one.
        shard: (i, of) works on prompts i, i + of, ... only; all shards of a run may share a folder.
        attempts, timeout, backoff: of a judge that fails; see judges.Patient.
        progress: called as progress(done, total) after every prompt (bandit: at the end).
        sampling: of pictures: for our pipeline as in Pipeline.__call__ (steps, guidance, ...), for diffusers' its own arguments.

    Returns:
        SearchResult: images, scores, spent, unjudged.

    Raises:
        ValueError: arguments that do not fit, a folder of another run, or one that another run works in. DataError: a damaged folder.
    """
    generator = _generator(pipe, seed, sampling)
    judges = [
        Patient(
            make(j, of_pipeline(pipe)) if isinstance(j, str) else j, attempts=attempts, timeout=timeout, backoff=backoff
        )
        for j in ([judge] if isinstance(judge, str) or not isinstance(judge, Sequence) else judge)
    ]
    lines = [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts]
    _check(generator, judges, lines, n, pick, policy, budget, stop_at, shard)
    if batch_size is None:
        batch_size = BATCH_MINI if isinstance(pipe, Pipeline) and is_mini(pipe.text) else BATCH
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    root = Path(out)
    settings = {
        "prompts": lines, "n": n, "pick": pick, "judges": [j.identity() for j in judges], "policy": policy,
        "budget": budget, "seed": seed, "batch_size": batch_size, "stop_at": stop_at, "shards": shard[1],
        "sampling": redacted_values(generator.identity()),
    }  # fmt: skip
    threads = _claim(root, settings, of_pipeline(pipe).partition(":")[0])
    name = f"{shard[0]:03d}-of-{shard[1]:03d}"
    mine = range(shard[0], len(lines), shard[1])
    ledger = Ledger(root / f"ledger-{name}.jsonl")
    try:
        done: dict[int, list[dict[str, Any]]] = {index: [] for index in mine}
        for record in ledger.records:
            if record.get("prompt") not in done:
                raise DataError(f"{ledger.path} speaks of prompt {record.get('prompt')!r}, which is not this shard's")
            done[record["prompt"]].append(record)
        share = None if budget is None else budget // len(lines)
        searches = [
            PromptSearch(
                generator,
                judges,
                ledger,
                root / "candidates",
                index,
                lines[index],
                seed=seed,
                n=n,
                pick=pick,
                budget=share,
                batch_size=batch_size,
                done=done[index],
            )
            for index in mine
        ]
        _remove(root.glob(f".*-{name}.*.partial"))
        for index in mine:
            for folder in ("candidates", "picks"):
                _remove(picture_path(root / folder, index, 0).parent.glob(".*.partial"))
        with _thread_count.of(threads):
            found = _run(searches, policy, stop_at, progress)
        for f in found:
            for place, c in enumerate(f.picked):
                target = picture_path(root / "picks", f.index, place)
                data = picture_path(root / "candidates", f.index, c).read_bytes()
                if not target.exists() or target.read_bytes() != data:
                    write_durably(data, target)
        result = SearchResult(root, found, sum(j.retries for j in judges))
        write_durably((json.dumps(_as_json(found), indent=1) + "\n").encode(), root / f"result-{name}.json")
    finally:
        ledger.close()
    return result


def _run(
    searches: list[PromptSearch], policy: str, stop_at: float | None, progress: Callable[[int, int], None] | None
) -> list[PromptResult]:
    together = policy == "bandit"
    picked: list[list[int] | JudgeFailed] = []
    for i in range(0, len(searches), len(searches) if together else 1):
        picked += POLICIES[policy].run(searches if together else searches[i : i + 1], stop_at)
        if progress is not None:
            progress(len(picked), len(searches))
    found = []
    for s, chosen in zip(searches, picked):
        failed = isinstance(chosen, JudgeFailed)
        best: list[int] = [] if isinstance(chosen, JudgeFailed) else chosen
        judged = best and all(c in s.verdicts for c in s.made)
        scores = dict(zip(s.made, s.scores(s.made, s.verdicts).tolist())) if judged else {}
        verdicts = {c: v[0] for c, v in s.verdicts.items()}
        picked_scores = [scores.get(c) for c in best]
        found.append(
            PromptResult(
                s.index, s.line, best, picked_scores, len(s.made), s.spent, str(chosen) if failed else "", verdicts
            )
        )
    return found


def _as_json(found: Sequence[PromptResult]) -> dict[str, Any]:
    prompts = [
        {
            "index": f.index, "prompt": f.line["prompt"], "picked": f.picked, "scores": f.scores, "made": f.made,
            "evaluations": f.spent.evaluations, "judge_calls": f.spent.judge_calls, "unjudged": f.unjudged,
        }
        for f in found
    ]  # fmt: skip
    totals = {key: sum(p[key] for p in prompts) for key in ("made", "evaluations", "judge_calls")}
    return totals | {"unjudged": [p["index"] for p in prompts if p["unjudged"]], "prompts": prompts}


def _generator(pipe: Any, seed: int, sampling: dict[str, Any]) -> Generator:
    if isinstance(pipe, Pipeline):
        try:
            return PipelineGenerator(pipe, Sampling(seed=seed, **sampling))
        except TypeError as error:
            raise ValueError(f"no setting of sampling: {str(error).split('argument')[-1].strip()}") from None
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer from 0 on, got {seed!r}")
    if hasattr(pipe, "advance") and hasattr(pipe, "finish"):
        if sampling:
            raise ValueError(f"a generator brings its own settings; {', '.join(sampling)} cannot be changed here")
        return pipe
    return DiffusersGenerator(pipe, **sampling)


def _check(
    generator: Generator, judges: Sequence[Patient], lines: Sequence[Mapping[str, Any]], n: int, pick: int, policy: str,
    budget: int | None, stop_at: float | None, shard: tuple[int, int],
) -> None:  # fmt: skip
    if not lines or not judges:
        raise ValueError("search needs at least one prompt and one judge")
    for index, line in enumerate(lines):
        if not isinstance(line.get("prompt"), str):
            raise ValueError(f'prompt {index} has no text "prompt"')
    generator.check([line["prompt"] for line in lines])
    check_options(n, pick, policy, stop_at, len(judges))
    if POLICIES[policy].previews and not generator.can_pause:
        why = generator.no_pause() if isinstance(generator, DiffusersGenerator) else None
        reason = "" if why is None else f": {why}"
        raise ValueError(
            f"{policy} needs previews, and {type(generator).__name__} says this pipeline cannot pause{reason}"
        )
    if budget is not None:
        # The least is `pick` pictures for every prompt, whatever the policy makes of them.
        least = len(lines) * pick * (generator.evaluations(0, generator.steps) + len(judges))
        if not isinstance(budget, int) or budget < least:
            raise ValueError(
                f"budget must be at least {least} for {pick} pictures of each of {len(lines)} prompts, got {budget!r}"
            )
    check_shard(*shard, len(lines))


def check_options(n: int, pick: int, policy: str, stop_at: float | None, judges: int) -> None:
    """ValueError for options of a search that cannot be, whatever the pipeline; `judges` is their number."""
    for name, value in (("n", n), ("pick", pick)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if pick > n:
        raise ValueError(f"pick must be at most n = {n}, got {pick}")
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; the policies are {', '.join(POLICIES)}")
    if POLICIES[policy].threshold and stop_at is None:
        raise ValueError(f"{policy} needs stop_at, the score that is good enough")
    if stop_at is not None and not (policy in ("stop", "bandit") and math.isfinite(stop_at)):
        raise ValueError(f"stop_at must be a finite number, for stop or bandit only; got {stop_at!r} for {policy}")
    if judges > 1 and policy in ("stop", "bandit"):
        raise ValueError(
            f"{policy} needs one judge: ranks among a prompt's pictures mean nothing from prompt to prompt"
        )


def check_shard(i: int, of: int, prompts: int) -> None:
    """ValueError unless there is a part `i` of `of`, each with a prompt."""
    if not 0 <= i < of or of > prompts:
        raise ValueError(f"shard must be i/n with 0 <= i < n <= {prompts} prompts, got {i}/{of}")


def _claim(root: Path, settings: dict[str, Any], device: str) -> int:
    """Makes the folder, or finds the same run in it, on this kind of device; returns the threads that it was begun with."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"--out {root} is a file, not a folder")
    root.mkdir(parents=True, exist_ok=True)
    path = root / "run.json"
    settings = json.loads(json.dumps(settings))
    with claimed_target(path, wait=True):  # shards may begin at the same time
        _remove(root.glob(".run.json.*.partial"))  # what a killed process was writing under this lock
        _remove(root.glob("*/*/.metadata.jsonl.*.partial"))
        if path.exists():
            recorded = read_json(path)
            shown = recorded | {name: redacted_values(recorded.get(name)) for name in ("judges", "sampling")}
            if shown != recorded:  # an earlier version wrote a judge's password
                write_durably((json.dumps(shown, indent=1) + "\n").encode(), path)
            recorded = shown
            for name, value in settings.items():
                if recorded.get(name) != value:
                    raise ValueError(f"{root} is another run: its {name} differs; choose another --out")
            _logger.info("%s holds this run already: finished images and verdicts are used", root)
        else:
            if any(not p.name.startswith(".") for p in root.iterdir()):
                raise ValueError(f"{root} holds something else; choose another --out")
            made_with = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": device}
            recorded = settings | {"made_with": made_with}
            write_durably((json.dumps(recorded, indent=1) + "\n").encode(), path)
        for folder in ("candidates", "picks"):
            write_metadata(root / folder, settings["prompts"])
    before = recorded.get("made_with", {}).get("device", device)
    if before != device:
        raise ValueError(
            f"{root} was begun on the device {before}, this is {device}: pictures would differ by rounding"
        )
    threads = recorded.get("made_with", {}).get("threads")
    if not isinstance(threads, int) or threads < 1:
        raise DataError(f"{path} is damaged: made_with.threads")
    return threads


class _ThreadCount:
    """The number of threads of torch, one for the whole process: library products give the same bits only with the same one.

    Searches that find their own number run side by side; one that must change it runs alone.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._sharing, self._alone = 0, False

    @contextmanager
    def of(self, count: int) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: not self._alone)
            before = torch.get_num_threads()
            if before == count:
                self._sharing += 1
            else:
                self._alone = True
                self._change.wait_for(lambda: not self._sharing)
        try:
            if before != count:
                torch.set_num_threads(count)
            yield
        finally:
            if before != count:
                torch.set_num_threads(before)
            with self._change:
                if before == count:
                    self._sharing -= 1
                else:
                    self._alone = False
                self._change.notify_all()


_thread_count = _ThreadCount()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
