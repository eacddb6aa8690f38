"""`Segments`, which tokens of packed and shared rows see each other; and their mask, never built.

Letters: R rows, T slots of a row, S segments. Slots are counted over the flattened rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dpo_ext.layout.graphs import outside_graphs

# The name under which transformers knows attention segment by segment.
SEGMENTS = "dpo_ext_segments"


@dataclass(frozen=True, eq=False)
class Segments:
    """Rows cut into segments: a query sees its own segment up to itself, and one prefix.

    ``packed`` rows have no prefixes. In ``shared`` rows prompt and chosen side are one segment, and
    the rejected side is another, with the prompt as its prefix::

        input_ids  [[1, 2, 3, 2, 6, 6, 8, 0]]     ([1, 2], [3, 4], [5]), ([6], [7], [8, 9]), a tail
        offsets    [0, 3, 4, 5, 7, 8]
        prefixes   [[0, 0], [0, 1], [4, 4], [5, 5], [7, 7]]    slots [0, 1) come before segment 1

    Attributes:
        shape: (R, T).
        offsets: (S + 1,) int64, where each segment begins, and the end R * T. None crosses a row.
        prefixes: (S, 2) int64, first slot of the prefix of each segment and the slot behind its
            last one, the same where there is none; or None, if no segment has one.
    """

    shape: tuple[int, int]
    offsets: np.ndarray
    prefixes: np.ndarray | None = None
    # What attention works out once for all layers.
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of_batch(cls, batch: Any) -> Segments:
        """The segments of a packed or shared `Batch`. Of one on a device this waits for it.

        >>> from dpo_ext import PairDataset
        >>> pairs = PairDataset.from_ids([[1, 2], [6]], [[3, 4], [7]], [[5], [8, 9]])
        >>> plan = pairs.plan(layout="shared", pairs_per_batch=2, shuffle=False)
        >>> segments = Segments.of_batch(plan[0])
        >>> segments.offsets.tolist()
        [0, 3, 4, 5, 7]
        >>> segments.prefixes.tolist()
        [[0, 0], [0, 1], [4, 4], [5, 5]]
        """
        offsets = _host(batch.cu_seq_lens_q)
        rows, width = batch.input_ids.shape
        if batch.kv_rows is None:
            return cls((rows, width), offsets)
        keys = _host(batch.cu_seq_lens_k)
        lengths = np.diff(keys) - np.diff(offsets)
        firsts = _host(batch.kv_rows)[keys[:-1]]
        return cls((rows, width), offsets, np.stack([firsts, firsts + lengths], axis=1))

    @property
    def prefix_lengths(self) -> np.ndarray:
        """(S,) int64."""
        if self.prefixes is None:
            return np.zeros(len(self.offsets) - 1, dtype=np.int64)
        return self.prefixes[:, 1] - self.prefixes[:, 0]

    @property
    def longest(self) -> int:
        """Keys that the last query of a segment sees, at most."""
        return int((np.diff(self.offsets) + self.prefix_lengths).max(initial=0))

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Of each segment its row, and in slots of that row: prefix and segment, (p, q) (a, b)."""
        width = self.shape[1]
        prefixes = np.zeros((len(self.offsets) - 1, 2), dtype=np.int64)
        if self.prefixes is not None:
            prefixes = self.prefixes
        starts, stops = self.offsets[:-1], self.offsets[1:]
        rows = starts // max(width, 1)
        base = rows * width
        columns = (rows, *(prefixes - base[:, None]).T, starts - base, stops - base)
        return zip(*(column.tolist() for column in columns), strict=True)

    @cached_property
    def key_slots(self) -> np.ndarray:
        """Slots of the keys of all segments, one segment behind the other, prefixes first."""
        if self.prefixes is None:
            return np.arange(int(self.offsets[-1]))
        parts = [
            np.r_[p:q, a:b]
            for (p, q), a, b in zip(self.prefixes, self.offsets[:-1], self.offsets[1:], strict=True)
        ]
        return np.concatenate(parts or [np.zeros(0, dtype=np.int64)])

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """For a varlen kernel: ``offsets`` and ``key_offsets`` int32, ``key_slots`` int64. And of
        each slot: ``first``, its segment's first, ``prefix`` and ``behind``, its prefix's ends.
        """
        if device not in self.plans:
            lengths = np.diff(self.offsets)
            keys = np.cumsum(np.r_[0, lengths + self.prefix_lengths])
            prefixes = np.zeros((len(lengths), 2), np.int64)
            if self.prefixes is not None:
                prefixes = self.prefixes
            arrays = {
                "offsets": self.offsets.astype(np.int32),
                "key_offsets": keys.astype(np.int32),
                "key_slots": self.key_slots,
                "first": np.repeat(self.offsets[:-1], lengths),
                "prefix": np.repeat(prefixes[:, 0], lengths),
                "behind": np.repeat(prefixes[:, 1], lengths),
            }
            self.plans[device] = {
                name: torch.from_numpy(np.ascontiguousarray(value)).to(device)
                for name, value in arrays.items()
            }
        found: dict[str, Tensor] = self.plans[device]
        return found


class SegmentMask(Tensor):
    """The mask of segments, (R, 1, T, T) bool, True where attended, of which nothing is stored.

    Attention segment by segment reads ``segments`` and ``window``. For everybody else it is the
    tensor that it looks like: the first operation builds it, which is said once. So a model with
    attention of its own is slow with it, but never wrong.

    >>> import numpy as np
    >>> mask = SegmentMask.of(Segments((1, 4), np.array([0, 2, 4])))
    >>> mask.shape
    torch.Size([1, 1, 4, 4])
    >>> mask.dense()[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """

    segments: Segments
    window: int | None

    @classmethod
    @outside_graphs()
    def of(cls, segments: Segments, window: int | None = None, device: Any = "cpu") -> SegmentMask:
        """The mask of ``segments``; a query sees ``window`` positions, its own included."""
        rows, width = segments.shape
        mask: SegmentMask = Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, (rows, 1, width, width), dtype=torch.bool, device=torch.device(device)
        )
        mask.segments = segments
        mask.window = window
        return mask

    def dense(self) -> Tensor:
        """The same as an ordinary tensor: R * T * T bytes."""
        rows, width = self.segments.shape
        slot = torch.arange(rows * width, device=self.device).view(rows, width)
        return seen(
            self.segments.on(self.device), slot[:, None, :, None], slot[:, None, None], self.window
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SegmentMask(shape={tuple(self.shape)}, window={self.window})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if function in (aten.detach.default, aten.alias.default, aten.clone.default):
            mask = args[0]
            return cls.of(mask.segments, mask.window, mask.device)
        if function is aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):  # noqa: SLF001
            mask = args[0]
            return cls.of(mask.segments, mask.window, kwargs.get("device") or mask.device)
        warnings.warn(
            f"the mask of packed or shared rows was built, {args_shape(args)}: this model reads it "
            "itself, so that attention costs the square of a row\n"
            'hint: layout="padded"',
            UserWarning,
            stacklevel=2,
        )

        def plain(value: Any) -> Any:
            return value.dense() if isinstance(value, SegmentMask) else value

        return function(*tree_map(plain, args), **tree_map(plain, kwargs))


def seen(rows: dict[str, Tensor], query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether slots ``query`` see slots ``key``, both of one row; ``rows`` is `Segments.on`."""
    first, prefix, behind = (rows[name][query] for name in ("first", "prefix", "behind"))
    own = (key >= first) & (key <= query)
    before = (key >= prefix) & (key < behind)
    allowed = own | before
    if window is None:
        return allowed
    # From a prefix to the segment behind it positions go on.
    distance = torch.where(own, query - key, query - first + behind - key)
    return allowed & (distance < window)


def args_shape(args: Any) -> str:
    """The shape of the first mask among the arguments of an operation."""
    masks: list[SegmentMask] = []
    tree_map(lambda a: masks.append(a) if isinstance(a, SegmentMask) else None, args)
    return str(tuple(masks[0].shape)) if masks else "as a whole"


def _host(values: Any) -> np.ndarray:
    return torch.as_tensor(values).cpu().numpy().astype(np.int64)
