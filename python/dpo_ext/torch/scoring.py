"""Scoring inside a model's own forward pass, where DDP, FSDP2 and PEFT see it.

A wrapper works on what passes through ``model(...)``. A backbone and a head that are called from
outside it are not averaged over ranks (DDP says nothing) or not gathered (FSDP2).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dpo_ext.errors import TensorError
from dpo_ext.layout.masks import check_windows
from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch import pairwise
from dpo_ext.torch.logps.linear import (
    PLANS,
    choose_plan,
    linear_sequence_logps,
    linear_token_scores,
)
from dpo_ext.torch.logps.scores import (
    STATS,
    TokenScores,
    check_is_table,
    is_dtensor,
    only,
    sum_sequences,
)
from dpo_ext.torch.losses.compat import find_loss
from dpo_ext.torch.losses.pairs import PreferenceLoss

Model = TypeVar("Model", bound=nn.Module)
_ORIGINAL, _HEAD, _LOSS = "_dpo_ext_forward", "_dpo_ext_head", "_dpo_ext_loss"


class ModelScores(NamedTuple):
    """What a model with `attach_scoring` returns for a score table.

    - ``logps``: (n_groups, group_size) float32, log-prob of each sequence; differentiable.
      Detached where there is a ``loss``, which has the gradient then.
    - ``tokens``: `TokenScores` of the table's M tokens if ``score_stats`` names any, else None.
    - ``loss``: the scalar of ``preference``, where `attach_scoring` was given a loss.
    - ``preference``: `PreferenceLoss` with rewards and metrics, or None.
    - ``plan``: of the head, as it was taken.
    """

    logps: Tensor
    tokens: TokenScores | None = None
    loss: Tensor | None = None
    preference: PreferenceLoss | None = None
    plan: str | None = None


def attach_scoring(
    model: Model,
    *,
    plan: pairwise.Plan = "auto",
    loss: str | Sequence[str] | Mapping[str, Any] | None = None,
    chunk_rows: int | None = None,
    exact_target: bool = False,
) -> Model:
    """The model, whose forward pass also takes ``score_table=`` and then returns log-probs.

    Same as, for ``scores = model(**inputs, score_table=table)``::

        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        head   = model.get_output_embeddings()
        scores.logps = linear_sequence_logps(hidden, head.weight, table, bias=head.bias, ...)

    with the softcap and scale of the model's configuration, but inside ``model.forward``, so that
    the hooks of DDP, FSDP2 and PEFT run: attach, then wrap (``ddp = DDP(attach_scoring(model))``).
    Backbone and head are looked up at each call, since PEFT and FSDP2 replace them. Without
    ``score_table`` the original forward runs, so generation and other losses are unchanged; its
    signature is kept. Attaching again only sets the options.

    With ``loss`` the loss is computed inside as well, so that the head needs no recompute (plan
    ``pairwise`` of `linear_preference_loss`)::

        model = wrap(attach_scoring(model, loss={"loss": "dpo", "beta": 0.1}))
        scores = model(**inputs, score_table=table, ref_logps=ref_logps)
        scores.loss.backward()

    The forward pass takes:
        score_table: `ScoreTable` of the rows of the flattened hidden states, on their device.
        score_stats: any of ``"logps"``, ``"entropy"``, ``"mean_logit"``, ``"log_sum_sq"``,
            ``"is_top1"``; if there is one, ``.tokens`` holds these of each token.
        ref_logps: (N, 2), with ``loss`` only. Without it a loss that needs a reference is not
            computed, and the forward pass returns log-probs: so the reference itself is scored.
        num_pairs: with ``loss`` only: pairs of the step over all ranks, as in `preference_loss`.
            DDP and FSDP2 average gradients over W ranks: multiply the loss by W then.
        anything else: as before, except ``labels`` and ``logits_to_keep``. ``use_cache`` is False:
            with a cache, packed segments would see each other.

    Args:
        model: a Hugging Face causal language model, or a PEFT or DDP wrapper around one.
        plan: as in `linear_sequence_logps`, with ``loss`` as in `linear_preference_loss`.
        loss: None, a name or several, or a dict of `linear_preference_loss`'s options: ``loss,
            beta, compat, loss_weights`` and parameters of the loss.
        chunk_rows, exact_target: as in `linear_sequence_logps`.

    Returns:
        The same object. Its forward returns `ModelScores` for a score table.

    Raises:
        TypeError: ``model`` has no backbone and head as Hugging Face models do, is an
            encoder-decoder, or learns a prompt (its virtual tokens would shift every row).
        TensorError: an adapter on the head, or (at the call) a head that is quantised or a DTensor.
        ValueError: an unknown ``plan`` or loss; at the call, ``labels``, ``logits_to_keep`` or an
            unknown name in ``score_stats``; ``ref_logps`` without a loss.

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
    plans: tuple[str, ...] = PLANS if loss is None else pairwise.PLANS
    if plan not in plans:
        hint = "\nhint: it needs a `loss`" if plan in pairwise.PLANS else ""
        raise ValueError(f"`plan` must be one of {', '.join(plans)}, found {plan!r}{hint}")
    options = _loss_options(loss)
    inner = _inner_model(model)
    _head(inner)
    how = {"plan": plan, "chunk_rows": chunk_rows, "exact_target": exact_target}
    setattr(inner, _HEAD, how)
    setattr(inner, _LOSS, options)
    if _ORIGINAL in vars(inner):
        return model

    @functools.wraps(type(inner).forward)
    def forward(
        self: Any,
        *args: Any,
        score_table: ScoreTable | None = None,
        score_stats: Any = (),
        ref_logps: Tensor | None = None,
        num_pairs: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if score_table is not None:
            step = {"ref_logps": ref_logps, "num_pairs": num_pairs}
            return _score(self, score_table, score_stats, step, _keywords(self, args, kwargs))
        given = {"score_stats": score_stats or None, "ref_logps": ref_logps, "num_pairs": num_pairs}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"`{name}` needs a `score_table`")
        return getattr(self, _ORIGINAL)(*args, **kwargs)

    # Bound methods: a deep copy of the model then scores with the copy's weights, not with these.
    setattr(inner, _ORIGINAL, inner.forward)
    inner.forward = MethodType(forward, inner)
    return model


def _loss_options(loss: Any) -> dict[str, Any] | None:
    """Options of `linear_preference_loss`, with the names of the losses checked."""
    if loss is None:
        return None
    options = dict(loss) if isinstance(loss, Mapping) else {"loss": loss}
    names = options.setdefault("loss", "dpo")
    for name in [names] if isinstance(names, str) else names:
        if not isinstance(name, str):
            raise TypeError(f"`loss` must be a name or names, found {type(name).__name__}")
        if options.get("compat") is None:  # else a code base's own name, looked up with the options
            find_loss(name)
    return options


def _needs_reference(options: dict[str, Any]) -> bool:
    if options.get("compat") is not None:
        return True
    names = options["loss"]
    return any(find_loss(n).reference for n in ([names] if isinstance(names, str) else names))


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


def _keywords(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the model by name: the positions of its backbone's differ."""
    if not args:
        return kwargs
    bound = inspect.signature(type(model).forward).bind_partial(model, *args).arguments
    return {**dict(list(bound.items())[1:]), **kwargs}


def _score(
    model: Any, table: ScoreTable, stats: Any, step: dict[str, Any], kwargs: dict[str, Any]
) -> ModelScores:
    """The forward pass of a model with a score table."""
    check_is_table(table)
    names = (stats,) if isinstance(stats, str) else tuple(stats)
    for name in names:
        if name != "logps" and name not in STATS:
            accepted = ", ".join(("logps", *STATS))
            raise ValueError(f"`score_stats` must be among {accepted}, found {name!r}")
    options = getattr(model, _LOSS)
    if options is None:
        for name, value in step.items():
            if value is not None:
                raise ValueError(f"`{name}` needs `attach_scoring(model, loss=...)`")
    wanted = options is not None and (
        step["ref_logps"] is not None or not _needs_reference(options)
    )
    if wanted and names:
        raise ValueError("`score_stats` cannot be combined with a loss inside the forward pass")
    for name in ("labels", "logits_to_keep", "past_key_values"):
        value = kwargs.pop(name, None)
        if isinstance(value, Tensor) or value:
            raise ValueError(f"`{name}` cannot be combined with `score_table`")
    kwargs.pop("return_dict", None)
    kwargs["use_cache"] = False
    check_windows(kwargs.get("attention_mask"), model)
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
    how: dict[str, Any] = {**logit_transform(model.config), **getattr(model, _HEAD)}
    if wanted:
        out = pairwise.linear_preference_loss(
            hidden, weight, table, bias=bias, **how, **step, **options
        )
        return ModelScores(out.logps, None, out.loss, out, out.plan)
    if how["plan"] == "pairwise":
        how["plan"] = "auto"
    taken = choose_plan(how["plan"], weight, bias)
    if not names:
        logps = linear_sequence_logps(hidden, weight, table, bias=bias, **how)
        return ModelScores(logps, plan=taken)
    asked = tuple(name for name in names if name != "logps")
    tokens = linear_token_scores(hidden, weight, table, bias=bias, stats=asked, **how)
    kernels = tokens.logps.dtype != torch.float64
    logps = sum_sequences(tokens.logps, table, kernels)
    return ModelScores(logps, only(tokens, asked), plan=taken)
