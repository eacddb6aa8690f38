"""A folder that holds one state at a time: writers wait for each other, readers see old or new.

A writer holds the lock, writes a file under a temporary name, syncs and renames it, and only then
replaces the manifest, the same way; killed at any point it leaves the old state or the new one, and
what else it left is swept by the next writer. The lock is the kernel's, so the death of its holder
frees it. A file that was replaced lives on for those who have it mapped.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_ext.errors import DataError

MANIFEST = "manifest.json"
LOCK = ".lock"
# No other name is ever opened: no separator, no `..`, nothing that a manifest could make up.
TEMPORARY = re.compile(r"\.[0-9]{1,10}-[0-9a-f]{8}\.tmp")
# Inside a folder of others, what was made of its files: no part of what the folder holds.
SHADOW = ".mapped"
# What a digest is made of; also how much of a mapped file is resident while it is copied.
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Kind:
    """What a folder of ours holds.

    Attributes:
        noun: what messages call it.
        suffix: of its data files, whose names are 32 hexadecimal digits.
    """

    noun: str
    suffix: str

    def is_data(self, name: str) -> bool:
        return re.fullmatch(rf"[0-9a-f]{{32}}{re.escape(self.suffix)}", name) is not None

    def is_ours(self, name: str) -> bool:
        return name in (MANIFEST, LOCK) or self.is_data(name) or bool(TEMPORARY.fullmatch(name))


PAIRS = Kind("a saved data set", ".arrow")


class Digest:
    """SHA-256 of the SHA-256 of each 4 MiB, so that several threads can check a file."""

    def __init__(self) -> None:
        self._root, self._part, self._room = hashlib.sha256(), hashlib.sha256(), CHUNK_BYTES

    def update(self, data: memoryview) -> None:
        while len(data):
            head = data[: self._room]
            self._part.update(head)
            self._room -= len(head)
            data = data[len(head) :]
            if self._room == 0:
                self._root.update(self._part.digest())
                self._part, self._room = hashlib.sha256(), CHUNK_BYTES

    def hexdigest(self) -> str:
        root = self._root.copy()
        if self._room < CHUNK_BYTES:
            root.update(self._part.digest())
        return root.hexdigest()


def cores() -> int:
    """How many threads digest a file."""
    # macOS does not tell which cores a process may use.
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, found or 1)


def digest_of(fd: int, size: int) -> str:
    """The :class:`Digest` of the first ``size`` bytes of a file; reads, never maps."""

    def part(start: int) -> bytes:
        digest, stop = hashlib.sha256(), min(start + CHUNK_BYTES, size)
        while start < stop and (piece := os.pread(fd, stop - start, start)):
            digest.update(piece)
            start += len(piece)
        return digest.digest()

    root, pool = hashlib.sha256(), ThreadPoolExecutor(cores())
    try:
        for digest in pool.map(part, range(0, size, CHUNK_BYTES)):
            root.update(digest)
    finally:
        # After a signal, too, no more than one part a thread is waited for.
        pool.shutdown(cancel_futures=True)
    return root.hexdigest()


class Sink:
    """A new file as something to write to, digested on the way.

    ``release`` is called after every 4 MiB: there a writer whose source is mapped lets go of it.
    """

    def __init__(self, fd: int, release: Callable[[], Any] = lambda: None) -> None:
        self._fd, self._release = fd, release
        self.digest, self.size, self.closed = Digest(), 0, False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            rest = view[start : start + CHUNK_BYTES]
            self.digest.update(rest)
            while len(rest):
                # A short write is no error to the system: what is missing is written next.
                rest = rest[os.write(self._fd, rest) :]
            self._release()
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """The file is its opener's to close."""


@contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """A full or broken disk as a :class:`DataError`; that something is missing, forbidden or no
    folder as Python says it.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the system: a handler of signals may raise what it likes
            raise
        plain = (FileNotFoundError, PermissionError, FileExistsError)
        if isinstance(error, (*plain, IsADirectoryError, NotADirectoryError, InterruptedError)):
            raise
        name = errno.errorcode.get(error.errno or 0, "unknown")
        said = f"{error.strerror or error} ({name})"
        place = error.filename or path
        raise DataError(f"{place}: {said}", path=place, reason="bad_input") from error


def locks(path: Path) -> Any:
    """The module fcntl, without which no data set of ours is written, read or cached.

    Raises:
        DataError: this is Windows, which has neither such locks nor a way to replace a file that
            somebody has mapped.
    """
    try:
        import fcntl
    except ModuleNotFoundError as error:
        raise damaged(
            path,
            "saved data sets and caches need Linux or macOS\n"
            "hint: on Windows use WSL, or encode with `PairDataset.from_files` each time",
        ) from error
    return fcntl


def open_inside(folder: Path, name: str) -> int:
    """Opens a regular file of the folder for reading, never through a symbolic link.

    Raises:
        FileNotFoundError, PermissionError: as the system says.
        DataError: it is a link, or no regular file.
    """
    path = folder / name
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise damaged(path, "expected a file, found a symbolic link") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise damaged(path, "expected a regular file")
    return fd


def not_a_folder(path: Path | str) -> NotADirectoryError:
    return NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}", path=path, reason="bad_input")


class Folder:
    """The folder while its lock is held; see :func:`writing`."""

    def __init__(self, path: Path, kind: Kind = PAIRS) -> None:
        self.path, self.kind = path, kind

    def temporary(self) -> Path:
        """A name that nobody else uses, swept if its writer dies."""
        return self.path / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"

    def put(self, write: Callable[[Sink], Any], release: Callable[[], Any]) -> tuple[str, int, str]:
        """Writes a data file; its final name, bytes and digest. It counts once the manifest names
        it.
        """
        temporary = self.temporary()
        with self._new(temporary) as fd:
            sink = Sink(fd, release)
            write(sink)
            _written(fd)
            digest = sink.digest.hexdigest()
            name = f"{digest[:32]}{self.kind.suffix}"
            temporary.rename(self.path / name)
        sync(self.path)
        return name, sink.size, digest

    def publish(self, manifest: bytes, keep: str | None) -> None:
        """Replaces the manifest, then removes every data file but ``keep``; none, if that is
        None.
        """
        temporary = self.temporary()
        with self._new(temporary) as fd:
            Sink(fd).write(manifest)
            _written(fd)
            temporary.replace(self.path / MANIFEST)
        sync(self.path)
        for path in self.path.iterdir() if keep is not None else ():
            if self.kind.is_data(path.name) and path.name != keep:
                path.unlink(missing_ok=True)

    @contextmanager
    def _new(self, path: Path) -> Iterator[int]:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            yield fd
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def sweep(self, current: str | None, *, data: bool = True) -> None:
        """Removes what writers left that died: the lock is held, so none of them is alive.

        Args:
            current: the data file that counts.
            data: False to leave every data file.
        """
        for path in self.path.iterdir():
            name = path.name
            if TEMPORARY.fullmatch(name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif TEMPORARY.fullmatch(name) or (
                data and self.kind.is_data(name) and name != current
            ):
                path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Makes the renames inside a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _written(fd)
    finally:
        os.close(fd)


def _written(fd: int) -> None:
    """``os.fsync(fd)``, which a signal does not wait for: the disk may need seconds."""
    own = os.dup(fd)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            os.fsync(own)
        except BaseException as error:
            failed.append(error)
        finally:
            os.close(own)

    thread = threading.Thread(target=work, name="dpo_ext-fsync", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@contextmanager
def writing(path: Path, kind: Kind = PAIRS) -> Iterator[Folder]:
    """The folder, made if it is missing, for this process alone; waits for another writer.

    New folders and files have the mode that the umask says. Where nothing came of it, a folder that
    was made here is gone again.

    Raises:
        DataError: the folder holds files of others, its file system has no locks or no space, or
            this is Windows.
        NotADirectoryError, PermissionError: as the system says.
    """
    locks(path)
    with typed_errors(path):
        while True:
            is_new = _make(path)
            try:
                _refuse_others(path, kind)
                fd = _locked(path)
            except FileNotFoundError:
                if path.is_dir():
                    raise
                continue  # removed by a writer that failed
            if fd is not None:
                break
        try:
            # Another writer may have filled the folder meanwhile.
            _refuse_others(path, kind)
            yield Folder(path, kind)
        except BaseException:
            if fd in _HELD:
                _remove_if_empty(path, is_new)
            raise
        finally:
            _unlock(fd)


def _make(path: Path) -> bool:
    """Makes a folder; False if it is there."""
    if path.is_dir():
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError as error:
        if not path.is_dir():
            raise not_a_folder(error.filename) from None
        return False
    sync(path.parent)
    return True


# The locks that this process holds, and not the one that it was forked from.
_HELD: set[int] = set()


def _unlock(fd: int) -> None:
    """Lets a lock go. A child that was forked meanwhile has the file open, too, so that closing it
    here would free nothing.
    """
    if fd in _HELD:
        import fcntl  # which made it

        _HELD.discard(fd)
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _forget() -> None:
    """In the child of a fork: its parent's locks are not its own, and end with the parent."""
    for fd in _HELD:
        with suppress(OSError):
            os.close(fd)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _locked(path: Path) -> int | None:
    """The lock file, locked; None if a writer that failed took it away while this one waited."""
    fcntl = locks(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path / LOCK, flags, 0o666)
    _HELD.add(fd)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            raise damaged(path, f"this file system has no locks: {error.strerror}") from error
        try:
            is_there = os.path.samestat(os.fstat(fd), (path / LOCK).lstat())
        except FileNotFoundError:
            is_there = False
    except BaseException:
        _unlock(fd)
        raise
    if not is_there:
        _unlock(fd)
        return None
    return fd


def _remove_if_empty(path: Path, is_new: bool) -> None:
    """Removes the lock that this process holds if there is nothing else, and a new folder."""
    with suppress(OSError):
        if [inner.name for inner in path.iterdir()] == [LOCK]:
            (path / LOCK).unlink()
            if is_new:
                path.rmdir()


def _refuse_others(path: Path, kind: Kind) -> None:
    foreign = sorted(inner.name for inner in path.iterdir() if not kind.is_ours(inner.name))
    if foreign:
        raise DataError(
            f"{path}: expected {kind.noun} or an empty folder, found {foreign[0]!a}\n"
            "hint: choose a new folder",
            path=path,
            reason="bad_input",
        )
