"""The forward pass that gives scores: by which plan, and what comes of it.

What a caller of `attach_scoring` wants stands on the model itself, and what a comparison found too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_ext.errors import TensorError
from dpo_ext.layout.graphs import outside_graphs
from dpo_ext.layout.masks import check_windows
from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch import pairwise
from dpo_ext.torch.agreement import NEUTRAL, Logits, Verdict, examine, text_config
from dpo_ext.torch.heads import (
    Head,
    head_state,
    is_usable,
    linear_head,
    logit_transform,
    output_of,
)
from dpo_ext.torch.interface import check_packed
from dpo_ext.torch.logps.linear import choose_plan, linear_sequence_logps, linear_token_scores
from dpo_ext.torch.logps.logits import sequence_logps, token_scores
from dpo_ext.torch.logps.scores import (
    STATS,
    TokenScores,
    check_is_table,
    check_shape,
    only,
    sum_sequences,
)
from dpo_ext.torch.losses.compat import find_loss
from dpo_ext.torch.losses.pairs import PreferenceLoss, preference_loss

HEAD, LOSS, HEAD_DTYPE = "_dpo_ext_head", "_dpo_ext_loss", "_dpo_ext_head_dtype"
"""Attributes of a model: what `attach_scoring` was told."""
FOUND = "_dpo_ext_found"
"""Attribute of a model: what comparisons found, by key, and what the last one did."""
_KEPT = 8  # with an adapter and without, in training and not
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


# ---- which plan is right -------------------------------------------------------------------------


def _key(model: Any, router: bool) -> tuple[Any, ...]:
    """What a comparison was made for."""
    weight = getattr(output_of(model), "weight", None)
    device = weight.device.type if isinstance(weight, Tensor) else "cpu"
    device = "cpu" if device == "meta" else device
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    how, _ = getattr(model, HEAD)
    return (*head_state(model), cast, how["plan"], router)


def _verdict(model: Any, own: Callable[..., Any], call: Mapping[str, Any]) -> Verdict:
    """Compares, once for each key; TensorError where the plan that was asked for is not right."""
    how, verify = getattr(model, HEAD)
    router = _router(model, call)
    try:
        head: Head | str = linear_head(model)
    except TensorError as error:
        head = str(error).partition("\n")[0]
    named = logit_transform(model.config)
    plan = how["plan"]
    if not verify and not router and not isinstance(head, str) and plan != "logits":
        return Verdict(named)
    transforms = [t for t in (named, NEUTRAL) if is_usable(t)]
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
def compared(model: Any, own: Callable[..., Any], call: Mapping[str, Any]) -> Verdict:
    key = _key(model, _router(model, call))
    known, _ = vars(model).get(FOUND, ({}, None))
    if key not in known and len(known) >= _KEPT:
        known = {}
    found = known[key] if key in known else _verdict(model, own, call)
    vars(model)[FOUND] = ({**known, key: found}, found)
    return found


def _found(model: Any, own: Callable[..., Any], call: Mapping[str, Any]) -> Verdict:
    if torch.compiler.is_compiling():
        known = getattr(model, FOUND, None)
        if known is not None:
            return known[1]
    return compared(model, own, call)


# ---- the forward pass ----------------------------------------------------------------------------


def _router(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the call asks for the router loss of a mixture of experts."""
    asked = kwargs.get(_ROUTER)
    if asked is None:
        asked = getattr(text_config(model.config), _ROUTER, None)
    return bool(asked)


def _needs_reference(options: dict[str, Any]) -> bool:
    if options.get("compat") is not None:
        return True
    names = options["loss"]
    return any(find_loss(n).reference for n in ([names] if isinstance(names, str) else names))


def _check_whole_sequences() -> None:
    """Rows of a rank that hold a part of each sequence have sums that are no sequence's."""
    # what `context_parallel` puts in its place; told without the import of torch.distributed
    attention = torch.nn.functional.scaled_dot_product_attention
    if str(getattr(attention, "__module__", "")).startswith("torch.distributed"):
        raise TensorError(
            "`score_table` inside `context_parallel`: each rank holds a part of every sequence\n"
            "hint: context_parallel_sequence_logps(model(...).logits, context_parallel_table(table,"
            " rows)) of dpo_ext.torch.parallel adds the parts"
        )


def score(
    model: Any,
    own: Callable[..., Any],
    table: ScoreTable,
    stats: Any,
    step: dict[str, Any],
    kwargs: dict[str, Any],
) -> ModelScores:
    """The forward pass of a model with a score table."""
    check_is_table(table)
    _check_whole_sequences()
    names = (stats,) if isinstance(stats, str) else tuple(stats)
    for name in names:
        if name != "logps" and name not in STATS:
            accepted = ", ".join(("logps", *STATS))
            raise ValueError(f"`score_stats` must be among {accepted}, found {name!r}")
    options = getattr(model, LOSS)
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
    if not torch.compiler.is_compiling() and getattr(model, HEAD)[1]:
        check_packed(model, kwargs)
    found = _found(model, own, kwargs)
    kwargs["use_cache"] = _cached(model, kwargs) if found.caches else False
    wish = (names, step, options if wanted else None)
    if found.transform is None or (router and not found.keeps):
        return _by_logits(own, found, table, kwargs, wish, model)
    hidden, aux = _hidden(model, own, kwargs) if router else (model.base_model(**kwargs)[0], None)
    head = linear_head(model)
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
    given, verify = getattr(model, HEAD)
    how: dict[str, Any] = {**transform, **given}
    note = "" if verify else " (not verified)"
    dtype = getattr(model, HEAD_DTYPE)
    if dtype is not None:
        hidden, head = hidden.to(dtype), head.to(dtype)
    _, weight, bias, low = head
    how["adapter"] = low
    if options is not None:
        out = pairwise.linear_preference_loss(
            hidden, weight, table, bias=bias, **how, **step, **options
        )
        logps = out.logps if out.differentiable_logps is None else out.differentiable_logps
        return ModelScores(logps, None, out.loss, out, f"{out.plan}{note}")
    if how["plan"] == "pairwise":
        how["plan"] = "auto"
    taken = choose_plan(how["plan"], weight, bias, low)
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
    if getattr(model, HEAD_DTYPE) is not None:
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
