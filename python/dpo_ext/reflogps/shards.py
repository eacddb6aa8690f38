"""Shards: Parquet files of keys and log-probs, each named by the digest of its bytes.

A row is a sequence: ``key`` (16 bytes, two uint64, little-endian) and ``logp`` (float64, a sum over
its tokens), in rising order of keys. Other columns may stand beside them. The schema's metadata
says of which reference the log-probs are, so that a shard needs no manifest to be trusted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo_ext.errors import DataError
from dpo_ext.extras import arrow, need
from dpo_ext.reflogps.keys import Keys
from dpo_ext.store.folder import Digest, Kind, Sink, damaged, open_inside

VERSION = 1
KIND = Kind("a store of reference log-probs", ".parquet")
ROWS = 1 << 20
"""Of one shard, at most."""
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


def writer(keys: Keys, logps: NDArray[np.float64], reference: str) -> Callable[[Sink], Any]:
    """Writes rows, two numbers a key, to a sink."""
    pa = arrow("a store of reference log-probs")
    pq = need("pyarrow.parquet", "a store of reference log-probs")
    halves = keys.reshape(-1, 2)
    # The table of keys is filled from start to end by rising keys, several times as fast.
    order = np.argsort(halves[:, 0])
    halves = np.ascontiguousarray(halves[order], "<u8")
    table = pa.table(
        [
            pa.Array.from_buffers(pa.binary(16), len(order), [None, pa.py_buffer(halves)]),
            pa.array(logps[order]),
        ],
        names=["key", "logp"],
    ).replace_schema_metadata({"dpo_ext": json.dumps({"version": VERSION, "reference": reference})})
    return lambda sink: pq.write_table(
        table,
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


def read(folder: Path, name: str) -> Shard:
    """A shard, whole, checked by its name.

    Raises:
        FileNotFoundError: it is not there.
        DataError: its bytes are not those that its name was made of, or it is of another version.
    """
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
    try:
        return _parsed(data)
    except (KeyError, TypeError, ValueError, OSError, ArithmeticError) as error:
        if isinstance(error, DataError):
            raise
        said = str(error).partition("\n")[0]
        raise damaged(folder / name, f"expected a shard of version {VERSION}: {said}") from error


def _parsed(data: bytes) -> Shard:
    pa = arrow("a store of reference log-probs")
    pq = need("pyarrow.parquet", "a store of reference log-probs")
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    facts = json.loads((file.schema_arrow.metadata or {})[b"dpo_ext"])
    if facts["version"] != VERSION:
        raise ValueError(f"found version {str(facts['version'])[:20]}")
    table = file.read(["key", "logp"], use_threads=False)
    key, logp = (_whole(table[name]) for name in ("key", "logp"))
    if key.type != pa.binary(16) or logp.type != pa.float64() or key.null_count or logp.null_count:
        raise ValueError("expected keys of 16 bytes and float64")
    _, buffer = key.buffers()
    keys = np.frombuffer(buffer, "<u8", 2 * len(key), 16 * key.offset)
    values = logp.to_numpy()
    if not np.isfinite(values).all():
        raise ValueError("expected finite log-probs")
    return Shard(keys.astype(np.uint64, copy=False), values, str(facts["reference"]), len(data))


def _whole(column: Any) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
