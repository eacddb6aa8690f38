"""`Ways`: the ways in and out that data sets of pairs and of single completions share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

from dpo_ext import _core
from dpo_ext.data.cache import cached
from dpo_ext.data.encode import Job
from dpo_ext.data.files import feed_files, feed_table
from dpo_ext.data.nothing import check_pairs
from dpo_ext.data.options import Paths, Progress, Settings, row_hints
from dpo_ext.data.progress import Bar
from dpo_ext.data.tables import is_arrow, is_of_tables, rows_instead
from dpo_ext.data.tokenizer import Tokenizer, checked_tokenizer
from dpo_ext.extras import arrow
from dpo_ext.pairs import Examples
from dpo_ext.store.columns import Columns, record_batch
from dpo_ext.store.folder import damaged
from dpo_ext.store.read import Saved, opened
from dpo_ext.store.write import save


class Ways(Examples):
    """A data set that is read, saved and mapped.

    Attributes:
        STORED: what the store calls such examples.
    """

    STORED: ClassVar[type[Examples]]

    @staticmethod
    @abstractmethod
    def _settings(options: Mapping[str, Any]) -> Settings:
        """The options of a caller, checked."""

    @classmethod
    @abstractmethod
    def _from_raw(
        cls,
        raw: dict[str, Any],
        tokenizer: Tokenizer,
        checked: Settings,
        notes: Sequence[str] = (),
    ) -> Self:
        """What an encoder gave."""

    @classmethod
    @abstractmethod
    def _mapped(cls, saved: Saved) -> Any:
        """What is mapped, with all the ways of such a data set."""

    @classmethod
    def _of_files(
        cls,
        paths: Paths,
        tokenizer: Tokenizer,
        cache_dir: str | PathLike[str] | None,
        progress: Progress,
        options: Mapping[str, Any],
    ) -> Self:
        job = Job.of(paths, tokenizer, cls._settings(options), progress)
        if cache_dir is not None:
            return cls._mapped(cached(job, cache_dir))
        with Bar(progress, job.files) as callback, row_hints(job.settings):
            encoder = _core.PairEncoder(tokenizer._core, job.settings, callback)
            feed_files(encoder, job.files, job.settings)
        made = cls._from_raw(encoder.finish(), tokenizer, job.settings, job.notes)
        check_pairs(job.files, made.report, unpaired=job.settings.is_unpaired)
        return made

    @classmethod
    def _of_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Tokenizer,
        progress: Progress,
        options: Mapping[str, Any],
    ) -> Self:
        if isinstance(rows, str | bytes | Mapping):
            raise TypeError(f"`rows` must be an iterable of dicts, found {type(rows).__name__}")
        if is_arrow(rows) and not rows_instead(rows):
            return cls._of_arrow(rows, tokenizer, progress, options)
        checked = cls._settings(options)
        with Bar(progress, []) as callback, row_hints(checked):
            encoder = _core.PairEncoder(checked_tokenizer(tokenizer)._core, checked, callback)
            encoder.add_rows(rows, is_of_tables(rows) and not checked.keep_nulls)
        made = cls._from_raw(encoder.finish(), tokenizer, checked)
        check_pairs([], made.report, unpaired=checked.is_unpaired)
        return made

    @classmethod
    def _of_arrow(
        cls, table: Any, tokenizer: Tokenizer, progress: Progress, options: Mapping[str, Any]
    ) -> Self:
        made = cls._of_table(table, tokenizer, progress, options)
        check_pairs([], made.report, unpaired=cls._settings(options).is_unpaired)
        return made

    @classmethod
    def _of_table(
        cls, table: Any, tokenizer: Tokenizer, progress: Progress, options: Mapping[str, Any]
    ) -> Self:
        """The rows of a table, of which none need be kept."""
        checked = cls._settings(options)
        with Bar(progress, []) as callback, row_hints(checked):
            encoder = _core.PairEncoder(checked_tokenizer(tokenizer)._core, checked, callback)
            if rows_instead(table):
                encoder.add_rows(table, not checked.keep_nulls)
            else:
                feed_table(encoder, table, checked.limits)
        return cls._from_raw(encoder.finish(), tokenizer, checked)

    def save(self, folder: str | PathLike[str]) -> None:
        """Saves the data set as one Arrow IPC file and a manifest in ``folder``; needs pyarrow.

        The file is uncompressed. Its columns are those of :meth:`to_arrow`, and anything that reads
        Arrow files reads it. Who may read it, the umask says.

        A data set that stands in the folder is replaced as a whole: killed at any point, this
        leaves the old one or the new one, and who has the old one loaded keeps it. A folder with
        files of others is refused. Of two writers one waits for the other.

        Raises:
            DataError: the folder holds something else, or the disk is full or broken.
            ModuleNotFoundError: pyarrow is not installed.
            PermissionError, NotADirectoryError: as the system says.

        >>> import tempfile
        >>> from dpo_ext import PairDataset
        >>> pairs = PairDataset.from_ids([[1, 2]], [[3]], [[4, 5]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pairs.save(folder)
        ...     PairDataset.load(folder)[0]["rejected_ids"].tolist()
        [4, 5]
        """
        save(self, folder)

    @classmethod
    def load(cls, folder: str | PathLike[str], *, verify: bool = True) -> Self:
        """Maps what :meth:`save` wrote: ids are views of the file and cost memory only once used.

        Args:
            folder: the folder.
            verify: read the file once, about 1 GB/s a core, and compare its digest and the range
                of every id, so that no damage passes. False checks the manifest, the file's size
                and all offsets alone, so nothing is ever read out of bounds, but a bit that
                flipped in an id goes unseen: for files that were verified before.

        Raises:
            FileNotFoundError: nothing is saved there.
            DataError: the manifest or the file is damaged, of a newer format, or no data set of
                this kind: pairs and single completions are not each other.
        """
        return cls._mapped(opened(folder, verify=verify, kind=cls.STORED))

    def to_arrow(self) -> Any:
        """The data set as a pyarrow Table over the same ids: what :meth:`save` writes.

        Of pairs ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, and ``ref_chosen_logps``,
        ``ref_rejected_logps`` where they are known, ``chosen_weights`` and ``rejected_weights``
        where some are not 1. Of single completions ``prompt_ids``, ``completion_ids``, ``label``,
        and ``ref_logps``, ``ref_kl_logps`` and ``kl_completion`` where they are known. Then ``row``
        where rows were dropped, and the extra columns.

        Raises:
            DataError: an extra column has one of these names.
            ModuleNotFoundError: pyarrow is not installed.

        >>> from dpo_ext import PairDataset
        >>> PairDataset.from_ids([[1]], [[2]], [[3]]).to_arrow().column_names
        ['prompt_ids', 'chosen_ids', 'rejected_ids']
        """
        pa = arrow("to_arrow")
        return pa.Table.from_batches([record_batch(pa, Columns.of(self), {})])


class Mapped(Ways):
    """Examples over a mapped file. A pickle of them names the file, which a worker maps again."""

    PLAIN: ClassVar[type[Ways]]
    _place: tuple[str, str]
    _lists: tuple[Any, ...]

    @classmethod
    def of(cls, saved: Saved) -> Self:
        """A saved data set with all the ways of one."""
        made = cls.__new__(cls)
        vars(made).update(vars(saved.examples))
        lists = tuple(getattr(made, name) for name in cls._names())
        vars(made).update(_place=(saved.folder, saved.name), _lists=lists)
        return made

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return (*cls.IDS, *cls.WEIGHTS.values())

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(vars(self))
        # Cheap to count again, or in the manifest.
        for name in ("longest", "tokens", "_contents"):
            state.pop(name, None)
        place, lists = state.pop("_place"), state.pop("_lists")
        names = self._names()
        if any(state[name] is not ragged for name, ragged in zip(names, lists, strict=True)):
            return _unmapped, (self.PLAIN,), state
        rest = {k: v for k, v in state.items() if k not in names}
        return _again, (type(self), *place), rest


def _unmapped(plain: type[Ways]) -> Ways:
    return plain.__new__(plain)


def _again(kind: type[Mapped], folder: str, name: str) -> Mapped:
    """Maps the file that another process has mapped."""
    saved = opened(folder, verify=False, kind=kind.STORED)
    if saved.name != name:
        raise damaged(Path(folder), "the data set was replaced since it was loaded")
    return kind.of(saved)
