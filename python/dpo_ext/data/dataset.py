"""`PairDataset`: preference pairs as token ids, from files, rows or ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ext import _core
from dpo_ext.layout.batch import Ragged
from dpo_ext.data.tables import is_arrow, rows_instead
from dpo_ext.errors import DataError
from dpo_ext.data.options import (
    Boundary,
    Limits,
    OnBad,
    Paths,
    Progress,
    SpecialTokensInText,
    Truncation,
    settings,
)
from dpo_ext.layout.plan import BatchPlan
from dpo_ext.report import Example, Report
from dpo_ext.data.files import Bar, feed_files, feed_table, opened_up
from dpo_ext.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class PairDataset(Sequence):
    """Preference pairs as token ids, with a report of what became of every row.

    Rows hold ``prompt``, ``chosen``, ``rejected`` as strings or as lists of messages (``prompt``
    may be missing: it is then the common start of both sides), or ``prompt_ids``, ``chosen_ids``,
    ``rejected_ids``. Optional are ``tools``, ``chat_template_kwargs``, and ``ref_chosen_logps``
    with ``ref_rejected_logps``. Other fields are ignored unless ``columns`` names them.

    ``pairs[i]`` is a dict of three int32 arrays and the values of the extra columns. Construct with
    :meth:`from_files`, :meth:`from_rows`, :meth:`from_arrow` or :meth:`from_ids`.

    Attributes:
        prompt_ids, chosen_ids, rejected_ids: :class:`Ragged`; a completion does not repeat its
            prompt.
        report: :class:`Report`.
        ref_logps: (n, 2) float64 or None, chosen then rejected, under the reference.
        rows: (n,) int64, the 0-based number of each pair's row among the rows read.
        columns: the extra columns that were asked for, by name: (n,) int64 if all are whole
            numbers, else float64; (n,) bool; or (n,) object, strings.
        pad_id: what batches are padded with.
        vocab_size: every id is below it; None if unknown.

    >>> pairs = PairDataset.from_ids([[1, 2]], [[3]], [[4, 5]])
    >>> pairs[0]["rejected_ids"].tolist()
    [4, 5]
    >>> pairs.plan(layout="padded", pairs_per_batch=1)[0].input_ids.tolist()
    [[1, 2, 3, 0], [1, 2, 4, 5]]
    """

    def __init__(
        self,
        prompt_ids: Ragged,
        chosen_ids: Ragged,
        rejected_ids: Ragged,
        *,
        report: Report,
        pad_id: int,
        vocab_size: int | None,
        ref_logps: NDArray[np.float64] | None = None,
        rows: NDArray[np.int64] | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.chosen_ids = chosen_ids
        self.rejected_ids = rejected_ids
        self.report = report
        self.pad_id = pad_id
        self.vocab_size = vocab_size
        self.ref_logps = ref_logps
        self.rows = np.arange(len(prompt_ids)) if rows is None else rows
        self.columns = {
            name: _column(name, values, len(prompt_ids)) for name, values in (columns or {}).items()
        }

    @classmethod
    def from_files(
        cls,
        paths: Paths,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = 1024,
        truncation: Truncation = "keep_start",
        boundary: Boundary = "joint",
        on_bad: OnBad = "error",
        special_tokens_in_text: SpecialTokensInText = "special",
        prompt_key: str | None = None,
        chosen_key: str | None = None,
        rejected_key: str | None = None,
        columns: Sequence[str] = (),
        limits: Limits | None = None,
        threads: int | None = None,
        progress: Progress = False,
        cache_dir: str | PathLike[str] | None = None,
    ) -> PairDataset:
        """Reads JSONL, plain, gzip or zstd (all members, all frames), in Rust and without the GIL;
        and Parquet, Arrow files and streams, and folders of ``save_to_disk``, through pyarrow.

        Args:
            paths: a file, a folder of ``save_to_disk``, a glob (sorted, hidden files left out), or
                several of them, of any kinds; no file twice.
            tokenizer: encodes text and renders messages.
            max_length: longest side in tokens, prompt included; None for no bound.
            truncation: what happens beyond it, one decision a pair, so that both sides keep the
                same prompt. ``keep_start`` the first ids of each side; ``keep_end`` cuts the prompt
                from the left, the same on both sides, then completions from the left;
                ``keep_completions`` cuts the prompt from the left only as needed, then completions
                at their end; ``drop`` drops and counts the pair; ``error`` makes a bad row.
            boundary: where the prompt's ids end. ``joint``: prompt and completion are encoded as
                one text, and a token across the border belongs to the completion; ``separate``:
                they are encoded apart; ``trl``: TRL 1.16's rule, the common id prefix of the prompt
                alone and the whole text, the shorter one of both sides.
            on_bad: ``error`` raises at the first bad row, ``skip`` drops and counts it. A bad
                input, such as a damaged gzip or zstd file, is always raised.
            special_tokens_in_text: ``special``: text that spells a control token (a special one, or
                one that the template writes) is the token, as in transformers; ``text``: inside
                contents it stays text, so that data cannot forge a turn (engine ``bpe`` only);
                ``error``: such a row is bad. It is counted whatever the rule.
            prompt_key, chosen_key, rejected_key: other names of the fields. A prompt named here
                must be in every row.
            columns: further fields to carry: numbers, booleans or strings, of one kind in all rows.
            limits: :class:`Limits`.
            threads: number of threads; by default ``RAYON_NUM_THREADS``, else what affinity and
                cgroup allow.
            progress: True for a bar, or a function of (bytes done, rows done) called a few times a
                second.
            cache_dir: a folder of yours, where the pairs are kept as saved data sets. They are
                encoded in bounded memory, whatever the size of the files, and mapped, as by
                :meth:`load`; the next call with the same contents, tokenizer and options maps them
                at once. A damaged one is encoded anew, and the report says so. Processes that want
                the same wait for the one that encodes. Needs pyarrow.

        Raises:
            DataError: a bad row or a bad input, with path, line and field.  LimitExceeded: a limit.
            FileNotFoundError, PermissionError, IsADirectoryError: as the system says.
            TokenizerError: messages without a chat template.

        Numerics: ids and their order do not depend on ``threads``.
        """
        files = opened_up(paths)
        options = settings(locals())
        if cache_dir is not None:
            from dpo_ext.data import cache

            return cache.cached(files, _checked(tokenizer), options, cache_dir, progress)
        with Bar(progress, files) as callback:
            encoder = _core.PairEncoder(_checked(tokenizer)._core, options, callback)
            feed_files(encoder, files, options.limits)
        return cls._from_raw(encoder.finish(), tokenizer, options.columns)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        max_length: int | None = 1024,
        truncation: Truncation = "keep_start",
        boundary: Boundary = "joint",
        on_bad: OnBad = "error",
        special_tokens_in_text: SpecialTokensInText = "special",
        prompt_key: str | None = None,
        chosen_key: str | None = None,
        rejected_key: str | None = None,
        columns: Sequence[str] = (),
        limits: Limits | None = None,
        threads: int | None = None,
        progress: Progress = False,
    ) -> PairDataset:
        """Same as :meth:`from_files` for any iterable of dicts, read once and in batches.

        In a :class:`DataError` ``path`` is None and ``line`` the 1-based row. A table or a data set
        of Hugging Face goes the way of :meth:`from_arrow`.
        """
        if isinstance(rows, str | bytes | Mapping):
            raise TypeError(f"`rows` must be an iterable of dicts, found {type(rows).__name__}")
        options = settings(locals())
        with Bar(progress, []) as callback:
            encoder = _core.PairEncoder(_checked(tokenizer)._core, options, callback)
            if is_arrow(rows) and not rows_instead(rows):
                feed_table(encoder, rows, options.limits)
            else:
                encoder.add_rows(rows)
        return cls._from_raw(encoder.finish(), tokenizer, options.columns)

    @classmethod
    def from_arrow(
        cls,
        table: Any,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = 1024,
        truncation: Truncation = "keep_start",
        boundary: Boundary = "joint",
        on_bad: OnBad = "error",
        special_tokens_in_text: SpecialTokensInText = "special",
        prompt_key: str | None = None,
        chosen_key: str | None = None,
        rejected_key: str | None = None,
        columns: Sequence[str] = (),
        limits: Limits | None = None,
        threads: int | None = None,
        progress: Progress = False,
    ) -> PairDataset:
        """Encodes a table in place: no Python object a row, and text is not copied.

        Same as ``from_rows(table.to_pylist(), ...)``, in threads and without the GIL.

        Args:
            table: anything with ``__arrow_c_stream__`` or ``__arrow_c_array__``: a pyarrow Table,
                RecordBatch or RecordBatchReader, a DataFrame of polars or pandas, a DuckDB
                relation; or a ``datasets.Dataset`` or ``IterableDataset``. Strings, lists of
                messages as structs, ids as lists of whole numbers; ``tools`` may be a list or a
                JSON string. Dictionaries and views are decoded, some rows at a time. A null field
                of a struct stays a key with None, as TRL sees it; a map is a dict.

        Raises:
            DataError: as :meth:`from_files`, ``path`` None and ``line`` the 1-based row; a type
                that no row can use is ``wrong_type``; buffers that contradict themselves are a bad
                input.
            ModuleNotFoundError: pyarrow is not installed.  TypeError: ``table`` is not one.
        """
        options = settings(locals())
        with Bar(progress, []) as callback:
            encoder = _core.PairEncoder(_checked(tokenizer)._core, options, callback)
            if rows_instead(table):
                encoder.add_rows(table)
            else:
                feed_table(encoder, table, options.limits)
        return cls._from_raw(encoder.finish(), tokenizer, options.columns)

    @classmethod
    def from_ids(
        cls,
        prompt: Ragged | Sequence[Any],
        chosen: Ragged | Sequence[Any],
        rejected: Ragged | Sequence[Any],
        *,
        pad_id: int = 0,
        vocab_size: int | None = None,
    ) -> PairDataset:
        """Pairs from ids that exist already, kept as they are: no truncation, no row dropped.

        Args:
            prompt, chosen, rejected: lists, arrays or :class:`Ragged`, n of each.
            pad_id: what batches are padded with.
            vocab_size: if known, ids must be below it.

        Raises:
            DataError: an id is negative or not below ``vocab_size``.  TensorError: bad offsets.
            ValueError: the three differ in length.
        """
        lists = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        lengths = {name: len(ids) for name, ids in lists.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"`prompt`, `chosen` and `rejected` must have one length, found {lengths}"
            )
        if not 0 <= pad_id < 2**31:
            raise ValueError(f"`pad_id` must be in 0..2**31, found {pad_id}")
        columns = []
        for name, ids in lists.items():
            try:
                ragged = _contiguous(ids) if isinstance(ids, Ragged) else Ragged.from_lists(ids)
            except (TypeError, ValueError, OverflowError) as error:
                raise DataError(f"`{name}`: {error}", field=name, reason="bad_ids") from error
            _core.check_ids(name, ragged.values, ragged.offsets, vocab_size)
            columns.append(ragged)
        n = lengths["prompt_ids"]
        return cls(*columns, report=Report(n, n), pad_id=pad_id, vocab_size=vocab_size)

    @classmethod
    def _from_raw(
        cls, raw: dict[str, Any], tokenizer: Tokenizer, columns: Sequence[str] = ()
    ) -> PairDataset:
        kept, with_ref = raw["kept"], raw["with_ref"]
        notes = list(tokenizer.notes)
        ref_logps = None
        if kept and with_ref == kept:
            ref_logps = raw["ref_logps"].reshape(-1, 2)
        elif with_ref:
            notes.append(
                f"reference log-probs stand in {with_ref} of {kept} pairs and were not carried"
            )
        report = Report(
            read=raw["read"],
            kept=kept,
            dropped=raw["dropped"],
            warned=raw["warned"],
            first={
                name: Example(None if path is None else fspath(path), line, where, message)
                for name, (path, line, where, message) in raw["first"].items()
            },
            notes=tuple(notes),
            bytes=raw["bytes"],
        )
        return cls(
            Ragged(*raw["prompt"]),
            Ragged(*raw["chosen"]),
            Ragged(*raw["rejected"]),
            report=report,
            pad_id=tokenizer.pad_id if tokenizer.pad_id is not None else 0,
            vocab_size=tokenizer.vocab_size,
            ref_logps=ref_logps,
            rows=raw["rows"],
            columns=dict(zip(columns, raw["columns"], strict=True)),
        )

    def save(self, folder: str | PathLike[str]) -> None:
        """Saves the pairs as one Arrow IPC file and a manifest in ``folder``; needs pyarrow.

        The file is uncompressed, its columns have TRL's names: ``prompt_ids``, ``chosen_ids``,
        ``rejected_ids``, and ``ref_chosen_logps``, ``ref_rejected_logps`` where they are known.
        Anything that reads Arrow files reads it. A new folder is private to its owner (0700, files
        0600).

        A data set that stands in the folder is replaced as a whole: killed at any point, this
        leaves the old one or the new one, and who has the old one loaded keeps it. A folder with
        files of others is refused. Of two writers one waits for the other.

        Raises:
            DataError: the folder holds something else, or the disk is full or broken.
            ModuleNotFoundError: pyarrow is not installed.
            PermissionError, NotADirectoryError: as the system says.

        >>> import tempfile
        >>> pairs = PairDataset.from_ids([[1, 2]], [[3]], [[4, 5]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pairs.save(folder)
        ...     PairDataset.load(folder)[0]["rejected_ids"].tolist()
        [4, 5]
        """
        from dpo_ext.store import write as store

        store.save(self, folder)

    @classmethod
    def load(cls, folder: str | PathLike[str], *, verify: bool = True) -> PairDataset:
        """Maps what :meth:`save` wrote: ids are views of the file and cost memory only once used.

        Args:
            folder: the folder.
            verify: read the file once, about 1 GB/s a core, and compare its digest and the range
                of every id, so that no damage passes. False checks the manifest, the file's size
                and all offsets alone, so nothing is ever read out of bounds, but a bit that
                flipped in an id goes unseen: for files that were verified before.

        Raises:
            FileNotFoundError: nothing is saved there.
            DataError: the manifest or the file is damaged, of a newer format, or no data set.
        """
        from dpo_ext.store import write as store

        return store.load(folder, verify=verify)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return {
            "prompt_ids": self.prompt_ids[i],
            "chosen_ids": self.chosen_ids[i],
            "rejected_ids": self.rejected_ids[i],
            **{name: values[i] for name, values in self.columns.items()},
        }

    def __iter__(self) -> Iterator[dict[str, NDArray[np.int32]]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"PairDataset({len(self)} pairs)"

    @cached_property
    def longest(self) -> NDArray[np.int64]:
        """(n,) int64: tokens of the longer side of each pair, prompt included."""
        return self.prompt_ids.lengths + np.maximum(
            self.chosen_ids.lengths, self.rejected_ids.lengths
        )

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """(n,) int64: tokens of both sides of each pair, the prompt counted twice."""
        return 2 * self.prompt_ids.lengths + self.chosen_ids.lengths + self.rejected_ids.lengths

    def with_ref_logps(self, values: ArrayLike) -> PairDataset:
        """The same pairs, with log-probs under the reference, (n, 2), chosen then rejected, on
        every batch.

        Raises:
            ValueError: the shape differs, or a value is not finite.
        """
        ref_logps = np.array(values, np.float64)
        if ref_logps.shape != (len(self), 2):
            raise ValueError(
                f"`values` must have the shape {(len(self), 2)}, found {ref_logps.shape}"
            )
        finite = np.isfinite(ref_logps).all(axis=1)
        if not finite.all():
            worst = int(np.argmin(finite))
            raise ValueError(f"`values` must be finite, found {ref_logps[worst]} at pair {worst}")
        return PairDataset(
            self.prompt_ids,
            self.chosen_ids,
            self.rejected_ids,
            report=self.report,
            pad_id=self.pad_id,
            vocab_size=self.vocab_size,
            ref_logps=ref_logps,
            rows=self.rows,
            columns=self.columns,
        )

    def plan(
        self,
        *,
        layout: str,
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
    ) -> BatchPlan:
        """The batches of one epoch for one rank; see :class:`BatchPlan`.

        Args:
            layout: ``"padded"``, ``"packed"`` or ``"shared"``; see :class:`Batch`.
            pairs_per_batch: N of every batch but perhaps the last.
            tokens_per_batch: instead, at most this many slots, 2N * T with padding, filled greedily
                in order.
            seed, epoch: choose the order.
            rank, world_size: which share of the global list of batches.
            shuffle: False for the order of the data set.
            drop_last: leave out what does not fill the last round, instead of repeating pairs.
            pad_to_multiple_of: T is rounded up to a multiple.
            bin_length: slots of a packed or shared row, by default ``tokens_per_batch``;
                ``2 * max_length`` always suffices.

        Raises:
            ValueError: an unknown layout, or a scalar out of range.
            DataError: a pair needs more slots than ``tokens_per_batch`` or ``bin_length``.
        """
        return BatchPlan(
            self,
            layout=layout,
            pairs_per_batch=pairs_per_batch,
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


def _checked(tokenizer: Any) -> Tokenizer:
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"`tokenizer` must be a dpo_ext.Tokenizer, found {type(tokenizer).__name__}\n"
            "hint: use Tokenizer.from_pretrained(tokenizer)"
        )
    return tokenizer


def _column(name: str, values: Any, n: int) -> NDArray[Any]:
    """An extra column: numbers and booleans as they are, strings as objects."""
    column: NDArray[Any] = np.asarray(values)
    if column.dtype.kind not in "iufb":
        column = np.empty(len(values), object)
        column[:] = values
    if column.shape != (n,):
        raise ValueError(f"column `{name}` must have the shape {(n,)}, found {column.shape}")
    return column


def _contiguous(ragged: Ragged) -> Ragged:
    values = np.ascontiguousarray(ragged.values)
    if values.dtype != np.int32:
        raise TypeError(f"expected int32, found {values.dtype}")
    return Ragged(values, np.ascontiguousarray(ragged.offsets, np.int64))
