"""What was worked out of a file's bytes, noted for as long as the file stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_ext.store.folder import SHADOW, Folder, damaged

# A file that changed so recently could change again without its time of change telling.
RACY_NS = 2_000_000_000


def status_of(name: str) -> tuple[Any, ...]:
    """What tells that a file, or one in a folder, is another or was written to.

    The time of change of a file moves with every write and cannot be set; a copy is another inode.
    """
    found = Path(name).stat()
    one = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if stat.S_ISDIR(found.st_mode):
        inside = sorted(inner for inner in Path(name).iterdir() if inner.name != SHADOW)
        parts = ((inner.name, status_of(str(inner))) for inner in inside)
        return (found.st_dev, found.st_ino, *parts)
    if not stat.S_ISREG(found.st_mode):
        raise damaged(Path(name), "expected a regular file")
    return one


def noted(notes: Path | None, name: str, work: Callable[[int, int], str]) -> str:
    """``work(fd, size)`` of a regular file, done once as long as the file stays as it is.

    Args:
        notes: the folder of notes, made if it is missing; where nothing can be noted, or it is
            None, the work is done each time.
    """
    status = status_of(name)
    kind = f"{work.__module__}.{work.__qualname__}"
    key = hashlib.sha256(json.dumps([kind, *status]).encode()).hexdigest()
    if notes is not None:
        with suppress(OSError, UnicodeDecodeError):
            digest, _, text = (notes / key).read_text().partition("\n")
            if digest == _digest(text):
                return text
    with Path(name).open("rb") as file:
        text = work(file.fileno(), os.fstat(file.fileno()).st_size)
    # A clock that was set back makes the difference negative: then nothing is noted.
    is_old = time.time_ns() - max(status[3:5]) > RACY_NS
    if notes is not None and is_old and status_of(name) == status:
        with suppress(OSError):
            notes.mkdir(parents=True, exist_ok=True)
            temporary = Folder(notes).temporary()
            temporary.write_text(f"{_digest(text)}\n{text}")
            temporary.replace(notes / key)
    return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
