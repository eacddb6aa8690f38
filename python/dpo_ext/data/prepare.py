"""`prepare`: files into a saved data set, in bounded memory."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Unpack

from dpo_ext.data.cache import cached
from dpo_ext.data.encode import Job, encode_into
from dpo_ext.data.nothing import check_prompts, no_pairs
from dpo_ext.data.options import Options, Paths, Progress, settings
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import DataError
from dpo_ext.extras import arrow
from dpo_ext.report import Report
from dpo_ext.store.folder import writing
from dpo_ext.store.manifest import current_file
from dpo_ext.store.write import save


def prepare(
    files: Paths,
    tokenizer: Tokenizer,
    out: str | PathLike[str],
    *,
    cache_dir: str | PathLike[str] | None = None,
    progress: Progress = False,
    allow_empty: bool = True,
    **options: Unpack[Options],
) -> Report:
    """Encodes files into a saved data set without holding it in memory.

    Same as ``PairDataset.from_files(files, tokenizer, **options).save(out)``, byte for byte, but
    what is held at any time are the offsets of the ids and some ten thousand pairs: ten million
    pairs take less than 2 GB. Ids grow on disk beside ``out`` first, so that it needs twice the
    room of the result. Stopped at any point, it leaves what ``out`` held before.

    Args:
        files: as in :meth:`PairDataset.from_files`.
        tokenizer: encodes text and renders messages.
        out: the folder, as in :meth:`PairDataset.save`.
        cache_dir: as in :meth:`PairDataset.from_files`: what stands there is copied, and what does
            not is encoded there first.
        progress: as in :meth:`PairDataset.from_files`.
        allow_empty: False refuses to replace what ``out`` holds when no pair is kept.
        options: those of :meth:`PairDataset.from_files`.

    Returns:
        Report: what became of the rows; it is saved, too.

    Raises:
        DataError, LimitExceeded, TokenizerError, OSError: as ``from_files`` and ``save``; with the
            reason ``no_pairs`` where none is kept and ``allow_empty`` is False.
        TypeError: an unknown option.  ModuleNotFoundError: pyarrow is not installed.
    """
    arrow("preparing a data set")
    job = Job.of(files, tokenizer, settings(options), progress)

    def check(report: Report) -> None:
        if report.kept == 0 and not allow_empty:
            raise no_pairs(job.files, report, f"; `{out}` is left as it was")
        check_prompts(job.files, report)

    if cache_dir is not None:
        try:
            examples = cached(job, cache_dir).examples
        except DataError as error:
            if error.reason != "no_pairs" or not allow_empty:
                raise
        else:
            save(examples, out)
            return examples.report
    with writing(Path(out)) as folder:
        folder.sweep(current_file(folder.path))
        return encode_into(folder, job, {}, check)
