"""`BatchPlan`: which pairs make which batch, and how they are packed."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex, overload

import numpy as np

from dpo_ext import _core
from dpo_ext.errors import DataError, describe
from dpo_ext.layout.batch import LAYOUTS, Batch
from dpo_ext.layout.epoch import EPOCH_SET, Epoch
from dpo_ext.layout.fill import FILL, SLOTS, factors, padded, weigh
from dpo_ext.layout.memory import Block
from dpo_ext.pairs import Ragged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dpo_ext.layout.batch import Layout
    from dpo_ext.layout.fill import Take
    from dpo_ext.pairs import Pairs


@dataclass(frozen=True)
class PlanStats:
    """Size of one epoch over all ranks.

    Attributes:
        real_tokens: ids in all batches, prompts counted once a side, and in ``shared`` once a pair.
        slots: places for ids in all batches, padding included.
        fill: ``real_tokens / slots``; 1.0 for an empty plan.
        repeated: pairs that occur a second time, so that every rank gets the same number of
            batches.
    """

    real_tokens: int
    slots: int
    fill: float
    repeated: int

    def __getitem__(self, name: str) -> float:
        if name not in {f.name for f in fields(self)}:
            raise KeyError(name)
        return getattr(self, name)


def _index_of(name: str, value: Any) -> int:
    """A whole number, of whatever type."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be a whole number, found {describe(value)}") from None


def _whole(name: str, value: Any) -> int:
    """A whole number of 64 bits."""
    number = _index_of(name, value)
    if not 0 <= number < 2**64:
        raise ValueError(f"`{name}` must be in 0..2**64, found {number}")
    return number


def _every(n: int, size: int, drop_last: bool) -> NDArray[np.int64]:
    """Bounds that cut 0..n into parts of ``size``, the last one shorter or left out."""
    bounds = np.append(np.arange(0, n, size, dtype=np.int64), np.int64(n))
    return bounds[:-1] if drop_last and n % size else bounds


def pack_lengths(lengths: Any, capacity: int, *, seed: int = 0) -> Ragged:
    """Packs items into bins, best fit decreasing, in O(n + capacity).

    Same bins as taking the items from the longest to the shortest and putting each into the fullest
    bin that still takes it. Items of one length are taken in an order that ``seed`` chooses.

    Args:
        lengths: (n,) whole numbers >= 0.
        capacity: of a bin.

    Returns:
        Ragged: the items of each bin, int32.

    Raises:
        DataError: a length is negative or over the capacity; the message names the item.

    >>> [bin.tolist() for bin in pack_lengths([5, 4, 3, 2], 8)]
    [[0, 2], [1, 3]]
    """
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"`lengths` must be whole numbers of one dimension, found {array.dtype}")
    if len(array) >= 2**31:
        raise ValueError(f"`lengths` must have fewer than 2**31 items, found {len(array)}")
    items, starts = _core.pack_lengths(np.ascontiguousarray(array, np.int64), capacity, seed)
    return Ragged(items, starts)


class BatchPlan(Sequence[Batch]):
    """Which pairs make which batch, for one rank; a map-style sequence of :class:`Batch`.

    The order is a function of (seed, epoch), the same for every world size and number of workers:
    there is one global list of batches, and rank r takes number r, r + world_size, ... Every rank
    gets the same number of batches: those missing at the end are repeats from the start of the
    epoch, counted in ``stats.repeated``, or, with ``drop_last``, the last incomplete round is left
    out together with a last batch of fewer than ``pairs_per_batch`` pairs.

    ``plan[i]`` builds batch i alone, so resuming is an index: ``DataLoader(plan, batch_size=1,
    collate_fn=first)`` with ``first = lambda batches: batches[0]`` resumes in any trainer that
    skips batches, and by hand with ``sampler=range(k, len(plan))``. ``state_dict`` and ``digest``
    tell a resumed run that the batches are still the same.

    ``packed`` and ``shared`` with ``tokens_per_batch`` pack the whole epoch at once, best fit
    decreasing over the slots of each pair, into bins of ``bin_length``; the bins are shuffled, and
    ``tokens_per_batch // bin_length`` of them make a batch. With ``pairs_per_batch`` they have the
    same pairs in each batch as ``padded``, in one row.

    Same as, for ``pairs_per_batch``::

        order = permutation(seed, epoch)
        batches = [order[i : i + pairs_per_batch] for i in range(0, len(order), pairs_per_batch)]
        mine = batches[rank::world_size]

    ``token_weights``: ``{"chosen": lists, "rejected": lists}``, for each pair a list of numbers or
    booleans, one a token of ``pairs.chosen_ids[i]`` and ``pairs.rejected_ids[i]``: factors of these
    tokens' log-probs in every batch's table, 0 and False select nothing. Where the data set has
    weights of its own, ``chosen_weights`` and ``rejected_weights``, the factors are the products. A
    reference must be scored with the same weights. ``digest`` knows those of the data set, and not
    ``token_weights``.
    """

    sides: ClassVar[int] = 2
    """Rows of one pair in a padded batch."""
    options: ClassVar[tuple[str, ...]] = (
        "layout",
        "pairs_per_batch",
        "tokens_per_batch",
        "bin_length",
        "world_size",
        "shuffle",
        "drop_last",
        "pad_to_multiple_of",
    )
    """What ``digest`` knows."""

    def __init__(
        self,
        pairs: Pairs,
        *,
        layout: Layout,
        pairs_per_batch: int | None = None,
        tokens_per_batch: int | None = None,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        pad_to_multiple_of: int = 1,
        bin_length: int | None = None,
        token_weights: Mapping[str, Any] | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            known = ", ".join(f'"{name}"' for name in LAYOUTS)
            raise ValueError(f"unknown `layout` {layout!r}: there is {known}")
        if (pairs_per_batch is None) == (tokens_per_batch is None):
            raise ValueError(
                "exactly one of `pairs_per_batch` and `tokens_per_batch` must be given"
            )
        positive = {
            "pairs_per_batch": pairs_per_batch,
            "tokens_per_batch": tokens_per_batch,
            "bin_length": bin_length,
            "world_size": world_size,
            "pad_to_multiple_of": pad_to_multiple_of,
        }
        sizes: dict[str, Any] = {
            name: value if value is None else _index_of(name, value)
            for name, value in positive.items()
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, found {value}")
        pairs_per_batch, tokens_per_batch, bin_length, world_size, pad_to_multiple_of = (
            sizes.values()
        )
        seed, epoch, rank = _whole("seed", seed), _whole("epoch", epoch), _index_of("rank", rank)
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be in 0..{world_size}, found {rank}")
        bins = LAYOUTS[layout].bins
        if bin_length is not None and not (bins and tokens_per_batch is not None):
            raise ValueError(
                '`bin_length` needs `layout="packed"` or "shared", and `tokens_per_batch`'
            )
        if bins and tokens_per_batch is not None:
            bin_length = tokens_per_batch if bin_length is None else bin_length
            self._width = -(-bin_length // pad_to_multiple_of) * pad_to_multiple_of
            self._rows_per_batch = tokens_per_batch // self._width
            if self._rows_per_batch == 0:
                raise ValueError(
                    f"`tokens_per_batch` must be at least `bin_length` ({self._width} after "
                    f"`pad_to_multiple_of`), found {tokens_per_batch}"
                )
        self._pairs = pairs
        self._block_bytes = 0  # of the next batch, about
        self._weights = factors(pairs, token_weights)
        self._lengths = SLOTS[layout](pairs)
        self.layout = layout
        self.bin_length = bin_length
        self.pairs_per_batch = pairs_per_batch
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = bool(shuffle)
        self.drop_last = bool(drop_last)
        self.pad_to_multiple_of = pad_to_multiple_of
        self._told = Epoch(seed, epoch)
        self._arrange(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Moves to another epoch: another order, and with a token budget another number of
        batches. Copies in workers of a DataLoader move with it, also in workers that persist.
        """
        epoch = _whole("epoch", epoch)
        self._arrange(epoch)
        self._told.set(self.seed, epoch)

    def _follow(self) -> tuple[int, int] | None:
        """In a worker of a DataLoader: moves to the epoch of the plan that this one is a copy of,
        and says which it is.
        """
        told = self._told.told()
        if told is not None and told != (self.seed, self.epoch):
            self.seed = told[0]
            self._arrange(told[1])
        return told

    def _arrange(self, epoch: int) -> None:
        self.epoch = epoch
        self._stats: PlanStats | None = None
        n = len(self._pairs)
        # With bins: the pairs of all bins, where each bin begins, and which bins make a batch.
        self._items: NDArray[np.int64] | None = None
        if self.pairs_per_batch is not None:
            bounds = _every(n, self.pairs_per_batch, self.drop_last)
        elif LAYOUTS[self.layout].bins:
            self._items, self._bins = _core.epoch_bins(
                self._lengths, self.bin_length or 0, self.seed, epoch, self.shuffle
            )
            self._bin_bounds = _every(len(self._bins) - 1, self._rows_per_batch, self.drop_last)
            bounds = self._bins[self._bin_bounds]
        else:
            bounds = _core.batches_by_slots(
                self._pairs.longest,
                (self.tokens_per_batch or 0) * 2 // self.sides,
                self.pad_to_multiple_of,
                self.seed,
                epoch,
                self.shuffle,
            )
        self._bounds = bounds
        batches = max(len(bounds) - 1, 0)
        self._batches = batches
        self._steps = (
            batches // self.world_size if self.drop_last else -(-batches // self.world_size)
        )

    def __len__(self) -> int:
        self._follow()
        return self._steps

    def _index(self, batch: int) -> NDArray[np.int64]:
        """The pairs of batch number ``batch`` of the global list, which goes on with its own
        start.
        """
        batch %= self._batches
        start, stop = int(self._bounds[batch]), int(self._bounds[batch + 1])
        if self._items is not None:
            return self._items[start:stop]
        return _core.epoch_order(len(self._pairs), self.seed, self.epoch, self.shuffle, start, stop)

    @overload
    def __getitem__(self, i: SupportsIndex) -> Batch: ...
    @overload
    def __getitem__(self, i: slice) -> list[Batch]: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        told = self._follow()
        k = int(i)
        if not -self._steps <= k < self._steps:
            raise IndexError(f"batch {i} is out of range for {self._steps} batches")
        block = Block(self._block_bytes)
        batch = self.build(k % self._steps, block.take)
        self._block_bytes = block.asked + block.asked // 4  # the next one may be larger
        if told is not None:
            batch.sign(self._told.name, told)
        return batch

    def build(self, i: int, take: Take) -> Batch:
        """Batch ``i``, from 0, in flat arrays that ``take(count, dtype)`` gives, of any content."""
        batch = self._fill(i, take)
        return batch if self._weights is None else weigh(batch, self._weights, take)

    def _fill(self, i: int, take: Take) -> Batch:
        batch = (i * self.world_size + self.rank) % self._batches
        index = self._index(batch)
        if not LAYOUTS[self.layout].bins:
            return padded(self._pairs, index, self.pad_to_multiple_of, take)
        if self._items is None:
            multiple, slots = self.pad_to_multiple_of, int(self._lengths[index].sum())
            bounds, width = np.array([0, len(index)]), -(-slots // multiple) * multiple
        else:
            first, last = self._bin_bounds[batch], self._bin_bounds[batch + 1]
            bounds, width = self._bins[first : last + 1] - self._bins[first], self._width
        return FILL[self.layout](self._pairs, index, bounds, width, take)

    def __iter__(self) -> Iterator[Batch]:
        return self._pass(len(self), (self.seed, self.epoch))

    def _pass(self, steps: int, order: tuple[int, int]) -> Iterator[Batch]:
        for i in range(steps):
            if (self.seed, self.epoch) != order:
                raise RuntimeError(EPOCH_SET)
            yield self[i]

    @property
    def digest(self) -> str:
        """128 bits in hex of what, besides seed and epoch, makes the batches of a step: every
        option, and the ids, weights and labels of all examples in their order. The same on all
        ranks.
        """
        options = {name: getattr(self, name) for name in self.options}
        said = f"{options!r} {self._pairs.contents}"
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def state_dict(self, position: int = 0) -> dict[str, Any]:
        """``{seed, epoch, position, digest}``: resuming is ``plan[position]``, ... after
        :meth:`load_state_dict`.
        """
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": position,
            "digest": self.digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Takes seed and epoch of a saved state, and returns its position.

        Raises:
            DataError: the state is of other data, or the same in another order, of another layout,
                other sizes or another world size, so that its position is somewhere else; the plan
                is left as it was.
        """
        missing = sorted({"seed", "epoch", "position", "digest"} - set(state))
        if missing:
            raise DataError(f"the state of a plan has no `{missing[0]}`", reason="bad_state")
        if state["digest"] != self.digest:
            raise DataError(
                "the state was saved for other batches: its `digest` is expected to be "
                f"{self.digest}, found {state['digest']}\n"
                "hint: resume with the same data in the same order, layout, batch size and "
                "world size",
                reason="bad_state",
            )
        try:
            seed, epoch, position = (
                _whole(name, state[name]) for name in ("seed", "epoch", "position")
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"the state of a plan: {error}", reason="bad_state") from error
        before = self.seed, self.epoch
        self.seed = seed
        self.set_epoch(epoch)
        if not 0 <= position <= self._steps:
            self.seed = before[0]
            self.set_epoch(before[1])
            raise DataError(
                f"`position` must be in 0..{self._steps}, found {position}", reason="bad_state"
            )
        return position

    def pairs_in_step(self, i: int) -> int:
        """Pairs of step ``i`` over all ranks, repeats included: ``num_pairs`` of
        ``preference_loss``.
        """
        if not -self._steps <= i < self._steps:
            raise IndexError(f"step {i} is out of range for {self._steps} steps")
        first = i % self._steps * self.world_size
        batches = np.arange(first, first + self.world_size) % self._batches
        return int((self._bounds[batches + 1] - self._bounds[batches]).sum())

    @property
    def stats(self) -> PlanStats:
        """Tokens, slots and repeats of this epoch over all ranks."""
        if self._stats is None:
            self._stats = self._count()
        return self._stats

    def _count(self) -> PlanStats:
        used = self._steps * self.world_size
        if used == 0:
            return PlanStats(0, 0, 1.0, 0)
        n = len(self._pairs)
        order = self._items
        if order is None:
            order = _core.epoch_order(n, self.seed, self.epoch, self.shuffle, 0, n)
        order = order[: self._bounds[-1]]
        starts, sizes = self._bounds[:-1], np.diff(self._bounds)
        tokens = np.add.reduceat(self._lengths[order], starts)
        if self._items is not None:
            places = np.diff(self._bin_bounds) * self._width
        elif LAYOUTS[self.layout].bins:
            places = -(-tokens // self.pad_to_multiple_of) * self.pad_to_multiple_of
        else:
            width = np.maximum.reduceat(self._pairs.longest[order], starts)
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
            places = self.sides * sizes * width
        times = np.bincount(np.arange(used) % self._batches, minlength=self._batches)
        real, slots = int((times * tokens).sum()), int((times * places).sum())
        repeated = int(((times - 1).clip(0) * sizes).sum())
        return PlanStats(real, slots, real / slots if slots else 1.0, repeated)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(layout={self.layout!r}, batches={len(self)}, "
            f"epoch={self.epoch}, rank={self.rank}/{self.world_size})"
        )
