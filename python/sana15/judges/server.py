"""A vision-language model behind an OpenAI-compatible HTTP server (vLLM, llama.cpp and others) as a judge."""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from .base import Verdict
from .question import NO, YES, log_probability, question, verdict


class ServerJudge:
    """Asks POST URL/chat/completions for one token with its log-probabilities.

    Args:
        url: such as http://localhost:8000/v1. model: as the server calls it. timeout: seconds for one picture.
        The key of a server that wants one stands in the environment variable OPENAI_API_KEY.
    """

    name = "server"

    def __init__(self, url: str, model: str = "default", timeout: float = 60.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the judge's server must be http:// or https://, got {url!r}")
        self.url, self.model, self.timeout = url.rstrip("/"), model, timeout

    def identity(self) -> dict[str, Any]:
        return {"judge": self.name, "url": self.url, "model": self.model}

    def judge(self, pictures: Sequence[Image.Image], line: Mapping[str, Any]) -> list[Verdict]:
        return [self._one(picture, line["prompt"]) for picture in pictures]

    def _one(self, picture: Image.Image, prompt: str) -> Verdict:
        png = io.BytesIO()
        picture.save(png, format="PNG")
        image = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question(prompt)}]
        body = {
            "model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 1,
            "temperature": 0, "logprobs": True, "top_logprobs": 20,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return read_answer(json.load(answer))
        except urllib.error.HTTPError as error:
            raise ValueError(f"{self.url} answered {error.code}: {error.read(300).decode(errors='replace')}") from None


def read_answer(answer: Any) -> Verdict:
    """A server's answer as a verdict; a token that is not among the likeliest counts as the least likely of them.

    Raises:
        ValueError: no log-probabilities, or neither yes nor no among the likeliest tokens.
    """
    try:
        tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(str(t["token"]).strip().lower(), float(t["logprob"])) for t in tokens]
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError("the server's answer has no log-probabilities of its first token") from None
    logs = {word: [log for token, log in pairs if token == word] for word in (YES, NO)}
    if not any(logs.values()):
        raise ValueError(f"the server answered neither yes nor no but {pairs[0][0] if pairs else 'nothing'!r}")
    least = min(log for _, log in pairs)
    return verdict(*(log_probability(logs[word] or [least]) for word in (YES, NO)))
