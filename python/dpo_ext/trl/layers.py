"""Where one of our three layers (data, layout, head with loss) steps back to TRL's own, and why.

Each function gives a reason in words, which the trainer says once, or None: ours serves.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from datasets import IterableDataset

from dpo_ext.torch import preference_loss
from dpo_ext.trl.options import loss_options

# What turns text into ids in Python, where a subclass may do it in a way of its own.
_ENCODING = (
    *("__call__", "apply_chat_template", "encode", "tokenize", "_tokenize", "_encode_plus"),
    *("_batch_encode_plus", "convert_tokens_to_ids", "build_inputs_with_special_tokens"),
    *("prepare_for_tokenization", "_switch_to_input_mode"),
)


def why_not_data(dataset: Any, processing_class: Any) -> str | None:
    """Why rows are encoded by TRL."""
    if isinstance(dataset, IterableDataset):
        return "a stream is encoded row by row as it is read"
    if isinstance(processing_class, transformers.ProcessorMixin):
        return f"{type(processing_class).__name__} is a processor"
    if not getattr(processing_class, "is_fast", False):
        return f"{type(processing_class).__name__} has no `tokenizer.json`"
    for name in _ENCODING:
        owner = next((c for c in type(processing_class).__mro__ if name in vars(c)), None)
        if name in vars(processing_class) or not _is_of_transformers(owner):
            return f"{type(processing_class).__name__} has a `{name}` of its own"
    return None


def _is_of_transformers(owner: type | None) -> bool:
    return owner is None or owner.__module__.split(".")[0] == "transformers"


def why_not_scoring(args: Any, peft_config: Any, model: Any) -> str | None:
    """Why log-probs and loss are TRL's."""
    configs = [peft_config, *(getattr(model, "peft_config", None) or {}).values()]
    if any(getattr(config, "is_prompt_learning", False) for config in configs):
        return "a learned prompt puts tokens before each row"
    if "underflow_overflow" in [getattr(option, "value", option) for option in args.debug or ()]:
        return "`debug='underflow_overflow'` looks at what each module returns"
    if "sft" in args.loss_type:
        for name in ("ld_alpha", "use_weighting"):
            if getattr(args, name):
                return f"`{name}` leaves `sft` as it is"
    if args.ld_alpha is not None and not 0 <= args.ld_alpha <= 1:
        return f"`ld_alpha` is {args.ld_alpha}, outside [0, 1]"
    logps = torch.zeros(1, 2)  # a dry run: the loss knows the domains of its parameters
    try:
        preference_loss(logps, logps, lengths=logps.long() + 1, **loss_options(args))
    except ValueError as error:
        return str(error).partition("\n")[0]
    return None


def why_not_shared(args: Any) -> str | None:
    """Why prompts are not shared where that was asked for."""
    if args.max_length is not None and args.truncation_mode == "keep_end":
        return "`keep_end` cuts the prompts of both sides differently"
    if args.torch_compile:
        return "`torch_compile` knows no mask of prompts that are shared"
    return None


def why_not_packed(args: Any, compute_metrics: Any, data_collator: Any) -> str | None:
    """Why batches are padded where packed ones were asked for."""
    if data_collator is not None:
        return "`data_collator` makes its own batches"
    if compute_metrics is not None:
        return "`compute_metrics` wants padded logits"
    if args.neftune_noise_alpha:
        return "`neftune_noise_alpha` is a scale of the length of a row"
    if getattr(args.accelerator_config, "dispatch_batches", None):
        return "`dispatch_batches` cuts batches up by their rows"
    return None
