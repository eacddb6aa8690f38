"""Saved data sets: one Arrow IPC file and a manifest, written as a whole, mapped when loaded.

The file holds one uncompressed record batch with TRL's column names ``prompt_ids``, ``chosen_ids``,
``rejected_ids`` (list<int32>; large_list once a column has 2^31 ids), and where they are known
``ref_chosen_logps`` and ``ref_rejected_logps`` (double), ``row`` (int64, if rows were dropped) and
the extra columns. ``pyarrow.ipc.open_file`` and ``datasets.load_dataset("arrow", data_files=...)``
read it. The manifest says where each column's buffers lie, so that loading needs NumPy alone.

n is the number of pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ext import _core
from dpo_ext.layout.batch import Ragged
from dpo_ext.data.tables import arrow
from dpo_ext.data.dataset import PairDataset
from dpo_ext.errors import DataError
from dpo_ext.store.folder import Folder, writing
from dpo_ext.store.read import (
    FORMAT,
    IDS,
    MAX_INT32,
    REFERENCE,
    ROW,
    VERSION,
    current_file,
    load,
    sealed,
)
from dpo_ext.report import Report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dpo_ext.data.options import Paths
    from dpo_ext.data.tokenizer import Tokenizer

__all__ = ["load", "prepare", "save"]


class Columns:
    """What goes into a file: arrays by column name, perhaps mapped from other files.

    Attributes:
        lists: :class:`Ragged` by name.
        numbers: (n,) int64 or float64 by name.
        flags: (n,) bool by name.
        texts: n strings by name, as lists of their bytes in UTF-8.
        extra: the names of the extra columns, in their order.
        release: lets go of what is mapped; called while it is copied.
    """

    def __init__(self, n: int, release: Callable[[], Any] = lambda: None) -> None:
        self.n, self.release = n, release
        self.lists: dict[str, Ragged] = {}
        self.numbers: dict[str, NDArray[Any]] = {}
        self.flags: dict[str, NDArray[np.bool_]] = {}
        self.texts: dict[str, Ragged] = {}
        self.extra: list[str] = []

    @classmethod
    def of(cls, pairs: PairDataset) -> Columns:
        """The columns of a data set."""
        columns = cls(len(pairs))
        columns.lists = {name: getattr(pairs, name) for name in IDS}
        if pairs.ref_logps is not None:
            for i, name in enumerate(REFERENCE):
                columns.numbers[name] = np.ascontiguousarray(pairs.ref_logps[:, i], np.float64)
        if not np.array_equal(pairs.rows, np.arange(len(pairs))):
            columns.numbers[ROW] = pairs.rows
        for name, values in pairs.columns.items():
            columns.add(name, values)
        return columns

    def add(self, name: str, values: Any) -> None:
        """An extra column, by the kind of its values.

        Raises:
            DataError: its name is taken.  TypeError: its values are of no kind that can be saved.
        """
        if name in (*IDS, *REFERENCE, ROW):
            raise DataError(f"`{name}`: a column of ours has this name", field=name)
        is_array = isinstance(values, np.ndarray) and values.dtype.kind not in "OU"
        if not is_array and all(isinstance(value, str) for value in values):
            parts = [value.encode() for value in values]
            offsets = np.zeros(len(parts) + 1, np.int64)
            np.cumsum([len(part) for part in parts], out=offsets[1:])
            self.texts[name] = Ragged(np.frombuffer(b"".join(parts), np.uint8), offsets)
            self.extra.append(name)
            return
        array = np.asarray(values)
        if array.ndim != 1 or array.dtype.kind not in "iufb":
            raise TypeError(
                f"`{name}` must hold numbers, booleans or strings, found {array.dtype} of shape "
                f"{array.shape}"
            )
        if array.dtype.kind == "b":
            self.flags[name] = array
        else:
            dtype = np.float64 if array.dtype.kind == "f" else np.int64
            self.numbers[name] = np.ascontiguousarray(array, dtype)
        self.extra.append(name)


def list_array(pa: Any, ragged: Ragged) -> Any:
    """Lists of ids as an Arrow array over the same ids: list<int32>, or large_list where 32-bit
    offsets do not reach.
    """
    values = pa.Array.from_buffers(
        pa.int32(), len(ragged.values), [None, pa.py_buffer(ragged.values)]
    )
    if len(ragged.values) > MAX_INT32:
        kind, offsets = pa.large_list(pa.int32()), ragged.offsets
    else:
        kind, offsets = pa.list_(pa.int32()), ragged.offsets.astype(np.int32)
    return pa.Array.from_buffers(
        kind, len(ragged), [None, pa.py_buffer(offsets)], children=[values]
    )


def record_batch(pa: Any, columns: Columns, metadata: Mapping[str, str]) -> Any:
    """All columns as one Arrow record batch, over the same numbers."""
    arrays = {name: list_array(pa, ragged) for name, ragged in columns.lists.items()}
    for name, numbers in columns.numbers.items():
        kind = pa.int64() if numbers.dtype.kind == "i" else pa.float64()
        arrays[name] = pa.Array.from_buffers(kind, columns.n, [None, pa.py_buffer(numbers)])
    for name, flags in columns.flags.items():
        arrays[name] = pa.array(flags, pa.bool_())
    for name, texts in columns.texts.items():
        buffers = [None, pa.py_buffer(texts.offsets), pa.py_buffer(texts.values)]
        arrays[name] = pa.Array.from_buffers(pa.large_string(), columns.n, buffers)
    names = [*(name for name in arrays if name not in columns.extra), *columns.extra]
    batch = pa.record_batch([arrays[name] for name in names], names=names)
    return batch.replace_schema_metadata(dict(metadata))


def write(
    folder: Folder,
    columns: Columns,
    *,
    pad_id: int,
    vocab_size: int | None,
    report: Report,
    made: Mapping[str, Any] | None = None,
) -> None:
    """Replaces what the folder holds; ``made`` says how, for the cache."""
    pa = arrow("saving a data set")
    facts = {"version": VERSION, "pad_id": pad_id, "vocab_size": vocab_size}
    batch = record_batch(pa, columns, {"dpo_ext": json.dumps(facts)})
    options = pa.ipc.IpcWriteOptions(compression=None, allow_64bit=True)

    def fill(sink: Any) -> None:
        with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)

    name, size, digest = folder.put(fill, columns.release)
    manifest = {
        "format": FORMAT,
        **facts,
        "package": _core.__version__,
        "file": {"name": name, "bytes": size, "sha256_4mib": digest},
        "n": columns.n,
        "columns": _places(pa, folder.path / name, columns),
        "report": report.to_dict(),
        "made": dict(made or {}),
    }
    folder.publish(sealed(manifest), name)


def _places(pa: Any, path: Path, columns: Columns) -> dict[str, Any]:
    """Where the buffers of each column lie, as a reader finds them: [first byte, bytes]."""
    kinds = {
        **dict.fromkeys(columns.lists, "lists"),
        **{name: numbers.dtype.name for name, numbers in columns.numbers.items()},
        **dict.fromkeys(columns.flags, "bool"),
        **dict.fromkeys(columns.texts, "text"),
    }
    with pa.memory_map(str(path)) as file:
        base = file.read_buffer().address
        file.seek(0)
        batch = pa.ipc.open_file(file).get_batch(0)
        places = {}
        for name in batch.schema.names:
            kind, array = kinds[name], batch.column(name)
            buffers = [
                [buffer.address - base if buffer.size else 0, buffer.size]
                for buffer in array.buffers()
                if buffer is not None
            ]
            wide = kind == "lists" and pa.types.is_large_list(array.type)
            places[name] = {"kind": "large_lists" if wide else kind, "buffers": buffers}
    return places


def save(pairs: PairDataset, folder: str | PathLike[str]) -> None:
    """Saves a data set; see :meth:`PairDataset.save`."""
    columns = Columns.of(pairs)
    with writing(Path(folder)) as opened:
        opened.sweep(current_file(opened.path))
        write(
            opened,
            columns,
            pad_id=pairs.pad_id,
            vocab_size=pairs.vocab_size,
            report=pairs.report,
        )


def prepare(files: Paths, tokenizer: Tokenizer, out: str | PathLike[str], **options: Any) -> Report:
    """Encodes files into a saved data set without holding it in memory.

    Same as ``PairDataset.from_files(files, tokenizer, **options).save(out)``, byte for byte, but
    what is held at any time are the offsets of the ids and some ten thousand pairs: ten million
    pairs take less than 2 GB. Ids grow on disk beside ``out`` first, so that it needs twice the
    room of the result. Stopped at any point, it leaves what ``out`` held before.

    Args:
        files: as in :meth:`PairDataset.from_files`.
        tokenizer: encodes text and renders messages.
        out: the folder, as in :meth:`PairDataset.save`.
        options: those of :meth:`PairDataset.from_files`, ``progress`` too.

    Returns:
        Report: what became of the rows; it is saved, too.

    Raises:
        DataError, LimitExceeded, TokenizerError, OSError: as ``from_files`` and ``save``.
        TypeError: an unknown option.  ModuleNotFoundError: pyarrow is not installed.
    """
    from dpo_ext.data.encode import encode_files

    arrow("preparing a data set")
    return encode_files(files, tokenizer, Path(out), options)
