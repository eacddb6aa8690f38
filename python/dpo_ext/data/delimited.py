"""CSV and TSV: which text is such a table, and its rows as record batches of strings."""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ext import _core
from dpo_ext.data.options import FIELDS
from dpo_ext.errors import DataError
from dpo_ext.extras import arrow

if TYPE_CHECKING:
    from dpo_ext.data.options import Limits

BOM = b"\xef\xbb\xbf"
# What a file of each ending has between its fields; Excel writes semicolons where numbers have
# decimal commas.
ENDINGS = {".csv": ",", ".tsv": "\t"}
DELIMITERS = (",", "\t", ";")
# By so many of the columns that rows are asked for, a header is one whatever the file's name.
KNOWN = 2
BLOCK_BYTES = 1 << 20
# Of these fields an empty one is none; elsewhere it is an empty text.
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
EMPTY_IS_NONE = (
    *REFERENCE,
    "tools",
    "chat_template_kwargs",
    "messages",
    "conversations",
    "history",
    "rejected_messages",
    "chosen_response",
    "rejected_response",
)
NUMBER = r"\A-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?\z"
WHOLE = r"\A-?(0|[1-9][0-9]*)\z"


@dataclass(frozen=True)
class Header:
    """The first row of a table."""

    delimiter: str
    names: list[str]


def header(head: bytes, path: str, names: Sequence[str]) -> Header | None:
    """The header of a text that begins with ``head``, None if it is no table.

    A file whose name says so is one unless it begins like JSON, any other if its first row has
    ``KNOWN`` of ``names``.
    """
    if head.removeprefix(BOM).lstrip()[:1] in (b"", b"{", b"["):
        return None
    text = head.removeprefix(BOM).decode("utf-8", "replace").lstrip("\r\n")
    named = ending(path)
    order = dict.fromkeys((named, *DELIMITERS) if named else DELIMITERS)
    found = [Header(delimiter, _first_row(text, delimiter)) for delimiter in order]
    best = max(found, key=lambda header: _known(header, names))
    return best if named or _known(best, names) >= KNOWN else None


def ending(path: str) -> str | None:
    """The delimiter that a file's name speaks of."""
    ends = [end.lower() for end in Path(path).suffixes[-2:]]
    if ends and ends[-1] in (".gz", ".zst"):
        ends.pop()
    return ENDINGS.get(ends[-1]) if ends else None


def _first_row(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader(StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error:
        return []


def _known(header: Header, names: Sequence[str]) -> int:
    return len({name for name in header.names if name in names})


def batches(
    path: str, names: Sequence[str], columns: Sequence[str], limits: Limits, others: list[str]
) -> Generator[tuple[Any, float], None, None]:
    """The record batches of a table, and which share of the file is read with each.

    Texts stay as they are spelt: nothing is taken for a number, a date or a missing value.
    Numbers are the log-probs under the reference, and those of ``columns`` that hold nothing else.
    """
    pa = arrow("reading CSV")
    found = header(_core.FileText(path, limits).head(), path, names)
    assert found is not None
    wanted = _checked(found, path, names)
    others.extend(name for name in found.names if name not in names[: len(FIELDS)])
    types = _types(pa, path, found, [name for name in columns if name in wanted], limits)
    for batch, share in _texts(pa, path, found, wanted, limits):
        for part in _typed(pa, batch, types):
            yield part, share


def _checked(header: Header, path: str, names: Sequence[str]) -> list[str]:
    """The columns that rows are asked for."""

    def bad(message: str, field: str | None, reason: str) -> DataError:
        place = path if field is None else f"{path}, `{field}`"
        return DataError(f"{place}: {message}", path=path, field=field, reason=reason)

    wanted = [name for name in header.names if name in names]
    for name in wanted:
        if wanted.count(name) > 1:
            message = f"expected one column of this name, found {wanted.count(name)}"
            raise bad(message, name, "duplicate_key")
    if len(wanted) < KNOWN:
        raise bad(
            f"expected a header with columns such as {', '.join(map(repr, names[:3]))}, found "
            f"{shown(header.names)}\n"
            "hint: `prompt_key`, `chosen_key` and `rejected_key` give other names",
            None,
            "bad_input",
        )
    return wanted


def shown(names: Sequence[str]) -> str:
    """Some of the names of columns, in quotes."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(ascii(name[:40]) for name in names[:8]) + more


def _texts(
    pa: Any, path: str, header: Header, wanted: Sequence[str], limits: Limits
) -> Iterator[tuple[Any, float]]:
    """The wanted columns as strings."""
    from pyarrow import csv as reader

    size = max(1, Path(path).stat().st_size)
    text = _core.FileText(path, limits, ord(header.delimiter))
    ragged: list[Any] = []

    def refuse(row: Any) -> str:
        ragged.append(row)
        return "error"

    # pyarrow refuses a header that no line's end follows.
    if b"\n" not in (head := text.head()) and b"\r" not in head:
        return
    with _named(path, ragged):
        batches = reader.open_csv(
            text,
            # A row is at most one block long; in one thread pyarrow knows its number.
            reader.ReadOptions(
                use_threads=False, block_size=max(BLOCK_BYTES, limits.max_line_bytes + 1)
            ),
            reader.ParseOptions(
                delimiter=header.delimiter, newlines_in_values=True, invalid_row_handler=refuse
            ),
            reader.ConvertOptions(
                column_types=dict.fromkeys(wanted, pa.string()), include_columns=list(wanted)
            ),
        )
    with batches:
        while True:
            with _named(path, ragged):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch, min(1.0, text.unpacked / size)


@contextmanager
def _named(path: str, ragged: Sequence[Any]) -> Iterator[None]:
    """What pyarrow refuses of a table, said in our words where we know them."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if ragged:
            row = ragged[0]
            number = row.number - 1
            raise DataError(
                f"{path}, row {number}: expected {row.expected_columns} fields, as in the header, "
                f"found {row.actual_columns}\n"
                "hint: a field with the delimiter or a line's end in it stands in double quotes",
                path=path,
                line=number,
                reason="bad_input",
            ) from error
        if "invalid UTF8" in str(error):
            raise DataError(
                f"{path}: expected UTF-8, found other bytes\n"
                "hint: write it as UTF-8, as with `iconv -f WINDOWS-1252 -t UTF-8 FILE`",
                path=path,
                reason="bad_input",
            ) from error
        raise


def _types(
    pa: Any, path: str, header: Header, columns: Sequence[str], limits: Limits
) -> dict[str, Any]:
    """What each of the columns that are carried along holds if it is numbers alone; the table is
    read for it, since its last row may be the first that is none.
    """
    from pyarrow import compute as pc

    types: dict[str, Any] = dict.fromkeys(columns, None)
    if not columns:
        return {}
    for batch, _ in _texts(pa, path, header, columns, limits):
        for name, kind in list(types.items()):
            column = pc.drop_null(_none_if_empty(pa, batch.column(name)))
            if not len(column):
                continue
            if not pc.all(pc.match_substring_regex(column, NUMBER)).as_py():
                del types[name]
            elif not pc.all(pc.match_substring_regex(column, WHOLE)).as_py():
                types[name] = pa.float64()
            elif kind is None:
                types[name] = pa.int64()
            if types.get(name) == pa.int64():
                try:
                    column.cast(pa.int64())
                except pa.ArrowInvalid:  # beyond 64 bits a number would lose digits
                    del types[name]
        if not types:
            break
    return {name: kind for name, kind in types.items() if kind is not None}


def _none_if_empty(pa: Any, column: Any) -> Any:
    from pyarrow import compute as pc

    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _typed(pa: Any, batch: Any, types: dict[str, Any]) -> Iterator[Any]:
    """A batch with its numbers as numbers, cut where a log-prob is none: such a row is bad, and
    says so.
    """
    from pyarrow import compute as pc

    named = batch.schema.names
    columns = {name: batch.column(name) for name in named}
    for name in named:
        if name in EMPTY_IS_NONE or name in types:
            columns[name] = _none_if_empty(pa, columns[name])
        if name in types:
            columns[name] = columns[name].cast(types[name])
    reference = [name for name in REFERENCE if name in named]
    good = np.ones(batch.num_rows, bool)
    for name in reference:
        matched = pc.match_substring_regex(columns[name], NUMBER)
        good &= pc.fill_null(matched, True).to_numpy(zero_copy_only=False)
    ends = [0, *(np.flatnonzero(np.diff(good)) + 1).tolist(), len(good)]
    for start, end in pairwise(ends):
        part = {name: column.slice(start, end - start) for name, column in columns.items()}
        if start < end and good[start]:
            part.update((name, part[name].cast(pa.float64())) for name in reference)
        yield pa.RecordBatch.from_arrays(list(part.values()), names=list(part))
