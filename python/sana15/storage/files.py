"""Files that are read with one clear line when they are bad, and written completely or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from .concurrency import NO_LOCKS

#: safetensors' names of the dtypes that weights may have.
CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

#: Options' names of the dtypes that weights are written in.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DataError(ValueError):
    """A file is damaged, incomplete, or does not fit what it is used for. The command line exits with 3."""


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: it is missing. DataError: it is no JSON object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is damaged: no JSON object")
    return values


def read_text_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file that others may have written: a mark at its start is no text, and LF or CRLF end lines.

    Nothing else does: U+2028, U+0085 and their like are characters of a line, also in a JSON string.

    Raises:
        FileNotFoundError, IsADirectoryError; DataError: it is no UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text file: {error}") from None


def open_tensors(path: Path):  # type: ignore[no-untyped-def]
    """An open safetensors file (safe_open); DataError where it is damaged or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{path} is damaged: {error}") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    with open_tensors(path) as stored:
        names = stored.keys()
        return {name: stored.get_tensor(name) for name in names}


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with the permissions that any new file gets; the library's own are for the owner alone.

    It is there, whole and on the disk, or not at all.
    """
    from safetensors.torch import save_file

    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata={"format": "pt", **(metadata or {})})
        partial.chmod(mode)
        sync_folder(partial)
    sync_folder(path.parent)


def require_finite(tensors: Mapping[str, torch.Tensor], whose: str, consequence: str) -> None:
    """DataError that names the first tensor with a NaN or an Inf, whose it is and what follows."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DataError(f"{whose}: {name} is not finite (NaN or Inf); {consequence}")


def converted(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` in another dtype; ValueError where a finite number would become infinite."""
    result = tensor.to(dtype)
    if torch.promote_types(tensor.dtype, dtype) != dtype and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} holds numbers too large for {str(dtype).removeprefix('torch.')}")
    return result


def stream_tensors(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]], path: Path
) -> None:
    """A safetensors file from tensors that are made one at a time, so that no two are in memory.

    Args:
        tensors: name -> (shape, dtype, what makes the tensor); its values are converted to that dtype.

    Raises:
        ValueError: a tensor has another shape than announced, or numbers too large for its dtype.
    """
    # Wide numbers first, as the library orders them: then every tensor is aligned to its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype, _ = tensors[name]
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            shape, dtype, make = tensors[name]
            tensor = converted(make().detach().cpu(), dtype, name).contiguous()
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`; renamed to it when the block succeeds, removed when it fails.

    A reader sees the old file or the whole new one. The temporary name starts with a dot.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A name, not yet in use, for a folder that becomes `target`: in a hidden folder beside it, removed at the end.

    Hidden folders that killed runs left for this target are removed first; those of runs that are alive stay.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_left(target)
    with _hidden(target, "partial") as root:
        yield root / target.name


def rename_durably(made: Path, target: Path) -> None:
    """The folder gets its name when all of it is on the disk, and keeps it also when the machine loses power."""
    for at, _, names in os.walk(made):
        for path in (Path(at), *(Path(at, name) for name in names)):
            if not path.is_symlink():
                sync_folder(path)
    os.replace(made, target)
    sync_folder(target.parent)


def replace_folder(made: Path, target: Path) -> None:
    """`made` becomes `target`, on the disk; a folder that was there is moved aside first and then removed.

    At every moment one whole folder is there: what a killed run left moved aside, remove_left brings back.

    Raises:
        NotADirectoryError: the target is a file.
    """
    if not target.exists():
        return rename_durably(made, target)
    if not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, not a folder")
    with _hidden(target, "old") as aside:
        os.replace(target, aside / target.name)
        try:
            rename_durably(made, target)
        except OSError:
            os.replace(aside / target.name, target)
            raise


def remove_left(target: Path) -> None:
    """Removes the hidden folders that killed runs left beside the target; a target that was moved aside comes back.

    Only folders with nothing in them but what is ours, of which nobody that is alive has the lock.
    """
    for kind in ("partial", "old"):
        for root in target.parent.glob(f"{_literally(_prefix(target, kind))}*"):
            try:
                if root.is_symlink() or {p.name for p in root.iterdir()} - {target.name, LOCK, "unlocked"}:
                    continue
                if (lock := _locked(root)) is None:
                    continue
                with lock:
                    if kind == "old" and (root / target.name).is_dir() and not target.exists():
                        os.replace(root / target.name, target)
                    _remove_hidden(root)
            except OSError:  # somebody else's, or gone already
                continue


#: In every hidden folder; whoever holds it uses the folder. It is the first file to come and the last to go.
LOCK = "lock"


def _prefix(target: Path, kind: str) -> str:
    return f".{target.name}.{kind}-"


@contextmanager
def _hidden(target: Path, kind: str) -> Iterator[Path]:
    """A new hidden folder beside the target, locked; removed at the end."""
    lock = None
    while lock is None:  # another run may take a folder that is not locked yet for one that was left, and remove it
        root = Path(tempfile.mkdtemp(prefix=_prefix(target, kind), dir=target.parent))
        lock = _locked(root, made_here=True)
    with lock:
        try:
            yield root
        finally:
            _remove_hidden(root)


def _locked(root: Path, *, made_here: bool = False) -> IO[str] | None:
    """The open lock of a hidden folder, made where it is missing; None where somebody has it or the folder is gone.

    Args:
        made_here: on a file system without locks the folder then counts as locked; else that is an OSError, since nobody
            can tell whether it is in use.
    """
    try:
        lock = (root / LOCK).open("a")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not made_here or error.errno not in NO_LOCKS:
            lock.close()
            if isinstance(error, BlockingIOError):
                return None
            raise
    try:
        if os.path.samestat(os.fstat(lock.fileno()), (root / LOCK).stat()):
            return lock
    except FileNotFoundError:
        pass
    lock.close()
    return None


def _remove_hidden(root: Path) -> None:
    """The lock goes last: a removal that is cut short leaves a folder that the next run can tell from a living run's."""
    for path in root.iterdir():
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        elif path.name != LOCK:
            path.unlink()
    remove_tree(root)


def _literally(name: str) -> str:
    """A pattern of glob that fits this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def remove_tree(folder: Path) -> None:
    """Removes a folder with all that is in it, also where folders in it are read-only, as copies of read-only ones are."""
    make_writable(folder)
    shutil.rmtree(folder)


def make_writable(folder: Path) -> None:
    """Lets the owner write into the folder and every one in it."""
    folder.chmod(folder.stat().st_mode | 0o700)
    for at, names, _ in os.walk(folder):
        for path in (Path(at, name) for name in names):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o700)


def write_durably(data: bytes, path: Path) -> None:
    """The file is there, whole and on the disk, or not at all: also when the machine loses power."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the folder's new names durable; or a file's content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
