"""Files that need not fit in memory: encoded in parts into a folder.

While the parts come, each column grows in files of its own; at the end they are mapped and written
as one data set, of which nothing is visible before it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dpo_ext import _core
from dpo_ext.data.files import Kind, by_kind, feed_arrow_file, saved_files, sources
from dpo_ext.data.options import Paths, Progress, Settings, row_hints
from dpo_ext.data.progress import Bar, size_of
from dpo_ext.data.spool import Spool
from dpo_ext.data.tokenizer import Tokenizer, checked_tokenizer
from dpo_ext.pairs import Examples, Pairs, Unpaired
from dpo_ext.report import Report
from dpo_ext.store.folder import Folder
from dpo_ext.store.write import write

# Pairs that are held in memory at a time, about 40 MB of ids.
PAIRS = 1 << 16


@dataclass(frozen=True)
class Job:
    """Files to encode, each thing checked."""

    files: Sequence[str]
    tokenizer: Tokenizer
    settings: Settings
    progress: Progress = False
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, paths: Paths, tokenizer: Any, checked: Settings, progress: Progress) -> Job:
        """From what a caller gave."""
        known = checked_tokenizer(tokenizer)
        found = sources(paths)
        return cls(found.files, known, checked, progress, found.notes)

    @property
    def kind(self) -> type[Examples]:
        """What the rows become."""
        return Unpaired if self.settings.is_unpaired else Pairs


def parts(job: Job, pairs: int = PAIRS) -> Iterator[dict[str, Any]]:
    """What ``from_files`` would encode at once, in parts of at least ``pairs``."""
    with Bar(job.progress, job.files) as callback, row_hints(job.settings):
        yield from _Parts(job, callback, pairs)


class _Parts:
    """The parts of a job, with rows and progress counted over all of its files."""

    def __init__(self, job: Job, callback: Callable[[int, int], Any] | None, pairs: int) -> None:
        self.job, self.pairs = job, pairs
        self.read = 0  # rows of all parts so far
        self.before = (0, 0)  # bytes and rows before the files that are encoded now
        self.callback = callback
        self.told = self._told if callback else None

    def _told(self, done: int, rows: int) -> Any:
        assert self.callback is not None
        return self.callback(self.before[0] + done, self.before[1] + rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        done = 0
        settings = self.job.settings
        fields = _core.PairEncoder(self.job.tokenizer._core, settings).names
        for kind, names in by_kind(self.job.files, fields, settings.limits):
            self.before = (done, self.read)
            done += sum(map(size_of, names))
            yield from self._of_lines(names) if kind == "lines" else self._of_arrow(names, kind)

    def _of_lines(self, names: list[str]) -> Iterator[dict[str, Any]]:
        lines = _core.FileEncoder(names, self.job.tokenizer._core, self.job.settings)
        start = self.read  # its own rows go on from part to part
        while (raw := lines.next(self.pairs, self.told)) is not None:
            raw["rows"] += start
            self.read += raw["read"]
            yield raw

    def _of_arrow(self, names: list[str], kind: Kind) -> Iterator[dict[str, Any]]:
        encoder = _core.PairEncoder(self.job.tokenizer._core, self.job.settings, self.told)
        for path in names:
            for part in saved_files(path) if kind == "saved" else [path]:
                for _ in feed_arrow_file(encoder, part, kind, self.job.settings):
                    if encoder.kept >= self.pairs:
                        yield self._shifted(encoder.finish())
        yield self._shifted(encoder.finish())

    def _shifted(self, raw: dict[str, Any]) -> dict[str, Any]:
        raw["rows"] += self.read
        self.read += raw["read"]
        return raw


def encode_into(
    folder: Folder,
    job: Job,
    made: Mapping[str, Any],
    check: Callable[[Report], Any],
) -> Report:
    """Replaces what a folder holds by the examples of files; ``check`` has the last word."""
    spooled = folder.temporary()
    tokenizer, checked = job.tokenizer, job.settings
    alike: dict[str, Any] = {
        "pad_id": tokenizer.pad_id if tokenizer.pad_id is not None else 0,
        "vocab_size": tokenizer.vocab_size,
    }
    if checked.is_unpaired:
        alike |= {"max_length": checked.max_length, "truncation": checked.truncation}
    try:
        with ExitStack() as stack:
            spool = Spool(spooled, checked.columns, stack, job.kind)
            for raw in parts(job):
                spool.append(raw, (*job.notes, *tokenizer.notes))
            report = spool.report()
            check(report)
            write(folder, spool.columns(), report=report, made=made, **alike)
    finally:
        shutil.rmtree(spooled, ignore_errors=True)
    return report
