"""`DPOTrainer`: TRL 1.16's, with our data path, log-probs and losses inside."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset
from datasets.table import InMemoryTable
from torch.utils.data import DataLoader
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.options import Options
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import DataError, TensorError
from dpo_ext.layout.batch import LAYOUTS
from dpo_ext.pairs import IDS, REFERENCE
from dpo_ext.report import Report
from dpo_ext.torch import assert_packing_safe, attach_scoring, preference_loss
from dpo_ext.trl.collator import NUM_TOKENS, SERVED, TABLE_KEY, PairCollator
from dpo_ext.trl.options import (
    check_args,
    check_data_options,
    check_dataset,
    check_model,
    loss_options,
)

logger = logging.getLogger(__name__)

_MODEL_KEYS = {name: LAYOUTS[name].model_inputs for name in SERVED}
BATCH_KEYS = {
    "padded": {*_MODEL_KEYS["padded"], "completion_mask", *REFERENCE, TABLE_KEY},
    "packed": {*_MODEL_KEYS["packed"], "completion_lengths", NUM_TOKENS, *REFERENCE, TABLE_KEY},
}


class DPOTrainer(trl.DPOTrainer):
    """`trl.DPOTrainer` of TRL 1.16 with our encoding, log-probs and losses, in TRL's own loop.

    Same as ``trl.DPOTrainer`` with the same arguments: the same pairs in the same steps, and the
    same ``log_history`` up to the rounding of float32. Rafailov et al. 2023, arXiv:2305.18290.

    ::

        from dpo_ext.trl import DPOTrainer
        trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=ds, processing_class=tok,
                             layout="packed")
        trainer.train()

    What is different inside. Rows are encoded once, in threads, into the columns ``prompt_ids,
    chosen_ids, rejected_ids``. Only scored tokens reach ``lm_head``, inside the model's own
    forward, so that DDP sees one forward. Log-probs are summed in float64. Metrics are sums and
    counts, gathered in one call. Precomputed reference log-probs are never read from a cache: TRL's
    can be stale.

    Args:
        model, ref_model, args, processing_class, compute_metrics, callbacks, optimizers,
            peft_config: as in TRL.
        train_dataset, eval_dataset: `datasets.Dataset`, for `eval_dataset` also a dict of them;
            text or messages, with or without ``prompt``, or the three id columns. Where
            ``precompute_ref_log_probs`` is on, the columns ``ref_chosen_logps, ref_rejected_logps``
            are used if both are there, and such data can be evaluated at any step.
        data_collator, quantization_config: None.
        layout: ``"padded"``, or ``"packed"``: the pairs of a micro-batch in one row without
            padding, for models that keep packed segments apart, attended segment by segment.
            Whether this one does is tried before the first step; one that does not, such as Mamba
            or a hybrid, gets padded batches, and a warning says so.
        data_options: how rows are read, as `PairDataset.from_files` documents it: `layout_of_rows`,
            `chat_template_kwargs`, `prompt_key`, `special_tokens_in_text` and the rest but for what
            TRL's configuration says (`OF_TRL`). By default as TRL reads them.

    Attributes:
        data_reports: by name of the data set, what became of its rows: read = kept + dropped,
            reason by reason. Bad rows are dropped and counted in one warning; so are pairs that TRL
            keeps although they teach nothing: sides that are blank, or identical once truncated.

    Raises:
        ValueError: an option that is not honoured, by name; `REFUSED` lists them.
        DataError: no row of a data set can be used.
        TokenizerError: the tokenizer has no ``tokenizer.json``.

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
        data_collator: None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        layout: str = "padded",
        data_options: Options | None = None,
    ) -> None:
        if layout not in SERVED:
            raise ValueError(f"`layout` must be one of {SERVED}, found {layout!r}")
        if args is not None:
            check_args(args)
        if quantization_config is not None:
            raise ValueError("`quantization_config`: quantized models are not supported")
        if data_collator is not None:
            raise ValueError(
                "`data_collator` must be None: a batch needs the score table of PairCollator\n"
                "hint: `max_length`, `truncation_mode`, `pad_to_multiple_of` of the configuration"
            )
        if layout == "packed" and compute_metrics is not None:
            raise ValueError(
                "`compute_metrics` must be None with `layout='packed'`: it wants padded logits"
            )
        if getattr(peft_config, "is_prompt_learning", False):
            raise ValueError("`peft_config`: prompt learning shifts rows, it is not supported")
        check_model("model", model)
        check_model("ref_model", ref_model)
        check_dataset("train_dataset", train_dataset)
        if isinstance(eval_dataset, Mapping):
            for name, dataset in eval_dataset.items():
                check_dataset(f"eval_dataset[{name!r}]", dataset)
        else:
            check_dataset("eval_dataset", eval_dataset)

        self.data_options = check_data_options(data_options or {})
        # `super().__init__` calls the methods below, so what they read must exist before it.
        self.layout = layout
        self.data_reports: dict[str, Report] = {}
        self._prepared: set[str] = set()  # fingerprints of data sets that are ours
        self._encoder: tuple[Any, Tokenizer] | None = None
        self._scores_by_itself = False
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self._attach()

    def _attach(self) -> None:
        """Make the models score in their forward and the collator emit the table; once.

        Models that are given as paths exist only inside TRL's constructor, and score there first.
        """
        if self._scores_by_itself:
            return
        check_model("model", self.model)
        if self.layout == "packed":
            self._choose_attention()
        stock = self.data_collator
        self.data_collator = PairCollator(
            stock.pad_token_id,
            stock.max_length,
            stock.truncation_mode,
            stock.pad_to_multiple_of,
            score_table=True,
            layout=self.layout,
        )
        attach_scoring(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        if self.ref_model is not None:
            attach_scoring(self.accelerator.unwrap_model(self.ref_model))
        self._scores_by_itself = True

    def _choose_attention(self) -> None:
        """Packed rows segment by segment; padded ones where segments would see each other."""
        inner = self.accelerator.unwrap_model(self.model)
        models = [inner] if self.ref_model is None else [inner, self.ref_model]
        for model in models:
            attach_scoring(model.get_base_model() if is_peft_model(model) else model)
        try:
            assert_packing_safe(inner)
        except TensorError as error:
            self.layout = "padded"
            logger.warning(
                "%s steps back from layout='packed' to 'padded': %s", type(inner).__name__, error
            )

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: trl.DPOConfig, dataset_name: str
    ) -> Dataset:
        """Encode the rows, which may hold ids already; what it returned once passes unchanged."""
        check_dataset(dataset_name, dataset)
        if isinstance(processing_class, transformers.ProcessorMixin):
            raise ValueError("`processing_class` must be a tokenizer: vision is not supported")
        if _fingerprint(dataset) in self._prepared:
            return dataset
        if self._encoder is None or self._encoder[0] is not processing_class:
            self._encoder = processing_class, Tokenizer.from_pretrained(processing_class)
        keep_start = args.truncation_mode == "keep_start"
        options: Options = {
            **self.data_options,
            # `keep_end` is left to the collator: TRL cuts each side alone, we cut a pair as one.
            "max_length": args.max_length if keep_start else None,
            "boundary": "trl",
            "on_bad": "skip",
            "threads": args.dataset_num_proc,
        }
        try:
            pairs = PairDataset.from_rows(dataset, self._encoder[1], **options)
        except DataError as error:
            if error.reason != "no_pairs":
                raise
            raise DataError(f"`{dataset_name}`: {error}", reason="no_pairs") from error
        self.data_reports[dataset_name] = pairs.report
        if not len(pairs):
            raise DataError(f"`{dataset_name}`: there are no rows", reason="no_pairs")
        if pairs.report.dropped or pairs.report.warned:
            logger.warning("%s: not every row was taken as it is\n%s", dataset_name, pairs.report)
        prepared = _as_dataset(pairs)
        self._prepared.add(_fingerprint(prepared))
        return prepared

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Add both reference columns unless they are there; the same on every rank, not cached."""
        if set(REFERENCE) <= set(dataset.column_names):
            return dataset
        self._attach()
        model = self.model if self.ref_model is None else self.ref_model
        loader = self.accelerator.prepare(
            DataLoader(
                dataset.select_columns(list(IDS)),
                batch_size=batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                generator=torch.Generator(),  # the loader would draw its seed from the global state
            )
        )
        values = []
        for batch in loader:
            sides = torch.stack(self.compute_ref_log_probs(model, batch), dim=1)
            values.append(self.accelerator.gather_for_metrics(sides).cpu())
        columns = torch.cat(values).numpy()
        for index, column in enumerate(REFERENCE):
            dataset = dataset.add_column(column, columns[:, index])
        self._prepared.add(_fingerprint(dataset))
        return dataset

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference log-probs of one batch, without gradient: (N,) float32 chosen, (N,) rejected.

        `model` is the reference, or the PEFT model: its adapter is then ``"ref"``, or switched off.
        """
        adapter: Any = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)
        checkpointing = disable_gradient_checkpointing(
            self.model, self.args.gradient_checkpointing_kwargs
        )
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            logps = model(**self._model_inputs(inputs, router=False)).logps
        return logps[:, 0], logps[:, 1]

    def _compute_loss(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], return_outputs: bool
    ) -> Any:
        """The loss of a batch that is scored in one forward of `model`; `log` finds the metrics."""
        scores = model(
            **self._model_inputs(inputs), score_stats=("entropy", "mean_logit", "is_top1")
        )
        if self.precompute_ref_logps:
            reference = [inputs[name] for name in REFERENCE]
        else:
            ref_model = self.model if self.ref_model is None else self.ref_model
            reference = list(self.compute_ref_log_probs(ref_model, inputs))
        # What TRL divides by in `ipo`: position 0 is counted, although nothing scores it.
        if self.layout == "packed":
            lengths = inputs["completion_lengths"]
        else:  # the chosen half above the rejected half
            lengths = inputs["completion_mask"].sum(dim=1).view(2, -1).T
        out = preference_loss(
            scores.logps,
            torch.stack(reference, dim=1).to(scores.logps.dtype),
            lengths=lengths,
            **loss_options(self),
        )
        mode, loss = "train" if self.model.training else "eval", out.loss
        self._record(mode, inputs, scores, out)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss
            aux_loss = self.accelerator.gather_for_metrics(scores.aux_loss.detach())
            self._metrics[mode]["aux_loss"].append(aux_loss.mean().item())
        if not return_outputs:
            return loss
        with torch.no_grad():  # `compute_metrics` wants logits, which scoring never builds
            model_inputs = {key: inputs[key] for key in _MODEL_KEYS[self.layout]}
            return loss, model(**model_inputs, use_cache=False)

    def _record(self, mode: str, inputs: Mapping[str, Any], scores: Any, out: Any) -> None:
        """TRL's metrics of one batch: sums and counts, gathered over the ranks in one call."""
        table, tokens, logps = inputs[TABLE_KEY], scores.tokens, scores.logps.detach()
        M, S = table.targets.numel(), table.n_sequences
        chosen = torch.arange(S, device=logps.device) % 2 == 0
        chosen = torch.repeat_interleave(chosen, table.lengths.flatten(), output_size=M)
        one = torch.ones((), device=logps.device)
        real = (
            inputs["attention_mask"].sum() if self.layout == "padded" else one * inputs[NUM_TOKENS]
        )
        pairs = one * len(logps)
        sums = {
            "entropy": (tokens.entropy.sum(), one * M),
            "num_tokens": (real, one),
            "logits/chosen": (tokens.mean_logit[chosen].sum(), chosen.sum()),
            "logits/rejected": (tokens.mean_logit[~chosen].sum(), (~chosen).sum()),
            "mean_token_accuracy": (tokens.is_top1[chosen].sum(), chosen.sum()),
            "rewards/chosen": (out.chosen_rewards.sum(), pairs),
            "rewards/rejected": (out.rejected_rewards.sum(), pairs),
            "rewards/accuracies": ((out.chosen_rewards > out.rejected_rewards).sum(), pairs),
            "rewards/margins": ((out.chosen_rewards - out.rejected_rewards).sum(), pairs),
            "logps/chosen": (logps[:, 0].sum(), pairs),
            "logps/rejected": (logps[:, 1].sum(), pairs),
        }
        local = torch.stack([torch.stack([a.double(), b.double()]) for a, b in sums.values()])
        gathered = self.accelerator.gather(local[None]).sum(dim=0).tolist()
        metrics = self._metrics[mode]
        for name, (total, count) in zip(sums, gathered, strict=True):
            if name == "num_tokens":  # a running sum, over training alone
                self._total_train_tokens += int(total) if mode == "train" else 0
                metrics[name] = [self._total_train_tokens]
            else:
                metrics[name].append(total / count if count else 0.0)

    def _model_inputs(self, inputs: Mapping[str, Any], router: bool = True) -> dict[str, Any]:
        """What a scoring forward takes of a batch; a key that nobody would read is an error."""
        foreign = sorted(inputs.keys() - BATCH_KEYS[self.layout])
        if foreign:
            names = ", ".join(f"`{name}`" for name in foreign)
            raise ValueError(f"the batch has keys that would be ignored: {names}")
        if TABLE_KEY not in inputs:
            raise ValueError(
                f"the batch has no score table under `{TABLE_KEY}`\n"
                "hint: batches come from PairCollator(..., score_table=True)"
            )
        model_inputs = {name: inputs[name] for name in _MODEL_KEYS[self.layout]}
        if self.aux_loss_enabled:  # the reference has no use for it
            model_inputs["output_router_logits"] = router
        return {**model_inputs, "use_cache": False, "score_table": inputs[TABLE_KEY]}

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
            and set(REFERENCE) <= set(eval_dataset.column_names)
        ):
            prepared = self._prepare_dataset(eval_dataset, self.processing_class, self.args, "eval")
            return transformers.Trainer.evaluate(self, prepared, ignore_keys, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def _fingerprint(dataset: Dataset) -> str:
    return dataset._fingerprint  # noqa: SLF001 - `datasets` has no public name for it


def _as_dataset(pairs: PairDataset) -> Dataset:
    """The pairs as Arrow columns: ids, and reference log-probs where the rows had them."""
    columns: dict[str, pa.Array] = {}
    for name in IDS:
        ragged = getattr(pairs, name)
        columns[name] = pa.LargeListArray.from_arrays(ragged.offsets, ragged.values)
    if pairs.ref_logps is not None:
        for index, name in enumerate(REFERENCE):
            columns[name] = pa.array(pairs.ref_logps[:, index].astype(np.float32))
    return Dataset(InMemoryTable(pa.table(columns)))
