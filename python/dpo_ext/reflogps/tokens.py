"""Log-probs of single tokens: a list for each sequence, a number for each token of its completion.

N is the number of pairs, S = 2N that of their sequences, chosen then rejected of each pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_ext.errors import RefLogpsError, TensorError, describe
from dpo_ext.pairs import Ragged
from dpo_ext.reflogps.keys import SIDES, PairKeys


def by_sequence(token_logps: Any, keys: PairKeys, logps: NDArray[np.float64]) -> Ragged:
    """Log-probs of tokens as they are stored: S lists of float32.

    Args:
        token_logps: ``{"chosen": N lists, "rejected": N lists}``, of the pairs of ``keys``.
        logps: (S,) of the sequences, which they are compared with.

    Raises:
        TensorError: another shape or kind, names the pair.
        RefLogpsError: a number is not finite, or those of a sequence have another sum.
    """
    if not isinstance(token_logps, Mapping) or set(token_logps) != set(SIDES):
        is_mapping = isinstance(token_logps, Mapping)
        found = sorted(map(str, token_logps)) if is_mapping else describe(token_logps)
        raise TensorError(
            f'`token_logps` must be {{"chosen": lists, "rejected": lists}}, found {found}'
        )
    n = len(keys)
    whole = Ragged.joined([_of_side(token_logps[side], keys, i) for i, side in enumerate(SIDES)])
    kept = whole.select(np.arange(2 * n).reshape(2, n).T.reshape(-1))
    wrong = np.flatnonzero(~np.isfinite(kept.values))
    if len(wrong):
        sequence, token = _place(kept, int(wrong[0]))
        raise RefLogpsError(
            f"{keys.name(sequence)}, token {token}: expected a finite log-prob that float32 holds, "
            f"found {kept.values[wrong[0]]}; {len(wrong)} of {len(kept.values)} are none\n"
            "hint: look at the reference's logits"
        )
    sums = keys.sums(kept)
    apart = keys.apart(np.arange(2 * n), sums, logps)
    if apart.any():
        i = int(apart.argmax())
        raise RefLogpsError(
            f"{keys.name(i)}: the log-probs of its tokens, times their weights, have the sum "
            f"{sums[i]}, expected the log-prob of the sequence, {logps[i]}; "
            f"{int(apart.sum())} of {2 * n} differ\n"
            "hint: a list has one number for each token of its completion, 0 where none is scored"
        )
    return kept


def by_side(lists: Ragged) -> dict[str, Ragged]:
    """S lists as they are given and got: N of either side."""
    return {side: lists.select(np.arange(first, len(lists), 2)) for first, side in enumerate(SIDES)}


def gathered(
    parts: Iterable[tuple[NDArray[np.int64], NDArray[np.int64], Ragged]], lengths: NDArray[np.int64]
) -> tuple[Ragged, NDArray[np.bool_]]:
    """Lists of ``lengths`` out of parts, and which of them were there.

    Args:
        parts: rows of the result, the lists that belong there, and these among all of a part.
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values, is_there = np.zeros(int(offsets[-1]), np.float32), np.zeros(len(lengths), bool)
    for rows, which, lists in parts:
        fits = lists.lengths[which] == lengths[rows]
        rows, some = rows[fits], lists.select(which[fits])
        step = np.repeat(offsets[rows] - some.offsets[:-1], some.lengths)
        values[step + np.arange(len(step))] = some.values
        is_there[rows] = True
    return Ragged(values, offsets), is_there


def _of_side(given: Any, keys: PairKeys, first: int) -> Ragged:
    """N lists of float32, of the right lengths."""
    n, expected = len(keys), keys.tokens[first::2]
    field = f"token_logps[{SIDES[first]!r}]"
    if not isinstance(given, Ragged):
        given = _ragged(given, field, keys)
    values, offsets = np.asarray(given.values), np.asarray(given.offsets, np.int64)
    if values.dtype.kind not in "iuf":
        raise TensorError(f"`{field}` must hold numbers, found {describe(values)}")
    if len(given) != n:
        raise TensorError(f"`{field}` must have {n} lists, one a pair, found {len(given)}")
    other = np.flatnonzero(np.diff(offsets) != expected)
    if len(other):
        i = int(other[0])
        raise TensorError(
            f"pair {keys.index[i]}, `{field}`: expected {expected[i]} numbers, one a token of its "
            f"completion, found {offsets[i + 1] - offsets[i]}"
        )
    with np.errstate(over="ignore"):  # infinite, which is refused
        own = values[offsets[0] : offsets[-1]].astype(np.float32)
    return Ragged(own, offsets - offsets[0])


def _ragged(lists: Any, field: str, keys: PairKeys) -> Ragged:
    try:
        arrays = [np.asarray(one) for one in lists]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TensorError(
            f"`{field}` must be lists of numbers, found {describe(lists)}: {error}"
        ) from error
    for i, one in enumerate(arrays):
        if one.ndim != 1 or (one.size and one.dtype.kind not in "iuf"):
            pair = keys.index[i] if i < len(keys) else i
            raise TensorError(
                f"pair {pair}, `{field}`: expected a list of numbers, found {describe(one)}"
            )
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(one) for one in arrays], out=offsets[1:])
    return Ragged(np.concatenate([np.empty(0), *arrays]), offsets)


def _place(lists: Ragged, i: int) -> tuple[int, int]:
    """The list that value ``i`` stands in, and where in it."""
    one = int(np.searchsorted(lists.offsets, i, side="right")) - 1
    return one, i - int(lists.offsets[one])
