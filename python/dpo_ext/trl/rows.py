"""Rows of a data set as ids: encoded by us, beside what the rows had; and their lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable
from numpy.typing import NDArray
from trl.data_utils import extract_prompt

from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.options import Options
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import DataError
from dpo_ext.pairs import IDS, REFERENCE
from dpo_ext.report import Report
from dpo_ext.trl.node import once_a_node

_ROW = "dpo_ext_row"


def encoded(
    dataset: Dataset, encoder: Tokenizer, options: Options, name: str
) -> tuple[Dataset, Report]:
    """The rows that can be used, in their order, with their ids; and what became of all.

    Raises:
        DataError: none can be used; ``name`` says of which data set.
    """
    pairs = once_a_node(lambda: _pairs(dataset, encoder, options, name), fingerprint(dataset))
    if _ROW in pairs.columns:
        dataset = dataset.select(pairs.columns[_ROW])
    return _beside(dataset, pairs), pairs.report


def fingerprint(dataset: Dataset) -> str:
    """What `datasets` tells a data set by."""
    return dataset._fingerprint  # noqa: SLF001 - it has no public name


def _pairs(dataset: Dataset, encoder: Tokenizer, options: Options, name: str) -> PairDataset:
    """The pairs of a data set; where rows were dropped, with the numbers of the rest."""
    try:
        pairs = PairDataset.from_rows(dataset, encoder, **options)
    except DataError as error:
        if error.reason != "no_pairs":
            raise
        raise DataError(f"`{name}`: {error}", reason="no_pairs") from error
    if not len(pairs):
        raise DataError(f"`{name}`: there are no rows", reason="no_pairs")
    if not pairs.report.dropped:
        return pairs
    numbered = dataset.add_column(_ROW, np.arange(len(dataset)))
    again: Options = {**options, "columns": (_ROW,)}
    return PairDataset.from_rows(numbered, encoder, **again)


def _beside(dataset: Dataset, pairs: PairDataset) -> Dataset:
    """The data set with the pairs as columns: ids, weights, what the rows had of the reference."""
    columns: dict[str, pa.Array] = {}
    for name in IDS:
        ragged = getattr(pairs, name)
        columns[name] = pa.LargeListArray.from_arrays(ragged.offsets, ragged.values)
    for name, weights in pairs.weights.items():
        columns[name] = pa.LargeListArray.from_arrays(weights.offsets, weights.values)
    if pairs.ref_logps is not None:
        for index, name in enumerate(REFERENCE):
            columns[name] = pa.array(pairs.ref_logps[:, index].astype(np.float32))
    rest = dataset.remove_columns([name for name in dataset.column_names if name in columns])
    ids = Dataset(InMemoryTable(pa.table(columns)))
    return concatenate_datasets([rest, ids], axis=1) if rest.column_names else ids


def with_prompt(dataset: Dataset) -> Dataset:
    """Rows of implicit prompts with these in a column, as TRL has them: its callbacks that generate
    read ``prompt`` of the data to evaluate on.
    """
    has_sides = {"chosen", "rejected"} <= set(dataset.column_names)
    return dataset.map(extract_prompt) if has_sides else dataset


def lengths(dataset: Dataset) -> dict[str, NDArray[np.int64]]:
    """(n,) int64 of each column of ids: how many."""
    table = dataset.select_columns(list(IDS)).with_format("arrow")[:]
    return {name: _counted(table[name]) for name in IDS}


def _counted(column: Any) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = pc.list_value_length(column).to_numpy().astype(np.int64)
    return counts
