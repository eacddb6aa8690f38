"""Reading a saved data set: its manifest and its file, each number checked before it is used.

n is the number of examples.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Mapping
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpo_ext.errors import DataError
from dpo_ext.pairs import Examples, Pairs, Ragged, Unpaired
from dpo_ext.report import Report
from dpo_ext.store.columns import MAX_INT32
from dpo_ext.store.folder import (
    CHUNK_BYTES,
    MANIFEST,
    damaged,
    digest_of,
    locks,
    not_a_folder,
    open_inside,
    typed_errors,
)
from dpo_ext.store.manifest import MAX_MANIFEST_BYTES, ROW, read_manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray


NUMBERS = {"int64": np.dtype("<i8"), "float64": np.dtype("<f8")}
TRUNCATIONS = ("keep_start", "keep_end", "keep_completions", "drop", "error")
# What a folder may hold, and who reads it.
READERS = {Pairs.KIND: "PairDataset.load", Unpaired.KIND: "UnpairedDataset.load"}


class Saved(NamedTuple):
    """A saved data set, mapped."""

    examples: Any
    manifest: Mapping[str, Any]
    folder: str
    """Absolute."""
    name: str
    """Of the data file in it."""


def opened(folder: str | PathLike[str], *, verify: bool, kind: type[Examples] = Pairs) -> Saved:
    """Maps a saved data set of a kind; see `PairDataset.load`."""
    path = Path(folder)
    locks(path)
    with typed_errors(path):
        if not stat.S_ISDIR(path.stat().st_mode):
            raise not_a_folder(path)
        seen = None
        while True:
            manifest = read_manifest(path)
            _check_kind(path, manifest, kind)
            name = manifest["file"]["name"]
            try:
                fd = open_inside(path, name)
                break
            except FileNotFoundError as error:
                # Replaced since its manifest was read: the new manifest names another file.
                if name == seen:
                    raise damaged(path / name, "the data file is missing") from error
                seen = name
        try:
            examples = Mapped(path, manifest, fd, verify).examples(kind)
            return Saved(examples, manifest, str(path.absolute()), name)
        finally:
            os.close(fd)


def _check_kind(folder: Path, manifest: Mapping[str, Any], kind: type[Examples]) -> None:
    """That a folder holds what is asked for; the first release saved pairs, and said nothing."""
    found = manifest.get("kind", Pairs.KIND)
    if found == kind.KIND:
        return
    if not isinstance(found, str) or found not in READERS:
        raise damaged(folder / MANIFEST, f"`kind`: unknown {str(found)[:20]!a}")
    raise damaged(folder, f"expected {kind.KIND}, found {found}\nhint: {READERS[found]} reads them")


class Mapped:
    """One data file, mapped, with every number of its manifest checked before it is used."""

    def __init__(self, folder: Path, manifest: dict[str, Any], fd: int, verify: bool) -> None:
        self.folder, self.manifest, self.verify = folder, manifest, verify
        self.path = folder / manifest["file"]["name"]
        self.size = os.fstat(fd).st_size
        expected = manifest["file"].get("bytes")
        if self.size != expected or self.size == 0:
            raise damaged(self.path, f"expected {str(expected)[:20]} bytes, found {self.size}")
        if verify and digest_of(fd, self.size) != manifest["file"].get("sha256_4mib"):
            raise damaged(self.path, "the data file is damaged: its digest differs")
        self.map = mmap.mmap(fd, self.size, access=mmap.ACCESS_READ)
        self.n = self._count(manifest.get("n"), "n", MAX_MANIFEST_BYTES << 20)
        self.pad_id = self._count(manifest.get("pad_id"), "pad_id", MAX_INT32)
        vocab = manifest.get("vocab_size")
        self.vocab_size = None if vocab is None else self._count(vocab, "vocab_size", 2**31)

    def _wrong(self, what: str) -> DataError:
        return damaged(self.folder / MANIFEST, what)

    def _count(self, value: Any, name: str, most: int) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise self._wrong(f"`{name}`: expected a number in 0..={most}, found {str(value)[:40]}")
        return value

    def _buffer(self, column: Any, name: str, which: int, dtype: Any, n: int) -> NDArray[Any]:
        """Buffer ``which`` of a column as an array of ``n`` items over the map."""
        places = column.get("buffers")
        place = places[which] if isinstance(places, list) and len(places) > which else None
        if not isinstance(place, list) or len(place) != 2:
            raise self._wrong(f"`{name}`: expected a first byte and a number of bytes")
        start, size = (self._count(number, name, self.size) for number in place)
        dtype = np.dtype(dtype)
        if start % dtype.itemsize or n * dtype.itemsize > size or start + size > self.size:
            raise self._wrong(f"`{name}`: a buffer does not lie in the file")
        return np.frombuffer(self.map, dtype, n, start) if n else np.empty(0, dtype)

    def _items(self, column: Any, name: str, which: int, itemsize: int) -> int:
        places = column.get("buffers")
        if isinstance(places, list) and len(places) > which and isinstance(places[which], list):
            return self._count(places[which][-1], name, self.size) // itemsize
        raise self._wrong(f"`{name}`: expected buffers")

    def _offsets(self, column: Any, name: str, dtype: str, items: int) -> NDArray[np.int64]:
        if self.n == 0:
            return np.zeros(1, np.int64)
        offsets = self._buffer(column, name, 0, dtype, self.n + 1).astype(np.int64, copy=False)
        rises = bool((offsets[1:] >= offsets[:-1]).all())
        if offsets[0] != 0 or not rises or offsets[-1] > items:
            raise self._wrong(f"`{name}`: expected offsets that rise from 0 to at most {items}")
        return offsets

    def _ids(self, column: Any, name: str) -> Ragged:
        items = self._items(column, name, 1, 4)
        offsets = self._offsets(column, name, "<i8" if _is_wide(column) else "<i4", items)
        values = self._buffer(column, name, 1, "<i4", int(offsets[-1]))
        if self.verify:
            most = self.vocab_size if self.vocab_size is not None else MAX_INT32 + 1
            step = CHUNK_BYTES // 4
            for start in range(0, len(values), step):
                part = values[start : start + step].view(np.uint32)
                if part.max() >= most:
                    at = start + int((part >= most).argmax())
                    row = int(np.searchsorted(offsets, at, "right"))
                    raise DataError(
                        f"{self.path}, row {row}, `{name}`: expected token ids in 0..{most}, "
                        f"found {values[at]}",
                        path=self.path,
                        line=row,
                        field=name,
                        reason="bad_ids",
                    )
                self.map.madvise(mmap.MADV_DONTNEED)
        return Ragged(values, offsets)

    def _weights(self, column: Any, name: str, ids: Ragged) -> Ragged:
        items = self._items(column, name, 1, 4)
        offsets = self._offsets(column, name, "<i8" if _is_wide(column) else "<i4", items)
        if not np.array_equal(offsets, ids.offsets):
            raise self._wrong(f"`{name}`: expected a weight for each id")
        values = self._buffer(column, name, 1, "<f4", int(offsets[-1]))
        if self.verify:
            step = CHUNK_BYTES // 4
            for start in range(0, len(values), step):
                if not np.isfinite(values[start : start + step]).all():
                    raise damaged(self.path, f"`{name}`: expected finite weights")
                self.map.madvise(mmap.MADV_DONTNEED)
        return Ragged(values, ids.offsets)

    def column(self, column: Any, name: str) -> Any:
        kind = column.get("kind")
        if isinstance(kind, str) and kind in NUMBERS:
            return self._buffer(column, name, 0, NUMBERS[kind], self.n)
        if kind == "bool":
            bits = self._buffer(column, name, 0, np.uint8, -(-self.n // 8))
            return np.unpackbits(bits, count=self.n, bitorder="little").astype(bool)
        if kind == "text":
            size = self._items(column, name, 1, 1)
            offsets = self._offsets(column, name, "<i8", size)
            data = self._buffer(column, name, 1, np.uint8, int(offsets[-1])).tobytes()
            ends = offsets.tolist()
            try:
                return [data[a:b].decode() for a, b in pairwise(ends)]
            except UnicodeDecodeError as error:
                raise damaged(self.path, f"`{name}`: expected UTF-8") from error
        raise self._wrong(f"`{name}`: unknown kind {str(kind)[:20]!a}")

    def examples(self, kind: type[Examples]) -> Any:
        """What the file holds, as one of ``kind``."""
        columns = self.manifest.get("columns")
        if not isinstance(columns, dict) or not all(isinstance(c, dict) for c in columns.values()):
            raise self._wrong("`columns`: expected an object of objects")
        missing = [name for name in kind.IDS if name not in columns]
        if missing:
            raise self._wrong(f"`columns`: expected `{missing[0]}`")
        lists = {name: self._ids(columns[name], name) for name in kind.IDS}
        weights = {
            name: self._weights(columns[name], name, lists[side])
            for side, name in kind.WEIGHTS.items()
            if _is_list(columns.get(name, {}))
        }
        if weights and len(weights) < len(kind.WEIGHTS):
            raise self._wrong("`columns`: expected weights of both sides or of none")
        others = {n: self.column(c, n) for n, c in columns.items() if n not in {*lists, *weights}}
        known = {
            name: self._known(name, [others.pop(column, None) for column in own])
            for name, own in kind.COLUMNS.items()
        }
        try:
            report = Report.from_dict(self.manifest["report"])
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise self._wrong(f"`report`: {type(error).__name__}") from error
        rows = others.pop(ROW, None)
        if report.kept != self.n:
            raise self._wrong(f"`report`: expected {self.n} kept, found {str(report.kept)[:20]}")
        facts: dict[str, Any] = {"pad_id": self.pad_id, "vocab_size": self.vocab_size}
        facts |= {"report": report, "rows": rows, "columns": others, **weights, **known}
        if kind is Unpaired:
            facts |= self._of_completions(known)
        try:
            examples = kind(*lists.values(), **facts)
        except ValueError as error:
            raise self._wrong(str(error)) from error
        # What was saved before there was one is read whole when somebody asks.
        if (contents := self.manifest.get("contents")) is not None:
            if not isinstance(contents, str) or re.fullmatch("[0-9a-f]{32}", contents) is None:
                raise self._wrong("`contents`: expected 32 hexadecimal digits")
            examples.keep_contents(contents)
        return examples

    def _known(self, name: str, columns: list[Any]) -> NDArray[Any] | None:
        """An array of what is known of each example, from its columns, if they are there."""
        if any(column is None for column in columns):
            return None
        found = columns[0] if len(columns) == 1 else np.stack(columns, axis=1)
        kinds = {"labels": "b", "kl_completions": "i"}
        if not isinstance(found, np.ndarray) or found.dtype.kind != kinds.get(name, "f"):
            raise self._wrong(f"`{name}`: a column of another kind")
        if self.verify and found.dtype.kind == "f" and not np.isfinite(found).all():
            raise damaged(self.path, "expected finite reference log-probs")
        return found

    def _of_completions(self, known: Mapping[str, NDArray[Any] | None]) -> dict[str, Any]:
        """What a data set of single completions has besides."""
        if known["labels"] is None:
            raise self._wrong("`columns`: expected `label`")
        whose, kl = known["kl_completions"], known["ref_kl_logps"]
        if (whose is None) != (kl is None):
            raise self._wrong("`columns`: expected both `ref_kl_logps` and `kl_completion` or none")
        if whose is not None and ((whose < 0) | (whose >= self.n)).any():
            raise self._wrong(f"`kl_completion`: expected numbers of examples, below {self.n}")
        most, truncation = self.manifest.get("max_length"), self.manifest.get("truncation")
        if most is not None and self._count(most, "max_length", 2**62) == 0:
            raise self._wrong("`max_length`: expected at least 1")
        if truncation not in TRUNCATIONS:
            raise self._wrong(f"`truncation`: unknown {str(truncation)[:20]!a}")
        return {"max_length": most, "truncation": truncation}


def _is_list(column: Mapping[str, Any]) -> bool:
    return column.get("kind") in ("lists", "large_lists")


def _is_wide(column: Mapping[str, Any]) -> bool:
    return column.get("kind") == "large_lists"
