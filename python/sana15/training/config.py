"""The training configuration: dataclasses whose defaults are the documentation, YAML files and dotted overrides on top."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..device import DEVICES
from ..storage.files import DTYPES

MOST_STEPS = 99_999_999  # a checkpoint's name has eight digits


@dataclass
class TransformerConfig:
    """Model of the `transformer` task."""

    size: str = "mini"
    autoencoder: str = ""  # folder of the trained autoencoder
    text_encoder: str = ""  # folder of a trained one, which stays as it is; "": trained along, from scratch
    flow_shift: float = 3.0
    noises: int = 1  # noise levels of every picture: a step's batch is so many times the pictures
    stratified: bool = False  # noise levels evenly spread over their distribution in every batch
    caption_drop: float = 0.1  # part of the prompts replaced by the empty one, for guidance
    gradient_checkpointing: bool = False
    start: str = (
        ""  # pipeline folder to start from, such as `sana15 grow` makes; its sizes take the place of those above
    )
    start_run: str = ""  # folder of the run that `start` comes from: its optimizer states are taken over
    old_lr: float = 1.0  # of a grown model: times the learning rate, for its copied blocks
    new_lr: float = 1.0  # and for its new ones
    block_lr: list[float] = field(default_factory=list)  # or one number for every block
    freeze_old: int = 0  # copied blocks are not trained for this many steps
    teacher: str = ""  # pipeline folder that `start` was pruned from; its activations are a second loss
    distill: float = 0.0  # weight of that loss
    flow_weight: float = 1.0  # weight of the flow loss itself; 0 leaves the distillation alone
    compile: bool = False  # torch.compile the transformer: a minute or two at the start, then quicker steps
    export: str = "fp16"  # dtype of the exported transformer: fp32 | bf16 | fp16

    def __post_init__(self) -> None:
        if self.noises < 1:
            raise ValueError(f"transformer.noises must be at least 1, got {self.noises}")
        if self.export not in DTYPES:
            raise ValueError(f"transformer.export must be one of {', '.join(DTYPES)}, got {self.export!r}")
        if not self.flow_weight >= 0 or (self.flow_weight == 0 and not self.distill):
            raise ValueError("transformer.flow_weight must be above 0, or 0 beside a transformer.distill")
        if any(not rate >= 0 for rate in (self.old_lr, self.new_lr)) or self.freeze_old < 0:
            raise ValueError("transformer.old_lr, new_lr and freeze_old must be at least 0")
        if self.start_run and not self.start:
            raise ValueError("transformer.start_run needs a transformer.start")


@dataclass
class TextConfig:
    """The mini text encoder: of the `text` task, and of a transformer that has none yet."""

    width: int = 128
    heads: int = 4
    passes: int = 2  # times that its one layer is applied


@dataclass
class AutoencoderConfig:
    """Loss of the `autoencoder` task: mean absolute error plus its like on the picture's differences."""

    edge_weight: float = 1.0
    latent_noise: float = 0.0  # standard deviation of noise on the latents: a decoder that forgives small errors


@dataclass
class TrainConfig:
    """One training run; `sana15 train FILE key=value ...`."""

    task: str = "transformer"  # transformer | autoencoder | text
    out: str = "runs/mini"
    seed: int = 0
    steps: int = 20000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 200  # steps of linear warm-up
    schedule: str = "constant"  # constant | cosine | decay (constant, then linearly to 0 over decay_part)
    decay_part: float = 0.2  # of the steps
    optimizer: str = "adamw"  # adamw | adamw8bit | came8bit | came (the same with an fp32 first moment) | soap
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # three for CAME
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # global norm; 0 switches clipping off
    ema: float = 0.999  # decay of the averaged weights that are evaluated and exported
    precision: str = "fp32"  # fp32 | bf16 (autocast)
    device: str = "auto"  # auto | cpu | cuda
    workers: int = 0  # processes that render ahead
    log_every: int = 20
    save_every: int = 500
    keep: int = 2  # checkpoints kept
    sample_every: int = 1000
    sample_steps: int = 20
    sample_guidance: float = 4.5  # with the interval: of the samples, and the exported model's own
    sample_guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    def __post_init__(self) -> None:
        for name, allowed in {
            "task": ("transformer", "autoencoder", "text"),
            "schedule": ("constant", "cosine", "decay"),
            "optimizer": ("adamw", "adamw8bit", "came8bit", "came", "soap"),
            "precision": ("fp32", "bf16"),
            "device": DEVICES,
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.decay_part <= 1:
            raise ValueError(f"decay_part must be above 0 and at most 1, got {self.decay_part}")
        expected = 3 if self.optimizer.startswith("came") else 2
        if len(self.betas) != expected:
            raise ValueError(f"betas must be {expected} numbers for {self.optimizer}, got {self.betas}")
        for name in ("steps", "batch_size", "log_every", "save_every", "keep", "sample_every", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}, got {self.steps}")


def load_config(path: str | Path | None, overrides: list[str]) -> TrainConfig:
    """Defaults, then the YAML file, then `a.b=value` overrides (values in YAML's syntax).

    Raises:
        ValueError: an unknown key (named), a value of the wrong type, or text that is no YAML. FileNotFoundError.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a mapping of keys to values")
    return _build(TrainConfig, parse_overrides(overrides, values), "")


def parse_overrides(overrides: list[str], values: dict[str, Any] | None = None) -> dict[str, Any]:
    """`values` with `a.b=value` overrides put in, values in YAML's syntax; ValueError names a bad one."""
    values = {} if values is None else values
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} must have the form key=value")
        target = values
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"override {override!r}: {parent} is no mapping")
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"override {override!r}: the value is not valid YAML") from None
    return values


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    types = typing.get_type_hints(cls)
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise ValueError(f"unknown configuration key {prefix}{unknown[0]}; known: {', '.join(types)}")
    built = {}
    for name, value in values.items():
        kind = types[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{name} must be a mapping, got {value!r}")
            built[name] = _build(kind, value, f"{prefix}{name}.")
        elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            built[name] = _number(value, prefix + name)
        elif kind == list[float] and isinstance(value, list):
            built[name] = [_number(v, f"{prefix}{name}[{i}]") for i, v in enumerate(value)]
        elif isinstance(value, typing.get_origin(kind) or kind) and not (kind is int and isinstance(value, bool)):
            built[name] = value
        else:
            raise ValueError(f"{prefix}{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
    return cls(**built)


def _number(value: Any, name: str) -> float:
    """The number; YAML 1.1 reads 1e-3 as text."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
