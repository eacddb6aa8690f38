"""What becomes of each option of TRL 1.16: honoured by ours, left to TRL, or refused by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import trl
from datasets import IterableDataset

from dpo_ext.data.options import Options, settings
from dpo_ext.torch import preference_loss

LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)

HONOURED: Mapping[str, str] = {
    "dataset_num_proc": "as the number of threads that encode; no process is forked",
    "max_length": "a pair whose prompt alone fills it is dropped, longer sides are cut",
    "truncation_mode": "both; `keep_end` cuts each side by itself, as TRL does",
    "pad_to_multiple_of": "by the collator",
    "precompute_ref_log_probs": "computed at construction, kept in memory, read from no cache",
    "precompute_ref_batch_size": "pairs in a batch of that pass",
    "loss_type": f"one or several of {', '.join(LOSS_TYPES)}",
    "loss_weights": "the factors of several losses",
    "label_smoothing": "by `robust`, `exo_pair`, both `aot`; others ignore it as in TRL, but warn",
    "beta": "by the loss",
    "f_divergence_type": "with `sigmoid`; with other losses by TRL's own head and loss",
    "f_alpha_divergence_coef": "of `alpha_divergence`",
    "ld_alpha": "as weights of tokens; with `sft` by TRL's own head and loss",
    "use_weighting": "WPO's weights of pairs",
    "discopop_tau": "of `discopop`",
    "router_aux_loss_coef": "the factor of the router loss of a mixture of experts",
}
"""Fields of ``trl.DPOConfig`` that our layers read, and how."""

BY_TRL: Mapping[str, str] = {
    "model_init_kwargs": "TRL loads the model",
    "trust_remote_code": "TRL loads the model",
    "disable_dropout": "in both models",
    "pad_token": "the tokenizer's is set",
    "sync_ref_model": "its callback moves the reference",
    "ref_model_mixup_alpha": "of `sync_ref_model`",
    "ref_model_sync_steps": "of `sync_ref_model`",
    "activation_offloading": "around each step",
    "padding_free": "TRL 1.16 itself warns and pads; `layout='packed'` does not pad",
    # From here on fields of transformers.TrainingArguments that TRL treats in a way of its own.
    "use_liger_kernel": "the layers alone, as TRL has it",
    "liger_kernel_config": "of `use_liger_kernel`",
    "fsdp": "version 2",
    "fsdp_config": "of `fsdp`",
    "deepspeed": "ZeRO to stage 3, which keeps the logits of the scored tokens",
    "label_smoothing_factor": "TRL does not read it; `label_smoothing` is the option of the loss",
}
"""Fields that TRL alone reads, with our layers inside or without."""

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "parallelism_config": ((None,), "use DDP, FSDP2 or ZeRO"),
}
"""Fields that must have one of the values named here, and a hint for who needs another."""


def check_args(args: trl.DPOConfig) -> None:
    """Raise `ValueError` for the first option, here or of `accelerate launch`, not honoured."""
    for name, (allowed, hint) in REFUSED.items():
        value = getattr(args, name)
        if value not in allowed:
            raise ValueError(f"`{name}` must be {allowed[0]!r}, found {value!r}\nhint: {hint}")
    on = ("1", "true", "t", "yes", "y", "on")
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() in on:
        raise ValueError(
            "`ACCELERATE_USE_PARALLELISM_CONFIG` is set: such models have not been tried here\n"
            "hint: use DDP, FSDP2 or ZeRO; docs/distributed.md has a loop for tensor parallelism"
        )
    config: Any = args.fsdp_config or {}  # read from its file by TrainingArguments
    version = os.environ.get("FSDP_VERSION") or config.get("version", 1)
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in on or args.fsdp
    if is_sharded and int(version) < 2:
        raise ValueError(
            "`fsdp`: expected version 2, found 1, which flattens the weight of the head\n"
            "hint: fsdp_config={'version': 2}, or fsdp_version: 2 for `accelerate launch`"
        )
    for name in args.loss_type:
        if name not in LOSS_TYPES:
            raise ValueError(f"`loss_type` must be among {LOSS_TYPES}, found {name!r}")


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
    if "discopop" in losses:
        options["discopop_tau"] = getattr(source, "args", source).discopop_tau
    if source.f_divergence_type != "reverse_kl":
        options["f_divergence_type"] = source.f_divergence_type
        if source.f_divergence_type == "alpha_divergence":
            options["f_alpha_divergence_coef"] = source.f_alpha_divergence_coef
    return options


OF_TRL = ("max_length", "truncation", "boundary", "on_bad", "threads", "columns")
"""Options of a data set that follow from the configuration, or are TRL's own way."""


def check_data_options(given: Options) -> Options:
    """The options with which rows are read; `ValueError` for one of `OF_TRL` or a bad value."""
    for name in given:
        if name in OF_TRL:
            raise ValueError(f"`data_options`: `{name}` is what the configuration says")
    settings({**given, "boundary": "trl"})
    return given


def check_tokens_per_batch(
    tokens_per_batch: int, layout: str, args: trl.DPOConfig | None, dataset: Any
) -> None:
    """Raise `ValueError` for a budget of tokens beside what it cannot go with."""
    if isinstance(tokens_per_batch, bool) or not isinstance(tokens_per_batch, int):
        raise TypeError(f"`tokens_per_batch` must be an int, found {tokens_per_batch!r}")
    if tokens_per_batch < 1:
        raise ValueError(f"`tokens_per_batch` must be at least 1, found {tokens_per_batch}")
    if layout == "padded":
        raise ValueError('`tokens_per_batch` needs `layout="packed"` or "shared"')
    if isinstance(dataset, IterableDataset):
        raise ValueError("`tokens_per_batch` packs all pairs of an epoch: a stream has no length")
    if args is None:
        return
    if args.train_sampling_strategy != "random" or args.auto_find_batch_size:
        raise ValueError(
            "`tokens_per_batch` makes the batches of an epoch: `train_sampling_strategy` must be "
            "'random' and `auto_find_batch_size` False"
        )
    logps = torch.zeros(1, 2)  # a dry run: some losses are no sum over pairs
    try:
        preference_loss(logps, logps, lengths=logps.long() + 1, num_pairs=1.0, **loss_options(args))
    except ValueError as error:
        if "num_pairs" in str(error):
            raise ValueError(f"`tokens_per_batch`: {error}") from error
