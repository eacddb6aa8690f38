"""What `dpo_ext.trl.DPOTrainer` does with each option of TRL 1.16: honoured, or refused by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset

from dpo_ext.data.options import Options, settings
from dpo_ext.torch import preference_loss

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust")

HONOURED: Mapping[str, str] = {
    "model_init_kwargs": "by TRL, which loads the model",
    "trust_remote_code": "by TRL, which loads the model",
    "disable_dropout": "by TRL",
    "dataset_num_proc": "as the number of threads that encode; no process is forked",
    "max_length": "a pair whose prompt alone fills it is dropped, longer sides are cut",
    "truncation_mode": "both; `keep_end` cuts each side by itself, as TRL does",
    "pad_to_multiple_of": "by the collator",
    "precompute_ref_log_probs": "computed at construction, kept in memory, read from no cache",
    "precompute_ref_batch_size": "pairs in a batch of that pass",
    "loss_type": f"one or several of {', '.join(LOSS_TYPES)}",
    "loss_weights": "the factors of several losses",
    "label_smoothing": "by `robust`; the other losses ignore it, as in TRL, but warn once",
    "beta": "by the loss",
    "pad_token": "by TRL, which sets the tokenizer's",
    "router_aux_loss_coef": "the factor of the router loss of a mixture of experts",
}
"""Fields of ``trl.DPOConfig`` that do what TRL documents, and how."""

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "padding_free": ((False,), "TRL 1.16 itself warns and pads; `layout='packed'` does not pad"),
    "ld_alpha": ((None,), "LD-DPO needs trl.DPOTrainer"),
    "f_divergence_type": (("reverse_kl",), "other divergences need trl.DPOTrainer"),
    "f_alpha_divergence_coef": ((0.5,), "it belongs to `f_divergence_type`"),
    "use_weighting": ((False,), "WPO needs trl.DPOTrainer"),
    "discopop_tau": ((0.05,), "it belongs to `loss_type='discopop'`"),
    "activation_offloading": ((False,), "use gradient checkpointing"),
    "sync_ref_model": ((False,), "the reference stays fixed"),
    "ref_model_mixup_alpha": ((0.6,), "it belongs to `sync_ref_model`"),
    "ref_model_sync_steps": ((512,), "it belongs to `sync_ref_model`"),
    # From here on fields of transformers.TrainingArguments: not served here, or ignored by TRL.
    "use_liger_kernel": ((False,), "it replaces the forward that scores"),
    "liger_kernel_config": ((None,), "it belongs to `use_liger_kernel`"),
    "label_smoothing_factor": ((0.0,), "`label_smoothing` is the option of the loss"),
    "torch_compile": ((False,), "not tried with scoring inside the forward"),
    "deepspeed": ((None, False, ""), "use DDP"),
    "fsdp": ((None, False, "", []), "use DDP"),
    "parallelism_config": ((None,), "use DDP"),
}
"""Fields that must have one of the values named here, and a hint for who needs another."""


def check_args(args: trl.DPOConfig) -> None:
    """Raise `ValueError` for the first option, here or of `accelerate launch`, not honoured."""
    for name, (allowed, hint) in REFUSED.items():
        value = getattr(args, name)
        if value not in allowed:
            raise ValueError(f"`{name}` must be {allowed[0]!r}, found {value!r}\nhint: {hint}")
    for name in ("DEEPSPEED", "FSDP", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in (
            "1",
            "true",
            "t",
            "yes",
            "y",
            "on",
        ):
            raise ValueError(f"`ACCELERATE_USE_{name}` is set: sharded models are not supported")
    for name in args.loss_type:
        if name not in LOSS_TYPES:
            raise ValueError(f"`loss_type` must be among {LOSS_TYPES}, found {name!r}")
    logps = torch.zeros(1, 2)  # a dry run: the loss knows the domains of its parameters
    preference_loss(logps, logps, lengths=logps.long() + 1, **loss_options(args))
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise ValueError("`accelerator_config`: `dispatch_batches` cuts batches up, leave it off")


def loss_options(source: Any) -> dict[str, Any]:
    """What `preference_loss` takes besides tensors, from a `DPOConfig` or from TRL's trainer."""
    losses = getattr(source, "loss_types", None) or source.loss_type
    options = {
        "loss": losses,
        "loss_weights": source.loss_weights or [1.0] * len(losses),
        "beta": source.beta,
        "compat": "trl-1.16",
    }
    if source.label_smoothing:
        options["label_smoothing"] = source.label_smoothing
    return options


def check_model(name: str, model: Any) -> None:
    """Raise `ValueError` for a model that cannot be scored row by row; a path passes."""
    adapters = getattr(model, "peft_config", None) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        raise ValueError(f"`{name}`: prompt learning shifts rows, it is not supported")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"`{name}`: quantized models are not supported")


def check_dataset(name: str, dataset: Any) -> None:
    """Raise `ValueError` for a stream or images; what is no data set at all is left to TRL."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"`{name}`: streaming is not supported, expected a datasets.Dataset")
    if isinstance(dataset, Dataset):
        columns = {"image", "images"} & set(dataset.column_names)
        if columns:
            raise ValueError(f"`{name}`: vision data is not supported, found {sorted(columns)}")


OF_TRL = ("max_length", "truncation", "boundary", "on_bad", "threads", "columns")
"""Options of a data set that follow from the configuration, or are TRL's own way."""


def check_data_options(given: Options) -> Options:
    """The options with which rows are read; `ValueError` for one of `OF_TRL` or a bad value."""
    for name in given:
        if name in OF_TRL:
            raise ValueError(f"`data_options`: `{name}` is what the configuration says")
    settings({**given, "boundary": "trl"})
    return given
