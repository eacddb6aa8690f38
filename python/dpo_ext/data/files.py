"""Where rows come from: files of every kind and tables, fed to Rust; and the progress of it."""

from __future__ import annotations

import glob
import json
import os
import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpo_ext import _core
from dpo_ext.data import tables as columns
from dpo_ext.errors import DataError, LimitExceeded

if TYPE_CHECKING:
    from dpo_ext.data.options import Limits, Paths, Progress, Settings
    from dpo_ext.data.tokenizer import Tokenizer

Kind = Literal["lines", "parquet", "arrow", "saved"]

# Rows of one Parquet batch; its buffers are read in pieces of so many bytes.
PARQUET_ROWS = 1024
READ_BYTES = 1 << 20
EXPANSION_GRACE_BYTES = 64 << 20


def opened_up(paths: Paths) -> list[str]:
    """Globs opened up and sorted; no file twice."""
    if isinstance(paths, str | PathLike):
        paths = [paths]
    files: list[str] = []
    for path in paths:
        name = fspath(path)
        if any(c in name for c in "*?[") and not Path(name).exists():
            # pathlib's own glob matches hidden files.
            found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207
            if not found:
                raise FileNotFoundError(2, "no file matches", name)
            files.extend(found)
        else:
            files.append(name)
    if not files:
        raise ValueError("`paths` must name at least one file")
    seen: dict[tuple[int, int], str] = {}
    for name in files:
        status = Path(name).stat()
        key = (status.st_dev, status.st_ino)
        if key in seen:
            raise DataError(f"{name}: the same file as {seen[key]}", path=name, reason="bad_input")
        seen[key] = name
    return files


def kind_of(path: str) -> Kind:
    """What a path holds, by its first bytes, and by its name where they say nothing."""
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        return "saved" if _saved(path) else "lines"
    if not stat.S_ISREG(mode):
        return "lines"  # Rust refuses it, without opening it
    with Path(path).open("rb") as file:
        head = file.read(6)
    suffix = Path(path).suffix.lower()
    if head[:4] == b"PAR1" or suffix == ".parquet":
        return "parquet"
    if head == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff" or suffix in (".arrow", ".feather"):
        return "arrow"
    return "lines"


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


def feed_files(encoder: _core.PairEncoder, files: Sequence[str], limits: Limits) -> None:
    """Encodes files of any kinds, in order."""
    for kind, group in groupby(files, kind_of):
        if kind == "lines":
            encoder.add_files(list(group))
            continue
        for path in group:
            for part in _saved_files(path) if kind == "saved" else [path]:
                for _ in _feed_arrow_file(encoder, part, kind, limits):
                    pass


def parts(
    files: Sequence[str],
    tokenizer: Tokenizer,
    options: Settings,
    callback: Callable[[int, int], Any] | None,
    pairs: int,
) -> Iterator[dict[str, Any]]:
    """What `feed_files` would encode at once, in parts of at least ``pairs``."""
    read = done = 0

    def shifted(raw: dict[str, Any]) -> dict[str, Any]:
        nonlocal read
        raw["rows"] += read
        read += raw["read"]
        return raw

    def told(progress: int, rows: int) -> Any:
        return callback(before[0] + progress, before[1] + rows) if callback else None

    for kind, group in groupby(files, kind_of):
        names = list(group)
        before = (done, read)
        done += sum(map(size_of, names))
        if kind == "lines":
            lines = _core.FileEncoder(names, tokenizer._core, options)
            start = read
            while (raw := lines.next(pairs, callback and told)) is not None:
                raw["rows"] += start
                read += raw["read"]
                yield raw
            continue
        encoder = _core.PairEncoder(tokenizer._core, options, callback and told)
        for path in names:
            for part in _saved_files(path) if kind == "saved" else [path]:
                for _ in _feed_arrow_file(encoder, part, kind, options.limits):
                    if encoder.kept >= pairs:
                        yield shifted(encoder.finish())
        yield shifted(encoder.finish())


def feed_table(encoder: _core.PairEncoder, source: Any, limits: Limits) -> None:
    """Encodes a table, a stream or a data set."""
    names = encoder.names
    batches = columns.record_batches(source, names)
    first = 0
    while (batch := _next(batches, None)) is not None:
        first, _ = _feed_batch(encoder, batch, None, first, 0, limits)


def _next(batches: Iterator[Any], path: str | None) -> Any:
    with columns.typed_errors(path):
        return next(batches, None)


def _feed_batch(
    encoder: _core.PairEncoder, batch: Any, path: str | None, first: int, done: int, limits: Limits
) -> tuple[int, int]:
    """Encodes a record batch: the number of rows up to its end, and the bytes that were decoded."""
    names, bytes_decoded = encoder.names, 0
    with columns.typed_errors(path):
        parts = list(columns.slices(batch))
    for part in parts:
        with columns.typed_errors(path):
            described, buffers, size = columns.describe(part, names, limits.max_depth, path)
        bytes_decoded += size
        encoder.add_columns(part.num_rows, described, buffers, path, first, 0)
        first += part.num_rows
    if done:
        encoder.add_columns(0, [None] * len(names), [], path, first, done)
    return first, bytes_decoded


def _feed_arrow_file(
    encoder: _core.PairEncoder, path: str, kind: Kind, limits: Limits
) -> Iterator[None]:
    """Encodes a file, with a stop behind each record batch."""
    before = Path(path).stat()
    read = _parquet if kind == "parquet" else _ipc
    first, done, unpacked = 0, 0, 0
    with closing(read(path, encoder.names)) as batches:
        while (found := _next(batches, path)) is not None:
            batch, share = found
            unpacked += batch.nbytes
            _check_expansion(path, unpacked, before.st_size, limits)
            step = max(0, int(share * before.st_size) - done)
            first, bytes_decoded = _feed_batch(encoder, batch, path, first, step, limits)
            unpacked += bytes_decoded
            _check_expansion(path, unpacked, before.st_size, limits)
            done += step
            yield
    after = Path(path).stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(
            f"{path}: the file changed while it was read", path=path, reason="bad_input"
        )
    encoder.add_columns(0, [None] * len(encoder.names), [], path, first, before.st_size - done)


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


def _parquet(path: str, names: Sequence[str]) -> Generator[tuple[Any, float], None, None]:
    """The record batches of a Parquet file, and which share of its rows is read with each."""
    pa = columns.arrow("reading Parquet")
    import pyarrow.parquet as pq

    # User input is never mapped: a file that shrinks would kill the process.
    with pa.OSFile(path) as file:
        parquet = pq.ParquetFile(
            file, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True
        )
        known = parquet.schema_arrow.names
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


def _ipc(path: str, names: Sequence[str]) -> Generator[tuple[Any, float], None, None]:
    """The record batches of an Arrow file or stream, and which share of it is read with each."""
    pa = columns.arrow("reading Arrow files")
    size = max(1, Path(path).stat().st_size)
    with pa.OSFile(path) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        kept = [i for i, name in enumerate(reader.schema.names) if name in names]
        if is_file:
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i).select(kept), (i + 1) / reader.num_record_batches
            return
        for batch in reader:
            yield batch.select(kept), min(1.0, file.tell() / size)
        if file.read(1):
            raise ValueError("expected the end of the file behind the stream, found other bytes")


def _saved_files(folder: str) -> list[str]:
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


def size_of(path: str) -> int:
    """Bytes of a file, or of the files in a folder."""
    found = Path(path)
    if found.is_dir():
        return sum(part.stat().st_size for part in found.glob("*.arrow"))
    return found.stat().st_size


def is_shown(variables: Any = os.environ) -> bool:
    """Whether this process shows progress: of several ranks the first one does."""
    return str(variables.get("RANK", variables.get("LOCAL_RANK", "0"))) == "0"


class Bar:
    """What Rust calls with (bytes, rows) done so far: nothing, the caller's function, or a bar."""

    def __init__(self, progress: Progress, files: Sequence[str]) -> None:
        self._progress, self._files = progress, files
        self._bar: Any = None

    def __enter__(self) -> Callable[[int, int], Any] | None:
        if callable(self._progress):
            return self._progress
        if not self._progress or not is_shown():
            return None
        import rich.progress as rich

        total = sum(map(size_of, self._files)) or None
        parts = (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.TextColumn("{task.fields[rows]:,} rows"),
        )
        bar = rich.Progress(*parts, rich.TimeElapsedColumn())
        bar.disable = not bar.console.is_terminal
        task = bar.add_task("encoding pairs", total=total, rows=0)
        self._bar = bar
        bar.start()
        return lambda done, rows: bar.update(task, completed=done, rows=rows)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
