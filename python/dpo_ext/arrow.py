"""`encode_table`: rows of an Arrow table to token ids, inside anybody's data pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpo_ext.data.dataset import pairs_of_table
from dpo_ext.extras import arrow
from dpo_ext.pairs import WEIGHTS, ones
from dpo_ext.report import REPORT_KEY, Report
from dpo_ext.store.columns import Columns, record_batch
from dpo_ext.store.manifest import FACTS_KEY, ROW

if TYPE_CHECKING:
    from dpo_ext.data.tokenizer import Tokenizer

KEY = "weights"  # of a message, whose content they weigh


def encode_table(table: Any, tokenizer: Tokenizer, **options: Any) -> Any:
    """Encodes the rows of a table: a pure function of Arrow data, for one batch of a pipeline.

    Same as ``PairDataset.from_arrow(table, tokenizer, **options)``, as a table. It goes
    into the map of Hugging Face ``datasets`` (``Dataset`` and ``IterableDataset``), of Ray Data
    (``batch_format="pyarrow"``) and of Spark (``mapInArrow``, batch by batch)::

        ds.with_format("arrow").map(
            lambda table: encode_table(table, tokenizer, max_length=2048), batched=True
        )

    What is not asked for with ``columns`` does not come out of it.
    The tokenizer pickles to stable bytes, so the cache of ``datasets`` is hit by the next run, and
    workers of any kind receive it. That cache knows nothing of the clock: where a template prints
    the date, give ``now=`` a moment of that day, made outside of the function. Where many workers
    share a machine, give ``threads=1``.

    Args:
        table: a pyarrow Table or RecordBatch, or anything with ``__arrow_c_stream__`` or
            ``__arrow_c_array__``; strings of any Arrow type.
        tokenizer: encodes text and renders messages.
        options: those of :meth:`PairDataset.from_arrow`.

    Returns:
        A RecordBatch for a RecordBatch, else a Table, with ``prompt_ids``, ``chosen_ids`` and
        ``rejected_ids`` (list<int32>, or large_list beyond 2^31 ids), ``ref_chosen_logps`` and
        ``ref_rejected_logps`` (double) if all rows have them, ``chosen_weights`` and
        ``rejected_weights`` (list<float>) if ``train_on`` or a column of ``table`` may weigh
        tokens, and the extra ``columns``. With
        ``on_bad="skip"`` it has fewer rows than ``table``, or none. The metadata of its schema
        carries the report under ``dpo_ext.report``; see :func:`report_of`. Written as Parquet or
        Arrow files, such tables are shards that :meth:`PairDataset.load` maps.

    Raises:
        DataError, LimitExceeded, TokenizerError: as ``from_arrow``; ``line`` is the 1-based row of
            this table.
        ModuleNotFoundError: pyarrow is not installed.
    """
    pa = arrow("encode_table")
    pairs = pairs_of_table(table, tokenizer, **options)
    columns = Columns.of(pairs)
    # A number among the rows of one batch means nothing in what the pipeline makes of it.
    columns.numbers.pop(ROW, None)
    if not pairs.weights and _may_weigh(pa, table, options):
        # Every batch of a pipeline has the same columns.
        sides = pairs.WEIGHTS.items()
        columns.lists |= {name: ones(getattr(pairs, ids)) for ids, name in sides}
    facts = {"pad_id": pairs.pad_id, "vocab_size": pairs.vocab_size}
    report = json.dumps(pairs.report.to_dict())
    batch = record_batch(pa, columns, {REPORT_KEY.decode(): report, FACTS_KEY: json.dumps(facts)})
    return batch if isinstance(table, pa.RecordBatch) else pa.Table.from_batches([batch])


def _may_weigh(pa: Any, table: Any, options: Mapping[str, Any]) -> bool:
    """Whether tokens of some batch may weigh other than 1, by what all batches share."""
    if options.get("train_on", "completion") != "completion":
        return True
    schema = getattr(table, "schema", None)
    if not isinstance(schema, pa.Schema):
        return False
    read = [name for name in schema.names if name not in options.get("ignore_columns", ())]
    return any(name in WEIGHTS or _weighs(pa, schema.field(name).type) for name in read)


def _weighs(pa: Any, kind: Any) -> bool:
    """Whether messages of an Arrow type have a key for the weights of their contents."""
    if pa.types.is_struct(kind):
        return any(field.name == KEY or _weighs(pa, field.type) for field in kind)
    has_items = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return has_items and _weighs(pa, kind.value_type)


def report_of(*tables: Any) -> Report:
    """What became of the rows of all tables that :func:`encode_table` gave, in their order.

    Args:
        tables: Tables, RecordBatches or Schemas. Joining tables keeps the metadata of the first
            alone, and ``datasets`` keeps none, so ask before that.

    Raises:
        ValueError: one of them carries no report.
    """
    return Report.merged(map(_report, tables))


def _report(table: Any) -> Report:
    metadata = getattr(table, "schema", table).metadata or {}
    if REPORT_KEY not in metadata:
        raise ValueError(f"expected a table of encode_table, found none of {REPORT_KEY.decode()!r}")
    return Report.from_dict(json.loads(metadata[REPORT_KEY]))
