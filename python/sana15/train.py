"""One resumable training loop for the autoencoder and the transformer of the mini model.

    sana15 train configs/mini_autoencoder.yaml
    sana15 train configs/mini.yaml

Run the same command again to resume: the newest complete checkpoint in `out` is taken up, and batches, noise and dropped
captions depend on (seed, step) only, so an interrupted run ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import nn
from tqdm import tqdm

import sana_ext.optim

from .data import Batch, scene_batches
from .device import resolved
from .files import DataError
from .growth_training import set_learning_rates
from .soap import SOAP
from .train_checkpoints import resume, save, take_over
from .train_config import TrainConfig, load_config


class Task(Protocol):
    """What is trained: a module, its loss on a batch, and what to write down now and then."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor: ...

    def sample(self, folder: Path, step: int) -> dict[str, float]: ...

    def export(self, folder: Path) -> None: ...

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        ...


class Average:
    """Exponential moving average of the weights; the decay ramps up so that the first steps are forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        state = module.state_dict()
        torch._foreach_lerp_(list(self.values.values()), [state[k] for k in self.values], 1 - decay)

    def swap(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Puts the averaged weights into the module; returns the ones that were there."""
        before = {k: v.detach().clone() for k, v in module.state_dict().items()}
        module.load_state_dict(self.values)
        return before


def learning_rate(config: TrainConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "constant":
        return config.lr * warm
    if config.schedule == "decay":  # `steps` may still change until the decay begins
        return config.lr * warm * min(1.0, (config.steps - step) / (config.decay_part * config.steps))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(step / config.steps, 1.0)))


def train(config: TrainConfig) -> Path:
    """Runs (or resumes) to config.steps and exports the averaged weights to out/export; returns that folder."""
    from .train_tasks import TransformerTask

    out, device = Path(config.out), resolved(config.device)
    out.mkdir(parents=True, exist_ok=True)
    _record_config(config, out)
    torch.manual_seed(config.seed)
    task = _task(config, device)
    parameters = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = make_optimizer(config, task.groups())
    average = Average(task.module, config.ema)
    first, averaged = resume(out, task.module, optimizer)
    average.values = averaged or average.values
    if not first and isinstance(task, TransformerTask) and config.transformer.start_run:
        take_over(Path(config.transformer.start_run), config.optimizer, optimizer, task.growth_map)
    log = MetricsLog(out, first)
    bar = tqdm(total=config.steps, initial=first, desc=config.task, unit="step", disable=None)
    begin, seen = time.perf_counter(), 0
    total = torch.zeros((), device=device)
    for batch in scene_batches(config.seed, config.batch_size, first, config.steps, config.workers):
        step = batch.step
        set_learning_rates(optimizer, learning_rate(config, step), step)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = task.loss(batch, generator)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(task.module, step)
        total += loss.detach()
        seen += 1
        bar.update()
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            rate = seen * config.batch_size / (time.perf_counter() - begin)
            values = {
                "loss": total.item() / seen,
                "lr": learning_rate(config, step),
                "grad_norm": norm.item(),
                "images_per_s": rate,
            }
            if not math.isfinite(values["loss"]):
                raise DataError(f"the loss is {values['loss']} at step {done}")
            log.write(done, values)
            bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{values['lr']:.1e}", imgs=f"{rate:.0f}/s")
            begin, seen = time.perf_counter(), 0
            total.zero_()
        if done % config.save_every == 0 or done == config.steps:
            save(out, done, task.module, average.values, optimizer, config.keep)
        if done % config.sample_every == 0 or done == config.steps:
            log.write(done, _with_average(task, average, lambda done=done: task.sample(out / "samples", done)))
            begin = time.perf_counter()
    bar.close()
    log.close()
    _with_average(task, average, lambda: task.export(out / "export"))
    return out / "export"


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


def _task(config: TrainConfig, device: str) -> Task:
    from .text_task import TextTask
    from .train_tasks import AutoencoderTask, TransformerTask

    tasks: dict[str, Callable[[TrainConfig, str], Task]]
    tasks = {"autoencoder": AutoencoderTask, "text": TextTask, "transformer": TransformerTask}
    return tasks[config.task](config, device)


def _with_average(task: Task, average: Average, action: Any) -> Any:
    """Runs `action` with the averaged weights in the module, in eval mode."""
    before = average.swap(task.module)
    task.module.eval()
    try:
        with torch.no_grad():
            return action()
    finally:
        task.module.load_state_dict(before)
        task.module.train()


def _record_config(config: TrainConfig, out: Path) -> None:
    """Writes config.yaml; refuses a folder that holds a run with another configuration (more steps are welcome)."""
    path, values = out / "config.yaml", dataclasses.asdict(config)
    if path.exists():
        before = dataclasses.asdict(load_config(path, []))  # options that came later take their defaults
        free: tuple[str, ...] = ("steps", "log_every", "save_every", "keep", "workers", "device", "out")
        free += ("sample_every", "sample_steps", "sample_guidance", "sample_guidance_interval")
        before["transformer"]["compile"] = values["transformer"]["compile"]
        changed = [k for k in values if k not in free and before[k] != values[k]]
        if changed:
            raise ValueError(f"{out} holds a run with another {', '.join(changed)}; choose another `out` or remove it")
    path.write_text(yaml.safe_dump(values, sort_keys=False))


class MetricsLog:
    """metrics.jsonl, and TensorBoard where it is installed. Lines past the resumed step are dropped: each step stands once."""

    def __init__(self, out: Path, first: int) -> None:
        self.path = out / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= first]
            self.path.write_text("".join(line + "\n" for line in lines))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board: Any = SummaryWriter(str(out / "tensorboard"), purge_step=first)
        except ImportError:
            self.board = None

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # a line cut off by a crash
