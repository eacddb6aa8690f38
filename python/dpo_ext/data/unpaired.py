"""`UnpairedDataset`: single completions with labels as token ids, from files, rows or ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.options import Paths, Progress, Settings, UnpairedOptions, unpaired_settings
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.data.ways import Mapped, Ways
from dpo_ext.errors import DataError, describe
from dpo_ext.layout.unpaired import UnpairedLayout, UnpairedPlan
from dpo_ext.pairs import Ragged, Unpaired
from dpo_ext.report import Report
from dpo_ext.store.read import Saved

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# TRL unpairs a data set in parts of so many rows: their chosen sides, then their rejected ones.
TRLS_PART = 1000


class UnpairedDataset(Ways, Unpaired):
    """Single completions with a label each, as token ids, with a report of what became of every
    row: the data of KTO, BCO and APO-zero unpaired.

    Rows hold ``prompt``, ``completion`` and ``label``; prompt and completion are strings or lists
    of messages. In place of the two may stand a conversation whose last turn is the completion
    (``messages``, ``conversation``, ``conversations``), ``instruction`` and ``output``, ``query``
    and ``response``, or ``prompt_ids`` and ``completion_ids``. A label is a boolean, 0 or 1, or one
    of the words true, false, desirable, undesirable, chosen, rejected; another value, or none,
    makes a bad row. Optional are ``system``, ``tools``, ``chat_template_kwargs``.

    ``examples[i]`` is a dict of two int32 arrays, the label and the values of the extra columns.
    Construct with :meth:`from_files`, :meth:`from_rows`, :meth:`from_arrow`, :meth:`from_pairs` or
    :meth:`from_ids`. The attributes are those of :class:`Unpaired`.

    >>> examples = UnpairedDataset.from_ids([[1, 2], [6]], [[3, 4], [7]], [True, False])
    >>> batch = examples.plan(layout="padded", examples_per_batch=2, shuffle=False)[0]
    >>> batch.input_ids.tolist(), batch.kl.input_ids.tolist()
    ([[1, 2, 3, 4], [6, 7, 0, 0]], [[1, 2, 7], [6, 3, 4]])
    """

    STORED = Unpaired
    _settings = staticmethod(unpaired_settings)

    @property
    def _kind(self) -> type[UnpairedDataset]:
        return UnpairedDataset

    @classmethod
    def from_files(
        cls,
        paths: Paths,
        tokenizer: Tokenizer,
        *,
        cache_dir: str | PathLike[str] | None = None,
        progress: Progress = False,
        **options: Unpack[UnpairedOptions],
    ) -> Self:
        """Reads files of every kind that :meth:`PairDataset.from_files` reads, with its options.

        Args:
            paths, tokenizer, cache_dir, progress: as there.
            completion_key: the name of the completion's field, by default ``completion``.
            label_key: the name of the label's field, by default ``label``; ``kto_tag`` as
                LLaMA-Factory has it.
            truncation: as there, for one completion. With ``keep_start``, the default and TRL's
                rule, ``completion_ids`` are whole and batches cut them, since a completion behind
                another prompt has other room.
            boundary: as there; ``trl`` is the rule of TRL 1.16's KTOTrainer.
            on_useless: ``drop``: a blank completion is dropped and counted; ``keep``: it is kept,
                as TRL keeps it.

        Raises:
            DataError, LimitExceeded, TokenizerError, OSError: as there.
        """
        return cls._of_files(paths, tokenizer, cache_dir, progress, options)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        progress: Progress = False,
        **options: Unpack[UnpairedOptions],
    ) -> Self:
        """Same as :meth:`from_files` for any iterable of dicts; :meth:`PairDataset.from_rows`."""
        return cls._of_rows(rows, tokenizer, progress, options)

    @classmethod
    def from_arrow(
        cls,
        table: Any,
        tokenizer: Tokenizer,
        *,
        progress: Progress = False,
        **options: Unpack[UnpairedOptions],
    ) -> Self:
        """Encodes a table in place, as :meth:`PairDataset.from_arrow`: pyarrow, pandas, polars,
        DuckDB, ``datasets``.
        """
        return cls._of_arrow(table, tokenizer, progress, options)

    @classmethod
    def from_pairs(cls, pairs: PairDataset, *, max_length: int | None = None) -> Self:
        """Both sides of each pair: desirable and undesirable, in the order in which TRL unpairs a
        data set: the chosen sides of a thousand rows, then their rejected ones.

        Reference log-probs and extra columns come along, and ``rows``.

        Args:
            pairs: their ids are kept as they are; made with ``max_length=None`` they are whole.
            max_length: batches cut prompt and completion to so many ids, at the end: also those of
                a completion behind another prompt than its own, which no cut of the pairs knows.

        Raises:
            DataError: a prompt leaves no room for its completion.
            ValueError: ``max_length`` < 1, or tokens of the pairs have weights, which single
                completions have not.

        >>> pairs = PairDataset.from_ids([[1], [2]], [[3], [4]], [[5], [6]])
        >>> UnpairedDataset.from_pairs(pairs).labels.tolist()
        [True, True, False, False]
        """
        if pairs.weights:
            raise ValueError(
                "single completions have no weights of tokens, and these pairs have some\n"
                'hint: read the pairs with train_on="completion" and without fields of weights'
            )
        n = len(pairs)
        part = np.arange(n) // TRLS_PART
        # By part, then the side, then the row.
        every = np.tile(np.arange(n), 2)
        side = np.repeat([0, 1], n)
        order = np.lexsort((every, side, np.tile(part, 2)))
        index, side = every[order], side[order]
        both = Ragged.joined([pairs.chosen_ids, pairs.rejected_ids])
        reference = pairs.ref_logps
        report = pairs.report
        note = f"both sides of {n} pairs, each a single completion"
        made = cls(
            pairs.prompt_ids.select(index),
            both.select(index + side * n),
            labels=side == 0,
            report=Report(2 * n, 2 * n, notes=(*report.notes, note)),
            pad_id=pairs.pad_id,
            vocab_size=pairs.vocab_size,
            max_length=max_length,
            ref_logps=None if reference is None else reference[index, side],
            rows=pairs.rows[index],
            columns={name: values[index] for name, values in pairs.columns.items()},
        )
        _check_room(made)
        return made

    @classmethod
    def from_ids(
        cls,
        prompt: Ragged | Sequence[Any],
        completion: Ragged | Sequence[Any],
        labels: ArrayLike,
        *,
        max_length: int | None = None,
        pad_id: int = 0,
        vocab_size: int | None = None,
    ) -> Self:
        """Examples from ids that exist already, kept as they are.

        Args:
            prompt, completion: lists, arrays or :class:`Ragged`, n of each.
            labels: (n,) booleans, or 0 and 1.
            max_length: batches cut prompt and completion to so many ids, at the end.
            pad_id: what batches are padded with.
            vocab_size: if known, ids must be below it.

        Raises:
            DataError: an id is negative or not below ``vocab_size``, a label is neither 0 nor 1, or
                a prompt leaves no room for its completion.
            ValueError: the three differ in length, or ``max_length`` < 1.
        """
        pairs = PairDataset.from_ids(
            prompt, completion, [[]] * len(prompt), pad_id=pad_id, vocab_size=vocab_size
        )
        made = cls(
            pairs.prompt_ids,
            pairs.chosen_ids,
            labels=_labels(labels, len(pairs)),
            report=pairs.report,
            pad_id=pad_id,
            vocab_size=vocab_size,
            max_length=max_length,
        )
        _check_room(made)
        return made

    @classmethod
    def _from_raw(
        cls,
        raw: dict[str, Any],
        tokenizer: Tokenizer,
        checked: Settings,
        notes: Sequence[str] = (),
    ) -> Self:
        labels, *columns = raw["columns"]
        return cls(
            Ragged(*raw["prompt"]),
            Ragged(*raw["chosen"]),
            labels=np.asarray(labels, np.bool_),
            report=Report.of({**raw, "with_ref": 0}, (*notes, *tokenizer.notes)),
            pad_id=tokenizer.pad_id if tokenizer.pad_id is not None else 0,
            vocab_size=tokenizer.vocab_size,
            max_length=checked.max_length,
            truncation=checked.truncation,
            rows=raw["rows"],
            columns=dict(zip(checked.columns[1:], columns, strict=True)),
        )

    @classmethod
    def _mapped(cls, saved: Saved) -> Any:
        return MappedUnpaired.of(saved)

    def with_ref_logps(
        self,
        values: ArrayLike,
        *,
        kl: ArrayLike | None = None,
        kl_completions: ArrayLike | None = None,
    ) -> Self:
        """The same examples, with log-probs under the reference on every batch.

        Args:
            values: (n,), of the completions: ``batch.ref_logps``.
            kl: (n,), of the mismatched completion behind each prompt: ``batch.kl.ref_logps``. Only
                for a plan that pairs them again in the same way: not shuffled, one batch size.
            kl_completions: (n,), whose completion each of ``kl`` was, as ``batch.kl`` says in
                ``completion_index``: a batch with another one is an error. Needed with ``kl``.

        Raises:
            ValueError: a shape differs, a value is not finite, or one of ``kl`` and
                ``kl_completions`` is missing.
        """
        if (kl is None) != (kl_completions is None):
            raise ValueError(
                "`kl` and `kl_completions` must both be given, or none\n"
                "hint: kl_completions[batch.kl.pair_index] = batch.kl.completion_index"
            )
        known = {"values": values} if kl is None else {"values": values, "kl": kl}
        arrays = {name: self._reference(name, given) for name, given in known.items()}
        whose = None
        if kl_completions is not None:
            whose = np.array(kl_completions)
            inside = whose.dtype.kind in "iu" and whose.shape == (len(self),)
            if not inside or (whose < 0).any() or (whose >= len(self)).any():
                raise ValueError(
                    f"`kl_completions` must be {len(self)} whole numbers in 0..{len(self)}, found "
                    f"{describe(whose)}"
                )
        return self._made(
            self.prompt_ids,
            self.completion_ids,
            ref_logps=arrays["values"],
            ref_kl_logps=arrays.get("kl"),
            kl_completions=whose,
        )

    def _reference(self, name: str, given: Any) -> NDArray[np.float64]:
        values = np.array(given, np.float64)
        if values.shape != (len(self),):
            raise ValueError(f"`{name}` must have the shape {(len(self),)}, found {values.shape}")
        if not np.isfinite(values).all():
            worst = int(np.argmin(np.isfinite(values)))
            raise ValueError(f"`{name}` must be finite, found {values[worst]} at example {worst}")
        return values

    def plan(
        self,
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
    ) -> UnpairedPlan:
        """The batches of one epoch for one rank; see :class:`UnpairedPlan`.

        Args:
            layout: ``"padded"`` or ``"packed"``.
            examples_per_batch: N of every batch but perhaps the last.
            tokens_per_batch: instead, at most this many slots of completions with their prompts.
            kl: False for losses without the KL term: ``batch.kl`` is None.
            seed, epoch, rank, world_size, shuffle, drop_last, pad_to_multiple_of, bin_length: as
                :meth:`PairDataset.plan`. ``shuffle=False`` is TRL's order.

        Raises:
            ValueError: an unknown layout, a scalar out of range, one example a batch with ``kl``.
            DataError: an example needs more slots than ``tokens_per_batch`` or ``bin_length``.
        """
        return UnpairedPlan(
            self,
            layout=layout,
            examples_per_batch=examples_per_batch,
            tokens_per_batch=tokens_per_batch,
            kl=kl,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            drop_last=drop_last,
            pad_to_multiple_of=pad_to_multiple_of,
            bin_length=bin_length,
        )


def _check_room(made: Unpaired) -> None:
    """That each completion keeps a token that another one precedes."""
    if made.max_length is not None and made.max_length < 1:
        raise ValueError(f"`max_length` must be at least 1 or None, found {made.max_length}")
    every = np.arange(len(made))
    scored = made.scored(every, every) - (made.prompt_ids.lengths == 0)
    if (scored < 1).any():
        worst = int(np.argmax(scored < 1))
        raise DataError(
            f"example {worst}: expected a completion with a token that another one precedes, "
            f"found none (the prompt has {made.prompt_ids.lengths[worst]} ids, `max_length` is "
            f"{made.max_length})",
            field="completion",
            reason="no_completion_tokens",
        )


def _labels(given: Any, n: int) -> NDArray[np.bool_]:
    labels = np.asarray(given)
    if labels.shape != (n,):
        raise ValueError(f"`labels` must have the shape {(n,)}, found {labels.shape}")
    right = np.zeros(n, bool)
    if labels.dtype.kind in "biuf":
        right = (labels == 0) | (labels == 1)
    if not right.all():
        worst = int(np.argmin(right))
        raise DataError(
            f"example {worst}, `labels`: expected a boolean, 0 or 1, found {labels[worst]!r}",
            field="labels",
            reason="wrong_type",
        )
    return labels.astype(np.bool_)


class MappedUnpaired(Mapped, UnpairedDataset):
    """Single completions over a mapped file."""

    PLAIN = UnpairedDataset
