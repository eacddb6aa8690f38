"""`Batch`: the arrays that a model and the log-prob head see; and what each layout has.

Shapes: N pairs, S = 2N sequences, T tokens of the longest row, M scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from dpo_ext.extras import need
from dpo_ext.layout.epoch import EPOCH_SET, of_name

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from dpo_ext.layout.segments import Segments
    from dpo_ext.layout.table import ScoreTable


Layout = Literal["padded", "packed", "shared"]

TABLE = ("logit_rows", "targets", "seq_offsets")
BLOCKS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


@dataclass(frozen=True)
class LayoutFields:
    """What a layout has.

    Attributes:
        rows: arrays of a place for each slot, (R, T), and their dtypes.
        model_inputs: fields that a Hugging Face model is called with.
        bins: whether a row holds several sequences, so that pairs can be packed into bins.
        masked: whether the model needs a mask of its own, which no field holds.
    """

    rows: Mapping[str, Any]
    model_inputs: tuple[str, ...]
    bins: bool = True
    masked: bool = False


LAYOUTS: Mapping[Layout, LayoutFields] = {
    "padded": LayoutFields(
        rows=dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), np.int64),
        model_inputs=("input_ids", "attention_mask"),
        bins=False,
    ),
    "packed": LayoutFields(
        rows=dict.fromkeys(("input_ids", "position_ids"), np.int64),
        model_inputs=(
            "input_ids",
            "position_ids",
            "cu_seq_lens_q",
            "cu_seq_lens_k",
            "max_length_q",
            "max_length_k",
        ),
    ),
    "shared": LayoutFields(
        rows={
            "input_ids": np.int64,
            "position_ids": np.int64,
            "doc": np.int32,
            "seg": np.int32,
        },
        model_inputs=("input_ids", "position_ids"),
        masked=True,
    ),
}


@dataclass(frozen=True, eq=False)
class Batch:
    """N pairs, ready for a model.

    ``layout="padded"`` is TRL's collator, tensor for tensor. The pairs ([1, 2], [3, 4], [5]) and
    ([6], [7], [8, 9]) of (prompt, chosen, rejected), padded with 0::

        input_ids            completion_mask      attention_mask
        [[1, 2, 3, 4],       [[0, 0, 1, 1],       [[1, 1, 1, 1],     chosen
         [6, 7, 0, 0],        [0, 1, 0, 0],        [1, 1, 0, 0],     chosen
         [1, 2, 5, 0],        [0, 0, 1, 0],        [1, 1, 1, 0],     rejected
         [6, 8, 9, 0]]        [0, 1, 1, 0]]        [1, 1, 1, 0]]     rejected

        logit_rows   [1, 2, 9, 4, 12, 13]   row r * T + t of the flattened logits
        targets      [3, 4, 5, 7, 8, 9]     the token at t + 1, which that row predicts
        seq_offsets  [0, 2, 3, 4, 6]        chosen 0, rejected 0, chosen 1, rejected 1

    A sequence whose prompt has no token cannot score its first token.

    ``layout="packed"`` puts whole pairs into rows, prompt + chosen and prompt + rejected as
    segments of their own. The same pairs in one row of 14 slots::

        input_ids     [[1, 2, 3, 4, 1, 2, 5, 6, 7, 6, 8, 9, 0, 0]]
        position_ids  [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1]]    the tail is a segment too
        cu_seq_lens_q, cu_seq_lens_k  [0, 4, 7, 9, 12, 14]            max_length_q, max_length_k  4
        logit_rows    [1, 2, 5, 7, 9, 10]    targets  [3, 4, 5, 7, 8, 9]    seq_offsets as above

    A packed batch has no attention mask: a Hugging Face model finds the segments by its positions,
    and only without a mask and without a cache.

    ``layout="shared"`` feeds each prompt once, without its last token, then both completions, each
    behind the prompt's last token and without its own last one: P + C + R - 1 slots, and every row
    behind the prefix predicts exactly one target. The same pairs in one row of 8 slots::

        input_ids     [[1, 2, 3, 2, 6, 6, 8, 0]]
        position_ids  [[0, 1, 2, 1, 0, 0, 1, 0]]    both completions go on from the prompt
        doc           [[0, 0, 0, 0, 1, 1, 1, -1]]   the pair in the batch, -1 in the tail
        seg           [[0, 1, 1, 2, 1, 2, 2, 0]]    0 prefix or tail, 1 chosen, 2 rejected
        logit_rows    [1, 2, 3, 4, 5, 6]    targets  [3, 4, 5, 7, 8, 9]    seq_offsets as above
        kv_rows         [0, 1, 2, 0, 3, 4, 5, 6, 7]
        cu_seq_lens_q   [0, 3, 4, 5, 7, 8]    max_length_q  3
        cu_seq_lens_k   [0, 3, 5, 6, 8, 9]    max_length_k  3
        kv_num_blocks, q_num_blocks  [[[1]]]            kv_indices, q_indices  [[[[0]]]]
        full_kv_num_blocks, full_q_num_blocks  [[[0]]]  full_kv_indices, full_q_indices  [[[[0]]]]

    Slot q sees slot k if ``q >= k and doc[q] == doc[k] and (seg[k] == 0 or seg[k] == seg[q])``. No
    model finds that by itself: it needs the mask of :meth:`inputs_for` or ``model_inputs``. A pair
    whose prompt has no token shares nothing: its sides are two segments, without their last tokens.

    ``kv_rows``, ``cu_seq_lens_q`` and ``cu_seq_lens_k`` say the same to a varlen kernel that is
    causal from the bottom right, as flash-attn's is: the queries as they stand, the keys and values
    gathered, ``flash_attn_varlen_func(q, k[kv_rows], v[kv_rows], cu_seq_lens_q, cu_seq_lens_k,
    max_length_q, max_length_k, causal=True)`` over the flattened rows: prefix and chosen with their
    own keys, rejected with the prefix before its own. A window of W is ``window_size=(W - 1, 0)``.

    Attributes:
        layout: ``"padded"``, ``"packed"`` or ``"shared"``.
        input_ids: padded (2N, T) int64, chosen rows first, padded on the right; packed and shared
            (R, T) int64.
        attention_mask, completion_mask: padded only, (2N, T) int64; the completion mask is not
            shifted.
        position_ids: packed and shared, (R, T) int64, from 0 in each sequence.
        cu_seq_lens_q, cu_seq_lens_k: packed and shared, int32, where each segment of the flattened
            rows (shared, keys: of ``kv_rows``) begins, and the end.
        max_length_q, max_length_k: packed and shared, int, the longest segment.
        doc, seg: shared only, (R, T) int32.
        kv_rows: shared only, int64, rows of the flattened keys.
        kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, q_num_blocks, q_indices,
            full_q_num_blocks, full_q_indices: shared only, int32, (R, 1, B) and (R, 1, B, B) for
            B = ceil(T / 128): the arguments of FlexAttention's ``BlockMask``, entry by entry those
            of ``create_block_mask``.
        logit_rows: (M,) int64.
        targets: (M,) int32.
        seq_offsets: (2N + 1,) int32.
        weights: (M,) float32, the factor of each token's log-prob, from the data set and
            ``token_weights`` of the plan, or None: all 1.
        pair_index: (N,) int64, positions in the data set.
        ref_logps: (N, 2) float32, the dtype of log-probs, or None: sums under the reference, chosen
            then rejected.
        columns: the extra columns of the pairs by name: numbers and booleans (N,), strings a list.

    All are NumPy arrays from a plan, torch tensors after ``.to(device)``.
    """

    layout: Layout
    input_ids: Any
    logit_rows: Any
    targets: Any
    seq_offsets: Any
    pair_index: Any
    ref_logps: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    attention_mask: Any = None
    completion_mask: Any = None
    position_ids: Any = None
    cu_seq_lens_q: Any = None
    cu_seq_lens_k: Any = None
    max_length_q: int | None = None
    max_length_k: int | None = None
    doc: Any = None
    seg: Any = None
    kv_rows: Any = None
    kv_num_blocks: Any = None
    kv_indices: Any = None
    full_kv_num_blocks: Any = None
    full_kv_indices: Any = None
    q_num_blocks: Any = None
    q_indices: Any = None
    full_q_num_blocks: Any = None
    full_q_indices: Any = None
    weights: Any = None

    group_size: ClassVar[int] = 2
    """Sequences of one prompt in the table."""
    noun: ClassVar[str] = "pair"

    @classmethod
    def filled(cls, layout: Layout, **arrays: Any) -> Self:
        """Same as ``Batch(layout, **arrays)``: a frozen class sets its fields one by one, which
        costs as much as filling a small batch.
        """
        batch = cls.__new__(cls)
        vars(batch).update(_DEFAULTS)
        vars(batch).update(arrays, layout=layout)
        return batch

    def sign(self, plan: str, order: tuple[int, int]) -> None:
        """Says of which plan this is, and of which seed and epoch, for a process that gets it from
        a worker.
        """
        vars(self)[_SIGNED] = (plan, *order)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        plan, *order = state.get(_SIGNED) or (None,)
        own = None if plan is None else of_name(plan)
        if own is not None and own.is_past(*order):
            # Not an error yet: a loader throws away what it had fetched ahead.
            object.__setattr__(self, "__class__", PastBatch)
            return
        vars(self).update((name, value) for name, value in state.items() if name != _SIGNED)

    @property
    def n_pairs(self) -> int:
        return len(self.pair_index)

    def _repr_html_(self) -> str:
        """What a notebook shows: every field that this layout has."""
        from dpo_ext.pages.notebook import table

        rows = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("layout", "columns") or value is None:
                continue
            rows.append((f.name, *_described(value)))
        rows += [(f"columns[{name!r}]", *_described(v)) for name, v in self.columns.items()]
        title = f"{type(self).__name__}: {self.n_pairs} {self.noun}s, {self.layout}"
        return table(title, ("field", "dtype", "shape", "values"), rows)

    # Not `cached_property`: that of Python 3.11 holds a lock, for which a forked child would wait.
    @property
    def table(self) -> ScoreTable:
        """The :class:`dpo_ext.torch.ScoreTable` of this batch, which knows the shape of its
        ``input_ids``: logits and hidden states of another are refused. Imports torch.
        """
        found = vars(self).get("table")
        return vars(self).setdefault("table", self._table()) if found is None else found

    def _table(self) -> ScoreTable:
        need("torch", "a batch of tensors")
        from dpo_ext.layout.table import ScoreTable

        # What filled the arrays keeps every rule that ScoreTable's own check would look for.
        rows, targets, offsets = (_tensor(getattr(self, name)) for name in TABLE)
        return ScoreTable.unchecked(
            rows,
            targets,
            offsets,
            offsets,
            weights=_tensor(self.weights),
            group_size=self.group_size,
            shape=tuple(self.input_ids.shape),
        )

    @property
    def segments(self) -> Segments:
        """Which slots of a packed or shared batch see each other, known without asking its device.
        Imports torch.
        """
        need("torch", "a batch of tensors")
        from dpo_ext.layout.segments import Segments

        found = vars(self).get("segments")
        if found is None:
            found = vars(self).setdefault("segments", Segments.of_batch(self))
        return found

    @property
    def blocks(self) -> dict[str, Any]:
        """Of a shared batch: the arguments of FlexAttention's ``BlockMask``, by name."""
        return {name: getattr(self, name) for name in BLOCKS}

    @property
    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a Hugging Face model, as torch tensors; never with a cache.

        Shared batches bring a 4-D additive float32 mask, (R, 1, T, T), made on the batch's device.
        It suits eager and SDPA attention in float32, and any model without sliding windows: a model
        applies no window to a mask that it is given, and says nothing; `attach_scoring` and
        `assert_packing_safe` refuse that. :meth:`inputs_for` knows the model.
        """
        if LAYOUTS[self.layout].masked:
            from dpo_ext.layout.masks import plain_mask

            return {**self._fields_for_model(), "attention_mask": plain_mask(self)}
        return self._fields_for_model()

    def _fields_for_model(self) -> dict[str, Any]:
        names = LAYOUTS[self.layout].model_inputs
        return {**{name: _tensor(getattr(self, name)) for name in names}, "use_cache": False}

    def inputs_for(self, model: Any) -> dict[str, Any]:
        """Keyword arguments of this Hugging Face model: ``model(**batch.inputs_for(model))``.

        Same as ``model_inputs`` for padded and packed batches. A shared batch gets the mask of the
        model's attention: additive in the model's dtype for ``eager``, bool for ``sdpa``, a
        FlexAttention ``BlockMask`` for ``flex_attention``; with the model's sliding windows,
        counted in positions, and one mask for each kind of layer where kinds differ.

        Raises:
            TensorError: shared, and the model's attention takes no such mask, or its layers are of
                a kind that no mask describes.
        """
        if not LAYOUTS[self.layout].masked:
            return self.model_inputs
        from dpo_ext.layout.masks import mask_for

        return {**self._fields_for_model(), "attention_mask": mask_for(self, model)}

    def block_mask(self, *, window: int | None = None) -> BlockMask:
        """A shared batch as FlexAttention's ``BlockMask``; see
        :func:`dpo_ext.layout.masks.block_mask`.
        """
        from dpo_ext.layout.masks import block_mask

        return block_mask(self, window=window)

    def _map(self, change: Any) -> Self:
        table = change(self.table)
        changed: dict[str, Any] = {name: getattr(table, name) for name in (*TABLE, "weights")}
        for f in fields(self):
            value = getattr(self, f.name)
            movable = isinstance(value, np.ndarray) or hasattr(value, "to")
            if movable and f.name not in changed:
                changed[f.name] = change(_tensor(value))
        changed["columns"] = {
            name: values if isinstance(values, list) else change(_tensor(values))
            for name, values in self.columns.items()
        }
        moved = replace(self, **changed)
        # Made anew from tensors on a device, the table would wait to learn its offsets.
        moved.__dict__["table"] = table
        if LAYOUTS[self.layout].masked:
            moved.__dict__["segments"] = self.segments
        return moved

    def to(self, device: Any = None, *, non_blocking: bool = False) -> Self:
        """The batch as torch tensors on ``device``; imports torch."""
        if device is None:
            return self._map(lambda part: part)
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> Self:
        """The batch as torch tensors in page-locked memory; DataLoader calls this by itself."""
        return self._map(lambda part: part.pin_memory())


class PastBatch:
    """What comes from a worker when the plan has moved on to another epoch: any use is an error."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise RuntimeError(EPOCH_SET)


# In a batch that a worker made: its plan, seed and epoch.
_SIGNED = "_signed"
_DEFAULTS = {f.name: f.default for f in fields(Batch) if f.default is not MISSING}


def _described(value: Any) -> tuple[str, str, str]:
    """Dtype, shape and the first values of a field, for a reader."""
    if hasattr(value, "dtype"):
        values = " ".join(str(v) for v in value.reshape(-1)[:8].tolist())
        more = " …" if value.reshape(-1).shape[0] > 8 else ""
        return str(value.dtype).removeprefix("torch."), str(tuple(value.shape)), values + more
    if isinstance(value, list):
        return "str", f"({len(value)},)", " ".join(map(str, value[:8]))
    return type(value).__name__, "", str(value)


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return need("torch", "a batch of tensors").from_numpy(value)
    return value
