"""Runs side by side: processes and threads that write one folder, launchers of several processes, threads that share an object."""

from __future__ import annotations

import errno
import fcntl
import functools
import inspect
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

#: What a file system without locks answers (Lustre without -o flock, some FUSE and NFS mounts).
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
PATIENCE = 2.0  # seconds for which another run may be making the same folder

_logger = logging.getLogger(__name__)
_held: dict[Path, int] = {}  # lock file -> thread that holds it
_open: set[int] = set()  # descriptors of held locks
_guard = threading.Lock()


class InUse(ValueError):
    """Another run writes this folder or file. The command line exits with 2."""


def flock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Locks an open file until it is closed or the process ends; False where somebody else has it locked.

    Each open has a lock of its own, so that two threads exclude each other as two processes do. A file system without locks
    is said in a log line; True then.
    """
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, mode)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _say_no_locks(error.strerror or str(error))
    return True


@functools.cache
def _say_no_locks(why: str) -> None:
    _logger.warning("sana15: this file system has no locks (%s): start no second run in the same folder", why)


@contextmanager
def claimed(folder: str | Path, *, shared: bool = False) -> Iterator[None]:
    """While it is open, no other run works in the folder, which is made if it is missing and goes again if it stays empty.

    The lock is a hidden file in the folder, so that every spelling of its name and every mount has the same one. It ends with
    the process, however that ends. The thread that has it may claim the folder again.

    Args:
        shared: other shared claims are welcome.

    Raises:
        InUse: another run works there, or writes a new folder of this name. OSError: the folder cannot be made.
    """
    given, folder = folder, Path(folder).resolve()
    if folder.exists() and not folder.is_dir():  # the command says so in its own words
        yield
        return
    missing = _missing(folder)
    with ExitStack() as stack:
        stack.push(functools.partial(_unmake_refused, missing))
        stack.enter_context(
            _until_settled(lambda: _working_in(folder, given, shared), lambda: shared or not folder.is_dir())
        )
        yield


@contextmanager
def claimed_target(target: str | Path, *, wait: bool = False) -> Iterator[None]:
    """While it is open, no other run writes this file, or this folder that appears when it is whole, or works in it.

    The lock is a hidden file beside it. Missing parents are made, and go again if they stay empty.

    Raises:
        InUse: another run writes it, and `wait` is false. OSError: the parents cannot be made.
    """
    given, target = target, Path(target).resolve()
    missing = _missing(target.parent)
    with ExitStack() as stack:
        stack.callback(_unmake, missing)
        stack.enter_context(_until_settled(lambda: _replacing(target, given, wait), lambda: False))
        yield


@contextmanager
def _working_in(folder: Path, given: str | Path, shared: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if folder.is_dir():
            stack.enter_context(_lock(folder / ".lock", given, shared=shared))
        else:
            with _writing(folder, given, wait=False):
                folder.mkdir(exist_ok=True)
                stack.enter_context(_lock(folder / ".lock", given, shared=shared))
        yield


@contextmanager
def _writing(target: Path, given: str | Path, wait: bool) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f".{target.name}.lock"), given, wait=wait):
        yield


@contextmanager
def _replacing(target: Path, given: str | Path, wait: bool) -> Iterator[None]:
    """As _writing; nobody works in a folder that is there and would go."""
    with ExitStack() as stack:
        stack.enter_context(_writing(target, given, wait))
        if target.is_dir():
            stack.enter_context(_lock(target / ".lock", given, wait=wait))
        yield


@contextmanager
def _until_settled(claim: Callable[[], AbstractContextManager[None]], passing: Callable[[], bool]) -> Iterator[None]:
    """Opens the claim; again where a folder on the way has just gone, or another run is just beginning or ending there."""
    until = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(claim())
                break
            except (FileNotFoundError, InUse) as error:
                if time.monotonic() > until or (isinstance(error, InUse) and not passing()):
                    raise
            time.sleep(0.01)
        yield


def claiming(
    place: Callable[[Mapping[str, Any]], str | Path], *, new: bool = False, shared: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that runs while it has claimed place(its arguments by name).

    Args:
        new: the place is a file, or a folder that appears when it is whole: claimed_target. Else: claimed.
        shared: as of claimed.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def running(*args: P.args, **kwargs: P.kwargs) -> R:
            at = place(signature.bind(*args, **kwargs).arguments)
            with claimed_target(at) if new else claimed(at, shared=shared):
                return function(*args, **kwargs)

        return running

    return decorated


@contextmanager
def _lock(path: Path, what: str | Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """The lock file of `what`, held; the last one removes it, while it still has it alone."""
    me = threading.get_ident()
    if _held.get(path) == me:
        yield
        return
    descriptor = _acquired(path, what, shared, wait)
    if descriptor is None:
        yield
        return
    process = os.getpid()
    with _guard:
        _open.add(descriptor)
        if not shared:
            _held[path] = me
    try:
        yield
    finally:
        if os.getpid() == process:  # not a fork that unwinds its parent's stack
            with _guard:  # before the file goes: the name is then free for another thread's lock
                if not shared and _held.get(path) == me:
                    del _held[path]
            with suppress(OSError):
                # Not the lock of another run where the folder was moved in the meantime, or replaced.
                if (not shared or flock(descriptor)) and _is(descriptor, path):
                    path.unlink()
            with _guard:
                _open.discard(descriptor)
                os.close(descriptor)


def _acquired(path: Path, what: str | Path, shared: bool, wait: bool) -> int | None:
    """A descriptor with the lock; None where no file can be made, since then none can be written either."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError:
            try:  # somebody else's lock file
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (PermissionError, FileNotFoundError):
                return None
        except OSError as error:
            if error.errno == errno.EROFS:
                return None
            raise
        try:
            if not flock(descriptor, shared=shared, wait=wait):
                raise InUse(f"{what} is in use: {_holder(descriptor)} works there; wait for it or choose another place")
            if _is(descriptor, path):  # not one that its holder has removed in the meantime
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        text = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    except OSError:
        text = ""
    return f"process {text}" if text else "another process"


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _missing(folder: Path) -> list[Path]:
    """Lists of a folder and its parents the ones that are missing, the innermost first."""
    return [at for at in (folder, *folder.parents) if not at.exists()]


def _unmake_refused(made: Iterable[Path], kind: type[BaseException] | None, *_: Any) -> None:
    """After a run that had nothing to do or was refused; a run that began and failed keeps its folder."""
    if kind is None or issubclass(kind, (ValueError, FileNotFoundError)):
        _unmake(made)


def _unmake(made: Iterable[Path]) -> None:
    """Removes folders that are still empty."""
    for folder in made:
        try:
            folder.rmdir()
        except OSError:
            break


def _forget() -> None:
    """In a forked worker: its copies of the descriptors would keep the locks when the run itself is killed, and locks that
    other threads had at that moment are released by nobody."""
    global _guard, _any_lock, _locks
    _guard, _any_lock, _locks = threading.Lock(), threading.RLock(), weakref.WeakKeyDictionary()
    for descriptor in _open:
        with suppress(OSError):
            os.close(descriptor)
    _open.clear()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def require_one_process(what: str) -> None:
    """ValueError where a launcher (torchrun, accelerate) has started several processes: each would do the whole work."""
    count = max(_number("WORLD_SIZE", 1), _number("RANK", 0) + 1, _number("LOCAL_RANK", 0) + 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = max(count, torch.distributed.get_world_size())
    if count > 1:
        raise ValueError(
            f"{what} runs in one process, and a launcher has started {count} or more (WORLD_SIZE, RANK, LOCAL_RANK): "
            "start it without torchrun"
        )


def _number(variable: str, missing: int) -> int:
    try:
        return int(os.environ.get(variable, missing))
    except ValueError:
        return missing


_locks: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_any_lock = threading.RLock()  # of objects that cannot be told apart


def lock_of(shared: Any) -> Any:
    """The one lock of an object that others may use too, such as a tokenizer: reentrant, the same for every caller."""
    with _guard:
        try:
            return _locks.setdefault(shared, threading.RLock())
        except TypeError:  # neither a hash nor a weak reference
            return _any_lock


@contextmanager
def using(*shared: Any) -> Iterator[None]:
    """While it is open, no other thread uses these objects; in one order, so that nobody waits for each other."""
    with ExitStack() as stack:
        # A processor's lock is its tokenizer's, which may also be used alone.
        locks = [lock_of(getattr(one, "tokenizer", one)) for one in shared]
        for lock in sorted({id(lock): lock for lock in locks}.values(), key=id):
            stack.enter_context(lock)
        yield
