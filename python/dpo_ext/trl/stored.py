"""A store of reference log-probs behind TRL's precomputed columns.

N pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from trl.trainer.utils import get_config_model_id

from dpo_ext.data.dataset import PairDataset
from dpo_ext.errors import RefLogpsError, describe
from dpo_ext.pairs import IDS, REFERENCE, WEIGHTS, Ragged
from dpo_ext.torch.reference import Store, as_reference, stored_logps


def precomputing(
    store: Any, args: trl.DPOConfig | None, model: Any, data_collator: Any
) -> trl.DPOConfig:
    """A copy of the arguments with which TRL asks for the columns before training.

    Raises:
        TypeError: ``store`` is none.  ValueError: beside a collator of the user's.
    """
    if not isinstance(store, Store):
        raise TypeError(
            f"`reference` must be a `dpo_ext.reflogps.ReferenceStore`, found {describe(store)}\n"
            "hint: a model is given as `ref_model`"
        )
    if data_collator is not None:
        raise ValueError("`reference` finds pairs by ids, which a `data_collator` may change")
    if args is None:  # as TRL
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = trl.DPOConfig(f"{name.split('/')[-1]}-DPO")
    args = copy.copy(args)
    args.precompute_ref_log_probs = True
    return args


def check_rows(dataset: Dataset, name: str) -> None:
    """That a data set leaves the reference to the store.

    Raises:
        ValueError: it brings columns of its own.
    """
    if set(REFERENCE) & set(dataset.column_names):
        raise ValueError(
            f"`{name}` has reference log-probs of its own, and `reference` would go unheard\n"
            f"hint: remove_columns({list(REFERENCE)}), or no `reference`"
        )


def columns(
    trainer: Any, store: Store, dataset: Dataset, score: Callable[[Dataset], NDArray[Any]]
) -> NDArray[np.float64]:
    """(N, 2) of the rows: what the store has, and what it lacks, scored by ``score`` and put.

    Raises:
        ValueError: as `as_seen`.
        RefLogpsError: as the store; or rows are missing and the reference is gone.
    """
    pairs, weights = as_seen(dataset, trainer.data_collator, trainer.ld_alpha)
    reference = trainer.model if trainer.ref_model is None else trainer.ref_model

    def of(index: NDArray[np.int64]) -> NDArray[np.float64]:
        is_trained = trainer.state.global_step > 0 and not is_peft_model(trainer.model)
        if trainer.ref_model is None and (is_trained or trainer.has_released_reference):
            raise RefLogpsError(
                f"{len(index)} of {len(dataset)} rows are not in the store, and the reference is "
                "gone\nhint: fill the store before, by `dpo-ext ref-logps`"
            )
        with as_reference(reference):
            return score(dataset.select(index)).astype(np.float64)

    return stored_logps(store, pairs, of, token_weights=weights)


def batches(trainer: Any, rows: Dataset, batch_size: int) -> DataLoader:
    """Rows in order, each on one rank."""
    args = trainer.args
    loader = DataLoader(
        rows,
        batch_size=batch_size,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        generator=torch.Generator(),  # the loader would draw its seed from the global state
    )
    prepared: DataLoader = trainer.accelerator.prepare(loader)
    return prepared


def release(trainer: Any) -> bool:
    """Lets go of a reference that the store has made needless; whether there was one."""
    reference, accelerator = trainer.ref_model, trainer.accelerator
    kept = [model for model in accelerator._models if model is not reference]  # noqa: SLF001
    accelerator._models = kept  # noqa: SLF001 - `free_memory` would let go of all of them
    trainer.ref_model = None
    return reference is not None


def as_seen(
    dataset: Dataset, collator: Any, ld_alpha: float | None
) -> tuple[PairDataset, Mapping[str, Ragged] | None]:
    """The pairs as the model sees them, and the weights of their tokens.

    Raises:
        ValueError: ``keep_end`` would leave the sides of a pair two prompts; or `ld_alpha` beside
            weights of the rows.
    """
    weighs = set(WEIGHTS) <= set(dataset.column_names)
    if weighs and ld_alpha is not None:
        raise ValueError("`reference` serves `ld_alpha`, or weights of the rows, not both at once")
    names = [*IDS, *(WEIGHTS if weighs else ())]
    table = dataset.select_columns(names).with_format("arrow")[:]
    own: dict[str, Any] = {name: _ragged(table[name], np.float32) for name in WEIGHTS if weighs}
    pairs = PairDataset.from_ids(*(_ragged(table[name], np.int32) for name in IDS), **own)
    limit = collator.max_length
    over = np.flatnonzero(pairs.longest > limit) if limit is not None else np.empty(0, np.int64)
    if len(over):
        if collator.truncation_mode != "keep_start":
            raise ValueError(
                f"`reference`: {len(over)} pairs are longer than `max_length`, {limit}, of which "
                "`keep_end` cuts each side by itself: they have no prompt in common, by which a "
                'store finds them\nhint: truncation_mode="keep_start", or a larger `max_length`'
            )
        lists = [getattr(pairs, name).tolist() for name in IDS]
        factors = [lists_.tolist() for lists_ in pairs.weights.values()]
        for i in over:
            prompt = lists[0][i] = lists[0][i][:limit]
            for side in (*lists[1:], *factors):
                side[i] = side[i][: limit - len(prompt)]
        own = dict(zip(pairs.weights, factors, strict=True))
        pairs = PairDataset.from_ids(*lists, **own)
    if ld_alpha is None:
        return pairs, None
    return pairs, _ld_weights(pairs, ld_alpha)


def _ragged(column: Any, dtype: Any) -> Ragged:
    whole = pa.concat_arrays(column.chunks) if column.num_chunks else column.combine_chunks()
    values = whole.values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    return Ragged(np.ascontiguousarray(values), whole.offsets.to_numpy().astype(np.int64))


def _ld_weights(pairs: PairDataset, ld_alpha: float) -> Mapping[str, Ragged]:
    """Those of `ld_table`; a first token that nothing predicts counts for none."""
    unscored = (pairs.prompt_ids.lengths == 0).astype(np.int64)
    sides = {"chosen": pairs.chosen_ids, "rejected": pairs.rejected_ids}
    head = np.minimum(*((ids.lengths - unscored).clip(0) for ids in sides.values())) + unscored
    found = {}
    for name, ids in sides.items():
        place = np.arange(len(ids.values)) - np.repeat(ids.offsets[:-1], ids.lengths)
        weights = np.where(place < np.repeat(head, ids.lengths), 1.0, ld_alpha)
        found[name] = Ragged(weights.astype(np.float32), ids.offsets)
    return found
