"""Shards: Parquet files of keys and log-probs, each named by the digest of its bytes.

A row is a sequence: ``key`` (16 bytes, two uint64, little-endian) and ``logp`` (float64, a sum over
its tokens), in rising order of keys; and, where they were put, ``token_logps``, a list of float32
with a number for each token of the completion. Other columns may stand beside them. The schema's
metadata says of which reference the log-probs are, so that a shard needs no manifest to be trusted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpo_ext.errors import DataError
from dpo_ext.extras import arrow, need
from dpo_ext.pairs import Ragged
from dpo_ext.reflogps.keys import Keys
from dpo_ext.store.folder import Digest, Kind, Sink, damaged, open_inside

Found = TypeVar("Found")
VERSION = 1
KIND = Kind("a store of reference log-probs", ".parquet")
ROWS = 1 << 20
"""Of one shard, at most."""
TOKENS = 1 << 26
"""Of one shard that has log-probs of tokens, about."""
TOKEN_LOGPS = "token_logps"
MAX_BYTES = 1 << 30
"""Of a file that is read at all."""
ROW_BYTES = 24
"""Of key and value."""


class Shard(NamedTuple):
    """What one holds."""

    keys: Keys
    logps: NDArray[np.float64]
    reference: str
    """Digest of the fingerprint of the reference."""
    size: int
    """Bytes of the file."""
    has_tokens: bool
    """Whether the log-probs of the tokens stand beside."""


def parts(rows: int, token_logps: Ragged | None) -> Iterator[slice]:
    """Rows that fit into one shard."""
    start = 0
    while start < rows:
        stop = min(rows, start + ROWS)
        if token_logps is not None:
            offsets = token_logps.offsets
            last = int(np.searchsorted(offsets, offsets[start] + TOKENS, side="right")) - 1
            stop = max(start + 1, min(stop, last))
        yield slice(start, stop)
        start = stop


def writer(
    keys: Keys, logps: NDArray[np.float64], token_logps: Ragged | None, reference: str
) -> Callable[[Sink], Any]:
    """Writes rows, two numbers a key, to a sink."""
    pa = arrow("a store of reference log-probs")
    pq = need("pyarrow.parquet", "a store of reference log-probs")
    halves = keys.reshape(-1, 2)
    # The table of keys is filled from start to end by rising keys, several times as fast.
    order = np.argsort(halves[:, 0])
    halves = np.ascontiguousarray(halves[order], "<u8")
    columns = {
        "key": pa.Array.from_buffers(pa.binary(16), len(order), [None, pa.py_buffer(halves)]),
        "logp": pa.array(logps[order]),
    }
    if token_logps is not None:
        lists = token_logps.select(order)
        offsets = pa.array(lists.offsets.astype(np.int32))
        columns[TOKEN_LOGPS] = pa.ListArray.from_arrays(offsets, pa.array(lists.values))
    table = pa.table(columns).replace_schema_metadata(
        {"dpo_ext": json.dumps({"version": VERSION, "reference": reference})}
    )
    return lambda sink: pq.write_table(
        table,
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


def read(folder: Path, name: str) -> Shard:
    """A shard without the log-probs of its tokens, checked by its name.

    Raises:
        FileNotFoundError: it is not there.
        DataError: its bytes are not those that its name was made of, or it is of another version.
    """
    return _read(folder, name, _sums)


def read_tokens(folder: Path, name: str) -> tuple[Keys, Ragged]:
    """The keys of a shard, and the log-probs of the tokens of each; raises as :func:`read`."""
    return _read(folder, name, _tokens)


def _read(folder: Path, name: str, parse: Callable[[Any, int], Found]) -> Found:
    fd = open_inside(folder, name)
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > MAX_BYTES:
            raise damaged(folder / name, f"expected at most {MAX_BYTES} bytes, found {size}")
        data = file.read()
    digest = Digest()
    digest.update(memoryview(data))
    if f"{digest.hexdigest()[:32]}{KIND.suffix}" != name:
        raise damaged(folder / name, "the shard is damaged: its digest is not its name")
    pa = arrow("a store of reference log-probs")
    pq = need("pyarrow.parquet", "a store of reference log-probs")
    try:
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        return parse(parquet, len(data))
    except (KeyError, TypeError, ValueError, OSError, ArithmeticError) as error:
        if isinstance(error, DataError):
            raise
        said = str(error).partition("\n")[0]
        raise damaged(folder / name, f"expected a shard of version {VERSION}: {said}") from error


def _sums(file: Any, size: int) -> Shard:
    facts = json.loads((file.schema_arrow.metadata or {})[b"dpo_ext"])
    if facts["version"] != VERSION:
        raise ValueError(f"found version {str(facts['version'])[:20]}")
    table = file.read(["key", "logp"], use_threads=False)
    keys, logp = _keys(table), _whole(table["logp"])
    if str(logp.type) != "double" or logp.null_count:
        raise ValueError("expected log-probs of float64")
    values = logp.to_numpy()
    if not np.isfinite(values).all():
        raise ValueError("expected finite log-probs")
    has_tokens = TOKEN_LOGPS in file.schema_arrow.names
    return Shard(keys, values, str(facts["reference"]), size, has_tokens)


def _tokens(file: Any, size: int) -> tuple[Keys, Ragged]:
    table = file.read(["key", TOKEN_LOGPS], use_threads=False)
    lists = _whole(table[TOKEN_LOGPS])
    is_right = getattr(lists.type, "value_type", None) == "float" and not lists.null_count
    if not is_right or lists.values.null_count:
        raise ValueError("expected lists of float32")
    found = lists.values.to_numpy()
    if not np.isfinite(found).all():
        raise ValueError("expected finite log-probs of tokens")
    return _keys(table), Ragged(found, lists.offsets.to_numpy().astype(np.int64))


def _keys(table: Any) -> Keys:
    key = _whole(table["key"])
    if str(key.type) != "fixed_size_binary[16]" or key.null_count:
        raise ValueError("expected keys of 16 bytes")
    _, buffer = key.buffers()
    keys = np.frombuffer(buffer, "<u8", 2 * len(key), 16 * key.offset)
    return keys.astype(np.uint64, copy=False)


def _whole(column: Any) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
