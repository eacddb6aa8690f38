"""The head of a model of Hugging Face's: what multiplies the hidden states, and what follows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dpo_ext.errors import TensorError
from dpo_ext.torch.adapters import Adapted, adapted, adapter_state
from dpo_ext.torch.agreement import Logits, text_config
from dpo_ext.torch.logps.lowrank import LowRank
from dpo_ext.torch.logps.scores import is_dtensor


class Head(NamedTuple):
    """A linear head: the module that the model calls, weight (V, H), bias (V,) or None, and the
    adapter beside them, if one is active.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    low: LowRank | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Its raw logits."""
        if self.low is None:
            return linear(hidden, self.weight, self.bias)
        columns = self.low.columns
        z = linear(hidden, self.weight, self.bias if columns is None else None)
        with torch.autocast(hidden.device.type, enabled=False):
            self.low.add_to(z.flatten(0, -2), hidden.flatten(0, -2), self.bias)
        return z

    def to(self, dtype: torch.dtype) -> Head:
        """The same in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        low = self.low
        if low is not None:
            low = LowRank(*(None if t is None else t.to(dtype) for t in low))  # type: ignore[arg-type]
        return Head(self.module, self.weight.to(dtype), bias, low)


def head_state(model: Any) -> tuple[Any, ...]:
    """What a comparison of a model's head was made for: another module, hook, dtype or adapter
    wants another.
    """
    head = output_of(model)
    inner: Any = id(getattr(head, "base_layer", head))
    if hasattr(head, "modules_to_save"):
        inner = (head.disable_adapters, *map(str, head.active_adapters))
    state: tuple[Any, ...] = ()
    if isinstance(head, nn.Module):
        hooks = [*getattr(head, "_forward_hooks", ()), *getattr(head, "_forward_pre_hooks", ())]
        off = getattr(head, "disable_adapters", None)
        state = (*hooks, id(vars(head).get("forward")), off, *adapter_state(head))
    weight = getattr(head, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) else None
    return (id(head), inner, type(head), state, dtype)


def inner_model(model: Any) -> Any:
    """The Hugging Face model inside PEFT's and DDP's wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, found {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if hasattr(model, "get_base_model"):
        config = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise TypeError(
                "`model` learns a prompt: its virtual tokens shift every row of the score table"
            )
        model = model.get_base_model()
    heads = getattr(model, "get_output_embeddings", None)
    has_base = getattr(model, "base_model", model) is not model
    if heads is None or not (has_base or output_of(model) is not None):
        raise TypeError(
            "`model` must have `base_model` and `get_output_embeddings()` as Hugging Face's causal "
            f"language models have, found {type(model).__name__}\n"
            "hint: call linear_sequence_logps with your own hidden states and head"
        )
    return model


def output_of(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def linear_head(model: Any) -> Head:
    """The linear layer that gives logits, as it is now; TensorError where there is none."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise TensorError(f"the backbone of {type(model).__name__} is an encoder-decoder")
    if getattr(model, "base_model", model) is model:
        raise TensorError(f"{type(model).__name__} has no backbone beside its head")
    head = output_of(model)
    if hasattr(head, "modules_to_save"):  # PEFT trains a copy of the whole layer
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        disabled = head.disable_adapters or not active
        head = head.original_module if disabled else head.modules_to_save[active[0]]
    layer, low, shift = adapted(head) if hasattr(head, "base_layer") else Adapted(head)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise TensorError(
            "the output head must be a linear layer with a floating-point weight (V, H), "
            f"found {type(layer).__name__}"
        )
    if is_dtensor(weight):
        raise TensorError(
            "the output head's weight is a DTensor, sharded by itself\n"
            "hint: with FSDP2 leave the head to the root: fully_shard(layer) for each layer, then "
            "fully_shard(model)"
        )
    if weight.device.type == "meta" or weight.numel() == 0:
        raise TensorError(
            "the output head's weight is elsewhere, and comes when the head is called"
        )
    bias = getattr(layer, "bias", None)
    if shift is not None:
        bias = (shift if bias is None else bias.to(shift.dtype) + shift).to(weight.dtype)
    return Head(head, weight, bias, low)


def logit_transform(config: Any) -> Logits:
    """``logit_scale`` and ``softcap`` that a Hugging Face model applies to its head's logits.

    The same factor has a name of its own in several families; Granite and MiniCPM divide by it.
    Some have the name and do not apply it: `attach_scoring` compares.

    >>> from transformers import Gemma2Config, GraniteConfig
    >>> logit_transform(Gemma2Config())
    {'logit_scale': 1.0, 'softcap': 30.0}
    >>> logit_transform(GraniteConfig(logits_scaling=8.0))
    {'logit_scale': 0.125, 'softcap': None}
    """
    text = text_config(config)

    def first(*names: str) -> float | None:
        return next((v for n in names if (v := getattr(text, n, None)) is not None), None)

    scale = first("logit_scale", "output_multiplier", "lm_head_multiplier")
    divisor = first("logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1.0 / divisor
    softcap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return {"logit_scale": 1.0 if scale is None else scale, "softcap": softcap}


def is_usable(transform: Logits) -> bool:
    numbers = [value for value in transform.values() if value is not None]
    return all(isinstance(n, (int, float)) and 0 < n < float("inf") for n in numbers)
