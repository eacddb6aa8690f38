"""Paths, globs, folders and kinds of files, and tables, fed to Rust."""

from __future__ import annotations

import glob
import json
import os
import re
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpo_ext import _core
from dpo_ext.data import delimited, tables
from dpo_ext.errors import DataError, LimitExceeded
from dpo_ext.extras import arrow
from dpo_ext.store.folder import MANIFEST, PAIRS

if TYPE_CHECKING:
    from dpo_ext.data.options import Limits, Paths, Settings

Kind = Literal["lines", "csv", "parquet", "arrow", "saved"]

# Rows of one Parquet batch; its buffers are read in pieces of so many bytes.
PARQUET_ROWS = 1024
READ_BYTES = 1 << 20
EXPANSION_GRACE_BYTES = 64 << 20


# What a folder is read for: a file has one of these names, one kind a folder.
SUFFIXES: dict[str, Kind] = {
    **{
        f"{name}{packed}": "lines"
        for name in (".jsonl", ".ndjson")
        for packed in ("", ".gz", ".zst")
    },
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
# Parts of file names by which `datasets` tells the splits of a folder apart.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True)
class Sources:
    """Files to read, in order, and what should be known of how they were found."""

    files: list[str]
    notes: tuple[str, ...] = ()


def opened_up(paths: Paths) -> list[str]:
    """The files of :func:`sources`."""
    return sources(paths).files


def sources(paths: Paths) -> Sources:
    """Globs and folders opened up and sorted; no file twice.

    Raises:
        FileNotFoundError: there is no such file, or none that matches.
        DataError: a file comes twice, or a folder is not one data set.
    """
    if isinstance(paths, str | PathLike):
        paths = [paths]
    files: list[str] = []
    notes: list[str] = []
    for path in paths:
        name = fspath(path)
        found = [name]
        if any(c in name for c in "*?[") and not Path(name).exists():
            # pathlib's own glob matches hidden files.
            found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207
            if not found:
                raise FileNotFoundError(2, "no file matches", name)
        for file in found:
            if Path(file).is_dir() and not _saved(file):
                inside, others = _data_files(file)
                files.extend(inside)
                if others:
                    notes.append(f"{file}: not read are {some(others)}")
            else:
                files.append(file)
    if not files:
        raise ValueError("`paths` must name at least one file")
    seen: dict[tuple[int, int], str] = {}
    for name in files:
        status = Path(name).stat()
        key = (status.st_dev, status.st_ino)
        if key in seen:
            raise DataError(f"{name}: the same file as {seen[key]}", path=name, reason="bad_input")
        seen[key] = name
    return Sources(files, tuple(notes))


def _data_files(folder: str) -> tuple[list[str], list[str]]:
    """The data files of a folder, and what else is in it but for hidden things; both sorted."""

    def bad(message: str) -> DataError:
        return DataError(f"{folder}: {message}", path=folder, reason="bad_input")

    names = sorted(path.name for path in Path(folder).iterdir())
    if MANIFEST in names and any(map(PAIRS.is_data, names)):
        raise bad("it is a saved data set, already encoded\nhint: PairDataset.load maps it")
    # Spark and pyarrow hide `_SUCCESS` and `_metadata` the same way.
    names = [name for name in names if not name.startswith((".", "_"))]
    ends = {name: _suffix(name) for name in names if not (Path(folder) / name).is_dir()}
    data = {name: end for name, end in ends.items() if end is not None}
    others = [name for name in names if name not in data]
    if not data:
        found = f", found {some(others)}" if others else ", and it is empty"
        endings = [Path(name).suffix for name in others if Path(name).suffix]
        pattern = f"*{endings[0]}" if endings else "*.json"
        raise bad(
            f"expected files that end in {', '.join(SUFFIXES)}{found}\n"
            f"hint: files of other names, or in folders of it, are named by a glob, such as "
            f"'{Path(folder) / pattern}'"
        )
    if len({SUFFIXES[end] for end in data.values()}) > 1:
        kinds = sorted(set(data.values()))
        raise bad(
            f"expected files of one kind, found {' and '.join(kinds)}\n"
            f"hint: name those of one kind by a glob, such as '{Path(folder) / f'*{kinds[-1]}'}'"
        )
    splits = set(filter(None, map(_split, data)))
    if len(splits) > 1:
        raise bad(
            f"expected one split, found files of {' and '.join(sorted(splits))}\n"
            f"hint: name the files of one by a glob, such as '{Path(folder) / 'train*'}'"
        )
    return [fspath(Path(folder) / name) for name in data], others


def _suffix(name: str) -> str | None:
    return next((end for end in SUFFIXES if name.lower().endswith(end)), None)


def _split(name: str) -> str | None:
    """The first split that a file's name speaks of."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def some(names: Sequence[str], most: int = 3) -> str:
    """Some of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def kind_of(path: str, names: Sequence[str], limits: Limits) -> Kind:
    """What a path holds, by its first bytes, and by its name where they say nothing.

    Args:
        names: the fields that rows are asked for, by which a table of text is known.

    Raises:
        DataError: it holds no rows.
    """
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        return "saved" if _saved(path) else "lines"
    if not stat.S_ISREG(mode):
        return "lines"  # Rust refuses it, without opening it
    with Path(path).open("rb") as file:
        head = file.read(6)
    if head[:4] == b"PAR1":
        return "parquet"
    if head == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return "arrow"
    named = SUFFIXES.get(Path(path).suffix.lower(), "lines")
    if head[:1] in (b"{", b"[") and named == "lines":
        return "lines"
    text = _core.FileText(path, limits).head()  # raises for a page, an archive, a pointer
    if named != "lines":
        return named  # damaged, as pyarrow will say
    return "lines" if delimited.header(text, path, names) is None else "csv"


def _saved(path: str) -> bool:
    """Whether a folder is what `save_to_disk` of `datasets` writes."""
    if (Path(path) / "dataset_dict.json").is_file():
        raise DataError(
            f"{path}: expected one data set, found a folder of several\n"
            "hint: name the folder of a split",
            path=path,
            reason="bad_input",
        )
    return (Path(path) / "state.json").is_file()


def by_kind(
    files: Sequence[str], names: Sequence[str], limits: Limits
) -> Iterator[tuple[Kind, list[str]]]:
    """Files in their order, those of one kind that follow each other together."""
    for kind, group in groupby(files, partial(kind_of, names=names, limits=limits)):
        yield kind, list(group)


def feed_files(encoder: _core.PairEncoder, files: Sequence[str], settings: Settings) -> None:
    """Encodes files of any kinds, in order."""
    for kind, group in by_kind(files, encoder.names, settings.limits):
        if kind == "lines":
            encoder.add_files(group)
            continue
        for path in group:
            for part in saved_files(path) if kind == "saved" else [path]:
                for _ in feed_arrow_file(encoder, part, kind, settings):
                    pass


def feed_table(encoder: _core.PairEncoder, source: Any, limits: Limits) -> None:
    """Encodes a table, a stream or a data set."""
    names = encoder.names
    others: list[str] = []
    batches = tables.record_batches(source, names, others)
    first = 0
    while (batch := _next(batches, None)) is not None:
        first, _ = _feed_batch(encoder, batch, None, first, 0, limits, others)


def _next(batches: Iterator[Any], path: str | None) -> Any:
    with tables.pyarrow_errors(path):
        return next(batches, None)


def _feed_batch(
    encoder: _core.PairEncoder,
    batch: Any,
    path: str | None,
    first: int,
    done: int,
    limits: Limits,
    others: list[str],
) -> tuple[int, int]:
    """Encodes a record batch: the number of rows up to its end, and the bytes that were decoded."""
    names, bytes_decoded = encoder.names, 0
    with tables.pyarrow_errors(path):
        parts = list(tables.slices(batch))
    for part in parts:
        with tables.pyarrow_errors(path):
            described, buffers, size = tables.tree_of(part, names, limits.max_depth, path)
        bytes_decoded += size
        encoder.add_columns(part.num_rows, described, buffers, path, first, 0, others)
        first += part.num_rows
    if done:
        encoder.add_columns(0, [None] * len(names), [], path, first, done, [])
    return first, bytes_decoded


def feed_arrow_file(
    encoder: _core.PairEncoder, path: str, kind: Kind, settings: Settings
) -> Iterator[None]:
    """Encodes a file that pyarrow reads, with a stop behind each record batch."""
    before = Path(path).stat()
    limits = settings.limits
    first, done, unpacked = 0, 0, 0
    others: list[str] = []
    with closing(_read(path, kind, encoder.names, settings, others)) as batches:
        while (found := _next(batches, path)) is not None:
            batch, share = found
            unpacked += batch.nbytes
            _check_expansion(path, unpacked, before.st_size, limits)
            step = max(0, int(share * before.st_size) - done)
            first, bytes_decoded = _feed_batch(encoder, batch, path, first, step, limits, others)
            unpacked += bytes_decoded
            _check_expansion(path, unpacked, before.st_size, limits)
            done += step
            yield
    after = Path(path).stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(
            f"{path}: the file changed while it was read", path=path, reason="bad_input"
        )
    missing: list[tuple[Any, ...] | None] = [None] * len(encoder.names)
    encoder.add_columns(0, missing, [], path, first, before.st_size - done, [])


def schema_of(path: str, kind: Kind) -> Any:
    """The schema of a Parquet or Arrow file."""
    pa = arrow("reading shards")
    import pyarrow.parquet as pq

    with pa.OSFile(path) as file:
        if kind == "parquet":
            return pq.read_schema(file)
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file).schema


def record_batches(path: str, kind: Kind, names: Sequence[str]) -> Generator[Any, None, None]:
    """The record batches of a Parquet or Arrow file, with these columns."""
    with closing((_parquet if kind == "parquet" else _ipc)(path, names, [])) as batches:
        for batch, _ in batches:
            yield batch


def _check_expansion(path: str, unpacked: int, packed: int, limits: Limits) -> None:
    most = limits.max_unpacked_bytes
    found = None
    if most is not None and unpacked > most:
        found = ("max_unpacked_bytes", f"the columns have more than {most} bytes")
    elif unpacked > EXPANSION_GRACE_BYTES and unpacked // max(1, packed) >= limits.max_expansion:
        text = f"the columns have more than {limits.max_expansion} times the bytes of the file"
        found = ("max_expansion", text)
    if found is not None:
        raise LimitExceeded(
            f"{path}, `{found[0]}`: {found[1]}", path=path, field=found[0], reason="limit"
        )


def _read(
    path: str, kind: Kind, names: Sequence[str], settings: Settings, others: list[str]
) -> Generator[tuple[Any, float], None, None]:
    """The record batches of a file, and which share of it is read with each; the names of further
    columns of text come to ``others``.
    """
    if kind == "csv":
        return delimited.batches(path, names, settings.columns, settings.limits, others)
    read = _parquet if kind == "parquet" else _ipc
    return read(path, names, others)


def _parquet(
    path: str, names: Sequence[str], others: list[str]
) -> Generator[tuple[Any, float], None, None]:
    """The record batches of a Parquet file, and which share of its rows is read with each."""
    pa = arrow("reading Parquet")
    import pyarrow.parquet as pq

    # User input is never mapped: a file that shrinks would kill the process.
    with pa.OSFile(path) as file:
        parquet = pq.ParquetFile(
            file, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True
        )
        known = parquet.schema_arrow.names
        others.extend(tables.text_columns(parquet.schema_arrow, names))
        # Without a column there is nothing that could contradict the number of rows.
        wanted = [name for name in known if name in names] or known[:1]
        total, read = parquet.metadata.num_rows, 0
        for group in range(parquet.metadata.num_row_groups):
            expected = parquet.metadata.row_group(group).num_rows
            for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=[group], columns=wanted):
                read, expected = read + batch.num_rows, expected - batch.num_rows
                yield batch, min(1.0, read / max(1, total))
            if expected:
                raise ValueError(f"row group {group} does not have the rows that it claims")
        if read != total:
            raise ValueError(f"the file claims {total} rows and has {read}")


def _ipc(
    path: str, names: Sequence[str], others: list[str]
) -> Generator[tuple[Any, float], None, None]:
    """The record batches of an Arrow file or stream, and which share of it is read with each."""
    pa = arrow("reading Arrow files")
    size = max(1, Path(path).stat().st_size)
    with pa.OSFile(path) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        kept = [i for i, name in enumerate(reader.schema.names) if name in names]
        others.extend(tables.text_columns(reader.schema, names))
        if is_file:
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i).select(kept), (i + 1) / reader.num_record_batches
            return
        for batch in reader:
            yield batch.select(kept), min(1.0, file.tell() / size)
        if file.read(1):
            raise ValueError("expected the end of the file behind the stream, found other bytes")


def saved_files(folder: str) -> list[str]:
    """The Arrow files of a folder of `save_to_disk`, which must lie in it."""
    path = Path(folder) / "state.json"

    def bad(message: str) -> DataError:
        return DataError(f"{path}: {message}", path=fspath(path), reason="bad_input")

    try:
        entries = json.loads(path.read_bytes())["_data_files"]
        names = [entry["filename"] for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise bad("expected a list `_data_files` of objects with a `filename`") from error
    for name in names:
        if not isinstance(name, str) or not name.endswith(".arrow"):
            raise bad("expected names that end in .arrow in `_data_files`")
        if name != os.path.basename(name) or "\0" in name or (path.parent / name).is_symlink():  # noqa: PTH119
            raise bad(f"expected names inside the folder, found {ascii(name)[:80]}")
    if len(set(names)) < len(names):
        raise bad("expected every file once")
    return [fspath(path.parent / name) for name in names]
