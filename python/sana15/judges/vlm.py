"""A vision-language model of transformers as a judge; no code that comes with a model is ever run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ..storage.concurrency import using
from ..storage.files import DataError
from ..storage.redaction import said
from .base import Verdict
from .question import NO, YES, log_probability, question, verdict, word_of


class VisionLanguageJudge:
    """Any model of transformers' image-text-to-text class whose processor has a chat template."""

    name = "vlm"

    def __init__(self, model: Any, processor: Any, source: str) -> None:
        self.model, self.processor, self.source = model.eval(), processor, source
        if not getattr(processor, "chat_template", None):
            raise DataError(f"{source} has no chat template: how it is asked is not known")
        self.tokens = _tokens(processor.tokenizer)
        for word, tokens in self.tokens.items():
            if not tokens:
                raise DataError(f"{source}: {word!r} is not one token for this model")

    @staticmethod
    def load(source: str, device: str = "cpu") -> VisionLanguageJudge:
        """A folder, or a name that transformers can find; DataError where it is no such model."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
            model: Any = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=False, dtype="auto")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{source} is no vision-language model of transformers: {said(error, 200)}") from None
        return VisionLanguageJudge(model.to(device), processor, source)

    def identity(self) -> dict[str, Any]:
        return {"judge": self.name, "model": self.source, "dtype": str(self.model.dtype)}

    def judge(self, pictures: Sequence[Image.Image], line: Mapping[str, Any]) -> list[Verdict]:
        return [self._one(picture.convert("RGB"), line["prompt"]) for picture in pictures]

    @torch.no_grad()
    def _one(self, picture: Image.Image, prompt: str) -> Verdict:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question(prompt)}]
        with using(self.processor):  # its tokenizer keeps padding and truncation of the call before
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        logs = self.model(**inputs).logits[0, -1].double().log_softmax(-1)
        yes, no = (log_probability(logs[self.tokens[word]].tolist()) for word in (YES, NO))
        logs[self.tokens[YES] + self.tokens[NO]] = -torch.inf
        return verdict(yes, no, logs.max().item(), self.processor.tokenizer.decode([int(logs.argmax())]))


def _tokens(tokenizer: Any) -> dict[str, list[int]]:
    """Every way in which yes and no are one token: with a capital, in capitals, after a blank, a quote or Markdown's stars."""
    special = set(tokenizer.all_special_tokens)
    found: dict[str, list[int]] = {YES: [], NO: []}
    for token, index in tokenizer.get_vocab().items():
        if token not in special and (word := word_of(token)) in found:
            found[word].append(index)
    return {word: sorted(indices) for word, indices in found.items()}
