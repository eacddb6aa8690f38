"""The arrays of a batch, filled by Rust into memory that the caller gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ext import _core
from dpo_ext.errors import DataError, LimitExceeded
from dpo_ext.layout import BLOCK
from dpo_ext.layout.batch import BLOCKS, LAYOUTS, TABLE, Batch
from dpo_ext.pairs import IGNORE_INDEX, Ragged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dpo_ext.layout.batch import Layout
    from dpo_ext.pairs import Pairs

    # Gives a flat array of so many places of a dtype; what is in it does not matter.
    Take = Callable[[int, Any], NDArray[Any]]


def shared_lengths(pairs: Pairs) -> NDArray[np.int64]:
    """(n,) int64: slots of each pair in a shared row."""
    return pairs.by_lengths(shared_slots)


def shared_slots(
    prompt: NDArray[np.int64], chosen: NDArray[np.int64], rejected: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(n,) int64: P + C + R - 1 of so many tokens.

    Without a prompt nothing is shared, and each side goes without its last token.
    """
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
    with np.errstate(over="ignore"):
        ref_logps[:] = pairs.ref_logps[index]
    if not np.isfinite(ref_logps).all():
        worst = int(index[np.argmin(np.isfinite(ref_logps).all(axis=1))])
        raise DataError(
            f"pair {worst}: expected reference log-probs that float32 holds, found "
            f"{pairs.ref_logps[worst].tolist()}",
            field="ref_logps",
        )
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


SIDES = ("chosen", "rejected")


def token_places(
    seq_offsets: NDArray[Any], index: NDArray[np.int64], offsets: Iterable[NDArray[np.int64]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Where the tokens of a table stand in lists with a number for each token of a completion.

    Of a sequence of n tokens in the table these are the last n numbers of its list. (A first token
    without a prompt is in no table.)

    Args:
        seq_offsets: (2N + 1,), of the table.
        index: (N,) the pairs of the batch.
        offsets: of the lists of all pairs, of the chosen and of the rejected completions.

    Returns:
        For either side (m,) places in the table, and (m,) those in the values of the lists.
    """
    lengths = np.diff(seq_offsets).astype(np.int64)
    for first, borders in enumerate(offsets):
        n = lengths[first::2]
        before = np.cumsum(n) - n
        step = np.arange(int(n.sum())) - np.repeat(before, n)
        place = np.repeat(seq_offsets[first:-1:2].astype(np.int64), n) + step
        yield place, np.repeat(borders[index + 1] - n, n) + step


def weigh(batch: Batch, weights: Mapping[str, Ragged], take: Take) -> Batch:
    """The batch with the weight of each of its tokens, in the order of its table; one of weight 0
    has the target of a token that is not scored, so that no length counts it.

    Same as, for each pair of the batch and ``"chosen"``, then ``"rejected"``: the last n weights of
    that completion, n being its tokens in the table.
    """
    out = take(len(batch.targets), np.float32)
    offsets = [weights[name].offsets for name in SIDES]
    for name, (place, source) in zip(
        SIDES, token_places(batch.seq_offsets, batch.pair_index, offsets), strict=True
    ):
        out[place] = weights[name].values[source]
    vars(batch)["weights"] = out
    batch.targets[out == 0] = IGNORE_INDEX
    return batch


def factors(pairs: Pairs, token_weights: Any) -> Mapping[str, Ragged] | None:
    """What each token of both completions weighs: by the data set, and by ``token_weights``.

    Raises:
        TypeError, DataError: as :func:`weight_lists`; a product is not finite.
    """
    given = None if token_weights is None else weight_lists(token_weights, pairs)
    own = dict(zip(("chosen", "rejected"), pairs.weights.values(), strict=False))
    if not own or given is None:
        return own or given
    out = {}
    for name, lists in own.items():
        with np.errstate(over="ignore"):
            values = lists.values * given[name].values
        if not np.isfinite(values).all():
            raise DataError(
                f"`token_weights[{name!r}]`: expected finite products with the weights of the data "
                "set, found one that is not",
                field="token_weights",
            )
        out[name] = Ragged(values, lists.offsets)
    return out


LEFT = "\nhint: pairs.NAME_ids[{i}] are the tokens that are left after truncation"


def weight_lists(weights: Any, pairs: Pairs) -> Mapping[str, Ragged]:
    """``{"chosen": ..., "rejected": ...}`` as float32 lists, one number a token of each completion.

    Raises:
        TypeError: no mapping, or a list holds something else than numbers and booleans.
        DataError: another name, another number of pairs or of tokens, or a weight that is not
            finite; names the pair.
    """
    sides = {"chosen": pairs.chosen_ids, "rejected": pairs.rejected_ids}
    if not isinstance(weights, Mapping):
        raise TypeError(
            f'`token_weights` must be {{"chosen": lists, "rejected": lists}}, found '
            f"{type(weights).__name__}"
        )
    if set(weights) != set(sides):
        raise DataError(
            f"`token_weights` must have `chosen` and `rejected`, found {sorted(map(str, weights))}",
            field="token_weights",
        )
    return {
        name: weights_of(f"token_weights[{name!r}]", weights[name], ids, LEFT.replace("NAME", name))
        for name, ids in sides.items()
    }


def weights_of(field: str, lists: Any, ids: Ragged, hint: str = "") -> Ragged:
    """Weights as float32 lists, one number an id.

    Raises:
        TypeError, DataError: as :func:`weight_lists`; ``field`` says of what, and ``hint`` more
            where their number is wrong.
    """
    if len(lists) != len(ids):
        raise DataError(
            f"`{field}` must have {len(ids)} lists, one a pair, found {len(lists)}", field=field
        )
    offsets = np.ascontiguousarray(ids.offsets, np.int64)
    values = np.empty(int(offsets[-1] - offsets[0]), np.float32)
    offsets = offsets - offsets[0]
    for i, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        one = np.asarray(lists[i])
        if one.ndim != 1 or (one.size and one.dtype.kind not in "fiub"):
            raise TypeError(f"pair {i}, `{field}`: expected a list of numbers, found {lists[i]!r}")
        if len(one) != stop - start:
            raise DataError(
                f"pair {i}, `{field}`: expected {stop - start} weights, one a token of its "
                f"completion, found {len(one)}{hint.format(i=i)}",
                field=field,
            )
        values[start:stop] = one
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        k = int(wrong[0])
        i = int(np.searchsorted(offsets, k, side="right")) - 1
        raise DataError(
            f"pair {i}, `{field}`: expected finite weights, found {values[k]} at token "
            f"{k - int(offsets[i])}",
            field=field,
        )
    return Ragged(values, offsets)


def _check_slots(slots: int, field: str) -> None:
    """Before anything is allocated."""
    if slots >= 2**31:
        raise LimitExceeded("a batch has more than 2^31 - 1 slots", field=field, reason="limit")
