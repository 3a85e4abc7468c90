"""Resumable runs of the training loop, for the autoencoder, the text encoder and the transformer of the mini model.

    sana15 train configs/mini_autoencoder.yaml
    sana15 train configs/mini.yaml

Run the same command again to resume: the newest whole checkpoint in `out` is taken up (a damaged one is passed over), and
batches, noise and dropped captions depend on (seed, step) only, so a run that was killed at any moment ends with the same
weights, metrics and samples as an uninterrupted one, whenever samples are taken.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import nn
from tqdm import tqdm

import sana_ext.optim

from ..device import resolved
from ..model.measuring import evaluating, unchanged
from ..storage.concurrency import claiming, require_one_process, using
from ..storage.files import DataError, replace_folder, staging, sync_folder, write_durably
from .checkpoints import checkpoints, remove_old, require_free, resume, save, take_over
from .config import TrainConfig, load_config
from .data import Batch, scene_batches
from .loop import Average, fit, step_seed
from .soap import SOAP
from .tasks import AutoencoderTask, TransformerTask
from .text_task import TextTask

_logger = logging.getLogger(__name__)


class Task(Protocol):
    """The protocol of what is trained: a module, its loss on a batch, and what to write down now and then."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor: ...

    def sample(self, folder: Path, step: int) -> dict[str, float]: ...

    def export(self, folder: Path) -> None: ...

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        ...


def learning_rate(config: TrainConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "constant":
        return config.lr * warm
    if config.schedule == "decay":  # `steps` may still change until the decay begins
        return config.lr * warm * min(1.0, (config.steps - step) / (config.decay_part * config.steps))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(step / config.steps, 1.0)))


@claiming(lambda given: given["config"].out)
def train(config: TrainConfig) -> Path:
    """Runs (or resumes) to config.steps and exports the averaged weights to out/export; returns that folder.

    Raises:
        ValueError: another run works in `out`, a run of another configuration is there, or a launcher started several
            processes. DataError: the loss is not finite.
    """
    require_one_process("training")
    out, device = Path(config.out), resolved(config.device)
    out.mkdir(parents=True, exist_ok=True)
    _require_same_run(config, out)
    with using(torch.default_generator):  # two trainings of one process begin with their own weights
        torch.manual_seed(config.seed)
        task = _task(config, device)
    parameters = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = make_optimizer(config, task.groups())
    average = Average(task.module, config.ema)
    first, averaged = resume(out, task.module, optimizer)
    require_free(out, lambda step: first < step <= config.steps and save_is_due(config, step))
    if first:
        _logger.info("%s: training goes on after step %d of %d", out, first, config.steps)
    average.values = averaged or average.values
    remove_old(out, first, config.keep)  # as the run would have done that was killed
    if not first and isinstance(task, TransformerTask) and config.transformer.start_run:
        take_over(Path(config.transformer.start_run), config.optimizer, optimizer, task.growth_map)
    _record_config(config, out)  # now that model, data and checkpoint are known to be good
    log = MetricsLog(out, first)

    def sample(done: int) -> None:
        log.write(done, _with_average(task, average, lambda: task.sample(out / "samples", done)))

    if first and sample_is_due(config, first) and not log.has_sample:  # killed between checkpoint and sample
        sample(first)
    bar = tqdm(total=config.steps, initial=first, desc=config.task, unit="step", disable=None)
    batches = scene_batches(config.seed, config.batch_size, first, config.steps, config.workers)
    meter = _Meter(device)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            return task.loss(next(batches), generator)

    @contextmanager
    def own_draws(step: int) -> Iterator[None]:
        """Seeds what a module draws (dropout), also where backward computes again: a resumed run draws the same."""
        with using(torch.default_generator):
            torch.manual_seed(step_seed(config.seed, step))
            yield

    def done(step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        meter.add(loss)
        bar.update()
        step += 1
        if step % config.log_every == 0 or step == config.steps:
            mean, speed = meter.read(config.batch_size)
            if not math.isfinite(mean):
                raise DataError(f"the loss is {mean} at step {step}")
            rate = learning_rate(config, step - 1)
            log.write(step, {"loss": mean, "lr": rate, "grad_norm": norm.item(), "images_per_s": speed})
            bar.set_postfix(loss=f"{mean:.4f}", lr=f"{rate:.1e}", imgs=f"{speed:.0f}/s")
        if save_is_due(config, step):
            log.sync()
            save(out, step, task.module, average.values, optimizer, config.keep)
        if sample_is_due(config, step):
            with meter.paused():
                sample(step)

    fit(
        loss, parameters, optimizer, range(first, config.steps), seed=config.seed,
        rate=lambda step: learning_rate(config, step), clip=config.grad_clip, average=average, around=own_draws,
        not_finite=None, done=done,
    )  # fmt: skip
    bar.close()
    log.close()
    export(task, average, out / "export")
    return out / "export"


def save_is_due(config: TrainConfig, done: int) -> bool:
    """Tells whether a checkpoint is written when so many steps are done."""
    return done % config.save_every == 0 or done == config.steps


def sample_is_due(config: TrainConfig, done: int) -> bool:
    """Tells whether a sample is taken when so many steps are done."""
    return done % config.sample_every == 0 or done == config.steps


def export(task: Task, average: Average, target: Path) -> None:
    """The averaged weights as a model folder, which appears whole; files of others in a folder that is there stay in it."""
    with staging(target) as made:
        _with_average(task, average, lambda: task.export(made))
        for path in target.iterdir() if target.is_dir() else ():
            if not (made / path.name).exists():
                if path.is_dir() and not path.is_symlink():
                    shutil.copytree(path, made / path.name, symlinks=True)
                else:
                    shutil.copy2(path, made / path.name, follow_symlinks=False)
        replace_folder(made, target)


def make_optimizer(config: TrainConfig, parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
    shared: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **shared, fused=True)
    if config.optimizer == "adamw8bit":
        return sana_ext.optim.AdamW8bit(parameters, **shared)
    if config.optimizer == "soap":
        return SOAP(parameters, **shared)
    if config.optimizer == "came":
        shared["code"] = None
    return sana_ext.optim.CAME8bit(parameters, **shared)


class _Meter:
    """The mean loss since the last reading, and the images per second, pauses not counted. It reads the device at readings only."""

    def __init__(self, device: str) -> None:
        self.total = torch.zeros((), device=device)
        self.steps, self.begin = 0, time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        self.total += loss
        self.steps += 1

    def read(self, images: int) -> tuple[float, float]:
        """(mean loss, images per second), with so many images a step."""
        speed = self.steps * images / (time.perf_counter() - self.begin)
        mean = self.total.item() / self.steps
        self.total.zero_()
        self.steps, self.begin = 0, time.perf_counter()
        return mean, speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin


def _task(config: TrainConfig, device: str) -> Task:
    tasks: dict[str, Callable[[TrainConfig, str], Task]]
    tasks = {"autoencoder": AutoencoderTask, "text": TextTask, "transformer": TransformerTask.of_config}
    return tasks[config.task](config, device)


def _with_average(task: Task, average: Average, action: Callable[[], Any]) -> Any:
    """Runs `action` with the averaged weights in the module, in eval mode; the training after it does not notice."""
    with torch.no_grad(), unchanged(), average.applied(), evaluating(task.module):
        return action()


def _require_same_run(config: TrainConfig, out: Path) -> None:
    """ValueError for a folder that holds a run with another configuration (more steps are welcome)."""
    path, values = out / "config.yaml", dataclasses.asdict(config)
    if not path.exists() or not _holds_a_run(out) or _text_of(config).startswith(path.read_text(errors="replace")):
        return  # the same; or the start of the same, as older versions left it when they were killed
    before = dataclasses.asdict(load_config(path, []))  # options that came later take their defaults
    free: tuple[str, ...] = ("steps", "log_every", "save_every", "keep", "workers", "device", "out")
    free += ("sample_every", "sample_steps", "sample_guidance", "sample_guidance_interval")
    before["transformer"]["compile"] = values["transformer"]["compile"]
    changed = [k for k in values if k not in free and before[k] != values[k]]
    if changed:
        raise ValueError(f"{out} holds a run with another {', '.join(changed)}; choose another `out` or remove it")


def _holds_a_run(out: Path) -> bool:
    """Tells whether a run has left more here than its configuration; one that failed at its first step has not."""
    metrics = out / METRICS
    return bool(checkpoints(out)) or (out / "export").exists() or (metrics.exists() and metrics.stat().st_size > 0)


def _text_of(config: TrainConfig) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _record_config(config: TrainConfig, out: Path) -> None:
    """config.yaml; and what a killed run was about to put in its place, or in that of the metrics, is removed."""
    for name in ("config.yaml", METRICS):
        for left in out.glob(f".{name}.*.partial"):
            left.unlink(missing_ok=True)
    write_durably(_text_of(config).encode(), out / "config.yaml")


METRICS = "metrics.jsonl"


class MetricsLog:
    """metrics.jsonl, and TensorBoard where it is installed. Lines past the resumed step are dropped: each step stands once.

    Attributes:
        has_sample: whether the resumed step's sample has its line.
    """

    def __init__(self, out: Path, first: int) -> None:
        self.path = out / METRICS
        self.has_sample = False
        if self.path.exists():
            before = self.path.read_bytes()
            lines = [line for line in before.split(b"\n") if _step_of(line) <= first]
            self.has_sample = any(_step_of(line) == first and b'"loss"' not in line for line in lines)
            after = b"".join(line + b"\n" for line in lines)
            if after != before:
                write_durably(after, self.path)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board: Any = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)
        except ImportError:
            self.board = None

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Puts what is written on the disk: a checkpoint is not to outlive the metrics of its steps."""
        if self.path.exists():
            sync_folder(self.path)
            sync_folder(self.path.parent)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # a line cut off by a crash
