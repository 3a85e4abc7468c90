"""Knows what is secret, and hides it: the one place that every text of a library or a server passes before it is shown.

Secret are API keys and tokens, passwords in URLs (of a judge, of a proxy), secret query parameters and authorization headers.
Messages, logs, run files and tracebacks hold HIDDEN in their place.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
import re
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

HIDDEN = "***"

_WORDS = r"key|token|secret|passw|passphrase|pwd|credential|signature|authorization|auth$|^auth[-_]|bearer|jwt|cookie|session"
#: Names of fields, and of query parameters, whose values are secret; and names of that kind whose values are not.
_SECRET_FIELD = re.compile(_WORDS, re.IGNORECASE)
_SECRET_PARAMETER = re.compile(rf"{_WORDS}|^(?:k|p|pw|pass|sig|code|sas)$", re.IGNORECASE)
_PLAIN_FIELD = re.compile(
    r"tokens$|tokenize|token_type|token_id|^(?:bos|eos|pad|unk|image)_token$|keyboard|monkey|keyword|key_?(?:points|frames)",
    re.IGNORECASE,
)
_SECRET_NUMBER = re.compile(r"passw|passphrase|pwd|secret", re.IGNORECASE)
#: Environment variables whose values are secret (PWD is a folder).
_SECRET_VARIABLE = re.compile(
    r"(?:(?:^|_)(?:key|apikey|token|secret|passw(?:or)?d|passphrase|pass|credentials?|auth|authorization|jwt|pat|cookie)|_pwd)"
    r"(?:_(?!file|path|dir|type|name|id|url|sock)[a-z0-9]{1,8})?$",
    re.IGNORECASE,
)  # fmt: skip
#: What such a variable says when it holds no secret, such as the words given to servers that want no key.
_NO_SECRET = re.compile(
    r"\s*(?:true|false|none|null|yes|no|on|off|\d{0,2}|empty|dummy|unused|test|local|token|ollama|lm-studio)\s*$",
    re.IGNORECASE,
)

_URL = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,20}:/{2})(?P<rest>[^\s\"'<>]+)", re.IGNORECASE)
#: user:password@ before the host; what follows a port that is no number, up to the last @, is a password with a / # or ? in it.
_USERINFO = re.compile(r"^(?:[^/?#]*@|[^/?#@:\[\]]*:(?!\d{0,5}(?:[/?#]|$))\S*@)")
_PARAMETER = re.compile(r"(?P<name>[?&;#][^=&#?\s]{1,100}=)(?P<value>[^&#\s\"'<>]*)")
_PLAIN_PARAMETER = re.compile(r"(?:api-)?version|revision|commit|model|deployment|name", re.IGNORECASE)
_OPAQUE = re.compile(r"(?=[^&]*\d)(?=[^&]*[A-Za-z])[\w.~%+/=-]{20,}$")
_BARE_USERINFO = re.compile(r"(?<![\w/@:.-])[^\s:/@\"'=]{1,100}:[^\s/@\"']{1,200}@(?=[\w\[])")
_SCHEMES = re.compile(
    r"\b(?P<scheme>Bearer|Basic|Token|ApiKey)(?P<gap>\s+|%20|\+)(?P<value>[^\s\"',;&<>]{3,})", re.IGNORECASE
)
_FIELD = re.compile(
    r"(?P<name>(?<![\w-])[\"']?[\w-]{0,40}(?:api[-_ ]?key|access[-_]?key|secret|password|passwd|pwd|authorization|access[-_]?token|"
    r"auth[-_]?token|hf[-_]token)(?!ar(?:y|ies)\b)[\w-]{0,40}[\"']?(?:\s+(?:provided|given|sent|used))?\s*[:=]\s*(?:b(?=[\"']))?)(?P<value>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^\s\"',;&}<>]+)",
    re.IGNORECASE,
)  # fmt: skip
#: Forms that issuers gave their keys: OpenAI, Hugging Face, GitHub, Groq, xAI, Replicate, NVIDIA, GitLab, Google, AWS, Slack; JWT.
_KNOWN_FORM = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-(?=[\w.-]{0,40}(?:\*|[A-Za-z0-9_]{14}))[\w*.-]{6,}|hf_[A-Za-z0-9*]{10,}|api_org_\w{10,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|gsk_\w{16,}|"
    r"xai-[\w*-]{10,}|r8_\w{16,}|nvapi-[\w*-]{10,}|glpat-[\w-]{10,}|pplx-\w{10,}|tgp_v1_[\w-]{10,}|AIza[\w*-]{16,}|"
    r"(?:AKIA|ASIA)[A-Z0-9]{12,}|xox[abprs]-[\w-]{8,}|eyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]*)"
)  # fmt: skip

_given: set[str] = set()  # secrets that came by another way than the environment, such as a password in a judge's URL


def hide(secret: str) -> None:
    """Makes `secret` known, so that `redacted` hides it in every text from now on."""
    if secret.strip():
        _given.add(secret.strip())


def hide_url(url: str) -> None:
    """Makes known what is secret in a URL: user and password, and the values of secret query parameters."""
    for secret in _of_url(url):
        hide(secret)


def redacted(text: object) -> str:
    """`text` as a string in which no secret stands.

    Hidden are the values of this process's secrets (environment variables named *KEY, *TOKEN, *PASSWORD and the like, passwords
    of proxies, Hugging Face's stored token, whatever `hide` was told), also where they are escaped or encoded, and what
    looks like one: user and password in a URL, secret query parameters, authorization headers, keys of a known form.
    """
    return _BARE_USERINFO.sub(f"{HIDDEN}@", _looks(_known(str(text))))


def redacted_values(value: Any, name: str = "") -> Any:
    """JSON values in which no secret stands, for a file: strings are redacted, fields with a secret's name are hidden.

    Short words of this process's secrets stay, so that the result does not depend on which key is in use.
    """
    if isinstance(value, Mapping):
        return {k: redacted_values(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_values(v, name) for v in value]
    if isinstance(value, str):
        value = _looks(_known(value, least=8))
    pattern = _SECRET_NUMBER if isinstance(value, (int, float)) else _SECRET_FIELD  # token_length is no secret
    secret = value not in (None, "") and not isinstance(value, bool) and _is_secret(name, pattern)
    return HIDDEN if secret else value


def said(error: BaseException, limit: int | None = None) -> str:
    """Returns what an exception of a library says, on one line, without secrets, its type where it says nothing."""
    text = " ".join(redacted(error).split()) or type(error).__name__
    return text if limit is None else text[:limit]


def clean_key(value: str, source: str) -> str:
    """An API key as it is sent: without the blanks and line ends around it; empty where there is none.

    Args:
        source: where it came from, for the message.

    Raises:
        ValueError: it holds what no header can carry. The message does not show it.
    """
    key = value.strip(" \t\r\n\v\f\0\x1c\x1d\x1e\x1f\x85\xa0\u2028\u2029\ufeff\u200b")
    if not all("!" <= c <= "~" for c in key):
        raise ValueError(
            f"{source} holds a blank, a control character or a letter that is not ASCII, inside the key: only printable "
            "ASCII can be sent (the key is not shown)"
        )
    return key


def split_userinfo(url: str) -> tuple[str, str | None, str | None]:
    """A URL without user and password, and these, decoded (None where it has none)."""
    scheme, separator, rest = url.partition("://")
    found = _USERINFO.match(rest)
    if not found or not separator:
        return url, None, None
    user, colon, password = found[0][:-1].partition(":")
    return (
        scheme + separator + rest[found.end() :],
        urllib.parse.unquote(user),
        urllib.parse.unquote(password) if colon else None,
    )


def guard_tracebacks() -> None:
    """From now on, what Python prints of an exception that nobody handles holds no secret (main thread and others)."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))

    def show_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and args.exc_type is not SystemExit:
            show(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook, threading.excepthook = show, show_thread


def _known(text: str, least: int = 2) -> str:
    """Without the secrets that this process knows. Short ones are hidden where they stand alone, as words."""
    for secret in sorted({s for s in _secrets() if len(s) >= least}, key=len, reverse=True):
        if len(secret) >= 8:
            text = text.replace(secret, HIDDEN)
        elif secret in text:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", HIDDEN, text)
    return text


def _secrets() -> Iterator[str]:
    for secret in {*_given, *_of_environment()}:
        for form in (secret, secret.strip()):
            yield form
            yield from _encoded(form)


def _encoded(secret: str) -> Iterator[str]:
    """The forms in which libraries and servers write it in messages."""
    raw = os.fsencode(secret)  # a value that is no UTF-8 has surrogates
    yield urllib.parse.quote(raw, safe="")
    yield urllib.parse.quote(raw)
    yield urllib.parse.quote_plus(raw)
    yield html.escape(secret)
    yield repr(secret)[1:-1]
    yield repr(raw)[2:-1]
    yield json.dumps(secret)[1:-1]
    yield base64.b64encode(raw).decode().rstrip("=")


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if name.lower().endswith("_proxy") or "://" in value:
            for part in value.split():
                yield from _of_url(part)
        if _SECRET_VARIABLE.search(name) and not _NO_SECRET.match(value) and not _is_file(value):
            yield value
            yield from value.split()  # a key of two lines
    with contextlib.suppress(OSError, UnicodeDecodeError, RuntimeError):
        yield Path(os.environ.get("HF_TOKEN_PATH") or _hugging_face() / "token").read_text(encoding="utf-8")


def _is_file(value: str) -> bool:
    """Tells whether it names a file or folder; a key in base64 may begin with a slash, too."""
    return value.startswith(("/", "~", ".")) and os.path.exists(os.path.expanduser(value))


def _hugging_face() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface")


def _of_url(url: str) -> Iterator[str]:
    """Splits user:password@ off before the host, with or without a scheme, all of it and the password, or the user who has none; and
    the values of secret query parameters."""
    rest = url.partition("://")[2] or url
    secrets = [found["value"] for found in _PARAMETER.finditer(rest) if _clean_parameter(found) != found[0]]
    if userinfo := _USERINFO.match(rest):
        user, _, password = userinfo[0][:-1].partition(":")
        secrets += [userinfo[0][:-1], password or user]
    for secret in secrets:
        yield from (secret, urllib.parse.unquote(secret))


def _looks(text: str) -> str:
    """Without what looks like a secret."""
    text = _URL.sub(_clean_url, text)
    text = _SCHEMES.sub(_clean_scheme, text)
    text = _FIELD.sub(_clean_field, text)
    return _KNOWN_FORM.sub(HIDDEN, text)


def _clean_url(found: re.Match[str]) -> str:
    rest = _USERINFO.sub(f"{HIDDEN}@", found["rest"])
    return found["scheme"] + _PARAMETER.sub(_clean_parameter, rest)


def _clean_parameter(found: re.Match[str]) -> str:
    name, value = found["name"][1:-1], found["value"]
    secret = _is_secret(name, _SECRET_PARAMETER) or (_OPAQUE.match(value) and not _PLAIN_PARAMETER.fullmatch(name))
    return found["name"] + (HIDDEN if secret and value else value)


def _clean_scheme(found: re.Match[str]) -> str:
    """Returns KEY of "Bearer KEY"; not of a sentence about basic auth, a bearer of something or a token."""
    scheme, value = found["scheme"].lower(), found["value"]
    if scheme == "bearer":
        word = r"[a-z]{3,15}" if found["scheme"] == "bearer" else r"(?:tokens?|auth\w*|scheme|credentials?|realm=.*)"
        secret = not re.match(rf"{word}\W*$", value, re.IGNORECASE)
    elif scheme == "basic":
        secret = _is_basic(value)
    else:
        secret = bool(re.match(r"(?=\D*\d)(?=[^A-Za-z]*[A-Za-z])\w[\w+/=-]{15,}$", value))
    return f"{found['scheme']}{found['gap']}{HIDDEN}" if secret else found[0]


def _is_basic(value: str) -> bool:
    """Tells whether it is user:password in base64."""
    try:
        return b":" in base64.b64decode(re.sub(r"[^A-Za-z0-9+/]", "", value) + "==")
    except ValueError:
        return False


def _clean_field(found: re.Match[str]) -> str:
    value = found["value"]
    if value[0] in "\"'":
        return f"{found['name']}{value[0]}{HIDDEN}{value[0]}"
    return found["name"] + (
        value if value.lower() in ("bearer", "basic", "token", "apikey", "null", "none") else HIDDEN
    )


def _is_secret(name: str, pattern: re.Pattern[str]) -> bool:
    return bool(pattern.search(name)) and not _PLAIN_FIELD.search(name)
