"""Scoring inside a model's own forward pass, where DDP, FSDP2 and PEFT see it.

A wrapper works on what passes through ``model(...)``. A backbone and a head that are called from
outside it are not averaged over ranks (DDP says nothing) or not gathered (FSDP2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from dpo_ext.errors import TensorError
from dpo_ext.layout.graphs import outside_graphs
from dpo_ext.layout.masks import check_windows
from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch import pairwise
from dpo_ext.torch.agreement import NEUTRAL, Head, Logits, Verdict, examine, text_config
from dpo_ext.torch.interface import check_packed, choose_segments, restored, use_segment_attention
from dpo_ext.torch.logps.linear import (
    PLANS,
    choose_plan,
    linear_sequence_logps,
    linear_token_scores,
)
from dpo_ext.torch.logps.logits import sequence_logps, token_scores
from dpo_ext.torch.logps.scores import (
    STATS,
    TokenScores,
    check_is_table,
    check_shape,
    is_dtensor,
    only,
    sum_sequences,
)
from dpo_ext.torch.losses.compat import find_loss
from dpo_ext.torch.losses.pairs import PreferenceLoss, preference_loss

Model = TypeVar("Model", bound=nn.Module)
Attention = Literal["auto", "segments", "model"]
Plan = Literal["auto", "frozen", "recompute", "pairwise", "logits"]
_HEAD, _LOSS, _DTYPE = "_dpo_ext_head", "_dpo_ext_loss", "_dpo_ext_head_dtype"
_FOUND = "_dpo_ext_found"
_LINEAR = (*PLANS, "logits")
_WITH_LOSS = (*pairwise.PLANS, "logits")
_ROUTER = "output_router_logits"


class ModelScores(NamedTuple):
    """What a model with `attach_scoring` returns for a score table.

    - ``logps``: (n_groups, group_size) float32, log-prob of each sequence; differentiable.
      Beside a ``loss`` whose gradient was made in the forward pass (plan ``pairwise``) a term on it
      makes backward compute the gradient again; under ``torch.compile`` it is detached there.
    - ``tokens``: `TokenScores` of the table's M tokens if ``score_stats`` names any, else None.
    - ``loss``: the scalar of ``preference``, where `attach_scoring` was given a loss.
    - ``preference``: `PreferenceLoss` with rewards and metrics, or None.
    - ``plan``: of the head, as it was taken; with "(not verified)" behind it where nobody compared.
    - ``aux_loss``: the router loss of a mixture of experts, as the class's own forward gives it
      with ``output_router_logits``, else None. Add it to a loss of your own, times the model's
      ``router_aux_loss_coef``; ``.loss`` has it already.
    """

    logps: Tensor
    tokens: TokenScores | None = None
    loss: Tensor | None = None
    preference: PreferenceLoss | None = None
    plan: str | None = None
    aux_loss: Tensor | None = None


def attach_scoring(
    model: Model,
    *,
    plan: Plan = "auto",
    loss: str | Sequence[str] | Mapping[str, Any] | None = None,
    chunk_rows: int | None = None,
    exact_target: bool = False,
    head_dtype: torch.dtype | None = None,
    verify: bool | None = None,
    attention: Attention = "auto",
) -> Model:
    """The model, whose forward pass also takes ``score_table=`` and then returns log-probs.

    Same as, for ``scores = model(**inputs, score_table=table)``::

        scores.logps = sequence_logps(model(**inputs, use_cache=False).logits, table)

    but from the hidden states, without the logits::

        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        head   = model.get_output_embeddings()
        scores.logps = linear_sequence_logps(hidden, head.weight, table, bias=head.bias, ...)

    with the softcap and scale of the model's configuration, and inside ``model.forward``, so that
    the hooks of DDP, FSDP2 and PEFT run: attach, then wrap (``ddp = DDP(attach_scoring(model))``).
    Backbone and head are looked up at each call, since PEFT and FSDP2 replace them. Without
    ``score_table`` the original forward runs, so generation and other losses are unchanged; its
    signature is kept. Attaching again only sets the options.

    Before the first scored call a short row goes both ways, and the log-probs are compared. Where
    they are not the same - a layer between backbone and head, a head that is no linear layer, a
    hook, a scale of another name - the plan is ``"logits"``: the model's own logits of the scored
    positions, then our kernels on them. It is right for every model with logits, and keeps as
    many logits as the model itself.

    With ``loss`` the loss is computed inside as well, so that the head needs no recompute (plan
    ``pairwise`` of `linear_preference_loss`)::

        model = wrap(attach_scoring(model, loss={"loss": "dpo", "beta": 0.1}))
        scores = model(**inputs, score_table=table, ref_logps=ref_logps)
        scores.loss.backward()

    The forward pass takes:
        score_table: `ScoreTable` of the rows of the flattened hidden states, on their device. An
            encoder-decoder takes ``decoder_input_ids`` beside it and a table of
            ``ScoreTable.from_labels(labels, shift=False)``.
        score_stats: any of ``"logps"``, ``"entropy"``, ``"mean_logit"``, ``"log_sum_sq"``,
            ``"is_top1"``; if there is one, ``.tokens`` holds these of each token.
        ref_logps: (N, 2), with ``loss`` only. Without it a loss that needs a reference is not
            computed, and the forward pass returns log-probs: so the reference itself is scored.
        num_pairs: with ``loss`` only: pairs of the step over all ranks, as in `preference_loss`.
            DDP and FSDP2 average gradients over W ranks: multiply the loss by W then.
        anything else: as before, except ``labels`` and ``logits_to_keep``. ``use_cache`` is False:
            with a cache, packed segments would see each other.

    Args:
        model: a Hugging Face causal language model, an encoder-decoder or an image-text model, or a
            PEFT or DDP wrapper around one.
        plan: as in `linear_sequence_logps`, with ``loss`` as in `linear_preference_loss`; or
            ``"logits"``. ``"auto"`` takes ``"logits"`` where no other plan is right.
        loss: None, a name or several, or a dict of `linear_preference_loss`'s options: ``loss,
            beta, compat, loss_weights, chunk_pairs`` and parameters of the loss.
        chunk_rows, exact_target: as in `linear_sequence_logps`; not for ``"logits"``.
        head_dtype: dtype of the product with the head, ``torch.float32`` for a bfloat16 model whose
            logits should not be rounded. Costs a copy of the weight a call; not for ``"logits"``.
        verify: None: compare before the first scored call, and again when head, dtype or plan
            change (two forwards of 16 tokens). True: now. False: never; ``.plan`` says so.
        attention: ``"auto"``: packed and shared rows are attended segment by segment, as with
            `use_segment_attention`, where the model has the attention that transformers gives by
            itself, and not one that was chosen, such as flash attention. Compared at the first
            packed or shared call; a model that gives other numbers keeps its own, and a warning
            says so. ``"segments"``: that, or an error. ``"model"``: as it is.

    Returns:
        The same object. Its forward returns `ModelScores` for a score table.

    Raises:
        TypeError: ``model`` has no head as Hugging Face models do, learns a prompt (its virtual
            tokens would shift every row), or was prepared before for a precision that is no
            autocast.
        TensorError: packed rows for a model whose segments see each other, such as Mamba and
            hybrids; at the comparison, a plan other than ``"auto"`` and ``"logits"`` for a model
            whose logits are not those of its head, with how far off and what it looks like.
        ValueError: an unknown ``plan`` or loss; at the call, ``labels``, ``logits_to_keep`` or an
            unknown name in ``score_stats``; ``ref_logps`` without a loss.

    Numerics: as `linear_sequence_logps`; as `sequence_logps` for ``"logits"``.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> model = attach_scoring(LlamaForCausalLM(config))
    >>> ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    >>> labels = torch.tensor([[-100, -100, 3], [-100, -100, 4]])
    >>> scores = model(input_ids=ids, score_table=ScoreTable.from_labels(labels))
    >>> scores.logps.shape, scores.plan
    (torch.Size([1, 2]), 'recompute')
    >>> model(input_ids=ids).logits.shape
    torch.Size([2, 3, 11])
    """
    plans = _LINEAR if loss is None else _WITH_LOSS
    if plan not in plans:
        hint = "\nhint: it needs a `loss`" if plan in get_args(Plan) else ""
        raise ValueError(f"`plan` must be one of {', '.join(plans)}, found {plan!r}{hint}")
    if verify is not None and not isinstance(verify, bool):
        raise TypeError(f"`verify` must be True, False or None, found {type(verify).__name__}")
    if attention not in get_args(Attention):
        known = ", ".join(get_args(Attention))
        raise ValueError(f"`attention` must be one of {known}, found {attention!r}")
    options = _loss_options(loss)
    inner = _inner_model(model)
    if plan not in ("auto", "logits"):
        _linear_head(inner)
    if head_dtype is not None and not isinstance(head_dtype, torch.dtype):
        raise TypeError(f"`head_dtype` must be a torch.dtype, found {type(head_dtype).__name__}")
    how = {"plan": plan, "chunk_rows": chunk_rows, "exact_target": exact_target}
    setattr(inner, _HEAD, (how, verify is not False))
    setattr(inner, _DTYPE, head_dtype)
    setattr(inner, _LOSS, options)
    if attention == "segments":
        use_segment_attention(inner)
    elif attention == "auto":
        choose_segments(inner)
    vars(inner).pop(_FOUND, None)
    scoring = _scoring_of(inner)
    if scoring is None:
        scoring = inner.forward = ScoringForward(inner)
        inner.register_forward_pre_hook(_check_attached, with_kwargs=True)
    if verify:
        _compared(inner, scoring.own, {})
    return model


class ScoringForward:
    """A model's forward that also scores. An object and no function, so that a copy of the model, a
    pickled one among them, has one of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # What was put in the place of the class's forward, by hooks of offloading for example.
        self.replaced = vars(model).get("forward")
        self.cast = _autocast_of(self.replaced)
        if "_original_forward" in vars(model) and self.cast is None:
            raise TypeError(
                "`model` was prepared for a precision that scoring does not know\n"
                "hint: attach first: accelerator.prepare(attach_scoring(model))"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        restored()

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward without scoring."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        if self.replaced is not None:
            return self.replaced
        return MethodType(type(self.model).forward, self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.model).forward, self.model))

    def __call__(
        self,
        *args: Any,
        score_table: ScoreTable | None = None,
        score_stats: Any = (),
        ref_logps: Tensor | None = None,
        num_pairs: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        model = self.model
        if args and args[0] is model:  # bound to the model once more by who unwraps it
            args = args[1:]
        if score_table is not None:
            step = {"ref_logps": ref_logps, "num_pairs": num_pairs}
            call = _keywords(model, args, kwargs)
            with nullcontext() if self.cast is None else torch.autocast(**self.cast):
                return _score(model, self.own, score_table, score_stats, step, call)
        given = {"score_stats": score_stats or None, "ref_logps": ref_logps, "num_pairs": num_pairs}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"`{name}` needs a `score_table`")
        return self.own(*args, **kwargs)


def _autocast_of(forward: Any) -> dict[str, Any] | None:
    """The autocast that a decorated forward runs in, such as that of Accelerate's `prepare`."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        for cell in getattr(function, "__closure__", None) or ():
            cast = cell.cell_contents
            if isinstance(cast, torch.autocast):
                return {"device_type": cast.device, "dtype": cast.fast_dtype}
        forward = getattr(function, "__wrapped__", None)
    return None


def _scoring_of(model: Any) -> ScoringForward | None:
    """What scores in the forward of a model, be it wrapped by others."""
    forward = vars(model).get("forward")
    while forward is not None:
        if isinstance(forward, ScoringForward):
            return forward
        forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return None


def _check_attached(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """A forward that takes anything would take a score table, too, and return logits."""
    if torch.compiler.is_compiling() or kwargs.get("score_table") is None:
        return
    if _scoring_of(model) is None:
        raise TypeError(
            "`score_table`: the forward of this model was replaced, and scores no longer\n"
            "hint: attach_scoring(model) attaches it again"
        )


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
    heads = getattr(model, "get_output_embeddings", None)
    has_base = getattr(model, "base_model", model) is not model
    if heads is None or not (has_base or _output_of(model) is not None):
        raise TypeError(
            "`model` must have `base_model` and `get_output_embeddings()` as Hugging Face's causal "
            f"language models have, found {type(model).__name__}\n"
            "hint: call linear_sequence_logps with your own hidden states and head"
        )
    return model


def _output_of(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _linear_head(model: Any) -> Head:
    """The linear layer that gives logits, as it is now; TensorError where there is none."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise TensorError(f"the backbone of {type(model).__name__} is an encoder-decoder")
    if getattr(model, "base_model", model) is model:
        raise TensorError(f"{type(model).__name__} has no backbone beside its head")
    head = _output_of(model)
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
    return Head(head, weight, getattr(head, "bias", None))


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


def _usable(transform: Logits) -> bool:
    numbers = [value for value in transform.values() if value is not None]
    return all(isinstance(n, (int, float)) and 0 < n < float("inf") for n in numbers)


def _keywords(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the model by name: the positions of its backbone's differ."""
    if not args:
        return kwargs
    bound = inspect.signature(type(model).forward).bind_partial(model, *args).arguments
    return {**dict(list(bound.items())[1:]), **kwargs}


# ---- which plan is right -------------------------------------------------------------------------


def _key(model: Any, router: bool) -> tuple[Any, ...]:
    """What a comparison was made for: another head, hook, dtype or plan wants another."""
    head = _output_of(model)
    inner = getattr(head, "base_layer", head)
    if hasattr(head, "modules_to_save"):
        inner = (head.disable_adapters, *map(str, head.active_adapters))
    state = None
    if isinstance(head, nn.Module):
        hooks = [*getattr(head, "_forward_hooks", ()), *getattr(head, "_forward_pre_hooks", ())]
        state = (*hooks, id(vars(head).get("forward")), getattr(head, "disable_adapters", None))
    weight = getattr(head, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) else None
    device = weight.device.type if isinstance(weight, Tensor) else "cpu"
    device = "cpu" if device == "meta" else device
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    how, _ = getattr(model, _HEAD)
    return (id(head), id(inner), type(head), state, dtype, cast, how["plan"], router)


def _verdict(model: Any, own: Callable[..., Any], call: Mapping[str, Any]) -> Verdict:
    """Compares, once for each key; TensorError where the plan that was asked for is not right."""
    how, verify = getattr(model, _HEAD)
    router = _router(model, call)
    try:
        head: Head | str = _linear_head(model)
    except TensorError as error:
        head = str(error).partition("\n")[0]
    named = logit_transform(model.config)
    plan = how["plan"]
    if not verify and not router and not isinstance(head, str) and plan != "logits":
        return Verdict(named)
    transforms = [t for t in (named, NEUTRAL) if _usable(t)]
    if named == NEUTRAL:
        transforms = [NEUTRAL]
    given = head if plan != "logits" else 'plan="logits" was asked for'
    found = examine(model, own, given, transforms, _device(model, call), keeps=router)
    if found.transform is None and plan not in ("auto", "logits"):
        raise TensorError(
            f'`plan="{plan}"` is not right for {type(model).__name__}: {found.reason}\n'
            'hint: plan="auto" takes the model\'s own logits where they are needed'
        )
    return found


def _device(model: nn.Module, call: Mapping[str, Any]) -> torch.device:
    """Where the inputs of a call are; without any, where the first weights are."""
    for value in (*call.values(), *model.parameters()):  # torch 2.8 compiles no `next` of these
        if isinstance(value, Tensor) and value.device.type != "meta":
            return value.device
    return torch.device("cpu")


@outside_graphs(
    "the comparison of attach_scoring; attach_scoring(model, verify=True) makes it before"
)
def _compared(model: Any, own: Callable[..., Any], call: Mapping[str, Any]) -> Verdict:
    key = _key(model, _router(model, call))
    known = vars(model).get(_FOUND)
    if known is None or known[0] != key:
        known = (key, _verdict(model, own, call))
        vars(model)[_FOUND] = known
    return known[1]


def _found(model: Any, own: Callable[..., Any], call: Mapping[str, Any]) -> Verdict:
    if torch.compiler.is_compiling():
        known = getattr(model, _FOUND, None)
        if known is not None:
            return known[1]
    return _compared(model, own, call)


# ---- the forward pass ----------------------------------------------------------------------------


def _router(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the call asks for the router loss of a mixture of experts."""
    asked = kwargs.get(_ROUTER)
    if asked is None:
        asked = getattr(text_config(model.config), _ROUTER, None)
    return bool(asked)


def _score(
    model: Any,
    own: Callable[..., Any],
    table: ScoreTable,
    stats: Any,
    step: dict[str, Any],
    kwargs: dict[str, Any],
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
    check_windows(kwargs.get("attention_mask"), model)
    router = _router(model, kwargs)
    if not torch.compiler.is_compiling() and getattr(model, _HEAD)[1]:
        check_packed(model, kwargs)
    found = _found(model, own, kwargs)
    kwargs["use_cache"] = _cached(model, kwargs) if found.caches else False
    wish = (names, step, options if wanted else None)
    if found.transform is None or (router and not found.keeps):
        return _by_logits(own, found, table, kwargs, wish, model)
    hidden, aux = _hidden(model, own, kwargs) if router else (model.base_model(**kwargs)[0], None)
    head = _linear_head(model)
    if hidden.device != head.weight.device:  # a model spread over devices
        hidden = hidden.to(head.weight.device)
    scores = _by_head(model, hidden, head, found.transform, table, wish)
    return _with_router(model, scores, aux)


def _cached(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """``use_cache`` of a model whose logits depend on it, as the caller has it."""
    cached = kwargs.get("use_cache")
    name = type(model).__name__
    if cached is None:
        raise TensorError(
            f"the logits of {name} depend on `use_cache`\n"
            "hint: say which are meant: use_cache=False as in training, or use_cache=True"
        )
    if cached and kwargs.get("position_ids") is not None:
        raise TensorError(
            f"the logits of {name} depend on `use_cache`, with which packed segments see each "
            "other\nhint: use_cache=False, or padded rows without `position_ids`"
        )
    return bool(cached)


def _by_head(
    model: Any, hidden: Tensor, head: Head, transform: Logits, table: ScoreTable, wish: Any
) -> ModelScores:
    """Log-probs, or the loss, by the product of hidden states and head."""
    names, step, options = wish
    given, verify = getattr(model, _HEAD)
    how: dict[str, Any] = {**transform, **given}
    note = "" if verify else " (not verified)"
    _, weight, bias = head
    dtype = getattr(model, _DTYPE)
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if options is not None:
        out = pairwise.linear_preference_loss(
            hidden, weight, table, bias=bias, **how, **step, **options
        )
        logps = out.logps if out.differentiable_logps is None else out.differentiable_logps
        return ModelScores(logps, None, out.loss, out, f"{out.plan}{note}")
    if how["plan"] == "pairwise":
        how["plan"] = "auto"
    taken = choose_plan(how["plan"], weight, bias)
    if not names:
        logps = linear_sequence_logps(hidden, weight, table, bias=bias, **how)
        return ModelScores(logps, plan=f"{taken}{note}")
    asked = tuple(name for name in names if name != "logps")
    tokens = linear_token_scores(hidden, weight, table, bias=bias, stats=asked, **how)
    kernels = tokens.logps.dtype != torch.float64
    logps = sum_sequences(tokens.logps, table, kernels)
    return ModelScores(logps, only(tokens, asked), plan=f"{taken}{note}")


def _by_logits(
    own: Callable[..., Any],
    found: Verdict,
    table: ScoreTable,
    kwargs: dict[str, Any],
    wish: Any,
    model: Any,
) -> ModelScores:
    """The same by the model's own logits: of the scored positions alone, if it can give those."""
    names, step, options = wish
    if getattr(model, _DTYPE) is not None:
        raise TensorError(
            f"`head_dtype`: {type(model).__name__} is scored by its own logits: {found.reason}\n"
            "hint: leave `head_dtype` out"
        )
    ids = kwargs.get("decoder_input_ids")
    if ids is None:
        ids = kwargs.get("input_ids")
    # How many positions are scored is a value, which a compiled graph cannot depend on.
    compiles = torch.compiler.is_compiling()
    if found.keeps and not compiles and ids is not None and ids.dim() == 2:
        check_shape(table.shape, ids[..., None], "input_ids")
        positions, kept = _kept(table, *ids.shape)
        out = own(**kwargs, logits_to_keep=positions, return_dict=True)
        if out.logits.shape[1] == len(positions):
            table = kept
    else:
        out = own(**kwargs, return_dict=True)
    logits, aux = out.logits, getattr(out, "aux_loss", None)
    if table.device != logits.device:
        logits = logits.to(table.device)
    asked = tuple(name for name in names if name != "logps")
    tokens = token_scores(logits, table, stats=asked) if names else None
    if tokens is None:
        logps = sequence_logps(logits, table)
    else:
        logps = sum_sequences(tokens.logps, table, tokens.logps.dtype != torch.float64)
    scores = ModelScores(logps, tokens and only(tokens, asked), plan="logits")
    if options is not None:
        ref = step["ref_logps"]
        lengths = options.get("lengths")
        if lengths is None and not callable(options["loss"]):
            lengths = table.lengths
        of_the_head = ("lengths", "chunk_pairs")
        rest = {name: value for name, value in options.items() if name not in of_the_head}
        out = preference_loss(
            logps,
            None if ref is None else ref.to(logps.dtype),
            lengths=lengths,
            num_pairs=step["num_pairs"],
            **rest,
        )
        out.plan = "logits"
        scores = ModelScores(logps, None, out.loss, out, "logits")
    return _with_router(model, scores, aux)


def _kept(table: ScoreTable, rows: int, columns: int) -> tuple[Tensor, ScoreTable]:
    """The positions at which any row of (B, T) is scored, and the table of the logits there."""
    scored = table.targets >= 0
    positions = torch.unique(table.logit_rows[scored] % columns)
    if not len(positions):
        positions = torch.zeros(1, dtype=torch.int64, device=table.device)
    row, column = table.logit_rows // columns, table.logit_rows % columns
    place = torch.searchsorted(positions, column).clamp(max=len(positions) - 1)
    count = len(positions)
    return positions, table.with_rows(row * count + place, table.targets, (rows, count))


def _with_router(model: Any, scores: ModelScores, aux: Tensor | None) -> ModelScores:
    """The router loss beside the scores, and in the loss with the model's own coefficient."""
    if not isinstance(aux, Tensor):
        return scores
    if scores.loss is not None:
        text = text_config(model.config)
        named = getattr(text, "router_aux_loss_coef", 0.0)
        coefficient = float(getattr(model, "router_aux_loss_coef", None) or named or 0.0)
        total = scores.loss + coefficient * aux.to(scores.loss)
        scores = scores._replace(loss=total)
    return scores._replace(aux_loss=aux)


def _hidden(
    model: Any, own: Callable[..., Any], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Hidden states and router loss of the model's own forward, with the logits of one position."""
    with _watched(model.base_model) as seen:
        one = torch.zeros(1, dtype=torch.int64, device=_device(model, kwargs))
        out = own(**kwargs, logits_to_keep=one, return_dict=True)
    if not seen:  # nobody called the backbone as a module
        return model.base_model(**kwargs)[0], out.aux_loss
    return seen[0], out.aux_loss


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = module.register_forward_hook(see)
    try:
        yield seen
    finally:
        handle.remove()
