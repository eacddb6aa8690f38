"""The columns of a saved data set, and the Arrow arrays over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_ext.errors import DataError
from dpo_ext.pairs import Examples, Pairs, Ragged, contents_of
from dpo_ext.store.manifest import ROW

# A list column of at most this many ids has 32-bit offsets.
MAX_INT32 = 2**31 - 1


class Columns:
    """What goes into a file: arrays by column name, perhaps mapped from other files.

    Attributes:
        kind: of what they are the columns.
        lists: :class:`Ragged` by name.
        numbers: (n,) int64 or float64 by name.
        flags: (n,) bool by name.
        texts: n strings by name, as lists of their bytes in UTF-8.
        extra: the names of the extra columns, in their order.
        release: lets go of what is mapped; called while it is copied.
    """

    def __init__(
        self,
        n: int,
        release: Callable[[], Any] = lambda: None,
        kind: type[Examples] = Pairs,
    ) -> None:
        self.n, self.release, self.kind = n, release, kind
        self.lists: dict[str, Ragged] = {}
        self.numbers: dict[str, NDArray[Any]] = {}
        self.flags: dict[str, NDArray[np.bool_]] = {}
        self.texts: dict[str, Ragged] = {}
        self.extra: list[str] = []

    @classmethod
    def of(cls, examples: Examples) -> Columns:
        """The columns of a data set."""
        n = len(examples)
        columns = cls(n, kind=type(examples))
        columns.lists = {name: getattr(examples, name) for name in examples.IDS}
        columns.lists |= examples.weights
        for attribute, names in examples.COLUMNS.items():
            if (values := getattr(examples, attribute)) is not None:
                for name, numbers in zip(names, values.reshape(n, len(names)).T, strict=True):
                    columns.put(name, numbers)
        if not np.array_equal(examples.rows, np.arange(n)):
            columns.put(ROW, examples.rows)
        for name, values in examples.columns.items():
            columns.add(name, values)
        return columns

    def contents(self) -> str:
        """`Examples.contents` of what these are the columns of."""
        names = (name for attribute in self.kind.SAID for name in self.kind.COLUMNS[attribute])
        return contents_of(
            self.kind, self.lists, [{**self.numbers, **self.flags}[name] for name in names]
        )

    def put(self, name: str, array: NDArray[Any]) -> None:
        """A column of numbers or booleans."""
        if array.dtype.kind == "b":
            self.flags[name] = array
        else:
            dtype = np.float64 if array.dtype.kind == "f" else np.int64
            self.numbers[name] = np.ascontiguousarray(array, dtype)

    def is_own(self, name: str) -> bool:
        """Whether a column of ours has this name."""
        kind = self.kind
        lists = (*kind.IDS, *kind.WEIGHTS.values())
        return name in (*lists, *(n for names in kind.COLUMNS.values() for n in names), ROW)

    def add(self, name: str, values: Any) -> None:
        """An extra column, by the kind of its values.

        Raises:
            DataError: its name is taken.  TypeError: its values are of no kind that can be saved.
        """
        if self.is_own(name):
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
        self.put(name, array)
        self.extra.append(name)


def list_array(pa: Any, ragged: Ragged) -> Any:
    """Lists of ids or weights as an Arrow array over the same numbers: list<int32> or list<float>,
    or large_list where 32-bit offsets do not reach.
    """
    item = pa.float32() if ragged.values.dtype.kind == "f" else pa.int32()
    values = pa.Array.from_buffers(item, len(ragged.values), [None, pa.py_buffer(ragged.values)])
    if len(ragged.values) > MAX_INT32:
        kind, offsets = pa.large_list(item), ragged.offsets
    else:
        kind, offsets = pa.list_(item), ragged.offsets.astype(np.int32)
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
