"""Judges: how well does a picture show what its prompt asks for? One small interface, and several that answer."""

from __future__ import annotations

from ..storage.redaction import redacted
from .base import Judge, JudgeFailed, Patient, Verdict, check_patience, mean_ranks

__all__ = ["Judge", "JudgeFailed", "Patient", "Verdict", "check_name", "check_patience", "make", "mean_ranks"]

KINDS = ("scenes", "learned", "clip", "vlm", "http", "https")


def check_name(name: str) -> None:
    """Raises ValueError for a name that no judge has; nothing is loaded."""
    kind, _, rest = name.partition(":")
    if kind not in KINDS or (kind == "scenes" and name != kind):
        raise ValueError(
            f"unknown judge {redacted(name)!r}; one of scenes, learned[:DIR], clip:MODEL, vlm:MODEL, http://HOST/v1#MODEL"
        )
    if kind in ("clip", "vlm") and not rest:
        raise ValueError(f"--judge {kind} needs a model: {kind}:MODEL")


def make(name: str, device: str = "cpu") -> Judge:
    """The judge of a command line's --judge.

    Args:
        name: "scenes" (the exact checker), "learned" or "learned:DIR", "clip:MODEL", "vlm:MODEL" (a transformers folder or name),
            or "http://HOST:PORT/v1#MODEL" (an OpenAI-compatible server; user:password@ before HOST where it wants one).
        device: of clip and vlm; the others need none.

    Raises:
        ValueError: no such judge. FileNotFoundError, DataError: its files are missing or damaged.
    """
    check_name(name)
    kind, _, rest = name.partition(":")
    if kind in ("http", "https"):
        from .server import ServerJudge

        url, mark, model = name.rpartition("#")  # a password may hold the mark, too
        return ServerJudge(url, model) if mark else ServerJudge(name)
    if name == "scenes":
        from .scene import SceneJudge

        return SceneJudge()
    if kind == "learned":
        from .learned import LearnedJudge

        return LearnedJudge.load(rest or None)
    from .clip import ClipJudge
    from .vlm import VisionLanguageJudge

    return ClipJudge.load(rest, device) if kind == "clip" else VisionLanguageJudge.load(rest, device)
