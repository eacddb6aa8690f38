"""`DPOTrainer`: TRL 1.16's, with our data path, log-probs and losses inside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import transformers
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from dpo_ext.data.options import Options
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import DataError, TensorError, TokenizerError
from dpo_ext.layout.batch import LAYOUTS, Batch, Layout
from dpo_ext.layout.table import ScoreTable
from dpo_ext.pairs import IDS, REFERENCE, WEIGHTS
from dpo_ext.report import Report
from dpo_ext.torch import (
    PreferenceLoss,
    assert_packing_safe,
    attach_scoring,
    ld_table,
    preference_loss,
    wpo_averages,
)
from dpo_ext.torch.reference import Store
from dpo_ext.trl import first_step, stored
from dpo_ext.trl.bins import BinnedRows, Bins, slots
from dpo_ext.trl.collator import NUM_TOKENS, SERVED, SHARED_ROWS, TABLE_KEY, PairCollator
from dpo_ext.trl.layers import why_not_data, why_not_packed, why_not_scoring, why_not_shared
from dpo_ext.trl.metrics import STATS, NotANumber, sums_of
from dpo_ext.trl.options import (
    check_args,
    check_data_options,
    check_tokens_per_batch,
    loss_options,
)
from dpo_ext.trl.rows import encoded, fingerprint, with_prompt

logger = logging.getLogger(__name__)

_MODEL_KEYS = {name: set(LAYOUTS[name].model_inputs) for name in SERVED}
# Of a batch, what the model is not given.
_NOT_OF_THE_MODEL = {
    "completion_mask",
    "completion_lengths",
    NUM_TOKENS,
    *REFERENCE,
    TABLE_KEY,
    SHARED_ROWS,
}
_DATA, _LAYOUT, _HEAD = "data", "layout", "head and loss"
_METRICS = ("trl", "weighted")


class DPOTrainer(trl.DPOTrainer):
    """`trl.DPOTrainer` of TRL 1.16 with our encoding, log-probs and losses, in TRL's own loop.

    Same as ``trl.DPOTrainer`` with the same arguments: the same pairs in the same steps, and the
    same ``log_history`` up to the rounding of float32. Rafailov et al. 2023, arXiv:2305.18290.

    ::

        from dpo_ext.trl import DPOTrainer
        trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=ds, processing_class=tok,
                             layout="packed")
        trainer.train()

    What is different inside. Rows are encoded once a node, in threads, into the columns
    ``prompt_ids, chosen_ids, rejected_ids`` beside their own; its processes map them. Only scored
    tokens reach ``lm_head``, inside the model's own forward, so that DDP sees one forward.
    Log-probs are summed in float64. Metrics are sums and counts, gathered in one call. Precomputed
    reference log-probs are never read from a cache: TRL's can be stale.

    What stock TRL takes is taken. Where one of our layers (the data, the layout, the head with its
    loss) does not serve, TRL's own does the work: one warning names the layer and why, and
    ``steps_back`` keeps it.

    Args:
        model, ref_model, args, processing_class, compute_metrics, callbacks, optimizers,
            peft_config, quantization_config: as in TRL.
        train_dataset, eval_dataset: as in TRL; rows of text or messages, with or without
            ``prompt``, or of the three id columns. Streams are encoded by TRL. Where
            ``precompute_ref_log_probs`` is on, the columns ``ref_chosen_logps, ref_rejected_logps``
            are used if both are there, and such data can be evaluated at any step.
        data_collator: None, or one that gives TRL's keys, of which ``completion_mask`` says what is
            scored.
        layout: ``"padded"``, or ``"packed"``: the pairs of a micro-batch in one row without
            padding, for models that keep packed segments apart, attended segment by segment.
            Whether this one does is tried before the first step; one that does not, such as Mamba
            or a hybrid, gets padded batches, and a warning says so. ``"shared"``: the same with
            each prompt once, before both of its sides; packed where sides cannot share it.
        tokens_per_batch: with ``"packed"`` and ``"shared"``, tokens of a micro-batch, in place of
            ``per_device_train_batch_size``. The pairs of an epoch are packed into so many by best
            fit decreasing, in another order every epoch. Loss and metrics are means over the pairs
            of a step, of all its micro-batches and ranks. Evaluation has batches of
            ``per_device_eval_batch_size`` pairs.
        data_options: how rows are read, as `PairDataset.from_files` documents it: `layout_of_rows`,
            `chat_template_kwargs`, `prompt_key`, `special_tokens_in_text` and the rest but for what
            TRL's configuration says (`OF_TRL`). By default as TRL reads them, so that pairs which
            teach nothing are kept: ``{"on_useless": "drop"}`` drops sides that are blank, or the
            same.
        metrics: ``"trl"``: the mean over batches, as TRL logs them; ``"weighted"``: the mean over
            pairs, or tokens, of all batches, which does not depend on the batch size.
        audit: the first step compares the log-probs of policy and reference, where the policy is
            its own reference (`dpo_ext.torch.audit_first_step`): so it is unless ``ref_model`` has
            other weights. False for an adapter that is not zero at its start, or reference columns
            of another model.
        reference: a `dpo_ext.reflogps.ReferenceStore`, as with ``precompute_ref_log_probs``: what
            it has is read, what it lacks is scored at construction by the reference and put. No
            ``ref_model`` is kept in memory.

    Attributes:
        data_reports: by name of the data set, what became of its rows: read = kept + dropped,
            reason by reason. Bad rows are dropped and counted in one warning.
        steps_back: by layer, why TRL's own does the work.

    Raises:
        ValueError: an option that is not honoured, by name; `REFUSED` lists them.
        DataError: no row of a data set can be used.
        RefLogpsError: by the first step of ``train``: the audit.

    Numerics: in float32, over four steps, loss and gradient norm within 1e-5 of stock (relative).
    """

    # Set by TRL under unions that it narrows by itself.
    args: Any
    data_collator: Any
    model: Any
    ref_model: Any

    _tag_names = ["trl", "dpo", "dpo_ext"]  # noqa: RUF012 - TRL's own attribute, a list there

    def __init__(
        self,
        model: str | transformers.PreTrainedModel | Any,
        ref_model: transformers.PreTrainedModel | None = None,
        args: trl.DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | Mapping[str, Any] | None = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        layout: Layout = "padded",
        tokens_per_batch: int | None = None,
        data_options: Options | None = None,
        metrics: str = "trl",
        audit: bool = True,
        reference: Store | None = None,
    ) -> None:
        if layout not in SERVED:
            raise ValueError(f"`layout` must be one of {SERVED}, found {layout!r}")
        if metrics not in _METRICS:
            raise ValueError(f"`metrics` must be one of {_METRICS}, found {metrics!r}")
        self._store = reference
        self.has_released_reference = False
        if reference is not None:
            args = stored.precomputing(reference, args, model, data_collator)
        if args is not None:
            check_args(args)
        if tokens_per_batch is not None:
            check_tokens_per_batch(tokens_per_batch, layout, args, train_dataset)
        self.data_options = check_data_options(data_options or {})
        # `super().__init__` calls the methods below, so what they read must exist before it.
        self.layout = layout
        self.tokens_per_batch = tokens_per_batch
        self.metrics = metrics
        self._audits = audit
        # a weight of the reference that is not the policy's, where it was left before training
        self.other_reference: str | None = None
        self._pairs_of_step = 0.0  # over all its micro-batches and ranks
        self._bins: Bins | None = None
        self._totals: dict[str, dict[str, tuple[float, float]]] = {"train": {}, "eval": {}}
        self.data_reports: dict[str, Report] = {}
        self.steps_back: dict[str, str] = {}
        self._weighs = False  # whether rows weigh their tokens
        self._prepared: set[str] = set()  # fingerprints of data sets that are ours
        self._encoder: tuple[Any, Tokenizer] | None = None
        self._scores_by_itself = False
        self._said_not_a_number = False
        self._has_own_collator = data_collator is not None
        if args is not None:
            self._step_back(_HEAD, why_not_scoring(args, peft_config, model))
            if layout != "padded":
                self._step_back(_LAYOUT, why_not_packed(args, compute_metrics, data_collator))
            if self.layout == "shared":
                self._step_back(_LAYOUT, why_not_shared(args), "packed")
            # Streams would be read by one rank, and its batches cut up by their rows. TRL has the
            # same for streams to train on.
            launcher: Any = args.accelerator_config
            if launcher.dispatch_batches is None:
                launcher.dispatch_batches = False
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if reference is not None:
            self.has_released_reference = stored.release(self)
        self._attach()
        if self.tokens_per_batch is not None and self.train_dataset is not None:
            places = slots(self.train_dataset, self.layout, self.args.max_length)
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self._bins = Bins(places, self.tokens_per_batch, seed)

    def _step_back(self, layer: str, reason: str | None, layout: Layout = "padded") -> None:
        """Leave a layer to TRL for a reason, if there is one, and say so once.

        The layout goes to ``layout``, and may go further.
        """
        if reason is None or (layer in self.steps_back and layer != _LAYOUT):
            return
        unheard = self.data_options if layer == _DATA else self.metrics == "weighted"
        if unheard and layer != _LAYOUT:
            option = "data_options" if layer == _DATA else "metrics"
            raise ValueError(f"`{option}` would go unheard: {layer} is TRL's own, as {reason}")
        if layer != _DATA:
            self.layout = layout
        self.steps_back[layer] = reason
        instead = "TRL's own" if self.layout == "padded" or layer != _LAYOUT else self.layout
        if self.layout == "padded" and self.tokens_per_batch is not None:
            self.tokens_per_batch = None
            reason += "; batches have `per_device_train_batch_size` pairs"
        logger.warning("%s: %s, as %s", layer, instead, reason)

    def _attach(self) -> None:
        """Make the models score in their forward and the collator emit the table; once.

        Models that are given as paths exist only inside TRL's constructor, and score there first.
        """
        if self._scores_by_itself or _HEAD in self.steps_back:
            return
        if self._is_vision_dataset:
            self._step_back(_DATA, "pictures are prepared batch by batch")
            if self.layout != "padded":
                self._step_back(_LAYOUT, "pictures belong to rows")
        try:
            attach_scoring(self.model.get_base_model() if is_peft_model(self.model) else self.model)
            if self.ref_model is not None:
                attach_scoring(self.accelerator.unwrap_model(self.ref_model))
        except TypeError as error:
            self._step_back(_HEAD, str(error).partition("\n")[0])
            self._check_weights(self.args)
            return
        if self.layout == "shared" and self.aux_loss_enabled:
            self._step_back(_LAYOUT, "the router loss counts the prompt of each side", "packed")
        # A model that ZeRO-3 has cut up is whole in its own steps alone: the first one compares.
        while self.layout != "padded" and not is_deepspeed_zero3_enabled():
            model = self.accelerator.unwrap_model(self.model)
            try:
                assert_packing_safe(model, layout=self.layout, inputs=_inputs_for(model))
                break
            except Exception as error:  # it leaks; or it cannot run, for whatever reason of its own
                reason = str(error).partition("\n")[0] or type(error).__name__
                self._step_back(_LAYOUT, reason, "packed" if self.layout == "shared" else "padded")
        if not self._has_own_collator and not self._is_vision_dataset:
            stock = self.data_collator
            self.data_collator = PairCollator(
                stock.pad_token_id,
                stock.max_length,
                stock.truncation_mode,
                stock.pad_to_multiple_of,
                # Rows that a launcher cuts up take no table with them.
                score_table=not getattr(self.args.accelerator_config, "dispatch_batches", None),
                layout=self.layout,
            )
        self._scores_by_itself = True

    def get_train_dataloader(self) -> DataLoader:
        """As TRL's; with `tokens_per_batch` of bins."""
        if self._bins is None:
            return super().get_train_dataloader()
        rows = self._remove_unused_columns(self.train_dataset, description="training")
        bins = self._bins
        return self._get_dataloader(
            BinnedRows(rows, bins), "training", 1, lambda _: bins, is_training=True
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step; and how many pairs all ranks have in it is kept."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._bins is not None:
            own = sum(batch[TABLE_KEY].n_groups for batch in batches)
            total = self.accelerator.gather(torch.tensor([float(own)], device=device))
            self._pairs_of_step = total.sum().item()
        return batches, items

    def _num_pairs(self) -> float | None:
        """What the loss of a micro-batch is divided by: TRL goes on to divide it by their number,
        and the ranks' gradients are averaged.
        """
        if self._bins is None or not self.model.training:
            return None
        parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        return self._pairs_of_step / parts

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: trl.DPOConfig, dataset_name: str
    ) -> Dataset:
        """Encode the rows, which may hold ids already; what it returned once passes unchanged."""
        if isinstance(dataset, Dataset) and fingerprint(dataset) in self._prepared:
            return dataset
        if self._store is not None:
            stored.check_rows(dataset, dataset_name)
        reason = why_not_data(dataset, processing_class)
        self._step_back(_DATA, reason)
        encoder = None if reason is not None else self._encoder_of(processing_class)
        if encoder is None:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        keep_start = args.truncation_mode == "keep_start"
        options: Options = {
            "on_useless": "keep",
            **self.data_options,
            # `keep_end` is left to the collator: TRL cuts each side alone, we cut a pair as one.
            "max_length": args.max_length if keep_start else None,
            "boundary": "trl",
            "on_bad": "skip",
            "threads": args.dataset_num_proc,
        }
        prepared, report = encoded(dataset, encoder, options, dataset_name)
        self.data_reports[dataset_name] = report
        if report.dropped or report.warned:
            logger.warning("%s: not every row was taken as it is\n%s", dataset_name, report)
        if dataset_name != "train" and set(report.layouts) == {"implicit"}:
            prepared = with_prompt(prepared)
        self._prepared.add(fingerprint(prepared))
        self._weighs |= set(WEIGHTS) <= set(prepared.column_names)
        self._check_weights(args)
        return prepared

    def _check_weights(self, args: trl.DPOConfig) -> None:
        """Raise `DataError` where the weights of tokens would go unheard."""
        reason = self.steps_back.get(_HEAD)
        if reason is not None:
            reason = f"log-probs are TRL's own, as {reason}"
        elif self._has_own_collator:
            reason = "a `data_collator` is given"
        elif getattr(args.accelerator_config, "dispatch_batches", None):
            reason = "`dispatch_batches` cuts batches up by their rows"
        if self._weighs and reason is not None:
            raise DataError(
                f"weights of tokens would go unheard: {reason}\n"
                "hint: leave out `train_on` and the weights of the rows",
                field=WEIGHTS[0],
                reason="bad_weights",
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._signature_columns is not None and IDS[0] in self._signature_columns:
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *WEIGHTS]))

    def _encoder_of(self, processing_class: Any) -> Tokenizer | None:
        """The tokenizer, made once; None for one that we do not know to read exactly."""
        if self._encoder is None or self._encoder[0] is not processing_class:
            try:
                self._encoder = processing_class, Tokenizer.from_pretrained(processing_class)
            except TokenizerError as error:
                self._step_back(_DATA, str(error).partition("\n")[0])
                return None
        return self._encoder[1]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Add both reference columns unless they are there; the same on every rank, not cached."""
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if set(REFERENCE) <= set(dataset.column_names):
            return dataset
        self._attach()
        self.other_reference = first_step.difference(self)
        if self._store is None:
            columns = self._reference_logps(dataset, batch_size)
        else:
            columns = stored.columns(
                self, self._store, dataset, lambda rows: self._reference_logps(rows, batch_size)
            ).astype(np.float32)
        for index, column in enumerate(REFERENCE):
            dataset = dataset.add_column(column, columns[:, index])
        self._prepared.add(fingerprint(dataset))
        return dataset

    def _reference_logps(self, dataset: Dataset, batch_size: int) -> NDArray[np.float32]:
        """(N, 2) of rows of ids, by the reference that is in memory; the same on every rank."""
        model = self.model if self.ref_model is None else self.ref_model
        names = [n for n in (*IDS, *WEIGHTS) if n in dataset.column_names]
        rows = dataset if self._has_own_collator else dataset.select_columns(names)
        values = []
        for batch in stored.batches(self, rows, batch_size):
            sides = torch.stack(self.compute_ref_log_probs(model, batch), dim=1)
            values.append(self.accelerator.gather_for_metrics(sides).cpu())
        return torch.cat(values).numpy()

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference log-probs of one batch, without gradient: (N,) float32 chosen, (N,) rejected.

        `model` is the reference, or the PEFT model: its adapter is then ``"ref"``, or switched off.
        """
        if not self._scores_by_itself:
            return super().compute_ref_log_probs(model, inputs)
        adapter: Any = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)
        checkpointing = disable_gradient_checkpointing(
            self.model, self.args.gradient_checkpointing_kwargs
        )
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            logps = model(**self._model_inputs(model, inputs, router=False)).logps
        return logps[:, 0], logps[:, 1]

    def _compute_loss(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], return_outputs: bool
    ) -> Any:
        """The loss of a batch that is scored in one forward of `model`; `log` finds the metrics."""
        if not self._scores_by_itself:
            return super()._compute_loss(model, inputs, return_outputs)
        inputs = {**inputs, TABLE_KEY: _table(inputs)}
        stats = (*STATS, "log_sum_sq") if self.use_weighting else STATS
        # A model of its own before the policy: what it needs is free by then. It draws nothing.
        reference = None
        if self.precompute_ref_logps:
            reference = [inputs[name] for name in REFERENCE]
        elif self.ref_model is not None:
            reference = list(self.compute_ref_log_probs(self.ref_model, inputs))
        scores = model(**self._model_inputs(model, inputs), score_stats=stats)
        if reference is None:
            reference = list(self.compute_ref_log_probs(self.model, inputs))
        # What TRL divides by in `ipo`: position 0 is counted, although nothing scores it.
        if self.layout != "padded":
            lengths = inputs["completion_lengths"]
        else:  # the chosen half above the rejected half
            lengths = inputs["completion_mask"].sum(dim=1).view(2, -1).T
        ref_logps = torch.stack(reference, dim=1).to(scores.logps.dtype)
        if self._audits and self.model.training:
            self._audits = False

            def score_again() -> torch.Tensor:
                return model(**self._model_inputs(model, inputs, router=False)).logps

            scored = inputs[TABLE_KEY].lengths
            first_step.audit(self, scores.logps, ref_logps, scored, score_again)
        weight = self._weights_of_pairs(scores, inputs[TABLE_KEY])
        options = loss_options(self)
        if (num_pairs := self._num_pairs()) is not None:
            options["num_pairs"] = num_pairs
        out: PreferenceLoss | NotANumber
        try:
            out = preference_loss(
                scores.logps, ref_logps, lengths=lengths, weight=weight, **options
            )
        except TensorError as error:
            out = self._not_a_number(scores.logps, ref_logps, error)
        mode, loss = "train" if self.model.training else "eval", out.loss
        self._record(mode, inputs, scores, out)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss
            aux_loss = self.accelerator.gather_for_metrics(scores.aux_loss.detach())
            self._metrics[mode]["aux_loss"].append(aux_loss.mean().item())
        if not return_outputs:
            return loss
        with torch.no_grad():  # `compute_metrics` wants logits, which scoring never builds
            rows = self._model_inputs(model, inputs)
            del rows["score_table"]
            return loss, model(**rows)

    def _not_a_number(
        self, logps: torch.Tensor, ref_logps: torch.Tensor, error: TensorError
    ) -> NotANumber:
        """What stock goes on with: a loss and gradients of NaN, which the loop sees."""
        if not self._said_not_a_number:
            logger.warning(
                "step %d: the loss is not a number, as in TRL: %s", self.state.global_step, error
            )
            self._said_not_a_number = True
        rewards = self.beta * (logps.detach() - ref_logps)
        return NotANumber(logps.sum() * torch.nan, *rewards.unbind(dim=1))

    def _weights_of_pairs(self, scores: Any, table: ScoreTable) -> torch.Tensor | None:
        """WPO's, (N,): the product of both sides' ``exp(mean(logp - log sum_v p_v^2))``."""
        if not self.use_weighting:
            return None
        return torch.stack(wpo_averages(scores.tokens, table)).sum(dim=0).exp()

    def _record(self, mode: str, inputs: Mapping[str, Any], scores: Any, out: Any) -> None:
        """TRL's metrics of one batch: sums and counts, gathered over the ranks in one call."""
        sums = sums_of(inputs, scores, out)
        local = torch.stack([torch.stack([a.double(), b.double()]) for a, b in sums.values()])
        gathered = self.accelerator.gather(local[None]).sum(dim=0).tolist()
        metrics, totals = self._metrics[mode], self._totals[mode]
        is_weighted = self.metrics == "weighted" or (self._bins is not None and mode == "train")
        for name, (total, count) in zip(sums, gathered, strict=True):
            if name == NUM_TOKENS:  # a running sum, over training alone
                self._total_train_tokens += int(total) if mode == "train" else 0
                metrics[name] = [self._total_train_tokens]
            elif is_weighted:  # `log` empties the list
                before = totals.get(name, (0.0, 0.0)) if metrics[name] else (0.0, 0.0)
                totals[name] = total, count = total + before[0], count + before[1]
                metrics[name] = [total / count if count else 0.0]
            else:
                metrics[name].append(total / count if count else 0.0)

    def _model_inputs(
        self, model: Any, inputs: Mapping[str, Any], router: bool = True
    ) -> dict[str, Any]:
        """What a scoring forward takes: all that TRL would hand to the model, and the table.

        Beside a table of ours a key that nobody would read is an error.
        """
        known = _MODEL_KEYS[self.layout] | _NOT_OF_THE_MODEL
        foreign = sorted(inputs.keys() - known) if TABLE_KEY in inputs else []
        if foreign and isinstance(self.data_collator, PairCollator):
            names = ", ".join(f"`{name}`" for name in foreign)
            raise ValueError(f"the batch has keys that would be ignored: {names}")
        table = _table(inputs)
        if self.ld_alpha is not None:
            table = ld_table(table, self.ld_alpha)
        model_inputs = _of_the_model(inputs)
        if SHARED_ROWS in inputs:
            model_inputs |= inputs[SHARED_ROWS].inputs_for(self.accelerator.unwrap_model(model))
        if self.aux_loss_enabled:  # the reference has no use for it
            model_inputs["output_router_logits"] = router
        return {**model_inputs, "use_cache": False, "score_table": table}

    def evaluate(
        self,
        eval_dataset: str | Dataset | Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As TRL's; data with both reference columns may also come after training has begun."""
        if isinstance(eval_dataset, Mapping):
            metrics: dict[str, float] = {}
            for name, dataset in eval_dataset.items():
                metrics |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if (
            isinstance(eval_dataset, Dataset)
            and self.precompute_ref_logps
            and (self._store is not None or set(REFERENCE) <= set(eval_dataset.column_names))
        ):
            prepared = self._prepare_dataset(eval_dataset, self.processing_class, self.args, "eval")
            size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            prepared = self._precompute_ref_logps(prepared, "eval", size)
            return transformers.Trainer.evaluate(self, prepared, ignore_keys, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def _inputs_for(model: Any) -> Callable[[Batch], dict[str, Any]]:
    return lambda batch: batch.inputs_for(model)


def _of_the_model(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in _NOT_OF_THE_MODEL}


def _table(inputs: Mapping[str, Any]) -> ScoreTable:
    """The table of a batch; of another collator's, what its completion mask says."""
    if TABLE_KEY in inputs:
        return inputs[TABLE_KEY]
    if "completion_mask" not in inputs:
        raise ValueError(
            f"the batch has neither a score table under `{TABLE_KEY}` nor a `completion_mask`\n"
            "hint: batches come from PairCollator, or from a collator with TRL's keys"
        )
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return ScoreTable.from_labels(labels).compact()
