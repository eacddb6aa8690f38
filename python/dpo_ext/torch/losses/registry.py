"""`LOSSES`, the table of pair losses, and `register_loss`, which adds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from torch import Tensor

from dpo_ext.torch.losses import batch_rows, margin_rows, side_rows
from dpo_ext.torch.losses.row import LossRow, Parameter, finite
from dpo_ext.torch.losses.signature import check_call, parameters_of

LOSSES: dict[str, LossRow] = {**margin_rows.ROWS, **side_rows.ROWS, **batch_rows.ROWS}
"""Every loss of pairs, by name."""

F = TypeVar("F", bound=Callable[..., Tensor])


class LossOptions(TypedDict, total=False):
    """The options of `register_loss`, for the types of its two forms."""

    parameters: Mapping[str, float | Parameter | None] | None
    replace: bool | Literal["built-in"]
    reference: bool
    lengths: bool
    couples_batch: bool
    only_margin: bool
    monotone: bool
    convex: bool
    text: str
    paper: str


@overload
def register_loss(
    name: str, function: None = None, **options: Unpack[LossOptions]
) -> Callable[[F], F]: ...


@overload
def register_loss(name: str, function: F, **options: Unpack[LossOptions]) -> F: ...


def register_loss(
    name: str,
    function: Callable[..., Tensor] | None = None,
    *,
    parameters: Mapping[str, float | Parameter | None] | None = None,
    replace: bool | Literal["built-in"] = False,
    reference: bool = True,
    lengths: bool = False,
    couples_batch: bool = False,
    only_margin: bool = False,
    monotone: bool = False,
    convex: bool = False,
    text: str = "",
    paper: str = "",
) -> Any:
    """Add a loss of your own to the table, as a call or as a decorator.

    Args:
        name: a name that the table does not have.
        function: called with ``(logps, ref_logps, **parameters)``, and with ``lengths`` third if
            ``lengths=True``; returns the loss of each pair (N,) or a scalar. Autograd
            differentiates it.
        parameters: name to default; None as a default means that the caller must give it; a
            `Parameter` has a domain. By default those of the function's signature, behind the
            log-probs: a default that is a number is the default, without one the caller must give
            it, and any other default stays the function's own.
        replace: True replaces a registered loss of this name, so that the cell of a notebook can
            run again; ``"built-in"`` also one that came with the table, under whose name code bases
            (``compat``) then find yours.
        reference, lengths: it needs `ref_logps`, `lengths`: calls without them are an error.
        couples_batch: a pair's gradient depends on the other pairs.
        only_margin, monotone, convex: properties it has;
            `dpo_ext.testing.check_loss_invariants(name)` holds it to them.
        text, paper: the formula and its source, for ``dpo-ext losses``.

    Returns:
        The function, so that it works as a decorator.

    Raises:
        ValueError: the table has the name already, and ``replace`` does not say to replace it.
        TypeError: the function cannot be called like that; the message says how it is called.

    >>> import torch
    >>> from dpo_ext.torch import preference_loss
    >>> @register_loss("square_margin", replace=True, only_margin=True)
    ... def square_margin(logps, ref_logps, beta=0.1):
    ...     ratios = logps - ref_logps
    ...     return (beta * (ratios[:, 0] - ratios[:, 1]) - 1) ** 2
    >>> logps = torch.tensor([[-1.0, -2.0]])
    >>> preference_loss(logps, logps, loss="square_margin").loss
    tensor(1.)
    >>> preference_loss(logps, 0 * logps, loss="square_margin", beta=1.0).loss
    tensor(0.)
    """
    if function is None:
        options: LossOptions = {
            "parameters": parameters, "replace": replace, "reference": reference,
            "lengths": lengths, "couples_batch": couples_batch, "only_margin": only_margin,
            "monotone": monotone, "convex": convex, "text": text, "paper": paper,
        }  # fmt: skip
        return lambda f: register_loss(name, f, **options)
    _check_free(name, replace)
    tensors = ("logps", "ref_logps", "lengths") if lengths else ("logps", "ref_logps")
    own = parameters_of(function, lengths) if parameters is None else _given(parameters)
    check_call(function, tensors, own)
    LOSSES[name] = LossRow(
        name=name,
        formula=function,
        text=text,
        paper=paper,
        parameters=own,
        reference=reference,
        lengths=lengths,
        couples_batch=couples_batch,
        only_margin=only_margin,
        falls_in_chosen=monotone,
        rises_in_rejected=monotone,
        convex=convex,
        autograd=True,
    )
    return function


def _given(parameters: Mapping[str, float | Parameter | None]) -> dict[str, Parameter]:
    return {
        name: value if isinstance(value, Parameter) else finite(value)
        for name, value in parameters.items()
    }


def _check_free(name: str, replace: bool | Literal["built-in"]) -> None:
    if replace not in (True, False, "built-in"):
        raise ValueError(f'`replace` must be True, False or "built-in", found {replace!r}')
    row = LOSSES.get(name)
    if row is None or replace == "built-in" or (replace and row.autograd):
        return
    if row.autograd:
        raise ValueError(
            f"the table has a loss {name!r} already\nhint: replace=True puts yours in its place"
        )
    raise ValueError(
        f"the table has a loss {name!r} already, which came with it\n"
        'hint: choose another name, or replace="built-in" to put yours in its place'
    )
