"""Shards of token ids, as jobs of Ray, Spark and `datasets` write them with `encode_table`.

They are converted once to the form that is mapped, in bounded memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpo_ext import _core
from dpo_ext.data.cache import fingerprint
from dpo_ext.data.files import SUFFIXES, Kind, record_batches, saved_files, schema_of, some, sources
from dpo_ext.data.spool import Spool
from dpo_ext.data.tables import pyarrow_errors
from dpo_ext.errors import DataError
from dpo_ext.extras import arrow
from dpo_ext.pairs import IDS, REFERENCE, WEIGHTS, Pairs, Ragged
from dpo_ext.report import REPORT_KEY, Report
from dpo_ext.store.folder import MANIFEST, PAIRS, SHADOW, Folder, damaged, typed_errors, writing
from dpo_ext.store.manifest import FACTS_KEY, ROW, VERSION
from dpo_ext.store.notes import status_of
from dpo_ext.store.read import Saved, opened
from dpo_ext.store.write import write

if TYPE_CHECKING:
    from dpo_ext.data.tokenizer import Tokenizer

TABLES: dict[Kind, str] = {"parquet": "Parquet", "arrow": "Arrow"}


@dataclass(frozen=True)
class Shard:
    """A file of ids, and what its schema says."""

    path: str
    kind: Kind
    names: tuple[str, ...]
    types: Mapping[str, Any]
    metadata: Mapping[bytes, bytes]

    @property
    def extra(self) -> tuple[str, ...]:
        """The names of its extra columns, which hold numbers, booleans or strings."""
        own = (*IDS, *WEIGHTS, *REFERENCE, ROW)
        return tuple(n for n in self.names if n not in own and _is_plain(self.types[n]))

    @property
    def lost(self) -> tuple[str, ...]:
        """The names of the columns that a data set of pairs has no place for."""
        own = (*IDS, *WEIGHTS, *REFERENCE, ROW, *self.extra)
        return tuple(name for name in self.names if name not in own)

    def error(self, what: str) -> DataError:
        return damaged(Path(self.path), what)


def is_of_others(folder: Path) -> bool:
    """Whether a folder holds files and none of a saved data set of ours."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    return bool(names) and not any(name == MANIFEST or PAIRS.is_data(name) for name in names)


def check_tokenizer(folder: Path, pairs: Pairs, tokenizer: Tokenizer) -> None:
    """That pairs were encoded by a tokenizer, as far as padding and vocabulary tell.

    Raises:
        DataError: they were not.
    """
    found = {"pad_id": pairs.pad_id, "vocab_size": pairs.vocab_size}
    if found != (expected := _of(tokenizer)):
        raise damaged(folder, f"expected ids of `tokenizer`, {expected}, found {found}")


def _of(tokenizer: Tokenizer) -> dict[str, Any]:
    pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else 0
    return {"pad_id": pad_id, "vocab_size": tokenizer.vocab_size}


def mapped_shards(
    folder: Path,
    *,
    tokenizer: Tokenizer | None,
    cache_dir: str | PathLike[str] | None,
    verify: bool,
) -> Saved:
    """The pairs of a folder of shards, mapped from what they were converted to once.

    What was converted counts for the same bytes in the same order and the same tokenizer.

    Raises:
        DataError: the folder holds something else, the shards differ in their columns or in their
            tokenizer, or one of them is damaged.
    """
    arrow("loading shards")
    # Engines hide what begins with a dot.
    root = folder / SHADOW if cache_dir is None else Path(cache_dir)
    with typed_errors(folder):
        files = _files(folder)
        before = [status_of(name) for name in files]
        shards = [shard for name in files if (shard := _shard(name)) is not None]
        alike, notes = _alike(folder, shards, tokenizer)
        _check_extra(shards)
    try:
        with typed_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            prints = [fingerprint(root, name) for name in files]
    except PermissionError as error:
        error.add_note("hint: `cache_dir` names a folder for what the shards are converted to")
        raise
    facts = {"shards": prints, "format": VERSION, "package": _core.__version__, **alike}
    place = root / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    found, damage = _look(place, verify)
    if found is not None:
        return found
    if damage is not None:
        notes += (f"what was kept of the shards was damaged and is converted anew: {damage}",)
    with writing(place) as opened_folder:
        found, _ = _look(place, verify)
        if found is not None:  # by another process, while this one waited
            return found
        opened_folder.sweep(None)
        _convert(opened_folder, shards, alike, notes)
        for name, status in zip(files, before, strict=True):
            if status_of(name) != status:
                raise damaged(Path(name), "the file changed while it was read")
    return opened(place, verify=False)


def _look(place: Path, verify: bool) -> tuple[Saved | None, str | None]:
    try:
        return opened(place, verify=verify), None
    except FileNotFoundError:
        return None, None
    except DataError as error:
        return None, str(error).splitlines()[0]


def _files(folder: Path) -> list[str]:
    found = sources(folder).files
    if found == [os.fspath(folder)]:  # of `save_to_disk`
        return saved_files(found[0])
    others = [name for name in found if SUFFIXES.get(Path(name).suffix.lower()) not in TABLES]
    if others:
        raise damaged(
            folder,
            "expected a saved data set, or shards of token ids that end in .parquet, .arrow or "
            f".feather, found {some([Path(name).name for name in others])}\n"
            "hint: PairDataset.from_files encodes rows of text",
        )
    return found


def _shard(path: str) -> Shard | None:
    """A shard with the columns of ids; None if it has no rows and no columns of them."""
    with Path(path).open("rb") as file:
        kind: Kind = "parquet" if file.read(4) == b"PAR1" else "arrow"
    with pyarrow_errors(path):
        schema = schema_of(path, kind)
    names = tuple(schema.names)
    if not set(IDS) <= set(names):
        with pyarrow_errors(path), closing(record_batches(path, kind, names)) as batches:
            if not any(batch.num_rows for batch in batches):
                return None
        raise damaged(
            Path(path),
            f"expected the columns {', '.join(IDS)}, found {some(names, 8) or 'none'}\n"
            "hint: PairDataset.from_files encodes rows of text, encode_table a table of them",
        )
    if len(set(names)) < len(names):
        raise damaged(Path(path), "expected every column once")
    types = {name: schema.field(name).type for name in names}
    return Shard(path, kind, names, types, dict(schema.metadata or {}))


def _alike(
    folder: Path, shards: Sequence[Shard], tokenizer: Tokenizer | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Padding and vocabulary of all shards, as they and the caller say, and what to note."""
    alike: dict[str, Any] = {}
    whose = "`tokenizer`"
    if tokenizer is not None:
        alike = _of(tokenizer)
    for shard in shards:
        said = _facts(shard)
        if said and alike and said != alike:
            raise shard.error(
                f"expected ids of one tokenizer, found {said} here and {alike} of {whose}"
            )
        if said and not alike:
            alike, whose = said, shard.path
    if alike:
        return alike, ()
    note = (
        f"{folder}: no shard says of which tokenizer its ids are: padded with 0, and not checked "
        "against a vocabulary; `tokenizer` says it"
    )
    return {"pad_id": 0, "vocab_size": None}, (note,)


def _facts(shard: Shard) -> dict[str, Any]:
    """What `encode_table` and `save` say of the tokenizer, in the metadata of a schema."""
    text = shard.metadata.get(FACTS_KEY.encode())
    if text is None:
        return {}
    try:
        found = json.loads(text)
        said = {name: found[name] for name in ("pad_id", "vocab_size")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise shard.error(f"its metadata `{FACTS_KEY}` is damaged") from error
    pad_id, vocab_size = said["pad_id"], said["vocab_size"]
    is_size = vocab_size is None or (type(vocab_size) is int and 0 <= vocab_size <= 2**31)
    if type(pad_id) is not int or not 0 <= pad_id < 2**31 or not is_size:
        raise shard.error(f"its metadata `{FACTS_KEY}` is damaged")
    return said


def _check_extra(shards: Sequence[Shard]) -> None:
    """That every shard has the extra columns of the first."""
    for shard in shards[1:]:
        if set(shard.extra) != set(shards[0].extra):
            raise shard.error(
                f"expected the extra columns {sorted(shards[0].extra)} as in {shards[0].path}, "
                f"found {sorted(shard.extra)}"
            )


def _convert(
    folder: Folder, shards: Sequence[Shard], alike: Mapping[str, Any], notes: tuple[str, ...]
) -> None:
    spooled = folder.temporary()
    extra = shards[0].extra if shards else ()
    try:
        with ExitStack() as stack:
            spool = Spool(spooled, extra, stack)
            reports: list[Report | None] = []
            for shard in shards:
                first = spool.n
                for batch, at in _batches(shard):
                    spool.append(_raw(shard, batch, at, extra, spool.n, alike["vocab_size"]), ())
                reports.append(_report(shard, spool.n - first))
            lost = sorted({name for shard in shards for name in shard.lost})
            if lost:
                notes += (f"columns that pairs have no place for were left: {some(lost)}",)
            known = [report for report in reports if report is not None]
            report = spool.report()
            if len(known) == len(reports):
                # Every shard says what became of the rows that it was made of.
                report = replace(Report.merged(known), notes=report.notes)
            report = replace(report, notes=(*report.notes, *notes))
            write(folder, spool.columns(), report=report, **alike)
    finally:
        shutil.rmtree(spooled, ignore_errors=True)


def _report(shard: Shard, n: int) -> Report | None:
    """What `encode_table` said of the rows of a shard, if it is of all of its ``n`` pairs: tables
    that an engine joined have that of their first part.
    """
    try:
        report = Report.from_dict(json.loads(shard.metadata[REPORT_KEY]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return report if report.kept == n else None


def _batches(shard: Shard) -> Iterator[tuple[Any, int]]:
    """Record batches, and the row of the shard that each begins with."""
    first = 0
    with closing(record_batches(shard.path, shard.kind, shard.names)) as batches:
        while True:
            with pyarrow_errors(shard.path):
                batch = next(batches, None)
            if batch is None:
                return
            if batch.num_rows:
                yield batch, first
                first += batch.num_rows


def _raw(
    shard: Shard,
    batch: Any,
    first: int,
    extra: Sequence[str],
    before: int,
    vocab_size: int | None,
) -> dict[str, Any]:
    """A record batch in the form in which an encoder gives its pairs."""
    n = batch.num_rows
    ids = {name: _ids(shard, batch, name, first, vocab_size) for name in IDS}
    weights = None
    if not set(WEIGHTS).isdisjoint(shard.names):
        sides = zip(WEIGHTS, IDS[1:], strict=True)
        weights = [_weights(shard, batch, name, side, ids[side], first) for name, side in sides]
    ref_logps, with_ref = _reference(shard, batch, first)
    nothing: dict[str, Any] = {"first": {}, "dropped": {}, "warned": {}, "layouts": {}}
    return {
        **nothing,
        "bytes": 0,
        "unread": (),
        "read": n,
        "kept": n,
        "rows": np.arange(before, before + n),
        "with_ref": with_ref,
        "ref_logps": ref_logps,
        "weights": weights,
        **{
            name.removesuffix("_ids"): (ragged.values, ragged.offsets)
            for name, ragged in ids.items()
        },
        "columns": [_extra(shard, batch, name, first) for name in extra],
    }


def _place(shard: Shard, name: str, row: int, what: str) -> DataError:
    return DataError(
        f"{shard.path}, row {row + 1}, `{name}`: {what}",
        path=shard.path,
        line=row + 1,
        field=name,
        reason="bad_ids" if name in IDS else "wrong_type",
    )


def _lists(shard: Shard, batch: Any, name: str, first: int, is_item: Any) -> tuple[Any, Any]:
    """The values of a column of lists as an Arrow array, and their offsets."""
    from pyarrow import compute, types

    array = batch.column(name)
    kind = array.type
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_list or not (is_item(kind.value_type) or types.is_null(kind.value_type)):
        raise _place(shard, name, first, f"expected lists of numbers, found {kind}")
    if array.null_count:
        row = first + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise _place(shard, name, row, "expected a list, found null")
    offsets = np.zeros(batch.num_rows + 1, np.int64)
    np.cumsum(compute.list_value_length(array).to_numpy(zero_copy_only=False), out=offsets[1:])
    values = array.flatten()
    if values.null_count:
        at = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        row = first + int(np.searchsorted(offsets, at, "right")) - 1
        raise _place(shard, name, row, "expected numbers, found null")
    return values, offsets


def _ids(shard: Shard, batch: Any, name: str, first: int, vocab_size: int | None) -> Ragged:
    from pyarrow import types

    found, offsets = _lists(shard, batch, name, first, types.is_integer)
    values = found.to_numpy(zero_copy_only=False)
    most = 2**31 if vocab_size is None else vocab_size
    wrong = (values < 0) | (values >= most) if len(values) else np.zeros(0, bool)
    if wrong.any():
        at = int(np.argmax(wrong))
        row = first + int(np.searchsorted(offsets, at, "right")) - 1
        raise _place(shard, name, row, f"expected token ids in 0..{most}, found {values[at]}")
    return Ragged(np.ascontiguousarray(values, np.int32), offsets)


def _weights(
    shard: Shard, batch: Any, name: str, side: str, ids: Ragged, first: int
) -> NDArray[np.float32]:
    from pyarrow import types

    if name not in shard.names:
        return np.ones(len(ids.values), np.float32)
    found, offsets = _lists(shard, batch, name, first, types.is_floating)
    if not np.array_equal(offsets, ids.offsets):
        row = first + int(np.argmax(np.diff(offsets) != ids.lengths))
        raise _place(shard, name, row, f"expected a weight for each of `{side}`")
    values = found.to_numpy(zero_copy_only=False).astype(np.float32)
    if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        row = first + int(np.searchsorted(offsets, at, "right")) - 1
        raise _place(shard, name, row, f"expected finite weights, found {values[at]}")
    return values


def _reference(shard: Shard, batch: Any, first: int) -> tuple[NDArray[np.float64], int]:
    """(2 n,) log-probs, chosen then rejected, and how many pairs have them."""
    n = batch.num_rows
    columns = np.full((n, 2), np.nan)
    if not set(REFERENCE) <= set(shard.names):
        return columns.reshape(-1), 0
    known = np.ones(n, bool)
    for i, name in enumerate(REFERENCE):
        array = batch.column(name)
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        with pyarrow_errors(shard.path):
            values = array.cast("float64").to_numpy(zero_copy_only=False)
        bad = valid & ~np.isfinite(values)
        if bad.any():
            row = int(np.argmax(bad))
            raise _place(
                shard, name, first + row, f"expected finite log-probs, found {values[row]}"
            )
        columns[:, i] = values
        known &= valid
    return columns.reshape(-1), int(known.sum())


def _is_plain(kind: Any) -> bool:
    """Whether a column of an Arrow type is of numbers, booleans or strings."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_string)
    return any(is_kind(kind) for is_kind in (*plain, types.is_large_string))


def _extra(shard: Shard, batch: Any, name: str, first: int) -> Any:
    from pyarrow import types

    array = batch.column(name)
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.null_count:
        row = first + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise _place(shard, name, row, "expected a value, found null")
    if types.is_string(array.type) or types.is_large_string(array.type):
        return array.to_pylist()
    with pyarrow_errors(shard.path):
        if types.is_integer(array.type):
            array = array.cast("int64")
        return array.to_numpy(zero_copy_only=False)
