"""`PairDataModule`: the batches of a data set, for the ranks and epochs of a Lightning trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any, Unpack

import torch
from torch import Tensor

from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.options import Options, Paths, settings
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import DataError
from dpo_ext.layout.batch import Batch, Layout
from dpo_ext.layout.plan import BatchPlan
from dpo_ext.lightning.host import pl
from dpo_ext.torch import PairLoader

PARTS = ("train", "held_out")


class StepBatch:
    """A `Batch` with all that it has, and no dataclass: Lightning's precision plugins rebuild those
    with every number cast, reference log-probs too, and fail at a frozen one.
    """

    __slots__ = ("batch",)

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __getattr__(self, name: str) -> Any:
        if name == "batch":  # of an instance that is still being made, by a copy or a pickle
            raise AttributeError(name)
        return getattr(self.batch, name)

    def to(self, device: Any = None, *, non_blocking: bool = False) -> StepBatch:
        if torch.device(device) == self.batch.input_ids.device:
            return self
        return StepBatch(self.batch.to(device, non_blocking=non_blocking))


class _Loader(PairLoader):
    """A loader that starts at the first batch, and not before: Lightning makes iterators early."""

    def __iter__(self) -> Iterator[Any]:
        return self._batches()

    def _batches(self) -> Iterator[StepBatch]:
        yield from map(StepBatch, super().__iter__())


class PairDataModule(pl.LightningDataModule):
    """The batches of preference pairs, for the ranks and the epochs of a Lightning trainer.

    Same as, in epoch ``e`` on rank ``r`` of ``W``::

        PairLoader(train.plan(layout=layout, ..., seed=seed, epoch=e, rank=r, world_size=W))

    The plan knows ranks and epochs, so that Lightning's sampler, `use_distributed_sampler`, has
    nothing to do, and each epoch has an order of its own. The trainer asks for the loader anew at
    each epoch (`reload_dataloaders_every_n_epochs` is set to 1), as token budgets give epochs
    unequal numbers of batches. A checkpoint in the middle of an epoch goes on with the next batch,
    and is refused for other data or another layout.

    A step of `DPOModule` works on these batches, and so does one of your own: ``batch`` has what a
    `Batch` has, and ``num_pairs(batch_idx)`` is what `preference_loss` wants::

        out = preference_loss(logps, batch.ref_logps, num_pairs=data.num_pairs(batch_idx))
        return out.loss * data.ranks[1] * self.trainer.accumulate_grad_batches

    Args:
        pairs: a `PairDataset`, or files, as `PairDataset.from_files` takes them.
        tokenizer: with files: a `Tokenizer`, or what `Tokenizer.from_pretrained` takes.
        held_out: the pairs to validate on: a `PairDataset`, files, or the fraction of ``pairs``
            that is held out, no prompt on both sides; None for none.
        layout, pairs_per_batch, tokens_per_batch, shuffle, drop_last, pad_to_multiple_of,
            bin_length: of the batches of one rank, as in `PairDataset.plan`. Those to validate on
            are in order, and all there.
        seed: of the order, and of the pairs that a fraction holds out.
        prefetch: as in `PairLoader`.
        cache_dir: with files: a folder of yours where one process of a node keeps what it encoded
            and the others map it; without one each process encodes the files.
        **options: with files: as in `PairDataset.from_files`.

    Attributes:
        train, held_out: `PairDataset`, after ``setup``; None where there is none.
        ranks: ``(rank, world_size)`` of the data, as the trainer's strategy has them.
        scored: by part, the reference log-probs that a module gave by ``set_reference``.

    Raises:
        ValueError, TypeError: an option that is unknown, out of range, or would go unheard.
        DataError: as `PairDataset.from_files`; a checkpoint of other data.

    >>> pairs = PairDataset.from_ids([[1, 2], [6]], [[3, 4], [7]], [[5], [8, 9]])
    >>> data = PairDataModule(pairs, layout="padded", pairs_per_batch=1, shuffle=False)
    >>> data.setup()
    >>> [batch.input_ids.tolist() for batch in data.train_dataloader()]
    [[[1, 2, 3, 4], [1, 2, 5, 0]], [[6, 7, 0], [6, 8, 9]]]
    """

    def __init__(
        self,
        pairs: PairDataset | Paths,
        tokenizer: Tokenizer | Any = None,
        *,
        held_out: PairDataset | Paths | float | None = None,
        layout: Layout = "padded",
        pairs_per_batch: int | None = None,
        tokens_per_batch: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        pad_to_multiple_of: int = 1,
        bin_length: int | None = None,
        prefetch: int = 2,
        cache_dir: str | PathLike[str] | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self._sources: dict[str, Any] = {"train": pairs, "held_out": held_out or None}
        from_files = any(_is_files(source) for source in self._sources.values())
        if from_files and tokenizer is None:
            raise TypeError("`tokenizer` is missing: files are encoded by one")
        if not from_files:
            given = {"tokenizer": tokenizer, "cache_dir": cache_dir, **options}
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"`{name}` would go unheard: there are no files to read")
        settings(options)
        self._reading: dict[str, Any] = {"cache_dir": cache_dir, **options}
        self._tokenizer = tokenizer
        self._prefetch = prefetch
        self._layout: dict[str, Any] = {
            "layout": layout,
            "pairs_per_batch": pairs_per_batch,
            "tokens_per_batch": tokens_per_batch,
            "seed": seed,
            "pad_to_multiple_of": pad_to_multiple_of,
            "bin_length": bin_length,
        }
        self._order: dict[str, Any] = {"shuffle": shuffle, "drop_last": drop_last}
        _NO_PAIRS.plan(**self._layout, **self._order)  # an option out of range is an error here
        self.train: PairDataset | None = None
        self.held_out: PairDataset | None = None
        self.scored: dict[str, Tensor] = {}
        self._alone: BatchPlan | None = None
        self._loaders: dict[str, _Loader] = {}

    @property
    def ranks(self) -> tuple[int, int]:
        places = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (places["rank"], places["num_replicas"]) if places else (0, 1)

    # ---- what Lightning calls --------------------------------------------------------------------

    def prepare_data(self) -> None:
        if self._reading["cache_dir"] is not None:
            for source in self._sources.values():
                if _is_files(source):
                    self._read(source)

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            self.trainer.reload_dataloaders_every_n_epochs = 1
        if self.train is not None:
            return
        train, held_out = self._sources["train"], self._sources["held_out"]
        self.train = self._read(train) if _is_files(train) else train
        if isinstance(held_out, float | int):
            self.train, self.held_out = self.train.split(held_out, seed=self._layout["seed"])
        elif held_out is not None:
            self.held_out = self._read(held_out) if _is_files(held_out) else held_out

    def train_dataloader(self) -> PairLoader:
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return self._load("train", self._plan(self.train, epoch=epoch, **self._order))

    def val_dataloader(self) -> Any:
        if self.held_out is None:
            return []
        return self._load("held_out", self._plan(self.held_out, shuffle=False))

    def state_dict(self) -> dict[str, Any]:
        """The reference log-probs that were scored at the start: the policy has changed since."""
        return {
            name: {"digest": getattr(self, name).contents, "ref_logps": values}
            for name, values in self.scored.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for name, saved in state_dict.items():
            pairs = getattr(self, name)
            if pairs is None or pairs.contents != saved["digest"]:
                raise DataError(
                    f"the checkpoint has the reference log-probs of other pairs than `{name}`\n"
                    "hint: resume with the same data",
                    reason="bad_state",
                )
            self.set_reference(name, saved["ref_logps"])

    # ---- what a module asks ----------------------------------------------------------------------

    def num_pairs(self, batch_idx: int) -> int:
        """The pairs of the optimizer step that a batch of training belongs to, over all of its
        micro-batches and all ranks.
        """
        plan: Any = self._loaders["train"].plan
        return sum(plan.pairs_in_step(i) for i in self.micro_batches(batch_idx))

    def micro_batches(self, batch_idx: int) -> range:
        """The indices of the batches of the same optimizer step, on each rank."""
        accumulate = self.trainer.accumulate_grad_batches
        first = batch_idx - batch_idx % accumulate
        return range(first, min(first + accumulate, int(self.trainer.num_training_batches)))

    def held_out_pairs(self, batch_idx: int) -> tuple[int, int]:
        """Of a batch to validate on: its pairs, or 0 where it is there once more so that all ranks
        have as many; and the pairs of all ranks' batches of that number.
        """
        rank, ranks = self.ranks
        plan: Any = self._loaders["held_out"].plan
        if self._alone is None:
            self._alone = self._plan(self.held_out, alone=True, shuffle=False)
        place = batch_idx * ranks + rank
        own = self._alone.pairs_in_step(place) if place < len(self._alone) else 0
        return own, plan.pairs_in_step(batch_idx)

    def scored_once(self, pairs: PairDataset) -> PairLoader:
        """The batches of pairs in order, each on one rank, all of them."""
        return PairLoader(self._plan(pairs, shuffle=False), self._device(), self._prefetch)

    def set_reference(self, name: str, ref_logps: Tensor, *, is_stored: bool = False) -> None:
        """Reference log-probs, (n, 2) in the order of ``train`` or ``held_out``, for all batches
        from now on; checkpoints keep them, unless a store has them.
        """
        pairs = getattr(self, name).with_ref_logps(ref_logps.cpu().double().numpy())
        setattr(self, name, pairs)
        if not is_stored:
            self.scored[name] = ref_logps.cpu()
        if name in self._loaders:  # a scheduler may have asked for its length before
            loader = self._loaders[name]
            order = self._order if name == "train" else {"shuffle": False}
            loader.plan = self._plan(pairs, epoch=loader.plan.epoch, **order)  # type: ignore[attr-defined]

    # ---- ours ------------------------------------------------------------------------------------

    def _read(self, source: Any) -> PairDataset:
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = self._tokenizer = Tokenizer.from_pretrained(tokenizer)
        return PairDataset.from_files(source, tokenizer, **self._reading)

    def _plan(self, pairs: Any, *, alone: bool = False, **more: Any) -> BatchPlan:
        rank, ranks = (0, 1) if alone else self.ranks
        return pairs.plan(**self._layout, rank=rank, world_size=ranks, **more)

    def _load(self, name: str, plan: BatchPlan) -> _Loader:
        self._loaders[name] = _Loader(plan, self._device(), self._prefetch)
        return self._loaders[name]

    def _device(self) -> Any:
        return None if self.trainer is None else self.trainer.strategy.root_device


_NO_PAIRS = PairDataset.from_ids([], [], [])


def _is_files(source: Any) -> bool:
    return not (source is None or isinstance(source, PairDataset | float | int))
