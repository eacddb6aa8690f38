"""TRL's batch of preference pairs, and with it the table of what is scored. N pairs, T columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dpo_ext.errors import DataError
from dpo_ext.layout.batch import Layout
from dpo_ext.layout.fill import shared, shared_lengths, weigh
from dpo_ext.layout.table import ScoreTable
from dpo_ext.pairs import REFERENCE, WEIGHTS, Pairs, Ragged
from dpo_ext.report import Report

# Stock TRL hands every key it does not know to a model that ignores what it does not know, so that
# a table under a name of ours would vanish without a word. This keyword stock TRL passes itself: a
# batch of ours that reaches one of its methods is a `TypeError` there.
TABLE_KEY = "fused_lm_head"
SERVED: tuple[Layout, ...] = ("padded", "packed", "shared")
NUM_TOKENS = "num_tokens"
# The `Batch` of shared rows, of which each model makes the mask that its attention reads.
SHARED_ROWS = "shared_rows"


@dataclasses.dataclass
class PairCollator:
    """Rows of token ids to one padded batch: TRL's `DataCollatorForPreference`, tensor for tensor.

    Same as, in plain Python::

        rows = [p + c for p, c, r in pairs] + [p + r for p, c, r in pairs]  # chosen rows first
        mask = [[0] * len(p) + [1] * len(c) for p, c, r in pairs] + [... the same with r]
        cut = slice(max_length) if truncation_mode == "keep_start" else slice(-max_length, None)
        input_ids = right_pad([row[cut] for row in rows], pad_token_id)
        completion_mask = right_pad([row[cut] for row in mask], 0)          # not shifted

    TRL 1.16, ``trl/trainer/dpo_trainer.py``. A batch of two pairs, all of it:

    >>> rows = [
    ...     {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    ...     {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
    ... ]
    >>> batch = PairCollator(pad_token_id=0, score_table=True)(rows)
    >>> batch["input_ids"]
    tensor([[ 1,  2,  3,  4,  5],
            [ 7,  8,  9,  0,  0],
            [ 1,  2,  3,  6,  0],
            [ 7,  8, 10, 11,  0]])
    >>> batch["attention_mask"]
    tensor([[1, 1, 1, 1, 1],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 1, 1, 0]])
    >>> batch["completion_mask"]
    tensor([[0, 0, 0, 1, 1],
            [0, 0, 1, 0, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 1, 1, 0]])
    >>> batch["fused_lm_head"]
    ScoreTable(n_groups=2, group_size=2, n_tokens=6, device=cpu)
      sequence 0 (group 0): row 2 -> 4, row 3 -> 5
      sequence 1 (group 0): row 12 -> 6
      sequence 2 (group 1): row 6 -> 9
      sequence 3 (group 1): row 16 -> 10, row 17 -> 11

    With ``layout="packed"`` the sides of the same pairs are segments of one row, without padding:
    chosen 0, rejected 0, chosen 1, ... A model tells them apart by their positions, and only
    without a mask and without a cache.

    >>> batch = PairCollator(pad_token_id=0, score_table=True, layout="packed")(rows)
    >>> batch["input_ids"]
    tensor([[ 1,  2,  3,  4,  5,  1,  2,  3,  6,  7,  8,  9,  7,  8, 10, 11]])
    >>> batch["position_ids"]
    tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]])
    >>> batch["cu_seq_lens_q"], batch["max_length_q"]
    (tensor([ 0,  5,  9, 12, 16], dtype=torch.int32), 5)
    >>> batch["completion_lengths"]
    tensor([[2, 1],
            [1, 2]])

    With ``layout="shared"`` a prompt comes once, and both sides behind it, as `Batch` shows. The
    batch itself is under ``"shared_rows"``, for the mask: `DPOTrainer` asks it for the model's.

    >>> batch = PairCollator(pad_token_id=0, score_table=True, layout="shared")(rows)
    >>> batch["input_ids"]
    tensor([[ 1,  2,  3,  4,  3,  7,  8,  8, 10]])
    >>> batch["position_ids"]
    tensor([[0, 1, 2, 3, 2, 0, 1, 1, 2]])

    Rows may weigh the tokens of their completions, in ``chosen_weights`` and ``rejected_weights``:
    the table has the weights, and a token of weight 0 is neither in it nor in ``completion_mask``.

    Args:
        pad_token_id: written where a row has ended.
        max_length: ids that each side of a pair keeps; None keeps all.
        truncation_mode: ``"keep_start"`` or ``"keep_end"``, of each side by itself, as in TRL:
            ``"keep_end"`` can leave the sides of a pair different prompts.
        pad_to_multiple_of: T is rounded up to it.
        score_table: whether the batch also holds the `ScoreTable` of its completion tokens, under
            ``"fused_lm_head"``. It is for `DPOTrainer` alone: stock TRL passes a keyword of that
            name, so there such a batch is a `TypeError`, and never a table that nobody reads.
        layout: ``"padded"``; or ``"packed"`` or ``"shared"``, which need ``score_table=True``.
            Shared rows have one prompt a pair, so that they cannot keep each side's end.

    Returns:
        From a call with N rows: ``input_ids, attention_mask, completion_mask`` (2N, T) int64, and
        ``ref_chosen_logps, ref_rejected_logps`` (N,) float32 where the rows have them. Packed:
        ``input_ids, position_ids`` (1, T) int64, ``cu_seq_lens_q, cu_seq_lens_k`` int32 (2N + 1,)
        or one more for a tail of padding, ``max_length_q, max_length_k`` int, and
        ``num_tokens`` int, the tokens without the tail, and ``completion_lengths`` (N, 2) int64,
        the completion tokens whether scored or not. Shared: ``input_ids, position_ids`` (1, T)
        int64, ``shared_rows``, ``num_tokens`` and ``completion_lengths`` of both sides with their
        prompts, as if packed.

    Raises:
        DataError: a row lacks a column, or one that the first row has.
        ValueError: an argument has a value that TRL does not take.

    Where TRL differs: its ids become float32 when the very first row is empty, and its reference
    values int64 when they are whole numbers. Here ids are int64 and reference values float32.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    score_table: bool = False
    layout: str = "padded"

    def __post_init__(self) -> None:
        if self.layout not in SERVED:
            raise ValueError(f"`layout` must be one of {SERVED}, found {self.layout!r}")
        if self.layout != "padded" and not self.score_table:
            raise ValueError(
                f'`layout="{self.layout}"` needs `score_table=True`: it has no completion mask'
            )
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                "`truncation_mode` must be 'keep_start' or 'keep_end', "
                f"found {self.truncation_mode!r}"
            )
        if self.layout == "shared" and self.max_length and self.truncation_mode == "keep_end":
            raise ValueError('`layout="shared"` needs one prompt a pair, which `keep_end` cuts')
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1 or None, found {value}")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self.layout == "shared":
            return self._with_reference(self._share(rows), rows)
        prompts = _ids(rows, "prompt_ids") * 2
        sides = _ids(rows, "chosen_ids") + _ids(rows, "rejected_ids")
        ids = [np.concatenate(parts) for parts in zip(prompts, sides, strict=True)]
        starts = [len(prompt) for prompt in prompts]
        weights = _weights(rows, sides)
        if weights is not None:  # beside the ids, whatever is cut
            weights = [
                np.concatenate([np.ones(start, np.float32), own])
                for start, own in zip(starts, weights, strict=True)
            ]
        if self.max_length is not None:
            over = [max(0, len(row) - self.max_length) for row in ids]
            if self.truncation_mode == "keep_start":
                cuts = [slice(self.max_length)] * len(ids)
            else:
                cuts = [slice(n, None) for n in over]
                starts = [max(0, start - n) for start, n in zip(starts, over, strict=True)]
            ids = [row[cut] for row, cut in zip(ids, cuts, strict=True)]
            if weights is not None:
                weights = [own[cut] for own, cut in zip(weights, cuts, strict=True)]
        fill = self._pack if self.layout == "packed" else self._pad
        batch = fill(ids, starts, weights)
        return self._with_reference(batch, rows)

    def _with_reference(
        self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        for name in REFERENCE:
            if name in rows[0]:
                batch[name] = torch.tensor(_values(rows, name), dtype=torch.float32)
        return batch

    def _pad(
        self, ids: list[np.ndarray], starts: list[int], weights: list[np.ndarray] | None
    ) -> dict[str, Any]:
        """Sequences ``ids``, chosen ones first, whose completions begin at ``starts``."""
        multiple = self.pad_to_multiple_of or 1
        T = -(-max(map(len, ids), default=0) // multiple) * multiple
        input_ids = np.full((len(ids), T), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        completion_mask = np.zeros_like(input_ids)
        for index, (row, start) in enumerate(zip(ids, starts, strict=True)):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
            completion_mask[index, start : len(row)] = 1
        factors = None
        if weights is not None:
            factors = np.zeros(input_ids.shape, np.float32)
            for index, own in enumerate(weights):
                factors[index, : len(own)] = own
            completion_mask[factors == 0] = 0
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "completion_mask": torch.from_numpy(completion_mask),
        }
        if self.score_table:
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            given = None if factors is None else torch.from_numpy(factors)
            batch[TABLE_KEY] = ScoreTable.from_labels(labels, weights=given).compact()
        return batch

    def _pack(
        self, ids: list[np.ndarray], starts: list[int], weights: list[np.ndarray] | None
    ) -> dict[str, Any]:
        """The same sequences as segments of one row, pair by pair."""
        interleaved = np.arange(len(ids)).reshape(2, -1).T.reshape(-1)
        ids, starts = [ids[k] for k in interleaved], [starts[k] for k in interleaved]
        every = [np.ones(len(row)) for row in ids]
        factors = every if weights is None else [weights[k] for k in interleaved]
        lengths = [len(row) for row in ids]
        used, multiple = sum(lengths), self.pad_to_multiple_of or 1
        tail = -used % multiple
        segments = [n for n in (*lengths, tail) if n]
        input_ids = np.concatenate([*ids, np.full(tail, self.pad_token_id)]).astype(np.int64)
        position_ids = np.concatenate([np.arange(n) for n in segments] or [np.arange(0)])
        offsets = torch.from_numpy(np.cumsum([0, *segments], dtype=np.int32))

        begins = np.cumsum([0, *lengths])
        # Row t - 1 of a sequence predicts its token t; nothing predicts the first.
        firsts = [min(max(start, 1), n) for start, n in zip(starts, lengths, strict=True)]
        scored = [
            begin + first + np.flatnonzero(own[first:])
            for begin, first, own in zip(begins, firsts, factors, strict=False)
        ]
        places = np.concatenate(scored).astype(np.int64)
        table = ScoreTable(
            logit_rows=places - 1,
            targets=input_ids[places].astype(np.int32),
            seq_offsets=np.cumsum([0, *map(len, scored)], dtype=np.int32),
            weights=None if weights is None else np.concatenate(factors)[places],
            shape=(1, len(input_ids)),
        )
        completion = [
            np.count_nonzero(own[start:]) for start, own in zip(starts, factors, strict=True)
        ]
        longest = max(segments, default=0)
        return {
            "input_ids": torch.from_numpy(input_ids)[None],
            "position_ids": torch.from_numpy(position_ids.astype(np.int64))[None],
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": longest,
            "max_length_k": longest,
            NUM_TOKENS: used,
            "completion_lengths": torch.tensor(completion).reshape(-1, 2),
            TABLE_KEY: table,
        }

    def _share(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Each prompt once, with both of its sides behind it."""
        limit = self.max_length
        prompts = [ids[:limit] for ids in _ids(rows, "prompt_ids")]
        room = [None if limit is None else limit - len(ids) for ids in prompts]
        chosen, rejected = (
            [ids[:n] for ids, n in zip(_ids(rows, name), room, strict=True)]
            for name in ("chosen_ids", "rejected_ids")
        )
        lists = [Ragged.from_lists(ids) for ids in (prompts, chosen, rejected)]
        pairs = Pairs(
            *lists, report=Report(len(rows), len(rows)), pad_id=self.pad_token_id, vocab_size=None
        )
        used, multiple = int(shared_lengths(pairs).sum()), self.pad_to_multiple_of or 1
        width = -(-used // multiple) * multiple
        batch = shared(pairs, np.arange(len(rows)), np.array([0, len(rows)]), width)
        sides = [pairs.chosen_ids.lengths, pairs.rejected_ids.lengths]
        tokens = 2 * int(pairs.prompt_ids.lengths.sum()) + int(np.sum(sides))
        weights = _weights(rows, _ids(rows, "chosen_ids") + _ids(rows, "rejected_ids"))
        if weights is not None:
            kept = [own[:n] for own, n in zip(weights, room * 2, strict=True)]
            halves = kept[: len(rows)], kept[len(rows) :]
            sides = [np.array([np.count_nonzero(own) for own in half]) for half in halves]
            factors = {
                name: Ragged(np.concatenate(half), ids.offsets)
                for name, half, ids in zip(("chosen", "rejected"), halves, lists[1:], strict=True)
            }
            batch = weigh(batch, factors, np.empty)
        batch = batch.to()
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            SHARED_ROWS: batch,
            NUM_TOKENS: tokens,
            "completion_lengths": torch.from_numpy(np.stack(sides).T.copy()),
            TABLE_KEY: batch.table if weights is None else batch.table.compact(),
        }


def _ids(rows: Sequence[Mapping[str, Any]], name: str) -> list[np.ndarray]:
    return [np.asarray(value, dtype=np.int64) for value in _values(rows, name)]


def _weights(
    rows: Sequence[Mapping[str, Any]], sides: Sequence[np.ndarray]
) -> list[np.ndarray] | None:
    """A factor of each token of the ``sides``, chosen ones first, or None where each is 1."""
    if not any(name in rows[0] for name in WEIGHTS):
        return None
    lists = [w for name in WEIGHTS for w in _values(rows, name)]
    found = [np.asarray(own, dtype=np.float32) for own in lists]
    for index, (own, ids) in enumerate(zip(found, sides, strict=True)):
        if own.shape != ids.shape:
            side, row = divmod(index, len(rows))
            raise DataError(
                f"row {row + 1}, `{WEIGHTS[side]}`: expected {len(ids)} weights, one a token of "
                f"its completion, found {own.size}",
                line=row + 1,
                field=WEIGHTS[side],
                reason="bad_weights",
            )
    return found


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    for index, row in enumerate(rows):
        if name not in row:
            raise DataError(
                f"row {index + 1}, `{name}`: expected in every row of a batch, found none",
                line=index + 1,
                field=name,
                reason="missing_field",
            )
    return [row[name] for row in rows]
