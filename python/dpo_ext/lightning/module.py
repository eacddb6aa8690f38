"""`DPOModule`: a model, a loss by its name and an optimizer, as a step of Lightning's trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_ext.errors import TensorError
from dpo_ext.lightning.datamodule import PARTS, PairDataModule
from dpo_ext.lightning.host import pl
from dpo_ext.torch import PreferenceLoss, attach_scoring, audit_first_step, preference_loss
from dpo_ext.torch.audit import OF_OTHER_BATCHES, causes_of, first_difference, in_eval_mode
from dpo_ext.torch.losses.compat import find_loss
from dpo_ext.torch.reference import (
    ColumnsReference,
    ModelReference,
    NoReference,
    Reference,
    Store,
    as_reference,
    has_adapter,
    stored_logps,
)

_POLICY, _DATA, _ADAPTER, _STORE = "policy", "data", "adapter", "store"
_REFERENCES = ("auto", _POLICY, _DATA, _ADAPTER)
_PRECISIONS = {"bf16": torch.bfloat16, "16": torch.float16}
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def default_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with TRL's learning rate and no decay."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


class DPOModule(pl.LightningModule):
    """A model of yours and a loss by its name, as a step of Lightning's trainer.

    Same as, for one optimizer step over W ranks and the micro-batches of an accumulation::

        num_pairs = pairs of all of these batches
        for batch in micro_batches:
            loss = preference_loss(logps(batch), batch.ref_logps, ..., num_pairs=num_pairs).loss
            loss.backward()                    # gradients are summed over micro-batches and ranks

    so that the loss is the mean over the pairs of the step, however unequal batches and ranks are,
    and DDP, FSDP and accumulation give the parameters of one process with one large batch. The loss
    is computed inside the model's forward, as `attach_scoring` does it. A loss that couples the
    pairs of a batch sees those of all ranks, and a step is the mean over its micro-batches. Batches
    come from a `PairDataModule`.

    ::

        module = DPOModule(model, loss="dpo", beta=0.1)
        data = PairDataModule("pairs.jsonl.gz", "path/to/model", held_out=0.1, pairs_per_batch=8)
        Trainer(max_epochs=1, accumulate_grad_batches=4).fit(module, data)

    One value a step is logged for each of TRL's keys, the mean over the pairs of all micro-batches
    and ranks: ``loss, rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins,
    logps/chosen, logps/rejected``; and with ``eval_`` before them the means over the held-out
    pairs, each counted once.

    Args:
        model: as `attach_scoring` takes it, a PEFT model too. It trains in training mode.
        loss: the name of a loss, or several, which are summed.
        beta: of the loss; None for its default.
        loss_weights: of several losses.
        reference: where the reference's log-probs come from. ``"auto"``: nowhere for a loss
            without one; else the data, where its pairs have them; else ``"policy"``: the model as
            it is before training, which scores all pairs once before the first step, and whose
            log-probs every checkpoint of a `PairDataModule` keeps. ``"data"``: its pairs have
            them. ``"adapter"``: this PEFT model with its adapter switched off, at each step. A
            model: it scores at each step, frozen, and is in no checkpoint. A
            `dpo_ext.reflogps.ReferenceStore`: what it has is read before the first step, what it
            lacks is scored by the model as it is then and put; with its adapter off, unless the
            store's fingerprint has one.
        optimizer: called with the list of parameters that are trained, gives what Lightning's
            ``configure_optimizers`` may give, a scheduler included; AdamW at 1e-6 by default.
        disable_dropout: the model's dropout is off, as in TRL: policy and reference then agree at
            the first step.
        audit: the first step compares the log-probs of policy and reference, where the policy is
            its own reference (`dpo_ext.torch.audit_first_step`): so it is unless ``reference`` is a
            model with other weights. False for data scored by another model.
        scoring: further options of `attach_scoring`, such as ``chunk_rows``.
        **params: parameters of the loss, under the names of the table.

    Attributes:
        model: the same object; ``save_pretrained`` is its own.

    Raises:
        ValueError, TypeError: an unknown loss, ``reference`` or option; one that would go unheard;
            batches that come from elsewhere.
        TensorError: pairs without reference log-probs for a loss that needs them.
        RefLogpsError: by the first step: the audit.

    Numerics: mixed precision is the trainer's; log-probs and loss are float32 in it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str | Sequence[str] = "dpo",
        beta: float | None = None,
        loss_weights: Sequence[float] | None = None,
        reference: str | nn.Module | Store = "auto",
        optimizer: Callable[[list[nn.Parameter]], Any] = default_optimizer,
        disable_dropout: bool = True,
        audit: bool = True,
        scoring: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> None:
        super().__init__()
        names = [loss] if isinstance(loss, str) else list(loss)
        rows = [find_loss(name) for name in names]
        self._couples = any(row.couples_batch for row in rows)
        self._needs_reference = any(row.reference for row in rows)
        options: dict[str, Any] = {"loss": loss if isinstance(loss, str) else names}
        if beta is not None:
            options["beta"] = beta
        if loss_weights is not None:
            options["loss_weights"] = loss_weights
        self._loss = {**options, **params}
        one = torch.zeros(1, 2)  # a parameter that is unknown or out of range is an error here
        group = "local" if self._couples else None
        preference_loss(one, one, lengths=one.int() + 1, group=group, **self._loss)
        self._scoring = dict(scoring or {})
        self._optimizer = optimizer
        if disable_dropout:
            for part in model.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
        self.model = attach_scoring(model, loss=self._loss, **self._scoring)
        # In a tuple it is no submodule: neither wrapped, nor saved, nor trained.
        self._frozen: tuple[nn.Module, ...] = ()
        self._store: Store | None = None
        self._reference, self._source = self._checked(reference)
        self._audits = audit and self._needs_reference
        self._latest: int | None = None
        self._sums: Tensor | None = None
        self._kept: Tensor | None = None

    def _checked(self, reference: Any) -> tuple[str, Reference]:
        """The name of a reference, and what a step asks."""
        if not self._needs_reference:
            if not isinstance(reference, str) or reference != "auto":
                raise ValueError("`reference` would go unheard: the loss needs none")
            return reference, NoReference()
        if isinstance(reference, nn.Module):
            if reference is self.model:
                raise ValueError(
                    "`reference` is the model that is trained\n"
                    'hint: copy.deepcopy(model), or reference="policy"'
                )
            self._frozen = (attach_scoring(reference).requires_grad_(False).eval(),)
            return "model", ModelReference(reference)
        if isinstance(reference, Store):
            self._store = reference
            return _STORE, ColumnsReference()
        if reference not in _REFERENCES:
            raise ValueError(
                f"`reference` must be a model or one of {_REFERENCES}, or a store; found "
                f"{reference!r}"
            )
        if reference != _ADAPTER:
            return reference, ColumnsReference()
        if not has_adapter(self.model):
            raise TypeError(
                f"`reference={_ADAPTER!r}` needs a PEFT model, found {type(self.model).__name__}"
            )
        return reference, ModelReference(self.model, adapter=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    # ---- before training -------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data = self._data
        if self.trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} divides accumulated gradients by itself, "
                "so that the mean over a step's pairs cannot be had\nhint: ddp, fsdp or fsdp2"
            )
        loss = dict(self._loss)
        if self._couples and data.ranks[1] > 1:
            mesh = getattr(self, "device_mesh", None)
            loss["group"] = dist.group.WORLD if mesh is None else mesh["data_parallel"].get_group()
        attach_scoring(self.model, loss=loss, **self._scoring)

    def on_fit_start(self) -> None:
        for frozen in self._frozen:
            frozen.to(self.device)
        if self._needs_reference and self._reference in ("auto", _POLICY, _STORE):
            self._score_the_start()
        self.train()  # a model of `from_pretrained` would ignore gradient checkpointing

    def _score_the_start(self) -> None:
        """Gives the pairs that lack them the log-probs of the policy as it is now."""
        data, store = self._data, self._store
        for name in PARTS:
            pairs = getattr(data, name)
            if pairs is None or name in data.scored:
                continue
            if store is not None:
                values = stored_logps(store, pairs, self._scorer_of(name, pairs))
                data.set_reference(name, torch.from_numpy(values), is_stored=True)
            elif self._reference == _POLICY or pairs.ref_logps is None:
                data.set_reference(name, self._scored_by_policy(name, pairs))

    def _scorer_of(self, name: str, pairs: Any) -> Callable[[Any], Any]:
        """What scores the pairs that a store lacks, by their indices."""
        return lambda index: self._scored_by_policy(name, pairs.select(index)).cpu().double()

    def _scored_by_policy(self, name: str, pairs: Any) -> Tensor:
        """(N, 2) log-probs of the policy, on all ranks; of what lies below its adapter for a store
        whose reference has none.
        """
        data, strategy = self._data, self.trainer.strategy
        whole: Any = self.model
        parts = getattr(getattr(self._store, "fingerprint", None), "parts", {})
        off = self._store is not None and has_adapter(whole) and parts.get("adapter") is None
        # Some strategies take the weights of a checkpoint after this, and then its log-probs too.
        resumed = self.trainer.ckpt_path is not None and not strategy.restore_checkpoint_after_setup
        if resumed and not off:
            where = "checkpoint" if self._store is None else "store"
            raise TensorError(
                f"the {where} has no reference log-probs of `{name}`, and the policy before "
                "training is gone\nhint: pairs.with_ref_logps(...), or reference=<that model>"
            )
        # One column more says how often a pair was scored: at the end ranks repeat some.
        found = torch.zeros(len(pairs), 3, device=self.device)
        with as_reference(whole, adapter=not off):
            for batch in data.scored_once(pairs):
                # By the strategy: FSDP gathers the weights of what it calls itself.
                logps = strategy.predict_step(batch)
                found[batch.pair_index, :2] = logps.float()
                found[batch.pair_index, 2] = 1.0
        found = strategy.reduce(found, reduce_op="sum")
        return found[:, :2] / found[:, 2:]

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """(N, 2) log-probs of a batch, chosen then rejected."""
        return self.model(**batch.model_inputs, score_table=batch.table).logps

    # ---- a step ----------------------------------------------------------------------------------

    @property
    def _data(self) -> PairDataModule:
        data = self.trainer.datamodule
        if not isinstance(data, PairDataModule):
            raise TypeError(
                f"DPOModule takes its batches from a PairDataModule, found {type(data).__name__}\n"
                "hint: trainer.fit(module, PairDataModule(pairs, pairs_per_batch=8))"
            )
        return data

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        data = self._data
        micro_batches = data.micro_batches(batch_idx)
        if batch_idx == micro_batches.start or self._latest != batch_idx - 1:
            self._begin(batch_idx, micro_batches)
        self._latest = batch_idx
        count = data.num_pairs(batch_idx)
        ref_logps = self._source.logps(batch)
        if self._audits:
            self._audits = False
            self._audit(batch, ref_logps)
        scores = self.model(
            **batch.model_inputs,
            score_table=batch.table,
            ref_logps=ref_logps,
            num_pairs=None if self._couples else count,
        )
        # Lightning divides by the accumulation, and its strategies by the ranks.
        ranks, accumulate = data.ranks[1], self.trainer.accumulate_grad_batches
        of_pairs = scores.preference.loss
        if self._couples:  # batches that do not add up are averaged
            of_pairs = of_pairs / len(micro_batches)
        loss = of_pairs * (ranks * accumulate)
        logged = of_pairs.detach()
        if scores.aux_loss is not None:  # of tokens: averaged, too, over all batches of the step
            router = (scores.loss - scores.preference.loss) / len(micro_batches)
            loss = loss + router * accumulate
            logged = logged + router.detach() / ranks
        self._add(logged, scores.preference, 1.0 / count)
        if batch_idx + 1 == micro_batches.stop:
            self._log_means("")
        return loss

    def _audit(self, batch: Any, ref_logps: Any) -> None:
        """The first step: a policy that is its own reference has its log-probs."""
        (reference,) = self._frozen or (None,)
        if self.trainer.global_step or self.trainer.ckpt_path is not None:
            return

        def any_rank(wrong: bool) -> bool:
            here = torch.tensor(float(wrong), device=self.device)
            return bool(self.trainer.strategy.reduce(here, reduce_op="sum") > 0)

        # A rank sees its own parts of the weights alone, and none may go on without the others.
        other = reference is not None and first_difference(self.model, reference) is not None
        if any_rank(other):
            return
        logps = in_eval_mode(self.model, lambda: self.predict_step(batch))
        torch.clear_autocast_cache()

        precision = str(self.trainer.precision)
        narrow = min((p.dtype for p in self.model.parameters()), key=lambda dtype: dtype.itemsize)
        audit_first_step(
            logps,
            ref_logps,
            batch.table.lengths,
            dtype=next((d for name, d in _PRECISIONS.items() if name in precision), narrow),
            slack=OF_OTHER_BATCHES if reference is None else 1.0,  # DoRA is another computation
            causes=lambda _: causes_of(self.model, reference),
            any_rank=any_rank,
        )

    def _begin(self, batch_idx: int, micro_batches: range) -> None:
        """A new optimizer step."""
        self._sums = None
        if batch_idx != micro_batches.start:
            warnings.warn(
                f"resumed inside an optimizer step: {batch_idx - micro_batches.start} of its "
                f"{len(micro_batches)} micro-batches were taken before, and their gradients are "
                "gone; a checkpoint between two steps loses nothing",
                stacklevel=2,
            )

    def on_validation_epoch_start(self) -> None:
        self._kept, self._sums = self._sums, None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = self.model(
            **batch.model_inputs, score_table=batch.table, ref_logps=self._source.logps(batch)
        )
        own, together = self._data.held_out_pairs(batch_idx)
        out = scores.preference
        loss = out.loss * own
        if self._couples:  # a part of the loss of all ranks' pairs
            own, loss = out.logps.shape[0], out.loss * together
        if scores.aux_loss is not None:
            loss = loss + (scores.loss - out.loss) * own
        self._add(loss, out, own / out.logps.shape[0])

    def on_validation_epoch_end(self) -> None:
        self._log_means("eval_")
        self._sums = self._kept

    def _add(self, loss: Tensor, out: PreferenceLoss, factor: float) -> None:
        """Adds what a batch has of the loss, and a factor times the sums of its metrics."""
        metrics = out.metrics
        values = torch.stack([*(metrics[key] for key in METRICS), torch.ones_like(loss)])
        values = torch.cat([loss.reshape(1), values * (out.logps.shape[0] * factor)])
        values = values.detach().float()
        self._sums = values if self._sums is None else self._sums + values

    def _log_means(self, prefix: str) -> None:
        """Logs the means over the pairs that all ranks added."""
        total = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        for name, value in zip(("loss", *METRICS), total[:-1] / total[-1], strict=True):
            shown = name in ("loss", "rewards/accuracies")
            # The same on all ranks, which Lightning cannot know.
            synced = prefix != "" and self.trainer.world_size > 1
            self.log(f"{prefix}{name}", value, prog_bar=shown, batch_size=1, sync_dist=synced)

    def configure_optimizers(self) -> Any:
        return self._optimizer([p for p in self.parameters() if p.requires_grad])
