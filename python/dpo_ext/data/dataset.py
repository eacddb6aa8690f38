"""`PairDataset`: preference pairs as token ids, from files, rows or ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from dpo_ext import _core
from dpo_ext.data.options import Options, Paths, Progress, Settings, settings
from dpo_ext.data.shards import check_tokenizer, is_of_others, mapped_shards
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.data.ways import Mapped, Ways
from dpo_ext.errors import DataError
from dpo_ext.layout.batch import Layout
from dpo_ext.layout.fill import weights_of
from dpo_ext.layout.plan import BatchPlan
from dpo_ext.pairs import WEIGHTS, Pairs, Ragged, weighed
from dpo_ext.report import Report
from dpo_ext.store.folder import locks
from dpo_ext.store.read import Saved

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class PairDataset(Ways, Pairs):
    """Preference pairs as token ids, with a report of what became of every row.

    Rows hold ``prompt``, ``chosen``, ``rejected`` as strings or as lists of messages (``prompt``
    may be missing: it is then the common start of both sides), or ``prompt_ids``, ``chosen_ids``,
    ``rejected_ids``. Optional are ``tools``, ``chat_template_kwargs``, ``ref_chosen_logps`` with
    ``ref_rejected_logps``, and ``chosen_weights`` and ``rejected_weights``: a weight for each id,
    or spans ``[start, end, weight]`` of characters, which messages have in a key ``weights``. Other
    fields are ignored unless ``columns`` names them.

    ``pairs[i]`` is a dict of three int32 arrays, the float32 weights of both completions if some
    are not 1, and the values of the extra columns. Construct with
    :meth:`from_files`, :meth:`from_rows`, :meth:`from_arrow` or :meth:`from_ids`.

    Attributes:
        prompt_ids, chosen_ids, rejected_ids: :class:`Ragged`; a completion does not repeat its
            prompt.
        chosen_weights, rejected_weights: :class:`Ragged` of float32, a factor of each completion
            token's log-prob, which batches bring to their score tables; both None where each is 1.
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

    STORED = Pairs
    _settings = staticmethod(settings)

    @property
    def _kind(self) -> type[PairDataset]:
        return PairDataset

    @classmethod
    def from_files(
        cls,
        paths: Paths,
        tokenizer: Tokenizer,
        *,
        cache_dir: str | PathLike[str] | None = None,
        progress: Progress = False,
        **options: Unpack[Options],
    ) -> Self:
        """Reads JSONL and JSON arrays, plain, gzip or zstd (all members, all frames), in Rust and
        without the GIL; and CSV, TSV, Parquet, Arrow files and streams, and folders of
        ``save_to_disk``, through pyarrow.

        Args:
            paths: a file, a folder of ``save_to_disk``, a glob (sorted, hidden files left out), or
                several of them, of any kinds; no file twice. Another folder stands for the files
                in it whose names end in ``.jsonl`` or ``.ndjson``, plain, ``.gz`` or ``.zst``,
                ``.parquet``, ``.arrow`` or ``.feather``: of one kind and one split, sorted, none
                of folders below it; what else is there, the report says.
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
                input, such as a damaged gzip file, a page in HTML or an array without its end, is
                always raised.
            special_tokens_in_text: ``special``: text that spells a control token (a special one, or
                one that the template writes) is the token, as in transformers; ``text``: nothing
                that a row says becomes one, so that data cannot forge a turn (a row that would
                needs the engine ``bpe``, and is bad where the template changes what it spells);
                ``error``: such a row is bad. A spelling is counted whatever the rule.
            prompt_key, chosen_key, rejected_key: other names of the fields. A prompt named here
                must be in every row.
            columns: further fields to carry: numbers, booleans or strings, of one kind in all rows.
            ignore_columns: fields that count as missing, though a layout has them.
            layout_of_rows: how every row says its prompt and sides, by a name of the table in
                docs/rows.md; None to find it for each row. ``completions`` is for pairs that have
                no prompt at all, which other layouts refuse.
            images: ``error``: a row with a picture, a film or a sound is bad, in a part of a
                message or in a column; ``ignore``: its text alone is read, and it is counted.
            on_useless: ``drop``: pairs that teach no preference, as a side is blank or both are the
                same, are dropped and counted; ``keep``: they are kept, as TRL keeps them.
            keep_nulls: keep the keys of Arrow structs that hold null. They mostly are there because
                another row has them, and templates print them, so by default they are not.
            chat_template_kwargs: variables of the chat template for all rows; those of a row win.
                One that no template reads is an error.
            empty_think: where a block ``<think></think>`` belongs that the template puts before an
                answer without thoughts: to the ``completion``, as printed, or to the ``prompt``, as
                generation has it with thinking turned off.
            train_on: which tokens of a completion are scored; the others weigh 0. ``completion``
                all of them; ``last`` those of the assistant's last turn; ``assistant`` those of all
                its turns, and none of what a user or a tool says between them. A turn is what
                stands behind the start of an answer, to the end-of-turn marker; or what the
                template's ``{% generation %}`` tags enclose. A row whose turns cannot be told apart
                is bad (``unknown_turns``).
            now: the time that templates see; None for the time of the call.
            limits: :class:`Limits`.
            threads: number of threads; by default ``RAYON_NUM_THREADS``, else what affinity and
                cgroup allow.
            progress: True for a line in a terminal or notebook, with rows/s and the time left, and
                for one every ten seconds in a log; or a function of (bytes done, rows done) called
                a few times a second.
            cache_dir: a folder of yours, where the pairs are kept as saved data sets. They are
                encoded in bounded memory, whatever the size of the files, and mapped, as by
                :meth:`load`; the next call with the same contents, tokenizer and options maps them
                at once. A damaged one is encoded anew, and the report says so. Processes that want
                the same wait for the one that encodes. Needs pyarrow.

        Raises:
            DataError: a bad row or a bad input, with path, line and field; rows of which none is
                kept (``no_pairs``), whatever ``on_bad`` says.  LimitExceeded: a limit.
            FileNotFoundError, PermissionError: as the system says.
            TokenizerError: messages without a chat template.

        Numerics: ids and their order do not depend on ``threads``.
        """
        return cls._of_files(paths, tokenizer, cache_dir, progress, options)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        progress: Progress = False,
        **options: Unpack[Options],
    ) -> Self:
        """Same as :meth:`from_files` for any iterable of dicts, read once and in batches.

        In a :class:`DataError` ``path`` is None and ``line`` the 1-based row. A table or a data set
        of Hugging Face goes the way of :meth:`from_arrow`.
        """
        return cls._of_rows(rows, tokenizer, progress, options)

    @classmethod
    def from_arrow(
        cls,
        table: Any,
        tokenizer: Tokenizer,
        *,
        progress: Progress = False,
        **options: Unpack[Options],
    ) -> Self:
        """Encodes a table in place: no Python object a row, and text is not copied.

        Same as ``from_rows(table.to_pylist(), ...)`` without keys that are null, in threads and
        without the GIL.

        Args:
            table: anything with ``__arrow_c_stream__`` or ``__arrow_c_array__``: a pyarrow Table,
                RecordBatch or RecordBatchReader, a DataFrame of polars or pandas, a DuckDB
                relation; or a ``datasets.Dataset`` or ``IterableDataset``. Strings, lists of
                messages as structs, ids as lists of whole numbers; ``tools`` may be a list or a
                JSON string. Dictionaries and views are decoded, some rows at a time. A key of a
                struct that is null counts as missing, unless ``keep_nulls``; a map is a dict.

        Raises:
            DataError: as :meth:`from_files`, ``path`` None and ``line`` the 1-based row; a type
                that no row can use is ``wrong_type``; buffers that contradict themselves are a bad
                input.
            ModuleNotFoundError: pyarrow is not installed.  TypeError: ``table`` is not one.
        """
        return cls._of_arrow(table, tokenizer, progress, options)

    @classmethod
    def from_ids(
        cls,
        prompt: Ragged | Sequence[Any],
        chosen: Ragged | Sequence[Any],
        rejected: Ragged | Sequence[Any],
        *,
        chosen_weights: Sequence[Any] | None = None,
        rejected_weights: Sequence[Any] | None = None,
        pad_id: int = 0,
        vocab_size: int | None = None,
    ) -> Self:
        """Pairs from ids that exist already, kept as they are: no truncation, no row dropped.

        Args:
            prompt, chosen, rejected: lists, arrays or :class:`Ragged`, n of each.
            chosen_weights, rejected_weights: n lists of numbers or booleans, one an id of each
                completion: factors of their log-probs. None for 1 each.
            pad_id: what batches are padded with.
            vocab_size: if known, ids must be below it.

        Raises:
            DataError: an id is negative or not below ``vocab_size``; weights are not one an id, or
                not finite.  TensorError: bad offsets.
            TypeError: weights are no numbers.  ValueError: the three differ in length.
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
                ragged = ids.contiguous() if isinstance(ids, Ragged) else Ragged.from_lists(ids)
            except (TypeError, ValueError, OverflowError) as error:
                raise DataError(f"`{name}`: {error}", field=name, reason="bad_ids") from error
            _core.check_ids(name, ragged.values, ragged.offsets, vocab_size)
            columns.append(ragged)
        n = lengths["prompt_ids"]
        given = (chosen_weights, rejected_weights)
        weights = [
            None if lists is None else weights_of(name, lists, ids)
            for name, lists, ids in zip(WEIGHTS, given, columns[1:], strict=True)
        ]
        chosen_own, rejected_own = weighed(columns[1:], weights)
        return cls(
            *columns,
            report=Report(n, n),
            pad_id=pad_id,
            vocab_size=vocab_size,
            chosen_weights=chosen_own,
            rejected_weights=rejected_own,
        )

    @classmethod
    def _from_raw(
        cls,
        raw: dict[str, Any],
        tokenizer: Tokenizer,
        checked: Settings,
        notes: Sequence[str] = (),
    ) -> Self:
        known = raw["kept"] > 0 and raw["with_ref"] == raw["kept"]
        chosen, rejected = Ragged(*raw["chosen"]), Ragged(*raw["rejected"])
        weights = raw["weights"]
        return cls(
            Ragged(*raw["prompt"]),
            chosen,
            rejected,
            chosen_weights=None if weights is None else Ragged(weights[0], chosen.offsets),
            rejected_weights=None if weights is None else Ragged(weights[1], rejected.offsets),
            report=Report.of(raw, (*notes, *tokenizer.notes)),
            pad_id=tokenizer.pad_id if tokenizer.pad_id is not None else 0,
            vocab_size=tokenizer.vocab_size,
            ref_logps=raw["ref_logps"].reshape(-1, 2) if known else None,
            rows=raw["rows"],
            columns=dict(zip(checked.columns, raw["columns"], strict=True)),
        )

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        *,
        verify: bool = True,
        tokenizer: Tokenizer | None = None,
        cache_dir: str | PathLike[str] | None = None,
    ) -> Self:
        """Maps what :meth:`save` wrote, or a folder of shards of ids: ids are views of the file and
        cost memory only once used.

        Shards are Parquet or Arrow files with ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, and
        perhaps reference log-probs, weights and extra columns, as a job of Ray, Spark or
        ``datasets`` writes them with :func:`dpo_ext.arrow.encode_table`. Sorted by name they are
        converted once, in bounded memory, to the form that is mapped; the next call with the same
        bytes maps it at once. ``rows`` counts through all of them; a column ``row`` is not read.

        Args:
            folder: the folder.
            verify: read the mapped file once, about 1 GB/s a core, and compare its digest and the
                range of every id, so that no damage passes. False checks the manifest, the file's
                size and all offsets alone, so nothing is ever read out of bounds, but a bit that
                flipped in an id goes unseen: for files that were verified before.
            tokenizer: whose ids these must be. For shards by default what ``encode_table`` says in
                them; where nobody says it, batches are padded with 0 and ids not checked against a
                vocabulary, and the report notes it.
            cache_dir: a folder of yours for what shards are converted to; by default ``.mapped`` in
                ``folder``.

        Raises:
            FileNotFoundError: nothing is saved there.
            DataError: the manifest or the file is damaged, of a newer format, or no data set of
                pairs; the ids are not of ``tokenizer``; the folder holds other files; shards are
                damaged, or differ in their columns or in their tokenizer.
            ValueError: ``cache_dir`` for a folder that :meth:`save` wrote.
        """
        path = Path(folder)
        locks(path)
        if is_of_others(path):
            return cls._mapped(
                mapped_shards(path, tokenizer=tokenizer, cache_dir=cache_dir, verify=verify)
            )
        loaded = super().load(path, verify=verify)
        if cache_dir is not None:
            raise ValueError(f"`cache_dir` is for a folder of shards, {path} is a saved data set")
        if tokenizer is not None:
            check_tokenizer(path, loaded, tokenizer)
        return loaded

    @classmethod
    def _mapped(cls, saved: Saved) -> Any:
        return MappedPairs.of(saved)

    def with_ref_logps(self, values: ArrayLike) -> Self:
        """The same pairs, with log-probs under the reference, (n, 2), chosen then rejected, on
        every batch.

        Raises:
            ValueError: the shape differs, or a value is not finite in float32.
        """
        ref_logps = np.array(values, np.float64)
        if ref_logps.shape != (len(self), 2):
            raise ValueError(
                f"`values` must have the shape {(len(self), 2)}, found {ref_logps.shape}"
            )
        finite = (np.abs(ref_logps) <= np.finfo(np.float32).max).all(axis=1)
        if not finite.all():
            worst = int(np.argmin(finite))
            raise ValueError(
                f"`values` must be finite in float32, found {ref_logps[worst]} at pair {worst}"
            )
        return self._made(self.prompt_ids, self.chosen_ids, self.rejected_ids, ref_logps=ref_logps)

    def plan(
        self,
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
            token_weights: ``{"chosen": lists, "rejected": lists}``, a factor of each completion
                token's log-prob, beside those of the data set; see :class:`BatchPlan`.

        Raises:
            ValueError: an unknown layout, or a scalar out of range.
            TypeError, DataError: ``token_weights`` are no numbers, or not one a token.
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
            token_weights=token_weights,
        )


def pairs_of_table(table: Any, tokenizer: Tokenizer, **options: Any) -> PairDataset:
    """:meth:`PairDataset.from_arrow` of one batch of a table, of which no row need be kept."""
    return PairDataset._of_table(table, tokenizer, False, options)  # noqa: SLF001 - of its base


class MappedPairs(Mapped, PairDataset):
    """Pairs over a mapped file."""

    PLAIN = PairDataset
