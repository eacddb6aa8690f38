"""`Spool`: columns that grow on disk, a file for each flat array."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_ext.errors import DataError
from dpo_ext.pairs import REFERENCE, WEIGHTS, Examples, Pairs, Ragged, Unpaired
from dpo_ext.report import Report, uncarried
from dpo_ext.store.columns import Columns
from dpo_ext.store.manifest import ROW

# Of single completions both sides of a row are the completion; the label is the first column.
LISTS: dict[type[Examples], dict[str, str]] = {
    Pairs: {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"},
    Unpaired: {"prompt": "prompt_ids", "chosen": "completion_ids"},
}
LABEL = "label"

ONES = 1 << 20  # weights of 1 that are made at a time


class Spool:
    """Columns that grow in a folder, a file for each flat array."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        stack: ExitStack,
        kind: type[Examples] = Pairs,
    ) -> None:
        folder.mkdir(mode=0o700)
        self._folder, self._names, self._stack, self._kind = folder, tuple(names), stack, kind
        self._lists = LISTS[kind]
        self._files: dict[str, Any] = {}
        self._ends: dict[str, int] = {}
        self._kinds: dict[str, str] = {}
        self._report = Report(0, 0)
        self._gaps = self._is_weighed = False
        self.n = self._with_ref = self._read = 0

    def append(self, raw: Mapping[str, Any], notes: Sequence[str]) -> None:
        """Appends what an encoder gave."""
        self._gaps = self._gaps or raw["read"] != raw["kept"]
        if self._kind is Pairs:
            self._append_weights(raw)
            reference = raw["ref_logps"].reshape(-1, 2)
            for i, name in enumerate(REFERENCE):
                self._put(name, np.ascontiguousarray(reference[:, i]))
            self._with_ref += raw["with_ref"]
        for short, name in self._lists.items():
            self._append_lists(name, *raw[short])
        self._put(ROW, raw["rows"])
        for i, (name, values) in enumerate(zip(self._names, raw["columns"], strict=True)):
            if i == 0 and self._kind is Unpaired:
                self._put(LABEL, np.asarray(values, np.bool_))
            else:
                self._append_extra(name, values)
        self.n += raw["kept"]
        self._read += raw["read"]
        part = Report.of({**raw, "with_ref": 0}, notes)
        self._report = Report.merged([self._report, part])

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

    def _append_weights(self, raw: Mapping[str, Any]) -> None:
        """Appends the weights of both sides once there are some: before the ids that they weigh."""
        if raw["weights"] is None and not self._is_weighed:
            return
        for i, (side, name) in enumerate(zip(("chosen", "rejected"), WEIGHTS, strict=True)):
            if not self._is_weighed:
                left = self._ends.get(self._lists[side], 0)
                while left > 0:
                    self._put(name, np.ones(min(left, ONES), np.float32))
                    left -= ONES
            given = raw["weights"]
            self._put(name, np.ones(len(raw[side][0]), np.float32) if given is None else given[i])
        self._is_weighed = True

    def _append_extra(self, name: str, values: Any) -> None:
        if not len(values):  # its kind says nothing
            return
        columns = Columns(len(values), kind=self._kind)
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
        notes = (*self._report.notes, *uncarried(self._with_ref, self.n))
        return replace(self._report, notes=notes)

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

        columns = Columns(self.n, release, self._kind)
        columns.lists = {name: lists(name, np.int32) for name in self._lists.values()}
        if self._is_weighed:
            for side, name in zip(("chosen", "rejected"), WEIGHTS, strict=True):
                offsets = columns.lists[self._lists[side]].offsets
                columns.lists[name] = Ragged(array(name, np.float32), offsets)
        if self.n and self._with_ref == self.n:
            columns.numbers = {name: array(name, np.float64) for name in REFERENCE}
        if self._gaps:
            columns.numbers[ROW] = array(ROW, np.int64)
        extra = list(self._names)
        if self._kind is Unpaired:
            extra = extra[1:]
            columns.flags[LABEL] = array(LABEL, np.bool_)
        columns.extra = extra
        for name in extra:
            kind = self._kinds.get(name, "int64")
            if kind == "text":
                columns.texts[name] = lists(name, np.uint8)
            elif kind == "bool":
                columns.flags[name] = array(name, np.bool_)
            else:
                columns.numbers[name] = array(name, kind)
        return columns
