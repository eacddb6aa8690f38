"""`LOSSES`, the table of pair losses, and `register_loss`, which adds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dpo_ext.torch.losses.row import LOSSES, LossRow, Parameter, finite


def register_loss(
    name: str,
    function: Callable[..., Tensor] | None = None,
    *,
    parameters: Mapping[str, float | Parameter | None] | None = None,
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
            `Parameter` has a domain.
        reference, lengths: it needs `ref_logps`, `lengths`: calls without them are an error.
        couples_batch: a pair's gradient depends on the other pairs.
        only_margin, monotone, convex: properties it has;
            `dpo_ext.testing.check_loss_invariants(name)` holds it to them.
        text, paper: the formula and its source, for ``dpo-ext losses``.

    Returns:
        The function, so that it works as a decorator.

    Raises:
        ValueError: the table has the name already.

    >>> @register_loss("square_margin", parameters={"beta": 0.1}, only_margin=True)
    ... def square_margin(logps, ref_logps, beta):
    ...     ratios = logps - ref_logps
    ...     return (beta * (ratios[:, 0] - ratios[:, 1]) - 1) ** 2
    >>> logps = torch.tensor([[-1.0, -2.0]])
    >>> preference_loss(logps, logps, loss="square_margin").loss
    tensor(1.)
    """
    if function is None:
        return lambda f: register_loss(
            name, f, parameters=parameters, reference=reference, lengths=lengths,
            couples_batch=couples_batch, only_margin=only_margin, monotone=monotone, convex=convex,
            text=text, paper=paper,
        )  # fmt: skip
    if name in LOSSES:
        raise ValueError(f"the table has a loss {name!r} already")
    if not callable(function):
        raise TypeError(f"`function` must be callable, found {type(function).__name__}")
    LOSSES[name] = LossRow(
        name=name,
        formula=function,
        text=text,
        paper=paper,
        parameters={
            key: value if isinstance(value, Parameter) else finite(value)
            for key, value in (parameters or {}).items()
        },
        reference=reference,
        lengths=lengths,
        couples_batch=couples_batch,
        only_margin=only_margin,
        monotone="cr" if monotone else "",
        convex=convex,
        autograd=True,
    )
    return function
