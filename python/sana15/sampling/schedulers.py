"""Reads how a pipeline folder's own scheduler samples: the shift is taken over, whatever else would change pictures is refused.

A folder in diffusers' layout names its scheduler's class in model_index.json and that class's settings in
scheduler/scheduler_config.json. For the two classes that SANA's folders have, every setting is here: sana15's samplers
(flow.py) compute what diffusers computes with these values. Left out, a setting has diffusers' default.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..storage.files import DataError, read_json
from ..storage.values import is_finite

#: Of folders that say nothing: SANA's own.
SAMPLER, FLOW_SHIFT = "flow_dpm", 3.0


class FolderSampler(NamedTuple):
    """The sampler of flow.SAMPLERS that a folder's scheduler is, and the shift of its noise levels."""

    sampler: str = SAMPLER
    flow_shift: float = FLOW_SHIFT


@dataclass(frozen=True)
class SchedulerClass:
    """A class of diffusers' schedulers, and with which of its settings a sampler of ours computes the same.

    Attributes:
        sampler: ours. shift: the setting that is its shift; 1 where it is left out.
        fixed: setting -> the values that give our sampler. None and False stand for whatever Python takes for false.
        defaults: diffusers' defaults of fixed settings, where they are not our sampler's values.
        idle: settings that change nothing while the fixed ones have those values.
    """

    sampler: str
    shift: str
    fixed: dict[str, tuple[Any, ...]]
    idle: frozenset[str]
    defaults: dict[str, Any] = field(default_factory=dict)

    def refused(self, name: str, value: Any) -> bool:
        allowed = self.fixed[name]
        if allowed in ((False,), (True,)):  # diffusers asks for their truth only
            return bool(value) != allowed[0]
        return isinstance(value, bool) or value not in allowed


_NO_OTHER_SIGMAS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (False,))
CLASSES = {
    "DPMSolverMultistepScheduler": SchedulerClass(
        sampler="flow_dpm",
        shift="flow_shift",
        # The first value of each is the plain one; diffusers takes the further ones for it.
        fixed=_NO_OTHER_SIGMAS
        | {
            "use_flow_sigmas": (True,),
            "use_lu_lambdas": (False,),
            "prediction_type": ("flow_prediction",),
            "algorithm_type": ("dpmsolver++",),
            "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
            "solver_order": (2,),
            "final_sigmas_type": ("zero",),
            "thresholding": (False,),
            "num_train_timesteps": (1000,),
        },
        defaults={"use_flow_sigmas": False, "prediction_type": "epsilon"},
        # Flow sigmas follow from no betas and no spacing of timesteps, and the step to sigma 0 is of first order anyway.
        idle=frozenset({
            "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "lambda_min_clipped",
            "timestep_spacing", "steps_offset", "dynamic_thresholding_ratio", "sample_max_value", "variance_type",
            "lower_order_final", "euler_at_final", "use_dynamic_shifting", "time_shift_type",
        }),
    ),
    "FlowMatchEulerDiscreteScheduler": SchedulerClass(
        sampler="flow_euler",
        shift="shift",
        fixed=_NO_OTHER_SIGMAS
        | {
            "use_dynamic_shifting": (False,),
            "invert_sigmas": (False,),
            "shift_terminal": (False,),
            "stochastic_sampling": (False,),
            "num_train_timesteps": (1000,),
        },
        idle=frozenset({"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}),
    ),
}  # fmt: skip


def folder_sampler(root: Path) -> FolderSampler:
    """Returns how the scheduler of a pipeline folder samples; SANA's Flow-DPM-Solver++ with shift 3 where the folder has none.

    Raises:
        FileNotFoundError: the folder's index names a scheduler that is not there. DataError: a class, or a setting that
        changes pictures, which sana15 does not have; or damaged files.
    """
    path = root / "scheduler" / "scheduler_config.json"
    named = _named(root)
    if not path.exists():
        if named is not None:
            raise FileNotFoundError(f"{path} is missing: model_index.json names {named}, whose shift is not known")
        return FolderSampler()
    config = read_json(path)
    name = named or config.get("_class_name")
    if name is None:  # sana15's own shorthand
        if unknown := sorted(k for k in config if k != "flow_shift" and not k.startswith("_")):
            raise DataError(f"{path} names no class (_class_name) for its {unknown[0]}")
        return FolderSampler(flow_shift=_shift(config, "flow_shift", FLOW_SHIFT, path))
    if not isinstance(name, str) or name not in CLASSES:
        raise DataError(f"{path}: sana15 has no {name}; it samples as {' or '.join(CLASSES)} do")
    scheduler = CLASSES[name]
    settings = scheduler.defaults | {k: v for k, v in config.items() if not k.startswith("_")}
    for key, value in settings.items():
        if (key in scheduler.fixed and scheduler.refused(key, value)) or _is_news(name, key, value):
            raise DataError(f"{path}: {name} with {key} {_written(value)} is not supported{_instead(scheduler, key)}")
    return FolderSampler(scheduler.sampler, _shift(config, scheduler.shift, 1.0, path))


def _named(root: Path) -> str | None:
    """The scheduler's class in model_index.json, which decides for diffusers; None where there is none."""
    path = root / "model_index.json"
    entry = read_json(path).get("scheduler") if path.exists() else None
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None


def _is_news(name: str, key: str, value: Any) -> bool:
    """Tells whether this setting is newer than this file and has another value than its default: what it does is not known here.

    What the installed diffusers does not know either, it leaves aside, such as settings left over from another class.
    """
    scheduler = CLASSES[name]
    if key in scheduler.fixed or key in scheduler.idle or key == scheduler.shift:
        return False
    import diffusers

    parameter = inspect.signature(getattr(diffusers, name).__init__).parameters.get(key)
    return parameter is not None and parameter.default != value


def _instead(scheduler: SchedulerClass, key: str) -> str:
    allowed = scheduler.fixed.get(key)
    return f", only {_written(allowed[0])}" if allowed else ""


def _written(value: Any) -> str:
    """As JSON spells it, cut short."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _shift(config: dict[str, Any], key: str, default: float, path: Path) -> float:
    value = config.get(key, default)
    if not is_finite(value) or value <= 0:
        raise DataError(f"{path}: {key} must be a finite number above 0, got {_written(value)}")
    return float(value)
