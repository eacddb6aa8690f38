"""`ReferenceStore`: log-probs of a reference on disk, read by what the model saw.

N is the number of pairs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_ext import _core
from dpo_ext.errors import DataError, RefLogpsError, TensorError, describe
from dpo_ext.pairs import Pairs, Ragged
from dpo_ext.reflogps import shards
from dpo_ext.reflogps.identity import Fingerprint
from dpo_ext.reflogps.keys import Keys, PairKeys
from dpo_ext.reflogps.listing import Listing
from dpo_ext.reflogps.tokens import by_sequence, by_side, gathered
from dpo_ext.store.folder import Folder, typed_errors, writing

# A table of so many rows is no longer in the cache: there keys are looked up in rising order, as
# the table has them, so that each page of memory is visited once.
LARGE = 1 << 18
# Examples in a message.
SHOWN = 5


@dataclass(frozen=True)
class StoreStats:
    """What a store holds, and what happened to it.

    Attributes:
        rows: sequences whose log-probs can be read.
        shards: files that hold them.
        bytes: of these files.
        damaged: files whose bytes are not those that were written; their rows are missing.
        foreign: files of another reference; they are never read.
        lost: files that the manifest names and that are not there; their rows are missing.
        notes: what else there is to say.
        hits, misses: pairs that `get` and `missing` found and did not find.
    """

    rows: int
    shards: int
    bytes: int
    damaged: tuple[str, ...]
    foreign: tuple[str, ...]
    lost: tuple[str, ...]
    notes: tuple[str, ...]
    hits: int
    misses: int


class ReferenceStore:
    """Log-probs of preference pairs under a reference, kept in a folder.

    A log-prob is found by what the model saw: the ids of prompt and completion after truncation,
    where the one ends, and the weights of the tokens; and by the ``fingerprint`` of the reference.
    The order of the pairs, their batches, the layout and the loss do not matter, and whatever else
    changes the log-probs makes a miss. Once stored, a value stays.

    Args:
        folder: made by the first :meth:`put`.
        fingerprint: of the reference, from `dpo_ext.reflogps.fingerprint`; by hand, a name or parts
            by name.

    Raises:
        RefLogpsError: the folder holds log-probs of another reference, says which parts differ; or
            is no store, or one of a newer version.

    Warns where only a soft part of the fingerprint differs, as the implementation of attention.

    Several threads and processes may read and write at once: a writer waits for another, and a
    reader sees whole shards. Each :meth:`put` with new rows makes a file: put thousands at a time.

    >>> import tempfile
    >>> from dpo_ext import PairDataset
    >>> from dpo_ext.reflogps import ReferenceStore
    >>> pairs = PairDataset.from_ids([[1, 2], [3]], [[4], [5]], [[6], [7, 8]])
    >>> store = ReferenceStore(tempfile.mkdtemp(), fingerprint="my model")
    >>> store.put(pairs, [[-1.5, -2.5], [-0.5, -4.0]])
    4
    >>> store.get(pairs.select([1]))
    array([[-0.5, -4. ]])
    >>> store.missing(pairs)
    array([], dtype=int64)
    """

    def __init__(
        self, folder: str | PathLike[str], fingerprint: Fingerprint | Mapping[str, Any] | str
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint = Fingerprint.of(fingerprint)
        self._listing = Listing(self.folder, self.fingerprint)
        self._table = _core.KeyTable()
        self._logps = np.empty(0)
        self._has_tokens = np.zeros(0, bool)  # of each row, or of none where no shard has them
        self._hits = self._misses = 0
        self._lock = threading.RLock()
        with _errors(self.folder):
            self._listing.look()
            if not self._listing.has_manifest:
                self._load()
        if changed := self._listing.soft:
            warnings.warn(
                f"{self.folder}: the stored log-probs were made otherwise, and differ by rounding: "
                + "; ".join(changed),
                stacklevel=2,
            )

    def put(
        self,
        pairs: Pairs,
        values: Any,
        *,
        index: Any = None,
        token_weights: Mapping[str, Any] | None = None,
        token_logps: Mapping[str, Any] | None = None,
    ) -> int:
        """Stores log-probs; once it returns they survive a crash and a power cut.

        Args:
            pairs: whose they are.
            values: (N, 2) numbers, chosen then rejected, summed over the tokens; kept as float64.
            index: (N,) whole numbers, the pairs that ``values`` are of; None for all, in order.
            token_weights: those that the log-probs were summed with, as those of a plan.
            token_logps: ``{"chosen": lists, "rejected": lists}``, a number for each token of each
                completion, as `PairScorer.tokens` gives them: without the weights, and 0 for a
                token that is not scored. Kept as float32, for :meth:`get_tokens`.

        Returns:
            Sequences that were not there, or not with their tokens. A value that is there stays as
            it is.

        Raises:
            RefLogpsError: a value is NaN or infinite, names the pair; it contradicts one that is
                there for the same tokens, or the sum of its tokens; or the disk is full or broken.
            TensorError: ``values`` or ``token_logps`` have another shape or are no numbers.
        """
        keys = PairKeys(pairs, index, token_weights)
        logps = _checked(values, keys)
        tokens = None if token_logps is None else by_sequence(token_logps, keys, logps)
        with self._lock, _errors(self.folder):
            whole = keys.whole()
            self._load()
            is_there = self._is_there(self._find(whole), tokens is not None).all()
            if is_there and (self._listing.is_whole or not len(whole)):
                # the folder may be read-only
                return len(self._new(keys, whole, logps, tokens is not None))
            with writing(self.folder, shards.KIND) as folder:
                folder.sweep(None, data=False)
                self._load()  # what another writer wrote meanwhile
                new = self._new(keys, whole, logps, tokens is not None)
                own = None if tokens is None else tokens.select(new)
                absent = whole.reshape(-1, 2)[new].ravel()
                self._write(folder, absent, self._kept(absent, logps[new]), own)
            return len(new)

    def get(
        self, pairs: Pairs, *, index: Any = None, token_weights: Mapping[str, Any] | None = None
    ) -> NDArray[np.float64]:
        """The log-probs of pairs, exactly as they were put.

        Args:
            index: the pairs to read, as ``batch.pair_index``; None for all.

        Returns:
            (N, 2) float64, chosen then rejected.

        Raises:
            RefLogpsError: some are missing; gives their number and examples.
        """
        keys = PairKeys(pairs, index, token_weights)
        whole = keys.whole()
        with self._lock:
            rows = self._find(whole)
            if len(rows) and rows.min() < 0:  # another writer may have put them
                with _errors(self.folder):
                    self._load()
                rows = self._find(whole)
                if rows.min() < 0:
                    missing = np.flatnonzero((rows.reshape(-1, 2) < 0).any(axis=1))
                    self._count(keys, missing)
                    raise RefLogpsError(self._said(keys, missing))
            self._count(keys, ())
            return self._logps[rows].reshape(-1, 2)

    def get_tokens(
        self, pairs: Pairs, *, index: Any = None, token_weights: Mapping[str, Any] | None = None
    ) -> dict[str, Ragged]:
        """The log-probs of the tokens of pairs, as they were put.

        They are read from disk with each call: call it once for a data set, and let
        `dpo_ext.torch.reference.ColumnsReference` give those of a batch.

        Args:
            index: the pairs to read; None for all.

        Returns:
            ``{"chosen": lists, "rejected": lists}``, float32, a number for each token of each
            completion.

        Raises:
            RefLogpsError: those of some are missing; gives their number and examples.
        """
        keys = PairKeys(pairs, index, token_weights)
        with self._lock, _errors(self.folder):
            self._load()
            wanted = _core.KeyTable()
            rows = wanted.add(keys.whole())
            lengths = np.zeros(len(wanted), np.int64)
            lengths[rows] = keys.tokens
            found, is_there = gathered(self._tokens_of(wanted), lengths)
            missing = np.flatnonzero(~is_there[rows].reshape(-1, 2).all(axis=1))
            self._count(keys, missing)
            if len(missing):
                raise RefLogpsError(self._said(keys, missing, "without log-probs of their tokens"))
            return by_side(found.select(rows))

    def missing(
        self,
        pairs: Pairs,
        *,
        index: Any = None,
        token_weights: Mapping[str, Any] | None = None,
        tokens: bool = False,
    ) -> NDArray[np.int64]:
        """The indices of the pairs of which a side has no log-prob, in their order; with
        ``tokens``, of those too of which a side has none of its tokens.
        """
        keys = PairKeys(pairs, index, token_weights)
        with self._lock:
            with _errors(self.folder):
                self._load()
            found = [
                start
                + np.flatnonzero(
                    ~self._is_there(self._find(part), tokens).reshape(-1, 2).all(axis=1)
                )
                for start, part in keys.parts()
            ]
            lacking = np.concatenate([np.empty(0, np.int64), *found])
            self._count(keys, lacking)
            return keys.index[lacking]

    @property
    def stats(self) -> StoreStats:
        """:class:`StoreStats`, of the folder as it is now."""
        with self._lock:
            with _errors(self.folder):
                self._load()
            listing = self._listing
            return StoreStats(
                rows=len(self._table),
                shards=len(listing.loaded),
                bytes=sum(size for _, size, _ in listing.loaded.values()),
                damaged=tuple(sorted(listing.damaged)),
                foreign=tuple(sorted(listing.foreign)),
                lost=tuple(sorted(listing.lost)),
                notes=tuple(listing.notes),
                hits=self._hits,
                misses=self._misses,
            )

    def __repr__(self) -> str:
        return f"ReferenceStore({str(self.folder)!r}, {self.fingerprint.digest[:12]})"

    def __reduce__(self) -> tuple[Any, ...]:  # a worker opens the folder itself
        return type(self), (str(self.folder.absolute()), self.fingerprint)

    def _find(self, keys: Keys) -> NDArray[np.int64]:
        """The row of each key, -1 where there is none."""
        if min(len(self._table), len(keys) // 2) < LARGE:
            return self._table.find(keys)
        halves = keys.reshape(-1, 2)
        order = np.argsort(halves[:, 0])
        rows = np.empty(len(order), np.int64)
        rows[order] = self._table.find(halves[order].reshape(-1))
        return rows

    def _is_there(self, rows: NDArray[np.int64], tokens: bool) -> NDArray[np.bool_]:
        """Whether what is asked of these rows is there; -1 is none."""
        if not tokens:
            return rows >= 0
        if not len(self._has_tokens):
            return np.zeros(len(rows), bool)
        return (rows >= 0) & self._has_tokens[rows]

    def _kept(self, keys: Keys, logps: NDArray[np.float64]) -> NDArray[np.float64]:
        """The log-probs to write: where the tokens alone were lacking, those that are there."""
        rows = self._find(keys)
        return np.where(rows >= 0, self._logps[rows], logps) if len(self._logps) else logps

    def _count(self, keys: PairKeys, missing: Sequence[int] | NDArray[np.int64]) -> None:
        self._misses += len(missing)
        self._hits += len(keys) - len(missing)

    def _load(self) -> None:
        """Reads the shards that came since the last time."""
        names = self._listing.look()
        if not self._listing.loaded:
            self._forget()
        try:
            self._grow(len(self._table) + self._listing.rows_of(names))
            for shard in self._listing.read(names):
                self._take(shard)
        except BaseException:  # half of a shard is none: an interrupt may come between two lines
            self._forget()
            raise

    def _forget(self) -> None:
        self._table, self._logps = _core.KeyTable(), np.empty(0)
        self._has_tokens = np.zeros(0, bool)
        self._listing.forget()

    def _grow(self, rows: int) -> None:
        """Makes room for so many rows in all."""
        if rows > len(self._logps):
            grown = np.empty(max(rows, len(self._logps) * 3 // 2))
            grown[: len(self._table)] = self._logps[: len(self._table)]
            self._logps = grown
            self._table.reserve(len(grown) - len(self._table))

    def _take(self, shard: shards.Shard) -> None:
        before = len(self._table)
        self._grow(before + len(shard.logps))
        rows = self._table.add(shard.keys)
        self._note_tokens(rows, shard.has_tokens)
        if len(self._table) == before + len(rows):  # all new, in their order
            self._logps[before : len(self._table)] = shard.logps
            return
        # A key is in two shards where its tokens came later, or somebody copied one.
        is_new = rows >= before
        self._logps[rows[is_new]] = shard.logps[is_new]

    def _tokens_of(
        self, wanted: _core.KeyTable
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Ragged]]:
        """Of each shard: the rows of ``wanted`` that it has, where, and all of its lists."""
        for name in sorted(self._listing.with_tokens):
            own, lists = shards.read_tokens(self.folder, name)
            rows = wanted.find(own)
            which = np.flatnonzero(rows >= 0)
            yield rows[which], which, lists

    def _note_tokens(self, rows: NDArray[np.int64], has_tokens: bool) -> None:
        if len(self._has_tokens) < len(self._logps) and (has_tokens or len(self._has_tokens)):
            self._has_tokens = np.append(
                self._has_tokens, np.zeros(len(self._logps) - len(self._has_tokens), bool)
            )
        if has_tokens:
            self._has_tokens[rows] = True

    def _new(
        self, keys: PairKeys, whole: Keys, logps: NDArray[np.float64], tokens: bool
    ) -> NDArray[np.int64]:
        """Which of the 2N sequences are not there yet, or lack their tokens; each once.

        Raises:
            RefLogpsError: one contradicts what is there, or another one.
        """
        rows = self._find(whole)
        there = np.flatnonzero(rows >= 0)
        keys.compare(there, logps[there], self._logps[rows[there]], "the store holds")
        absent = np.flatnonzero(~self._is_there(rows, tokens))
        numbers = _core.KeyTable().add(whole.reshape(-1, 2)[absent].ravel())
        first = absent[np.diff(np.maximum.accumulate(numbers), prepend=-1) > 0]
        if len(first) < len(absent):
            keys.compare(absent, logps[absent], logps[first][numbers], "an equal sequence has")
        return first

    def _write(
        self, folder: Folder, keys: Keys, logps: NDArray[np.float64], tokens: Ragged | None
    ) -> None:
        """Each shard is finished on its own; the manifest that names them comes last."""
        reference, halves = self.fingerprint.digest, keys.reshape(-1, 2)
        for part in shards.parts(len(logps), tokens):
            own = None if tokens is None else tokens.between(part.start, part.stop)
            folder.put(shards.writer(halves[part], logps[part], own, reference), lambda: None)
        self._load()
        folder.publish(self._listing.manifest(), None)

    def _said(self, keys: PairKeys, missing: NDArray[np.int64], how: str = "missing") -> str:
        shown = ", ".join(str(keys.index[i]) for i in missing[:SHOWN])
        more = ", ..." if len(missing) > SHOWN else ""
        listing = self._listing
        said = [f"{self.folder}: {len(missing)} of {len(keys)} pairs are {how}: {shown}{more}"]
        for names, what in (
            (listing.damaged, "damaged"),
            (listing.lost, "gone"),
            (listing.foreign, "of another reference"),
        ):
            if names:
                said.append(f"shards {what}: {', '.join(sorted(names)[:SHOWN])}")
        which = "pairs" if how == "missing" else "pairs, tokens=True"
        return "; ".join(said) + f"\nhint: score `store.missing({which})` and `put` them"


def _checked(values: Any, keys: PairKeys) -> NDArray[np.float64]:
    """(2N,) float64."""
    try:
        given = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TensorError(
            f"`values` must be an array of numbers, found {describe(values)}: {error}"
        ) from error
    if given.size == 0 and len(keys) == 0:
        return np.empty(0)
    if given.shape != (len(keys), 2) or given.dtype.kind not in "iuf":
        raise TensorError(f"`values` must be of shape {(len(keys), 2)}, found {describe(given)}")
    logps = np.ascontiguousarray(given, np.float64).reshape(-1)
    wrong = np.flatnonzero(~np.isfinite(logps))
    if len(wrong):
        raise RefLogpsError(
            f"{keys.name(wrong[0])}: expected a finite log-prob, found {logps[wrong[0]]}; "
            f"{len(wrong)} of {len(logps)} are not\nhint: look at the reference's logits"
        )
    return logps


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    """What is wrong with a folder as a :class:`RefLogpsError`."""
    try:
        with typed_errors(folder):
            yield
    except DataError as error:
        raise RefLogpsError(str(error)) from error
