"""The audit of TRL's first step: is the policy its own reference there, and is it seen to be?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import is_peft_available

from dpo_ext.torch.audit import (
    OF_OTHER_BATCHES,
    Drift,
    audit_first_step,
    causes_of,
    first_difference,
    in_eval_mode,
)

logger = logging.getLogger(__name__)
_OTHER = "the reference has other weights, `{}` for one"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def audit(
    trainer: Any,
    logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    score_again: Callable[[], Tensor],
) -> None:
    """Compares the log-probs of the first step with the reference's, if they must agree.

    Raises:
        RefLogpsError: as `audit_first_step`.
    """
    any_rank = _over_ranks(trainer)
    reason = why_not(trainer)
    if any_rank(reason is not None):
        logger.info("the first step is not audited: %s", reason or "as another rank says")
        return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    reference = trainer.ref_model
    reference = None if reference is None else trainer.accelerator.unwrap_model(reference)
    dtype = _dtype(trainer, policy)
    # An adapter of DoRA is another computation than none, though both give the same.
    apart = trainer.precompute_ref_logps or (reference is None and _is_peft(policy))
    slack = OF_OTHER_BATCHES if apart else 1.0
    drift = Drift(logps.detach().double(), ref_logps.double(), lengths, dtype, slack)
    if not any_rank(bool(drift.wrong.any())):
        return

    def causes(drift: Drift) -> Iterator[str]:
        yield from _of_precision(trainer)
        yield from causes_of(policy, reference)
        yield from _of_adapter(trainer, policy)

    noise = " and ".join(_noise(trainer, policy)) or "its training mode draws numbers"
    again = in_eval_mode(trainer.model, score_again)
    audit_first_step(
        again, ref_logps, lengths, dtype=dtype, slack=slack, causes=causes, any_rank=any_rank
    )
    logger.warning(
        "the policy is not its own reference at the first step: %s; in evaluation mode it is, and "
        "here log-probs are off by up to %.3g nats",
        noise,
        float((logps.detach() - again).abs().max()),
    )


def why_not(trainer: Any) -> str | None:
    """Why policy and reference need not agree, or None if they must."""
    if trainer.state.global_step:
        return "training goes on from a later step"
    if set(trainer.loss_types) == {"sft"}:
        return "the loss has no reference"
    if trainer.precompute_ref_logps:
        name = trainer.other_reference
        return None if name is None else _OTHER.format(name)
    if trainer.ref_model is None:
        return None
    if is_deepspeed_zero3_enabled():
        return "the weights of the reference are in pieces, which cannot be compared"
    name = difference(trainer)
    return None if name is None else _OTHER.format(name)


def difference(trainer: Any) -> str | None:
    """The name of a weight that policy and reference model do not share, or None."""
    if trainer.ref_model is None or is_deepspeed_zero3_enabled():
        return None
    models = (trainer.accelerator.unwrap_model(m) for m in (trainer.model, trainer.ref_model))
    return first_difference(*models)


def _noise(trainer: Any, policy: nn.Module) -> Iterator[str]:
    """What makes the policy's training mode draw numbers."""
    if trainer.neftune_noise_alpha is not None:
        yield f"NEFTune adds noise (neftune_noise_alpha={trainer.neftune_noise_alpha:g})"
    yield from (cause for cause in causes_of(policy, None) if cause.startswith("dropout"))


def _dtype(trainer: Any, policy: nn.Module) -> torch.dtype:
    """What rounds most: autocast, or the narrowest weights."""
    mixed = _DTYPES.get(trainer.accelerator.mixed_precision)
    kinds = {p.dtype for p in policy.parameters() if p.is_floating_point()}
    quantized = getattr(policy, "is_quantized", False)
    if mixed is not None or quantized:
        return mixed or torch.bfloat16
    return min(kinds, key=lambda dtype: (dtype.itemsize, dtype != torch.bfloat16))


def _over_ranks(trainer: Any) -> Callable[[bool], bool]:
    def any_rank(wrong: bool) -> bool:
        here = torch.tensor([wrong], device=trainer.accelerator.device)
        return bool(trainer.accelerator.gather(here).any())

    return any_rank if trainer.accelerator.num_processes > 1 else bool


def _of_precision(trainer: Any) -> Iterator[str]:
    mixed = trainer.accelerator.mixed_precision
    if trainer.precompute_ref_logps and mixed in _DTYPES:
        yield f"the policy computes under autocast in {mixed}: the reference's values may not be"


def _is_peft(policy: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(policy, PeftModel)


def _of_adapter(trainer: Any, policy: Any) -> Iterator[str]:
    """What an adapter does at its start, though the reference is the model without it."""
    if trainer.ref_model is not None or not _is_peft(policy) or "ref" in policy.peft_config:
        return
    for name, weight in policy.named_parameters():
        if ("lora_B" in name or "lora_embedding_B" in name) and bool((weight != 0).any()):
            yield f"the adapter is not zero at its start, `{name}` for one"
            break
    configs: list[Any] = list(policy.peft_config.values())
    saved = sorted(
        {name for config in configs for name in getattr(config, "modules_to_save", None) or ()}
    )
    if saved:
        yield f"`modules_to_save` holds {', '.join(saved)}"
    for config in configs:
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
            yield f"`init_lora_weights={start!r}` changes the weights below the adapter"
