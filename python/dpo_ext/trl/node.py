"""Encoded pairs once a node: one process makes them, all of its processes map the same file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from dpo_ext.data.dataset import PairDataset

SMALL = 1 << 24
"""Tokens that a single process keeps in memory: 64 MB."""


def once_a_node(make: Callable[[], PairDataset], key: str) -> PairDataset:
    """``make()``, called by the first process of each node, and mapped from a file by all of them.

    The file is unlinked as soon as it is mapped: it leaves nothing behind, and its memory is the
    page cache's. An error of ``make`` is raised by every process. A process with another ``key``,
    the fingerprint of its data, makes its own.
    """
    state = PartialState()
    if state.num_processes == 1:
        pairs = make()
        return pairs if int(pairs.tokens.sum()) <= SMALL else _mapped(pairs)
    folder, error = _saved(make) if state.is_local_main_process else (None, None)
    told = gather_object([(folder, key, error)])
    try:
        failed = [error for _, _, error in told if error is not None]
        if failed:
            raise failed[0]
        # Names of `mkdtemp` are random: what another node made is not found here.
        here = [made for made, its, _ in told if made and its == key and Path(made).is_dir()]
        pairs = PairDataset.load(here[0], verify=False) if here else make()
    finally:
        state.wait_for_everyone()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return pairs


def _saved(make: Callable[[], PairDataset]) -> tuple[str | None, Exception | None]:
    """The folder of what was made, or why there is none, which the other processes wait to hear."""
    try:
        pairs = make()
        folder = tempfile.mkdtemp(prefix="dpo_ext-")
        pairs.save(folder)
    except Exception as error:
        return None, error
    return folder, None


def _mapped(pairs: PairDataset) -> PairDataset:
    with tempfile.TemporaryDirectory(prefix="dpo_ext-") as folder:
        pairs.save(folder)
        return PairDataset.load(folder, verify=False)
