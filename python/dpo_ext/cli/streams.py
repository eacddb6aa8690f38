"""Standard input as a file, and results as JSON: `readable` and `result_to`."""

from __future__ import annotations

import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from errno import EISDIR, ENOENT
from json import dumps
from os import strerror
from pathlib import Path
from typing import Any

from dpo_ext.errors import DataError

# How a stream of each kind begins, and the name that a file of it has.
KINDS = {
    b"\x1f\x8b": ".jsonl.gz",
    b"\x28\xb5\x2f\xfd": ".jsonl.zst",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
    b"\xff\xff\xff\xff": ".arrow",
}


@dataclass(frozen=True)
class Readable:
    """Names of files, of which some hold what came through a pipe."""

    files: list[str]
    names: dict[str, str]
    """Of those: what the user called them, by the name of the file."""

    def said(self, text: str) -> str:
        """A text in which files have the names that the user gave."""
        for file, name in self.names.items():
            text = text.replace(file, name)
        return text


@contextmanager
def readable(files: Sequence[str]) -> Iterator[Readable]:
    """The same files, with ``-`` and pipes of the shell, ``<(zcat x.gz)``, copied into temporary
    files: what is read is read more than once. They lie in ``TMPDIR`` and are gone at the end.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-ext-") as folder:
        found: dict[str, str] = {}
        given = Readable([], found)
        for number, name in enumerate(files):
            if _is_pipe(name):
                copy = _copied(name, Path(folder) / f"{number}")
                found[copy] = "standard input" if name == "-" else name
                given.files.append(copy)
            else:
                given.files.append(name)
        try:
            yield given
        except DataError as error:
            error.args = (given.said(error.args[0]), *error.args[1:])
            raise


def _is_pipe(name: str) -> bool:
    if name == "-":
        return True
    try:
        return name.startswith("/dev/") and stat.S_ISFIFO(Path(name).stat().st_mode)
    except OSError:
        return False


def _copied(name: str, to: Path) -> str:
    with to.open("wb") as copy:
        if name == "-":
            shutil.copyfileobj(sys.stdin.buffer, copy)
        else:
            with Path(name).open("rb") as file:
                shutil.copyfileobj(file, copy)
    with to.open("rb") as file:
        head = file.read(6)
    suffix = next((end for magic, end in KINDS.items() if head.startswith(magic)), ".jsonl")
    return str(to.rename(to.with_name(to.name + suffix)))


@contextmanager
def result_to(json: str | None) -> Iterator[Callable[..., None]]:
    """A function that writes a result as JSON to a file, to standard output for ``-``, or nowhere.

    For ``-`` all that is printed meanwhile goes to standard error.
    """
    if json is not None and json != "-":
        # Said now, and not after the work.
        if not Path(json).parent.is_dir():
            raise FileNotFoundError(ENOENT, "no such folder", str(Path(json).parent))
        if Path(json).is_dir():
            raise IsADirectoryError(EISDIR, strerror(EISDIR), json)
    stdout = sys.stdout

    def write(result: Any, said: Callable[[str], str] = str) -> None:
        if json is None:
            return
        text = said(dumps(result, indent=2)) + "\n"
        if json == "-":
            stdout.write(text)
        else:
            Path(json).write_text(text, encoding="utf-8")

    if json == "-":
        with redirect_stdout(sys.stderr):
            yield write
    else:
        yield write
