"""How far work is, said to a terminal, a notebook, a log or a function of the caller.

`Bar` of encoding; `counted` of anything that is counted.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_ext.data.options import Progress

# A line that is rewritten is so at most this often; a log gets a line this often.
REDRAW_S = 0.2
LOG_S = 10.0
CELLS = 20


def size_of(path: str) -> int:
    """Bytes of a file, or of the files in a folder."""
    found = Path(path)
    if found.is_dir():
        return sum(part.stat().st_size for part in found.glob("*.arrow"))
    return found.stat().st_size


def is_shown(variables: Any = os.environ) -> bool:
    """Whether this process shows progress: of several ranks the first one does."""
    return str(variables.get("RANK", variables.get("LOCAL_RANK", "0"))) == "0"


class Bar:
    """What Rust calls with (bytes, rows) done so far: nothing, the caller's function, or a line.

    A terminal and a notebook have one line that is rewritten; anything else, such as the log of a
    job, gets a line every ten seconds, so that a short run says nothing there.
    """

    def __init__(
        self,
        progress: Progress,
        files: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress, self._files, self._clock = progress, files, clock
        self._line: _Line | None = None

    def __enter__(self) -> Callable[[int, int], Any] | None:
        if callable(self._progress):
            return self._progress
        if not self._progress or not is_shown():
            return None
        total = sum(map(size_of, self._files))
        self._line = _line(total, self._clock, "encoding pairs", "rows")
        return None if self._line is None else self._line.tell

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._line is not None:
            self._line.end(whole=kind is None)


@contextmanager
def counted(
    doing: str, total: int, noun: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """A function that is told how many of ``total`` are done; of several ranks the first says it.

    As `Bar`: one line that is rewritten, or a line every ten seconds.
    """
    line = _line(total, clock, doing, noun) if is_shown() else None

    def tell(done: int) -> None:
        if line is not None:
            line.tell(min(done, total), min(done, total))

    whole = False
    try:
        yield tell
        whole = True
    finally:
        if line is not None:
            line.end(whole=whole)


def _line(total: int, clock: Callable[[], float], doing: str, noun: str) -> _Line | None:
    if type(sys.stdout).__module__.startswith("ipykernel"):
        # A notebook paints what comes from stderr as an error.
        return _Line(sys.stdout, total, clock, (doing, noun), rewritten=True)
    if sys.stderr is None:
        return None
    return _Line(sys.stderr, total, clock, (doing, noun), rewritten=sys.stderr.isatty())


class _Line:
    """Rows, rows/s and the time that is left, which is what the bytes so far make likely."""

    def __init__(
        self,
        stream: Any,
        total: int,
        clock: Callable[[], float],
        words: tuple[str, str],
        *,
        rewritten: bool,
    ) -> None:
        self.stream, self.total, self.clock, self.rewritten = stream, total, clock, rewritten
        self.doing, self.noun = words
        self.start = self.told = clock()
        self.done = self.rows = self.width = 0
        self.is_open = False

    def tell(self, done: int, rows: int) -> None:
        self.done, self.rows = done, rows
        now = self.clock()
        if now - self.told >= (REDRAW_S if self.rewritten else LOG_S):
            self.told = now
            self._write(now, f"{_time(left)} left" if (left := self._left(now)) else "")

    def end(self, *, whole: bool) -> None:
        """The last line, if there was one before it."""
        if not self.is_open:
            return
        if whole:
            now = self.clock()
            self.done = self.total
            self._write(now, f"in {_time(now - self.start)}")
        if self.rewritten:
            self.stream.write("\n")
            self.stream.flush()

    def _left(self, now: float) -> float:
        share = self.done / self.total if self.total else 0.0
        return (now - self.start) * (1 - share) / share if 0 < share < 1 else 0.0

    def _write(self, now: float, time_: str) -> None:
        self.is_open = True
        words = [self.doing]
        if self.total:
            share = min(1.0, self.done / self.total)
            full = int(share * CELLS)
            bar = f"[{'#' * full}{'.' * (CELLS - full)}] " if self.rewritten else ""
            words.append(f"{bar}{share:.0%}")
        words.append(f"{self.rows:,} {self.noun}")
        rate = self.rows / max(now - self.start, 1e-9)
        words.append(f"{rate:,.0f} {self.noun}/s" if rate >= 10 else f"{rate:.2g} {self.noun}/s")
        words.extend([time_] if time_ else [])
        if self.rewritten:
            # One that is wider than the terminal would be broken, and the rest of it stay.
            text = "  ".join(words)[: shutil.get_terminal_size().columns - 1]
            self.stream.write(f"\r{text:<{self.width}}")
            self.width = len(text)
        else:
            self.stream.write(", ".join(words) + "\n")
        self.stream.flush()


def _time(seconds: float) -> str:
    """``1:02:03``, or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
