"""Files that need not fit in memory: encoded in parts into a folder.

While the parts come, each column grows in files of its own; at the end they are mapped and written
as one data set, of which nothing is visible before it is whole.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ext.store import read as mapped
from dpo_ext.layout.batch import Ragged
from dpo_ext.data.dataset import PairDataset, _checked
from dpo_ext.errors import DataError
from dpo_ext.store.folder import Folder, writing
from dpo_ext.data.options import Settings, settings
from dpo_ext.report import Report
from dpo_ext.data.files import Bar, opened_up, parts
from dpo_ext.store.write import Columns, write

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dpo_ext.data.options import Paths, Progress
    from dpo_ext.data.tokenizer import Tokenizer

# Pairs that are held in memory at a time, about 40 MB of ids.
PAIRS = 1 << 16

LISTS = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}


class Spool:
    """Columns that grow in a folder, a file for each flat array."""

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        folder.mkdir(mode=0o700)
        self._folder, self._names, self._stack = folder, tuple(names), stack
        self._files: dict[str, Any] = {}
        self._ends: dict[str, int] = {}
        self._kinds: dict[str, str] = {}
        self._reports: list[Report] = []
        self._gaps = False
        self.n = self._with_ref = self._read = 0

    def append(self, raw: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Appends what an encoder gave."""
        self._gaps = self._gaps or raw["read"] != raw["kept"]
        for short, name in LISTS.items():
            self._append_lists(name, *raw[short])
        reference = raw["ref_logps"].reshape(-1, 2)
        for i, name in enumerate(mapped.REFERENCE):
            self._put(name, np.ascontiguousarray(reference[:, i]))
        self._put(mapped.ROW, raw["rows"])
        for name, values in zip(self._names, raw["columns"], strict=True):
            self._append_extra(name, values)
        self.n += raw["kept"]
        self._read += raw["read"]
        self._with_ref += raw["with_ref"]
        part = PairDataset._from_raw({**raw, "with_ref": 0, "columns": []}, tokenizer)
        self._reports = [Report.merged([*self._reports, part.report])]

    def _put(self, name: str, array: NDArray[Any]) -> None:
        if name not in self._files:
            file = (self._folder / f"{len(self._files)}").open("w+b")
            self._files[name] = self._stack.enter_context(file)
        if len(array):
            self._files[name].write(array.view(np.uint8).data)

    def _append_lists(self, name: str, values: NDArray[Any], offsets: NDArray[Any]) -> None:
        end = self._ends.setdefault(name, 0)
        self._put(f"{name} offsets", offsets[1:] + end if name in self._files else offsets)
        self._put(name, values)
        self._ends[name] = end + len(values)

    def _append_extra(self, name: str, values: Any) -> None:
        if not len(values):  # its kind says nothing
            return
        columns = Columns(len(values))
        columns.add(name, values)
        if name in columns.texts:
            kind = "text"
            self._append_lists(name, columns.texts[name].values, columns.texts[name].offsets)
        elif name in columns.flags:
            kind = "bool"
            self._put(name, columns.flags[name])
        else:
            numbers = columns.numbers[name]
            kind = numbers.dtype.name
            known = self._kinds.get(name, kind)
            if {kind, known} == {"int64", "float64"}:
                # As at once: one number that is not whole makes the column float64.
                if known == "int64":
                    self._files[name].flush()
                    whole = np.memmap(self._files[name], np.int64, "r+")
                    whole.view(np.float64)[:] = whole.astype(np.float64)
                    whole.flush()
                kind, numbers = "float64", numbers.astype(np.float64)
                self._kinds[name] = kind
            self._put(name, numbers)
        if self._kinds.setdefault(name, kind) != kind:
            raise DataError(
                f"`{name}`: expected one kind of value, found {self._kinds[name]} and {kind}",
                field=name,
                reason="wrong_type",
            )

    def report(self) -> Report:
        """What became of all rows so far."""
        report = Report.merged(self._reports)
        if 0 < self._with_ref < self.n:
            note = (
                f"reference log-probs stand in {self._with_ref} of {self.n} pairs and were not "
                "carried"
            )
            report = replace(report, notes=(*report.notes, note))
        return report

    def columns(self) -> Columns:
        """All columns, mapped."""
        maps: list[mmap.mmap] = []

        def array(name: str, dtype: Any) -> NDArray[Any]:
            if name not in self._files:
                return np.empty(0, dtype)
            file = self._files[name]
            file.flush()
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return np.empty(0, dtype)
            maps.append(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
            return np.frombuffer(maps[-1], dtype)

        def lists(name: str, dtype: Any) -> Ragged:
            offsets = array(f"{name} offsets", np.int64)
            return Ragged(array(name, dtype), offsets if len(offsets) else np.zeros(1, np.int64))

        def release() -> None:
            for part in maps:
                part.madvise(mmap.MADV_DONTNEED)

        columns = Columns(self.n, release)
        columns.lists = {name: lists(name, np.int32) for name in LISTS.values()}
        if self.n and self._with_ref == self.n:
            columns.numbers = {name: array(name, np.float64) for name in mapped.REFERENCE}
        if self._gaps:
            columns.numbers[mapped.ROW] = array(mapped.ROW, np.int64)
        columns.extra = list(self._names)
        for name in self._names:
            kind = self._kinds.get(name, "int64")
            if kind == "text":
                columns.texts[name] = lists(name, np.uint8)
            elif kind == "bool":
                columns.flags[name] = array(name, np.bool_)
            else:
                columns.numbers[name] = array(name, kind)
        return columns


def parts_of(
    files: Sequence[str], tokenizer: Tokenizer, options: Settings, progress: Progress
) -> Iterator[Mapping[str, Any]]:
    """What ``PairDataset.from_files`` would encode at once, in parts of at least ``PAIRS``."""
    with Bar(progress, files) as callback:
        yield from parts(files, tokenizer, options, callback, PAIRS)


def encode_into(
    folder: Folder,
    files: Sequence[str],
    tokenizer: Tokenizer,
    options: Settings,
    progress: Progress,
    made: Mapping[str, Any],
    check: Callable[[], Any] = lambda: None,
) -> Report:
    """Replaces what a folder holds by the pairs of files; ``check`` has the last word."""
    spooled = folder.temporary()
    try:
        with ExitStack() as stack:
            spool = Spool(spooled, options.columns, stack)
            for raw in parts_of(files, tokenizer, options, progress):
                spool.append(raw, tokenizer)
            report = spool.report()
            check()
            write(
                folder,
                spool.columns(),
                pad_id=tokenizer.pad_id if tokenizer.pad_id is not None else 0,
                vocab_size=tokenizer.vocab_size,
                report=report,
                made=made,
            )
    finally:
        shutil.rmtree(spooled, ignore_errors=True)
    return report


def encode_files(
    paths: Paths, tokenizer: Tokenizer, out: Path, arguments: Mapping[str, Any]
) -> Report:
    """See :func:`dpo_ext.store.write.prepare`."""
    known = {f.name for f in fields(Settings)} - {"now"} | {"progress"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise TypeError(f"unknown option `{unknown[0]}`: there is {', '.join(sorted(known))}")
    files = opened_up(paths)
    options = settings({"limits": None, **arguments})
    _checked(tokenizer)
    with writing(out) as folder:
        folder.sweep(mapped.current_file(folder.path))
        return encode_into(
            folder, files, tokenizer, options, arguments.get("progress", False), made={}
        )
