"""Arrow tables as rows that Rust reads in place: each column as a tree over its buffers.

pyarrow is imported when it is needed. Anything with ``__arrow_c_stream__`` or ``__arrow_c_array__``
comes in through it: its own tables, polars, pandas, DuckDB, and data sets of Hugging Face.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ext.data.options import FIELDS
from dpo_ext.errors import DataError, DpoExtError
from dpo_ext.extras import arrow

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows that Rust is given at a time: what has to be cast is copied for no more of them.
ROWS = 8192
NOTHING = np.empty(0, np.uint8)


@contextmanager
def pyarrow_errors(path: str | None) -> Iterator[None]:
    """Every failure of pyarrow as a :class:`DataError`; those of the system pass."""
    try:
        yield
    except (DpoExtError, MemoryError, ModuleNotFoundError):
        raise
    except OSError as error:
        if error.errno is not None:
            if error.filename is None:
                error.filename = path
            raise
        raise _bad_input(path, error) from error
    except Exception as error:
        raise _bad_input(path, error) from error


def _bad_input(path: str | None, error: Exception) -> DataError:
    said = " ".join(ascii(str(error))[1:-1].split())[:200] or type(error).__name__
    place = f"{path}: " if path is not None else ""
    return DataError(f"{place}pyarrow cannot read it: {said}", path=path, reason="bad_input")


def is_arrow(source: Any) -> bool:
    """Whether ``source`` is a table, or a data set that stands on one."""
    return (
        hasattr(source, "__arrow_c_stream__")
        or hasattr(source, "__arrow_c_array__")
        or _hugging_face(source) == "Dataset"
    )


def is_of_tables(source: Any) -> bool:
    """Whether ``source`` gives the rows of tables, whose structs have the keys of all rows."""
    return _hugging_face(source) is not None


def _hugging_face(source: Any) -> str | None:
    """Which class of the package `datasets` an object has."""
    datasets = sys.modules.get("datasets")
    names = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    return next((n for n in names if datasets and isinstance(source, getattr(datasets, n))), None)


def rows_instead(source: Any) -> bool:
    """Whether the rows of ``source`` exist only as Python objects: a transform makes them."""
    if _hugging_face(source) == "Dataset":
        return bool(source.format["type"] == "custom")
    return _hugging_face(source) == "IterableDataset" and source.features is None


def text_columns(schema: Any, names: Sequence[str]) -> list[str]:
    """The columns of text in a schema that TRL's layouts do not read: one may be a prompt."""
    from pyarrow import types

    is_text = _is_text()

    def holds_text(kind: Any) -> bool:
        if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
            kind = kind.value_type
        return any(is_kind(kind) for is_kind in is_text)

    return [
        field.name
        for field in schema
        if field.name not in names[: len(FIELDS)] and holds_text(field.type)
    ]


def record_batches(source: Any, names: Sequence[str], others: list[str]) -> Iterator[Any]:
    """The record batches of a table, a stream or a data set, without needless columns; the names of
    those of text come to ``others``.

    Raises:
        TypeError: ``source`` is nothing of the kind.
    """
    kind = _hugging_face(source)
    if kind in ("DatasetDict", "IterableDatasetDict"):
        raise TypeError(
            f"expected one data set, found a {kind} of {', '.join(map(repr, source))}\n"
            "hint: choose a split"
        )
    if kind is None and not is_arrow(source):
        raise TypeError(
            "expected a table with `__arrow_c_stream__` or `__arrow_c_array__`, or a data set of "
            f"`datasets`, found {type(source).__name__}"
        )
    pa = arrow(f"reading {type(source).__name__}")
    return _batches(source, kind, names, others, pa)


def _batches(
    source: Any, kind: str | None, names: Sequence[str], others: list[str], pa: Any
) -> Iterator[Any]:
    ours = isinstance(source, (pa.Table, pa.RecordBatch))
    if kind is None and not ours and not hasattr(source, "__arrow_c_stream__"):
        source = pa.record_batch(source)
    schema = getattr(source, "schema", None)
    if kind is not None:
        schema = getattr(source.features, "arrow_schema", None)
    if isinstance(schema, pa.Schema):
        others.extend(text_columns(schema, names))
    if kind is not None:
        columns = [name for name in source.column_names or () if name in names]
        if columns:
            source = source.select_columns(columns)
        for table in source.with_format("arrow").iter(batch_size=ROWS):
            yield from table.to_batches()
    elif isinstance(source, pa.Table):
        kept = [i for i, name in enumerate(source.column_names) if name in names]
        yield from (source.select(kept) if kept else source).to_batches()
    elif isinstance(source, pa.RecordBatch):
        # Not through C pointers, which would lose the sizes of the buffers.
        yield source
    elif hasattr(source, "__arrow_c_stream__"):
        with pa.RecordBatchReader.from_stream(source) as reader:
            if not isinstance(schema, pa.Schema):  # a frame has a schema of its own kind, or none
                others.extend(text_columns(reader.schema, names))
            yield from reader


def slices(batch: Any) -> Iterator[Any]:
    """A record batch in parts of at most ``ROWS`` rows, checked as far as that costs nothing."""
    batch.validate()
    for start in range(0, batch.num_rows, ROWS):
        yield batch.slice(start, ROWS)


def tree_of(
    batch: Any, names: Sequence[str], max_depth: int, path: str | None
) -> tuple[list[tuple[Any, ...] | None], list[NDArray[np.uint8]], int]:
    """The named columns of a record batch for ``PairEncoder.add_columns``, their buffers, and how
    many bytes came of what had to be decoded.

    Raises:
        DataError: a name stands for two columns, or a column contradicts itself.
    """
    tree = _Tree(arrow("reading Arrow"))
    columns: list[tuple[Any, ...] | None] = []
    for name in names:
        found = batch.schema.get_all_field_indices(name)
        if len(found) > 1:
            place = f"{path}, " if path is not None else ""
            raise DataError(
                f"{place}`{name}`: expected one column of this name, found {len(found)}",
                path=path,
                field=name,
                reason="duplicate_key",
            )
        columns.append(tree.node(batch.column(found[0]), max_depth) if found else None)
    return columns, tree.buffers, tree.decoded


class _Tree:
    """Columns as tuples ``(kind, length, offset, validity, ...)``, buffers as their numbers."""

    def __init__(self, pa: Any) -> None:
        self.pa = pa
        self.buffers: list[NDArray[np.uint8]] = []
        self.decoded = 0

    def _buffer(self, buffer: Any) -> int:
        if buffer is not None and not buffer.is_cpu:
            raise TypeError("expected Arrow buffers in main memory, found a device's")
        view = NOTHING if buffer is None or not buffer.size else np.frombuffer(buffer, np.uint8)
        self.buffers.append(view)
        return len(self.buffers) - 1

    def node(self, array: Any, depth: int) -> tuple[Any, ...]:
        """The tree of one array; below ``depth`` levels Rust looks at nothing."""
        t = self.pa.types
        array, is_json = self._plain(array)
        kind, buffers = array.type, array.buffers()
        n, offset = len(array), array.offset
        validity = None
        if buffers and buffers[0] is not None and not t.is_union(kind):
            validity = self._buffer(buffers[0])
        head = (n, offset, validity)
        if depth < 1 or t.is_null(kind):
            return ("null", n, 0, None)
        if t.is_boolean(kind):
            return ("bool", *head, self._buffer(buffers[1]))
        if t.is_integer(kind):
            width = kind.bit_width // 8
            return ("int", *head, self._buffer(buffers[1]), width, t.is_signed_integer(kind))
        if t.is_floating(kind):
            return ("float", *head, self._buffer(buffers[1]), kind.bit_width // 8)
        if t.is_string(kind) or t.is_large_string(kind):
            wide = t.is_large_string(kind)
            offsets, text = self._buffer(buffers[1]), self._buffer(buffers[2])
            return ("text", *head, offsets, wide, 0, text, is_json)
        if t.is_struct(kind):
            names = [kind.field(i).name for i in range(kind.num_fields)]
            fields = (self.node(array.field(i), depth - 1) for i in range(kind.num_fields))
            # A field is cut to the struct's own values, whose bitmap is not.
            return ("struct", *head, names, *fields)
        if t.is_fixed_size_list(kind):
            size = kind.list_size
            items = array.values.slice(offset * size, n * size)
            return ("fixed", *head, size, self.node(items, depth - 1))
        if t.is_list(kind) or t.is_large_list(kind) or t.is_map(kind):
            wide = t.is_large_list(kind)
            first, last = self._ends(buffers[1], wide, offset, n)
            parts = (array.keys, array.items) if t.is_map(kind) else (array.values,)
            if not 0 <= first <= last <= min(map(len, parts)):
                raise ValueError("the offsets of a list do not rise inside its items")
            nodes = (self.node(part.slice(first, last - first), depth - 1) for part in parts)
            name = "map" if t.is_map(kind) else "list"
            return (name, *head, self._buffer(buffers[1]), wide, first, *nodes)
        return ("other", *head, str(kind)[:80])

    def _ends(self, buffer: Any, wide: bool, offset: int, n: int) -> tuple[int, int]:
        if n == 0:
            return 0, 0
        dtype = np.dtype("<i8" if wide else "<i4")
        if buffer is None or buffer.size < (offset + n + 1) * dtype.itemsize:
            raise ValueError("the offsets of a list are too short")
        offsets = np.frombuffer(buffer, dtype, offset + n + 1)
        return int(offsets[offset]), int(offsets[offset + n])

    def _plain(self, array: Any) -> tuple[Any, bool]:
        """Dictionaries, views and extensions undone; whether the strings are JSON values."""
        pa, is_json = self.pa, False
        t = pa.types
        while True:
            kind = array.type
            target: Any = None
            if isinstance(kind, pa.BaseExtensionType):
                is_json = is_json or kind.extension_name == "arrow.json"
                array = array.storage
                continue
            if t.is_dictionary(kind):
                array.validate(full=True)
                array = array.dictionary_decode()
                self.decoded += array.nbytes
                continue
            if t.is_run_end_encoded(kind):
                array.validate(full=True)
                array = pa.compute.run_end_decode(array)
                self.decoded += array.nbytes
                continue
            if t.is_string_view(kind):
                target = pa.large_string()
            elif t.is_float16(kind):
                target = pa.float32()
            elif t.is_list_view(kind) or t.is_large_list_view(kind):
                target = pa.large_list(kind.value_field)
            if target is None:
                return array, is_json
            array.validate(full=True)
            array = array.cast(target)


def text_buffers(texts: Any) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """The bytes and the offsets of each chunk of a column of Arrow strings."""
    import pyarrow as pa

    if isinstance(texts, pa.Array):
        texts = pa.chunked_array([texts])
    elif hasattr(texts, "__arrow_c_stream__"):
        if not isinstance(texts, pa.ChunkedArray):
            texts = pa.chunked_array(texts)
    else:
        texts = pa.chunked_array([pa.array(texts)])
    kind = texts.type.value_type if pa.types.is_dictionary(texts.type) else texts.type
    if not any(is_kind(kind) for is_kind in _is_text()):
        raise TypeError(f"`texts` must be strings, found a column of {texts.type}")
    buffers, before = [], 0
    for chunk in texts.chunks:
        if chunk.null_count:
            row = before + chunk.is_null().index(True).as_py() + 1
            raise DataError(
                f"row {row}: expected a string, found null", line=row, reason="wrong_type"
            )
        before += len(chunk)
        if len(chunk):
            chunk = chunk.cast(pa.large_string())
            _, offsets, data = chunk.buffers()
            places = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            bytes_ = np.frombuffer(b"" if data is None else data, np.uint8)
            buffers.append((bytes_, places))
    return buffers


def _is_text() -> tuple[Any, ...]:
    from pyarrow import types

    return types.is_string, types.is_large_string, types.is_string_view
