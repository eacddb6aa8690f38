"""Scoring inside a model's own forward pass, where DDP, FSDP2 and PEFT see it.

A wrapper works on what passes through ``model(...)``. A backbone and a head that are called from
outside it are not averaged over ranks (DDP says nothing) or not gathered (FSDP2).
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_ext.errors import TensorError
from dpo_ext.torch.head import is_dtensor
from dpo_ext.torch.linear import PLANS, linear_sequence_logps, linear_token_scores
from dpo_ext.torch.logps import STATS, TokenScores, check_is_table, only, sum_sequences
from dpo_ext.torch.table import ScoreTable

_ORIGINAL, _PLAN = "_dpo_ext_forward", "_dpo_ext_plan"


class ModelScores(NamedTuple):
    """What a model with `attach_scoring` returns for a score table.

    - ``logps``: (n_groups, group_size) float32, log-prob of each sequence; differentiable.
    - ``tokens``: `TokenScores` of the table's M tokens if ``score_stats`` names any, else None.
    """

    logps: Tensor
    tokens: TokenScores | None = None


def attach_scoring(model: Any, *, plan: str = "auto") -> Any:
    """The model, whose forward pass also takes ``score_table=`` and then returns log-probs.

    Same as, for ``scores = model(**inputs, score_table=table)``::

        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        head   = model.get_output_embeddings()
        scores.logps = linear_sequence_logps(hidden, head.weight, table, bias=head.bias, ...)

    with the softcap and scale of the model's configuration, but inside ``model.forward``, so that
    the hooks of DDP, FSDP2 and PEFT run: attach, then wrap (``ddp = DDP(attach_scoring(model))``).
    Backbone and head are looked up at each call, since PEFT and FSDP2 replace them. Without
    ``score_table`` the original forward runs, so generation and other losses are unchanged; its
    signature is kept. Attaching again only sets the plan.

    The forward pass takes:
        score_table: `ScoreTable` of the rows of the flattened hidden states, on their device.
        score_stats: any of ``"logps"``, ``"entropy"``, ``"mean_logit"``, ``"log_sum_sq"``,
            ``"is_top1"``; if there is one, ``.tokens`` holds these of each token.
        anything else: as before, except ``labels`` and ``logits_to_keep``. ``use_cache`` is False:
            with a cache, packed segments would see each other.

    Args:
        model: a Hugging Face causal language model, or a PEFT or DDP wrapper around one.
        plan: as in `linear_sequence_logps`.

    Returns:
        The same object. Its forward returns `ModelScores` for a score table.

    Raises:
        TypeError: ``model`` has no backbone and head as Hugging Face models do, is an
            encoder-decoder, or learns a prompt (its virtual tokens would shift every row).
        TensorError: an adapter on the head, or (at the call) a head that is quantised or a DTensor.
        ValueError: an unknown ``plan``; at the call, ``labels``, ``logits_to_keep`` or an unknown
            name in ``score_stats``.

    Numerics: as `linear_sequence_logps`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> model = attach_scoring(LlamaForCausalLM(config))
    >>> ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    >>> labels = torch.tensor([[-100, -100, 3], [-100, -100, 4]])
    >>> model(input_ids=ids, score_table=ScoreTable.from_labels(labels)).logps.shape
    torch.Size([1, 2])
    >>> model(input_ids=ids).logits.shape
    torch.Size([2, 3, 11])
    """
    if plan not in PLANS:
        raise ValueError(f"`plan` must be one of {', '.join(PLANS)}, found {plan!r}")
    inner = _inner_model(model)
    _head(inner)
    setattr(inner, _PLAN, plan)
    if _ORIGINAL in vars(inner):
        return model

    @functools.wraps(type(inner).forward)
    def forward(
        self: Any,
        *args: Any,
        score_table: ScoreTable | None = None,
        score_stats: Any = (),
        **kwargs: Any,
    ) -> Any:
        if score_table is not None:
            return _score(self, score_table, score_stats, args, kwargs)
        if score_stats:
            raise ValueError("`score_stats` needs a `score_table`")
        return getattr(self, _ORIGINAL)(*args, **kwargs)

    # Bound methods: a deep copy of the model then scores with the copy's weights, not with these.
    setattr(inner, _ORIGINAL, inner.forward)
    inner.forward = MethodType(forward, inner)
    return model


def _inner_model(model: Any) -> Any:
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
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(f"`model` must be decoder-only, found {type(model).__name__}")
    backbone = getattr(model, "base_model", None)
    if not hasattr(model, "get_output_embeddings") or backbone is None or backbone is model:
        raise TypeError(
            "`model` must have `base_model` and `get_output_embeddings()` as Hugging Face's causal "
            f"language models have, found {type(model).__name__}\n"
            "hint: call linear_sequence_logps with your own hidden states and head"
        )
    return model


def _head(model: Any) -> Any:
    """The linear layer that gives logits, as it is now."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT trains a copy of the whole layer
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        disabled = head.disable_adapters or not active
        head = head.original_module if disabled else head.modules_to_save[active[0]]
    if hasattr(head, "base_layer"):
        raise TensorError(
            "the output head carries an adapter, whose product is not part of its weight\n"
            "hint: leave the head out of `target_modules`, or put it into `modules_to_save`"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise TensorError(
            "the output head must be a linear layer with a floating-point weight (V, H), "
            f"found {type(head).__name__}"
        )
    return head


def logit_transform(config: Any) -> dict[str, float | None]:
    """``logit_scale`` and ``softcap`` that a Hugging Face model applies to its head's logits.

    The same factor has a name of its own in several families; Granite and MiniCPM divide by it.

    >>> from transformers import Gemma2Config, GraniteConfig
    >>> logit_transform(Gemma2Config())
    {'logit_scale': 1.0, 'softcap': 30.0}
    >>> logit_transform(GraniteConfig(logits_scaling=8.0))
    {'logit_scale': 0.125, 'softcap': None}
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def first(*names: str) -> float | None:
        return next((v for n in names if (v := getattr(text, n, None)) is not None), None)

    scale = first("logit_scale", "output_multiplier", "lm_head_multiplier")
    divisor = first("logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1.0 / divisor
    softcap = first("final_logit_softcapping", "logits_soft_cap")
    return {"logit_scale": 1.0 if scale is None else scale, "softcap": softcap}


def _score(
    model: Any, table: ScoreTable, stats: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelScores:
    """The forward pass of a model with a score table."""
    check_is_table(table)
    names = (stats,) if isinstance(stats, str) else tuple(stats)
    for name in names:
        if name != "logps" and name not in STATS:
            accepted = ", ".join(("logps", *STATS))
            raise ValueError(f"`score_stats` must be among {accepted}, found {name!r}")
    if args:  # the backbone's positions differ from the model's
        bound = inspect.signature(type(model).forward).bind_partial(model, *args).arguments
        kwargs = {**dict(list(bound.items())[1:]), **kwargs}
    for name in ("labels", "logits_to_keep", "past_key_values"):
        value = kwargs.pop(name, None)
        if isinstance(value, Tensor) or value:
            raise ValueError(f"`{name}` cannot be combined with `score_table`")
    kwargs.pop("return_dict", None)
    kwargs["use_cache"] = False
    hidden = model.base_model(**kwargs)[0]
    head = _head(model)
    weight, bias = head.weight, getattr(head, "bias", None)
    if is_dtensor(weight):
        raise TensorError(
            "the output head's weight is a DTensor, sharded by itself\n"
            "hint: with FSDP2 leave the head to the root: fully_shard(layer) for each layer, then "
            "fully_shard(model)"
        )
    if hidden.device != weight.device:  # a model spread over devices
        hidden = hidden.to(weight.device)
    how: dict[str, Any] = {**logit_transform(model.config), "plan": getattr(model, _PLAN)}
    if not names:
        return ModelScores(linear_sequence_logps(hidden, weight, table, bias=bias, **how))
    asked = tuple(name for name in names if name != "logps")
    tokens = linear_token_scores(hidden, weight, table, bias=bias, stats=asked, **how)
    kernels = tokens.logps.dtype != torch.float64
    return ModelScores(sum_sequences(tokens.logps, table, kernels), only(tokens, asked))
