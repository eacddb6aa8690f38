"""`Ragged`, `Pairs` and `Unpaired`: lists of ids, and what is known of each example.

That is all that a plan, a batch and a store need; the ways in and out are `data/ways.py`.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from dpo_ext import _core
from dpo_ext.errors import describe
from dpo_ext.report import Report

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
WEIGHTS = ("chosen_weights", "rejected_weights")
IGNORE_INDEX = -100
"""The target of a token that is not scored, as in the labels of Hugging Face."""
SHOWN = 5  # pairs in a notebook
AT_ONCE = 1 << 20  # examples that are counted at once
PART = 1 << 22  # items of an array that are looked at at once, where it may be mapped


@dataclass(frozen=True, eq=False)
class Ragged(Sequence):
    """Lists of different lengths in one array: list ``i`` is ``values[offsets[i]:offsets[i + 1]]``,
    a view.

    Attributes:
        values: (sum of lengths,) int32; float32 for weights.
        offsets: (n + 1,) int64.

    >>> import numpy as np
    >>> lists = Ragged(np.array([1, 2, 3], np.int32), np.array([0, 2, 2, 3]))
    >>> len(lists), lists[0].tolist(), lists[1].tolist()
    (3, [1, 2], [])
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    @classmethod
    def from_lists(cls, lists: Sequence[Any]) -> Ragged:
        """Copies lists or arrays of whole numbers; values that int32 does not hold are an
        OverflowError.
        """
        lengths = np.fromiter((len(ids) for ids in lists), np.int64, len(lists))
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        values = np.empty(int(offsets[-1]), np.int32)
        for start, stop, ids in zip(offsets[:-1], offsets[1:], lists, strict=True):
            values[start:stop] = _int32(ids)
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        k = int(i)
        if not -len(self) <= k < len(self):
            raise IndexError(f"index {i} is out of range for {len(self)} lists")
        k %= len(self)
        return self.values[self.offsets[k] : self.offsets[k + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) int64."""
        return np.diff(self.offsets)

    def select(self, indices: NDArray[np.int64]) -> Ragged:
        """The lists ``indices``, copied."""
        lengths = self.lengths[indices]
        offsets = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        source = np.repeat(self.offsets[:-1][indices] - offsets[:-1], lengths)
        return Ragged(self.values[source + np.arange(offsets[-1])], offsets)

    def between(self, start: int, stop: int) -> Ragged:
        """The lists ``start`` to ``stop``, over the same values."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return Ragged(self.values[first:last], self.offsets[start : stop + 1] - first)

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """The lists of all parts, one after the other, copied."""
        before = np.cumsum([0, *(int(part.offsets[-1]) - int(part.offsets[0]) for part in parts)])
        values = [part.values[part.offsets[0] : part.offsets[-1]] for part in parts]
        offsets = [
            part.offsets[:-1] - part.offsets[0] + start
            for part, start in zip(parts, before[:-1], strict=True)
        ]
        return cls(np.concatenate(values), np.concatenate([*offsets, before[-1:]]))

    def contiguous(self) -> Ragged:
        """The same lists in contiguous arrays.

        Raises:
            TypeError: the values are not int32.
        """
        values = np.ascontiguousarray(self.values)
        if values.dtype != np.int32:
            raise TypeError(f"expected int32, found {values.dtype}")
        return Ragged(values, np.ascontiguousarray(self.offsets, np.int64))

    def tolist(self) -> list[list[int]]:
        return [ids.tolist() for ids in self]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Ragged)
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]


def ones(ids: Ragged) -> Ragged:
    """A weight of 1 for each id."""
    return Ragged(np.ones(int(ids.offsets[-1]), np.float32), ids.offsets)


def weighed(ids: Sequence[Ragged], weights: Sequence[Ragged | None]) -> list[Ragged | None]:
    """The weights of both sides: of neither if each is 1, or else of both."""
    if all(lists is None or bool((lists.values == 1).all()) for lists in weights):
        return [None, None]
    return [ones(lists) if own is None else own for lists, own in zip(ids, weights, strict=True)]


def contents_of(
    kind: type[Examples], lists: Mapping[str, Ragged], said: Sequence[NDArray[Any]]
) -> str:
    """`Examples.contents` of these lists by name, and of the arrays that ``kind.SAID`` names."""
    arrays: list[tuple[str, NDArray[Any], str]] = []
    for name in kind.IDS:
        arrays += [(name, lists[name].values, "<i4"), (name, lists[name].offsets, "<i8")]
    weights = [name for name in kind.WEIGHTS.values() if name in lists]
    if any((part != 1).any() for name in weights for part in _parts(lists[name].values)):
        arrays += [(name, lists[name].values, "<f4") for name in weights]
    arrays += zip(kind.SAID, said, "?" * len(said), strict=True)
    made = hashlib.blake2b(digest_size=16)
    for name, array, dtype in arrays:
        made.update(f"{name} {dtype} {len(array)} ".encode())
        for part in _parts(array):
            made.update(_core.hash_bytes(np.ascontiguousarray(part, dtype).view(np.uint8)))
    return made.hexdigest()


def _parts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """An array some of it at a time; of a mapped file, what was read is let go of."""
    mapped = map_of(array)
    for start in range(0, len(array), PART):
        yield array[start : start + PART]
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)


def map_of(array: Any) -> mmap.mmap | None:
    """The file that an array lies over."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    return array


def _int32(ids: Any) -> NDArray[np.int32]:
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError(f"expected whole numbers, found {array.dtype} of shape {array.shape}")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise OverflowError("expected ids of 32 bits")
    return array.astype(np.int32)


def _column(name: str, values: Any, n: int) -> NDArray[Any]:
    """An extra column: numbers and booleans as they are, strings as objects."""
    column: NDArray[Any] = np.asarray(values)
    if column.dtype.kind not in "iufb":
        column = np.empty(len(values), object)
        column[:] = values
    if column.shape != (n,):
        raise ValueError(f"column `{name}` must have the shape {(n,)}, found {column.shape}")
    return column


class Examples(Sequence):
    """What :class:`Pairs` and single completions share: lists of ids, and what is known of each.

    Attributes:
        IDS: names of the lists of ids.
        WEIGHTS: names of the weights of ids, or None where each is 1, by the name of the ids.
        KNOWN: names of arrays with a value an example, or None: whatever becomes of the examples.
        ALIKE: names of what is one for all examples.
        SAID: names of arrays that, beside ids and weights, make an example another one.
        COLUMNS: names of the columns that hold an array of an example's numbers, one for each of
            its own, by the name of the array.
        NOUN: what one is called.
        KIND: what many are called in the manifest of a saved data set.
    """

    IDS: ClassVar[tuple[str, ...]]
    WEIGHTS: ClassVar[Mapping[str, str]] = {}
    KNOWN: ClassVar[tuple[str, ...]]
    ALIKE: ClassVar[tuple[str, ...]] = ("pad_id", "vocab_size")
    SAID: ClassVar[tuple[str, ...]] = ()
    COLUMNS: ClassVar[Mapping[str, tuple[str, ...]]]
    NOUN: ClassVar[str]
    KIND: ClassVar[str]

    def __init__(
        self,
        prompt_ids: Ragged,
        *,
        report: Report,
        pad_id: int,
        vocab_size: int | None,
        ref_logps: NDArray[np.float64] | None,
        rows: NDArray[np.int64] | None,
        columns: Mapping[str, Any] | None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.report = report
        self.pad_id = pad_id
        self.vocab_size = vocab_size
        self.ref_logps = ref_logps
        self.rows = np.arange(len(prompt_ids)) if rows is None else rows
        self.columns = {
            name: _column(name, values, len(prompt_ids)) for name, values in (columns or {}).items()
        }

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @overload
    def __getitem__(self, i: SupportsIndex) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> Self: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            start, stop, step = i.indices(len(self))
            return (
                self._between(start, max(start, stop))
                if step == 1
                else self.select(range(start, stop, step))
            )
        return {
            **{name: getattr(self, name)[i] for name in self.IDS},
            **{name: lists[i] for name, lists in self.weights.items()},
            **{name: values[i] for name, values in self.columns.items()},
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Any) -> Self:
        """The pairs ``indices``, in that order, with all that is known of them; ids are copied.

        Args:
            indices: whole numbers, negative ones from the end, or a mask of (n,) booleans.

        Raises:
            IndexError: there is no such pair.  TypeError: these are no indices.
        """
        index = np.asarray(indices if hasattr(indices, "dtype") else list(indices))
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise IndexError(f"a mask must have the shape {(len(self),)}, found {index.shape}")
            index = np.flatnonzero(index)
        if index.size == 0:
            index = np.empty(0, np.int64)
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise TypeError(
                "`indices` must be whole numbers or booleans of one dimension, found "
                f"{describe(index)}"
            )
        outside = (index < -len(self)) | (index >= len(self))
        if outside.any():
            found = index[outside][0]
            raise IndexError(f"{self.NOUN} {found} is out of range for {len(self)} {self.NOUN}s")
        index = index.astype(np.int64) % max(1, len(self))
        return self._made(
            *(getattr(self, name).select(index) for name in self.IDS),
            report=self._report_of(len(index)),
            rows=self.rows[index],
            **self._weights(lambda lists: lists.select(index)),
            **self._known(lambda values: values[index]),
            columns={name: values[index] for name, values in self.columns.items()},
        )

    def filter(self, keep: Callable[[dict[str, Any]], Any]) -> Self:
        """The pairs for which ``keep(pairs[i])`` is true, in their order.

        >>> from dpo_ext import PairDataset
        >>> pairs = PairDataset.from_ids([[1], [2]], [[3], [4]], [[5], [6, 7]])
        >>> len(pairs.filter(lambda pair: len(pair["rejected_ids"]) > 1))
        1
        """
        return self.select(np.fromiter((bool(keep(pair)) for pair in self), bool, len(self)))

    def split(self, fraction: float, *, seed: int = 0, by_prompt: bool = True) -> tuple[Self, Self]:
        """The pairs in two parts, for training and for evaluation, each in the order of the whole.

        Args:
            fraction: of the pairs that go into the second part, as near as whole prompts allow.
            seed: chooses which ones; the same pairs and seed give the same parts.
            by_prompt: all pairs of one prompt go to one side, so that none is on both. Pairs
                without a prompt are apart.

        Returns:
            ``(rest, held_out)``.

        Raises:
            ValueError: ``fraction`` is not in [0, 1].

        >>> from dpo_ext import PairDataset
        >>> pairs = PairDataset.from_ids([[1], [1], [2], [3]], [[4]] * 4, [[5]] * 4)
        >>> train, held_out = pairs.split(0.5, seed=0)
        >>> {*train.prompt_ids.values} & {*held_out.prompt_ids.values}
        set()
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"`fraction` must be in [0, 1], found {fraction}")
        n = len(self)
        if by_prompt:
            first: dict[bytes, int] = {}
            prompts = (ids.tobytes() for ids in self.prompt_ids)
            group = np.fromiter(
                (first.setdefault(ids, i) if ids else i for i, ids in enumerate(prompts)), int, n
            )
            names, group = np.unique(group, return_inverse=True)
            sizes = np.bincount(group, minlength=len(names))
        else:
            group, sizes = np.arange(n), np.ones(n, np.int64)
        order = np.random.default_rng(seed).permutation(len(sizes))
        # The nearest to the fraction that whole groups, in this order, come.
        ends = np.cumsum(np.concatenate(([0], sizes[order])))
        taken = int(np.abs(ends - fraction * n).argmin())
        held_out = np.zeros(len(sizes), bool)
        held_out[order[:taken]] = True
        is_held_out = held_out[group]
        return self.select(~is_held_out), self.select(is_held_out)

    def concat(self, *others: Examples) -> Self:
        """These, then those of ``others``: with ``rows`` and report as if read in one go.

        Raises:
            ValueError: they differ in ``pad_id``, ``vocab_size`` or columns, or some have reference
                log-probs and some have none.

        >>> from dpo_ext import PairDataset
        >>> pairs = PairDataset.from_ids([[1]], [[2]], [[3]])
        >>> len(pairs.concat(pairs, pairs))
        3
        """
        parts: tuple[Examples, ...] = (self, *others)
        for other in others:
            _check_alike(self, other)
        before = np.cumsum([0, *(part.report.read for part in parts[:-1])])
        known: dict[str, Any] = {}
        for name in self.KNOWN:
            values = [v for part in parts if (v := getattr(part, name)) is not None]
            known[name] = np.concatenate(values) if values else None
        if any(part.weights for part in parts):
            for ids, name in self.WEIGHTS.items():
                weights = [part.weights.get(name, ones(getattr(part, ids))) for part in parts]
                known[name] = Ragged.joined(weights)
        return self._made(
            *(Ragged.joined([getattr(part, name) for part in parts]) for name in self.IDS),
            report=Report.merged([part.report for part in parts]),
            rows=np.concatenate([p.rows + start for p, start in zip(parts, before, strict=True)]),
            columns={
                name: np.concatenate([part.columns[name] for part in parts])
                for name in self.columns
            },
            **known,
        )

    def _between(self, start: int, stop: int) -> Self:
        part = slice(start, stop)
        return self._made(
            *(getattr(self, name).between(start, stop) for name in self.IDS),
            report=self._report_of(stop - start),
            rows=self.rows[part],
            **self._weights(lambda lists: lists.between(start, stop)),
            **self._known(lambda values: values[part]),
            columns={name: values[part] for name, values in self.columns.items()},
        )

    @property
    def weights(self) -> dict[str, Ragged]:
        """The weights of ids by their names, or nothing where each weighs 1."""
        found = {name: getattr(self, name) for name in self.WEIGHTS.values()}
        return {name: lists for name, lists in found.items() if lists is not None}

    def by_lengths(self, count: Callable[..., NDArray[np.int64]]) -> NDArray[np.int64]:
        """(n,) int64: ``count`` of the lengths of the lists, prompt first; some examples at a time,
        so that a signal does not wait.
        """
        out = np.empty(len(self), np.int64)
        lists = [getattr(self, name).offsets for name in self.IDS]
        for start in range(0, len(self), AT_ONCE):
            stop = min(start + AT_ONCE, len(self))
            out[start:stop] = count(*(np.diff(offsets[start : stop + 1]) for offsets in lists))
        return out

    def _once(self, name: str, make: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
        """What was made before under this name. `cached_property` of Python 3.11 holds a lock
        meanwhile, which the child of a fork would wait for.
        """
        found = vars(self).get(name)
        return vars(self).setdefault(name, make()) if found is None else found

    @property
    def contents(self) -> str:
        """128 bits in hex of all examples in their order: ids, weights, labels. Found when it is
        first asked for, and kept by what is saved and loaded.
        """
        held = self._held()
        known = vars(self).get("_contents")
        if known is None or any(a is not b for a, b in zip(known[1], held, strict=True)):
            said = [getattr(self, name) for name in self.SAID]
            lists = {name: getattr(self, name) for name in self.IDS} | self.weights
            self.keep_contents(contents_of(type(self), lists, said))
        digest: str = vars(self)["_contents"][0]
        return digest

    def keep_contents(self, digest: str) -> None:
        """What ``contents`` is, where it is known already."""
        vars(self)["_contents"] = digest, self._held()

    def _held(self) -> tuple[Any, ...]:
        """All that ``contents`` is made of."""
        return tuple(
            getattr(self, name) for name in (*self.IDS, *self.WEIGHTS.values(), *self.SAID)
        )

    def _weights(self, change: Callable[[Ragged], Ragged]) -> dict[str, Ragged]:
        return {name: change(lists) for name, lists in self.weights.items()}

    def _report_of(self, n: int) -> Report:
        return Report(
            n, n, notes=(*self.report.notes, f"{n} of {len(self)} {self.NOUN}s were selected")
        )

    def _known(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> dict[str, Any]:
        """What is known of each example, or None, changed."""
        values = {name: getattr(self, name) for name in self.KNOWN}
        return {name: None if v is None else change(v) for name, v in values.items()}

    def _made(self, *ids: Ragged, **changes: Any) -> Any:
        """Examples like these, with other ids."""
        names = ("report", "rows", "columns", *self.ALIKE, *self.KNOWN, *self.WEIGHTS.values())
        made = self._kind(*ids, **({name: getattr(self, name) for name in names} | changes))
        known = vars(self).get("_contents")
        if known is not None and all(a is b for a, b in zip(known[1], made._held(), strict=True)):  # noqa: SLF001
            made.keep_contents(known[0])
        return made

    @property
    def _kind(self) -> type[Any]:
        return type(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} {self.NOUN}s)"


class Pairs(Examples):
    """Preference pairs as token ids, and what is known of each: all that a plan, a batch and a
    store need.

    Attributes:
        prompt_ids, chosen_ids, rejected_ids: :class:`Ragged`; a completion does not repeat its
            prompt.
        report: :class:`Report`.
        chosen_weights, rejected_weights: :class:`Ragged` of float32, a factor of each completion
            token's log-prob; both None where each is 1.
        ref_logps: (n, 2) float64 or None, chosen then rejected, under the reference.
        rows: (n,) int64, the 0-based number of each pair's row among the rows read.
        columns: extra columns by name: (n,) int64 if all are whole numbers, else float64; (n,)
            bool; or (n,) object, strings.
        pad_id: what batches are padded with.
        vocab_size: every id is below it; None if unknown.
    """

    IDS = IDS
    WEIGHTS: ClassVar[Mapping[str, str]] = dict(zip(IDS[1:], WEIGHTS, strict=True))
    KNOWN = ("ref_logps",)
    COLUMNS: ClassVar[Mapping[str, tuple[str, ...]]] = {"ref_logps": REFERENCE}
    NOUN = "pair"
    KIND = "pairs"

    def __init__(
        self,
        prompt_ids: Ragged,
        chosen_ids: Ragged,
        rejected_ids: Ragged,
        *,
        report: Report,
        pad_id: int,
        vocab_size: int | None,
        chosen_weights: Ragged | None = None,
        rejected_weights: Ragged | None = None,
        ref_logps: NDArray[np.float64] | None = None,
        rows: NDArray[np.int64] | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            prompt_ids,
            report=report,
            pad_id=pad_id,
            vocab_size=vocab_size,
            ref_logps=ref_logps,
            rows=rows,
            columns=columns,
        )
        self.chosen_ids = chosen_ids
        self.rejected_ids = rejected_ids
        self.chosen_weights = chosen_weights
        self.rejected_weights = rejected_weights

    @property
    def _kind(self) -> type[Any]:
        return Pairs

    def _repr_html_(self) -> str:
        """What a notebook shows: how much there is, and the first pairs."""
        from dpo_ext.pages.notebook import ids, table

        n = len(self)
        reference = () if self.ref_logps is None else REFERENCE
        rows = []
        for i, pair in zip(range(SHOWN), self, strict=False):
            known = () if self.ref_logps is None else (f"{x:.2f}" for x in self.ref_logps[i])
            rows.append(
                (i, *(ids(pair[k]) for k in IDS), *known, *(pair[name] for name in self.columns))
            )
        if n > SHOWN:
            rows.append(("…", *[""] * (len(IDS) + len(reference) + len(self.columns))))
        words = f"{n:,} pairs, {int(self.tokens.sum()):,} tokens, padded with {self.pad_id}"
        if self.vocab_size is not None:
            words += f", {self.vocab_size:,} tokens in the vocabulary"
        return table(f"{type(self).__name__}: {words}", ("", *IDS, *reference, *self.columns), rows)

    @property
    def longest(self) -> NDArray[np.int64]:
        """(n,) int64: tokens of the longer side of each pair, prompt included."""
        return self._once("longest", lambda: self.by_lengths(lambda p, c, r: p + np.maximum(c, r)))

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(n,) int64: tokens of both sides of each pair, the prompt counted twice."""
        return self._once("tokens", lambda: self.by_lengths(lambda p, c, r: 2 * p + c + r))


class Unpaired(Examples):
    """Single completions as token ids, each labelled desirable or not: all that a plan and a batch
    need.

    Attributes:
        prompt_ids, completion_ids: :class:`Ragged`; a completion does not repeat its prompt, and
            is whole where ``truncation`` is ``keep_start``: batches cut it to ``max_length``.
        labels: (n,) bool, True for desirable.
        report: :class:`Report`.
        ref_logps: (n,) float64 or None, log-probs of the completions under the reference.
        ref_kl_logps, kl_completions: (n,) float64 and int64, or None: log-probs under the reference
            of the completion of another example behind each prompt, and of which.
        max_length, truncation: how a sequence in a batch is cut: at its end, with ``keep_end`` the
            completion at its start.
        rows: (n,) int64, the 0-based number of each example's row among the rows read.
        columns: extra columns by name, as those of :class:`Pairs`.
        pad_id: what batches are padded with.
        vocab_size: every id is below it; None if unknown.
    """

    IDS = ("prompt_ids", "completion_ids")
    KNOWN = ("labels", "ref_logps")
    SAID = ("labels",)
    ALIKE = (*Examples.ALIKE, "max_length", "truncation")
    COLUMNS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "labels": ("label",),
        "ref_logps": ("ref_logps",),
        "ref_kl_logps": ("ref_kl_logps",),
        "kl_completions": ("kl_completion",),
    }
    NOUN = "example"
    KIND = "single completions"

    def __init__(
        self,
        prompt_ids: Ragged,
        completion_ids: Ragged,
        *,
        labels: NDArray[np.bool_],
        report: Report,
        pad_id: int,
        vocab_size: int | None,
        max_length: int | None = None,
        truncation: str = "keep_start",
        ref_logps: NDArray[np.float64] | None = None,
        ref_kl_logps: NDArray[np.float64] | None = None,
        kl_completions: NDArray[np.int64] | None = None,
        rows: NDArray[np.int64] | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            prompt_ids,
            report=report,
            pad_id=pad_id,
            vocab_size=vocab_size,
            ref_logps=ref_logps,
            rows=rows,
            columns=columns,
        )
        self.completion_ids = completion_ids
        self.labels = labels
        self.max_length = max_length
        self.truncation = truncation
        self.ref_kl_logps = ref_kl_logps
        self.kl_completions = kl_completions

    def __getitem__(self, i: Any) -> Any:
        example = super().__getitem__(i)
        return example if isinstance(i, slice) else {**example, "label": bool(self.labels[i])}

    def scored(
        self, prompts: NDArray[np.int64], completions: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Ids of each of these completions that a batch keeps behind each of these prompts."""
        lengths = self.completion_ids.lengths[completions]
        if self.max_length is None:
            return lengths
        return np.minimum(lengths, (self.max_length - self.prompt_ids.lengths[prompts]).clip(0))

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(n,) int64: tokens of each example in a batch, prompt included."""
        return self._once("tokens", self._count)

    def _count(self) -> NDArray[np.int64]:
        every = np.arange(len(self))
        return self.prompt_ids.lengths + self.scored(every, every)

    @property
    def longest(self) -> NDArray[np.int64]:
        """The same as ``tokens``."""
        return self.tokens

    def _repr_html_(self) -> str:
        """What a notebook shows: how much there is, and the first examples."""
        from dpo_ext.pages.notebook import ids, table

        names = (*self.IDS, "label", *self.columns)
        rows = []
        for i, one in zip(range(SHOWN), self, strict=False):
            lists = (ids(one[name]) for name in self.IDS)
            rows.append((i, *lists, one["label"], *(one[name] for name in self.columns)))
        if len(self) > SHOWN:
            rows.append(("…", *[""] * len(names)))
        words = f"{len(self):,} examples, {int(self.labels.sum()):,} of them desirable"
        words += f", {int(self.tokens.sum()):,} tokens, padded with {self.pad_id}"
        return table(f"{type(self).__name__}: {words}", ("", *names), rows)


def _check_alike(pairs: Examples, other: Examples) -> None:
    """That two sets of examples can be one."""
    if pairs.IDS != other.IDS:
        raise TypeError(f"expected {type(pairs).__name__}, found {type(other).__name__}")
    for name in pairs.ALIKE:
        mine, theirs = getattr(pairs, name), getattr(other, name)
        if mine != theirs:
            raise ValueError(
                f"`{name}` differs, {mine} and {theirs}: the {pairs.NOUN}s are of two "
                + ("tokenizers" if name in Examples.ALIKE else "preparations")
            )
    if list(pairs.columns) != list(other.columns):
        raise ValueError(f"expected the columns {list(pairs.columns)}, found {list(other.columns)}")
    for name, values in pairs.columns.items():
        kinds = {v.dtype.kind for v in (values, other.columns[name]) if len(v)}
        if len(kinds) > 1 and not kinds <= {"i", "u", "f"}:
            found = f"{values.dtype} and {other.columns[name].dtype}"
            raise ValueError(f"column `{name}` must be of one kind, found {found}")
    if (pairs.ref_logps is None) != (other.ref_logps is None):
        raise ValueError(
            "some pairs have reference log-probs and some have none\n"
            "hint: give them to all, by `with_ref_logps`"
        )
