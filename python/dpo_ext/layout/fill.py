"""The arrays of a batch, filled by Rust into memory that the caller gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ext import _core
from dpo_ext.errors import LimitExceeded
from dpo_ext.layout import BLOCK
from dpo_ext.layout.batch import BLOCKS, LAYOUTS, TABLE, Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dpo_ext.layout.batch import Layout
    from dpo_ext.pairs import Pairs

    # Gives a flat array of so many places of a dtype; what is in it does not matter.
    Take = Callable[[int, Any], NDArray[Any]]


def shared_lengths(pairs: Pairs) -> NDArray[np.int64]:
    """(n,) int64: slots of each pair in a shared row, P + C + R - 1.

    Without a prompt nothing is shared, and each side goes without its last token.
    """
    prompt, chosen, rejected = (
        ids.lengths for ids in (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)
    )
    alone = (chosen - 1).clip(0) + (rejected - 1).clip(0)
    return np.where(prompt > 0, prompt - 1 + chosen + rejected, alone)


def _lists(pairs: Pairs) -> dict[str, Any]:
    columns = {
        "prompt": pairs.prompt_ids,
        "chosen": pairs.chosen_ids,
        "rejected": pairs.rejected_ids,
    }
    return {name: (ids.values, ids.offsets) for name, ids in columns.items()}


def _of_pairs(pairs: Pairs, index: NDArray[np.int64], take: Take) -> dict[str, Any]:
    """What a batch of the pairs ``index`` holds in every layout."""
    own = take(len(index), np.int64)
    own[:] = index
    # Strings are lists; numbers are few, and copied.
    columns = {
        name: values[index].tolist() if values.dtype == object else values[index]
        for name, values in pairs.columns.items()
    }
    if pairs.ref_logps is None:
        return {"pair_index": own, "ref_logps": None, "columns": columns}
    ref_logps = take(2 * len(index), np.float32).reshape(-1, 2)
    ref_logps[:] = pairs.ref_logps[index]
    return {"pair_index": own, "ref_logps": ref_logps, "columns": columns}


def _table(scored: int, n: int, take: Take) -> dict[str, Any]:
    sizes = ((scored, np.int64), (scored, np.int32), (2 * n + 1, np.int32))
    return {name: take(*size) for name, size in zip(TABLE, sizes, strict=True)}


def _rows(layout: Layout, slots: int, take: Take) -> dict[str, Any]:
    return {name: take(slots, dtype) for name, dtype in LAYOUTS[layout].rows.items()}


def padded(pairs: Pairs, index: NDArray[np.int64], multiple: int, take: Take = np.empty) -> Batch:
    """The pairs ``index``, one row a side."""
    lists, n = _lists(pairs), len(index)
    longest, scored, _ = _core.batch_sizes(**lists, index=index)
    width = -(-longest // multiple) * multiple
    rows = _rows("padded", 2 * n * width, take)
    table = _table(scored, n, take)
    _core.pad_into(**lists, index=index, pad_id=pairs.pad_id, **rows, **table)
    fields = _of_pairs(pairs, index, take)
    shaped = {name: array.reshape(2 * n, width) for name, array in rows.items()}
    return Batch.filled("padded", **shaped, **table, **fields)


def packed(
    pairs: Pairs,
    index: NDArray[np.int64],
    bounds: NDArray[np.int64],
    width: int,
    take: Take = np.empty,
) -> Batch:
    """The pairs ``index`` in rows of ``width`` slots; row r begins at pair ``bounds[r]``."""
    lists, n, height = _lists(pairs), len(index), len(bounds) - 1
    _, scored, _ = _core.batch_sizes(**lists, index=index)
    _check_slots(height * width, "cu_seq_lens_q")
    rows = _rows("packed", height * width, take)
    ends = take(2 * n + height + 1, np.int32)
    table = _table(scored, n, take)
    segments, longest = _core.pack_into(
        **lists, index=index, bounds=bounds, pad_id=pairs.pad_id, **rows, cu_seq_lens=ends, **table
    )
    ends = ends[: segments + 1]
    return Batch.filled(
        "packed",
        **{name: array.reshape(height, width) for name, array in rows.items()},
        **table,
        **_of_pairs(pairs, index, take),
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=longest,
        max_length_k=longest,
    )


def shared(
    pairs: Pairs,
    index: NDArray[np.int64],
    bounds: NDArray[np.int64],
    width: int,
    take: Take = np.empty,
) -> Batch:
    """The pairs ``index``, prompts once, in rows of ``width`` slots as for :func:`packed`."""
    lists, n, height = _lists(pairs), len(index), len(bounds) - 1
    _, scored, prefixes = _core.batch_sizes(**lists, index=index)
    slots = height * width
    _check_slots(slots + prefixes, "cu_seq_lens_k")
    rows = _rows("shared", slots, take)
    ends = [take(2 * n + height + 1, np.int32) for _ in range(2)]
    kv_rows = take(slots + prefixes, np.int64)
    table = _table(scored, n, take)
    segments, keys, longest_q, longest_k = _core.share_into(
        **lists,
        index=index,
        bounds=bounds,
        pad_id=pairs.pad_id,
        **rows,
        cu_seq_lens_q=ends[0],
        cu_seq_lens_k=ends[1],
        kv_rows=kv_rows,
        **table,
    )
    side = -(-width // BLOCK)
    shapes: dict[str, Any] = {
        name: (height, 1, side) if "num" in name else (height, 1, side, side) for name in BLOCKS
    }
    blocks: dict[str, Any] = {
        name: take(int(np.prod(shape)), np.int32) for name, shape in shapes.items()
    }
    _core.blocks_into(rows["doc"], rows["seg"], width, **blocks)
    return Batch.filled(
        "shared",
        **{name: array.reshape(height, width) for name, array in rows.items()},
        **table,
        **_of_pairs(pairs, index, take),
        cu_seq_lens_q=ends[0][: segments + 1],
        cu_seq_lens_k=ends[1][: segments + 1],
        max_length_q=longest_q,
        max_length_k=longest_k,
        kv_rows=kv_rows[:keys],
        **{name: blocks[name].reshape(shape) for name, shape in shapes.items()},
    )


SLOTS: Mapping[Layout, Callable[[Pairs], NDArray[np.int64]]] = {
    "padded": lambda pairs: pairs.tokens,
    "packed": lambda pairs: pairs.tokens,
    "shared": shared_lengths,
}
"""(n,) int64: slots of each pair, without padding."""

FILL: Mapping[Layout, Callable[..., Batch]] = {"packed": packed, "shared": shared}
"""Of the layouts with bins."""


def _check_slots(slots: int, field: str) -> None:
    """Before anything is allocated."""
    if slots >= 2**31:
        raise LimitExceeded("a batch has more than 2^31 - 1 slots", field=field, reason="limit")
