"""The model's velocity under classifier-free guidance, for a batch of prompts whose text is encoded once."""

from __future__ import annotations

import torch

from ..model.transformer import SanaTransformer, TextStates
from . import flow

KEPT_TEXT = (
    2 << 30
)  # bytes of the text's keys and values that are kept between steps; larger ones are made at every step


class GuidedVelocity:
    """velocity(latents, timestep, guide=True) of a batch; with guide=False, or guidance 1, the conditional model's at half the cost.

    The text's keys and values are computed once, with the weights of the first step, unless it is a very large batch or
    gradients are asked for.

    Args:
        text, mask: features [B, T, width] and mask [B, T]; under guidance [2B, ...], the unconditional ones first.
    """

    def __init__(
        self,
        transformer: SanaTransformer,
        text: torch.Tensor,
        mask: torch.Tensor,
        guidance: float,
        projected: TextStates | None = None,
    ) -> None:
        self.transformer, self.text, self.mask, self.guidance = transformer, text, mask, guidance
        self._projected = projected

    def __call__(self, latents: torch.Tensor, timestep: float, guide: bool = True) -> torch.Tensor:
        both = guide and self.guidance != 1.0
        x = torch.cat([latents, latents]) if both else latents
        t = torch.full((x.shape[0],), timestep * self.transformer.config.timestep_scale, device=x.device)
        states, mask = self._of_text(x.shape[0])
        v = self.transformer(x.to(self.text.dtype), states, t, mask)
        if not both:
            return v.float()
        unconditional, conditional = v.chunk(2)
        return flow.guided(conditional, unconditional, self.guidance)

    def select(self, indices: torch.Tensor) -> GuidedVelocity:
        """Returns the velocity of the chosen images only; what is computed stays computed."""
        rows = indices
        if self.guidance != 1.0:
            rows = torch.cat([indices, indices + len(self.text) // 2])
        projected = None if self._projected is None else self._projected.select(rows)
        return GuidedVelocity(self.transformer, self.text[rows], self.mask[rows], self.guidance, projected)

    def _of_text(self, rows: int) -> tuple[torch.Tensor | TextStates, torch.Tensor | None]:
        config = self.transformer.config
        values = self.text.shape[:2].numel() * 2 * config.num_layers * config.width
        too_large = values * self.text.element_size() > KEPT_TEXT
        if torch.is_grad_enabled() or too_large or not self.transformer.projects:
            return self.text[-rows:], self.mask[-rows:]
        if self._projected is None:
            self._projected = self.transformer.project(self.text, self.mask)
        return self._projected if rows == len(self.text) else self._projected.last(rows), None


def stack(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Concatenates two batches of text, the shorter padded with zeros (masked tokens) to the longer one's length."""
    length = max(a.shape[1], b.shape[1])

    def pad(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(t, (*[0] * (2 * (t.dim() - 2)), 0, length - t.shape[1]))

    return torch.cat([pad(a), pad(b)])
