"""A vision-language model behind an OpenAI-compatible HTTP server (vLLM, llama.cpp and others) as a judge."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..storage.redaction import clean_key, hide, hide_url, redacted, redacted_values, said, split_userinfo
from .answers import read_answer
from .base import Verdict
from .question import question

__all__ = ["ServerJudge", "read_answer"]

KEY = "OPENAI_API_KEY"
LONGEST = 300  # letters of a server's error that are passed on


class _Staying(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send the key on to wherever it points."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ServerJudge:
    """Asks POST URL/chat/completions for one token with its log-probabilities.

    Args:
        url: such as http://localhost:8000/v1; user:password@ before the host is sent as basic authentication, and a query is
            kept. model: as the server calls it. timeout: seconds for one picture.
        The key of a server that wants one stands in the environment variable OPENAI_API_KEY; blanks and line ends around it do not
        count. No password and no key is in `url`, `identity()` or a message.

    Raises:
        ValueError: no such URL, or a key that no header can carry.
    """

    name = "server"

    def __init__(self, url: str, model: str = "default", timeout: float = 60.0) -> None:
        url = url.strip()
        hide_url(url)
        bare, user, password = split_userinfo(url)
        if not bare.startswith(("http://", "https://")):
            raise ValueError(f"the judge's server must be http:// or https://, got {redacted(url)!r}")
        if not all("!" <= c <= "~" for c in bare):
            raise ValueError(f"the judge's URL holds a blank or a letter that is not ASCII: {redacted(url)!r}")
        if not _has_host(bare):
            raise ValueError(f"the judge's URL has no host, or a port that is no number: {redacted(url)!r}")
        self._authorization = None if user is None else _basic(user, password or "")
        path, mark, query = bare.partition("?")
        self._endpoint = f"{path.rstrip('/')}/chat/completions{mark}{query}"
        self.url, self.model, self.timeout = redacted_values(url.rstrip("/")), model, timeout
        self._headers()

    def identity(self) -> dict[str, Any]:
        return {"judge": self.name, "url": self.url, "model": self.model}

    def judge(self, pictures: Sequence[Image.Image], line: Mapping[str, Any]) -> list[Verdict]:
        return [self._one(picture, line["prompt"]) for picture in pictures]

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        key = "" if self._authorization else clean_key(os.environ.get(KEY, ""), KEY)
        if self._authorization or key:
            headers["Authorization"] = self._authorization or f"Bearer {key}"
        return headers

    def _one(self, picture: Image.Image, prompt: str) -> Verdict:
        png = io.BytesIO()
        picture.save(png, format="PNG")
        image = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question(prompt)}]
        body = {
            "model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 1,
            "temperature": 0, "logprobs": True, "top_logprobs": 20,
        }  # fmt: skip
        return read_answer(self._ask(json.dumps(body).encode()))

    def _ask(self, body: bytes) -> Any:
        """The server's JSON. OSError, ValueError: one line, without the library's or the server's secrets."""
        try:
            request = urllib.request.Request(self._endpoint, body, self._headers())
            with urllib.request.build_opener(_Staying).open(request, timeout=self.timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            # All of the body is read before it is cut: half a key would not be known as one.
            told = redacted(error.read(20_000).decode(errors="replace"))[:LONGEST]
            raise ValueError(f"{self.url} answered {error.code}: {told}") from None
        except (http.client.HTTPException, ValueError) as error:
            raise ValueError(f"{self.url} cannot be asked: {said(error, LONGEST)}") from None
        except OSError as error:
            raise ConnectionError(f"{self.url} cannot be asked: {said(error, LONGEST)}") from None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            begin = redacted(text[:10_000].decode(errors="replace"))[:80]
            raise ValueError(f"{self.url} did not answer with JSON but with {begin!r}") from None


def _has_host(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _basic(user: str, password: str) -> str:
    token = base64.b64encode(os.fsencode(f"{user}:{password}")).decode()
    hide(token)
    return f"Basic {token}"
