"""Scoring inside a model's own forward pass, where DDP, FSDP2 and PEFT see it.

A wrapper works on what passes through ``model(...)``. A backbone and a head that are called from
outside it are not averaged over ranks (DDP says nothing) or not gathered (FSDP2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch import pairwise
from dpo_ext.torch.forward import FOUND, HEAD, HEAD_DTYPE, LOSS, compared, score
from dpo_ext.torch.heads import inner_model, linear_head
from dpo_ext.torch.interface import choose_segments, restored, use_segment_attention
from dpo_ext.torch.logps.linear import PLANS
from dpo_ext.torch.losses.compat import find_loss

Model = TypeVar("Model", bound=nn.Module)
Attention = Literal["auto", "segments", "model"]
Plan = Literal["auto", "frozen", "recompute", "pairwise", "logits"]
_LINEAR = (*PLANS, "logits")
_WITH_LOSS = (*pairwise.PLANS, "logits")


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
    many logits as the model itself. LoRA and DoRA on the head need no logits: their products stand
    beside the head's, with dropout that acts in training excepted.

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
            hybrids; a call inside ``context_parallel``; at the comparison, a plan other than
            ``"auto"`` and ``"logits"`` for a model whose logits are not those of its head, with how
            far off and what it looks like.
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
    inner = inner_model(model)
    if plan not in ("auto", "logits"):
        linear_head(inner)
    if head_dtype is not None and not isinstance(head_dtype, torch.dtype):
        raise TypeError(f"`head_dtype` must be a torch.dtype, found {type(head_dtype).__name__}")
    how = {"plan": plan, "chunk_rows": chunk_rows, "exact_target": exact_target}
    setattr(inner, HEAD, (how, verify is not False))
    setattr(inner, HEAD_DTYPE, head_dtype)
    setattr(inner, LOSS, options)
    if attention == "segments":
        use_segment_attention(inner)
    elif attention == "auto":
        choose_segments(inner)
    vars(inner).pop(FOUND, None)
    scoring = _scoring_of(inner)
    if scoring is None:
        scoring = inner.forward = ScoringForward(inner)
        inner.register_forward_pre_hook(_check_attached, with_kwargs=True)
    if verify:
        compared(inner, scoring.own, {})
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
                return score(model, self.own, score_table, score_stats, step, call)
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


def _keywords(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the model by name: the positions of its backbone's differ."""
    if not args:
        return kwargs
    bound = inspect.signature(type(model).forward).bind_partial(model, *args).arguments
    return {**dict(list(bound.items())[1:]), **kwargs}
