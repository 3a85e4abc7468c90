"""Any diffusers pipeline as a generator that can pause, without knowing its scheduler's history or its latents' layout.

Each picture is one ordinary call of the pipeline, batch 1, in a thread of its own that waits inside the step callback: what a
pause must keep is what stands on that thread's stack, and what the call has put on the pipeline's models (call_state.py). Threads
never run at the same time. So pausing cannot change a picture, not even by rounding, and select only lets the others go.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

import sana_ext

from ..storage.concurrency import using
from ..storage.redaction import redacted_values
from .call_state import Turn, caches, reset_caches
from .settings import Item, Seed

OWN = ("prompt", "generator", "latents", "num_images_per_prompt", "output_type", "return_dict", "callback_on_step_end",
       "callback_on_step_end_tensor_inputs")  # fmt: skip


class DiffusersGenerator:
    """A diffusers pipeline as a Generator (see generator.py).

    Pictures are made one at a time; a state is a list of them. Autocast and other settings of the caller's thread do not reach a
    paused picture. Pipelines with offloaded models, or with diffusers' attention caches, whose state belongs to one call from its
    first step to its last, cannot pause. Generators of several threads may share a pipeline: its parts serve one picture at a
    time. One picture's noise comes from torch.Generator().manual_seed(seed.number()) on the CPU.

    Args:
        pipe: the pipeline; after a picture, and while one is paused, it and its models are as before.
        evaluations: of the denoiser, per step and picture. Default 2 where guidance_scale is above 1 and the pipeline takes a
            negative_prompt, else 1. They are counted: a picture that takes more than announced is an error.
        decode: latents [1, ...] -> pictures, for previews. Default: pipe.vae with its scaling and shift, on 4-D latents.
        arguments: passed to every call, such as num_inference_steps=20, guidance_scale=4.5, height=1024.

    Raises:
        ValueError: an argument that the pipeline does not take or that belongs to the search.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        evaluations: int | None = None,
        decode: Callable[[torch.Tensor], list[Image.Image]] | None = None,
        **arguments: Any,
    ) -> None:
        known = inspect.signature(pipe.__call__).parameters
        for name in arguments:
            if name in OWN:
                raise ValueError(f"{name} is set by the search; leave it out")
            if name not in known:
                raise ValueError(f"{type(pipe).__name__} takes no {name}")
        if "generator" not in known or "prompt" not in known:
            raise ValueError(f"{type(pipe).__name__} takes no prompt or no generator: it is no text-to-image pipeline")
        self.pipe, self.arguments, self.decode = pipe, arguments, decode
        self.steps = int(self._argument("num_inference_steps", 1))
        guided = float(self._argument("guidance_scale", 1.0) or 1.0) > 1 and "negative_prompt" in known
        self._per_step = (2 if guided else 1) if evaluations is None else evaluations

    @property
    def can_pause(self) -> bool:
        return self.no_pause() is None

    def no_pause(self) -> str | None:
        """Why it cannot pause, as the pipeline stands now; None: it can."""
        known = inspect.signature(self.pipe.__call__).parameters
        if "callback_on_step_end" not in known or "latents" not in getattr(self.pipe, "_callback_tensor_inputs", ()):
            return "it has no step callback with latents"
        if getattr(self.pipe, "_all_hooks", None):  # they are moved away whenever a picture is done
            return "its models are offloaded"
        if found := caches(self.pipe):
            return f"it has caches whose state is one call's ({', '.join(found)})"
        return None

    def _argument(self, name: str, missing: Any) -> Any:
        parameter = inspect.signature(self.pipe.__call__).parameters.get(name)
        default = missing if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
        return self.arguments.get(name, default)

    def check(self, prompts: Sequence[str]) -> None:
        pass  # a diffusers pipeline takes any text

    def identity(self) -> dict[str, Any]:
        """Class, folder, configurations and arguments. The weights are not hashed."""
        parts = {name: dict(getattr(part, "config", {}) or {}) if hasattr(part, "config") else type(part).__name__
                 for name, part in self.pipe.components.items() if name not in ("tokenizer", "text_encoder")}  # fmt: skip
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()
        name = getattr(self.pipe.config, "_name_or_path", None) or type(self.pipe).__name__
        arguments = {
            k: v if isinstance(v, (str, int, float, type(None))) else repr(v) for k, v in self.arguments.items()
        }
        return {
            "model": {"name": redacted_values(str(name)), "class": type(self.pipe).__name__, "config": digest}
        } | arguments

    def describe(self, item: Item) -> dict[str, Any]:
        identity = self.identity()
        return {
            "prompt": item.prompt, "negative_prompt": self.arguments.get("negative_prompt") or "",
            "prompt_index": item.index, "candidate": item.candidate, "steps": self.steps,
            "sampler": type(self.pipe.scheduler).__name__, "guidance": self._argument("guidance_scale", None),
            "model": identity["model"]["name"], "model_sha256": identity["model"]["config"],
            "version": sana_ext.__version__,
        }  # fmt: skip

    def evaluations(self, first: int, last: int) -> int:
        return self._per_step * (last - first)

    def start(self, prompts: Sequence[str], seeds: Sequence[Seed]) -> list[_Run]:
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"{len(prompts)} prompts need as many seeds, at least one; got {len(seeds)}")
        return [_Run(self, prompt, seed) for prompt, seed in zip(prompts, seeds)]

    def advance(self, state: list[_Run], to_step: int) -> list[_Run]:
        self._require_pause()
        if not all(run.step <= to_step <= self.steps for run in state):
            raise ValueError(f"to_step must be from {max(run.step for run in state)} to {self.steps}, got {to_step}")
        for run in state:
            run.advance(to_step)
        return state

    def preview(self, state: list[_Run]) -> list[Image.Image]:
        self._require_pause()
        pictures = []
        for run in state:
            if run.step == 0:
                raise ValueError("there is no preview before the first step")
            if run.x0 is None:
                name = type(self.pipe.scheduler).__name__
                raise ValueError(f"{name} does not tell what finished picture it expects: no previews with it")
            pictures += (self.decode or self._decode)(run.x0)
        return pictures

    def select(self, state: list[_Run], indices: Sequence[int]) -> list[_Run]:
        if not all(0 <= i < len(state) for i in indices) or len(set(indices)) < len(indices):
            raise ValueError(f"indices must differ and be from 0 to {len(state) - 1}, got {list(indices)}")
        for i, run in enumerate(state):
            if i not in indices:
                run.stop()
        return [state[i] for i in indices]

    def finish(self, state: list[_Run]) -> list[Image.Image]:
        return [run.finish() for run in state]

    def _require_pause(self) -> None:
        if (why := self.no_pause()) is not None:
            raise ValueError(f"{type(self.pipe).__name__} cannot pause: {why}; choose a policy without previews")

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        vae, processor = getattr(self.pipe, "vae", None), getattr(self.pipe, "image_processor", None)
        scaling = getattr(getattr(vae, "config", None), "scaling_factor", None)
        if latents.dim() != 4 or vae is None or scaling is None or processor is None:
            raise ValueError(f"give decode=: how {type(self.pipe).__name__} decodes its latents is not known")
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with using(vae):
            pictures = vae.decode(latents.to(vae.dtype) / scaling + shift, return_dict=False)[0]
        return processor.postprocess(pictures, output_type="pil")


class _Stopped(BaseException):
    """Ends a call of the pipeline from inside; no Exception, so that no pipeline handles it."""


class _Run:
    """One picture: a call of the pipeline, in a thread that moves only while somebody waits for it."""

    def __init__(self, generator: DiffusersGenerator, prompt: str, seed: Seed) -> None:
        self.generator, self.prompt, self.seed = generator, prompt, seed
        self.step = 0  # steps done
        self.x0: torch.Tensor | None = None  # the scheduler's last data prediction, where it tells one
        self._target: int | None = 0  # pause when so many are done; None: never
        self._rows = 0
        self._picture: Image.Image | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False

    def advance(self, to_step: int | None) -> None:
        if self._over or (to_step is not None and self.step >= to_step):
            return
        self._target = to_step
        if self._thread is None:
            self._thread = threading.Thread(target=self._body, daemon=True, name=f"picture {tuple(self.seed)}")
            self._thread.start()
        self._go.release()
        try:
            self._back.acquire()
        except (
            BaseException
        ):  # interrupted: the call ends at its next step, and takes away what it has put on the models
            self.stop()
            raise
        if self._error is not None:
            raise self._error

    def finish(self) -> Image.Image:
        if self._thread is None and not self._over:
            self._target = None
            self._picture, self._over = self._call(), True
        self.advance(None)
        if self._picture is None:
            raise ValueError("this picture was given up by select, or failed")
        return self._picture

    def stop(self) -> None:
        self._over = True
        if self._thread is not None and self._thread.is_alive():
            self._go.release()
            self._thread.join()

    def _body(self) -> None:
        self._go.acquire()
        try:
            if not self._over:
                self._picture = self._call()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._over = True
        self._back.release()

    def _call(self) -> Image.Image:
        """The whole call; its parts are free again at the end and in every pause."""
        self._turn = Turn(self.generator.pipe)
        self._turn.begin()
        try:
            return self._picture_of(self.generator.pipe)
        finally:
            self._turn.end()

    def _picture_of(self, shared: Any) -> Image.Image:
        """One call of a shallow copy of the pipeline with a scheduler (and guider) of its own.

        Of a pipeline with caches it is the pipeline itself: what tells them the timestep reads it there.
        """
        generator = self.generator
        cached, before = bool(caches(shared)), dict(vars(shared))
        pipe = shared if cached else copy.copy(shared)
        try:
            if cached:
                reset_caches(pipe)
            for name, part in before.items():
                if not isinstance(part, torch.nn.Module) and (
                    hasattr(part, "set_timesteps") or hasattr(part, "set_state")
                ):
                    setattr(pipe, name, copy.deepcopy(part))
            pipe.set_progress_bar_config(disable=True)
            return self._called(generator, pipe)
        finally:
            if cached:
                vars(pipe).clear()
                vars(pipe).update(before)
                reset_caches(pipe)

    def _called(self, generator: DiffusersGenerator, pipe: Any) -> Image.Image:
        arguments = dict(generator.arguments)
        if generator.can_pause:
            self._watch(pipe.scheduler)
            arguments |= {"callback_on_step_end": self._callback, "callback_on_step_end_tensor_inputs": ["latents"]}
        denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
        if denoiser is not None:  # until the turn ends
            denoiser.register_forward_pre_hook(self._count, with_kwargs=True)
        out = pipe(self.prompt, generator=torch.Generator().manual_seed(self.seed.number()), **arguments)
        allowed = generator.evaluations(0, generator.steps)
        if self._rows > allowed:
            raise ValueError(
                f"a picture took {self._rows} evaluations of the denoiser, announced were {allowed}: "
                f"give evaluations={-(-self._rows // generator.steps)}"
            )
        return out.images[0]

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim())
        self._rows += len(rows)

    def _callback(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.step = index + 1
        if self._target is not None and self.step >= self._target and not self._over:
            self._turn.end()
            self._back.release()
            self._go.acquire()
            self._turn.begin()
        if self._over:
            raise _Stopped
        return {}

    def _watch(self, scheduler: Any) -> None:
        """Notes the data prediction at every step of this picture's own scheduler."""
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at its signature
        def watched(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            plain = kwargs.pop("return_dict", True) is False
            out = step(model_output, timestep, sample, *args, **kwargs)
            self.x0 = data_prediction(scheduler, out, model_output, sample)
            return out.to_tuple() if plain else out

        scheduler.step = watched


def data_prediction(scheduler: Any, out: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor | None:
    """The clean latents that a step of a diffusers scheduler was aiming at; None where it does not say."""
    told = getattr(out, "pred_original_sample", None)
    if told is not None:
        return told
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        levels = scheduler.sigmas.to(sample)  # they end at 0, inverted ones at 1
        return sample + (levels[-1] - levels[scheduler.step_index - 1]) * model_output
    config = scheduler.config  # may also hold settings of the class that it was made from
    if config.get("algorithm_type") in ("dpmsolver++", "sde-dpmsolver++") or config.get("predict_x0"):
        history = getattr(scheduler, "model_outputs", None)  # converted to data predictions, the last one last
        return history[-1] if history else None
    return None
