"""Saved data sets: one Arrow IPC file and a manifest, written as a whole, mapped when loaded.

The file holds one uncompressed record batch with TRL's column names ``prompt_ids``, ``chosen_ids``,
``rejected_ids`` (list<int32>; large_list once a column has 2^31 ids), and where they are known
``ref_chosen_logps`` and ``ref_rejected_logps`` (double), ``row`` (int64, if rows were dropped),
``chosen_weights`` and ``rejected_weights`` (list<float>, if some are not 1) and the extra columns;
of single completions ``prompt_ids``, ``completion_ids``, ``label`` (bool), and where they are known
``ref_logps``, ``ref_kl_logps`` (double) and ``kl_completion`` (int64).
``pyarrow.ipc.open_file`` and ``datasets.load_dataset("arrow", data_files=...)`` read it. The
manifest says where each column's buffers lie, so that loading needs NumPy alone.

n is the number of examples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from dpo_ext import _core
from dpo_ext.extras import arrow
from dpo_ext.pairs import Examples
from dpo_ext.report import Report
from dpo_ext.store.columns import Columns, record_batch
from dpo_ext.store.folder import Folder, writing
from dpo_ext.store.manifest import FACTS_KEY, FORMAT, VERSION, current_file, sealed


def write(
    folder: Folder,
    columns: Columns,
    *,
    report: Report,
    made: Mapping[str, Any] | None = None,
    contents: str | None = None,
    **alike: Any,
) -> None:
    """Replaces what the folder holds.

    Args:
        contents: `Examples.contents`, where it is known.
        alike: what is one for all examples, as the kind of the columns has it in ``ALIKE``.
        made: says how, for the cache.
    """
    pa = arrow("saving a data set")
    facts = {"version": VERSION, **{name: alike.pop(name) for name in columns.kind.ALIKE}}
    if alike:
        raise TypeError(f"{columns.kind.KIND} have no {', '.join(alike)}")
    batch = record_batch(pa, columns, {FACTS_KEY: json.dumps(facts)})
    options = pa.ipc.IpcWriteOptions(compression=None, allow_64bit=True)

    def fill(sink: Any) -> None:
        with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)

    name, size, digest = folder.put(fill, columns.release)
    manifest = {
        "format": FORMAT,
        "kind": columns.kind.KIND,
        **facts,
        "package": _core.__version__,
        "file": {"name": name, "bytes": size, "sha256_4mib": digest},
        "n": columns.n,
        "contents": columns.contents() if contents is None else contents,
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


def save(examples: Examples, folder: str | PathLike[str]) -> None:
    """Saves a data set; see `PairDataset.save`."""
    columns = Columns.of(examples)
    with writing(Path(folder)) as opened:
        opened.sweep(current_file(opened.path))
        write(
            opened,
            columns,
            report=examples.report,
            contents=examples.contents,
            **{name: getattr(examples, name) for name in examples.ALIKE},
        )
