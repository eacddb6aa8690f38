"""`UnpairedPlan` and `UnpairedBatch`: single completions, and the mismatched ones of KTO's KL term.

Shapes: N examples, T tokens of the longest row, M scored tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from dpo_ext import _core
from dpo_ext.errors import DataError, LimitExceeded
from dpo_ext.layout.batch import LAYOUTS, TABLE, Batch
from dpo_ext.layout.plan import BatchPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dpo_ext.layout.fill import Take
    from dpo_ext.pairs import Unpaired

UnpairedLayout = Literal["padded", "packed"]
LAYOUTS_HERE: tuple[UnpairedLayout, ...] = ("padded", "packed")


@dataclass(frozen=True, eq=False)
class UnpairedBatch(Batch):
    """N labelled completions, ready for a model, and N mismatched ones in ``kl``.

    The examples ([1, 2], [3, 4]), desirable, and ([6], [7]), not, of (prompt, completion), padded
    with 0; each prompt of ``kl`` has the completion of the example before it in the batch, the
    first that of the last, as in TRL::

        input_ids        completion_mask   labels           kl.input_ids
        [[1, 2, 3, 4],   [[0, 0, 1, 1],    [ True,          [[1, 2, 7],
         [6, 7, 0, 0]]    [0, 1, 0, 0]]     False]           [6, 3, 4]]

        logit_rows  [1, 2, 4]   targets  [3, 4, 7]   seq_offsets  [0, 2, 3]

    Attributes:
        labels: (N,) bool, True for desirable.
        ref_logps: (N,) float32 or None: sums under the reference; of ``kl`` those of the mismatched
            completions.
        kl: a batch of the same N prompts, with the completions ``kl.completion_index``; None in a
            plan without them.
        completion_index: (N,) int64, whose completions these are; ``pair_index`` says whose
            prompts.

    The others are those of :class:`Batch`, with one sequence an example: (N, T), or packed (R, T)
    with one segment an example. The model scores ``table``, whose log-probs are (N, 1).
    """

    labels: Any = None
    completion_index: Any = None
    kl: UnpairedBatch | None = None

    group_size: ClassVar[int] = 1
    noun: ClassVar[str] = "example"

    @property
    def n_examples(self) -> int:
        return len(self.pair_index)

    def _map(self, change: Any) -> Self:
        moved = super()._map(lambda part: part if isinstance(part, Batch) else change(part))
        if self.kl is not None:
            vars(moved)["kl"] = self.kl._map(change)  # noqa: SLF001 - of this class
        return moved


class UnpairedPlan(BatchPlan):
    """Which examples make which batch, for one rank; a map-style sequence of
    :class:`UnpairedBatch`.

    As :class:`BatchPlan`, with ``examples_per_batch`` for its ``pairs_per_batch``. ``stats`` counts
    the completions, not the mismatched ones beside them. A ``tokens_per_batch`` bounds the slots of
    the completions, N * T; the mismatched ones of a batch may take more or fewer.
    """

    sides = 1
    options = (*BatchPlan.options, "kl", "max_length", "truncation")

    def __init__(
        self,
        examples: Unpaired,
        *,
        layout: UnpairedLayout,
        examples_per_batch: int | None = None,
        tokens_per_batch: int | None = None,
        kl: bool = True,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        pad_to_multiple_of: int = 1,
        bin_length: int | None = None,
    ) -> None:
        if layout not in LAYOUTS_HERE:
            known = ", ".join(f'"{name}"' for name in LAYOUTS_HERE)
            hint = "\nhint: single completions share no prompt" if layout == "shared" else ""
            raise ValueError(f"unknown `layout` {layout!r}: there is {known}{hint}")
        if (examples_per_batch is None) == (tokens_per_batch is None):
            raise ValueError(
                "exactly one of `examples_per_batch` and `tokens_per_batch` must be given"
            )
        if examples_per_batch is not None and examples_per_batch < (2 if kl else 1):
            hint = "\nhint: the KL term needs another completion; kl=False leaves it out"
            raise ValueError(
                f"`examples_per_batch` must be at least {2 if kl else 1}, found "
                f"{examples_per_batch}{hint if kl else ''}"
            )
        most = None if LAYOUTS[layout].bins else tokens_per_batch
        if most is not None and (examples.tokens > most).any():
            worst = int(np.argmax(examples.tokens > most))
            raise DataError(
                f"example {worst} needs {examples.tokens[worst]} slots, more than "
                f"`tokens_per_batch` {most}",
                field="tokens_per_batch",
            )
        self.kl = kl
        self.max_length, self.truncation = examples.max_length, examples.truncation
        self._examples = examples
        super().__init__(
            examples,  # type: ignore[arg-type]
            layout=layout,
            pairs_per_batch=examples_per_batch,
            tokens_per_batch=tokens_per_batch,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            drop_last=drop_last,
            pad_to_multiple_of=pad_to_multiple_of,
            bin_length=bin_length,
        )
        alone = int((np.diff(self._bounds) == 1).sum()) if kl else 0
        if alone:
            warnings.warn(
                f"{alone} of {self._batches} batches have one example, whose own completion is "
                "then the mismatched one, as in TRL: its KL term is its reward\n"
                "hint: drop_last=True, or another batch size",
                stacklevel=3,
            )

    @property
    def examples_per_batch(self) -> int | None:
        return self.pairs_per_batch

    def examples_in_step(self, i: int) -> int:
        """Examples of step ``i`` over all ranks, repeats included: ``num_examples`` of
        ``unpaired_loss``.
        """
        return self.pairs_in_step(i)

    def _fill(self, i: int, take: Take) -> UnpairedBatch:
        batch = (i * self.world_size + self.rank) % self._batches
        index = self._index(batch)
        examples, multiple = self._examples, self.pad_to_multiple_of
        bins = None
        if self._items is not None:
            first, last = self._bin_bounds[batch], self._bin_bounds[batch + 1]
            bins = np.repeat(np.arange(last - first), np.diff(self._bins[first : last + 1]))
        reference = _float32(examples.ref_logps, index, take)
        columns = {
            name: values[index].tolist() if values.dtype == object else values[index]
            for name, values in examples.columns.items()
        }
        known = {"ref_logps": reference, "columns": columns, "labels": examples.labels[index]}
        mismatched = None
        if self.kl:
            others = np.roll(index, 1)
            wanted: dict[str, Any] = {
                "ref_logps": self._ref_kl_logps(index, others, take),
                "columns": {},
            }
            lengths = examples.prompt_ids.lengths[index] + examples.scored(index, others)
            places = _Places.of(self.layout, lengths, multiple)
            if bins is not None:
                width = max(self._width, -(-int(lengths.max()) // multiple) * multiple)
                items, starts = _core.pack_lengths(lengths, width, 0)
                places = _Places.packed(lengths, items, np.diff(starts), width)
            mismatched = _filled(examples, self.layout, index, others, places, wanted, take)
        lengths = examples.tokens[index]
        places = _Places.of(self.layout, lengths, multiple)
        if bins is not None:
            places = _Places.packed(lengths, np.arange(len(index)), np.bincount(bins), self._width)
        return _filled(
            examples, self.layout, index, index, places, {**known, "kl": mismatched}, take
        )

    def _ref_kl_logps(
        self, index: NDArray[np.int64], others: NDArray[np.int64], take: Take
    ) -> NDArray[np.float32] | None:
        """Log-probs of the mismatched completions under the reference, if they are known.

        Raises:
            DataError: they are those of other completions.
        """
        examples = self._examples
        if examples.ref_kl_logps is None or examples.kl_completions is None:
            return None
        known = examples.kl_completions[index]
        wrong = np.flatnonzero(known != others)
        if wrong.size:
            k = int(wrong[0])
            raise DataError(
                f"example {index[k]}: expected the reference log-prob of the completion of example "
                f"{others[k]} behind its prompt, found that of example {known[k]}\n"
                "hint: use the plan of which they were computed (shuffle=False, one batch size), "
                "or leave `kl` out of `with_ref_logps` and score `batch.kl` by the reference",
                field="ref_kl_logps",
                reason="bad_state",
            )
        return _float32(examples.ref_kl_logps, index, take)


@dataclass(frozen=True)
class _Places:
    """Where sequences begin in rows of ``width`` slots: flat slots, in the order of the batch."""

    starts: NDArray[np.int64]
    height: int
    width: int

    @classmethod
    def of(cls, layout: str, lengths: NDArray[np.int64], multiple: int) -> _Places:
        """One a row, or packed all in one row."""
        if not LAYOUTS[layout].bins:  # type: ignore[index]
            width = -(-int(lengths.max()) // multiple) * multiple
            return cls(np.arange(len(lengths)) * width, len(lengths), width)
        ends = np.cumsum(lengths)
        return cls(ends - lengths, 1, -(-int(ends[-1]) // multiple) * multiple)

    @classmethod
    def packed(
        cls, lengths: NDArray[np.int64], items: Any, sizes: NDArray[np.int64], width: int
    ) -> _Places:
        """The sequences ``items``, ``sizes[r]`` of them in row r."""
        ends = np.cumsum(lengths[items])
        before = np.repeat(np.cumsum(sizes) - sizes, sizes)
        begins = np.concatenate([[0], ends])
        starts = np.empty(len(lengths), np.int64)
        row = np.repeat(np.arange(len(sizes)), sizes) * width
        starts[items] = row + begins[:-1] - begins[before]
        return cls(starts, len(sizes), width)


def _ranges(starts: Any, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[start, start + 1, ...]`` of each length, one behind the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _float32(values: Any, index: NDArray[np.int64], take: Take) -> NDArray[np.float32] | None:
    if values is None:
        return None
    out = take(len(index), np.float32)
    out[:] = values[index]
    return out


def _filled(
    examples: Unpaired,
    layout: str,
    index: NDArray[np.int64],
    others: NDArray[np.int64],
    places: _Places,
    known: dict[str, Any],
    take: Take,
) -> UnpairedBatch:
    """The prompts ``index``, each with the completion of one of ``others``."""
    prompts, completions = examples.prompt_ids, examples.completion_ids
    before, behind = prompts.lengths[index], examples.scored(index, others)
    slots, starts = places.height * places.width, places.starts
    if slots >= 2**31:
        raise LimitExceeded("a batch has more than 2^31 - 1 slots", field="slots", reason="limit")
    # Where the ids that are kept begin among all.
    cut = completions.offsets[others]
    if examples.truncation == "keep_end":
        cut = cut + completions.lengths[others] - behind
    rows: dict[str, Any] = {name: take(slots, kind) for name, kind in LAYOUTS[layout].rows.items()}  # type: ignore[index]
    ids = rows["input_ids"]
    ids.fill(examples.pad_id)
    ids[_ranges(starts, before)] = prompts.values[_ranges(prompts.offsets[index], before)]
    scored = _ranges(starts + before, behind)
    ids[scored] = completions.values[_ranges(cut, behind)]
    fields: dict[str, Any] = {}
    if layout == "padded":
        for name, at in (
            ("attention_mask", _ranges(starts, before + behind)),
            ("completion_mask", scored),
        ):
            rows[name].fill(0)
            rows[name][at] = 1
    else:
        lengths = before + behind
        line = np.arange(places.height + 1) * places.width
        ends = np.unique(np.concatenate([starts, starts + lengths, line])).astype(np.int32)
        sizes = np.diff(ends).astype(np.int64)
        rows["position_ids"][:] = _ranges(np.zeros(len(sizes), np.int64), sizes)
        seq_lens = take(len(ends), np.int32)
        seq_lens[:] = ends
        longest = int(sizes.max(initial=0))
        fields = {"cu_seq_lens_q": seq_lens, "cu_seq_lens_k": seq_lens}
        fields.update(max_length_q=longest, max_length_k=longest)
    # Nothing predicts the first token of a sequence.
    first = (before == 0).astype(np.int64)
    counts = (behind - first).clip(0)
    total, n = int(counts.sum()), len(index)
    kinds = ((total, np.int64), (total, np.int32), (n + 1, np.int32))
    table = {name: take(*kind) for name, kind in zip(TABLE, kinds, strict=True)}
    table["logit_rows"][:] = _ranges(starts + before + first - 1, counts)
    table["targets"][:] = completions.values[_ranges(cut + first, counts)]
    table["seq_offsets"][0] = 0
    np.cumsum(counts, out=table["seq_offsets"][1:])
    own, whose = take(n, np.int64), take(n, np.int64)
    own[:], whose[:] = index, others
    shaped = {name: array.reshape(places.height, places.width) for name, array in rows.items()}
    return UnpairedBatch.filled(
        layout,  # type: ignore[arg-type]
        **shaped,
        **table,
        **fields,
        **known,
        pair_index=own,
        completion_index=whose,
    )
