"""`dpo-ext ref-logps`: the log-probs of a reference into a store, on one process or under torchrun.

N pairs. The first rank alone reads and writes the store.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from dpo_ext.cli.models import check_dtype, device_of, loaded
from dpo_ext.cli.options import data_options
from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.nothing import no_pairs
from dpo_ext.data.options import Options
from dpo_ext.data.progress import counted, is_shown
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import DataError
from dpo_ext.extras import need
from dpo_ext.pairs import REFERENCE
from dpo_ext.reflogps import Fingerprint, ReferenceStore, fingerprint
from dpo_ext.store.folder import MANIFEST

LayoutChoice = Literal["auto", "padded", "packed", "shared"]
# Endings of an exported file; without one it is a folder of `PairDataset.save`.
PARQUET, ARROW = (".parquet",), (".arrow", ".ipc")
# The first rank may read the bytes of a large model from a slow disk meanwhile.
PATIENCE = timedelta(hours=4)


def fill_store(
    model_folder: str | PathLike[str],
    files: Sequence[str],
    store_folder: str | PathLike[str],
    tokenizer_folder: str | PathLike[str],
    *,
    layout: LayoutChoice,
    tokens_per_batch: int,
    pairs_per_shard: int,
    dtype: str,
    device: str,
    tokens: bool = False,
    name: str | None = None,
    columns_of: str | None = None,
    export: Path | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Puts the columns of ``columns_of`` into the store, scores the pairs of ``files`` that are
    missing, with ``tokens`` those of their tokens too, and writes ``export``; gives what
    ``--json`` writes, on the first rank.

    Raises:
        DataError: no pair can be read; a dtype or an ending that there is not; columns under no
            name, or none.
        RefLogpsError: the store is of another reference; see `ReferenceStore`.
    """
    need("torch", "`dpo-ext ref-logps`")
    need("transformers", "`dpo-ext ref-logps`")
    from dpo_ext.torch.reference import of_first_rank, place

    check_dtype(dtype)
    _check_what_is_asked(files, name, columns_of, export)
    given: Options = {**options}  # type: ignore[typeddict-item]
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    with _ranks(device) as where:
        columns = None if columns_of is None else _with_columns(columns_of, tokenizer, given)
        pairs = _read(files, tokenizer, given) if files else None
        start = time.monotonic()
        identity = _identity(model_folder, dtype, name)
        store = _opened(store_folder, identity)
        put = 0
        if columns is not None:
            put = of_first_rank(lambda: store.put(columns, columns.ref_logps))
            _say(f"imported  {put:,} new log-probs of {2 * len(columns):,}")
        lacking, used = 0, None
        if pairs is not None:
            lacking = of_first_rank(lambda: len(store.missing(pairs, tokens=tokens)))
            read = pairs.report.read
            _say(f"pairs     {len(pairs):,} of {read:,} rows, of which {lacking:,} are missing")
        if pairs is not None and lacking:
            model = loaded(model_folder, dtype, where)
            if name is None:
                attention = str(model.config._attn_implementation)  # noqa: SLF001 - no public name
                store = _opened(store_folder, Fingerprint(identity.parts, {"attention": attention}))
            how = {"layout": layout, "tokens_per_batch": tokens_per_batch}
            used = _scored(model, store, pairs, lacking, pairs_per_shard, tokens, how)
        whole = columns if pairs is None else pairs
        if export is not None and whole is not None:
            of_first_rank(lambda: _write(whole.with_ref_logps(store.get(whole)), export))
            _say(f"exported  {export}")
        stats = of_first_rank(lambda: store.stats)
        _say(f"store     {store_folder}: {stats.rows:,} log-probs in {stats.shards:,} shards")
        _, ranks = place()
    if not is_shown():
        return None
    return {
        "store": str(store_folder),
        "fingerprint": store.fingerprint.to_dict(),
        "pairs": 0 if pairs is None else len(pairs),
        "imported": put,
        "scored": lacking,
        "layout": used,
        "ranks": ranks,
        "seconds": time.monotonic() - start,
        "rows": stats.rows,
        "shards": stats.shards,
    }


def _check_what_is_asked(
    files: Sequence[str], name: str | None, columns_of: str | None, export: Path | None
) -> None:
    if not files and columns_of is None:
        raise DataError("no files of preferences are given", reason="bad_input")
    if columns_of is not None and name is None:
        raise DataError(
            f"{columns_of}: of which reference its columns are, it does not say\n"
            "hint: --fingerprint TEXT names it"
        )
    if export is None:
        return
    if export.suffix not in ("", *PARQUET, *ARROW):
        endings = ", ".join((*PARQUET, *ARROW))
        raise DataError(
            f"{export}: expected {endings}, or no ending for a saved data set, found "
            f"{export.suffix}"
        )
    if not export.absolute().parent.is_dir():
        raise FileNotFoundError(2, "no such folder", str(export.absolute().parent))


def _read(files: Sequence[str], tokenizer: Tokenizer, options: Options) -> PairDataset:
    """The pairs of files, or of one saved data set."""
    if len(files) == 1 and (Path(files[0]) / MANIFEST).is_file():
        if options != data_options(on_bad="skip"):
            raise DataError(
                f"{files[0]}: options of the data set would go unheard: its pairs are encoded "
                "already\nhint: leave them out, or give the files that it was made of"
            )
        return PairDataset.load(files[0])
    pairs = PairDataset.from_files(files, tokenizer, progress=True, **options)
    if not len(pairs):
        raise no_pairs(files, pairs.report)
    return pairs


def _with_columns(file: str, tokenizer: Tokenizer, options: Options) -> PairDataset:
    pairs = _read([file], tokenizer, options)
    if pairs.ref_logps is None:
        columns = ", ".join(f"`{column}`" for column in REFERENCE)
        raise DataError(f"{file}: has no columns {columns}", path=file, reason="missing_field")
    return pairs


@contextmanager
def _ranks(device: str) -> Iterator[str]:
    """The device of this process, which is one of several under torchrun."""
    import torch
    import torch.distributed as dist

    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or dist.is_initialized():
        yield device_of(device)
        return
    where = device_of(device)
    if where == "cuda":
        where = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.startswith("cuda") else "gloo", timeout=PATIENCE)
    yield where
    dist.barrier()
    dist.destroy_process_group()  # not after an error: it would wait for the others


def _identity(model_folder: Any, dtype: str, name: str | None) -> Fingerprint:
    """Of the reference: by its name, or by its files, which the first rank reads."""
    from dpo_ext.torch.reference import of_first_rank

    if name is not None:
        return Fingerprint.of(name)
    computes = None if dtype == "auto" else dtype
    return of_first_rank(lambda: fingerprint(model_folder, dtype=computes))


def _opened(folder: Any, identity: Fingerprint) -> Any:
    """The store on the first rank; None on the others, where nobody asks it."""
    from dpo_ext.torch.reference import of_first_rank

    kept: list[ReferenceStore] = []
    of_first_rank(lambda: kept.append(ReferenceStore(folder, fingerprint=identity)))
    return kept[0] if kept else None


def _scored(
    model: Any,
    store: Any,
    pairs: PairDataset,
    lacking: int,
    pairs_per_shard: int,
    tokens: bool,
    how: Mapping[str, Any],
) -> str:
    """Scores the pairs that are missing; the layout of their rows."""
    from dpo_ext.torch.reference import PairScorer, complete, place

    _, ranks = place()
    with counted("reference log-probs", lacking, "pairs") as tell:
        done = 0

        def batch_of(n: int) -> None:  # the other ranks are about as far
            nonlocal done
            done += n * ranks
            tell(done)

        scorer = PairScorer(model, tell=batch_of, **how)
        if scorer.reason is not None:
            _say(f"padded    rows, as packed ones are refused: {scorer.reason}")

        def score(index: Any) -> Any:
            part = pairs.select(index)
            return scorer.tokens(part) if tokens else scorer(part)

        scored = complete(store, pairs, score, at_once=pairs_per_shard, tokens=tokens)
    _say(f"scored    {scored:,} pairs in {scorer.layout} rows, on {ranks} ranks")
    return scorer.layout


def _write(pairs: PairDataset, path: Path) -> None:
    """Ids and both columns, as the ending says; a file is there as a whole or not at all."""
    if not path.suffix:
        pairs.save(path)
        return
    table, part = pairs.to_arrow(), path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix in PARQUET:
            need("pyarrow.parquet", "--export").write_table(table, part)
        else:
            with need("pyarrow", "--export").ipc.new_file(part, table.schema) as file:
                file.write_table(table)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _say(text: str) -> None:
    if is_shown():
        print(text)
