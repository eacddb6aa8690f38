"""`Bar`: how far encoding is, as a bar or to a function of the caller."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo_ext.data.options import Progress


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
    """What Rust calls with (bytes, rows) done so far: nothing, the caller's function, or a bar."""

    def __init__(self, progress: Progress, files: Sequence[str]) -> None:
        self._progress, self._files = progress, files
        self._bar: Any = None

    def __enter__(self) -> Callable[[int, int], Any] | None:
        if callable(self._progress):
            return self._progress
        if not self._progress or not is_shown():
            return None
        import rich.progress as rich

        total = sum(map(size_of, self._files)) or None
        parts = (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.TextColumn("{task.fields[rows]:,} rows"),
        )
        bar = rich.Progress(*parts, rich.TimeElapsedColumn())
        bar.disable = not bar.console.is_terminal
        task = bar.add_task("encoding pairs", total=total, rows=0)
        self._bar = bar
        bar.start()
        return lambda done, rows: bar.update(task, completed=done, rows=rows)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
