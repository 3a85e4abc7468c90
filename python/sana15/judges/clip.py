"""CLIP score as a judge: it ranks, and says nothing of right or wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ..storage.concurrency import using
from ..storage.files import DataError
from ..storage.redaction import said
from .base import Verdict


class ClipJudge:
    """100 times the cosine between picture and text; the text is cut to what the model reads (77 tokens for CLIP)."""

    name = "clip"

    def __init__(self, model: Any, processor: Any, source: str) -> None:
        self.model, self.processor, self.source = model.eval(), processor, source

    @staticmethod
    def load(source: str, device: str = "cpu") -> ClipJudge:
        """A folder, or a name that transformers can find; DataError where it is no CLIP."""
        from transformers import CLIPModel, CLIPProcessor

        try:
            model: Any = CLIPModel.from_pretrained(source)
            processor = CLIPProcessor.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{source} is no CLIP model: {said(error, 200)}") from None
        return ClipJudge(model.to(device), processor, source)

    def identity(self) -> dict[str, Any]:
        return {"judge": self.name, "model": self.source}

    @torch.no_grad()
    def judge(self, pictures: Sequence[Image.Image], line: Mapping[str, Any]) -> list[Verdict]:
        longest = self.model.config.text_config.max_position_embeddings
        with using(self.processor):  # its tokenizer keeps padding and truncation of the call before
            given = self.processor(
                text=[line["prompt"]], images=[picture.convert("RGB") for picture in pictures], return_tensors="pt",
                padding=True, truncation=True, max_length=longest,
            ).to(self.model.device)  # fmt: skip
        out = self.model(**given)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds.double(), out.text_embeds.double())
        return [Verdict(100 * score) for score in cosine.tolist()]
